"""The stream in Redis becomes another one, or its ids go back: clients get a gap at once, and lose nothing silently."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from sse_batcher import HistoryOptions, SSEManager
from sse_batcher.backends.redis.backend import RedisBackend
from sse_batcher.backends.redis.entries import Entry, Kick, to_fields
from sse_batcher.backends.redis.state import State
from sse_batcher.manager_state import process_of

from .kit.redisserver import RedisServer, cursor_of, fail_over, redis_fixture, redis_server, sentinel_of
from .kit.servers import HOST
from .kit.viewers import (
    EPOCH,
    STREAM,
    Make,
    Viewer,
    add,
    flat,
    managers_fixture,
    send,
    wait_until_read,
)
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external

LARGEST = f"{2**64 - 1}-{2**64 - 1}"
MINUTE = 60_000
DAY = 24 * 60 * MINUTE


server = redis_fixture()


make = managers_fixture()


def in_ms(milliseconds: int) -> str:
    """An id of that time from now."""
    return f"{int(time.time() * 1000) + milliseconds}-0"


def now(manager: SSEManager) -> float:
    """The time of Redis, as far as this manager knows it, in milliseconds."""
    backend = process_of(manager).backend
    assert isinstance(backend, RedisBackend)
    return backend.now()


def names_of(events: list[Any]) -> list[str]:
    return [event.type for event in events]


def assert_nothing_missed_silently(values: list[Any]) -> None:
    """Numbers rise by one, unless a gap says that some may be missing. Reasons are between them."""
    last = None
    for value in values:
        if isinstance(value, str):
            last = None
            continue
        assert last is None or value == last + 1, f"{value} after {last}, and no gap: {values}"
        last = value


def begin_again(server: RedisServer, id: str = "*") -> None:
    """Replace the stream by one of a single entry, at once: a reader that met an empty stream would say `overflow`."""
    with server.client.pipeline(transaction=True) as at_once:
        at_once.delete(STREAM)
        at_once.xadd(STREAM, {"hello": "world"}, id=id)
        at_once.execute()


def kick(user: str) -> Entry:
    return Entry("0123456789abcdef", 0, Kick(user, None))


def kick_of(server: RedisServer, user: str) -> bytes:
    """Another process kicks this user: the id of the entry."""
    id: bytes = server.client.xadd(STREAM, to_fields(kick(user)))
    return id


# -- ids below what was read -------------------------------------------------------------------------------------------


@external
def test_ids_that_go_back_are_a_gap_at_once_and_nothing_is_lost(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        add(server, 1, id=in_ms(10 * MINUTE))  # as if the clock was right until now, and is set back
        for viewer in (at_one, at_two):
            assert viewer.numbers(1) == [1]
        old = at_one.events[-1].id
        begin_again(server)
        send(one, 10)
        for viewer in (at_one, at_two):
            assert flat(viewer.until_type("sse_gap")) == ["epoch"]
        send(one, *range(11, 20))
        for viewer in (at_one, at_two):
            values = viewer.numbers(19)
            assert values[-9:] == [*range(11, 20)]
        for manager in (one, two, make(server.url)):
            with Viewer(manager, cursor=old) as viewer:
                assert flat(viewer.events[:1]) == ["epoch"]
    assert at_one.events[-1].id == at_two.events[-1].id  # all processes agree on one new name
    assert one.get_stats().gaps <= 3


@external
def test_another_entry_with_the_id_of_the_one_read_last_is_another_line(server: RedisServer, make: Make) -> None:
    """As after a failover to a clock that is as far behind as the failover took."""
    manager = make(server.url)
    with Viewer(manager) as viewer:
        id = add(server, 1)
        viewer.numbers(1)
        begin_again(server, id)
        assert flat(viewer.until_type("sse_gap")) == ["epoch"]


@external
def test_what_was_published_is_waited_for_no_longer_than_it_takes(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_batcher.backends.redis.connections.CALL_TIMEOUT_SECONDS", 60.0)
    monkeypatch.setattr("sse_batcher.backends.redis.reader.BLOCK_MS", 50_000)
    manager = make(server.url)
    cursor_of(manager)
    send(manager, 1)
    assert manager.flush_all(TIMEOUT)
    assert process_of(manager).backend.wait_until_delivered(TIMEOUT)


@external
def test_a_gap_is_sent_though_nothing_comes_after_it(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        add(server, 1)
        viewer.numbers(1)
        server.client.delete(STREAM)
        assert flat(viewer.until_type("sse_gap")) == ["overflow"]


@external
def test_what_was_published_below_what_was_read_is_waited_for(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    backend = process_of(manager).backend
    with Viewer(manager) as viewer:
        add(server, 1, id=in_ms(10 * MINUTE))
        viewer.numbers(1)
        server.client.delete(STREAM)
        send(manager, 2)
        assert manager.flush_all(TIMEOUT)
        assert backend.wait_until_delivered(TIMEOUT)
        assert manager.get_stats().history_frames == 2  # the hub has it, and not only Redis
        viewer.until_type("sse_gap")


@external
def test_own_batches_that_were_trimmed_unread_are_not_waited_for(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    send(manager, 1)
    assert manager.flush_all(TIMEOUT)
    server.client.xtrim(STREAM, maxlen=0, approximate=False)
    cursor_of(manager)  # reads from now on
    assert process_of(manager).backend.wait_until_delivered(TIMEOUT)


@external
def test_a_kick_below_what_was_read_is_not_lost(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    client = two.subscribe(user="ada")
    next(client)
    with Viewer(two) as viewer:
        add(server, 1, id=in_ms(10 * MINUTE))
        viewer.numbers(1)
        server.client.delete(STREAM)
        one.kick(user="ada")
        viewer.until_type("sse_gap")
        assert b"kicked" in b"".join(client)


@external
@pytest.mark.parametrize("change", ["the name of the epoch is lost", "an older replica takes over"])
def test_a_kick_that_is_read_again_does_not_end_new_streams(server: RedisServer, make: Make, change: str) -> None:
    manager = make(server.url)
    kicked = manager.subscribe(user="ada")
    next(kicked)
    kick_of(server, "ada")
    assert b"kicked" in b"".join(kicked)
    ada = manager.subscribe(user="ada")  # has logged in again
    next(ada)
    with Viewer(manager) as viewer:
        id = add(server, 1)
        viewer.numbers(1)
        if change == "the name of the epoch is lost":
            server.client.delete(EPOCH)
        else:
            server.client.xdel(STREAM, id)  # of what was read, it has only the older entries
        viewer.until_type("sse_gap")
        assert b"sse_gap" in next(ada)
        add(server, 2)
        while b"data: 2" not in next(ada):
            pass
        kick_of(server, "ada")
        assert b"kicked" in b"".join(ada)


@external
def test_another_kick_with_the_same_id_is_not_lost(server: RedisServer, make: Make) -> None:
    """As after a failover to a clock that is behind."""
    manager = make(server.url)
    ada, bob = manager.subscribe(user="ada"), manager.subscribe(user="bob")
    next(ada)
    next(bob)
    id = kick_of(server, "ada")
    assert b"kicked" in b"".join(ada)
    with server.client.pipeline(transaction=True) as at_once:
        at_once.delete(STREAM)
        at_once.xadd(STREAM, to_fields(kick("bob")), id=id)
        at_once.execute()
    assert b"kicked" in b"".join(bob)


@external
def test_an_entry_with_the_largest_id_does_not_stop_the_site(
    server: RedisServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, three = make(server.url), make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two:
        send(one, 1)
        for viewer in (at_one, at_two):
            viewer.numbers(1)
        old = at_one.events[-1].id
        server.client.xadd(STREAM, {"hello": "world"}, id=LARGEST)
        wait_until(lambda: two.get_stats().ignored == 1, "it is read")
        for number, manager in enumerate((one, two, three), 2):  # each of them finds that it can add nothing
            send(manager, number)
        for manager in (one, two, three):
            assert manager.flush_all(TIMEOUT)
        for viewer in (at_one, at_two):
            viewer.until_type("sse_gap")
        send(one, 5)
        for viewer in (at_one, at_two):
            viewer.numbers(5)
            assert_nothing_missed_silently(flat(viewer.events))
            assert {"epoch", 5} <= set(flat(viewer.events))
        with Viewer(one, cursor=old) as viewer:
            assert flat(viewer.events[:1]) == ["epoch"]
    assert len([record for record in caplog.records if "was deleted and begun again" in record.getMessage()]) == 1


@external
def test_the_largest_id_that_was_deleted_again_does_not_stop_it_either(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        server.client.xadd(STREAM, {"hello": "world"}, id=LARGEST)
        wait_until(lambda: manager.get_stats().ignored == 1, "it is read")
        server.client.xdel(STREAM, LARGEST)
        send(manager, 1)
        assert flat(viewer.until_type("sse_gap")) == ["epoch"]
        send(manager, 2)
        assert viewer.numbers(2)[-1] == 2


@external
def test_ids_of_twenty_digits_have_cursors(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        server.client.xadd(STREAM, {"hello": "world"}, id=f"{2**64 - 1}-5")
        send(manager, 1)
        viewer.numbers(1)
        cursor = viewer.events[-1].id
        send(manager, 2)
        viewer.numbers(2)
    with Viewer(manager, cursor=cursor) as viewer:
        assert viewer.numbers(2) == [2]


@external
def test_a_stream_with_more_publishers_than_are_remembered_is_not_delivered_again(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each event came from a process of its own. Only those that were forgotten come again."""
    monkeypatch.setattr("sse_batcher.backends.redis.reader.MAX_PUBLISHERS", 3)
    manager = make(server.url)
    with Viewer(manager) as viewer:
        for number in range(1, 5):
            add(server, 1, number, publisher=f"{number:016}")
        viewer.numbers(4)
        assert manager.get_stats().history_frames == 4
        server.client.delete(EPOCH)
        viewer.until_type("sse_gap")
        wait_until_read(manager)
        assert manager.get_stats().history_frames == 4 + 2  # the first one again, and what was waited for


