"""What these pages show of the code: tables, command lines, and ``llms.txt``. A Sphinx extension.

The functions that make text are pure, return Markdown, and need no Sphinx. `setup` adds the directive ``generated``,
whose argument is a name in `MAKERS` and what that takes, such as ``reasons GapReason``; lets names in docstrings be
links; and writes the pages as Markdown beside the built ones, for language models.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import flask
from blinker import NamedSignal

import sse_batcher
from sse_batcher import prometheus, reasons, signals, stats
from sse_batcher.doctor.findings import CODES
from sse_batcher.flask.config import OWN_DEFAULTS, PREFIX, FlaskConfig
from sse_batcher.options import BatchOptions, ClientOptions, HistoryOptions
from sse_batcher.runtime import log_fields

PAGES = Path(__file__).parent
OPTION_CLASSES = (BatchOptions, ClientOptions, HistoryOptions)
UNITS = ("seconds", "milliseconds", "bytes", "frames", "events", "clients")
"""The first word of an option's text, if it has a unit. The rest of that sentence is the range."""

Row = tuple[str, ...]


def table(head: Row, rows: Iterable[Row]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def code(text: str) -> str:
    """Return inline code, or nothing."""
    return f"`{text}`" if text else ""


def one_line(text: str) -> str:
    """Return the text without its line ends."""
    return " ".join(text.split())


def sentence(text: str) -> str:
    """Return the text with a capital letter, unless it begins with code."""
    return text[:1].upper() + text[1:]


# -- docstrings --------------------------------------------------------------------------------------------------------


def definitions(documented: Any) -> dict[str, str]:
    """Return what a docstring says of each `name` that has a line of its own, with its text below it."""
    text = inspect.getdoc(documented) or ""
    found = re.findall(r"^((?:`\w+`(?:, )?)+)\n((?:[ ]{4}.*\n?)+)", text, flags=re.M)
    return {name: one_line(meaning) for names, meaning in found for name in re.findall(r"`(\w+)`", names)}


def attribute_docs(source: ast.Module | ast.ClassDef) -> dict[str, str]:
    """Return the docstrings that stand below the assignments of a module or a class, by name."""
    found = {}
    for statement, after in zip(source.body, source.body[1:], strict=False):
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if isinstance(target, ast.Name) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[target.id] = inspect.cleandoc(str(after.value.value))
    return found


def parsed(documented: Any) -> ast.Module:
    """Return the syntax tree of a module, or of a class."""
    return ast.parse(inspect.getsource(documented))


# -- options -----------------------------------------------------------------------------------------------------------


def options() -> str:
    """Return all options with their keys, units, defaults and meanings."""
    rows = [_option("batching", definitions(sse_batcher.SSEManager), True)]
    for each in OPTION_CLASSES:
        texts = definitions(each)
        rows += [_option(option.name, texts, getattr(each(), option.name)) for option in fields(each)]
    rows.append(_option("backend", definitions(sse_batcher.SSEManager), OWN_DEFAULTS["backend"]))
    texts = definitions(FlaskConfig)
    rows += [
        _option(name, texts, OWN_DEFAULTS[name], only_key=True)
        for name in ("url_prefix", "cors_origins", "token_salt", "monitor_content", "monitor_addresses")
    ]
    return table(("Option, config key", "Unit", "Default", "Meaning"), rows)


def option_classes() -> str:
    """Return which options are keywords of which class."""
    return "".join(
        f"- `{each.__name__}`: {', '.join(f'`{option.name}`' for option in fields(each))}\n" for each in OPTION_CLASSES
    )


def _option(name: str, texts: Mapping[str, str], default: Any, *, only_key: bool = False) -> Row:
    first, _, rest = texts[name].partition(". ")
    has_unit = re.split(r"\W", first)[0].lower() in UNITS
    unit, meaning = (first[0].lower() + first[1:], rest) if has_unit else ("", texts[name])
    names = ("" if only_key else f"`{name}`<br>") + f"`{PREFIX}{name.upper()}`"
    return names, unit, f"`{shown(default)}`", meaning


def shown(value: Any) -> str:
    """Return a default as one writes it."""
    if isinstance(value, frozenset):
        return f"{{{', '.join(shown(each) for each in sorted(value))}}}" if value else "set()"
    if isinstance(value, Mapping):
        return repr(dict(value))
    if isinstance(value, str):
        return '"' + repr(str(value))[1:-1] + '"'
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:_}" if type(value) is int and value > 9999 else repr(value)


