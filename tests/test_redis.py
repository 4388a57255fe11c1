"""Many processes, one Redis stream: its entries, and a real redis-server with its faults."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher import (
    SSE,
    BackendError,
    BacklogFullError,
    BatchOptions,
    ConfigurationError,
    HistoryOptions,
    SSEManager,
    stream,
)
from sse_batcher.backends import open_backend
from sse_batcher.backends.redis.backend import RedisBackend
from sse_batcher.backends.redis.entries import Entry, Kick, Unreadable, read_fields, to_fields
from sse_batcher.cli import serving
from sse_batcher.event import Batch, Event
from sse_batcher.manager import process_of
from sse_batcher.wire import HEARTBEAT

from .kit.redisserver import RedisServer, cursor_of, redis_server, sentinel_of
from .kit.servers import HOST
from .kit.sse_parser import EventStreamParser, ServerEvent, parse
from .kit.viewers import FORGETFUL, Make, Viewer, add, flat, managers, publishing, send, wait_until_read
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external

# -- entries -----------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=8).filter(
    lambda name: not name.startswith("sse_") and not name.endswith("_batch") and name not in {"mixed", "*"}
)
DATA = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5).map(json.dumps)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    channel = draw(st.just("*") | NAMES)
    mixed = draw(st.booleans())
    types = draw(st.lists(NAMES, min_size=1, max_size=5))
    types = types if mixed else [types[0]] * len(types)
    events = tuple(Event(event_type, channel, draw(DATA)) for event_type in types)
    return Batch(channel, "mixed" if mixed else types[0], events, "manual", draw(st.integers(0, 10**13)))


@given(batches(), st.integers(1, 10**12))
def test_a_batch_comes_out_as_it_went_in(batch: Batch, number: int) -> None:
    entry = Entry("0123456789abcdef", number, batch)
    assert read_fields(to_fields(entry)) == entry


@pytest.mark.parametrize("kick", [Kick("ada", None), Kick(7, "x"), Kick(None, "x")])
def test_a_kick_comes_out_as_it_went_in(kick: Kick) -> None:
    entry = Entry("0123456789abcdef", 0, kick)
    assert read_fields(to_fields(entry)) == entry


GOOD = to_fields(
    Entry("0123456789abcdef", 3, Batch("a", "t", (Event("t", "a", "1"), Event("t", "a", "2")), "manual", 5))
)
MIXED = GOOD | {b"t": b"mixed", b"types": b"t\nu"}
KICK = to_fields(Entry("0123456789abcdef", 0, Kick("ada", None)))


def without(name: bytes) -> dict[bytes, bytes]:
    return {other: value for other, value in GOOD.items() if other != name}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"hello": b"world"},
        without(b"p"),
        without(b"n"),
        GOOD | {b"p": b"x" * 16},
        GOOD | {b"p": b"\xff" * 16},
        GOOD | {b"n": b"-1"},
        GOOD | {b"n": b"9" * 30},
        GOOD | {b"n": b"0", b"v": b"2"},
        KICK | {b"kick": b"null"},
        KICK | {b"kick": b"[" * 100_000},
        KICK | {b"kick": b'{"user": null, "channel": null}'},
        KICK | {b"kick": b'{"user": ["a"], "channel": null}'},
        KICK | {b"kick": b'{"user": "ada", "channel": 7}'},
    ],
)
def test_an_entry_of_others_is_not_taken_for_one_of_ours(fields: dict[bytes, bytes]) -> None:
    assert read_fields(fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        *[without(name) for name in (b"v", b"c", b"t", b"e", b"r", b"ts")],
        GOOD | {b"v": b"2"},
        GOOD | {b"v": b"\xff"},
        GOOD | {b"more": b"\xff"},
        GOOD | {b"c": b""},
        GOOD | {b"c": b"a\nb"},
        GOOD | {b"c": b"\xff"},
        GOOD | {b"t": b"sse_bye"},
        GOOD | {b"t": b"x_batch"},
        GOOD | {b"t": b"t\ndata: forged"},
        GOOD | {b"e": b""},
        GOOD | {b"e": b"1\n"},
        GOOD | {b"e": b"[1,\r2]"},
        GOOD | {b"e": b"NaN"},
        GOOD | {b"e": '"ü"'.encode()},
        GOOD | {b"e": b"[" * 100_000},
        GOOD | {b"e": b"[" * 100_000 + b"1,]" + b"]" * 99_999},
        GOOD | {b"r": b'manual","x":"'},
        GOOD | {b"ts": b"now"},
        MIXED | {b"types": b"t"},
        MIXED | {b"types": b"t\nsse_gap"},
    ],
)
def test_a_batch_that_cannot_be_read_is_known_by_number_and_channel(fields: dict[bytes, bytes]) -> None:
    entry = read_fields(fields)
    assert entry is not None
    assert entry[:2] == ("0123456789abcdef", 3)
    assert isinstance(entry.content, Unreadable)
    assert entry.content.channel == ("a" if fields.get(b"c") == b"a" else "*")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,  # no version of Python reads this
        '{"a":' * 20_000 + '"\\u2028"' + "}" * 20_000,
        "1" * 10_000,
        "1e400",
    ],
)
def test_what_another_python_has_encoded_is_readable_here(text: str) -> None:
    content = read_fields(GOOD | {b"e": text.encode()})
    assert content is not None
    assert isinstance(content.content, Batch)
    assert content.content.events[0].json == text


# -- what may be given -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    ["http://localhost", "redis:", "", None, 7, "redis://localhost:port", "redis+sentinel://localhost:26379", "memory"]
    + [f"{scheme}://localhost/0?prefx=shop" for scheme in ("redis", "rediss", "redis+sentinel", "unix")],
)
def test_a_backend_that_cannot_be_meant_is_refused(backend: Any) -> None:
    with pytest.raises(ConfigurationError):
        SSEManager(backend=backend)


def test_a_message_does_not_tell_the_password() -> None:
    with pytest.raises(ConfigurationError) as caught:
        SSEManager(backend="redis://ada:secret@localhost:port/0")
    assert "secret" not in str(caught.value)


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'sse_batcher\[redis\]'"):
        SSEManager(backend="redis://localhost")


@pytest.mark.parametrize(
    "url",
    [
        "redis://ada:secret@localhost:6380/3",
        "rediss://localhost",
        "unix:///tmp/redis.sock",
        "redis+sentinel://:secret@one:26379,two/mymaster/2",
        "redis://localhost/0?prefix=shop",
    ],
)
def test_a_url_is_enough_and_nothing_is_connected_to_before_it_is_used(url: str) -> None:
    backend = open_backend(url, 100)
    assert isinstance(backend, RedisBackend)
    assert backend._keys.stream == ("shop:stream" if "shop" in url else "sse_batcher:stream")
    settings = backend._connect().connection_pool.connection_kwargs
    assert settings["socket_timeout"] == 5.0
    assert settings["decode_responses"] is False
    assert settings.get("password") == ("secret" if "secret" in url else None)


# -- one stream, many managers -----------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that has lost its data when it is started again."""
    with redis_server(tmp_path, saves=False) as server:
        yield server


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    with managers(monkeypatch) as make:
        yield make


