"""A manager without a web framework: enqueue, subscribe, shutdown, and its statistics."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest

from sse_batcher import BatchOptions, ClosedError, InvalidEventError, SSEManager
from sse_batcher.reasons import EndReason, RefusalReason

from .kit.delivery import drive, take
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT


@pytest.fixture
def make() -> Iterator[Callable[..., SSEManager]]:
    """Makes managers, and shuts them down in the end."""
    managers: list[SSEManager] = []

    def make_one(**options: Any) -> SSEManager:
        managers.append(SSEManager(**options))
        return managers[-1]

    yield make_one
    for manager in managers:
        manager.shutdown()


Make = Callable[..., SSEManager]


def test_a_burst_arrives_as_batches_and_without_batching_as_events(make: Make) -> None:
    for batching, frames in ((True, 3), (False, 30), (BatchOptions(mixed=True), 1)):
        manager = make(batching=batching)
        client = manager.subscribe()
        next(client)
        for server in range(10):
            for kind in ("tools", "resources", "prompts"):
                manager.enqueue(kind, {"server": server})
        assert manager.flush_all(TIMEOUT)
        assert manager.get_stats().batches == frames
        assert len(take(client, frames)) == frames


def test_a_subscriber_gets_what_is_enqueued_after_it_subscribed(make: Make) -> None:
    manager = make(batching=False)
    manager.enqueue("t", "before")
    assert manager.flush_all(TIMEOUT)
    client = manager.subscribe()
    manager.enqueue("t", "after")
    assert [data for _, data, _ in take(client, 2)] == [{"heartbeat": 15.0, "channels": ["default"]}, "after"]


def test_a_broadcast_reaches_every_channel_and_no_caller_names_it(make: Make) -> None:
    manager = make(batching=False)
    clients = [manager.subscribe([name]) for name in ("a", "b")]
    manager.broadcast("t", "all")
    assert [[data for _, data, _ in take(client, 2)][1] for client in clients] == ["all", "all"]
    for call in (lambda: manager.enqueue("t", 1, channel="*"), lambda: manager.subscribe(["*"])):
        with pytest.raises(InvalidEventError, match="broadcast"):
            call()
    assert manager.get_stats().refused == 1  # subscribing is no event


@pytest.mark.parametrize(
    ("channels", "message"),
    [("default", "not one string"), ([], "1 to 100"), ([str(n) for n in range(101)], "1 to 100"), ([5], "a string")],
    ids=["a string", "none", "too many", "a number"],
)
def test_channels_that_cannot_be_meant_are_refused(make: Make, channels: Any, message: str) -> None:
    with pytest.raises(InvalidEventError, match=message):
        make().subscribe(channels)


def test_shutdown_delivers_says_goodbye_and_refuses_what_comes_after(make: Make) -> None:
    manager = make()
    client = manager.subscribe()
    blocks = drive(client)
    manager.enqueue("t", 1)
    assert manager.shutdown(TIMEOUT)
    assert manager.shutdown(TIMEOUT)
    got = b"".join(iter(lambda: blocks.get(timeout=TIMEOUT), b"the end"))
    assert [event.type for event in parse(got)] == ["sse_open", "t", "sse_bye"]
    for call in (lambda: manager.enqueue("t", 1), lambda: manager.broadcast("t", 1), manager.subscribe):
        with pytest.raises(ClosedError):
            call()
    assert manager.flush_all(0)
    assert manager.get_stats().refused == 2


def test_shutdown_gives_up_on_a_stream_that_does_not_end(make: Make) -> None:
    manager = make()
    client = manager.subscribe()
    stuck = threading.Event()
    driving = threading.Event()

    def drive_and_stick() -> None:
        next(client)
        driving.set()
        stuck.wait(TIMEOUT)
        client.close()

    threading.Thread(target=drive_and_stick).start()
    assert driving.wait(TIMEOUT)
    assert not manager.shutdown(0.01)
    stuck.set()
    assert manager.shutdown(TIMEOUT)


def test_a_manager_is_a_context_manager(make: Make) -> None:
    with make() as manager:
        client = manager.subscribe()
        manager.enqueue("t", 1)
    assert [event for event, _, _ in take(client, 3)] == ["sse_open", "t", "sse_bye"]


def test_stats_are_frozen_values_of_everything(make: Make) -> None:
    manager = make(batching=False)
    client = manager.subscribe()
    sent = [next(client)]
    manager.enqueue("t", 1)
    sent.append(next(client))
    assert manager.flush_all(TIMEOUT)
    stats = manager.get_stats()
    values = json.loads(json.dumps(stats.as_dict()))
    ages = [values.pop(name) for name in ("oldest_stream", "history_age")]
    assert all(0 < age < TIMEOUT for age in ages)
    assert values.pop("history_bytes") > len(sent[1])  # the memory that it takes
    assert values == {
        "enqueued": 1,
        "replaced": 0,
        "refused": 0,
        "failed": 0,
        "batches": 1,
        "by_reason": {"size_limit": 1},
        "pending_events": 0,
        "pending_bytes": 0,
        "pending_age": 0.0,
        "publishing_for": 0.0,
        "thread_restarts": 0,
        "frames": 1,
        "bytes": len(b"".join(sent)),
        "saved_frames": 0,
        "saved_bytes": 0,
        "clients": 1,
        "clients_by_channel": {"default": 1},
        "clients_by_state": {"live": 1, "behind": 0},
        "clients_by_transport": {"attached": 1, "detached": 0},
        "streams_opened": 1,
        "streams_closed": dict.fromkeys(get_args(EndReason), 0),
        "streams_refused": dict.fromkeys(get_args(RefusalReason), 0),
        "lifetimes": {"buckets": dict.fromkeys(stats.lifetimes.buckets, 0), "sum": 0.0},
        "client_lag": 0.0,
        "overflows": 0,
        "replays": 0,
        "gaps": 0,
        "undone": 0,
        "loop_delay": {"buckets": dict.fromkeys(stats.loop_delay.buckets, 0), "sum": 0.0},
        "gil_yields": 0,
        "gil_yielded": 0.0,
        "history_frames": 1,
        "backend_silent": 0.0,
        "backend_answered": 0.0,
        "ignored": 0,
        "signals_dropped": 0,
    }
    with pytest.raises(AttributeError):
        stats.clients = 5  # type: ignore[misc]


def test_a_manager_that_is_dropped_is_collected_with_its_threads() -> None:
    manager = SSEManager(batching=False)
    next(manager.subscribe())
    manager.enqueue("t", 1)
    assert manager.flush_all(TIMEOUT)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "sse_batcher"]
    del manager
    gc.collect()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
