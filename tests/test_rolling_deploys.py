"""Rolling deploys: processes of this version and of the one before texts and users, with one Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sse_batcher import BatchOptions, SSEManager, Text

from .kit.older import OlderProcess, older_version
from .kit.redisserver import RedisServer, cursor_of, redis_fixture
from .kit.sse_parser import ServerEvent
from .kit.viewers import FORGETFUL, STREAM, Make, Viewer, flat, managers_fixture, wait_until_read
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

server = redis_fixture()
make = managers_fixture()


@pytest.fixture(autouse=True)
def _patient(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call to Redis fails here, so none is given up because the machine stands still."""
    monkeypatch.setattr("sse_batcher.backends.redis.connections.CALL_TIMEOUT_SECONDS", TIMEOUT)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return older_version(tmp_path_factory.mktemp("older"))


@pytest.fixture
def old(older: Path, server: RedisServer) -> Iterator[OlderProcess]:
    with OlderProcess(older, server.url) as process:
        yield process


def versions(server: RedisServer) -> list[bytes]:
    return [fields[b"v"] for _, fields in server.client.xrange(STREAM) if b"e" in fields]


def send(manager: SSEManager, *calls: tuple[Any, dict[str, Any]]) -> None:
    """Send events, each in a batch of its own."""
    for data, more in calls:
        manager.enqueue("n", data, **more)
        assert manager.flush_all(TIMEOUT)


def is_gap(event: ServerEvent) -> bool:
    return event.type == "sse_gap"


def reasons(events: list[ServerEvent]) -> list[str]:
    return [event.json["reason"] for event in events if is_gap(event)]


# -- a newer process reads what an older one sends ---------------------------------------------------------------------


def test_a_newer_process_reads_all_batches_and_kicks_of_an_older_one(
    server: RedisServer, make: Make, old: OlderProcess
) -> None:
    manager = make(server.url)
    with Viewer(manager) as viewer, Viewer(manager, "a") as other:
        kicked = manager.subscribe(user="ada")
        for number in range(3):
            old.call("enqueue", "n", number)
        assert old.call("flush_all", TIMEOUT)
        old.call("enqueue", "n", {"é": "\u2028😀"})
        old.call("broadcast", "message", "<b>")
        assert old.call("flush_all", TIMEOUT)
        old.call("kick", user="ada")
        old.call("enqueue", "n", "end", channel="a")
        assert flat(viewer.until(lambda event: event.json == "<b>")) == [0, 1, 2, {"é": "\u2028😀"}, "<b>"]
        assert flat(other.until(lambda event: event.json == "end")) == ["<b>", "end"]
        assert b'"kicked"' in b"".join(kicked)
    assert (manager.get_stats().ignored, manager.get_stats().gaps) == (0, 0)


def test_a_newer_process_reads_mixed_batches_of_an_older_one(server: RedisServer, make: Make, older: Path) -> None:
    manager = make(server.url)
    with OlderProcess(older, server.url, mixed=True, batch_window=10) as old, Viewer(manager) as viewer:
        old.call("enqueue", "a", 1)
        old.call("enqueue", "b", "x")
        assert old.call("flush_all", TIMEOUT)
        assert flat(viewer.until_type("mixed_batch")) == [{"type": "a", "data": 1}, {"type": "b", "data": "x"}]


def test_a_client_of_an_older_process_goes_on_at_a_newer_one(
    server: RedisServer, make: Make, old: OlderProcess
) -> None:
    opened = old.open("viewer")
    old.call("enqueue", "n", 1)
    (first,) = old.until_data("viewer", 1)
    manager = make(server.url)
    send(manager, (Text("<b>2</b>"), {}), (3, {}), (Text("4"), {"user": 7}))
    with Viewer(manager, cursor=first.id) as viewer:
        assert viewer.events[0].type == "sse_open"
        texts = [event.data for event in viewer.until(lambda event: event.data == "3")]
        assert texts == ["<b>2</b>", "3"]
    with Viewer(make(server.url, history=FORGETFUL), cursor=opened.id) as viewer:
        assert viewer.events[0].type == "sse_open"
        texts = [event.data for event in viewer.until(lambda event: event.data == "3")]
        assert texts == ["1", "<b>2</b>", "3"]


# -- an older process reads what a newer one sends ---------------------------------------------------------------------


def test_an_older_process_reads_all_json_to_channels(server: RedisServer, make: Make, old: OlderProcess) -> None:
    old.open("viewer")
    old.open("kicked", user="ada")
    manager = make(server.url)
    for number in range(3):
        manager.enqueue("n", number, key=number)
    assert manager.flush_all(TIMEOUT)
    manager.broadcast("message", {"é": "\u2028😀"})
    assert manager.flush_all(TIMEOUT)
    manager.kick(user="ada")
    got = old.until_data("viewer", {"é": "\u2028😀"})
    assert flat(got) == [0, 1, 2, {"é": "\u2028😀"}]
    assert old.until("kicked", lambda event: event.type == "sse_bye")[-1].json == {"reason": "kicked"}
    assert set(versions(server)) == {b"1"}
    assert old.call("ignored") == 0


