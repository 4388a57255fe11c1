"""The examples: each runs as its docstring says, sends its events, and refuses visitors that may not see them."""

from __future__ import annotations

import json
import logging
import re
import runpy
import signal
import sqlite3
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, Request, build_opener

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page

from sse_batcher import BacklogFullError, Event, EventBatcher, SSEManager, signals
from sse_batcher.browser import SCRIPT

from .kit.browser import browser_fixture
from .kit.made_up_streams import MadeUpStreams
from .kit.repository import EXAMPLES
from .kit.servers import Block, Server, Stream, running
from .kit.waiting import TIMEOUT, wait_until

ALL = sorted(EXAMPLES.glob("*.py"))
NAMES = [path.name for path in ALL]
HTML = {"live_table.py"}
"""Those whose script shows HTML of the server, made by templates that escape."""

LIBRARIES = {"datastar.py", "htmx2.py", "htmx4.py", "turbo.py"}
"""Those whose page is changed by a library, with what the server renders: `test_examples_html`."""

NO_FLASK = ["bottle_app.py", "django_app.py", "plain_wsgi.py"]
"""Those that serve the module for browsers themselves."""


class Visitor:
    """Somebody at a server: with cookies as a browser keeps them, and perhaps with a password."""

    def __init__(self, server: Server, password: str = "") -> None:
        self._url = server.url
        self.cookies = CookieJar()
        self._opener = build_opener(ProxyHandler({}), HTTPCookieProcessor(self.cookies))
        if password:
            token = b64encode(f"anybody:{password}".encode()).decode()
            self._opener.addheaders.append(("Authorization", f"Basic {token}"))

    def open(
        self, path: str, form: dict[str, str] | None = None, method: str | None = None
    ) -> HTTPResponse | HTTPError:
        data = None if form is None else urlencode(form).encode()
        request = Request(self._url + path, data, method=method)
        try:
            response: HTTPResponse = self._opener.open(request, timeout=TIMEOUT)
        except HTTPError as error:
            return error  # an answer, too
        return response

    def get(self, path: str) -> str:
        with self.open(path) as response:
            assert response.status == 200
            return response.read().decode()

    def status(self, path: str, form: dict[str, str] | None = None) -> int:
        """The status of the answer to a GET, or to a POST of the form."""
        with self.open(path, form) as response:
            assert response.status is not None
            return response.status

    def stream(self, path: str = "/events") -> VisitorsStream:
        return VisitorsStream(self, path)


class VisitorsStream(Stream):
    """An open stream of a visitor, which has begun."""

    def __init__(self, visitor: Visitor, path: str) -> None:
        response = visitor.open(path)
        if isinstance(response, HTTPError):
            raise response
        self.response = response
        self.until("sse_open")

    def __exit__(self, *exc_info: object) -> None:
        self.response.close()


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what an example that is killed leaves behind
    with running((str(EXAMPLES / request.param),), tmp_path) as server:
        yield server


@pytest.fixture
def visitor(server: Server) -> Visitor:
    """A visitor that may see the stream."""
    password = password_of(server)
    visitor = Visitor(server, password)
    token = csrf_token(visitor)
    if not password and token:
        visitor.status("/login", {"csrfmiddlewaretoken": token})
    return visitor


def password_of(server: Server) -> str:
    """The password that an example has printed, "" if none."""
    return "".join(re.findall(r"password (\S+)", server.output()))


def csrf_token(visitor: Visitor) -> str:
    """What Django wants to see again with each form."""
    return "".join(re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', visitor.get("/"))[:1])


def events(block: Block, event_type: str) -> list[Any]:
    """The data of the events of a type that a block brings, alone or in a batch."""
    if block.event == event_type:
        return [block.data]
    return list(block.data["events"]) if block.event == event_type + "_batch" else []


def load(name: str) -> dict[str, Any]:
    """An example as a module that is imported, not run."""
    return runpy.run_path(str(EXAMPLES / name))


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", NAMES, indirect=True)
def test_an_example_ends_without_a_complaint(server: Server, visitor: Visitor) -> None:
    with visitor.stream() as stream:
        visitor.get("/")  # as `Server.stop` explains, whose request has no cookies
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(TIMEOUT) == 0
        assert stream.to_end()[-1].event == "sse_bye"
    assert "Traceback" not in server.output()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_page_shows_data_as_text_only(path: Path) -> None:
    page = path.read_text()
    assert ".textContent = " in page or path.name in LIBRARIES
    refused = {".innerHTML", "insertAdjacentHTML", "document.write", "eval(", "|safe"}
    assert not any(word in page for word in refused - ({".innerHTML"} if path.name in HTML else set()))


@pytest.mark.parametrize("server", NO_FLASK, indirect=True)
def test_an_app_without_flask_serves_the_module(visitor: Visitor) -> None:
    (path,) = re.findall(r'import { BatchedEventSource } from "(.*)";', visitor.get("/"))
    assert path == "/events/sse-batcher.js"
    with visitor.open(path) as response:
        assert response.headers.get_content_type() == "text/javascript"  # and no stream, which has no end
        assert (response.status, response.read()) == (200, SCRIPT)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_docstring_says_how_to_run_it(path: Path) -> None:
    assert f"`python examples/{path.name}`" in path.read_text().split('"""')[1]


def test_the_list_of_examples_has_each_of_them() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[.*?\]\((.*?)\)", text, flags=re.M)) == NAMES
    assert sorted(re.findall(r"`python examples/(.*?)`", text)) == NAMES


browser = browser_fixture()


def log_in_and_write(page: Page) -> None:
    with page.expect_response(re.compile("/events.*red")):  # once the stream is open
        page.click("text=Log in")
    page.fill("[name=text]", "<b>to the left</b>")
    page.click("text=To my team")


def come_in_and_press(page: Page) -> None:
    page.click("text=Come in")
    # A press before the stream is open does not show: press until it does.
    page.wait_for_function(
        """() => {
          document.querySelector("#press button")?.click();  // the page may not be there yet
          return (document.getElementById("presses")?.textContent ?? "?") !== "?";
        }""",
        polling=200,
    )


@pytest.mark.external
@pytest.mark.parametrize(
    ("server", "act", "sign"),
    [
        ("bottle_app.py", None, "meter"),
        ("channels.py", log_in_and_write, "li.message:text-is('red keeper: <b>to the left</b>')"),
        ("dashboard.py", None, "#counts:has-text('changes, of which')"),
        ("django_app.py", come_in_and_press, "#windows:text-is('1')"),
        ("log_viewer.py", None, "#lines [data-level=ERROR]"),
        ("plain_wsgi.py", None, "#seconds:not(:text-is('?'))"),
        ("worker_threads.py", None, "li:has-text('batch of 50')"),
    ],
    indirect=["server"],
)
def test_a_browser_shows_the_events_and_has_nothing_to_complain_of(
    server: Server, browser: Browser, act: Callable[[Page], None] | None, sign: str
) -> None:
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if not message.location["url"].endswith("/favicon.ico"):  # which a page need not have
            complaints.append(message.text)

    context = browser.new_context(http_credentials={"username": "anybody", "password": password_of(server)})
    with context, context.new_page() as page:
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url, wait_until="load")
        if act:
            act(page)
        page.wait_for_selector(sign)
    assert complaints == []


# -- hello, worker threads, plain WSGI ---------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["hello.py"], indirect=True)
def test_hello_shows_further_visits(server: Server) -> None:
    with Stream(server) as stream:
        stream.until("sse_open")
        assert 'from "/events/sse-batcher.js"' in server.request("GET", "/")
        assert stream.until("visit")[-1].data.keys() == {"browser"}


