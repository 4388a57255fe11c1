"""One contract for both transports: what a client sees of a stream does not depend on who drives it. Over real HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import parse_qs

import pytest

from sse_batcher import BatchOptions, ClientOptions, HistoryOptions, SSEManager, Text, stream
from sse_batcher.cli import serving
from sse_batcher.manager_state import process_of
from sse_batcher.options import TRANSPORTS
from sse_batcher.transports.detached.loop import loop

from .kit.sse_parser import EventStreamParser, ServerEvent
from .kit.waiting import TIMEOUT, wait_until


class Site:
    """A manager behind a server of this process, and connections to it."""

    def __init__(self, stack: ExitStack, transport: str, history: HistoryOptions | None, **options: Any) -> None:
        self.transport = transport
        clients = ClientOptions(transport=transport, **options)
        self.manager = stack.enter_context(
            SSEManager(batching=BatchOptions(batch_window=10), clients=clients, history=history)
        )
        self.take_state: Callable[[], list[tuple[str, Any]]] | None = None
        self._stack = stack
        self.address = stack.enter_context(serving(self.app))

    def app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        channels = parse_qs(environ["QUERY_STRING"]).get("channel", ["default"])
        status, headers, body = stream(self.manager, environ, channels, snapshot=self.take_state, user=channels[0])
        start_response(status, headers)
        return body

    def ask(self, query: str = "", cursor: str | None = None) -> Reading:
        connection = http.client.HTTPConnection(*self.address, timeout=TIMEOUT)
        self._stack.callback(connection.close)
        connection.request("GET", f"/?{query}", headers={"Last-Event-ID": cursor} if cursor else {})
        return Reading(connection, connection.getresponse())

    def open(self, query: str = "", cursor: str | None = None) -> Reading:
        reading = self.ask(query, cursor)
        # The first block comes before the connection has changed hands.
        first = reading.next()
        reading.first = first
        if first.type != "sse_busy":
            name = {"attached": "attached", "auto": "detached"}[self.transport]
            wait_until(lambda: self.manager.get_stats().clients_by_transport[name] >= 1, f"one is {name}")
        return reading

    def send(self, *events: Any, channel: str = "default") -> None:
        for data in events:
            self.manager.enqueue("t", data, channel=channel)
        assert self.manager.flush_all(TIMEOUT)


class Reading:
    """The client's side of a stream."""

    first: ServerEvent

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self._parser = EventStreamParser(strict=True)
        self._events: list[ServerEvent] = []
        self.lines = b""

    def next(self) -> ServerEvent:
        while not self._events:
            data = self._response.read1(65_536)
            assert data, "the stream has ended"
            self.lines += data
            self._events += self._parser.feed(data)
        return self._events.pop(0)

    def data(self) -> Any:
        return json.loads(self.next().data)

    def raw(self) -> bytes:
        """Some of the bytes that come next, or b"" at the end."""
        return self._response.read1(100)

    def cut_at(self, size: int) -> list[ServerEvent]:
        """The events of the first so many bytes, after which the client leaves."""
        data = self._response.read(size)
        assert len(data) == size
        self.leave()
        return EventStreamParser().feed(data)

    def has_ended(self) -> bool:
        return not self._events and self._response.read1(65_536) == b""

    def leave(self) -> None:
        self._response.close()
        self._connection.close()


