"""Redis that fails, restarts, loses its data or hands over to another master: nothing is lost silently."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sse_batcher import (
    BackendError,
    BacklogFullError,
    BatchOptions,
    stream,
)
from sse_batcher.backends.redis.entries import Entry, to_fields
from sse_batcher.event import Batch, Event

from .kit.redisserver import RedisServer, cursor_of, fail_over, redis_fixture, redis_server, sentinel_of
from .kit.servers import HOST
from .kit.sse_parser import parse
from .kit.viewers import FORGETFUL, Make, Viewer, add, flat, managers_fixture, publishing, send
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external

CALL_TIMEOUT = "sse_batcher.backends.redis.connections.CALL_TIMEOUT_SECONDS"

server = redis_fixture()
forgetful = redis_fixture(saves=False)
"""A server that has lost its data when it is started again."""
make = managers_fixture()


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
def test_redis_that_comes_back_without_its_data_is_a_gap(forgetful: RedisServer, make: Make) -> None:
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
def test_redis_that_is_flushed_is_a_gap(server: RedisServer, make: Make) -> None:
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
def test_redis_that_stops_for_a_while_loses_nothing(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CALL_TIMEOUT, 1.0)
    one, two = make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        server.signal(signal.SIGSTOP)
        send(one, *range(100))
        assert not one.flush_all(1.5)  # longer than one call may take
        assert one.get_stats().backend_silent > 0.5
        server.signal(signal.SIGCONT)
        for viewer in (at_one, at_two):
            assert viewer.numbers(99) == [*range(100)]


@external
def test_redis_that_stops_holds_up_nothing_that_sends(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CALL_TIMEOUT, 20.0)
    manager = make(server.url)
    with Viewer(manager) as viewer:
        server.signal(signal.SIGSTOP)
        began = time.monotonic()
        for number in range(100):
            send(manager, number)
            assert time.monotonic() - began < 10
        server.signal(signal.SIGCONT)
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
def test_what_was_trimmed_before_it_was_read_is_a_gap(server: RedisServer, make: Make) -> None:
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
def test_a_missing_number_is_a_gap_and_one_that_comes_again_is_not_delivered(server: RedisServer, make: Make) -> None:
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
def test_a_stream_whose_start_is_not_known_gets_sse_busy(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_batcher.backends.redis.backend.OPEN_SECONDS", 0.1)
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
    def shutdown_takes() -> float:
        manager = make(server.url)
        with Viewer(manager) as viewer:
            server.kill()
            send(manager, 1)
            began = time.monotonic()
            assert not manager.shutdown(0.5)
            took = time.monotonic() - began
            assert flat(viewer.until_type("sse_bye")) == ["shutdown"]
        server.start()
        return took

    assert any(shutdown_takes() < 2 for _ in range(4))  # the machine may stand still in some of them


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
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CALL_TIMEOUT, 1.0)
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
    monkeypatch.setattr(CALL_TIMEOUT, 120.0)
    monkeypatch.setattr("sse_batcher.backends.redis.reader.BLOCK_MS", 100_000)
    managers = [make(server.url) for _ in range(20)]
    for manager in managers:
        cursor_of(manager)
    wait_until(lambda: int(server.client.info()["blocked_clients"]) == 20, "all readers wait")
    began = time.monotonic()
    for manager in managers:
        assert manager.shutdown(TIMEOUT)
    assert time.monotonic() - began < TIMEOUT
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
        fail_over(sentinel)
        assert one.flush_all(2 * TIMEOUT)
        for viewer in (at_one, at_two):
            assert viewer.numbers(199) == [*range(100, 200)]
    assert replica.client.role()[0] == b"master"
    assert one.get_stats().gaps == two.get_stats().gaps == 0
    with Viewer(make(sentinel), cursor=start) as viewer:
        assert viewer.numbers(199) == [*range(200)]


@external
def test_what_the_next_master_lacks_is_a_gap(
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
        fail_over(sentinel)
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
