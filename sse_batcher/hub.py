"""The hub: which clients get which frames.

`deliver` is called by one thread at a time, the backend's; everything else from any thread. `_lock` guards the
clients, their channels and the head of the history. Frames are queued outside it.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from . import wire
from .client import Client, ClientInfo
from .errors import ClosedError
from .event import BROADCAST
from .options import ClientOptions


class Cursors(Protocol):
    """What a backend says about positions. They rise in the order of delivery, and only the backend looks inside."""

    start: Any
    """The position before the first frame."""

    def format(self, position: Any) -> str:
        """The id that stands for a position."""

    def read(self, cursor: str) -> Any | None:
        """The position that a client's cursor stands for, None if it is not one of this history's."""

    def normalize(self, cursor: str) -> str | None:
        """A well-formed cursor, of this history or another, made anew from its parts. None for anything else."""


class Hub:
    """The open clients of one process."""

    def __init__(
        self,
        options: ClientOptions,
        cursors: Cursors,
        *,
        on_connect: Callable[[ClientInfo], None],
        on_disconnect: Callable[[ClientInfo, str], None],
    ) -> None:
        self._options = options
        self._cursors = cursors
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._lock = threading.Lock()
        # Notified after a client has left. It has a lock of its own, since waiting lets a lock go without a look at
        # `_leaving`. Taken before `_lock`, never inside it.
        self._left = threading.Condition()
        self._clients: dict[Client, None] = {}
        self._channels: dict[str, dict[Client, None]] = {}
        self._head = cursors.start
        self._closed = False
        self._numbers = itertools.count(1)
        # Clients to be forgotten, and why. Leaving must not wait for the lock: the garbage collector may end a stream
        # on a thread that holds it. Whoever holds it forgets them before it is let go, or right after.
        self._leaving: deque[tuple[Client, str]] = deque()
        # What clients that have left had counted.
        self._frames = self._bytes = self._overflows = 0

    def deliver(self, frame: wire.Frame) -> None:
        """Queue a frame for the clients of its channel."""
        channel = frame.batch.channel
        with self._locked():
            self._head = frame.position
            clients = list(self._clients if channel == BROADCAST else self._channels.get(channel, ()))
        for client in clients:
            client.offer(frame)

    def connect(self, channels: tuple[str, ...], cursor: str | None) -> Client:
        """Add a client, live from the head on. Raises `ClosedError` after `close`."""
        client = Client(self, self._options, ClientInfo(next(self._numbers), channels))
        with self._locked():
            if self._closed:
                raise ClosedError("this manager was shut down and takes no more clients")
            # Under one lock with the head: a frame is either before the head, or queued.
            client.position = self._head
            self._clients[client] = None
            for channel in channels:
                self._channels.setdefault(channel, {})[client] = None
        # There is no history yet: only who has everything can be resumed.
        if not cursor or self._cursors.read(cursor) == client.position:
            client.first_block = self._control("sse_open", client.position, heartbeat=self._options.heartbeat)
        else:
            client.first_block = self._gap(client.position, "no_history")
        self._on_connect(client.info)
        return client

    def busy_block(self, reason: str, cursor: str | None) -> bytes:
        """The only block of a stream that cannot be served now."""
        id = self._cursors.normalize(cursor) if cursor else None
        return wire.control("sse_busy", {"reason": reason}, retry=self._retry_ms(), id=id)

    def close(self, reason: str) -> None:
        """Take no more clients, and let all streams end after what is queued for them."""
        with self._locked():
            self._closed = True
            clients = list(self._clients)
        for client in clients:
            client.end(reason)

    def wait_until_left(self, timeout: float | None) -> bool:
        """Wait until every client that another thread drives has left. One that nobody iterates is not waited for."""
        me = threading.get_ident()

        def have_left() -> bool:
            while True:
                with self._lock:
                    answer = all(client.driver in (None, me) for client in self._clients)
                if not self._leaving:
                    return answer
                self._forget_leaving()  # somebody came while we held the lock: look again

        with self._left:
            return self._left.wait_for(have_left, timeout)

    def count(self) -> dict[str, int]:
        """Counters over all clients, those that have left included."""
        with self._locked():
            return {
                "clients": len(self._clients),
                "frames": self._frames + sum(client.frames for client in self._clients),
                "bytes": self._bytes + sum(client.bytes for client in self._clients),
                "overflows": self._overflows + sum(client.overflows for client in self._clients),
            }

    # -- for clients ---------------------------------------------------------------------------------------------------

    def catch_up(self, client: Client) -> bytes:
        with self._locked():
            client.go_live(self._head)
        return self._gap(client.position, "overflow")

    def farewell(self, client: Client, reason: str) -> bytes:
        return self._control("sse_bye", client.position, reason=reason)

    def remove(self, client: Client, reason: str) -> None:
        self._leaving.append((client, reason))
        self._forget_leaving()

    # -- internal ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield
        if self._leaving:
            self._forget_leaving()

    def _forget_leaving(self) -> None:
        # Looks again after the lock was let go: somebody may have failed to get it in between.
        while self._leaving and self._lock.acquire(blocking=False):
            gone = []
            try:
                while self._leaving:
                    client, reason = self._leaving.popleft()
                    if client in self._clients:
                        self._forget(client)
                        gone.append((client.info, reason))
            finally:
                self._lock.release()
            for info, reason in gone:
                self._on_disconnect(info, reason)
            with self._left:
                self._left.notify_all()

    def _forget(self, client: Client) -> None:
        del self._clients[client]
        for channel in client.channels:
            members = self._channels[channel]
            del members[client]
            if not members:
                del self._channels[channel]
        self._frames += client.frames
        self._bytes += client.bytes
        self._overflows += client.overflows

    def _gap(self, position: Any, reason: str) -> bytes:
        return self._control("sse_gap", position, heartbeat=self._options.heartbeat, reason=reason)

    def _control(self, event: str, position: Any, **data: Any) -> bytes:
        return wire.control(event, data, retry=self._retry_ms(), id=self._cursors.format(position))

    def _retry_ms(self) -> int:
        if self._options.retry_ms is not None:
            return self._options.retry_ms
        # Browsers have no jitter of their own; and the more they are, the longer their return has to be spread.
        return random.randint(1_000, 2_000 + len(self._clients))
