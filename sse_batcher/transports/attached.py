"""Attached: the server's worker thread that serves the request drives the stream, for as long as it is open.

Run by one thread, the server's, but for `close` and `drain`, which the watcher calls, too.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..errors import BackendError, ClosedError, TooManyClientsError
from ..manager import SSEManager
from ..reasons import BusyReason, ByeReason
from ..streams.client import QueueClient
from ..streams.hub import Snapshot
from .descriptors import descriptors
from .server import ServerInfo
from .watcher import Watch, end_connection, watcher


class Request(NamedTuple):
    """What a stream is asked for, and where.

    `resumes`: no snapshot was taken, since the client would have missed nothing. `ticket`: a kick after it counts.
    """

    channels: tuple[str, ...]
    server: ServerInfo
    last_event_id: str | None = None
    batches: bool = True
    snapshot: Snapshot | None = None
    resumes: bool = False
    user: str | int | None = None
    ticket: int | None = None


BUFFERED: ByeReason = "buffered"
"""Why a stream ends that is held back on its way to the client."""

LATER = 2.0
"""Seconds after which a server that writes in another thread must have written something."""


class Passage:
    """Whether what a stream hands out leaves the server. By the driver.

    A block has to be passed on before the next one is asked for, as PEP 3333 demands of servers and middleware. A
    function that reads the whole body asks on and on, for a body that has no end; a compressor may gather for long.
    """

    def __init__(self, watch: Watch, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch = watch
        self._clock = clock
        self._written: int | None = None
        self._since = 0.0
        self._pieces = 2
        """How many have to be seen to leave. The first may be the head of the response alone."""

    def is_free(self) -> bool | None:
        """To be asked at each step, before the next block is handed out. None if it is too early to tell.

        True, too, if nobody can tell.
        """
        found, before, now = self._watch.written(), self._written, self._clock()
        if found is None:
            return True
        written, all_taken = found
        if before is None or written != before:
            self._written, self._since = written, now
            self._pieces -= before is not None
            return True if self._pieces == 0 else None
        # If the client takes nothing, such a server gathers what it cannot write.
        if self._watch.server.writes_later and (now - self._since < LATER or not all_taken):
            return None
        return False


class AttachedStream(Iterator[bytes]):
    """A WSGI iterable: the bytes of one stream.

    It subscribes in its first step. A response that is never iterated, because a middleware replaced it or the client
    has hung up, holds nothing.
    """

    def __init__(self, manager: SSEManager, request: Request) -> None:
        self._manager = manager
        self._request = request
        self._client: QueueClient | None = None
        self._watch: Watch | None = None
        self._passage: Passage | None = None
        self._ended = False
        self._finalizer: weakref.finalize[..., AttachedStream] | None = None

    def __next__(self) -> bytes:
        client = self._client  # before the look at `_ended`, which the watcher sets before it takes the client away
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
        if self._passage is not None:
            self._end_if_buffered(client, self._passage)
        block = next(client)
        if watch is not None:
            watch.busy_since = time.monotonic()
        return block

    def __iter__(self) -> AttachedStream:
        return self

    def close(self) -> None:
        """Called by the server at the end, whatever happened, and by the watcher when the client has left."""
        self._ended = True
        # Each is forgotten after it is closed, which may be done twice: the next call does what is interrupted here.
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
        """The server is stopping."""
        self._manager.drain()

    def _refuse(self, reason: BusyReason) -> bytes:
        """End without a stream. Returns the only block."""
        self.close()
        return self._manager.busy_block(reason, self._request.last_event_id)

    def _open(self) -> QueueClient:
        asked = self._request
        if not descriptors.get().take():
            end_connection(asked.server)  # which would take a descriptor until the server closes it
            raise BusyError("limit")
        self._hold()
        try:
            # Not by a `cast`: a call between the two has room for a signal handler, and its exception would lose it.
            client: QueueClient = self._manager.subscribe(  # type: ignore[assignment]
                asked.channels,
                asked.last_event_id,
                batches=asked.batches,
                snapshot=asked.snapshot,
                user=asked.user,
                ticket=asked.ticket,
            )
        except ClosedError:
            raise BusyError("draining") from None
        except TooManyClientsError as error:
            watcher.get().tell_of_limit(error)
            raise BusyError("limit") from None
        except BackendError:
            raise BusyError("backend") from None
        self._client = client
        # Whatever becomes of this: a middleware may drop it, and a signal handler may interrupt its `close`.
        self._finalizer = weakref.finalize(self, client.close)
        self._finalizer.atexit = False
        if asked.resumes and client.missed is not None:
            # What it has not got was evicted since then. It comes back for the snapshot.
            raise BusyError("backend")
        if self._ended:  # the watcher saw the client leave when there was nothing to close yet
            self.close()
        return client

    def _hold(self) -> None:
        """Let the stream have the server's thread, and be watched. Raises `BusyError` if others need that thread."""
        server = self._request.server
        self._watch = Watch(self, server, self._manager.send_timeout)
        self._passage = Passage(self._watch)
        if not watcher.get().add(self._watch, _most_held(server, self._manager.transport)):
            raise BusyError("threads")

    def _end_if_buffered(self, client: QueueClient, passage: Passage) -> None:
        """End the stream after what there is, if it is held back: its client gets that then, and comes back."""
        free = passage.is_free()
        if free is not None:
            self._passage = None
        if free is False:
            watcher.get().tell_of_buffering()
            client.end(BUFFERED)


def _most_held(server: ServerInfo, transport: str) -> float:
    """How many of the server's threads streams may hold."""
    if server.threads is None:
        return math.inf
    if server.threads == 1:
        return 0
    # An app that asks for detached streams does not expect that a few attached ones stop the site.
    return server.threads // 2 if transport == "auto" else math.inf


class BusyError(Exception):
    """The stream cannot be opened now."""

    def __init__(self, reason: BusyReason) -> None:
        super().__init__(reason)
        self.reason = reason
