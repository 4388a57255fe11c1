"""Attached streams: the server's thread that serves the request drives the stream for as long as it is open.

Runs in that thread, except for `AttachedStream.close` and `drain`, which the watcher's thread calls, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..errors import BackendError, ClosedError, TooManyClientsError
from ..manager import SSEManager
from ..manager_state import process_of
from ..reasons import BusyReason, ByeReason
from ..runtime.dropped import Dropped
from ..streams.client import QueueClient
from ..streams.opening import StreamRequest
from ..streams.refusals import refusal_reason
from ..wire import GZIP_START, stored
from .descriptors import descriptors
from .server import ServerInfo
from .sockets import end_connection
from .watcher import Watch, watcher


class ServedRequest(NamedTuple):
    """A request for a stream, and the server that it came through."""

    stream: StreamRequest
    server: ServerInfo
    resumes: bool = False
    """Whether no snapshot was made, because the client could resume at its cursor when the request came."""


BUFFERED: ByeReason = "buffered"
"""The reason of a stream that ends because it is held back on its way to the client."""

FREE_THREADS = 50
"""How many threads of a large server are kept for other requests. More requests at a time gain nothing in one process,
because of the GIL; under gevent, each thread is a greenlet, and there are 1,000."""

LATE_WRITE_SECONDS = 2.0
"""Seconds within which a server that writes in another thread must have written something."""

EXTRA_WRITE_SECONDS = 0.5
"""Seconds that such a server has once more when it is late. If the process stood still, its other thread comes next."""


class BufferingCheck:
    """Finds out whether the blocks of a stream leave the server at once. Used by the thread that drives the stream.

    PEP 3333 demands that servers and middleware pass a block on before they ask for the next one. But a function that
    reads the whole body asks for block after block, of a body that has no end; and a compressor may collect many blocks
    before it passes anything on.

    `clock` gives seconds, from any start.
    """

    def __init__(self, watch: Watch, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch = watch
        self._clock = clock
        self._written: int | None = None
        self._late_at = 0.0
        self._is_late = False
        self._pieces_left = 2
        """How many blocks have still to be seen leaving. The first write may be the head of the response alone."""

    def is_passed_on(self) -> bool | None:
        """Return whether blocks leave the server, or None if it is too early to know.

        Call this at each step, before the next block is handed out, until it returns True or False. Returns True, too,
        if the system does not tell what was written.
        """
        found, before, now = self._watch.written(), self._written, self._clock()
        if found is None:
            return True
        written, all_taken = found
        if before is None or written != before:
            self._written, self._late_at, self._is_late = written, now + LATE_WRITE_SECONDS, False
            self._pieces_left -= before is not None
            return True if self._pieces_left == 0 else None
        if self._watch.server.writes_later:
            # Such a server keeps blocks that it cannot write, because the client takes nothing: that is no buffering.
            if now < self._late_at or not all_taken:
                return None
            if not self._is_late:
                self._is_late, self._late_at = True, now + EXTRA_WRITE_SECONDS
                return None
        return False


class AttachedStream(Iterator[bytes]):
    """A WSGI iterable: the bytes of one stream.

    It subscribes in its first step. So a response that is never iterated, because a middleware replaced it or the
    client has hung up, holds nothing.

    Takes no lock. `close` may run in the watcher's thread while the server's thread is in `__next__`. Two orders
    matter:

    - `__next__` reads `_client` before `_ended`, and `close` writes `_ended` before it removes the client, so a stream
      that was closed does not subscribe a second time.
    - `_open` writes `_client` before it reads `_ended`, so a client that subscribes during `close` is closed by one of
      the two threads. Harmless race: both may close it.
    """

    def __init__(self, manager: SSEManager, request: ServedRequest) -> None:
        self._manager = manager
        self._request = request
        self._client: QueueClient | None = None
        self._watch: Watch | None = None
        self._buffering: BufferingCheck | None = None  # until it has answered
        self._ended = False
        self._dropped: Dropped | None = None

    def __next__(self) -> bytes:
        client = self._client  # before `_ended`: see the class
        if self._ended:
            raise StopIteration
        if client is None:
            try:
                client = self._open()
            except BusyError as busy:
                return self._refuse(busy.reason)
        watch = self._watch
        if watch is not None:
            watch.busy_since = None
        if self._buffering is not None:
            self._end_if_buffered(client, self._buffering)
        block = next(client)
        if watch is not None:
            watch.busy_since = time.monotonic()
        return block

    def __iter__(self) -> AttachedStream:
        return self

    def close(self) -> None:
        """End the stream. Called by the server at the end of the response, and by the watcher when the client has left.

        Idempotent. Any thread.
        """
        self._ended = True
        # Each attribute is cleared only after its object was closed, so that a second call completes an interrupted
        # one.
        client, watch = self._client, self._watch
        if client is not None:
            client.close()
            self._client = None
        if watch is not None:
            if client is not None and client.farewell == "shutdown":
                watch.end_connection()
            watcher.get().remove(watch)
            self._watch = None

    def drain(self) -> None:
        """Called by the watcher when the server is stopping."""
        process_of(self._manager).drain()

    def _refuse(self, reason: BusyReason) -> bytes:
        """Open no stream. Returns the only block of the response, the ``sse_busy``."""
        self.close()
        block = process_of(self._manager).busy_block(reason, self._request.stream.last_event_id)
        return GZIP_START + stored(block) if self._request.stream.gzipped else block

    def _open(self) -> QueueClient:
        """Subscribe. Raises `BusyError`."""
        asked = self._request
        if not descriptors.get().take():
            end_connection(asked.server)  # a connection that is kept alive would go on using a file descriptor
            raise BusyError("limit")
        self._hold()
        try:
            client = process_of(self._manager).subscribe(asked.stream)
        except (BackendError, ClosedError, TooManyClientsError) as error:
            if isinstance(error, TooManyClientsError):
                watcher.get().warn_of_limit(error)
            raise BusyError(refusal_reason(error)) from None
        self._client = client
        # A middleware may drop this object without closing it, and a signal handler may interrupt `close`.
        self._dropped = Dropped(self, client.close)
        if asked.resumes and client.missed is not None:
            # What the client has missed was evicted since `resumes` was found out. It reconnects and gets the snapshot.
            raise BusyError("backend")
        if self._ended:  # the watcher saw the client leave before there was a client to close: see the class
            self.close()
        return client

    def _hold(self) -> None:
        """Keep the server's thread for this stream, and watch it. Raises `BusyError` if other requests need it."""
        server, process = self._request.server, process_of(self._manager)
        if not process.has_server:
            if server.fd is not None:  # a real server, in a test that holds the time
                raise BusyError("draining")
            return
        options = process.options
        self._watch = Watch(self, server, options.send_timeout)
        if not self._request.stream.poll:  # a poll reaches its client even if it is held back until its end
            self._buffering = BufferingCheck(self._watch)
        if not watcher.get().add(self._watch, _max_threads(server, options.transport)):
            raise BusyError("threads")

    def _end_if_buffered(self, client: QueueClient, check: BufferingCheck) -> None:
        """End the stream after what is queued, if it is held back: its client gets that then, and reconnects."""
        passed_on = check.is_passed_on()
        if passed_on is not None:
            self._buffering = None
        if passed_on is False:
            watcher.get().warn_of_buffering()
            client.end(BUFFERED)


def _max_threads(server: ServerInfo, transport: str) -> float:
    """Return how many of the server's threads attached streams may hold."""
    threads = server.threads
    if threads is None:
        return math.inf
    if threads == 1:
        return 0
    # An app that has not asked for attached streams does not expect that a few of them stop the site.
    return max(threads // 2, threads - FREE_THREADS) if transport == "auto" else math.inf


class BusyError(Exception):
    """The stream cannot be opened now, for this reason."""

    def __init__(self, reason: BusyReason) -> None:
        super().__init__(reason)
        self.reason = reason
