"""How the package is built: what may import what, and habits that have cost others a deadlock."""

from __future__ import annotations

import ast
import inspect
import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest

import sse_batcher
from sse_batcher.backends.redis import open_redis
from sse_batcher.prometheus import SSECollector

ROOT = Path(sse_batcher.__file__).parent

# A module imports only what stands before it. Each module has its place here, and so has the package itself.
LAYERS = """
    errors encoding reasons event functions options wire parser stats
    runtime.dropped runtime.log_fields runtime.weak_registry runtime.process runtime.locks runtime.log_once
    runtime.worker runtime.app_thread
    runtime
    batching.window batching.flushes batching.log_lines batching.engine batching.batcher batching
    streams.history streams.dismissals streams.counts streams.roles streams.open_stream streams.opening
    streams.gate streams.refusals streams.control streams.client streams.index streams.registry streams.departures
    streams.census streams.hub streams.handover streams.revalidation streams
    backends.kicks backends.memory
    backends.redis.entries backends.redis.connections backends.redis.presence backends.redis.state backends.redis.reader
    backends.redis.archive backends.redis.kicks backends.redis.inspection
    backends.redis.backend backends.redis backends
    signals draining process_state manager_state after_commit manager prometheus
    transports.server transports.sockets transports.descriptors transports.watcher
    transports.attached transports.detached.sending transports.detached.takeover
    transports.detached.connection transports.detached.group transports.detached.replay transports.detached.feed
    transports.detached.gil transports.detached.loop transports.detached.stream transports.detached
    transports.health transports
    browser wsgi monitor.overview monitor
    remote.url remote.message remote.stream remote.follow remote
    commands.text commands.terminal commands.ending commands.arguments commands.tail commands.stats
    commands.load_client commands.load_tally commands.load commands
    doctor.findings doctor.facts doctor.software doctor.words doctor.refusals doctor.flow doctor.serving
    doctor.answers doctor.diagnoses doctor.inside doctor.rendering doctor.client doctor.http2 doctor.listener
    doctor.together doctor.probes doctor.command doctor
    testing.stage testing.matching testing.records testing.streams testing.server testing
    flask.cors flask.config flask.hooks flask.access flask.request_notes flask.response flask.signing flask.doctor
    flask.doctor_cli flask.monitor flask.blueprint flask.operator_cli flask.client_cli flask.cli flask.page_functions
    flask.app_part flask.extension flask
    sse_batcher
    demo.scenarios demo.simulation demo.report demo cli __main__
"""
ORDER = [name.removeprefix("sse_batcher") for name in LAYERS.split()]

