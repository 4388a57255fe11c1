"""Attached: the server's worker thread that serves the request drives the stream, for as long as it is open.

Run by one thread, the server's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ..client import Client
from ..errors import ClosedError
from ..hub import Snapshot
from ..manager import SSEManager


class Socket(Protocol):
    """What is needed of a server's socket."""

    def gettimeout(self) -> float | None: ...

    def settimeout(self, value: float | None, /) -> None: ...


class Request(NamedTuple):
    """What a stream is asked for. `socket` is the connection, where the server shows it.

    `resumes`: no snapshot was taken, since the client would have missed nothing.
    """

    channels: tuple[str, ...]
    last_event_id: str | None = None
    batches: bool = True
    snapshot: Snapshot | None = None
    resumes: bool = False
    socket: Socket | None = None


class AttachedStream(Iterator[bytes]):
    """A WSGI iterable: the bytes of one stream.

    It subscribes in its first step. A response that is never iterated, because a middleware replaced it or the client
    has hung up, holds nothing.
    """

    def __init__(self, manager: SSEManager, request: Request) -> None:
        self._manager = manager
        self._request = request
        self._client: Client | None = None
        self._ended = False
        self._patience: float | None = None  # of the socket, as it was before

    def __next__(self) -> bytes:
        if self._ended:
            raise StopIteration
        if self._client is None:
            asked = self._request
            try:
                self._client = self._manager.subscribe(
                    asked.channels, asked.last_event_id, batches=asked.batches, snapshot=asked.snapshot
                )
            except ClosedError:
                self._ended = True
                return self._manager.busy_block("draining", asked.last_event_id)
            if asked.resumes and self._client.gaps:
                # What it has not got was evicted since then. It comes back for the snapshot.
                self.close()
                return self._manager.busy_block("backend", asked.last_event_id)
            if asked.socket is not None:
                # A client that takes nothing would hold this thread in the server's send for ever.
                self._patience = asked.socket.gettimeout()
                asked.socket.settimeout(self._manager.send_timeout)
        return next(self._client)

    def __iter__(self) -> AttachedStream:
        return self

    def close(self) -> None:
        """Called by the server at the end, whatever happened. Idempotent."""
        self._ended = True
        client, self._client = self._client, None
        if client is not None:
            client.close()
            if self._request.socket is not None:
                self._request.socket.settimeout(self._patience)  # the connection may serve further requests
