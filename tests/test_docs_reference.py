"""The pages of the reference: what they show is what the code has and sends."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from uuid import UUID

import click
import flask
import pytest

import sse_batcher
import sse_batcher_pytest
from sse_batcher import SSE, BatchOptions, ClientOptions, HistoryOptions, ManagerStats, SSEManager, Text, reasons
from sse_batcher import testing as testing_kit
from sse_batcher.cli import main
from sse_batcher.event import MAX_CHANNELS, MAX_KEY, MAX_NAME, MAX_USER, MAX_USERS
from sse_batcher.flask.config import KEYS
from sse_batcher.flask.operator_cli import PUBLISH_SECONDS
from sse_batcher.manager_state import process_of
from sse_batcher.prometheus import PREFIX, ROWS, SSECollector
from sse_batcher.testing import open_stream, record

from .kit.documents import blocks, text_of
from .kit.repository import DOCS, ROOT
from .kit.services import missing
from .kit.sse_parser import take_events

REFERENCE = DOCS / "reference"


def page(name: str) -> str:
    return text_of(f"reference/{name}")


@pytest.fixture(scope="module")
def generated() -> Iterator[ModuleType]:
    """The module that makes the tables, as Sphinx imports it."""
    sys.path.insert(0, str(DOCS))
    import generated

    yield generated
    sys.path.remove(str(DOCS))
    del sys.modules["generated"]


def shown(generated: ModuleType, name: str) -> str:
    """The Markdown of a page of the reference, with its tables."""
    return str(generated.markdown_of(REFERENCE / f"{name}.md"))


def rows_of(text: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    lines = re.findall(r"^\| (.*) \|$", re.sub(r"^\|.*\n(?=\| ---)", "", text, flags=re.M), flags=re.M)
    return [re.split(r" \| ", line) for line in lines if not line.startswith("---")]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_every_option_is_there_with_its_key_and_default(generated: ModuleType) -> None:
    rows = {re.findall(r"`(\w+)`", cells[0])[0]: cells for cells in rows_of(shown(generated, "options"))}
    for options in (BatchOptions, ClientOptions, HistoryOptions):
        for option in fields(options):
            names, unit, default, meaning = rows[option.name]
            assert names == f"`{option.name}`<br>`SSE_{option.name.upper()}`"
            assert eval(default.strip("`")) == getattr(options(), option.name), option.name
            assert meaning[0].isupper() or meaning[0] == "`"
            assert meaning.endswith(".")
            assert bool(unit) is bool(re.match("int|float", str(option.type)))
    assert {name for cells in rows.values() for name in re.findall(r"`(SSE_\w+)`", cells[0])} == set(KEYS)
    others = {"SSE_URL_PREFIX": "/events", "SSE_CORS_ORIGINS": (), "backend": "memory://", "batching": True}
    assert {name: eval(rows[name][2].strip("`")) for name in others} == others


def test_every_option_is_with_its_class(generated: ModuleType) -> None:
    said = dict(re.findall(r"^- `(\w+)`: (.*)$", shown(generated, "options"), flags=re.M))
    assert {name: re.findall(r"\w+", options) for name, options in said.items()} == {
        options.__name__: [option.name for option in fields(options)]
        for options in (BatchOptions, ClientOptions, HistoryOptions)
    }


def test_every_url_is_there_with_its_endpoint(generated: ModuleType) -> None:
    app = flask.Flask("app", static_folder=None)
    with SSE(app).manager:
        rules = {rule.endpoint: rule.rule for rule in app.url_map.iter_rules() if not rule.rule.endswith("/")}
    listed = [cells for cells in rows_of(shown(generated, "urls")) if cells[0].startswith("`/")]
    assert {endpoint.strip("`"): path.strip("`") for path, endpoint, _ in listed} == rules
    assert all(len(meaning) > 20 for _, _, meaning in listed)


def test_every_counter_is_there_with_its_names(generated: ModuleType) -> None:
    rows = {cells[0].strip("`"): cells[1:] for cells in rows_of(shown(generated, "counters")) if len(cells) == 3}
    counters = {field.name for field in fields(ManagerStats)}
    assert counters <= set(rows)
    with SSEManager() as manager:
        exported = {metric.name for metric in SSECollector(manager, channels=["default"]).describe()}
    for name in counters:
        names, meaning = rows[name]
        for metric in re.findall(rf"`({PREFIX}\w+)`", names):
            assert metric.removesuffix("_total") in exported
            exported.remove(metric.removesuffix("_total"))
        assert meaning.endswith(".")
        assert bool(names) is (name not in {"batches", "clients"})
    assert exported == set()
    assert {row.field for row in ROWS} < counters


def test_every_signal_is_there_with_its_arguments(generated: ModuleType) -> None:
    listed = {cells[0].strip("`"): re.findall(r"`([a-z]\w+)`", cells[2]) for cells in _signal_rows(generated)}
    seen: dict[str, list[str]] = {}
    receivers = []
    with record():
        manager = SSEManager()
        for name in listed:

            def receive(manager: object, name: str = name, **arguments: object) -> None:
                seen[name] = sorted(arguments)

            receivers.append(receive)
            getattr(sse_batcher.signals, name).connect(receive, sender=manager)
        with open_stream(manager):
            manager.enqueue("a", 1)
            manager.flush_all()
        with pytest.raises(ValueError):
            manager.enqueue("sse_a", 1)
        assert manager.shutdown()
    assert seen == {name: sorted(set(arguments) - {"sse_bye", "left"}) for name, arguments in listed.items()}
    assert len(listed) == 4


def _signal_rows(generated: ModuleType) -> list[list[str]]:
    return [cells for cells in rows_of(shown(generated, "signals")) if len(cells) == 3]


@pytest.mark.parametrize(
    ("kind", "described", "where"),
    [
        ("BatchReason", None, "wire-format"),
        ("GapReason", None, "wire-format"),
        ("BusyReason", None, "wire-format"),
        ("ByeReason", None, "wire-format"),
        ("EndReason", "ByeReason", "signals"),
        ("RefusalReason", "BusyReason", "counters"),
    ],
)
def test_every_reason_has_a_meaning(generated: ModuleType, kind: str, described: str | None, where: str) -> None:
    """`described`: the kind that this one begins with, and that has a table of its own."""
    begins_with = () if described is None else get_args(getattr(reasons, described))
    listed = dict(generated.reason_rows(kind))
    assert (*begins_with, *listed) == get_args(getattr(reasons, kind))
    assert all(meaning.endswith(".") for meaning in listed.values())
    assert generated.make(f"reasons {kind}") in shown(generated, where)


def test_every_line_of_the_log_is_there(generated: ModuleType) -> None:
    text = shown(generated, "counters")
    calls = sum(
        len(re.findall(r"^\s+(_log\.(?!log\()\w+|self\._once\.log|once\.log)\(", path.read_text(), flags=re.M))
        for path in (ROOT / "sse_batcher").rglob("*.py")
    )
    lines = [cells for cells in rows_of(text) if cells[0].startswith("`sse_batcher.")]
    assert len(lines) >= calls > 40
    assert {level for _, level, *_ in lines} == {
        "DEBUG",
        "INFO",
        "WARNING",
        "ERROR",
        "WARNING or INFO",
        "ERROR or WARNING",
    }
    assert [
        "`sse_batcher.manager`",
        "INFO",
        "`stream_ended`",
        "`stream … (…) ended after … s, … frames, … bytes: …`",
        "`sse_client`, `sse_channels`, `sse_user`, `sse_reason`, `sse_duration`, `sse_frames`, `sse_bytes`",
    ] in lines


# -- the API -----------------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    return re.findall(r"^\.\. auto\w+:: ([\w.]+)", page("api") + page("errors"), flags=re.M)


def test_every_public_name_is_on_a_page_once() -> None:
    public = {f"sse_batcher.{name}" for name in sse_batcher.__all__ if name != "signals"}
    public |= {f"sse_batcher.testing.{name}" for name in testing_kit.__all__}
    public |= {"sse_batcher.prometheus.SSECollector", "sse_batcher.backends.redis.open_redis"}
    public |= {"sse_batcher.stats.Histogram"}  # what an attribute is
    public |= {"sse_batcher.after_commit.AfterCommit"}  # what a method returns
    names = documented()
    assert sorted(names) == sorted(public)


def test_every_fixture_is_there(generated: ModuleType) -> None:
    listed = {cells[0].strip("`") for cells in rows_of(shown(generated, "api"))}
    assert listed == {name for name in vars(sse_batcher_pytest) if name.startswith("sse_")}


def test_limits_of_an_event_are_those_of_the_code() -> None:
    text = " ".join(str(SSEManager.enqueue.__doc__).split())
    for limit, words in [
        (MAX_NAME, "1 to {} characters"),
        (MAX_KEY, "up to {} characters"),
        (MAX_USER, "1 to {} characters"),
        (MAX_USERS, "up to {} of them"),
    ]:
        assert words.format(f"{limit:,}") in text
    assert f"1 to {MAX_CHANNELS} channels" in str(SSEManager.subscribe.__doc__)


# -- the wire format ---------------------------------------------------------------------------------------------------

EXAMPLES = dict(re.findall(r"^<!-- sent: ([\w ]+) -->\n```text\n(.*?)^```$", page("wire-format"), flags=re.M | re.S))
Send = Callable[[], bytes]
SENDERS: dict[str, Send] = {}


def sends(name: str) -> Callable[[Send], Send]:
    def register(send: Send) -> Send:
        SENDERS[name] = send
        return send

    return register


def first_frame(*events: tuple[str, Any], batches: bool = True, **options: Any) -> bytes:
    """The first block after that of the beginning, when the time of a window is over."""
    with record() as sent, SSEManager(batching=BatchOptions(**options)) as manager:
        client = manager.subscribe(batches=batches)
        next(client)
        for event in events:
            manager.enqueue(*event)
        sent.clock.advance(0.1)
        return next(client)


TOOLS = [("tools", {"server": server}) for server in "ab"]
ROWS_OF_HTML = [("row", Text(f"<li>{name}</li>")) for name in "ab"]


@sends("event")
def _event() -> bytes:
    return first_frame(TOOLS[0])


@sends("message")
def _message() -> bytes:
    return first_frame(("message", {"server": "a"}))


@sends("batch")
def _batch() -> bytes:
    return first_frame(*TOOLS)


@sends("mixed")
def _mixed() -> bytes:
    return first_frame(TOOLS[0], ROWS_OF_HTML[0], mixed=True)


@sends("unbatched")
def _unbatched() -> bytes:
    return first_frame(*TOOLS, batches=False)


@sends("text")
def _text() -> bytes:
    return first_frame(*ROWS_OF_HTML)


def answer(
    query: str = "", *, cursor: str | None = None, manager: SSEManager | None = None, **options: Any
) -> list[bytes]:
    """The blocks of a response that ends, or the first one of a stream."""
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": query, "HTTP_LAST_EVENT_ID": cursor or ""}
    with manager or SSEManager() as used:
        _, _, body = sse_batcher.stream(used, environ, **options)
        if "poll=1" in query:
            return list(body)
        blocks = [next(iter(body))]
        body.close()  # type: ignore[attr-defined]
        return blocks


@sends("open")
def _open() -> bytes:
    return b"".join(answer())


@sends("snapshot")
def _snapshot() -> bytes:
    return b"".join(answer(snapshot=lambda: [("board", {"open": 3}), ROWS_OF_HTML[0]]))


@sends("gap")
def _gap() -> bytes:
    return b"".join(answer(cursor="not one of ours"))


@sends("gap inside")
def _gap_inside() -> bytes:
    with SSEManager() as manager:
        client = manager.subscribe()
        next(client)
        hub = process_of(manager).hub
        hub.lose("default", (*hub.head[:-1], hub.head[-1] + 1), "publish_failed")
        return next(client)


@sends("busy")
def _busy() -> bytes:
    manager = SSEManager(clients=ClientOptions(max_clients=1))
    cursor, client = manager.cursor(), manager.subscribe()
    try:
        return b"".join(answer(cursor=cursor, manager=manager))
    finally:
        client.close()


@sends("bye")
def _bye() -> bytes:
    with SSEManager() as manager:
        client = manager.subscribe()
        next(client)
        process_of(manager).end_streams()
        return next(client)


@sends("poll")
def _poll() -> bytes:
    manager = SSEManager()
    cursor = manager.cursor()
    manager.enqueue(*TOOLS[0])
    assert manager.flush_all()
    return b"".join(answer("poll=1", cursor=cursor, manager=manager))


@sends("headers")
def _headers() -> bytes:
    with SSEManager() as manager:
        status, headers, _ = sse_batcher.stream(manager, {"REQUEST_METHOD": "HEAD"})
    assert status == "200 OK"
    return "".join(f"{name}: {value}\n" for name, value in headers).encode()


def without_what_varies(text: str) -> str:
    text = re.sub(r'"timestamp":\d+', '"timestamp":N', re.sub(r"^retry: \d+$", "retry: N", text, flags=re.M))
    return re.sub(r"^id: [0-9a-f]{8}-", "id: C-", text, flags=re.M)


def test_each_example_of_the_wire_format_is_compared() -> None:
    assert list(EXAMPLES) == re.findall(r"^<!-- sent: (.*) -->$", page("wire-format"), flags=re.M)
    assert page("wire-format").count("```text") == len(EXAMPLES)
    assert set(EXAMPLES) == set(SENDERS)


@pytest.mark.parametrize("name", SENDERS)
def test_the_wire_format_is_what_is_sent(name: str) -> None:
    assert without_what_varies(SENDERS[name]().decode()) == without_what_varies(EXAMPLES[name])


def test_a_quiet_stream_sends_what_is_said() -> None:
    assert "a colon, and no empty line after it" in page("wire-format")
    with SSEManager(clients=ClientOptions(heartbeat=0.01)) as manager:
        client = manager.subscribe()
        next(client)
        assert next(client) == b":\n"


def test_data_looks_under_flask_as_is_said() -> None:
    (program,) = blocks(page("wire-format"), "python")
    data = {
        "at": datetime(2026, 1, 1, tzinfo=UTC),
        "on": date(2026, 1, 1),
        "id": UUID(int=1),
        "price": Decimal("1.50"),
    }

    def sent(app: flask.Flask) -> Any:
        with SSE(app).manager as manager:
            client = manager.subscribe()
            manager.enqueue("order", data)
            _, event = take_events(client, 2)
            return event.json

    by_default = {"at": "Thu, 01 Jan 2026 00:00:00 GMT", "on": "Thu, 01 Jan 2026 00:00:00 GMT"}
    both = {"id": "00000000-0000-0000-0000-000000000001", "price": "1.50"}
    assert by_default["at"] in page("wire-format")
    assert sent(flask.Flask("app")) == by_default | both
    app = flask.Flask("app")
    exec(program, {"app": app})
    assert sent(app) == {"at": "2026-01-01T00:00:00+00:00", "on": "2026-01-01"} | both


# -- URLs and commands -------------------------------------------------------------------------------------------------


def test_the_stream_answers_with_the_statuses_that_are_listed() -> None:
    app = flask.Flask("app")
    client = app.test_client()
    with SSE(app).manager:
        many = "&".join(f"channel={number}" for number in range(101))
        answers = {
            200: ["/events", "/events/", "/events?channel=default"],
            400: [f"/events?{many}", "/events?channel=%00", "/events?channel=*"],
            401: ["/events?token=sse1.x", "/events?token=sse1.x&channel=a"],
            403: ["/events?channel=a", "/events?channel=a&channel=default"],
        }
        for status, urls in answers.items():
            for url in urls:
                with client.get(url) as response:
                    assert response.status_code == status, url
        assert client.post("/events").status_code == 405
    listed = re.findall(r"^\| (\d+) \|", page("urls"), flags=re.M)
    assert listed == ["200", "400", "401", "403", "405"]


def test_the_module_is_kept_as_is_said() -> None:
    app = flask.Flask("app")
    client = app.test_client()
    said = [cells[-1] for cells in rows_of(page("urls")) if len(cells) == 2 and "cache" not in cells[0]]
    with SSE(app).manager, app.test_request_context():
        sse = app.extensions["sse_batcher"]
        for url, text in [
            (sse.script_url(), "`public, max-age=31536000, immutable`"),
            ("/events/sse-batcher.js?v=other", "`no-store`"),
            ("/events/sse-batcher.js", "`no-cache`"),
        ]:
            with client.get(url) as response:
                assert f"`{response.headers['Cache-Control']}`" == text
            assert any(each.startswith(text) for each in said)


def test_health_and_counters_answer_as_is_said() -> None:
    app = flask.Flask("app")
    client = app.test_client()
    sse = SSE(app)
    health = client.get("/events/health")
    assert health.json == {"status": "ok", "backend_answered": 0.0}
    assert client.get("/events/health/ready").json == {"status": "ok", "backend_answered": 0.0}
    assert client.get("/events/health/live").json == {"status": "ok"}
    assert client.get("/events/stats").status_code == 404
    allowed = [False, True]
    sse.allow_stats(lambda: allowed.pop(0))
    assert client.get("/events/stats").status_code == 403
    stats = client.get("/events/stats")
    assert set(stats.json or {}) == {field.name for field in fields(ManagerStats)}
    sse.manager.shutdown()
    closed, live = client.get("/events/health/ready"), client.get("/events/health/live")
    assert (live.status_code, live.json) == (200, {"status": "ok"})
    assert (closed.status_code, (closed.json or {})["status"]) == (503, "draining")
    closed = client.get("/events/health")
    assert (closed.status_code, (closed.json or {})["status"]) == (503, "draining")
    assert {response.headers["Cache-Control"] for response in (health, stats, closed)} == {"no-store"}


def test_every_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    app = flask.Flask("app")
    SSE(app)
    group: Any = app.cli.commands["sse"]
    assert main(["--help"]) == 0
    without_flask = re.findall(r"^  (\w+)  ", capsys.readouterr().out.partition("Commands:\n")[2], flags=re.M)
    helps = re.findall(r"^```\{generated\} help (.*)$", page("command-line"), flags=re.M)
    assert sorted(helps) == sorted(
        [
            *("python -m sse_batcher", "flask sse"),
            *(f"python -m sse_batcher {name}" for name in without_flask),
            *(f"flask sse {name}" for name in group.list_commands(click.Context(group))),
        ]
    )
    assert f"within {PUBLISH_SECONDS:g} seconds" in page("command-line")


def test_the_help_is_that_of_the_command(generated: ModuleType) -> None:
    text = generated.make("help flask sse publish")
    assert text.startswith("```text\n$ flask sse publish --help\nUsage: flask sse publish [OPTIONS] TYPE DATA\n")
    assert "--channel" in text


# -- for language models -----------------------------------------------------------------------------------------------


def test_the_index_for_models_has_every_page(generated: ModuleType) -> None:
    text = generated.index_for_models()
    lines = text.splitlines()
    assert lines[0] == "# sse_batcher"
    assert lines[2].startswith("> Push for synchronous Python web apps. ")
    assert re.findall(r"^## (.*)$", text, flags=re.M) == [
        "Start", "How-to guides", "Reference", "Explanation", "Optional",
    ]  # fmt: skip
    links = re.findall(r"^- \[[^\]]+\]\(([^)]+)\)(?:: .+)?$", text, flags=re.M)
    assert len(links) == len([line for line in lines if line.startswith("- ")])
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"index.md"}
    assert {link.removesuffix(".html.md") + ".md" for link in links if link != "llms-full.txt"} == pages


def test_pages_for_models_have_no_directive_of_ours(generated: ModuleType) -> None:
    for path in REFERENCE.glob("*.md"):
        text = generated.markdown_of(path)
        assert "{generated}" not in text
        assert "<!--" not in text, path


@cache
def built(folder: Path) -> Path:
    if find_spec("sphinx") is None:
        missing("needs Sphinx (pip install --group docs)")
    command = [sys.executable, "-m", "sphinx", "-q", "-d", folder / "doctrees", DOCS, folder / "html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "docs/reference" not in done.stderr, done.stderr
    assert "docstring of" not in done.stderr, done.stderr
    return folder / "html"


@pytest.mark.external
def test_the_built_pages_have_every_public_name_and_link(tmp_path_factory: pytest.TempPathFactory) -> None:
    html = built(tmp_path_factory.mktemp("docs"))
    text = "".join((html / "reference" / f"{name}.html").read_text() for name in ("api", "errors", "options"))
    for name in [*documented(), "sse_batcher.SSEManager.enqueue", "sse_batcher.SSE.authorize"]:
        assert f'id="{name}"' in text, name
    for option in fields(ClientOptions):
        assert f'id="sse_batcher.ClientOptions.{option.name}"' in text
    index = (html / "llms.txt").read_text()
    links = re.findall(r"\]\(([^)]+)\)", index)
    assert len(links) > 30
    for link in links:
        assert (html / link).stat().st_size > 0, link
    whole = (html / "llms-full.txt").read_text()
    for link in links:
        if link.endswith(".md"):
            assert (html / link).read_text() in whole
    assert "SSE_MAX_CLIENTS_PER_USER" in whole
    assert "End the streams of this user" in whole  # of a docstring