# Modules that use no thread, clock or socket.
PURE_MODULES = """
    errors encoding reasons event functions options wire parser stats runtime.log_fields
    batching.window batching.flushes
    streams.history streams.dismissals streams.counts backends.redis.entries browser flask.cors
    remote.url remote.message commands.text
    doctor.findings doctor.facts doctor.software doctor.words doctor.refusals doctor.flow doctor.serving
    doctor.answers doctor.diagnoses doctor.inside doctor.rendering testing.matching
"""
PURE = set(PURE_MODULES.split())
KNOWS_FLASK = {"flask", "cli"}
"""Packages, and modules outside of one."""
KNOWS_WERKZEUG = {"testing.streams", "testing.server"}
"""Modules that import it where they use it: its test client, and its server."""
IMPURE_MODULES = {
    *("threading", "_thread", "queue", "time", "socket", "select", "selectors", "os", "random", "subprocess"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


TREES = {module_name(path): ast.parse(path.read_text(), str(path)) for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {name for name in TREES if (ROOT / Path(*name.split(".")) / "__init__.py").exists()}
every_module = pytest.mark.parametrize("module", TREES)


def imports(module: str) -> Iterator[str]:
    """What a module imports, anywhere in it: foreign names as they are, ours with one dot in front."""
    yield from imports_below(module, ast.walk(TREES[module]))


def imports_below(module: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "sse_batcher" if node.level else ""
            if node.level:
                package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
                base = ".".join([base, *filter(None, package[: len(package) - node.level + 1])])
            source = ".".join(filter(None, [base, node.module]))
            ours = source.partition("sse_batcher")[2].lstrip(".")
            # `from . import wire` imports a module; `from .wire import Frame` a name.
            names = [
                f"{source}.{alias.name}" if ".".join(filter(None, [ours, alias.name])) in TREES else source
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            yield f".{name[12:]}" if name.split(".")[0] == "sse_batcher" else name


def ours(module: str) -> set[str]:
    return {name[1:] for name in imports(module) if name.startswith(".")}


def foreign(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module) if not name.startswith(".")}


def where(module: str, node: ast.AST) -> str:
    return f"{module}:{node.lineno}"  # type: ignore[attr-defined]


# -- layers ------------------------------------------------------------------------------------------------------------


def test_the_imports_are_read_as_they_are_meant() -> None:
    assert ours("transports.attached") == {
        "runtime.dropped",
        "streams.client",
        "transports.descriptors",
        "wire",
        "errors",
        "transports.server",
        "transports.sockets",
        "reasons",
        "streams.opening",
        "streams.refusals",
        "manager",
        "manager_state",
        "transports.watcher",
    }
    assert {"signals", "manager", "flask.extension"} <= ours("")
    assert {"wire", "streams.client", "event"} <= ours("streams.hub")
    assert {"flask", "werkzeug", "weakref"} <= foreign("flask.extension")


@every_module
def test_each_module_has_its_place_in_the_order(module: str) -> None:
    assert module in ORDER


def neighbours_for_types(module: str) -> set[str]:
    """Modules of the same package that are imported only for the type checker: they may stand above."""
    blocks = [
        statement
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
    ]
    package = module.rpartition(".")[0]
    names = {name[1:] for name in imports_below(module, blocks) if name.startswith(".")}
    return {name for name in names if name.rpartition(".")[0] == package}


def test_packages_have_an_order_too() -> None:
    """The modules of a package stand together, so no package imports one that stands above it."""
    runs = [name for name, _ in itertools.groupby(name.partition(".")[0] for name in ORDER)]
    packages = [name for name in runs if name in PACKAGES - {""}]
    assert packages == [
        "runtime",
        "batching",
        "streams",
        "backends",
        "transports",
        "browser",
        "monitor",
        "remote",
        "commands",
        "doctor",
        "testing",
        "flask",
        "demo",
    ]


@every_module
def test_imports_point_downwards_only(module: str) -> None:
    upwards = [name for name in ours(module) if ORDER.index(name) >= ORDER.index(module)]
    assert set(upwards) <= neighbours_for_types(module)


@every_module
def test_only_the_flask_part_knows_flask(module: str) -> None:
    if module.partition(".")[0] not in KNOWS_FLASK:
        assert not foreign(module) & {"flask", "werkzeug"} - ({"werkzeug"} if module in KNOWS_WERKZEUG else set())


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_pure_part_knows_no_thread_clock_or_socket(module: str) -> None:
    assert not foreign(module) & IMPURE_MODULES
    assert ours(module) <= PURE


@every_module
def test_nothing_is_imported_that_is_not_declared(module: str) -> None:
    extra = {
        "flask.cli": {"click"},
        "flask.doctor_cli": {"click"},
        "flask.client_cli": {"click"},
        "doctor.command": {"click"},  # which Flask needs
        "flask.operator_cli": {"click"},
        "cli": {"click"},
        "commands.arguments": {"click"},
        "commands.ending": {"click"},
        "flask.signing": {"itsdangerous"},  # which Flask needs
        "flask.monitor": {"itsdangerous"},
        "prometheus": {"prometheus_client"},
        "backends.redis.connections": {"redis"},
        "manager": {"redis"},  # the type
        "after_commit": {"sqlalchemy"},  # types
        "process_state": {"redis"},
        "flask.config": {"redis"},  # the type
    }.get(module, set())
    assert foreign(module) <= set(sys.stdlib_module_names) | {"flask", "werkzeug", "blinker"} | extra


# -- habits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [module for module in TREES if module != "cli"])
def test_no_thread_is_started_inside_a_with_statement(module: str) -> None:
    """`Thread.start` waits for the newborn thread, in which the garbage collector may run what needs the lock held.

    The command line holds a socket there, and no lock.
    """
    found = [
        where(module, call)
        for block in ast.walk(TREES[module])
        if isinstance(block, (ast.With, ast.AsyncWith))
        for call in ast.walk(block)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "start"
    ]
    assert found == []


@pytest.mark.parametrize(
    "module", [module for module in TREES if module not in {"runtime.locks", "demo.simulation", "demo.report"}]
)
def test_locks_are_those_that_an_exception_cannot_leave_held(module: str) -> None:
    """See `locks`: no lock of another kind, no `acquire` by hand, no ``with`` of a `Condition`."""
    found = []
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            without_lock = name == "Condition" and not node.args
            if name in {"Lock", "RLock", "Semaphore", "BoundedSemaphore", "acquire"} or without_lock:
                found.append(where(module, node))
        elif isinstance(node, ast.With):
            held = [item.context_expr for item in node.items]
            conditions = {"changed", "_left"}
            found += [
                where(module, node) for each in held if isinstance(each, ast.Attribute) and each.attr in conditions
            ]
    assert found == []


@every_module
def test_no_bare_except(module: str) -> None:
    bare = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert [where(module, node) for node in bare] == []


@every_module
def test_no_finalizer_method(module: str) -> None:
    """A `__del__` runs in any thread, in the middle of any line, and may find its modules gone."""
    found = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef) and node.name == "__del__"]
    assert [where(module, node) for node in found] == []


@every_module
def test_each_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(TREES[module])


# -- plain English -----------------------------------------------------------------------------------------------------


class Habit(NamedTuple):
    """A phrase that makes readers stumble: its pattern, an example that it finds, and the same in plain English."""

    pattern: str
    example: str
    better: str


# Reword what is found. If a pattern finds something that is good English, narrow the pattern and keep its example.
HABITS = [
    # English needs a noun before "who". As a question it is all right.
    Habit(
        r"(?:^|[.:;,(] ?)[Ww]ho (?!can\b|may\b|the\b|an?\b|it\b|they\b)\w+(?! [^.]*\?)",
        "Who has missed some is sent to read.",
        "Groups that missed some catch up on their own.",
    ),
    Habit(
        r"\b(?:as|by|for|from|of|than|to|with) who\b", "a position for who asks again", "for a client that asks again"
    ),
    Habit(r"\b[Ww]hoever\b", "Whoever holds it may write.", "The thread that holds it may write."),
    # Threads are "it", and users are "they".
    Habit(r"\b(?:he|his|him|himself)\b", "If it raises, he keeps them.", "If it raises, the user's streams stay open."),
    # Threads and processes are not persons. The exception is a user who is not logged in.
    Habit(
        r"\b(?:[Ee]very|[Nn]o)body\b(?! is logged in)",
        "Nobody wakes the thread.",
        "No other thread wakes the thread.",
    ),
    # "Where" is a place, "if" and "when" are conditions.
    Habit(
        r"(?:^|[.:;] )Where (?:it|one|none|nothing|that|there|they) (?:is|are|was|were|has|have|does|can|cannot)\b",
        "Where there is no server, the page waits.",
        "If there is no server, the page waits.",
    ),
    Habit(
        r"\bwhere (?:that (?:is|cannot)|there (?:is|are|was|were)|none|it (?:cannot|(?:is|does|was) (?:no|not)))\b",
        "None where there is none.",
        "None if there is none.",
    ),
    # Code receives values, and clients get events.
    Habit(
        r"\b(?:am|are|be|been|being|is|was|were) (?:not )?told\b", "It is told the time.", "The caller passes the time."
    ),
    # Words of other centuries, or of other languages.
    Habit(r"\banew\b", "made anew for each call", "made again for each call"),
    Habit(r"\bfor ever\b", "It would wait for ever.", "It would wait forever."),
    Habit(r"\bbut for\b", "all threads but for the main one", "all threads except the main one"),
    Habit(r"\bso to speak\b", "the lock is, so to speak, free", "the lock is free"),
    Habit(
        r"\b(?:cannot|could not) be (?:had|meant)\b",
        "for options that cannot be meant",
        "for options that are not valid",
    ),
    Habit(
        r"\b(?:none|not one) of (?:ours|its|theirs|yours)\b",
        "a cursor that is none of ours",
        "a cursor with an invalid form",
    ),
]


def comments(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each comment. Comments on lines that follow each other are one."""
    lines: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            stands_alone = not token.line[:column].strip()
            if lines and not (stands_alone and line == last + 1):
                yield first, " ".join(lines)
                lines = []
            first = first if lines else line
            last = line if stands_alone else 0
            lines.append(token.string.lstrip("#: "))
    if lines:
        yield first, " ".join(lines)


def strings(source: str, only_docstrings: bool) -> Iterator[tuple[int, str]]:
    """The line and the text of each string, or of those that are a statement of their own."""
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else node
        if isinstance(node, ast.Expr) is not only_docstrings:
            continue
        if isinstance(value, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in value.values]
            yield value.lineno, "".join(parts)
        elif isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each paragraph of a Markdown file."""
    line = 1
    for paragraph in text.split("\n\n"):
        yield line, paragraph
        line += paragraph.count("\n") + 2


def prose() -> Iterator[tuple[str, str]]:
    """The place and the text of everything that we have written for people to read, on one line each.

    Of the package: comments, docstrings, log messages and errors, and therefore all strings. Of the tests: comments and
    docstrings, since other strings are data.
    """
    project = ROOT.parent
    for path in sorted(
        [*ROOT.rglob("*.py"), *(project / "tests").rglob("*.py"), *project.glob("*.md"), *project.glob("docs/*.md")]
    ):
        source = path.read_text()
        if path.suffix == ".md":
            found = paragraphs(source)
        else:
            found = itertools.chain(comments(source), strings(source, only_docstrings=not path.is_relative_to(ROOT)))
        for line, text in found:
            yield f"{path.relative_to(project)}:{line}", " ".join(text.split())


PROSE = list(prose())


@pytest.mark.parametrize("habit", HABITS, ids=[habit.example for habit in HABITS])
def test_a_habit_is_found_in_its_example_and_not_in_plain_english(habit: Habit) -> None:
    assert re.search(habit.pattern, habit.example)
    assert not [each.pattern for each in HABITS if re.search(each.pattern, habit.better)]


@pytest.mark.parametrize("habit", HABITS, ids=[habit.example for habit in HABITS])
def test_what_people_read_is_plain_english(habit: Habit) -> None:
    found = [
        f"{place}: ...{text[max(0, match.start() - 30) : match.end() + 30]}..."
        for place, text in PROSE
        for match in re.finditer(habit.pattern, text)
    ]
    assert not found, "\n".join([f"instead of {habit.example!r} write {habit.better!r}", *found])


# -- the root ----------------------------------------------------------------------------------------------------------

PROMISED = (
    *("SSE", "SSEManager", "EventBatcher", "Batch", "Event", "Client", "stream", "signals"),
    *("BatchOptions", "ClientOptions", "HistoryOptions"),
    *("SSEBatcherError", "ConfigurationError", "InvalidEventError", "ClosedError", "BacklogFullError"),
)


def run(code: str) -> str:
    """What a fresh interpreter prints for this code; the package it imports is the one that is tested."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout


def test_the_root_has_all_promised_names_and_each_can_be_imported() -> None:
    assert set(PROMISED) <= set(sse_batcher.__all__)
    for name in sse_batcher.__all__:
        assert getattr(sse_batcher, name) is not None
        assert name in dir(sse_batcher)


def test_the_names_of_the_root_are_sorted_constants_first_then_classes() -> None:
    def key(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert sse_batcher.__all__ == sorted(sse_batcher.__all__, key=key)
    assert len(set(sse_batcher.__all__)) == len(sse_batcher.__all__)


def test_importing_the_root_imports_no_flask_and_starts_no_thread() -> None:
    printed = run(
        "import sys, threading, sse_batcher\n"
        "print(sorted({'flask', 'werkzeug', 'redis'} & set(sys.modules)), threading.active_count())"
    )
    assert printed == "[] 1\n"


def test_an_app_imports_no_client_of_http() -> None:
    """Only the commands for operators need one, and it takes about as long to import as half of the library."""
    printed = run(
        "import sys, flask, sse_batcher; app = flask.Flask('app'); sse_batcher.SSE(app)\n"
        "print([name for name in sys.modules if name.startswith(('sse_batcher.remote', 'sse_batcher.commands'))])"
    )
    assert printed == "[]\n"


def test_a_star_import_gives_every_name() -> None:
    assert run("from sse_batcher import *\nprint(SSE.__name__, stream.__name__)") == "SSE stream\n"


def test_an_unknown_name_of_the_root_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sse_batcher' has no attribute 'Nothing'"):
        _ = sse_batcher.Nothing


def public_members(value: Any) -> Iterator[tuple[str, Any]]:
    """A public class with its public methods and properties, or a public function."""
    yield value.__qualname__, value
    if inspect.isclass(value):
        for base in value.__mro__:
            if base.__module__.startswith("sse_batcher"):
                for name, member in vars(base).items():
                    if not name.startswith("_") and isinstance(member, (FunctionType, property, classmethod)):
                        yield f"{base.__qualname__}.{name}", member


@pytest.mark.parametrize("name", [name for name in PROMISED if name != "signals"])
def test_whatever_is_public_has_a_docstring(name: str) -> None:
    for member_name, member in public_members(getattr(sse_batcher, name)):
        doc = member.__doc__ or ""
        assert doc.strip(), f"{member_name} has no docstring"
        # What dataclass and NamedTuple write for a class without one.
        assert not doc.startswith(f"{member_name}("), f"{member_name} has no docstring of its own"


def test_each_signal_says_when_it_is_sent_and_with_what() -> None:
    names = ["batch_flushed", "client_connected", "client_disconnected", "event_refused"]
    for name in names:
        assert "Arguments:" in getattr(sse_batcher.signals, name).__doc__


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()


# -- the tests ---------------------------------------------------------------------------------------------------------


def test_no_test_module_imports_another() -> None:
    """What tests share is in `tests/kit`."""
    folder = Path(__file__).parent
    found = [
        f"{path.relative_to(folder)}:{node.lineno}"
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if name.rpartition(".")[2].startswith("test_") or ".test_" in name
    ]
    assert found == []


NAMED_TUPLE_METHODS = {"_asdict", "_replace", "_make"}
"""Public methods of every `NamedTuple`, in spite of their names."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_given(node: ast.AST) -> list[str]:
    """The names that a node of the library gives to functions, classes, variables and attributes."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    return []


PRIVATE_NAMES = {
    name for tree in TREES.values() for node in ast.walk(tree) for name in names_given(node) if is_private(name)
} - NAMED_TUPLE_METHODS
FUNCTIONS_OF_NAMES = {"getattr", "setattr", "delattr", "hasattr", "attrgetter", "object", "patch"}
"""Functions, also of `monkeypatch` and `unittest.mock`, that take the name of an attribute as a string."""


def private_names_in(source: str) -> set[tuple[int, str]]:
    """The private names of the library that a test uses, each with its line. What is on `self` is the test's own."""
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}):
                names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
            if function in FUNCTIONS_OF_NAMES:
                names = [text.rpartition(".")[2] for text in texts if isinstance(text, str)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # a script that a test runs
            names = re.findall(r"\b(?!self\b|cls\b)\w+\.(_[a-z]\w*)", node.value)
        found |= {(node.lineno, name) for name in names if name in PRIVATE_NAMES}  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("engine._turn", ["_turn"]),
        ("batcher.engine()._turn = hub._lock", ["_lock", "_turn"]),
        ("self.hub._lock", ["_lock"]),
        ("self._lock, cls._lock, hub.__class__, event._replace(id=1), os._exit(0)", []),
        ("from sse_batcher.streams.history import History, _Lane", ["_Lane"]),
        ("getattr(hub, '_lock'), monkeypatch.setattr(hub, '_turn', None)", ["_lock", "_turn"]),
        ("monkeypatch.setattr('sse_batcher.runtime.process._open', None)", ["_open"]),
        ("run('with manager._process: pass')", ["_process"]),
        ("print('_lock')", []),
    ],
)
def test_a_private_name_is_found_wherever_a_test_may_use_it(source: str, found: list[str]) -> None:
    assert sorted(name for _, name in private_names_in(source)) == found