# -- counters, signals, reasons ----------------------------------------------------------------------------------------


def counters() -> str:
    """Return the fields of the stats with their names for Prometheus and their meanings."""
    rows, metrics = [], [*prometheus.ROWS, prometheus._CHANNELS, prometheus._CHANNEL_CLIENTS]
    for each in (stats.BatcherStats, stats.ManagerStats):
        for name, text in attribute_docs(parsed(each).body[0]).items():  # type: ignore[arg-type]
            names = [
                code(prometheus.PREFIX + row.name) + (f", by `{row.label}`" if row.label else "")
                for row in metrics
                if row.field == name
            ]
            rows.append((f"`{name}`", "; ".join(names), one_line(text)))
    return table(("Counter", "For Prometheus", "Meaning"), rows)


def signal_rows() -> list[tuple[str, str, str]]:
    """Return each signal: its name, when it is sent, and its arguments."""
    rows = []
    for name, signal in vars(signals).items():
        if isinstance(signal, NamedSignal):
            when, _, arguments = one_line(signal.__doc__ or "").partition(" Arguments: ")
            rows.append((name, when, arguments))
    return rows


def signal_table() -> str:
    """Return all signals."""
    rows = [(f"`{name}`", when, sentence(arguments)) for name, when, arguments in signal_rows()]
    return table(("Signal", "Sent when", "Arguments"), rows)


def reason_rows(kind: str) -> list[tuple[str, str]]:
    """Return each reason of a kind, such as ``GapReason``, and its meaning."""
    text = attribute_docs(parsed(reasons))[kind]
    return [(name, one_line(meaning)) for name, meaning in re.findall(r"^- ``(\w+)``: ((?:.|\n  )*)", text, flags=re.M)]


def reason_table(kind: str) -> str:
    """Return the reasons of a kind."""
    return table(("`reason`", "Meaning"), [(f"`{name}`", sentence(meaning)) for name, meaning in reason_rows(kind)])


def finding_table() -> str:
    """Return the codes of the doctor's findings."""
    return table(("Code", "Means"), [(f"`{code}`", text) for code, text in CODES.items()])


# -- log lines ---------------------------------------------------------------------------------------------------------

LEVELS = {"exception": "ERROR", **{name.lower(): name for name in ("DEBUG", "INFO", "WARNING", "ERROR")}}
"""The methods of a logger, and their levels."""


def log_lines() -> str:
    """Return each line that the package may log, with its logger, level and fields. … stands for what varies."""
    rows = set()
    for path in Path(sse_batcher.__file__).parent.rglob("*.py"):
        source = ast.parse(path.read_text())
        for scope, call in _log_calls(source):
            level, text = _level_and_text(call, scope)
            logger = _logger_of(source) or "sse_batcher.transports"  # of `detach_policy`, which others call
            name, *values = log_fields_of(call)
            shown = ", ".join(f"`{log_fields.PREFIX}{value}`" for value in values)
            for each in _texts(text, scope, source):
                rows.add((f"`{logger}`", level, f"`{name}`", code(one_line(re.sub(r"%[.\d]*[a-z]", "…", each))), shown))
    return table(("Logger", "Level", "`sse_code`", "Line", "Other fields"), sorted(rows))


def log_fields_of(call: ast.Call) -> list[str]:
    """Return what a call that logs gives to `log_fields`: the name of the line, and those of its other fields."""
    for keyword in call.keywords:
        made = keyword.value
        if keyword.arg == "extra" and isinstance(made, ast.Call) and ast.unparse(made.func) == "log_fields":
            return [*(str(ast.literal_eval(each)) for each in made.args), *(str(each.arg) for each in made.keywords)]
    raise ValueError(f'add extra=log_fields("name_of_the_line", ...) to this call: {ast.unparse(call)}')


def log_calls() -> list[ast.Call]:
    """Return all calls of the package that log."""
    sources = [ast.parse(path.read_text()) for path in sorted(Path(sse_batcher.__file__).parent.rglob("*.py"))]
    return [call for source in sources for _, call in _log_calls(source)]


