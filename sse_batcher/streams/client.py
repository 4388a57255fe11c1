"""A client: one open stream, what still waits for it, and what it is told.

`OpenStream` is what the hub knows of every stream. `Client` is one with a queue, which its driver iterates. The hub's
delivering thread calls `offer`. One driver, usually a server's worker thread, iterates. Any thread may call `end`
and `close`, a `__del__` included. There is no lock: each field says who writes it.
"""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Protocol
from weakref import ref

from ..options import ClientOptions
from ..reasons import ByeReason, EndReason, GapReason
from ..runtime.worker import take
from ..wire import HEARTBEAT, Frame, Position
from .history import ResumePoint, Slice

Reference = Callable[[], Frame | None]


def _held(frame: Frame) -> Reference:
    return lambda: frame


def _END() -> None:
    """What is queued to say that the stream ends here."""


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """Who a client is, as a plain value. `id` counts the clients of a process; `connected_at` is seconds since 1970."""

    id: int
    channels: tuple[str, ...]
    user: str | int | None = None
    connected_at: float = field(default_factory=time.time)


class Home(Protocol):
    """What members need of their hub."""

    clock: Callable[[], float]
    """Seconds, from any start, never backwards."""
    closing: ByeReason | None
    """Why all streams end after what there is; None while that is not so."""

    def catch_up(self, client: Client) -> bytes | None:
        """Give a client that is behind its next slice of the history, or make it live where there is none.

        May wait for the backend. Returns the block that has to come first, if any.
        """

    def farewell(self, client: OpenStream, reason: ByeReason, *, named: bool = True) -> bytes:
        """The last block of a stream. `named`: with the client's cursor as its id."""

    def remove(self, client: OpenStream, reason: EndReason) -> None:
        """Forget the client. May be called more than once, and by the garbage collector."""


@dataclass(slots=True, eq=False)
class Counts:
    """What was handed to streams. Written by one thread."""

    frames: int = 0
    bytes: int = 0
    saved_frames: int = 0
    """How many frames more it would be, had each event come alone."""
    saved_bytes: int = 0
    overflows: int = 0
    gaps: int = 0
    undone: int = 0
    """How often a connection was given back to the server that had been about to be taken over."""

    def add(self, other: Counts) -> None:
        for item in fields(Counts):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


class OpenStream:
    """An open stream, as the hub knows it, whoever drives it.

    `point`: all frames up to it were handed to the stream.
    """

    __slots__ = ("__weakref__", "farewell", "info", "lease", "opened_at", "point")

    counts: Any
    """Where what it is handed is counted."""
    driver: int | None = None
    """The thread that hands blocks to it; None where that is nobody yet."""

    def __init__(self, info: ClientInfo, point: ResumePoint, opened_at: float, lease: float) -> None:
        self.info = info
        self.point = point
        self.opened_at = opened_at
        self.lease = lease
        """When it has to end, by the hub's clock."""
        self.farewell: ByeReason | None = None
        """The reason that its last block gave. By the driver."""

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels asked for, beside ``*``, which every client has."""
        return self.info.channels

    @property
    def behind(self) -> bool:
        """Whether it reads the history, at this moment, and is not told of each frame."""
        raise NotImplementedError

    @property
    def lost(self) -> tuple[Position, GapReason] | None:
        """The position of the newest frame that was lost before it came, and why; under the hub's lock."""
        raise NotImplementedError

    @property
    def handed(self) -> tuple[int, int]:
        """The frames and bytes that were handed to it."""
        raise NotImplementedError

    def dismiss(self, reason: ByeReason) -> bool:
        """Let the stream end with ``sse_bye`` now: nothing that waits for it is handed out any more. Any thread.

        False if that was said before, and nothing changes.
        """
        raise NotImplementedError

    def read_on(self, frames: Iterable[Frame]) -> None:
        """Called by the hub, under its lock: the next slice of the history."""
        raise NotImplementedError

    def go_live(self) -> None:
        """Called by the hub, under its lock: there is nothing after the cursor, so it is told of all from here on."""
        raise NotImplementedError


class Client(OpenStream, Iterator[bytes]):
    """One open stream. Iterating it gives all its bytes: the first block, frames, and heartbeats while there are none.

    Made by `SSEManager.subscribe`. One thread iterates; `close` may be called from any, more than once, and ends the
    iteration. The iteration also ends, after an ``sse_bye``, when the manager is shut down.
    """

    lost: tuple[Position, GapReason] | None = None

    def __init__(self, home: Home, options: ClientOptions, info: ClientInfo, point: ResumePoint, batches: bool) -> None:
        now = home.clock()
        age = options.max_stream_age
        # The cursor is written by the driver, or before there is one.
        super().__init__(info, point, now, math.inf if age is None else now + age * random.uniform(0.8, 1.0))
        # By the driver; overflows by the delivering thread, too: a harmless race.
        self.counts = Counts()
        self.first_block = b""
        self.state = b""
        """The blocks of a snapshot, until they are handed out. If there are any, the first block has no id."""
        self.home = home
        self.options = options
        self.batches = batches
        """Whether it knows batches."""
        # Made by its name in `queue`, as in all of this package: gevent may patch that after we are imported.
        # Weak references to frames: what waits here is kept by the history alone, and a thousand clients that have
        # stopped reading pin no more than it. And None to say "look at the flags". SimpleQueue, since its put may be
        # interrupted by another one, and bounded here, since the bound is in bytes too. The two counts of bytes have
        # one writer each.
        self._queue: queue.SimpleQueue[Reference | None] = queue.SimpleQueue()
        self._bytes_in = 0
        self._bytes_out = 0
        # Behind: the hub does not queue for it, it reads the history in slices. Set by the delivering thread or the
        # driver, unset by the driver under the hub's lock, when nothing is after its position.
        self._behind = True
        self._slice: deque[Reference] = deque()
        self._started = False
        self._ending: ByeReason | None = None  # why it ends after what is queued
        self._dismissed: ByeReason | None = None  # why it ends before anything more is handed out
        self._closed = False
        self._successor: OpenStream | None = None

    @property
    def behind(self) -> bool:
        """Whether it reads the history, at this moment, and is not queued for."""
        return self._behind

    @property
    def handed(self) -> tuple[int, int]:
        """The frames and bytes that were handed to the stream."""
        return self.counts.frames, self.counts.bytes

    def offer(self, frame: Frame) -> None:
        """Queue a frame. Never waits: a client whose queue is full is behind from here on.

        Called by one thread at a time.
        """
        if self._behind or self._closed:
            return
        size = len(self._bytes_of(frame))
        waiting = self._queue.qsize()
        too_many = waiting >= self.options.queue_frames
        if not too_many and not (waiting and self._bytes_in - self._bytes_out + size > self.options.queue_bytes):
            self._bytes_in += size
            self._queue.put(ref(frame))
            return
        self.counts.overflows += 1
        self.fall_behind()

    def lose(self, channel: str, position: Position, reason: GapReason) -> None:
        """Called by the hub, under its lock: a frame was lost before it came."""
        self.lost = position, reason

    def fall_behind(self) -> None:
        """Queue no more: what was queued, and all that follows, is read from the history. By the delivering thread."""
        # First the flag, then the queue, then the marker. The driver may take a frame out of the middle while the queue
        # is being emptied: it sees the flag and drops it. And the marker comes last, or it would be thrown away too.
        self._behind = True
        self._empty_queue()
        self._queue.put(None)
        if self._ending is not None:
            # It may have been thrown away, here or by the driver, which drops what it takes out while it is behind.
            self._queue.put(_END)

    def read_on(self, frames: Iterable[Frame]) -> None:
        """Called by the hub, under its lock: the next slice of the history."""
        self._slice.extend(map(ref, frames))

    def read_older(self, older: Slice) -> None:
        """Called by the hub: the next slice of what no history here has, so that the client itself has to hold it."""
        self._slice.extend(_held(frame) for frame in older.frames)
        if not older.frames:
            self.point = ResumePoint(older.position)

    def go_live(self) -> None:
        """Called by the hub, under its lock: there is nothing after the cursor, so it is queued for from here on."""
        self._bytes_out = self._bytes_in
        self._behind = False

    def end(self, reason: ByeReason) -> None:
        """Let the stream end with ``sse_bye`` after what is queued."""
        self._ending = self._ending or reason
        self._queue.put(_END)

    def dismiss(self, reason: ByeReason) -> bool:
        """Let the stream end with ``sse_bye`` now: nothing that waits for it is handed out any more."""
        first = self._dismissed is None  # of two threads at once, both may be: a harmless race, one reason is kept
        self._dismissed = self._dismissed or reason
        self._queue.put(None)
        # After the flag: `give_way` sets its own first and then looks at ours, so that one of the two sees the other.
        if self._successor is not None:
            self._successor.dismiss(reason)
        return first

    def give_way(self, successor: OpenStream) -> None:
        """Called by the hub, under its lock: another member goes on with this stream. Nobody drives this one."""
        self._successor = successor
        if self._dismissed is not None:
            successor.dismiss(self._dismissed)

    def close(self) -> None:
        """End the stream at once, without a word. Idempotent, from any thread."""
        self._closed = True
        self._queue.put(None)
        self.home.remove(self, self.farewell or "left")

    def __next__(self) -> bytes:
        self.driver = threading.get_ident()
        if self.farewell is not None:
            # Only now, since only now has the server written it: who waits for the streams to end waits for that.
            self.close()
        if self._closed:
            raise StopIteration
        if not self._started:
            self._started = True
            return self._sent(self._begin())
        while not self._closed:
            if self.home.clock() >= self.lease:
                self.dismiss("lease")
            if self._dismissed is not None:
                block: bytes | None = self._say_goodbye(self._dismissed)
            else:
                block = self._next_of_history() if self._behind else self._next_of_queue()
            if block is not None:
                return self._sent(block)
        raise StopIteration

    def __iter__(self) -> Client:
        return self

    def _begin(self) -> bytes:
        """The first block with the state; or with the last block, if the stream was dismissed before its first step."""
        if self._dismissed is not None:
            return self.first_block + self._say_goodbye(self._dismissed)
        state, self.state = self.state, b""
        return self.first_block + state

    def _next_of_history(self) -> bytes | None:
        """What comes next for a client that is behind; None: look again, it may be live now."""
        if not self._slice:
            return self.home.catch_up(self)
        frame = self._slice.popleft()()
        if frame is None:  # evicted meanwhile: the hub will tell what that means
            self._slice.clear()
            return None
        return self._handed(frame)

    def _next_of_queue(self) -> bytes | None:
        """What comes next for a live client, which may take until the next heartbeat; None: look again."""
        rest = self.lease - self.home.clock()
        try:
            reference = take(self._queue, max(0.0, min(self.options.heartbeat, rest)))
        except queue.Empty:
            return HEARTBEAT if rest > self.options.heartbeat else None
        # A frame taken while the queue was being emptied is in the history.
        if reference is None or self._closed or self._behind or self._dismissed is not None:
            return None
        if reference is _END:
            return self._say_goodbye(self._ending or "shutdown")
        frame = reference()
        if frame is None:  # evicted before its turn
            self.counts.overflows += 1
            self.fall_behind()
            return None
        self._bytes_out += len(self._bytes_of(frame))
        # One at or below the position was listed for this client just before it went live, and read from the history.
        return self._handed(frame) if frame.position > self.point.position else None

    def _say_goodbye(self, reason: ByeReason) -> bytes:
        self.farewell = reason
        # Without an id if the state was not handed out: a client that comes back with one would not get it any more.
        return self.home.farewell(self, reason, named=not self.state)

    def _handed(self, frame: Frame) -> bytes | None:
        position, part, _ = self.point
        self.point = ResumePoint(frame.position)
        self.counts.frames += 1
        if part and frame.position == position:
            return frame.rest(part) or None  # nothing is left where the part is more than there is: no id of ours
        if self.batches:
            self.counts.saved_frames += len(frame.batch.events) - 1
            self.counts.saved_bytes += frame.saved_bytes
        return self._bytes_of(frame)

    def _bytes_of(self, frame: Frame) -> bytes:
        return frame.plain if self.batches else frame.unbatched

    def _sent(self, data: bytes) -> bytes:
        self.counts.bytes += len(data)
        return data

    def _empty_queue(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass
