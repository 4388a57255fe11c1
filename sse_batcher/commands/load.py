"""`load`: opens many streams of one site from one process, and measures what they get.

One thread, with sockets that do not block.
"""

from __future__ import annotations

import resource
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..parser import Block
from ..remote.message import RemoteError, Request, json_object
from ..remote.url import without_token
from .load_client import EndedError, LoadClient, Memo, RefusedError
from .load_tally import Seen, Tally, losses, report

OPENING_AT_ONCE = 100
"""How many connections wait for their first block at the same time."""
OPEN_SECONDS = 10.0
"""How long a stream may take to open."""
OTHER_FILES = 64
"""File descriptors that the process needs beside those of its clients."""
LATEST_MS = 10**14
"""A time of a batch that is not credible, in milliseconds since 1970."""
LATE_SECONDS = 2.0
"""How long the last frames may take, after the end, to reach all clients."""


def raise_limit(clients: int) -> None:
    """Let the process have as many open files as so many clients need. Raises `RemoteError` if it may not."""
    needed = clients + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    try:
        most = needed if hard == unlimited else max(needed, hard)  # more than the hard limit is for root
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        raise RemoteError(
            f"this process may have {hard:,} open files, which is enough for {max(0, hard - OTHER_FILES):,} clients: "
            f"raise the limit (ulimit -n), or ask for fewer clients",
            "arguments",
        ) from None