def _log_calls(source: ast.Module) -> Iterable[tuple[ast.AST, ast.Call]]:
    """Find the calls that log, each with the function that it stands in."""
    for scope in ast.walk(source):
        if isinstance(scope, ast.FunctionDef) and scope.name != "log_once":  # which passes on what others call it with
            for node in ast.walk(scope):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = ast.unparse(node.func.value)
                    logs = owner == "_log" and (node.func.attr in LEVELS or node.func.attr == "log")
                    once = ("once" in owner and node.func.attr == "log") or node.func.attr == "log_once"
                    if logs or once:
                        yield scope, node


def _level_and_text(call: ast.Call, scope: ast.AST) -> tuple[str, ast.expr]:
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr in LEVELS:
        return LEVELS[call.func.attr], call.args[0]
    level, text = call.args[:2]
    if isinstance(level, ast.Name):
        (level,) = _assigned(level.id, scope)
    return " or ".join(re.findall(r"logging\.([A-Z]+)", ast.unparse(level))), text


def _assigned(name: str, place: ast.AST) -> list[ast.expr]:
    """Return what is assigned to a variable in a function, or in a module outside of functions."""
    nodes = place.body if isinstance(place, ast.Module) else ast.walk(place)
    return [node.value for node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name]


def _logger_of(source: ast.Module) -> str | None:
    """Return the name of a module's logger."""
    for node in source.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_log":
            assert isinstance(node.value, ast.Call)
            assert isinstance(node.value.args[0], ast.Constant)
            return str(node.value.args[0].value)
    return None


def _texts(text: ast.expr, scope: ast.AST, source: ast.Module) -> list[str]:
    """Return what an expression may be: the strings in it, and those of the variables in it."""
    if isinstance(text, ast.Constant):
        return [str(text.value)]
    if isinstance(text, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in text.values)]
    if isinstance(text, ast.IfExp):
        return [*_texts(text.body, scope, source), *_texts(text.orelse, scope, source)]
    if isinstance(text, ast.Name):
        added = [node for node in ast.walk(scope) if isinstance(node, ast.AugAssign)]
        more = "…" if any(ast.unparse(node.target) == text.id for node in added) else ""
        values = [*_assigned(text.id, scope), *_assigned(text.id, source)]
        return [each + more for value in values for each in _texts(value, scope, source)]
    raise ValueError(f"the text of a log line is not to be found: {ast.unparse(text)}")


# -- URLs, commands and fixtures ---------------------------------------------------------------------------------------


def urls() -> str:
    """Return the routes with their endpoints and what they answer."""
    app = flask.Flask("app", static_folder=None)
    rows = []
    with sse_batcher.SSE(app).manager:
        for rule in app.url_map.iter_rules():
            if not rule.rule.endswith("/"):
                view = app.view_functions[rule.endpoint]
                text = one_line((inspect.getdoc(view) or "").partition("\n\n")[0])
                rows.append((f"`{rule.rule}`", f"`{rule.endpoint}`", text))
    return table(("Path", "Endpoint", "Answers with"), rows)


_FLASK = "import sys; sys.argv[0] = 'flask'; import flask.cli; flask.cli.main()"
_APP = "from flask import Flask; from sse_batcher import SSE; app = Flask('app'); SSE(app)"


@functools.cache
def help_of(*command: str) -> str:
    """Run a command with ``--help``, such as ``flask sse publish``, and return what it prints, as a block."""
    start = {"flask": ["-c", _FLASK, "--app", "app.py"], "python": []}[command[0]]
    environ = {
        **os.environ,
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONPATH": os.pathsep.join([str(PAGES.parent), *sys.path]),
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "app.py").write_text(_APP)
        arguments = [sys.executable, *start, *command[1:], "--help"]
        done = subprocess.run(arguments, cwd=folder, env=environ, capture_output=True, text=True, check=True)
    return f"```text\n$ {' '.join(command)} --help\n{done.stdout}```\n"