# -- clocks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unsteady(tmp_path: Path) -> Iterator[RedisServer]:
    """A server whose clock can be set."""
    with redis_server(tmp_path, clock="+0") as server:
        yield server


@external
def test_a_clock_that_is_set_back_with_a_deleted_stream_is_a_gap(
    unsteady: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A call that waits for news when the clock is set back would wait for a day.
    monkeypatch.setattr("sse_batcher.backends.redis.connections.CALL_TIMEOUT_SECONDS", 1.0)
    manager = make(unsteady.url)
    with Viewer(manager) as viewer:
        unsteady.set_clock("+1d")
        send(manager, 1)
        viewer.numbers(1)
        unsteady.set_clock("+0")
        unsteady.client.delete(STREAM)
        send(manager, 2, 3)
        assert flat(viewer.until_type("sse_gap"))[-1] == "epoch"
        send(manager, 4)
        viewer.numbers(4)
        assert_nothing_missed_silently(flat(viewer.events))


@external
def test_a_clock_that_jumps_a_day_ahead_and_back_is_not_noticed(unsteady: RedisServer, make: Make) -> None:
    manager = make(unsteady.url)
    start = cursor_of(manager)
    with Viewer(manager) as viewer:
        for number, clock in enumerate(["+0", "+1d", "-1d", "+2d", "+0"]):
            unsteady.set_clock(clock)
            send(manager, number)
            assert viewer.numbers(number) == [number]
    with Viewer(manager, cursor=start) as viewer:
        assert viewer.numbers(4) == [*range(5)]
    assert manager.get_stats().gaps == 0


@external
@pytest.mark.parametrize("clock", ["+1d", "-1d"])
def test_the_age_of_a_frame_goes_by_the_clock_of_redis(tmp_path: Path, make: Make, clock: str) -> None:
    with redis_server(tmp_path, clock=clock) as server:
        manager = make(server.url, history=HistoryOptions(history_age=60))
        start = cursor_of(manager)
        with Viewer(manager) as viewer:
            send(manager, 1)
            viewer.numbers(1)
        assert 0 <= manager.get_stats().history_age < 60
        with Viewer(manager, cursor=start) as viewer:
            assert viewer.numbers(1) == [1]
        server.client.xadd(STREAM, {"hello": "world"}, id=in_ms(2 * DAY))
        wait_until(lambda: now(manager) > time.time() * 1000 + 2 * DAY - MINUTE, "it knows that time")
        with Viewer(manager, cursor=start) as viewer:
            assert flat(viewer.events[:1]) == ["too_old"]


@external
def test_frames_do_not_age_at_once_after_the_clock_was_set_back(unsteady: RedisServer, make: Make) -> None:
    """Until the clock has reached the time of the newest entry again, all ids have that time: here, for a day."""
    unsteady.set_clock("+1d")
    cursor_of(make(unsteady.url))  # begins the stream, with an entry of that time
    unsteady.set_clock("+1.002d")  # three minutes later
    manager = make(unsteady.url, history=HistoryOptions(history_age=60))
    with Viewer(manager) as viewer:
        assert now(manager) > time.time() * 1000 + DAY + 2 * MINUTE
        unsteady.set_clock("+0")
        send(manager, 1, 2)
        viewer.numbers(2)
        cursor = viewer.events[-1].id
        send(manager, 3)
        viewer.numbers(3)
    with Viewer(manager, cursor=cursor) as viewer:
        assert viewer.numbers(3) == [3]


def test_the_time_of_redis_is_at_least_that_of_its_newest_entry() -> None:
    state = State()
    state.set_clock(1_000_500_000)
    state.begin_ids()
    assert 1_000_500 <= state.now() < 1_060_000
    state.see_time(900_000)
    assert state.now() < 1_060_000
    state.see_time(9_000_000)
    assert 9_000_000 <= state.now() < 9_060_000
    assert 1_000_500 <= state.redis_time() < 1_060_000


# -- another master ----------------------------------------------------------------------------------------------------


@external
@pytest.mark.parametrize("clock", ["-1h", "-1s", "+0"])
def test_a_failover_under_load_to_a_clock_that_is_behind_is_a_gap(tmp_path: Path, make: Make, clock: str) -> None:
    """The next master lacks the newest entries, and gives out ids that clients may have already."""
    with (
        redis_server(tmp_path / "master", clock="+0") as master,
        redis_server(tmp_path / "replica", clock=clock) as replica,
    ):
        replica.follow(master)
        with sentinel_of(master, tmp_path) as port:
            client = redis.Redis(host=HOST, port=port, socket_timeout=TIMEOUT)
            wait_until(lambda: bool(client.sentinel_slaves("shop")), "the sentinel knows the replica")
            client.close()
            url = f"redis+sentinel://{HOST}:{port}/shop/0"
            one, two = make(url), make(url)
            sent, stop = 0, threading.Event()

            def load() -> None:
                nonlocal sent
                while not stop.wait(0.002):
                    send(one, sent)
                    sent += 1

            with Viewer(one) as at_one, Viewer(two) as at_two:
                thread = threading.Thread(target=load)
                thread.start()
                try:
                    at_two.numbers(50)
                    master.client.execute_command("ACL", "SETUSER", "default", "-psync", "-sync")
                    master.client.execute_command("CLIENT", "KILL", "TYPE", "replica")
                    at_two.numbers(sent + 50)  # which the replica has not got
                    cursor = at_two.events[-1].id
                    master.kill()
                    fail_over(url)
                    for viewer in (at_one, at_two):
                        viewer.until_type("sse_gap")
                finally:
                    stop.set()
                    thread.join(TIMEOUT)
                assert one.flush_all(2 * TIMEOUT)
                send(one, sent)
                for viewer in (at_one, at_two):
                    viewer.numbers(sent)
                    assert_nothing_missed_silently(flat(viewer.events[1:]))
            for manager in (one, two, make(url)):
                with Viewer(manager, cursor=cursor) as viewer:
                    assert flat(viewer.events[:1]) == ["epoch"]


# -- where a batch is, is where every process has it -------------------------------------------------------------------


@external
def test_what_was_had_before_the_line_broke_is_not_silently_missed_by_others(server: RedisServer, make: Make) -> None:
    """A process that has read on skips what it had. A client of one that has not must not miss it there."""
    old = make(server.url)
    with Viewer(old) as viewer:
        ids = [add(server, number) for number in (1, 2, 3)]
        viewer.numbers(3)
        server.client.delete(EPOCH)
        viewer.until_type("sse_gap")
        new = make(server.url)
        epoch = cursor_of(new).partition("-")[0]
        with Viewer(new, cursor=f"{epoch}-{ids[0]}") as other:
            assert other.numbers(3) == [2, 3]
        with Viewer(old, cursor=f"{epoch}-{ids[0]}") as other:
            assert flat(other.events[:1]) == ["too_old"]
        add(server, 4)
        assert viewer.numbers(4) == [4]


@external
def test_a_batch_that_comes_again_on_another_line_is_not_silently_missed(server: RedisServer, make: Make) -> None:
    """It was read, then lost by a failover before its publisher had an answer, and added again behind others."""
    manager = make(server.url)
    with Viewer(manager) as viewer:
        add(server, 1)
        add(server, 2)
        viewer.numbers(2)
        server.client.xtrim(STREAM, maxlen=0, approximate=False)  # it is gone
        viewer.until_type("sse_gap")
        between = add(server, 1, 10, publisher="0123456789abcdef")
        viewer.numbers(10)
        add(server, 2)
        viewer.until_type("sse_gap")
    epoch = manager.cursor().partition("-")[0]
    with Viewer(manager, cursor=f"{epoch}-{between}") as viewer:
        assert flat(viewer.events[:1]) == ["too_old"]


@external
def test_an_epoch_that_comes_back_gets_another_name(server: RedisServer, make: Make) -> None:
    """As where a replica that has missed the change becomes the master."""
    manager = make(server.url)
    with Viewer(manager) as viewer:
        add(server, 1)
        viewer.numbers(1)
        old = viewer.events[-1].id
        name = server.client.get(EPOCH)
        server.client.set(EPOCH, "12345678")
        viewer.until_type("sse_gap")
        server.client.set(EPOCH, name)
        viewer.until_type("sse_gap")
        add(server, 2)
        viewer.numbers(2)
        with Viewer(manager, cursor=old) as other:
            assert flat(other.events[:1]) == ["epoch"]


@external
def test_a_place_between_two_entries_has_a_cursor(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        add(server, 1)
        viewer.numbers(1)
        server.client.xtrim(STREAM, maxlen=0, approximate=False)
        [gap] = viewer.until_type("sse_gap")
        assert gap.id == viewer.events[1].id + "-1"
    with Viewer(manager, cursor=gap.id) as viewer:
        assert names_of(viewer.events[:1]) == ["sse_open"]
        add(server, 2)
        assert viewer.numbers(2) == [2]


@external
def test_a_place_between_two_entries_is_one_for_other_processes_too(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer:
        add(server, 1)
        viewer.numbers(1)
        server.client.delete(EPOCH)
        [gap] = viewer.until_type("sse_gap")
        assert gap.id.endswith("-1")
    with Viewer(make(server.url), cursor=gap.id) as viewer:
        assert names_of(viewer.events[:1]) == ["sse_open"]
        add(server, 2)
        assert viewer.numbers(2) == [2]