def test_an_older_process_tells_the_clients_of_the_channel_that_they_miss_a_text(
    server: RedisServer, make: Make, old: OlderProcess
) -> None:
    for channel in ("a", "b"):
        old.open(channel, channel)
    manager = make(server.url)
    send(manager, (1, {"channel": "a"}))
    assert flat(old.until_data("a", 1)) == [1]  # before the next one: a gap may cover what still waits in the queue
    send(manager, (Text("2"), {"channel": "a"}), (3, {"channel": "b"}))
    assert flat(old.until("a", is_gap)) == ["publish_failed"]
    assert flat(old.until_data("b", 3)) == [3]
    send(manager, (4, {"channel": "a"}))  # after a gap, a client goes on with what comes
    assert flat(old.until_data("a", 4)) == [4]
    assert versions(server) == [b"1", b"2", b"1", b"1"]
    manager.broadcast("n", Text("5"))
    for channel in ("a", "b"):
        assert flat(old.until(channel, is_gap)) == ["publish_failed"]
    assert old.call("ignored") == 2


def test_an_older_process_tells_all_clients_that_they_may_miss_an_event_for_users(
    server: RedisServer, make: Make, old: OlderProcess
) -> None:
    # It does not know what users are in an entry, so that it is more than those that the event was for.
    for name, user in (("ada", "ada"), ("bob", "bob"), ("none", None)):
        old.open(name, user=user)
    manager = make(server.url)
    send(manager, (1, {}))
    for name in ("ada", "bob", "none"):
        assert flat(old.until_data(name, 1)) == [1]  # before the next one, as above
    send(manager, ("secret", {"user": "ada"}))
    for name in ("ada", "bob", "none"):
        assert flat(old.until(name, is_gap)) == ["publish_failed"]
    send(manager, (2, {}))
    for name in ("ada", "bob", "none"):
        assert flat(old.until_data(name, 2)) == [2]


@pytest.mark.parametrize(("data", "more"), [(Text("text"), {}), ("for a user", {"user": 7})], ids=["text", "user"])
def test_an_older_process_tells_of_what_it_misses_once_a_second_at_most(
    server: RedisServer, make: Make, old: OlderProcess, data: Any, more: dict[str, Any]
) -> None:
    old.open("viewer")
    manager = make(server.url, BatchOptions(batch_window=0))
    start = time.monotonic()
    sent = 0
    got: list[ServerEvent] = []
    while sent <= 20 or len(reasons(got)) < 2 or time.monotonic() < start + 2.5:
        assert time.monotonic() < start + TIMEOUT, "it does not tell it again"
        send(manager, (data, more), (sent, {}))
        sent += 1
        got += old.so_far("viewer")
    wait_until(lambda: old.call("ignored") == sent, "it has read all of them")
    seconds = time.monotonic() - start
    got += old.so_far("viewer")
    assert len(reasons(got)) <= seconds + 1
    assert set(reasons(got)) == {"publish_failed"}
    # What it can read goes on in between, in order and once.
    numbers = [event.json for event in got if event.type == "n"]
    assert numbers == sorted(set(numbers))
    assert len(numbers) > sent / 2


def test_a_client_of_a_newer_process_that_comes_to_an_older_one_gets_a_gap_for_what_it_misses(
    server: RedisServer, make: Make, older: Path
) -> None:
    manager = make(server.url)
    start = cursor_of(manager)
    send(manager, (1, {"channel": "a"}), (Text("2"), {"channel": "a"}), (3, {"channel": "b"}))
    wait_until_read(manager)  # the cursor is at what was read, not at what was sent
    after = manager.cursor()
    send(manager, (4, {"channel": "a"}))
    wait_until_read(manager)
    # As after a rollback: it finds all of this in Redis when it starts.
    with OlderProcess(older, server.url) as old:
        assert old.open("a", "a", cursor=start).json["reason"] == "too_old"
        assert old.open("b", "b", cursor=start).type == "sse_open"
        assert [event.json for event in old.until_data("b", 3)] == [3]
        assert old.open("later", "a", cursor=after).type == "sse_open"
        assert [event.json for event in old.until_data("later", 4)] == [4]
        send(manager, (5, {"channel": "a"}))
        assert flat(old.until_data("a", 5)) == [5]


def test_the_entries_in_redis_are_what_both_versions_agree_on(server: RedisServer, make: Make, older: Path) -> None:
    # Both have a long window, so that the flush is what closes it.
    manager = make(server.url, batching=BatchOptions(batch_window=10))
    cursor_of(manager)
    with OlderProcess(older, server.url, batch_window=10) as old:
        old.call("enqueue", "n", {"a": "é"}, channel="old")
        assert old.call("flush_all", TIMEOUT)
    manager.enqueue("n", {"a": "é"}, channel="new")
    assert manager.flush_all(TIMEOUT)
    entries = {
        fields[b"c"]: {name: value for name, value in fields.items() if name not in {b"c", b"p", b"ts"}}
        for _, fields in server.client.xrange(STREAM)
        if b"e" in fields
    }
    assert entries[b"old"] == entries[b"new"]
    assert json.loads(entries[b"new"][b"e"]) == {"a": "é"}