def fixtures() -> str:
    """Return the fixtures of the pytest plugin."""
    source = ast.parse((PAGES.parent / "sse_batcher_pytest.py").read_text())
    functions = [node for node in source.body if isinstance(node, ast.FunctionDef)]
    return table(("Fixture", "Is"), [(f"`{each.name}`", one_line(ast.get_docstring(each) or "")) for each in functions])


MAKERS: dict[str, Callable[..., str]] = {
    "options": options,
    "option-classes": option_classes,
    "counters": counters,
    "signals": signal_table,
    "reasons": reason_table,
    "findings": finding_table,
    "log-lines": log_lines,
    "urls": urls,
    "help": help_of,
    "fixtures": fixtures,
}


def make(argument: str) -> str:
    """Return the Markdown for the argument of the directive ``generated``."""
    name, *rest = argument.split()
    return MAKERS[name](*rest)


def targets(argument: str) -> dict[str, str]:
    """Return the full names of what has a row in a table, by the text of its first cell."""
    if argument == "options":
        return {
            option.name: f"sse_batcher.{each.__name__}.{option.name}"
            for each in OPTION_CLASSES
            for option in fields(each)
        }
    if argument == "signals":
        return {name: f"sse_batcher.signals.{name}" for name, _, _ in signal_rows()}
    return {}


# -- pages as Markdown, for language models ----------------------------------------------------------------------------

_FENCE = re.compile(r"^ *(`{3,})\{([\w-]+)\} *(.*)\n((?:.*\n)*?) *\1$\n?", flags=re.M)


def contents(pages: Path = PAGES) -> list[tuple[str, list[str]]]:
    """Return the sections of the table of contents: each a caption, empty for the first one, and names of pages."""
    sections = []
    for _, name, _, body in _FENCE.findall((pages / "index.md").read_text()):
        if name == "toctree":
            caption = re.findall(r"^:caption: (.*)$", body, flags=re.M)
            entries = [line.strip() for line in body.splitlines() if line.strip() and not line.startswith(":")]
            sections.append(("".join(caption), entries))
    return sections


def markdown_of(page: Path) -> str:
    """Return the Markdown of a page, with what is generated, and without what only Sphinx and our tests use."""

    def expanded(match: re.Match[str]) -> str:
        _, name, argument, _ = match.groups()
        if name == "generated":
            return make(argument)
        if name == "literalinclude":
            return f"```text\n{(page.parent / argument).read_text().rstrip()}\n```\n"
        return "" if name == "toctree" else match[0]

    text = re.sub(r"^ *<!--.*?-->\n+", "", page.read_text(), flags=re.M | re.S)
    text = re.sub(r"\{py:obj\}`\.([\w.]+)`", r"`\1`", _FENCE.sub(expanded, text))
    text = re.sub(r"\{download\}`(.*?) <.*?>`", r"`\1` (the HTML page has the file)", text)
    text = re.sub(r"\]\((?!\w+:)([\w./-]+)\.md([#)])", r"](\1.html.md\2", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def title_and_summary(page: Path) -> tuple[str, str]:
    """Return the title of a page, and the first sentence below it, without links."""
    title, _, rest = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.S).partition("\n")
    first = re.split(r"(?<=\.)\s|\n\n", rest.strip().removeprefix("> "), maxsplit=1)[0]
    is_text = re.match(r"[^`#|<:!-]|`[^`]", first)
    without_links = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"\{py:obj\}`\.", "`", first))
    return title.removeprefix("# "), one_line(without_links) if is_text else ""


def index_for_models(pages: Path = PAGES) -> str:
    """Return the text of ``llms.txt``: https://llmstxt.org/"""
    _, _, about = (sse_batcher.__doc__ or "").partition(": ")
    lines = ["# sse_batcher", "", f"> {sentence(one_line(about.partition('How it works')[0]))}"]
    for caption, names in contents(pages):
        lines += ["", f"## {caption or 'Start'}", ""]
        for name in names:
            title, summary = title_and_summary(pages / f"{name}.md")
            lines.append(f"- [{title}]({name}.html.md)" + (f": {summary}" if summary else ""))
    return "\n".join([*lines, "", "## Optional", "", "- [All pages in one file](llms-full.txt)", ""])


# -- Sphinx ------------------------------------------------------------------------------------------------------------