def test_hello_fits_on_a_screen() -> None:
    assert len((EXAMPLES / "hello.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("server", ["worker_threads.py"], indirect=True)
def test_worker_threads_sends_lone_events_and_bursts_as_batches(server: Server) -> None:
    with Stream(server) as stream:
        assert stream.until("step")[-1].data["worker"] in {"Ann", "Bob"}
        sizes: list[int] = []
        while sizes[-2:] != [50, 50]:
            assert len(sizes) < 8, sizes  # more than two, if the machine stands still in the middle of a burst
            sizes.append(stream.until("file_batch")[-1].data["batchSize"])
        assert "step" in server.request("GET", "/")


@pytest.mark.parametrize("server", ["plain_wsgi.py"], indirect=True)
def test_plain_wsgi_ticks(server: Server) -> None:
    with Stream(server) as stream:
        first, second = stream.until("tick")[-1], stream.until("tick")[-1]
        assert second.data["seconds"] > first.data["seconds"]
        assert "tick" in server.request("GET", "/")


# -- channels ----------------------------------------------------------------------------------------------------------


def member(server: Server, name: str) -> Visitor:
    visitor = Visitor(server)
    assert visitor.status("/login", {"member": name}) == 200
    assert name in visitor.get("/")
    return visitor


@pytest.mark.parametrize("server", ["channels.py"], indirect=True)
def test_a_team_gets_its_own_messages_and_all_teams_the_notices(server: Server) -> None:
    red, blue, stranger = member(server, "red keeper"), member(server, "blue keeper"), Visitor(server)
    path = "/events?channel=default&channel={}".format
    with red.stream(path("red")) as of_red, blue.stream(path("blue")) as of_blue, stranger.stream() as of_stranger:
        assert red.status("/messages", {"text": "<i>left</i>", "from": "blue keeper"}) == 204
        assert of_red.until("message")[-1].data == {"from": "red keeper", "text": "<i>left</i>"}
        # What comes later has come; so what should not come at all would have been there.
        assert blue.status("/messages", {"text": "right"}) == 204
        assert of_blue.until("message")[-1].data == {"from": "blue keeper", "text": "right"}
        member(server, "red striker")
        for stream in (of_red, of_blue, of_stranger):
            blocks = stream.until("notice")
            assert events(blocks[-1], "notice")[-1] == {"text": "The red striker came in."}
            assert not any(events(block, "message") for block in blocks)


@pytest.mark.parametrize("server", ["channels.py"], indirect=True)
def test_a_channel_of_another_team_is_refused(server: Server) -> None:
    red, blue, stranger = member(server, "red keeper"), member(server, "blue keeper"), Visitor(server)
    assert [visitor.status("/events?channel=red") for visitor in (blue, stranger)] == [403, 403]
    assert stranger.status("/messages", {"text": "let me in"}) == 403
    with blue.stream("/events?channel=red&channel=blue") as stream:
        red.status("/messages", {"text": "left"})
        blue.status("/messages", {"text": "right"})
        assert stream.until("message")[-1].data["text"] == "right"
    assert blue.status("/logout", {}) == 200
    assert blue.status("/events?channel=blue") == 403


@pytest.mark.parametrize("server", ["channels.py"], indirect=True)
def test_a_foreign_site_cannot_write_in_the_name_of_a_member(server: Server) -> None:
    red = member(server, "red keeper")
    assert [red.status(path) for path in ("/login", "/logout", "/messages")] == [405, 405, 405]
    (cookie,) = red.cookies
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "Lax"


@pytest.mark.parametrize("server", ["channels.py"], indirect=True)
def test_a_name_that_is_in_no_team_cannot_log_in(server: Server) -> None:
    visitor = Visitor(server)
    assert [visitor.status("/login", form) for form in ({"member": "green keeper"}, {})] == [400, 400]
    assert not visitor.cookies


def test_the_key_of_the_sessions_is_another_one_each_time() -> None:
    apps = [load("channels.py")["app"] for _ in range(2)]
    assert len({app.secret_key for app in apps}) == 2
    assert min(len(app.secret_key) for app in apps) >= 32


# -- dashboard ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["dashboard.py"], indirect=True)
def test_the_dashboard_sends_the_latest_of_each_order_and_its_view_knows_it_already(
    server: Server, visitor: Visitor
) -> None:
    with visitor.stream() as stream:
        seen = {order["id"]: order["version"] for order in state_of(visitor)}
        assert len(seen) == 6
        jumps = batches = 0
        while batches < 2 or not jumps:
            batches += 1
            assert batches < 8, "no state was replaced by a newer one"
            orders = events(stream.until("order_batch")[-1], "order")
            now = {order["id"]: order for order in state_of(visitor)}
            assert len({order["id"] for order in orders}) == len(orders)
            for order in orders:
                known = now[order["id"]]
                assert known["version"] > order["version"] or known == order
                jumps += order["version"] > seen[order["id"]] + 1
                seen[order["id"]] = order["version"]


def state_of(visitor: Visitor) -> Any:
    return json.loads(visitor.get("/orders"))


def test_the_dashboard_sends_after_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("dashboard.py")
    app, db, folder = example["app"], example["db"], example["folder"]
    states = []

    def look(_: EventBatcher, held: tuple[Event, Any, Any, Any]) -> None:
        other = sqlite3.connect(f"{folder.name}/orders.db")
        states.append((held[0].data["state"], other.execute("SELECT state FROM 'order'").fetchone()[0]))
        other.close()

    monkeypatch.setattr("sse_batcher.manager.put_held", look)
    with app.app_context():
        db.create_all()
        db.session.add(example["Order"](state="new"))
        db.session.commit()
        example["advance"](1)
        example["advance"](1)
        db.session.remove()
        db.engine.dispose()
    folder.cleanup()
    assert states == [("paid", "paid"), ("packed", "packed")]


@pytest.mark.external
@pytest.mark.parametrize("server", ["dashboard.py"], indirect=True)
def test_the_dashboards_page_keeps_the_newer_state_and_reloads_after_a_gap(server: Server, browser: Browser) -> None:
    with browser.new_page() as page:
        streams = MadeUpStreams(page)
        page.goto(server.url, wait_until="load")
        rows = page.locator("#rows tr")
        rows.nth(5).wait_for()
        streams.answer(
            ("sse_open", {"heartbeat": 15}),
            ("order", {"id": 1, "state": "stale", "version": 0}),
            ("order", {"id": 7, "state": "strange", "version": 1}),
        )
        rows.filter(has_text="strange").wait_for()
        assert (rows.count(), rows.filter(has_text="stale").count()) == (7, 0)
        with page.expect_response("**/orders"):
            streams.answer(("sse_gap", {"reason": "epoch", "heartbeat": 15}))
        rows.filter(has_text="strange").wait_for(state="detached")
        rows.nth(5).wait_for()


# -- log viewer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["log_viewer.py"], indirect=True)
def test_the_log_comes_in_batches_and_an_error_at_once_after_what_was_before_it(
    server: Server, visitor: Visitor
) -> None:
    with visitor.stream() as stream:
        error = stream.until("log_error")[-1]  # of the first job that fails, which may have begun before us
        number = int(error.data["text"].split()[1])
        every = list(range(1, 31))
        for _ in range(5):  # if the machine stands still in the middle of a job, it has several batches
            *logs, error = stream.until("log_error")
            assert (error.data["level"], error.data["text"]) == ("ERROR", f"job {number + 2} failed")
            told = {
                job: [(block.data.get("reason"), steps(block, job)) for block in logs if steps(block, job)]
                for job in (number + 1, number + 2)
            }
            for batches in told.values():
                assert [step for _, part in batches for step in part] == every
            expected = {number + 1: [("time_window", every)], number + 2: [("critical", every)]}
            number += 2
            if told == expected:
                break
        assert told == expected


def steps(block: Block, number: int) -> list[int]:
    """Which steps of a job a block tells of."""
    lines = [data["text"] for data in events(block, "log") if data["name"] == "job"]
    return [int(line.split()[-1]) for line in lines if line.startswith(f"job {number} is at step ")]


class Viewer:
    """The log viewer's handler in this process, on a logger of its own and on sse_batcher's, and a client."""

    def __init__(self) -> None:
        self.example = load("log_viewer.py")
        self.sse = self.example["sse"]
        self.manager: SSEManager = self.sse.manager
        self.handler = self.example["EventHandler"]()
        self.log = logging.getLogger("test_examples")
        self.loggers = [self.log, logging.getLogger("sse_batcher")]
        self.client = self.manager.subscribe()

    def records(self) -> list[dict[str, Any]]:
        """End the manager, and return what the client has got until then, in order."""
        self.manager.shutdown()
        found: list[dict[str, Any]] = []
        for data in re.findall(r"^data: (.*)$", b"".join(self.client).decode(), re.MULTILINE):
            value = json.loads(data)
            found.extend(value.get("events", [value]))
        return [value for value in found if "text" in value]


@pytest.fixture
def viewer() -> Iterator[Viewer]:
    viewer = Viewer()
    levels = [logger.level for logger in viewer.loggers]
    for logger in viewer.loggers:
        logger.addHandler(viewer.handler)
        logger.setLevel(logging.INFO)
    yield viewer
    viewer.manager.shutdown()
    for logger, level in zip(viewer.loggers, levels, strict=True):
        logger.removeHandler(viewer.handler)
        logger.setLevel(level)


def test_what_sse_batcher_itself_logs_is_shown_too(viewer: Viewer) -> None:
    viewer.sse.enqueue("error", {})  # of which it logs in this thread
    for number in range(2):
        viewer.sse.enqueue("tools", {"server": "a", "number": number})  # and of this in its own
    viewer.manager.flush_all(TIMEOUT)
    wait_until(lambda: viewer.manager.get_stats().enqueued == 5, "both records were enqueued")
    assert [record["name"] for record in viewer.records()] == ["sse_batcher.batcher", "sse_batcher.engine"]


def test_logging_about_the_sending_of_a_record_does_not_go_round_for_ever(viewer: Viewer) -> None:
    refusals = []

    def receiver(sender: object, error: Exception, **values: object) -> None:
        refusals.append(error)
        assert len(refusals) < 5, "it goes round"
        viewer.log.warning("refused: %s", error)

    with signals.event_refused.connected_to(receiver, sender=viewer.manager):
        viewer.manager.shutdown()
        viewer.log.info("too late")
        viewer.log.info("again")
    assert [type(error).__name__ for error in refusals] == ["ClosedError"] * 2


def test_a_record_that_finds_the_backlog_full_is_counted_and_reported(
    viewer: Viewer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise BacklogFullError(1, 1, 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(viewer.sse, "enqueue", refuse)
        viewer.log.info("one")
        viewer.log.error("two")
    viewer.log.info("three")
    assert [(record["text"], record["dropped"]) for record in viewer.records()] == [("three", 2)]
    viewer.log.info("after the end")
    assert capsys.readouterr().err == ""


def test_a_wrong_log_call_harms_only_itself(
    viewer: Viewer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise pytest keeps the log for its report. A worker of pytest-xdist cannot send a lone surrogate, and ends.
    monkeypatch.setattr(viewer.log, "propagate", False)
    # Not through the logger, since pytest's own handler fails a test that makes such a call.
    viewer.handler.handle(viewer.log.makeRecord("test_examples", logging.INFO, "", 0, "%d", ("one",), None))
    viewer.log.info("x" * 1_000_000)
    viewer.log.info("\ud800 <b>\u2028")
    assert "--- Logging error ---" in capsys.readouterr().err
    assert [record["text"] for record in viewer.records()] == ["x" * 10_000, "\ud800 <b>\u2028"]


# -- Django ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["django_app.py"], indirect=True)
def test_django_decides_which_users_may_see_the_stream(server: Server, visitor: Visitor) -> None:
    stranger = Visitor(server)
    assert stranger.status("/events") == 403
    with visitor.stream():
        pass
    (cookie,) = (cookie for cookie in visitor.cookies if cookie.name == "guest")
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.value is not None
    cookie.value = cookie.value.replace("yes", "boss")  # which was not signed
    assert visitor.status("/events") == 403


@pytest.mark.parametrize("server", ["django_app.py"], indirect=True)
def test_a_user_that_logs_out_of_django_sees_no_more(server: Server, visitor: Visitor) -> None:
    token = {"csrfmiddlewaretoken": csrf_token(visitor)}
    assert [visitor.status("/press", {}), visitor.status("/press", token)] == [403, 204]
    assert visitor.status("/logout", token) == 200
    assert [visitor.status("/press", token), visitor.status("/events")] == [403, 403]


@pytest.mark.parametrize("server", ["django_app.py"], indirect=True)
def test_django_sends_events_beside_its_pages_and_forgets_clients_that_left(server: Server, visitor: Visitor) -> None:
    token = {"csrfmiddlewaretoken": csrf_token(visitor)}
    with visitor.stream() as stream:

        def windows() -> int:
            assert visitor.status("/press", token) == 204
            data: dict[str, int] = events(stream.until("press")[-1], "press")[-1]
            return data["windows"]

        with visitor.stream():
            assert windows() == 2
        wait_until(lambda: windows() == 1, "the one that left is forgotten")


# -- Bottle ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["bottle_app.py"], indirect=True)
def test_bottle_asks_for_a_password(server: Server, visitor: Visitor) -> None:
    for stranger in (Visitor(server), Visitor(server, "a wrong one")):
        assert [stranger.status(path) for path in ("/", "/events")] == [401, 401]
    assert "EventSource" in visitor.get("/")


@pytest.mark.parametrize("server", ["bottle_app.py"], indirect=True)
def test_bottle_sends_the_latest_reading_of_each_sensor(server: Server, visitor: Visitor) -> None:
    with visitor.stream() as stream:
        assert stream.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        stream.until("reading_batch")  # which may have begun before us

        def sensors() -> list[str]:
            return sorted(reading["sensor"] for reading in events(stream.until("reading_batch")[-1], "reading"))

        # If the machine stands still, a window may end in the middle of a reading.
        assert any(sensors() == [f"sensor {number}" for number in range(1, 6)] for _ in range(3))


@pytest.mark.parametrize("server", ["bottle_app.py"], indirect=True)
def test_bottle_closes_the_stream_of_a_client_that_left_and_opens_none_for_head(
    server: Server, visitor: Visitor
) -> None:
    with visitor.stream() as stream:

        def windows() -> int:
            data: dict[str, int] = stream.until("windows")[-1].data
            return data["count"]

        with visitor.open("/events", method="HEAD") as answer:
            assert (answer.status, answer.read()) == (200, b"")
        assert windows() == 1
        with visitor.stream():
            wait_until(lambda: windows() == 2, "a second one is there")
        wait_until(lambda: windows() == 1, "it is forgotten")
