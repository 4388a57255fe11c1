"""A hub without a manager: the test delivers to it, one frame at a time, and reads its clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from sse_batcher import Client, ClientOptions, HistoryOptions
from sse_batcher.event import Audience, Batch, Event, User
from sse_batcher.runtime.locks import new_lock
from sse_batcher.streams.client import QueueClient, new_queue
from sse_batcher.streams.departures import Farewell
from sse_batcher.streams.history import ResumePoint
from sse_batcher.streams.hub import Hub
from sse_batcher.streams.open_stream import ClientInfo
from sse_batcher.streams.opening import StreamRequest
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

    def replay(self, channels: Iterable[str], cursor: ResumePoint, user: User | None) -> None:
        """Nothing is anywhere but in the history."""


class Delivery:
    """A hub, and the thread that delivers to it, one frame at a time."""

    def __init__(
        self,
        history: HistoryOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        lock: Any = None,
        cursors: Numbers | None = None,
        make_queue: Callable[[], Any] = new_queue,
        on_left: Callable[[], object] = lambda: None,
        **options: Any,
    ) -> None:
        """`on_left` is called for each stream that has ended, after it was added to `left`."""
        self.left: list[tuple[int, str]] = []
        self._on_left = on_left
        self.position = 0
        self.cursors = cursors or Numbers()
        self.hub = Hub(
            ClientOptions(**options),
            history or HistoryOptions(),
            self.cursors,
            on_connect=lambda client: None,
            on_disconnect=self._note_left,
            clock=clock,
            lock=lock,
            make_queue=make_queue,
        )

    def _note_left(self, client: ClientInfo, farewell: Farewell) -> None:
        self.left.append((client.id, farewell.reason))
        self._on_left()

    def frame(self, data: Any = None, channel: Audience = "default") -> Frame:
        self.position += 1
        event = Event("t", channel, json.dumps(self.position if data is None else data))
        return Frame(Batch(channel, "t", (event,), "manual", 0), self.position, f"x-{self.position}")

    def deliver(self, times: int = 1, data: Any = None, channel: Audience = "default") -> None:
        for _ in range(times):
            self.hub.deliver(self.frame(data, channel))

    def lose(self, audience: Audience = "default") -> None:
        """A frame for this channel, or for these users, will never come."""
        self.position += 1
        self.hub.lose(audience, self.position)

    def connect(
        self, *channels: str, cursor: str | None = None, user: User | None = None, **options: Any
    ) -> QueueClient:
        """As `connect`, with this hub."""
        return connect(self.hub, *channels, cursor=cursor, user=user, **options)

    def can_resume(self, cursor: str, *channels: str, user: User | None = None) -> bool:
        """Whether such a stream of this hub would miss nothing."""
        return self.hub.can_resume(asked_for(*channels, cursor=cursor, user=user))


def take(client: Client, count: int) -> list[Any]:
    """The next blocks: (event, data, id) of each."""
    return [(event.type, event.json, event.id) for event in parse(b"".join(next(client) for _ in range(count)))]


def numbers(client: Client, count: int) -> list[int]:
    return [data for _, data, _ in take(client, count)]


class Once:
    """Something that happens once, the next time it is called, if there is something."""

    def __init__(self) -> None:
        self._happens: Callable[[], object] | None = None

    def prepare(self, happens: Callable[[], object]) -> None:
        self._happens = happens

    def __call__(self) -> None:
        if self._happens is not None:
            happens, self._happens = self._happens, None
            happens()


class MeetingLock:
    """A lock in which something happens once: while it is held, in the next block, or as soon as that has ended."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        """Set by each thread that is about to wait for the lock."""
        self._lock = new_lock()
        self._while_held, self._after = Once(), Once()

    def meet(self, happens: Callable[[], object]) -> None:
        """Have this happen in the next block, as soon as that has begun."""
        self._while_held.prepare(happens)

    def meet_after(self, happens: Callable[[], object]) -> None:
        """Have this happen as soon as the lock is released the next time."""
        self._after.prepare(happens)

    def __enter__(self) -> None:
        self.asked.set()
        self._lock.acquire()
        self._while_held()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()
        self._after()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


class MeetingQueue(SimpleQueue[Any]):
    """A client's queue in which something happens once: before a put, before or after it is emptied, or in a wait."""

    def __init__(self) -> None:
        self._before_look, self._when_empty, self._before_wait = Once(), Once(), Once()
        self._before_put = Once()

    def meet_before_put(self, happens: Callable[[], object]) -> None:
        """Have this happen just before the next item is put into the queue."""
        self._before_put.prepare(happens)

    def meet_before_look(self, happens: Callable[[], object]) -> None:
        """Have this happen just before the next item is taken without waiting."""
        self._before_look.prepare(happens)

    def meet_when_empty(self, happens: Callable[[], object]) -> None:
        """Have this happen as soon as the queue is found empty the next time."""
        self._when_empty.prepare(happens)

    def meet_before_wait(self, happens: Callable[[], object]) -> None:
        """Have this happen after the queue was found empty, just before the next wait."""
        self._before_wait.prepare(happens)

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self._before_put()
        super().put(item, block, timeout)

    def get_nowait(self) -> Any:
        self._before_look()
        try:
            return super().get_nowait()
        except Empty:
            self._when_empty()
            raise

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self._before_wait()
        return super().get(block, timeout)


class Queues(list[MeetingQueue]):
    """Makes the queues of clients, and lists them in the order of the clients."""

    def __call__(self) -> MeetingQueue:
        self.append(MeetingQueue())
        return self[-1]


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


def just_before(monkeypatch: pytest.MonkeyPatch, thing: object, method: str, happens: Callable[[], Any]) -> None:
    """Have something happen just before this method is called the next time."""
    real = getattr(thing, method)

    def first(*args: Any) -> Any:
        monkeypatch.setattr(thing, method, real)
        happens()
        return real(*args)

    monkeypatch.setattr(thing, method, first)


def just_after(monkeypatch: pytest.MonkeyPatch, thing: object, method: str, happens: Callable[[], Any]) -> None:
    """Have something happen just after this method has returned the next time."""
    real = getattr(thing, method)

    def first(*args: Any) -> Any:
        monkeypatch.setattr(thing, method, real)
        answer = real(*args)
        happens()
        return answer

    monkeypatch.setattr(thing, method, first)


def asked_for(*channels: str, cursor: str | None = None, user: User | None = None, **options: Any) -> StreamRequest:
    """A request for these channels. Without one: for the default channel, or for a user and no channel."""
    names = channels or (() if user is not None else ("default",))
    return StreamRequest(names, cursor, user=user, **options)


def connect(hub: Hub, *channels: str, **options: Any) -> QueueClient:
    """A stream of this hub; arguments are those of `asked_for`."""
    return hub.connect(asked_for(*channels, **options))


def connect_user(delivery: Delivery, *channels: str, **options: Any) -> QueueClient:
    """A stream that has begun."""
    client = delivery.connect(*channels, **options)
    assert [event for event, _, _ in take(client, 1)] == ["sse_open"]
    return client


def bye(client: QueueClient) -> str:
    """The position that the goodbye names. The stream ends."""
    client.dismiss("lease")
    ((event, _, id),) = take(client, 1)
    assert event == "sse_bye"
    return id


def opened(delivery: Delivery, cursor: str, *channels: str, **options: Any) -> tuple[str, str]:
    """How a stream that comes back begins: the type of the first block, and its position."""
    client = delivery.connect(*channels, cursor=cursor, **options)
    ((event, _, id),) = take(client, 1)
    client.close()
    return event, id


def deliver_all(delivery: Delivery, audiences: Iterable[Audience]) -> None:
    for audience in audiences:
        delivery.deliver(1, channel=audience)