_OWN_NAME = re.compile(r"(?<!`)`([A-Z]\w+[a-z]\w*(?:\.\w+)*|SSE(?:\.\w+)*)`(?!`)")
_FOREIGN = {"Decimal", "Flask", "HTTPException", "Provider"}
"""Names with the form of ours that docstrings mention, and that are none."""


def setup(app: Any) -> dict[str, Any]:
    """Add the directive, the links and the files to a build."""
    from docutils import nodes  # noqa: PLC0415  # tests of the text need no Sphinx
    from sphinx.util.docutils import SphinxDirective  # noqa: PLC0415

    class Generated(SphinxDirective):
        """Shows what `make` returns."""

        required_arguments = 1
        final_argument_whitespace = True

        def run(self) -> list[Any]:
            for module in list(sys.modules.values()):  # a change there changes the page
                path = getattr(module, "__file__", None)
                if path and path.startswith(str(Path(sse_batcher.__file__).parent)):
                    self.env.note_dependency(path)
            text = make(self.arguments[0])
            if not text.startswith("```"):
                text = _OWN_NAME.sub(r"{py:obj}`.\1`", text)
            made = self.parse_text_to_nodes(text)
            self.name_rows(made, targets(self.arguments[0]))
            return made

        def name_rows(self, made: list[Any], names: Mapping[str, str]) -> None:
            """Let links to these objects of ours lead to the rows that begin with their names."""
            for row in (row for each in made for row in each.findall(nodes.row)):
                name = names.get(next((code.astext() for code in row[0].findall(nodes.literal)), ""))
                if name is not None:
                    row["ids"].append(name)
                    python: Any = self.env.get_domain("py")
                    python.note_object(name, "data", name, location=row)

    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", _edit_docstring)
    app.connect("autodoc-process-signature", _short_signature)
    app.connect("missing-reference", _check_own_name)
    app.connect("build-finished", _write_for_models)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _edit_docstring(app: Any, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Make links of our names. And leave out what options classes say of their keywords, which is in the table."""
    text = "\n".join(lines)
    if documented in OPTION_CLASSES:
        text = text[: text.index("\n`")] + "\nIts keywords are in the table of :doc:`options`.\n"
    lines[:] = _OWN_NAME.sub(r":py:obj:`.\1`", text).split("\n")


def _short_signature(
    app: Any, what: str, name: str, documented: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave out what stands for "not given", and the type variables of decorators."""
    if signature is not None:
        given = re.sub(r" \| ~?[\w.]*\bNotGiven\b|~?[\w.]*\bNotGiven \| ", "", signature)
        signature = given.replace("= NOT_GIVEN", "= ...").replace("DEFAULT_CHANNEL", '"default"')
    if signature is not None and re.search(r"\w+F\b", returns or ""):
        return re.sub(r": [^,)=]+", "", signature), None  # a decorator: what its type variable says is in the text
    return signature, returns


def _check_own_name(app: Any, env: Any, node: Any, content: Any) -> None:
    """Warn of a name in a docstring that has the form of one of ours, and is not on these pages."""
    from sphinx.util import logging  # noqa: PLC0415

    target = node.get("reftarget", "").lstrip(".")
    if node.get("reftype") == "obj" and _OWN_NAME.fullmatch(f"`{target}`"):
        first = target.partition(".")[0]
        if not hasattr(builtins, first) and first not in _FOREIGN:
            logging.getLogger(__name__).warning("no page documents `%s`", target, location=node, type="generated")


def _write_for_models(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    from sphinx.writers.text import TextTranslator  # noqa: PLC0415

    folder, texts = Path(app.outdir), []
    for name in ["index", *(name for _, names in contents() for name in names)]:
        page = PAGES / f"{name}.md"
        if "{eval-rst}" in page.read_text():  # docstrings: as the text that Sphinx makes of them
            document = app.env.get_doctree(name)
            visitor = TextTranslator(document, app.builder)
            document.walkabout(visitor)
            text = visitor.body
        else:
            text = markdown_of(page)
        Path(folder, f"{name}.html.md").write_text(text)
        texts.append(text)
    Path(folder, "llms.txt").write_text(index_for_models())
    Path(folder, "llms-full.txt").write_text("\n\n".join(texts))