def test_no_test_uses_a_private_name_of_the_library() -> None:
    """What a test needs is public, or an argument of a constructor."""
    folder = Path(__file__).parent
    found = [
        f"{path.relative_to(folder)}:{line}: {name}"
        for path in sorted(folder.rglob("*.py"))
        if path != Path(__file__)  # which has examples
        for line, name in sorted(private_names_in(path.read_text()))
    ]
    assert found == []


# -- errors ------------------------------------------------------------------------------------------------------------

CONTROL_FLOW = {"StopIteration", "Empty", "OSError", "AttributeError", "NotImplementedError", "AssertionError"}
CAUGHT_INSIDE = {
    *("BusyError", "_UnexpectedError", "RemoteError", "FinalError", "RefusedError", "EndedError"),
    *("_DeadlineError", "OutputError", "_SnapshotFailedError", "_ArgumentError"),
}
"""Errors of the package that never leave it; commands print those of streams over HTTP, and of their own output."""
OF_THE_KIT = {"StreamRefusedError", "BlockTooLongError"}
"""Errors of the testing kit, which fail a test."""
CHECKS = {"encoding", "backends.redis.entries", "backends.redis.reader", "backends.redis.connections"}
"""Modules that raise `ValueError` and `TypeError`, which become errors of the library before a caller sees them."""


