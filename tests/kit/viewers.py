"""Managers on one Redis, and clients of theirs that threads read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from sse_batcher import BatchOptions, ClientOptions, HistoryOptions, SSEManager
from sse_batcher.backends.redis.entries import Entry, to_fields
from sse_batcher.event import Batch, Event
from sse_batcher.manager_state import process_of

from .redisserver import RedisServer, be_patient
from .sse_parser import ServerEvent, parse
from .waiting import TIMEOUT

STREAM, EPOCH = "sse_batcher:stream", "sse_batcher:epoch"
FORGETFUL = HistoryOptions(history_bytes=1)
"""A process keeps the newest frame alone: for older ones, the stream is read again."""

Make = Callable[..., SSEManager]


@contextmanager
def managers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """What makes managers with short windows, which wait long for Redis. They are shut down at the end."""
    be_patient(monkeypatch)
    monkeypatch.setattr("sse_batcher.backends.redis.reader.BLOCK_MS", 100)
    monkeypatch.setattr("sse_batcher.backends.redis.connections.LONGEST_RETRY_PAUSE_SECONDS", 0.1)
    made: list[SSEManager] = []

    def make(
        backend: Any, batching: Any = None, *, history: HistoryOptions | None = None, encode: Any = None, **more: Any
    ) -> SSEManager:
        batching = batching or BatchOptions(batch_window=0.01, max_batch_size=3)
        clients = ClientOptions(heartbeat=0.2, **more)
        made.append(SSEManager(batching=batching, clients=clients, backend=backend, history=history, encode=encode))
        return made[-1]

    yield make
    for manager in made:
        manager.shutdown(1.0)


def managers_fixture() -> Any:
    """A fixture for a test module: what `managers` gives."""

    @pytest.fixture
    def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
        with managers(monkeypatch) as make:
            yield make

    return make


class Viewer:
    """A client of a manager, read by a thread."""

    def __init__(self, manager: SSEManager, *channels: str, cursor: str | None = None, batches: bool = True) -> None:
        self.client = manager.subscribe(channels or ("default",), cursor, batches=batches)
        self.events: list[ServerEvent] = []
        self._news: SimpleQueue[ServerEvent] = SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for block in self.client:
            for event in parse(block, strict=True) if block != b":\n" else []:
                self.events.append(event)
                self._news.put(event)

    def until(self, wanted: Callable[[ServerEvent], bool]) -> list[ServerEvent]:
        """The events up to this one, which is in time."""
        got = []
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                got.append(self._news.get(timeout=max(0.0, deadline - time.monotonic())))
            except Empty:
                raise AssertionError(f"it did not come: {got}") from None
            if wanted(got[-1]):
                return got

    def until_type(self, event_type: str) -> list[ServerEvent]:
        return self.until(lambda event: event.type == event_type)

    def numbers(self, last: int) -> list[int]:
        """The data of all events, of batches too, up to this number; gaps as the reason that they give."""
        return flat(self.until(lambda event: last in flat([event])))

    def __enter__(self) -> Viewer:
        self.until(lambda event: event.type in {"sse_open", "sse_gap"})
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.client.close()
        self._thread.join(TIMEOUT)


def flat(events: list[ServerEvent]) -> list[Any]:
    values: list[Any] = []
    for event in events:
        if event.type.startswith("sse_"):
            values.append(event.json.get("reason", event.type))
        else:
            values += event.json["events"] if event.type.endswith("_batch") else [event.json]
    return values


def send(manager: SSEManager, *numbers: int, channel: str = "default") -> None:
    for number in numbers:
        manager.enqueue("n", number, channel=channel)


@contextmanager
def publishing(manager: SSEManager, *numbers: int) -> Iterator[None]:
    """A thread sends these events, ``range(*numbers)``, one after the other meanwhile."""
    thread = threading.Thread(target=lambda: send(manager, *range(*numbers)))
    thread.start()
    yield
    thread.join(TIMEOUT)


def add(
    server: RedisServer,
    number: int,
    data: Any = None,
    *,
    channel: str = "default",
    id: str = "*",
    timestamp: int = 0,
    publisher: str = "fedcba9876543210",
) -> str:
    """Another publisher adds a batch: the id of its entry."""
    text = json.dumps(number if data is None else data)
    batch = Batch(channel, "n", (Event("n", channel, text),), "manual", timestamp)
    added: bytes = server.client.xadd(STREAM, to_fields(Entry(publisher, number, batch)), id=id)
    return added.decode()


def wait_until_read(manager: SSEManager) -> None:
    """Until what is in the stream now was delivered here."""
    manager.enqueue("last", 0, channel="nobody")
    assert manager.flush_all(TIMEOUT)
    assert process_of(manager).backend.wait_until_delivered(TIMEOUT)
