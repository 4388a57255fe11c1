"""Cursors that are older than a process's own history: what only Redis still has reaches the clients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from sse_batcher import (
    BackendError,
    BatchOptions,
    HistoryOptions,
    SSEManager,
    stream,
)
from sse_batcher.cli import serving
from sse_batcher.manager_state import process_of
from sse_batcher.wire import HEARTBEAT

from .kit.delivery import asked_for
from .kit.redisserver import RedisServer, cursor_of, redis_fixture
from .kit.sse_parser import EventStreamParser, ServerEvent, parse
from .kit.viewers import FORGETFUL, Make, Viewer, add, flat, managers_fixture, publishing, send, wait_until_read
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external

server = redis_fixture()
make = managers_fixture()


@external
@pytest.mark.parametrize("batches", [True, False], ids=["batches", "no batches"])
def test_what_a_process_has_no_more_is_read_from_redis_in_order_and_once_while_more_comes(
    server: RedisServer, make: Make, batches: bool
) -> None:
    manager, other = make(server.url, history=FORGETFUL), make(server.url)
    start = cursor_of(manager)
    send(other, *range(1_000))
    assert other.flush_all(TIMEOUT)
    with publishing(other, 1_000, 3_000):
        with Viewer(manager, cursor=start, batches=batches) as viewer:
            assert viewer.events[0].type == "sse_open"
            assert viewer.numbers(2_999) == [*range(3_000)]
    assert manager.get_stats().gaps == 0
    assert manager.get_stats().history_frames == 1


@contextmanager
def detached_stream(manager: SSEManager, cursor: str) -> Iterator[HTTPResponse]:
    """What a server of this process answers a client that comes with this place."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        status, headers, body = stream(manager, environ)
        start_response(status, headers)
        return body

    with serving(app) as address:
        connection = HTTPConnection(*address, timeout=TIMEOUT)
        connection.request("GET", "/", headers={"Last-Event-ID": cursor})
        with closing(connection), connection.getresponse() as response:
            yield response


def read_to(response: HTTPResponse, last: Any) -> list[ServerEvent]:
    """The events up to the one with this data."""
    parser = EventStreamParser(strict=True)
    events: list[ServerEvent] = []
    while last not in flat(events):
        data = response.read1(65_536)
        assert data, "it ends"
        events += parser.feed(data)
    return events


@external
def test_what_only_redis_has_reaches_detached_streams(server: RedisServer, make: Any) -> None:
    manager, other = make(server.url, history=FORGETFUL), make(server.url)
    start = cursor_of(manager)
    send(other, *range(300))
    assert other.flush_all(TIMEOUT)
    wait_until_read(manager)
    with detached_stream(manager, start) as response:
        wait_until(lambda: manager.get_stats().clients_by_transport["detached"] == 1, "it is detached")
        first, *rest = read_to(response, 299)
        assert (first.type, flat(rest)) == ("sse_open", [*range(300)])
        send(other, 300)
        assert flat(read_to(response, 300)) == [300]
    assert manager.get_stats().gaps == 0


@external
def test_a_detached_stream_outlives_redis_in_the_middle_of_its_replay(server: RedisServer, make: Any) -> None:
    manager = make(server.url, history=FORGETFUL)
    start = cursor_of(manager)
    text = "x" * 10_000
    for number in range(600):
        manager.enqueue("n", [number, text])
    assert manager.flush_all(TIMEOUT)
    wait_until_read(manager)
    with detached_stream(manager, start) as response:
        wait_until(lambda: manager.get_stats().clients_by_transport["detached"] == 1, "it is detached")
        server.kill()
        parser = EventStreamParser(strict=True)
        events: list[ServerEvent] = []
        data = b"x"
        while data.strip(HEARTBEAT):  # all that had been read, and then it waits
            data = response.read1(65_536)
            events += parser.feed(data)
        assert len(flat(events)) < 600
        server.start()
        while len(flat(events)) < 601:
            events += parser.feed(response.read1(65_536))
    assert [data[0] for data in flat(events[1:])] == [*range(600)]
    assert manager.get_stats().gaps == 0


@external
def test_a_reader_that_is_slow_is_helped_from_redis(server: RedisServer, make: Make) -> None:
    manager = make(server.url, history=FORGETFUL, queue_frames=2)
    client = manager.subscribe()
    next(client)
    send(manager, *range(500))
    assert manager.flush_all(TIMEOUT)
    wait_until_read(manager)
    got: list[Any] = []
    while 499 not in got:
        got += flat(parse(next(client)))
    assert got == [*range(500)]
    assert manager.get_stats().overflows > 0


@external
def test_a_part_of_a_batch_that_only_redis_has_is_gone_on_with(server: RedisServer, make: Make) -> None:
    manager = make(server.url, BatchOptions(batch_window=10, max_batch_size=5), history=FORGETFUL)
    with Viewer(manager, batches=False) as viewer:
        send(manager, *range(10))
        viewer.numbers(9)
        ids = [event.id for event in viewer.events[1:]]
    wait_until_read(manager)
    for batches in (True, False):
        for index, cursor in enumerate(ids[:-1]):
            with Viewer(manager, cursor=cursor, batches=batches) as viewer:
                assert viewer.events[0].type == "sse_open"
                assert viewer.numbers(9) == [*range(index + 1, 10)]