OF_COMMANDS = {name for name in TREES if name.endswith("cli") or name in {"commands.arguments", "commands.ending"}}
"""Modules that raise errors of click."""


@pytest.mark.parametrize("module", [name for name in TREES if not name.startswith("demo") and name not in OF_COMMANDS])
def test_each_error_that_is_raised_is_one_of_the_library(module: str) -> None:
    allowed = CONTROL_FLOW | CAUGHT_INSIDE | OF_THE_KIT | ({"ValueError", "TypeError"} if module in CHECKS else set())
    found = []
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = raised.id if isinstance(raised, ast.Name) else getattr(raised, "attr", "")
            if not name.lstrip("_")[:1].isupper() or name in allowed:
                continue  # a variable, or a function that makes an error
            error = getattr(sse_batcher.errors, name, None)
            if error is None or not issubclass(error, sse_batcher.SSEBatcherError):
                found.append(f"{where(module, node)} raises {name}")
    assert found == []


def test_each_error_of_the_library_is_exported_and_also_of_a_builtin_kind() -> None:
    for name, error in vars(sse_batcher.errors).items():
        if inspect.isclass(error) and error.__module__ == "sse_batcher.errors":
            assert getattr(sse_batcher, name) is error
            assert name in sse_batcher.__all__
            builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
            assert len(builtin) > 3 or name == "SSEBatcherError"  # more than Exception, BaseException and object


PUBLIC_ELSEWHERE = (SSECollector, open_redis)


@pytest.mark.parametrize("value", [*(getattr(sse_batcher, name) for name in sse_batcher.__all__), *PUBLIC_ELSEWHERE])
def test_each_error_that_a_docstring_names_is_exported(value: Any) -> None:
    for member_name, member in public_members(value) if hasattr(value, "__qualname__") else ():
        named = set(re.findall(r"(?<!`)`(\w+Error)`(?!`)", member.__doc__ or ""))
        assert named <= set(sse_batcher.__all__), f"the docstring of {member_name} names an error that is not exported"