class Load:
    """One run. `clients` streams are opened, at most `rate` a second, and then kept for `seconds`.

    `progress` is called with a line each `progress_seconds`.
    """

    def __init__(
        self,
        request: Request,
        clients: int,
        rate: float | None,
        seconds: float,
        progress: Callable[[str], None],
        progress_seconds: float,
    ) -> None:
        self.tally = Tally(clients)
        self._request = request
        self._rate = rate
        self._seconds = seconds
        self._progress = progress
        self._progress_seconds = progress_seconds
        self._selector = selectors.DefaultSelector()
        self._context = ssl.create_default_context() if request.tls else None
        self._opening: deque[LoadClient] = deque()  # oldest first; also some that are open by now
        self._clients: dict[int, LoadClient] = {}  # by file descriptor
        self._seen: list[Seen] = []  # by clients that have ended
        self._memo: Memo = {}
        self._to_monotonic = time.monotonic() - time.time()
        self._began = self._cpu = self._next_progress = self._arrived = 0.0

    def run(self) -> None:
        """Open, wait and measure. Raises `RemoteError` if there is no connection at all. Ctrl-C ends it early."""
        family, address = _address(self._request)
        self._began = time.monotonic()
        self._cpu = time.process_time()
        end: float | None = None
        while end is None or time.monotonic() < end:
            now = time.monotonic()
            self._begin(family, address, now)
            self._turn(self._pause(now, end))
            self._give_up(now)
            if end is None and self.tally.settled >= self.tally.wanted:
                end = time.monotonic() + self._seconds
            if end is not None and not self._clients:
                return
        self.tally.frames.is_over = True
        late = time.monotonic() + LATE_SECONDS
        while self._clients and time.monotonic() < min(late, self._arrived + LATE_SECONDS / 4):
            self._turn(0.1)

    def result(self) -> dict[str, Any]:
        """Return what was measured up to now."""
        seconds = time.monotonic() - self._began
        open_ones = [client for client in self._clients.values() if client.is_open]
        seen = [*self._seen, *(_seen(client) for client in open_ones if client.begin)]
        return report(
            self.tally,
            url=without_token(self._request.url),
            seconds=seconds,
            busy=(time.process_time() - self._cpu) / max(seconds, 0.001),
            lost=losses(self.tally.frames, seen),
        )

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()
        self._selector.close()

    # -- one turn ------------------------------------------------------------------------------------------------------

    def _begin(self, family: int, address: Any, now: float) -> None:
        """Begin as many connections as are due."""
        tally = self.tally
        due = tally.wanted if self._rate is None else min(tally.wanted, 1 + int(self._rate * (now - self._began)))
        while tally.begun < due and tally.begun - tally.settled < OPENING_AT_ONCE:
            began = time.monotonic()
            tally.began(began)
            try:
                client = LoadClient(self._request, family, address, self._context, began)
            except OSError as error:
                tally.refused[error.strerror or str(error)] += 1
                continue
            self._clients[client.fd] = client
            self._opening.append(client)
            self._selector.register(client.fd, client.waits_for, client)

    def _pause(self, now: float, end: float | None) -> float:
        """Return how long to wait for the connections, at most."""
        pause = 0.1 if end is None else min(0.1, end - now)
        if self._rate is not None and self.tally.begun < self.tally.wanted:
            pause = min(pause, 1 / self._rate)
        return max(0.0, pause)

    def _turn(self, pause: float) -> None:
        """Wait for the connections, and take what has come."""
        for key, _ in self._selector.select(pause):
            self._go_on(key.data)
        now = time.monotonic()
        if now >= self._next_progress:
            self._next_progress = now + self._progress_seconds
            self._progress(self.tally.progress())

    def _go_on(self, client: LoadClient) -> None:
        waited_for = client.waits_for
        try:
            received, blocks = client.go_on(self._memo)
            at = time.monotonic()
            self.tally.bytes += received
            for block in blocks:
                self._take(client, block, at)
        except RefusedError as error:
            self._drop(client)
            self.tally.refused[str(error)] += 1
        except RemoteError as error:
            self._drop(client)
            (self.tally.ended if client.is_open else self.tally.refused)[str(error)] += 1
            self.tally.open -= client.is_open
        except EndedError as error:
            self._drop(client)
            self.tally.ended[str(error)] += 1
            self.tally.open -= 1
            if client.begin:
                client.is_open = False
                self._seen.append(_seen(client))
        else:
            if client.waits_for != waited_for:
                self._selector.modify(client.fd, client.waits_for, client)

    def _drop(self, client: LoadClient) -> None:
        self._selector.unregister(client.fd)
        del self._clients[client.fd]
        client.close()

    def _give_up(self, now: float) -> None:
        """Drop the clients that have waited too long for their first block."""
        opening = self._opening
        while opening and (opening[0].is_open or opening[0].began < now - OPEN_SECONDS or self._is_gone(opening[0])):
            client = opening.popleft()
            if not client.is_open and not self._is_gone(client):
                self._drop(client)
                self.tally.refused[f"no sse_open within {OPEN_SECONDS:g} s"] += 1

    def _is_gone(self, client: LoadClient) -> bool:
        return self._clients.get(client.fd) is not client

    # -- what comes ----------------------------------------------------------------------------------------------------

    def _take(self, client: LoadClient, block: Block, at: float) -> None:
        kind = block.type
        if kind in {"sse_open", "sse_gap"}:
            if kind == "sse_gap":
                self.tally.gaps[_reason(block)] += 1
            if not client.is_open:
                client.is_open = True
                self.tally.has_opened(client.began, at)
            client.begin, client.last, client.count = block.id if block.has_id else "", "", 0
        elif kind == "sse_busy":
            reason = f"sse_busy {_reason(block)}"
            raise EndedError(reason) if client.is_open else RefusedError(reason)
        elif kind == "sse_bye":
            client.bye = f"sse_bye {_reason(block)}"
        elif not client.begin:
            client.begin = block.id if block.has_id else ""  # the last block of a snapshot
        elif block.has_id:
            self._take_frame(client, block, at)

    def _take_frame(self, client: LoadClient, block: Block, at: float) -> None:
        frames = self.tally.frames
        if block.id not in frames:
            frames.add(block.id, at, self._closed(block))
        if frames.arrived(block.id, at):
            self._arrived = at
            self.tally.received += 1
            client.count += 1
            client.last = block.id

    def _closed(self, block: Block) -> float | None:
        """Return when the server says that it has closed a batch, by our clock; None if it does not say."""
        if not block.type.endswith("_batch"):
            return None
        timestamp: Any = json_object(block.data).get("timestamp")
        is_time = isinstance(timestamp, int) and 0 < timestamp < LATEST_MS
        return timestamp / 1_000 + self._to_monotonic if is_time else None


def _seen(client: LoadClient) -> Seen:
    return Seen(client.begin, client.last, client.count, client.is_open)


def _reason(block: Block) -> str:
    return str(json_object(block.data).get("reason"))[:50]


def _address(request: Request) -> tuple[int, Any]:
    """Return the family and the first address of the host that takes a connection. Raises `RemoteError`."""
    try:
        with socket.create_connection((request.host, request.port), OPEN_SECONDS) as sock:
            return sock.family, sock.getpeername()
    except OSError as error:
        raise RemoteError(
            f"cannot connect to {request.host}, port {request.port}: {error.strerror or error}", "connect"
        ) from error
