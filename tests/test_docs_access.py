"""The pages about channels, state, access and the promise: what they claim is true, and their pages work in a browser.

Their Python programs run as tests of their own, see docs/conftest.py.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from flask import Flask, Response, abort, render_template_string, request
from flask_login import LoginManager, UserMixin, login_required
from playwright.sync_api import Browser, Page

from sse_batcher import SSE, ClientOptions, HistoryOptions, SSEManager, signals
from sse_batcher.reasons import BusyReason, ByeReason, EndReason, GapReason
from sse_batcher.stats import ManagerStats
from sse_batcher.testing import Stream, StreamRefusedError, live_server, open_stream, record

from .kit import nginx
from .kit.browser import browser_fixture
from .kit.documents import block, blocks, check_scripts, files, text_of
from .kit.redisserver import RedisServer, redis_fixture
from .kit.repository import ROOT
from .kit.servers import HOST, gunicorn, running
from .kit.services import program
from .kit.viewers import Viewer
from .kit.waiting import wait_until

TESTS = ROOT / "tests"
CHANNELS, STATE, AUTHENTICATION = (text_of(f"guides/{name}") for name in ("channels", "state", "authentication"))
PROMISE = text_of("explanation/promise")
redis = redis_fixture()


# -- the tables of faults ----------------------------------------------------------------------------------------------


class Row:
    """A row of a table of faults."""

    def __init__(self, fault: str, client: str, counted: str, tests: str) -> None:
        self.fault = fault
        self.client = client
        self.counters = set(re.findall(r"`(\w+)`", counted.partition("`get_stats()`")[0])) - {"behind", "backend"}
        self.ends = set(re.findall(r'"(\w+)"', counted))
        self.tests = re.findall(r"`(\w+)`", tests)

    def reasons(self, block: str) -> set[str]:
        """Return the reasons that the client gets in a block such as ``sse_gap``."""
        return set(re.findall(r"`(\w+)`", "".join(re.findall(rf"`{block}`,((?: or|,? `\w+`)+)", self.client))))


ROWS = [Row(*cells) for cells in re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\| (`.+?) \|$", PROMISE, flags=re.M)]


def row(beginning: str) -> Row:
    (found,) = (row for row in ROWS if row.fault.startswith(beginning))
    return found


def test_each_row_has_tests() -> None:
    lines = re.findall(r"^\| (?!fault|---)", PROMISE, flags=re.M)
    assert len(ROWS) == len(lines) > 30
    assert [name for row in ROWS for name in row.tests if not (TESTS / f"test_{name}.py").exists()] == []


def test_all_reasons_are_in_the_tables_and_no_others() -> None:
    for name, reasons in {"sse_gap": GapReason, "sse_busy": BusyReason, "sse_bye": ByeReason}.items():
        assert set().union(*(row.reasons(name) for row in ROWS)) == set(get_args(reasons)), name
    assert set().union(*(row.ends for row in ROWS)) <= {
        each for part in get_args(EndReason) for each in (get_args(part) or [part])
    }


def test_what_is_counted_are_counters() -> None:
    named = set().union(*(row.counters for row in ROWS))
    assert len(named) > 8
    assert named <= {field.name for field in fields(ManagerStats)}


def breaks(opened: Stream, manager: SSEManager) -> None:
    opened.drop()
    manager.enqueue("a", 1)
    opened.clock.advance(0.1)
    opened.reconnect()
    assert (opened.opened_with, opened.events()) == ("sse_open", [("a", 1)])


def is_away(opened: Stream, manager: SSEManager) -> None:
    opened.drop()
    manager.enqueue("a", 1)
    opened.clock.advance(61)
    opened.reconnect()


def reads(frames: int) -> Callable[[Stream, SSEManager], None]:
    def read(opened: Stream, manager: SSEManager) -> None:
        opened.stall()
        for number in range(frames):
            manager.enqueue("a", number)
            opened.clock.advance(0.1)
        opened.resume()

    return read


def gets_old(opened: Stream, manager: SSEManager) -> None:
    opened.clock.advance(200)
    opened.reconnect()


def has_an_odd_cursor(opened: Stream, manager: SSEManager) -> None:
    with open_stream(manager, last_event_id="unknown") as odd:
        assert odd.gaps == ["malformed"]


def stops(opened: Stream, manager: SSEManager) -> None:
    manager.enqueue("a", 1)
    manager.shutdown()
    assert opened.events() == [("a", 1)]


def restarts(opened: Stream, manager: SSEManager) -> None:
    opened.drop()
    with record(manager) as sent:
        sent.lose_history()
    opened.reconnect()


def is_kicked(opened: Stream, manager: SSEManager) -> None:
    manager.kick(user=7)
    assert opened.bye == "kicked"
    opened.reconnect()
    manager.revalidate = lambda user: False
    opened.reconnect()  # a stream that is opened from now on
    opened.clock.advance(31)
    assert opened.bye == "revoked"


PLAYED: dict[str, Callable[[Stream, SSEManager], None]] = {
    "the connection breaks": breaks,
    "it was away": is_away,
    "it reads too slowly": reads(4),
    "it reads so slowly": reads(8),
    "the stream has reached": gets_old,
    "its cursor is not one": has_an_odd_cursor,
    "the server is stopped": stops,
    "the process is restarted, without": restarts,
    "the user may not stay": is_kicked,
}


@pytest.mark.parametrize("fault", PLAYED)
def test_a_fault_that_is_played_is_seen_and_counted_as_its_row_says(fault: str) -> None:
    said = row(fault)
    history = HistoryOptions(history_frames=5, history_age=60)
    manager = SSEManager(clients=ClientOptions(queue_frames=2, max_stream_age=150), history=history)
    ends: set[str] = set()

    def note(sender: SSEManager, reason: str, **rest: object) -> None:
        ends.add(reason)

    with signals.client_disconnected.connected_to(note, sender=manager), open_stream(manager, user=7) as opened:
        PLAYED[fault](opened, manager)
        seen = {frame.type: frame.data["reason"] for frame in opened.frames() if frame.type == "sse_gap"}
        gaps = said.reasons("sse_gap")
        assert set(seen.values()) <= gaps
        assert bool(gaps) == (manager.get_stats().gaps > 0)
        assert said.ends <= ends
        for counter in said.counters & {"gaps", "replays", "overflows"}:
            assert getattr(manager.get_stats(), counter) > 0, counter


KILLED = """
import os, sys
from sse_batcher import BatchOptions, SSEManager