@external
def test_of_what_redis_has_each_client_gets_what_it_asked_for(server: RedisServer, make: Make) -> None:
    manager = make(server.url, BatchOptions(max_batch_size=1), history=FORGETFUL)
    start = cursor_of(manager)
    for number in range(300):
        send(manager, number, channel="rare" if number % 100 == 50 else "busy")
    manager.broadcast("n", "all")
    assert manager.flush_all(TIMEOUT)
    wait_until_read(manager)
    with Viewer(manager, "rare", cursor=start) as rare, Viewer(manager, "quiet", cursor=start) as quiet:
        send(manager, "end", channel="rare")
        send(manager, "end", channel="quiet")
        assert flat(rare.until(lambda event: event.json == "end")) == [50, 150, 250, "all", "end"]
        assert flat(quiet.until(lambda event: event.json == "end")) == ["all", "end"]


@external
def test_what_redis_has_trimmed_meanwhile_is_a_gap(server: RedisServer, make: Make) -> None:
    manager = make(server.url, BatchOptions(max_batch_size=1), history=FORGETFUL)
    start = cursor_of(manager)
    send(manager, *range(200))
    assert manager.flush_all(TIMEOUT)
    wait_until_read(manager)
    began = manager.subscribe(last_event_id=start)
    assert parse(next(began))[0].type == "sse_open"
    assert flat(parse(next(began))) == [0]
    server.client.xtrim("sse_batcher:stream", maxlen=20, approximate=False)
    got: list[Any] = []
    while "overflow" not in got:
        got += flat(parse(next(began)))
    assert got == [*range(1, len(got)), "overflow"]
    assert len(got) < 180
    with Viewer(manager, cursor=start) as viewer:
        assert flat(viewer.events[:1]) == ["too_old"]


@external
def test_from_redis_too_nothing_comes_twice_and_no_hole_is_passed(server: RedisServer, make: Make) -> None:
    manager = make(server.url, history=FORGETFUL)
    start = cursor_of(manager)
    for number in (1, 2, 2, 1, 3):
        add(server, number)
    wait_until_read(manager)
    with Viewer(manager, cursor=start) as viewer:
        assert viewer.events[0].type == "sse_open"
        send(manager, "end")
        assert flat(viewer.until(lambda event: event.json == "end")) == [1, 2, 3, "end"]
    hole = add(server, 5)
    add(server, 6)
    wait_until_read(manager)
    epoch = start.partition("-")[0]
    with Viewer(manager, cursor=start) as viewer:
        assert flat(viewer.events[:1]) == ["too_old"]
    with Viewer(manager, cursor=f"{epoch}-{hole}") as viewer:
        send(manager, "end")
        assert flat(viewer.until(lambda event: event.json == "end")) == [6, "end"]


@external
def test_doubles_that_are_forgotten_are_not_passed(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_batcher.backends.redis.state.MAX_DUPLICATES", 2)
    manager = make(server.url, history=FORGETFUL)
    start = cursor_of(manager)
    ids = [add(server, number) for number in (1, 1, 1, 1, 2, 3)]
    wait_until_read(manager)
    with Viewer(manager, cursor=start) as viewer:
        assert flat(viewer.events[:1]) == ["too_old"]
    with Viewer(manager, cursor=f"{start.partition('-')[0]}-{ids[1]}") as viewer:
        assert viewer.numbers(3) == [2, 3]


@external
def test_an_entry_that_is_gone_from_the_end_makes_it_another_line(server: RedisServer, make: Make) -> None:
    """As where a replica that had got less becomes the master."""
    manager = make(server.url, history=FORGETFUL)
    start = cursor_of(manager)
    for number in (1, 2, 3):
        add(server, number)
    wait_until_read(manager)
    assert process_of(manager).can_resume(asked_for(cursor=start))
    [(last, _)] = server.client.xrevrange("sse_batcher:stream", count=1)
    server.client.xdel("sse_batcher:stream", last)
    assert not process_of(manager).can_resume(asked_for(cursor=start))
    server.client.xadd("sse_batcher:stream", {"hello": "world"})  # it is read, and no client is sent a gap
    wait_until(lambda: manager.get_stats().ignored == 1, "it is read")
    assert not process_of(manager).can_resume(asked_for(cursor=start))


@external
def test_what_is_older_than_it_may_be_is_not_replayed_from_redis(server: RedisServer, make: Make) -> None:
    now = int(time.time() * 1000)
    old = add(server, 1, id=f"{now - 61_000}-0", timestamp=now)  # by the clock of Redis, not of the publisher
    for number in (2, 3):
        add(server, number, timestamp=now - 61_000)
    manager = make(server.url, history=HistoryOptions(history_bytes=1, history_age=60))
    epoch = cursor_of(manager).partition("-")[0]
    start = f"{epoch}-{now - 61_001}-0"
    wait_until_read(manager)
    assert not process_of(manager).can_resume(asked_for(cursor=start))
    with Viewer(manager, cursor=f"{epoch}-{old}") as viewer:
        assert viewer.numbers(3) == [2, 3]


@external
def test_while_redis_is_away_an_old_cursor_gets_sse_busy_and_an_open_stream_a_gap(
    server: RedisServer, make: Make
) -> None:
    manager = make(server.url, history=FORGETFUL)
    start = cursor_of(manager)
    send(manager, *range(200))
    assert manager.flush_all(TIMEOUT)
    wait_until_read(manager)
    began = manager.subscribe(last_event_id=start)
    next(began)
    server.kill()
    with pytest.raises(BackendError):
        manager.subscribe(last_event_id=start)
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": f"last_event_id={start}"}
    [busy] = parse(b"".join(stream(manager, environ)[2]), strict=True)
    assert (busy.type, busy.json, busy.id) == ("sse_busy", {"reason": "backend"}, start)
    assert flat(parse(next(began))) == ["overflow"]