@external
def test_an_event_of_one_process_reaches_the_clients_of_all(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two, Viewer(two, "other") as other:
        send(one, *range(10))
        assert one.flush_all(TIMEOUT)
        send(two, *range(10, 20))
        two.broadcast("hub_state", "end")
        for viewer in (at_one, at_two):
            assert flat(viewer.until_type("hub_state")) == [*range(20), "end"]
        assert flat(other.until_type("hub_state")) == ["end"]
    assert [event.id for event in at_one.events] == [event.id for event in at_two.events]  # one order, and one name


@external
def test_a_client_that_returns_to_another_process_has_missed_nothing(server: RedisServer, make: Make) -> None:
    one = make(server.url)
    with Viewer(one) as viewer:
        send(one, 1)
        viewer.numbers(1)
        cursor = viewer.events[-1].id
    send(one, 2, 3)
    assert one.flush_all(TIMEOUT)
    two = make(server.url)
    with Viewer(two, cursor=cursor) as viewer:
        assert viewer.events[0].type == "sse_open"
        assert viewer.numbers(3) == [2, 3]


@external
def test_a_cursor_that_is_newer_than_what_this_process_has_read_is_waited_for(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as viewer, Viewer(two):
        for number in range(50):
            send(one, number)
            viewer.numbers(number)
            with Viewer(two, cursor=viewer.events[-1].id) as other:
                assert other.events[0].type == "sse_open"


@external
@pytest.mark.parametrize(
    ("cursor", "reason"),
    [
        ("{epoch}-99999999999999-0", "malformed"),
        ("00000000-1-0", "epoch"),
        ("{epoch}-1", "malformed"),
        ("{epoch}-1-99999999999999999999", "malformed"),
        ("x" * 10_000, "malformed"),
    ],
)
def test_a_cursor_that_is_none_is_told(server: RedisServer, make: Make, cursor: str, reason: str) -> None:
    manager = make(server.url)
    epoch = cursor_of(manager).partition("-")[0]
    with Viewer(manager, cursor=cursor.format(epoch=epoch)) as viewer:
        assert flat(viewer.events[:1]) == [reason]


@external
def test_a_kick_reaches_every_process(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    client = two.subscribe(user="ada")
    next(client)
    with Viewer(two) as other:
        one.kick(user="ada")
        [bye] = [event for block in client if block != b":\n" for event in parse(block)]
        assert bye.json == {"reason": "kicked"}
        send(one, 1)
        other.numbers(1)
    with pytest.raises(ValueError, match="a user is a str or an int"):
        one.kick(user=("a", 1))


@external
def test_a_kick_counts_the_streams_of_this_process(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    streams = [manager.subscribe(user="ada") for manager in (one, one, two)]
    assert one.kick(user="ada") == 2
    for client in streams:
        assert b'"kicked"' in b"".join(client)


@external
def test_a_kick_of_another_process_counts_for_a_stream_that_opens(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    _, _, body = stream(two, {"REQUEST_METHOD": "GET"}, user="ada", snapshot=lambda: [("state", "secret")])
    before = two.ticket()
    one.kick(user="ada")
    wait_until(lambda: two.ticket() > before, "the kick has arrived")
    assert [event.type for event in parse(b"".join(body), strict=True)] == ["sse_open", "sse_bye"]


@external
def test_the_first_stream_of_a_process_is_not_ended_by_an_old_kick(server: RedisServer, make: Make) -> None:
    make(server.url).kick(user="ada")
    _, _, body = stream(make(server.url), {"REQUEST_METHOD": "GET"}, user="ada")
    blocks = iter(body)
    assert b"event: sse_bye" not in next(blocks)
    assert next(blocks) == b":\n"
    body.close()  # type: ignore[attr-defined]


@external
def test_a_kick_that_reaches_no_other_process_ends_the_streams_of_this_one(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    client = manager.subscribe(user="ada")
    server.config("maxmemory", 1)
    with pytest.raises(BackendError, match="did not take the kick"):
        manager.kick(user="ada")
    assert b'"kicked"' in b"".join(client)
    server.config("maxmemory", 0)


@external
def test_who_only_publishes_reads_nothing(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    send(manager, 1)
    assert manager.flush_all(TIMEOUT)
    assert "sse_batcher-redis" not in {thread.name for thread in threading.enumerate()}
    assert server.client.xlen("sse_batcher:stream") == 1


@external
def test_two_prefixes_are_two_worlds(server: RedisServer, make: Make) -> None:
    ours, theirs = make(server.url + "?prefix=ours"), make(server.url + "?prefix=theirs")
    with Viewer(ours) as viewer:
        send(theirs, 1)
        assert theirs.flush_all(TIMEOUT)
        send(ours, 2)
        assert viewer.numbers(2) == [2]


@external
def test_a_ready_client_is_taken_and_its_settings_made_ours(server: RedisServer, make: Make) -> None:
    import redis

    client = redis.Redis(host="127.0.0.1", port=server.port, decode_responses=True)
    manager = make(client)
    with Viewer(manager) as viewer:
        send(manager, 1)
        assert viewer.numbers(1) == [1]


@external
def test_a_password_and_tls_are_in_the_url(make: Make, tmp_path: Path) -> None:
    with redis_server(tmp_path, tls=True) as server:
        server.config("requirepass", "secret")
        manager = make(server.url.replace("//", "//:secret@"))
        with Viewer(manager) as viewer:
            send(manager, 1)
            assert viewer.numbers(1) == [1]


@external
def test_a_sentinel_says_where_redis_is(server: RedisServer, make: Make, tmp_path: Path) -> None:
    with sentinel_of(server, tmp_path) as port:
        manager = make(f"redis+sentinel://127.0.0.1:{port}/shop/0")
        with Viewer(manager) as viewer:
            send(manager, 1)
            assert viewer.numbers(1) == [1]


@external
def test_own_clients_get_what_is_pending_before_the_end(server: RedisServer, make: Make) -> None:
    manager = make(server.url, BatchOptions(batch_window=10))
    with Viewer(manager) as viewer:
        send(manager, 1, 2)
        assert manager.shutdown(TIMEOUT)
        assert flat(viewer.until_type("sse_bye")) == [1, 2, "shutdown"]


# -- faults ------------------------------------------------------------------------------------------------------------


@external
def test_redis_that_is_killed_and_comes_back_with_its_data_loses_nothing(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        for round_ in range(3):
            numbers = range(round_ * 100, round_ * 100 + 100)
            send(one, *numbers[:50])
            server.kill()
            send(one, *numbers[50:])
            server.start()
            for viewer in (at_one, at_two):
                assert viewer.numbers(numbers[-1]) == [*numbers]
    assert one.get_stats().gaps == two.get_stats().gaps == 0


@external
def test_redis_that_comes_back_without_its_data_is_told(forgetful: RedisServer, make: Make) -> None:
    manager = make(forgetful.url)
    with Viewer(manager) as viewer:
        send(manager, 1)
        assert viewer.numbers(1) == [1]
        old = viewer.events[-1].id
        forgetful.kill()
        forgetful.start()
        assert flat(viewer.until_type("sse_gap")) == ["epoch"]
        send(manager, 2)
        assert viewer.numbers(2) == [2]
        with Viewer(manager, cursor=old) as other:
            assert flat(other.events[:1]) == ["epoch"]


@external
def test_redis_that_is_flushed_is_told(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        send(manager, 1)
        viewer.numbers(1)
        server.client.flushall()
        assert flat(viewer.until_type("sse_gap")) == ["epoch"]
        send(manager, 2)
        assert viewer.numbers(2) == [2]


@external
def test_where_only_the_epoch_is_lost_nothing_comes_twice(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        send(manager, 1, 2)
        viewer.numbers(2)
        server.client.delete("sse_batcher:epoch")
        viewer.until_type("sse_gap")
        send(manager, 3)
        assert viewer.numbers(3) == [3]


@external
def test_redis_that_stops_for_a_while_holds_up_nobody_and_loses_nothing(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        server.signal(signal.SIGSTOP)
        began = time.monotonic()
        send(one, *range(100))
        assert time.monotonic() - began < 0.5
        assert not one.flush_all(1.5)  # longer than one call may take
        assert one.get_stats().backend_silent > 0.5
        server.signal(signal.SIGCONT)
        for viewer in (at_one, at_two):
            assert viewer.numbers(99) == [*range(100)]


@external
def test_connections_that_are_cut_again_and_again_lose_nothing_and_double_nothing(
    server: RedisServer, make: Make
) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        with publishing(one, 2_000):
            for _ in range(30):
                with suppress(Exception):
                    server.client.client_kill_filter(_type="normal", skipme=True)
        for viewer in (at_one, at_two):
            assert viewer.numbers(1_999) == [*range(2_000)]


@external
def test_redis_without_memory_takes_nothing_until_it_has_some_and_the_backlog_is_bounded(
    server: RedisServer, make: Make
) -> None:
    manager = make(server.url, BatchOptions(max_pending_bytes=20_000, batch_window=0.01))
    with Viewer(manager) as viewer:
        server.config("maxmemory", 1)
        accepted = 0
        with suppress(BacklogFullError):
            while True:
                send(manager, accepted)
                accepted += 1
        server.config("maxmemory", 0)
        assert viewer.numbers(accepted - 1) == [*range(accepted)]


@external
def test_what_was_trimmed_before_it_was_read_is_told(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        send(manager, 1)
        viewer.numbers(1)
        foreign = to_fields(
            Entry("fedcba9876543210", 1, Batch("default", "n", (Event("n", "default", "7"),), "manual", 0))
        )
        with server.client.pipeline(transaction=True) as at_once:
            at_once.xadd("sse_batcher:stream", foreign)
            at_once.xtrim("sse_batcher:stream", maxlen=0, approximate=False)
            at_once.execute()
        send(manager, 2)
        assert flat(viewer.until_type("sse_gap")) == ["overflow"]
        send(manager, 3)
        assert viewer.numbers(3)[-1] == 3


@external
def test_a_number_that_is_missing_is_told_and_one_that_comes_again_is_not_delivered(
    server: RedisServer, make: Make
) -> None:
    with Viewer(make(server.url)) as viewer:
        for number in (1, 2, 2, 1, 3):
            add(server, number)
        assert viewer.numbers(3) == [1, 2, 3]
        add(server, 5)
        assert flat(viewer.until_type("sse_gap")) == ["publish_failed"]
        add(server, 6)
        assert viewer.numbers(6)[-1] == 6


@external
def test_a_kick_that_fails_makes_no_gap(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        send(manager, 1)
        viewer.numbers(1)
        server.config("maxmemory", 1)
        with pytest.raises(BackendError, match="did not take the kick"):
            manager.kick(user="ada")
        server.config("maxmemory", 0)
        send(manager, 2)
        assert viewer.numbers(2) == [2]


@external
def test_entries_of_others_are_ignored_and_counted(
    server: RedisServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        for _ in range(3):
            server.client.xadd("sse_batcher:stream", {"hello": "world"})
        send(manager, 1)
        assert viewer.numbers(1) == [1]
    assert manager.get_stats().ignored == 3
    assert len([record for record in caplog.records if "was not written by sse_batcher" in record.getMessage()]) == 1


@external
def test_a_stream_that_cannot_know_where_it_begins_is_told_to_come_back(server: RedisServer, make: Make) -> None:
    server.kill()
    manager = make(server.url)
    with pytest.raises(BackendError):
        manager.subscribe()
    with pytest.raises(BackendError):
        manager.kick(user="ada")
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "last_event_id=00000000-1-0"}
    for snapshot in (None, lambda: [("state", 1)]):
        status, _, body = stream(manager, environ, snapshot=snapshot)
        [busy] = parse(b"".join(body), strict=True)
        assert (status, busy.type, busy.json, busy.id) == ("200 OK", "sse_busy", {"reason": "backend"}, "00000000-1-0")
    server.start()
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            with Viewer(manager) as viewer:
                send(manager, 1)
                assert viewer.numbers(1) == [1]
            return
        except BackendError:
            assert time.monotonic() < deadline


@external
def test_a_shutdown_stays_within_its_time_though_redis_is_away(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        server.kill()
        send(manager, 1)
        began = time.monotonic()
        assert not manager.shutdown(0.5)
        assert time.monotonic() - began < 2
        assert flat(viewer.until_type("sse_bye")) == ["shutdown"]


@external
def test_a_fresh_process_knows_of_a_quiet_channel_as_long_as_nothing_was_trimmed(
    server: RedisServer, make: Make
) -> None:
    one = make(server.url)
    start = cursor_of(one)
    send(one, *range(100), channel="busy")
    assert one.flush_all(TIMEOUT)
    with Viewer(make(server.url), "quiet", cursor=start) as viewer:
        assert viewer.events[0].type == "sse_open"


@external
def test_a_pause_of_redis_in_the_middle_of_a_burst_loses_nothing_and_doubles_nothing(
    server: RedisServer, make: Make
) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        with publishing(one, 2_000):
            at_two.until(lambda event: True)
            server.client.client_pause(1_500, all=True)  # longer than one call may take
        for viewer, had in ((at_one, 0), (at_two, len(flat(at_two.events[1:2])))):
            assert viewer.numbers(1_999) == [*range(had, 2_000)]
    assert one.get_stats().gaps == two.get_stats().gaps == 0


@external
def test_a_reader_that_waits_for_news_ends_at_once_and_without_a_word(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sse_batcher.backends.redis.connections.CALL_TIMEOUT_SECONDS", 30.0)
    monkeypatch.setattr("sse_batcher.backends.redis.reader.BLOCK_MS", 20_000)
    managers = [make(server.url) for _ in range(20)]
    for manager in managers:
        cursor_of(manager)
    wait_until(lambda: int(server.client.info()["blocked_clients"]) == 20, "all readers wait")
    began = time.monotonic()
    for manager in managers:
        assert manager.shutdown(5.0)
    assert time.monotonic() - began < 5
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


@external
def test_a_manager_that_was_shut_down_has_left_redis(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        send(manager, 1)
        assert viewer.numbers(1) == [1]
    assert len(server.client.client_list()) > 1
    assert manager.shutdown(TIMEOUT)
    wait_until(lambda: len(server.client.client_list()) == 1, "only the test's own connection is there")


# -- another master ----------------------------------------------------------------------------------------------------


@pytest.fixture
def replica(tmp_path: Path, server: RedisServer) -> Iterator[RedisServer]:
    folder = tmp_path / "replica"
    folder.mkdir()
    with redis_server(folder) as replica:
        replica.follow(server)
        yield replica


@pytest.fixture
def sentinel(tmp_path: Path, server: RedisServer, replica: RedisServer) -> Iterator[str]:
    """Its URL. It knows the replica."""
    import redis

    with sentinel_of(server, tmp_path) as port:
        client = redis.Redis(host=HOST, port=port, socket_timeout=TIMEOUT)
        wait_until(lambda: bool(client.sentinel_slaves("shop")), "the sentinel knows the replica")
        client.close()
        yield f"redis+sentinel://{HOST}:{port}/shop/0"


@external
def test_where_the_master_dies_all_goes_on_at_the_next_one(
    server: RedisServer, replica: RedisServer, sentinel: str, make: Make
) -> None:
    one, two = make(sentinel), make(sentinel)
    start = cursor_of(one)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        send(one, *range(100))
        for viewer in (at_one, at_two):
            assert viewer.numbers(99) == [*range(100)]
        replica.follow(server)
        server.kill()
        send(one, *range(100, 200))  # while there is no master
        assert one.flush_all(2 * TIMEOUT)
        for viewer in (at_one, at_two):
            assert viewer.numbers(199) == [*range(100, 200)]
    assert replica.client.role()[0] == b"master"
    assert one.get_stats().gaps == two.get_stats().gaps == 0
    with Viewer(make(sentinel), cursor=start) as viewer:
        assert viewer.numbers(199) == [*range(200)]


@external
def test_what_the_next_master_has_not_got_is_told(
    server: RedisServer, replica: RedisServer, sentinel: str, make: Make
) -> None:
    one, two = make(sentinel, BatchOptions(max_batch_size=1)), make(sentinel, history=FORGETFUL)
    start = cursor_of(one)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        send(one, *range(10))
        for viewer in (at_one, at_two):
            assert viewer.numbers(9) == [*range(10)]
        replicated = at_one.events[-1].id
        replica.follow(server)
        server.client.execute_command("ACL", "SETUSER", "default", "-psync", "-sync")
        server.client.execute_command("CLIENT", "KILL", "TYPE", "replica")
        send(one, *range(10, 20))
        for viewer in (at_one, at_two):  # what has come has come
            assert viewer.numbers(19) == [*range(10, 20)]
        unknown = at_one.events[-1].id
        server.kill()
        send(one, *range(20, 30))
        assert one.flush_all(2 * TIMEOUT)
        for viewer in (at_one, at_two):
            assert flat(viewer.until_type("sse_gap")) == ["epoch"]
        send(one, 30)
        for viewer in (at_one, at_two):
            numbers = viewer.numbers(30)
            assert numbers == [*range(31 - len(numbers), 31)]
    three = make(sentinel)
    for manager in (one, two, three):
        for cursor in (start, replicated, unknown):
            with Viewer(manager, cursor=cursor) as viewer:
                assert (manager, cursor, flat(viewer.events[:1])) == (manager, cursor, ["epoch"])


# -- older cursors than a process's own history ------------------------------------------------------------------------


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
    manager, other = make(server.url, history=FORGETFUL, transport="auto"), make(server.url)
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
    manager = make(server.url, history=FORGETFUL, transport="auto")
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
def test_what_redis_has_trimmed_meanwhile_is_told(server: RedisServer, make: Make) -> None:
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
    monkeypatch.setattr("sse_batcher.backends.redis.reader.MAX_DUPLICATES", 2)
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
    assert process_of(manager).can_resume(("default",), start)
    [(last, _)] = server.client.xrevrange("sse_batcher:stream", count=1)
    server.client.xdel("sse_batcher:stream", last)
    assert not process_of(manager).can_resume(("default",), start)
    server.client.xadd("sse_batcher:stream", {"hello": "world"})  # which is read, and tells nobody of a gap
    wait_until(lambda: manager.get_stats().ignored == 1, "it is read")
    assert not process_of(manager).can_resume(("default",), start)


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
    assert not process_of(manager).can_resume(("default",), start)
    with Viewer(manager, cursor=f"{epoch}-{old}") as viewer:
        assert viewer.numbers(3) == [2, 3]


@external
def test_where_redis_does_not_say_an_old_cursor_is_told_to_come_back_and_an_open_stream_of_a_gap(
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


# -- from the command line ---------------------------------------------------------------------------------------------


@external
def test_an_event_can_be_sent_from_the_command_line(server: RedisServer, make: Make) -> None:
    app = Flask("shop")
    app.config["SSE_BACKEND"] = server.url
    SSE(app)
    manager = make(server.url)
    with Viewer(manager, "default", "team") as viewer:
        for arguments in (
            ["order", '{"id": 1}'],
            ["order", "2", "--channel", "team"],
            ["order", '"all"', "--channel", "*"],
        ):
            result = app.test_cli_runner().invoke(args=["sse", "publish", *arguments])
            assert (result.exit_code, result.output) == (0, "")
            app = Flask("shop")  # each command is a process of its own
            app.config["SSE_BACKEND"] = server.url
            SSE(app)
        assert flat(viewer.until(lambda event: event.json == "all")) == [{"id": 1}, 2, "all"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["t", "{"], "A string needs its quotes"),
        (["sse_bye", "1"], "is reserved"),
        (["t", "1", "--channel", ""], "the channel must have 1 to 128 characters"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(arguments: list[str], said: str) -> None:
    app = Flask("shop")
    app.config["SSE_BACKEND"] = "redis://localhost:1"
    sse = SSE(app)
    result = app.test_cli_runner().invoke(args=["sse", "publish", *arguments])
    assert result.exit_code != 0
    assert said in result.output
    with app.app_context():
        assert sse.manager.shutdown()


def test_a_backend_that_was_set_too_late_is_told_on_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("shop")
    SSE(app)
    app.config["SSE_BACKEND"] = "redis://localhost:1"
    assert app.test_cli_runner().invoke(args=["sse", "publish", "t", "1"]).exit_code != 0
    assert "the config key SSE_BACKEND was set after SSE(app)" in caplog.text


def test_from_the_command_line_nobody_is_reached_without_a_backend_that_others_share() -> None:
    app = Flask("shop")
    SSE(app)
    result = app.test_cli_runner().invoke(args=["sse", "publish", "t", "1"])
    assert result.exit_code != 0
    assert 'set SSE_BACKEND to "redis://..."' in result.output
