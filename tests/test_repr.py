"""What the public objects look like in a log or a debugger: never a password, and without any effect."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext

import pytest

from sse_batcher import BatchOptions, ClientOptions, EventBatcher, HistoryOptions, SSEManager
from sse_batcher.encoding import encode_json
from sse_batcher.flask.config import read_config
from sse_batcher.process_state import Settings
from sse_batcher.prometheus import SSECollector

from .kit import locks
from .kit.threads import in_thread


def test_a_manager_shows_its_backend_and_its_number_of_clients() -> None:
    with SSEManager() as manager:
        assert repr(manager) == "<SSEManager memory://, unused in this process>"
        clients = [manager.subscribe() for _ in range(2)]
        assert repr(manager) == "<SSEManager memory://, open, 2 clients>"
        clients[0].close()
        assert repr(manager) == "<SSEManager memory://, open, 1 client>"
        clients[1].close()
    assert repr(manager) == "<SSEManager memory://, closed, 0 clients>"


@pytest.mark.parametrize("backend", ["redis://:secret@redis.example:6379/0", "redis://ada:sec:ret@redis.example"])
def test_a_manager_shows_no_password(backend: str) -> None:
    assert repr(SSEManager(backend=backend)) == "<SSEManager redis://, unused in this process>"


def test_what_was_read_from_a_config_shows_no_password() -> None:
    backend = "redis://:secret@redis.example"
    assert "secret" not in repr(read_config({"SSE_BACKEND": backend}))
    settings = Settings(
        batching=BatchOptions(),
        clients=ClientOptions(),
        history=HistoryOptions(),
        backend=backend,
        encode=encode_json,
        context=nullcontext,
    )
    assert "secret" not in repr(settings)


def test_a_ready_connection_is_shown_by_its_type() -> None:
    redis = pytest.importorskip("redis")
    manager = SSEManager(backend=redis.Redis(password="secret"))
    assert repr(manager) == "<SSEManager Redis, unused in this process>"


def test_a_manager_is_shown_while_the_locks_are_held_by_another_thread() -> None:
    with locks.recorded() as made, SSEManager() as manager:
        manager.get_stats()  # makes what it has of this process
        with made.held(at_least=3):
            assert in_thread(repr, manager) == "<SSEManager memory://, open, 0 clients>"


def test_showing_a_manager_or_batcher_starts_nothing() -> None:
    threads = threading.active_count()
    manager, batcher = SSEManager(), EventBatcher(print)
    for _ in range(2):  # the second would show what the first has made
        assert repr(manager) == "<SSEManager memory://, unused in this process>"
        assert repr(batcher) == "<EventBatcher unused in this process>"
    assert threading.active_count() == threads


def test_a_batcher_shows_how_many_events_wait() -> None:
    with EventBatcher(lambda batch: None, BatchOptions(batch_window=10)) as batcher:
        for number in range(3):
            batcher.enqueue("log", number)
        assert repr(batcher) == "<EventBatcher open, 3 events pending>"
    assert repr(batcher) == "<EventBatcher closed, 0 events pending>"


def test_a_subclass_is_shown_by_its_own_name() -> None:
    class News(SSEManager):
        pass

    assert repr(News()) == "<News memory://, unused in this process>"


def test_a_collector_shows_its_manager_until_that_is_gone() -> None:
    manager = SSEManager()
    collector, dropped = SSECollector(manager), weakref.ref(manager)
    assert repr(collector) == "<SSECollector of <SSEManager memory://, unused in this process>>"
    del manager
    assert dropped() is None
    assert repr(collector) == "<SSECollector of a manager that is gone>"
