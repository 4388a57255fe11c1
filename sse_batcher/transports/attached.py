"""Attached: the server's worker thread that serves the request drives the stream, for as long as it is open.

Run by one thread, the server's.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..client import Client
from ..errors import ClosedError
from ..manager import SSEManager


class AttachedStream(Iterator[bytes]):
    """A WSGI iterable: the bytes of one stream.

    It subscribes in its first step. A response that is never iterated, because a middleware replaced it or the client
    has hung up, holds nothing.
    """

    def __init__(self, manager: SSEManager, channels: tuple[str, ...], last_event_id: str | None) -> None:
        self._manager = manager
        self._channels = channels
        self._last_event_id = last_event_id
        self._client: Client | None = None
        self._ended = False

    def __next__(self) -> bytes:
        if self._ended:
            raise StopIteration
        if self._client is None:
            try:
                self._client = self._manager.subscribe(self._channels, self._last_event_id)
            except ClosedError:
                self._ended = True
                return self._manager.busy_block("draining", self._last_event_id)
        return next(self._client)

    def __iter__(self) -> AttachedStream:
        return self

    def close(self) -> None:
        """Called by the server at the end, whatever happened. Idempotent."""
        self._ended = True
        if self._client is not None:
            self._client.close()