@pytest.fixture(params=TRANSPORTS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:
        yield lambda history=None, **options: Site(stack, request.param, history, **options)
    assert len(loop.get()) == 0


@pytest.fixture
def site(make: Callable[..., Site]) -> Site:
    return make()


def test_a_stream_begins_with_its_place_and_goes_on_with_what_happens(site: Site) -> None:
    cursor = site.manager.cursor()
    reading = site.open()
    assert (reading.first.type, reading.first.id) == ("sse_open", cursor)
    site.send(1)
    assert reading.data() == 1
    site.send(2, 3)
    assert reading.data()["events"] == [2, 3]


def test_a_client_gets_its_channels_and_broadcasts(site: Site) -> None:
    reading = site.open("channel=a&channel=b")
    for channel in ("a", "c", "b"):
        site.send(channel, channel=channel)
    site.manager.broadcast("t", "all")
    assert site.manager.flush_all(TIMEOUT)
    assert [reading.data() for _ in range(3)] == ["a", "b", "all"]


def test_a_client_that_returns_gets_what_it_has_missed(site: Site) -> None:
    reading = site.open()
    site.send(1)
    cursor = reading.next().id
    reading.leave()
    site.send(2)
    site.send(3)
    again = site.open(cursor=cursor)
    assert (again.first.type, again.first.id) == ("sse_open", cursor)
    assert [again.data(), again.data()] == [2, 3]


def test_a_client_that_returns_too_late_gets_a_gap(make: Callable[..., Site]) -> None:
    site = make(HistoryOptions(history_frames=2))
    cursor = site.open().first.id
    for number in range(5):
        site.send(number)
    again = site.open(cursor=cursor)
    assert (again.first.type, json.loads(again.first.data)["reason"]) == ("sse_gap", "too_old")
    site.send("on")
    assert again.data() == "on"


def test_a_client_that_knows_no_batches_goes_on_in_the_middle_of_one(site: Site) -> None:
    reading = site.open("batch=0")
    site.send(1, 2, 3)
    assert [reading.data(), reading.data(), reading.data()] == [1, 2, 3]
    site.send(4, 5, 6)
    cursor = reading.next().id
    assert cursor.endswith(".1")
    for query in ("batch=0", ""):
        again = site.open(query, cursor=cursor)
        assert [again.data(), again.data()] == [5, 6]


def test_a_new_client_gets_the_state_first_however_large_it_is(site: Site) -> None:
    site.take_state = lambda: [("state", "x" * 1_000_000), ("state", 2)]
    reading = site.open()
    assert [reading.next().data[:3], reading.next().data] == ['"xx', "2"]
    site.send(1)
    assert reading.data() == 1


def test_a_silent_stream_has_heartbeats(make: Callable[..., Site]) -> None:
    reading = make(heartbeat=0.05).open()
    assert reading.raw()


def test_a_stream_ends_with_its_lease(make: Callable[..., Site]) -> None:
    reading = make(max_stream_age=0.3).ask()  # a machine that stands still may miss the time in which it is open
    assert reading.next().type == "sse_open"
    bye = reading.next()
    assert (bye.type, json.loads(bye.data)) == ("sse_bye", {"reason": "lease"})
    assert reading.has_ended()


def test_a_kicked_client_gets_a_bye_and_the_others_go_on(site: Site) -> None:
    one, two = site.open("channel=a"), site.open("channel=b")
    site.manager.kick(user="a")
    bye = one.next()
    assert (bye.type, json.loads(bye.data)) == ("sse_bye", {"reason": "kicked"})
    assert one.has_ended()
    site.send(1, channel="b")
    assert two.data() == 1


def test_a_kick_while_the_state_is_taken_ends_the_stream(site: Site) -> None:
    def take() -> list[tuple[str, Any]]:
        assert site.manager.kick(user="default") == 0
        return [("state", "secret")]

    site.take_state = take
    refused = site.ask()
    events = [refused.next(), refused.next()]
    assert [(event.type, event.json.get("reason"), event.id) for event in events] == [
        ("sse_open", None, ""),
        ("sse_bye", "kicked", ""),
    ]
    assert refused.has_ended()
    wait_until(lambda: site.manager.get_stats().clients == 0, "it was forgotten")
    site.take_state = lambda: [("state", 1)]
    again = site.open()
    assert (again.first.type, again.data()) == ("sse_open", 1)


def test_a_user_who_is_revoked_gets_a_bye(make: Callable[..., Site]) -> None:
    site = make(revalidate_every=0.05)
    may_stay = [True]
    site.manager.revalidate = lambda user: may_stay[0]
    reading = site.open()
    site.send(1)
    assert reading.data() == 1
    may_stay[0] = False
    assert json.loads(reading.next().data) == {"reason": "revoked"}
    assert reading.has_ended()


def test_one_client_too_many_gets_busy(make: Callable[..., Site]) -> None:
    site = make(max_clients=1)
    first = site.open()
    second = site.open()
    assert (second.first.type, json.loads(second.first.data)) == ("sse_busy", {"reason": "limit"})
    assert second.has_ended()
    first.leave()
    wait_until(lambda: site.manager.get_stats().clients == 0, "it was seen to have left")
    assert site.open().first.type == "sse_open"


def test_a_client_that_leaves_is_noticed_at_once(site: Site) -> None:
    reading = site.open()
    reading.leave()
    wait_until(lambda: site.manager.get_stats().clients == 0, "it was seen to have left")


@pytest.mark.parametrize("end", ["drain", "shutdown"])
def test_at_the_end_what_is_pending_comes_and_then_a_goodbye(site: Site, end: str) -> None:
    reading = site.open()
    site.manager.enqueue("t", "pending")
    if end == "drain":
        process_of(site.manager).drain()
    else:
        site.manager.shutdown(TIMEOUT)
    assert reading.data() == "pending"
    bye = reading.next()
    assert (bye.type, json.loads(bye.data)) == ("sse_bye", {"reason": "shutdown"})
    assert reading.has_ended()
    wait_until(lambda: site.manager.get_stats().clients == 0, "it has left")


def test_when_one_of_two_servers_ends_streams_open_again_at_the_other(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_batcher.process_state.REOPEN_SECONDS", 0.0)
    stays = site.address
    with serving(site.app) as site.address:
        reading = site.open()
    assert reading.next().type == "sse_bye"
    assert reading.has_ended()
    site.address = stays
    reading = site.open()
    assert reading.first.type == "sse_open"
    site.send(1)
    assert reading.data() == 1


def test_what_was_handed_out_is_counted(site: Site) -> None:
    reading = site.open()
    site.send(1, 2, 3)
    assert reading.data()["events"] == [1, 2, 3]
    wait_until(lambda: site.manager.get_stats().frames == 1, "it is counted")
    stats = site.manager.get_stats()
    assert (stats.saved_frames, stats.clients, stats.undone) == (2, 1, 0)
    assert len(reading.lines) <= stats.bytes <= len(reading.lines) + 20


# -- texts -------------------------------------------------------------------------------------------------------------

TEXTS = ["<b>é\r\n😀</b>", "e\u0301👩\u200d👧\u2028", "", "end"]


def texts_until_end(reading: Reading) -> list[ServerEvent]:
    """The events of a stream up to the one whose last line is that of the last text."""
    events = [reading.next()]
    while events[-1].data.split("\n")[-1] != "end":
        events.append(reading.next())
    return events


@pytest.mark.parametrize("query", ["", "batch=0"])
def test_texts_arrive_joined_or_each_in_a_block_of_its_own(site: Site, query: str) -> None:
    reading = site.open(query)
    for text in TEXTS:
        site.manager.enqueue("message", Text(text))
    assert site.manager.flush_all(TIMEOUT)
    expected = [text.replace("\r\n", "\n") for text in TEXTS]
    data = [event.data for event in texts_until_end(reading)]
    assert data == (expected if query else ["\n".join(expected)])
    assert b"event:" not in reading.lines.partition(b"\n\n")[2]


@pytest.mark.parametrize("query", ["", "batch=0"])
def test_a_client_whose_connection_is_cut_at_any_byte_of_a_text_gets_all_texts(site: Site, query: str) -> None:
    start = site.open(query).first.id
    for text in TEXTS:
        site.manager.enqueue("message", Text(text))
    assert site.manager.flush_all(TIMEOUT)
    whole = site.ask(query, start)
    opened, *expected = texts_until_end(whole)
    assert opened.type == "sse_open"
    size = len(whole.lines)
    for cut in range(whole.lines.index(b"\n\n") + 2, size):
        reading = site.ask(query, start)
        before = [event for event in reading.cut_at(cut) if event.type == "message"]
        again, *after = texts_until_end(site.ask(query, before[-1].id if before else start))
        assert again.type == "sse_open"
        assert before + after == expected, cut
