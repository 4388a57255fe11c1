"""A client: one open stream, what still waits for it, and what it is told.

The hub's delivering thread calls `offer`. One driver, usually a server's worker thread, iterates. Any thread may call
`end` and `close`, a `__del__` included. There is no lock: each field says who writes it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from .options import ClientOptions
from .wire import HEARTBEAT, Frame


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """Who a client is, as a plain value. `id` counts the clients of a process; `connected_at` is seconds since 1970."""

    id: int
    channels: tuple[str, ...]
    connected_at: float = field(default_factory=time.time)


class Home(Protocol):
    """What a client needs of its hub."""

    def catch_up(self, client: Client) -> bytes:
        """Make a client that is behind live again, and return what it has to be told."""

    def farewell(self, client: Client, reason: str) -> bytes:
        """The last block of a stream."""

    def remove(self, client: Client, reason: str) -> None:
        """Forget the client. May be called more than once, and by the garbage collector."""


class Client(Iterator[bytes]):
    """One open stream. Iterating it gives all its bytes: the first block, frames, and heartbeats while there are none.

    Made by `SSEManager.subscribe`. One thread iterates; `close` may be called from any, more than once, and ends the
    iteration. The iteration also ends, after an ``sse_bye``, when the manager is shut down.
    """

    def __init__(self, home: Home, options: ClientOptions, info: ClientInfo) -> None:
        self.info = info
        self.frames = 0  # frames and bytes handed to the stream; written by the driver
        self.bytes = 0
        self.overflows = 0  # written by the delivering thread
        self.driver: int | None = None  # the thread that iterates
        self.position: Any = None  # all frames up to it were handed to the stream; written by the driver, or before it
        self.first_block = b""
        self._home = home
        self._options = options
        # Made by its name in `queue`, as in all of this package: gevent may patch that after we are imported.
        # Frames, and None to say "look at the flags". SimpleQueue, since its put may be interrupted by another one, and
        # bounded here, since the bound is in bytes too. The two counts of bytes have one writer each.
        self._queue: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._bytes_in = 0
        self._bytes_out = 0
        self._behind = False  # set by the delivering thread, unset by the driver
        self._started = False
        self._ending: str | None = None
        self._farewell: str | None = None  # the reason that its last block gave
        self._closed = False

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels asked for, beside ``*``, which every client has."""
        return self.info.channels

    def offer(self, frame: Frame) -> None:
        """Queue a frame. Never waits: a client whose queue is full is behind from here on.

        Called by one thread at a time.
        """
        if self._behind or self._closed:
            return
        size = len(frame.plain)
        waiting = self._queue.qsize()
        too_many = waiting >= self._options.queue_frames
        if not too_many and not (waiting and self._bytes_in - self._bytes_out + size > self._options.queue_bytes):
            self._bytes_in += size
            self._queue.put(frame)
            return
        # First the flag, then the queue, then the marker. The driver may take a frame out of the middle while the queue
        # is being emptied: it sees the flag and drops it. And the marker comes last, or it would be thrown away too.
        self._behind = True
        self.overflows += 1
        self._empty_queue()
        self._queue.put(None)

    def go_live(self, position: Any) -> None:
        """Called by the hub, under its lock, when a client that was behind has to be queued for again."""
        self.position = position
        self._bytes_out = self._bytes_in
        self._behind = False

    def end(self, reason: str) -> None:
        """Let the stream end with ``sse_bye`` after what is queued."""
        self._ending = self._ending or reason
        self._queue.put(None)

    def close(self) -> None:
        """End the stream at once. Idempotent, from any thread."""
        self._closed = True
        self._queue.put(None)
        self._home.remove(self, self._farewell or "left")

    def __next__(self) -> bytes:
        self.driver = threading.get_ident()
        if self._farewell is not None:
            # Only now, since only now has the server written it: who waits for the streams to end waits for that.
            self.close()
        if self._closed:
            raise StopIteration
        if not self._started:
            self._started = True
            return self._sent(self.first_block)
        while True:
            try:
                frame = self._queue.get(timeout=self._options.heartbeat)
            except queue.Empty:
                return self._sent(HEARTBEAT)
            if frame is None:
                if self._closed:
                    raise StopIteration
                if self._behind:
                    # The marker may have been that of an end, too, or of both: leave it for the next turn.
                    self._queue.put(None)
                    return self._sent(self._home.catch_up(self))
                if self._ending is not None:
                    self._farewell = self._ending
                    return self._sent(self._home.farewell(self, self._ending))
                continue
            # A frame taken while the queue was being emptied belongs to the gap. One at or below the position was
            # listed for this client just before it went live.
            if self._behind or frame.position <= self.position:
                continue
            self._bytes_out += len(frame.plain)
            self.position = frame.position
            self.frames += 1
            return self._sent(frame.plain)

    def __iter__(self) -> Client:
        return self

    def _sent(self, data: bytes) -> bytes:
        self.bytes += len(data)
        return data

    def _empty_queue(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass
