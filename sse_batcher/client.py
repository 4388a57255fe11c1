"""A client: one open stream, what still waits for it, and what it is told.

The hub's delivering thread calls `offer`. One driver, usually a server's worker thread, iterates. Any thread may call
`end` and `close`, a `__del__` included. There is no lock: each field says who writes it.
"""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import ref

from .history import Cursor, Slice
from .options import ClientOptions
from .waiting import take
from .wire import HEARTBEAT, Frame

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
    user: Hashable = None
    connected_at: float = field(default_factory=time.time)


class Home(Protocol):
    """What a client needs of its hub."""

    clock: Callable[[], float]
    """Seconds, from any start, never backwards."""

    def catch_up(self, client: Client) -> bytes | None:
        """Give a client that is behind its next slice of the history, or make it live where there is none.

        Returns the block that it has to be told first, if any.
        """

    def farewell(self, client: Client, reason: str) -> bytes:
        """The last block of a stream."""

    def remove(self, client: Client, reason: str) -> None:
        """Forget the client. May be called more than once, and by the garbage collector."""


class Client(Iterator[bytes]):
    """One open stream. Iterating it gives all its bytes: the first block, frames, and heartbeats while there are none.

    Made by `SSEManager.subscribe`. One thread iterates; `close` may be called from any, more than once, and ends the
    iteration. The iteration also ends, after an ``sse_bye``, when the manager is shut down.
    """

    def __init__(self, home: Home, options: ClientOptions, info: ClientInfo, cursor: Cursor, batches: bool) -> None:
        self.info = info
        # Frames and bytes handed to the stream, and how many more they would be without batching; by the driver.
        self.frames = self.bytes = self.saved_frames = self.saved_bytes = 0
        self.overflows = 0  # a harmless race between that thread and the driver
        self.gaps = 0  # written by the driver
        self.driver: int | None = None  # the thread that iterates
        # All frames up to it were handed to the stream; written by the driver, or before it.
        self.cursor = cursor
        self.first_block = b""
        # The position of the newest frame that was lost before it came, and why; under the hub's lock.
        self.lost: tuple[Any, str] | None = None
        self._home = home
        self._options = options
        self._batches = batches
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
        self.opened_at = home.clock()
        age = options.max_stream_age
        self._lease = math.inf if age is None else self.opened_at + age * random.uniform(0.8, 1.0)
        self._ending: str | None = None  # why it ends after what is queued
        self._dismissed: str | None = None  # why it ends before anything more is handed out
        self.farewell: str | None = None  # the reason that its last block gave; by the driver
        self._closed = False

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels asked for, beside ``*``, which every client has."""
        return self.info.channels

    @property
    def behind(self) -> bool:
        """Whether it reads the history, at this moment, and is not queued for."""
        return self._behind

    def offer(self, frame: Frame) -> None:
        """Queue a frame. Never waits: a client whose queue is full is behind from here on.

        Called by one thread at a time.
        """
        if self._behind or self._closed:
            return
        size = len(self._bytes_of(frame))
        waiting = self._queue.qsize()
        too_many = waiting >= self._options.queue_frames
        if not too_many and not (waiting and self._bytes_in - self._bytes_out + size > self._options.queue_bytes):
            self._bytes_in += size
            self._queue.put(ref(frame))
            return
        self.overflows += 1
        self.fall_behind()

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
            self.cursor = Cursor(older.position)

    def go_live(self) -> None:
        """Called by the hub, under its lock: there is nothing after the cursor, so it is queued for from here on."""
        self._bytes_out = self._bytes_in
        self._behind = False

    def end(self, reason: str) -> None:
        """Let the stream end with ``sse_bye`` after what is queued."""
        self._ending = self._ending or reason
        self._queue.put(_END)

    def dismiss(self, reason: str) -> None:
        """Let the stream end with ``sse_bye`` now: nothing that waits for it is handed out any more."""
        self._dismissed = self._dismissed or reason
        self._queue.put(None)

    def close(self) -> None:
        """End the stream at once, without a word. Idempotent, from any thread."""
        self._closed = True
        self._queue.put(None)
        self._home.remove(self, self.farewell or "left")

    def __next__(self) -> bytes:
        self.driver = threading.get_ident()
        if self.farewell is not None:
            # Only now, since only now has the server written it: who waits for the streams to end waits for that.
            self.close()
        if self._closed:
            raise StopIteration
        if not self._started:
            self._started = True
            return self._sent(self.first_block)
        while not self._closed:
            if self._home.clock() >= self._lease:
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

    def _next_of_history(self) -> bytes | None:
        """What comes next for a client that is behind; None: look again, it may be live now."""
        if not self._slice:
            return self._home.catch_up(self)
        frame = self._slice.popleft()()
        if frame is None:  # evicted meanwhile: the hub will tell what that means
            self._slice.clear()
            return None
        return self._handed(frame)

    def _next_of_queue(self) -> bytes | None:
        """What comes next for a live client, which may take until the next heartbeat; None: look again."""
        rest = self._lease - self._home.clock()
        try:
            reference = take(self._queue, max(0.0, min(self._options.heartbeat, rest)))
        except queue.Empty:
            return HEARTBEAT if rest > self._options.heartbeat else None
        # A frame taken while the queue was being emptied is in the history.
        if reference is None or self._closed or self._behind or self._dismissed is not None:
            return None
        if reference is _END:
            return self._say_goodbye(self._ending or "shutdown")
        frame = reference()
        if frame is None:  # evicted before its turn
            self.overflows += 1
            self.fall_behind()
            return None
        self._bytes_out += len(self._bytes_of(frame))
        # One at or below the position was listed for this client just before it went live, and read from the history.
        return self._handed(frame) if frame.position > self.cursor.position else None

    def _say_goodbye(self, reason: str) -> bytes:
        self.farewell = reason
        return self._home.farewell(self, reason)

    def _handed(self, frame: Frame) -> bytes | None:
        position, part, _ = self.cursor
        self.cursor = Cursor(frame.position)
        self.frames += 1
        if part and frame.position == position:
            return frame.rest(part) or None  # nothing is left where the part is more than there is: no id of ours
        if self._batches:
            self.saved_frames += len(frame.batch.events) - 1
            self.saved_bytes += frame.saved_bytes
        return self._bytes_of(frame)

    def _bytes_of(self, frame: Frame) -> bytes:
        return frame.plain if self._batches else frame.unbatched

    def _sent(self, data: bytes) -> bytes:
        self.bytes += len(data)
        return data

    def _empty_queue(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass
