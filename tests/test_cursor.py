"""From a page's state to its stream without a hole: `sse.cursor()`, `sse_cursor()`, `@sse.snapshot`, over WSGI."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, abort, render_template_string
from werkzeug.test import TestResponse

from sse_batcher import SSE, HistoryOptions, SSEManager, UsageError, stream

from .kit.flask_sites import making
from .kit.ports import HOST, free_port
from .kit.sse_parser import EventStreamParser, ServerEvent, parse, take_events
from .kit.waiting import TIMEOUT

PAGE = "{{ sse_cursor() }}"


class Site:
    """An app with a page, and whose events are made by hand."""

    def __init__(self, **config: Any) -> None:
        self.app = Flask("site", static_folder=None)
        self.app.config.update(SSE_BATCH_WINDOW=0, **config)
        self.sse = SSE(self.app)
        with self.app.app_context():
            self.manager = self.sse.manager

        @self.sse.authorize
        def allowed(channels: tuple[str, ...]) -> list[str]:
            return [name for name in channels if name != "secret"]

        @self.app.get("/")
        def page() -> str:
            return render_template_string(PAGE)

    def send(self, *data: Any, channel: str = "default") -> None:
        for value in data:
            self.manager.enqueue("item", value, channel=channel)
        assert self.manager.flush_all(TIMEOUT)

    def get(self, path: str = "/", **options: Any) -> TestResponse:
        return self.app.test_client().get(path, **options)

    def open(self, query: str = "", cursor: str = "") -> TestResponse:
        return self.get(f"/events?{query}", headers={"Last-Event-ID": cursor} if cursor else {})


@pytest.fixture
def make_site() -> Iterator[Callable[..., Site]]:
    with making(Site) as make:
        yield make


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


def events(response: TestResponse, chunks: int) -> list[ServerEvent]:
    """Those of the next so many chunks."""
    body = iter(response.response)
    return parse(b"".join(next(body) for _ in range(chunks)), strict=True)  # type: ignore[misc]


# -- a page that goes on where its state was read ----------------------------------------------------------------------


def test_a_cursor_is_the_id_of_the_newest_frame(site: Site) -> None:
    with site.open() as response:
        (opened,) = take_events(response.response, 1)
        assert site.manager.cursor() == opened.id
        site.send(1)
        (item,) = take_events(response.response, 1)
    with site.app.app_context():
        assert site.sse.cursor() == item.id
    assert site.sse.cursor() == item.id  # the only app's, outside a context


def test_a_view_that_asks_for_the_cursor_before_its_state_misses_nothing(site: Site) -> None:
    state = {"n": 1}

    @site.app.get("/state")
    def view() -> dict[str, Any]:
        cursor = site.sse.cursor()
        site.send(2)  # happens while the state is read
        return {"state": state, "cursor": cursor}

    cursor = site.get("/state").get_json()["cursor"]
    site.send(3)
    with site.open(f"last_event_id={cursor}") as response:
        assert [event.json for event in take_events(response.response, 3)][1:] == [2, 3]


@pytest.mark.parametrize("name", ["last_event_id", "lastEventId"])
def test_the_cursor_of_a_page_is_noted_when_its_request_begins(site: Site, name: str) -> None:
    before = site.manager.cursor()

    @site.app.before_request
    def early() -> None:
        site.send("in a before_request function")

    @site.app.get("/late")
    def view() -> str:
        site.send("in the view")
        return render_template_string(PAGE)

    cursor = site.get("/late").text
    assert cursor == before != site.manager.cursor()
    site.send("after the page")
    with site.open(f"{name}={cursor}") as response:
        opened, *missed = take_events(response.response, 5)
    assert (opened.type, opened.id) == ("sse_open", cursor)
    texts = [event.json for event in missed]
    assert texts[:3] == ["in a before_request function", "in the view", "after the page"]


def test_the_cursor_is_noted_before_earlier_before_request_functions() -> None:
    app = Flask("early", static_folder=None)

    @app.before_request
    def early() -> None:
        sse.enqueue("item", 1)
        assert sse.manager.flush_all(TIMEOUT)

    app.add_url_rule("/", "page", lambda: render_template_string(PAGE))
    sse = SSE(app)
    before = sse.cursor()
    assert app.test_client().get("/").text == before != sse.cursor()
    assert sse.manager.shutdown(TIMEOUT)


def test_each_request_has_a_cursor_of_its_own(site: Site) -> None:
    first = site.get().text
    site.send(1)
    assert first != site.get().text == site.manager.cursor()


def test_a_template_without_a_request_has_the_cursor_of_now(site: Site) -> None:
    with site.app.app_context():
        site.send(1)
        assert render_template_string(PAGE) == site.manager.cursor()


def test_a_page_without_a_cursor_waits_for_no_redis_and_starts_nothing(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    redis_backend = pytest.importorskip("sse_batcher.backends.redis.backend")
    for name in ("OPEN_SECONDS", "SHORT_SECONDS"):  # as long as a stream would wait for Redis
        monkeypatch.setattr(redis_backend, name, 20.0)
    site = make_site(SSE_BACKEND=f"redis://{HOST}:{free_port()}")
    site.app.add_url_rule("/plain", view_func=lambda: "plain")
    before = threading.enumerate()
    began = time.monotonic()
    for _ in range(3):
        assert site.get("/plain").text == "plain"
    assert threading.enumerate() == before
    assert site.get().text == "unknown"  # it was asked for the place, so it is found out for later pages
    assert time.monotonic() - began < 10
    assert any(thread not in before for thread in threading.enumerate())


def test_each_app_has_a_cursor_of_its_own(make_site: Callable[..., Site]) -> None:
    one, other = make_site(), make_site()
    one.send(1)
    assert (one.get().text, other.get().text) == (one.manager.cursor(), other.manager.cursor())
    assert one.get().text != other.get().text


# -- several processes -------------------------------------------------------------------------------------------------

SEVERAL = {"environ_overrides": {"wsgi.multiprocess": True}}


def test_with_several_processes_a_page_has_no_cursor_and_one_warning_says_what_to_do(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.send(1)
    assert [site.get(**SEVERAL).text for _ in range(3)] == ["", "", ""]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("sse_batcher.page", logging.WARNING)
    for words in ("sse_cursor() is empty", "several processes", "SSE_BACKEND", "memory://"):
        assert words in record.getMessage()
    assert site.get().text == site.manager.cursor()


def test_an_explicit_backend_silences_the_warning_and_gives_the_cursor(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(SSE_BACKEND="memory://")
    assert site.get(**SEVERAL).text == site.manager.cursor()
    assert not caplog.records


def test_an_empty_cursor_in_the_query_is_a_new_client(site: Site) -> None:
    with site.open("last_event_id=") as response:
        assert [event.type for event in take_events(response.response, 1)] == ["sse_open"]


# -- snapshots ---------------------------------------------------------------------------------------------------------


class State:
    """Registers a snapshot of a channel, and counts how often it is taken."""

    def __init__(self, site: Site, channel: str = "default") -> None:
        self.asked = 0
        self.value: Any = "state of " + channel

        @site.sse.snapshot(channel)
        def take_state() -> tuple[str, Any]:
            self.asked += 1
            return "state", self.value() if callable(self.value) else self.value


def seen(happened: list[ServerEvent]) -> list[tuple[str, Any]]:
    return [(event.type, event.json) for event in happened if event.type != "sse_open"]


def test_a_new_client_gets_the_state_first_and_then_what_happens(site: Site) -> None:
    State(site)
    site.send(1)
    head = site.manager.cursor()
    with site.open() as response:
        opened, state = events(response, 1)
        site.send(2)
        (item,) = events(response, 1)
    assert opened.type == "sse_open"
    assert (state.type, state.json, state.id) == ("state", "state of default", head)
    assert item.json == 2


def test_what_happens_while_the_state_is_taken_comes_after_it(site: Site) -> None:
    state = State(site)

    def taken() -> str:
        site.send("while it is taken")
        return "taken"

    state.value = taken
    head = site.manager.cursor()
    with site.open() as response:
        site.send("before the stream is opened")
        happened = events(response, 3)
    assert seen(happened) == [
        ("state", "taken"),
        ("item", "while it is taken"),
        ("item", "before the stream is opened"),
    ]
    assert happened[1].id == head


def test_a_state_older_than_the_history_is_followed_by_sse_gap(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(SSE_HISTORY_FRAMES=1)
    State(site)
    with site.open() as response:
        site.send(1, 2)
        happened = events(response, 2)
    assert [event.type for event in happened] == ["sse_open", "state", "sse_gap"]


def test_a_client_that_misses_nothing_needs_no_state(site: Site) -> None:
    state = State(site)
    cursor = site.manager.cursor()
    site.send(1)
    with site.open(cursor=cursor) as response:
        assert seen(events(response, 2)) == [("item", 1)]
    assert state.asked == 0


@pytest.mark.parametrize("cursor", ["00000000-1", "nonsense"])
def test_a_client_that_has_missed_something_gets_sse_gap_and_the_state(site: Site, cursor: str) -> None:
    state = State(site)
    site.send(1)
    with site.open(cursor=cursor) as response:
        gap, block = events(response, 1)
        site.send(2)
        assert seen(events(response, 1)) == [("item", 2)]
    assert (gap.type, block.json, block.id[-2:], state.asked) == ("sse_gap", "state of default", "-1", 1)


def test_several_channels_have_each_their_state(site: Site) -> None:
    states = [State(site, name) for name in ("a", "b", "c")]
    site.send(1)
    with site.open("channel=b&channel=quiet&channel=a") as response:
        happened = events(response, 1)
    assert seen(happened) == [("state", "state of b"), ("state", "state of a")]
    assert happened[-1].id == site.manager.cursor()
    assert [state.asked for state in states] == [1, 1, 0]


def test_the_state_of_a_channel_that_is_not_allowed_is_not_taken(site: Site) -> None:
    secret, free = State(site, "secret"), State(site, "free")
    with site.open("channel=secret&channel=free") as response:
        assert seen(events(response, 1)) == [("state", "state of free")]
    assert site.open("channel=secret").status_code == 403
    assert (secret.asked, free.asked) == (0, 1)


def test_a_client_that_is_cut_off_before_it_has_the_whole_state_gets_it_again(site: Site) -> None:
    states = [State(site, name) for name in ("a", "b")]
    site.send(1)
    with site.open("channel=a&channel=b") as response:
        first: Any = next(iter(response.response))
    for length in range(len(first)):
        parser = EventStreamParser()
        got = parser.feed(first[:length])
        asked = states[1].asked
        with site.open("channel=a&channel=b", cursor=parser.last_event_id) as response:
            again = events(response, 1)
        assert states[1].asked == asked + 1, f"after {got}, {again}"


@pytest.mark.parametrize(
    "value",
    [lambda: 1 / 0, object, lambda: float("nan")],
    ids=["raises", "no JSON", "NaN"],
)
def test_a_snapshot_that_fails_is_logged_and_the_client_keeps_its_cursor(
    site: Site, caplog: pytest.LogCaptureFixture, value: Callable[[], Any]
) -> None:
    State(site).value = value
    with site.open(cursor="00000000-7") as response:
        assert response.status_code == 200
        assert response.content_type == "text/event-stream; charset=utf-8"
        (busy,) = parse(response.data, strict=True)
    assert (busy.type, busy.json, busy.id) == ("sse_busy", {"reason": "snapshot"}, "00000000-7")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("sse_batcher.blueprint", logging.ERROR)
    assert record.exc_info


def test_a_snapshot_that_fails_again_and_again_does_not_fill_the_log(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    State(site).value = lambda: 1 / 0
    for _ in range(9):
        with site.open():
            pass
    assert [record.args[1] for record in caplog.records if isinstance(record.args, tuple)] == [1, 2, 4, 8]
    with site.open() as response:
        (retry,) = re.findall(rb"retry: (\d+)", response.data)
    assert 10_000 <= int(retry) <= 30_000
    assert site.manager.get_stats().clients == 0


@pytest.mark.parametrize("answer", [None, "state", ("state",), ("state", 1, 2), ("", 1), ("sse_open", 1), (7, 1)])
def test_an_invalid_snapshot_is_logged_and_the_client_gets_sse_busy(
    site: Site, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    site.sse.snapshot("default")(lambda: answer)
    with site.open() as response:
        assert [event.type for event in parse(response.data)] == ["sse_busy"]
    assert len(caplog.records) == 1


def test_a_snapshot_that_aborts_refuses_the_client(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    State(site).value = lambda: abort(403)
    assert site.open().status_code == 403
    assert not caplog.records


def test_a_head_request_takes_no_state(site: Site) -> None:
    state = State(site)
    assert site.app.test_client().head("/events").status_code == 200
    assert state.asked == 0


def test_a_second_snapshot_of_a_channel_is_refused(site: Site) -> None:
    State(site)
    with pytest.raises(UsageError, match="is registered as the snapshot of channel 'default' already"):
        State(site)
    with pytest.raises(ValueError):
        site.sse.snapshot("")
    State(site, "another")


# -- without Flask -----------------------------------------------------------------------------------------------------


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    with SSEManager(batching=False) as manager:
        yield manager


def chunks_of(manager: SSEManager, query: str = "", **options: Any) -> Iterator[bytes]:
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": query}
    return iter(stream(manager, environ, **options)[2])


def test_plain_wsgi_has_snapshots_too(manager: SSEManager) -> None:
    asked = []

    def state() -> Iterator[tuple[str, Any]]:
        asked.append(1)
        yield "state", 1
        manager.enqueue("item", 2)
        assert manager.flush_all(TIMEOUT)
        yield "more", {"n": 1}

    head = manager.cursor()
    chunks = chunks_of(manager, snapshot=state)
    happened = parse(next(chunks) + next(chunks), strict=True)
    assert seen(happened) == [("state", 1), ("more", {"n": 1}), ("item", 2)]
    assert happened[2].id == head
    chunks = chunks_of(manager, f"last_event_id={head}", snapshot=state)
    assert seen(parse(next(chunks) + next(chunks))) == [("item", 2)]
    assert len(asked) == 1


def test_a_client_that_had_missed_nothing_until_its_stream_began_comes_back_for_the_state() -> None:
    def send(number: int) -> None:
        manager.enqueue("item", number)
        assert manager.flush_all(TIMEOUT)

    def open_at(cursor: str) -> Iterator[bytes]:
        return chunks_of(manager, f"last_event_id={cursor}", snapshot=lambda: [("state", 1)])

    with SSEManager(batching=False, history=HistoryOptions(history_frames=1)) as manager:
        cursor = manager.cursor()
        send(1)
        body = open_at(cursor)
        send(2)  # the first is gone now
        [busy] = parse(b"".join(body), strict=True)
        assert (busy.type, busy.json, busy.id) == ("sse_busy", {"reason": "backend"}, cursor)
        assert manager.get_stats().clients == 0
        assert [event.type for event in parse(next(open_at(cursor)))] == ["sse_gap", "state"]


def test_plain_wsgi_lets_a_snapshot_that_fails_raise(manager: SSEManager) -> None:
    with pytest.raises(ZeroDivisionError):
        chunks_of(manager, snapshot=lambda: [("state", 1 / 0)])
    assert manager.get_stats().clients == 0


@pytest.mark.parametrize(("query", "blocks"), [("batch=0", 3), ("batch=1", 1), ("batch=", 1), ("", 1)])
def test_a_client_that_knows_no_batches_says_so_in_the_query(query: str, blocks: int) -> None:
    with SSEManager() as manager:
        chunks = chunks_of(manager, query)
        next(chunks)
        for number in range(3):
            manager.enqueue("item", number)
        happened = parse(next(chunks), strict=True)
        assert len(happened) == blocks
        if blocks == 3:
            head = manager.cursor()
            assert [(event.json, event.id) for event in happened] == [(0, f"{head}.1"), (1, f"{head}.2"), (2, head)]
            for rest in ("", "&batch=0"):
                chunks = chunks_of(manager, f"last_event_id={head}.1{rest}")
                opened, *left = parse(next(chunks) + next(chunks), strict=True)
                assert opened.id == f"{head}.1"
                assert [(event.type, event.json) for event in left] == [("item", 1), ("item", 2)]
                assert left[-1].id == head