manager = SSEManager(backend=sys.argv[1], batching=BatchOptions(batch_window=10))
manager.enqueue("n", 1)
manager.flush_all()
manager.enqueue("n", 2)
os._exit(0)
"""


@pytest.mark.external
def test_what_a_killed_process_had_not_delivered_is_lost_without_a_gap(redis: RedisServer) -> None:
    with SSEManager(backend=redis.url) as site, Viewer(site) as viewer:
        subprocess.run([sys.executable, "-c", KILLED, redis.url], cwd=ROOT, check=True, timeout=50)
        site.enqueue("n", 3)
        site.flush_all()
        assert viewer.numbers(3) == [1, 3]
        assert site.get_stats().gaps == 0


# -- the pages in a browser --------------------------------------------------------------------------------------------


browser = browser_fixture(light=True)


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """A page of a browser of its own, with cookies of its own."""
    with browser.new_context() as context:
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        yield page
        assert errors == []


@contextmanager
def program_of(page: Path, name: str, folder: Path) -> Iterator[Any]:
    """Import a program of a page."""
    path = folder / name
    path.write_text(block(page, "python", f"# {name}\n"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    with module.app.app_context():
        assert module.sse.manager.shutdown()


def ends_with(page: Page, *lines: str) -> None:
    """Wait until these are the last lines of its list. Before them may be what was sent while its stream opened."""
    page.wait_for_function(
        "text => [...document.querySelectorAll('li')].map(li => li.textContent + '\\n').join('').endsWith(text)",
        arg="".join(f"{line}\n" for line in lines),
    )


def log_in(page: Page, text: str) -> None:
    with page.expect_response(re.compile("/events[?]")):
        page.click(f"text={text}")
    page.wait_for_load_state()


@pytest.mark.external
def test_the_pages_of_two_teams_show_what_is_theirs(browser: Browser, tmp_path: Path) -> None:
    with program_of(CHANNELS, "teams.py", tmp_path) as teams, live_server(teams.app) as url:
        with opened(browser, url) as red, opened(browser, url) as blue:
            log_in(red, "red keeper")
            wait_until(lambda: teams.sse.manager.get_stats().clients == 1, "the stream is open")
            log_in(blue, "blue keeper")
            ends_with(red, "The blue keeper came in.")
            wait_until(lambda: teams.sse.manager.get_stats().clients == 2, "the other stream is open")
            red.fill("[name=text]", "<b>left!</b>")
            red.click("text=To the red team")
            ends_with(red, "The blue keeper came in.", "red keeper: <b>left!</b>")
            blue.fill("[name=text]", "right")
            blue.click("text=To the blue team")
            ends_with(blue, "blue keeper: right")
            assert "left" not in blue.inner_text("body")


@pytest.mark.external
def test_the_page_of_ones_own_view_shows_the_events(browser: Browser) -> None:
    app = Flask("orders")
    sse = SSE(app)
    program = {"app": app, "sse": sse, "abort": abort, "render_template_string": render_template_string}
    exec(block(CHANNELS, "python", "sse.response([f"), program | {"may_see_order": lambda number: number == 7})
    with live_server(app) as url, opened(browser, f"{url}/orders/7") as page:
        wait_until(lambda: sse.manager.get_stats().clients == 1, "the stream is open")
        page.evaluate("fetch('/orders/7/paid', { method: 'POST' })")
        ends_with(page, "paid")
    assert sse.manager.shutdown()


@pytest.mark.external
def test_the_page_that_brings_its_state_follows_it_and_loads_again_after_a_gap(
    browser: Browser, tmp_path: Path
) -> None:
    with program_of(STATE, "board.py", tmp_path) as board, live_server(board.app) as url:
        with opened(browser, url) as page:
            wait_until(lambda: board.sse.manager.get_stats().clients == 1, "the stream is open")
            page.evaluate("fetch('/orders/1/paid', { method: 'POST' })")
            ends_with(page, "paid", "new")
            board.orders[2] = "sent"  # and no event says so
            (gap,) = re.findall(r'events\.on\("sse_gap", (.*?})\);\n</', board.PAGE, flags=re.S)
            page.evaluate(f"({gap})()")
            ends_with(page, "paid", "sent")


@pytest.mark.external
def test_a_logout_in_one_tab_ends_the_page_in_another(browser: Browser, tmp_path: Path) -> None:
    with program_of(AUTHENTICATION, "app.py", tmp_path) as module, live_server(module.app) as url:
        with opened(browser, url) as page:
            log_in(page, "7")
            wait_until(lambda: module.sse.manager.get_stats().clients == 1, "the stream is open")
            other = page.context.new_page()
            other.goto(url)
            wait_until(lambda: module.sse.manager.get_stats().clients == 2, "that of the other tab, too")
            other.evaluate("fetch('/notes/7', { method: 'POST', body: new URLSearchParams({ text: '<i>hi</i>' }) })")
            ends_with(page, "<i>hi</i>")
            other.click("text=Log out")
            page.wait_for_selector("[action='/login']")
            # Another user logs in: the page of the first one would not get these events.
            log_in(other, "8")
            page.evaluate("fetch('/notes/8', { method: 'POST', body: new URLSearchParams({ text: 'for 8' }) })")
            ends_with(other, "for 8")


class Visitor(UserMixin):  # type: ignore[misc]
    id = 7


@pytest.mark.external
def test_a_page_brings_a_fresh_token_in_its_url_or_in_a_header(browser: Browser) -> None:
    app = Flask("tokens")
    app.config.update(SECRET_KEY="for this test", SSE_MAX_STREAM_AGE=1)
    sse = SSE(app)
    LoginManager(app).request_loader(lambda request: Visitor())
    exec(block(AUTHENTICATION, "python", "URLSafeTimedSerializer"), {"app": app, "sse": sse})
    by_url = block(AUTHENTICATION, "js", "/stream-token")
    (by_header,) = re.findall(r"`(headers: async .*?)` \|", AUTHENTICATION)
    by_header = by_url.splitlines()[0] + f'\nconst events = new BatchedEventSource("/events", {{ {by_header} }});'
    asked: list[tuple[bool, bool]] = []

    @app.before_request
    def note() -> None:
        if request.endpoint == "sse_batcher.stream":
            asked.append(("token" in request.args, "Authorization" in request.headers))

    @app.get("/<kind>")
    def page(kind: str) -> str:
        script = by_url if kind == "url" else by_header
        show = "events.on('note', (n) => list.appendChild(document.createElement('li')).textContent = n);"
        return (
            '<link rel="icon" href="data:,"><ul id="list"></ul><script type="module">'
            f"import {{ BatchedEventSource }} from '/events/sse-batcher.js'; {script}; {show}</script>"
        )

    with live_server(app) as url:
        for kind, expected in [("url", (True, False)), ("header", (False, True))]:
            asked.clear()
            with opened(browser, f"{url}/{kind}") as opened_page:
                wait_until(lambda: len(asked) >= 2, "its stream is opened, and opened again")
                sse.enqueue("note", kind, user=7)
                ends_with(opened_page, kind)
            assert set(asked) == {expected}
    assert sse.manager.shutdown()


# -- what authentication.md says beside its programs -------------------------------------------------------------------


def test_a_redirect_to_a_login_page_is_no_answer_and_401_is() -> None:
    app = Flask("wall")
    app.config["SECRET_KEY"] = "for this test"
    sse = SSE(app)
    login = LoginManager(app)
    login.request_loader(lambda request: None)
    login.login_view = "login_page"

    @app.get("/login")
    def login_page() -> str:
        return "a form"

    @app.get("/mine")
    @login_required
    def mine() -> Response:
        return sse.response()

    client = app.test_client()
    assert client.get("/mine").status_code == 302
    assert client.get("/mine", follow_redirects=True).text == "a form"

    @sse.authorize
    def refuse(channels: tuple[str, ...]) -> tuple[str, ...]:
        abort(401)

    with pytest.raises(StreamRefusedError) as refused, open_stream(client):
        pass
    assert refused.value.status == 401


@pytest.mark.external
def test_the_format_for_gunicorns_log_leaves_the_token_out(tmp_path: Path) -> None:
    (said,) = re.findall(r"`(%\(\w\)s)` \(the path without the query\)", AUTHENTICATION)
    (tmp_path / "app.py").write_text("def app(environ, start):\n    start('200 OK', [])\n    return []\n")
    log = ("--access-logfile=-", f"--access-logformat={said} is its path")
    with running((*gunicorn("-k", "gthread", *log)[:-1], "app:app"), tmp_path) as server, server.watched():
        server.request("GET", "/events?token=secret")
        wait_until(lambda: "/events is its path" in server.output(), "it is in the log")
        assert "secret" not in server.output()


@pytest.mark.external
def test_the_scripts_are_javascript(tmp_path: Path) -> None:
    scripts = [text for page in (CHANNELS, STATE, AUTHENTICATION) for text in blocks(page, "js")]
    assert len(scripts) == 4
    check_scripts(scripts, tmp_path)


# -- what signed-urls.md says beside its programs ----------------------------------------------------------------------


@pytest.mark.external
def test_the_log_of_gunicorn_has_no_signed_url(tmp_path: Path) -> None:
    name, text = "gunicorn_log.py", files(text_of("guides/signed-urls"))["gunicorn_log.py"]
    (tmp_path / name).write_text(text)
    (tmp_path / "app.py").write_text("def app(environ, start):\n    start('200 OK', [])\n    return []\n")
    with running((*gunicorn("-k", "gthread", "-c", name)[:-1], "app:app"), tmp_path) as server, server.watched():
        server.request("GET", "/events?token=sse1.secret")
        wait_until(lambda: '"GET /events" 200' in server.output(), "it is in the log")
        assert "secret" not in server.output()


@pytest.mark.external
def test_the_log_of_nginx_has_no_signed_url(tmp_path: Path) -> None:
    [directives] = blocks(text_of("guides/signed-urls"), "nginx")
    format_of_log, access_log = directives.strip().splitlines()
    location = f"return 200; {access_log.replace('/var/log/nginx', '.')}"
    program_path = program("nginx", package="Debian: nginx-light")
    arguments = list(nginx.arguments_of(program_path, location, host=HOST, upstream=f"{HOST}:1"))
    arguments[-1] = arguments[-1].replace("access_log off;", f"access_log off; {format_of_log}")
    with running(arguments, tmp_path) as server:
        server.request("GET", "/events?token=sse1.secret")
        log = tmp_path / "access.log"
        wait_until(lambda: '"GET /events" 200' in log.read_text(), "it is in the log")
        assert "secret" not in log.read_text()


@pytest.mark.external
def test_the_script_for_signed_urls_is_javascript(tmp_path: Path) -> None:
    scripts = blocks(text_of("guides/signed-urls"), "js")
    assert len(scripts) == 1
    check_scripts(scripts, tmp_path)
