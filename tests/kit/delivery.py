"""A hub without a manager: the test delivers to it, one frame at a time, and reads its clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from queue import SimpleQueue
from typing import Any

import pytest

from sse_batcher import (
    Client,
    ClientOptions,
    HistoryOptions,
)
from sse_batcher.event import Batch, Event
from sse_batcher.runtime.locks import new_lock
from sse_batcher.streams.client import QueueClient
from sse_batcher.streams.history import ResumePoint
from sse_batcher.streams.hub import Hub
from sse_batcher.wire import Frame

from .sse_parser import ServerEvent, parse


class Numbers:
    """Cursors that are plain numbers."""

    start = 0

    def format(self, position: int) -> str:
        return f"x-{position}"

    def parse(self, cursor: str) -> ResumePoint:
        if not cursor.startswith("x-"):
            return ResumePoint(refused="epoch")
        position, _, part = cursor[2:].partition(".")
        return ResumePoint(int(position), int(part or 0))

    def now(self) -> float:
        return time.time() * 1000

    def normalize(self, cursor: str) -> str | None:
        return cursor

    def replay(self, channels: Iterable[str], cursor: ResumePoint) -> None:
        """Nothing is anywhere but in the history."""


class Delivery:
    """A hub, and the thread that delivers to it, one frame at a time."""

    def __init__(
        self,
        history: HistoryOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        lock: Any = None,
        **options: Any,
    ) -> None:
        self.left: list[tuple[int, str]] = []
        self.position = 0
        self.hub = Hub(
            ClientOptions(**options),
            history or HistoryOptions(),
            Numbers(),
            on_connect=lambda client: None,
            on_disconnect=lambda client, farewell: self.left.append((client.id, farewell.reason)),
            clock=clock,
            lock=lock,
        )

    def frame(self, data: Any = None, channel: str = "default") -> Frame:
        self.position += 1
        event = Event("t", channel, json.dumps(self.position if data is None else data))
        return Frame(Batch(channel, "t", (event,), "manual", 0), self.position, f"x-{self.position}")

    def deliver(self, times: int = 1, data: Any = None, channel: str = "default") -> None:
        for _ in range(times):
            self.hub.deliver(self.frame(data, channel))

    def connect(self, *channels: str, cursor: str | None = None) -> QueueClient:
        return self.hub.connect(channels or ("default",), cursor)


def take(client: Client, count: int) -> list[Any]:
    """The next blocks: (event, data, id) of each."""
    return [(event.type, event.json, event.id) for event in parse(b"".join(next(client) for _ in range(count)))]


def numbers(client: Client, count: int) -> list[int]:
    return [data for _, data, _ in take(client, count)]


class MeetingLock:
    """A lock in which something happens while it is held: once, in the next block, as soon as that has begun."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        """Set by each thread that is about to wait for the lock."""
        self._lock = new_lock()
        self._happens: Callable[[], object] | None = None

    def meet(self, happens: Callable[[], object]) -> None:
        self._happens = happens

    def __enter__(self) -> None:
        self.asked.set()
        self._lock.acquire()
        if self._happens is not None:
            happens, self._happens = self._happens, None
            happens()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def drive(client: Client) -> SimpleQueue[bytes]:
    """A server's worker thread: iterates, and closes at the end."""
    blocks: SimpleQueue[bytes] = SimpleQueue()

    def run() -> None:
        for block in client:
            blocks.put(block)
        client.close()
        blocks.put(b"the end")

    threading.Thread(target=run, daemon=True).start()
    return blocks


def last(client: Client) -> ServerEvent:
    """The next event, after which the stream has to end."""
    (event,) = parse(next(client), strict=True)
    with pytest.raises(StopIteration):
        next(client)
    return event


def connect(hub: Hub, user: Hashable = None) -> Client:
    """A stream of the default channel, of this user."""
    return hub.connect(("default",), user=user)
