"""A loop without its thread, real connections to it, and what their clients read."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from sse_batcher import SSEManager
from sse_batcher.manager import process_of
from sse_batcher.runtime.process import PerProcess
from sse_batcher.runtime.worker import Owner, Worker
from sse_batcher.transports.detached.loop import (
    LOOP_TICK_SECONDS,
    Adoption,
    Loop,
)
from sse_batcher.transports.detached.takeover import Taken
from sse_batcher.wire import chunk

from .clock import Clock
from .delivery import Delivery
from .sse_parser import ServerEvent, parse
from .waiting import TIMEOUT


class Stopping:
    """A server that stops when a test says so, and a manager that counts how often it was drained."""

    def __init__(self) -> None:
        self.stopping = False
        self.drained = 0
        self.manager: Any = SimpleNamespace(_process=PerProcess(lambda: self))
        """A manager whose part of this process is this object."""

    def is_stopping(self) -> bool:
        return self.stopping

    def drain(self) -> None:
        self.drained += 1


class SteppedWorker(Worker):
    """A worker without a thread: the test takes its turns."""

    can_start = True

    def __init__(self, owner: Owner, name: str) -> None:
        super().__init__(owner, name)
        self.owner = owner  # also after it is dropped by all others
        self.name = name

    def ensure(self) -> bool:
        return self.can_start


class SteppedLoop(Loop):
    """A loop without threads."""

    def __init__(self, clock: Callable[[], float], **options: Any) -> None:
        self.workers: list[SteppedWorker] = []
        super().__init__(clock, make_worker=self._make_worker, **options)

    def _make_worker(self, owner: Owner, name: str) -> Worker:
        self.workers.append(SteppedWorker(owner, name))
        return self.workers[-1]

    def run(self) -> None:
        """Until there is nothing left to do at this time."""
        self.turn(0)
        while self._running or self._inbox or self._epoll.poll(0) or self.replays():
            self.turn(0)

    def replays(self) -> bool:
        """Let the threads that replay have their turn. Returns whether anything came of it."""
        for worker in self.workers:
            if worker.owner is not self:
                worker.owner.work()
        return bool(self._inbox)


class Site:
    """A hub, a loop, and clients at the other end of its connections."""

    def __init__(self, *, loop: dict[str, Any] | None = None, **options: Any) -> None:
        self.clock = Clock()
        history = options.pop("history", None)
        self.delivery = Delivery(history, clock=self.clock, **options)
        self.hub = self.delivery.hub
        self.loop = SteppedLoop(self.clock, **(loop or {}))
        self.server: Any = Stopping()
        self._sockets: list[socket.socket] = []

    def connect(
        self,
        *channels: str,
        cursor: str | None = None,
        batches: bool = True,
        chunked: bool = False,
        small: bool = False,
    ) -> socket.socket:
        """The client's end of a stream that is detached, after its first block. `small`: its buffers hold little."""
        client = self.hub.connect(channels or ("default",), cursor, batches=batches)
        first = next(client)
        ours, theirs = socket.socketpair()
        self._sockets.append(theirs)
        theirs.setblocking(False)
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        taken = Taken(ours.detach(), chunk(first) if chunked else first, chunked)
        self.loop.adopt(Adoption(self.hub, self.server.manager, client, taken, self.server))
        self.loop.run()
        assert theirs.recv(len(taken.unsent)) == taken.unsent
        return theirs

    def deliver(self, times: int = 1, data: Any = None, channel: str = "default") -> None:
        self.delivery.deliver(times, data, channel)
        self.loop.run()

    def wait(self, seconds: float) -> None:
        """As long as there are ticks for."""
        for _ in range(round(seconds / LOOP_TICK_SECONDS)):
            self.clock.now += LOOP_TICK_SECONDS
            self.loop.run()

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()
        self.loop.run()
        assert len(self.loop) == 0
        assert self.loop.feeds == {}
        assert self.hub.is_empty()
        self.loop.let_go()


def read(connection: socket.socket) -> bytes:
    """All there is."""
    data = b""
    with suppress(BlockingIOError):
        while part := connection.recv(1_000_000):
            data += part
    return data


def has_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def events(connection: socket.socket) -> list[ServerEvent]:
    return list(parse(read(connection)))


def numbers(connection: socket.socket) -> list[Any]:
    return [json.loads(event.data) for event in events(connection)]


def read_again(site: Site, client: socket.socket) -> list[Any]:
    """All that comes while the loop goes on."""
    data = b""
    while part := read(client):
        data += part
        site.loop.run()
    return [json.loads(event.data) for event in parse(data) if event.type == "t"]


class Threaded:
    """A manager, and a loop with its thread."""

    def __init__(self) -> None:
        self.manager = SSEManager(batching=False)
        self.loop = Loop()

    def connect(self) -> socket.socket:
        client = self.manager.subscribe()
        first = next(client)
        ours, theirs = socket.socketpair()
        theirs.settimeout(TIMEOUT)
        server: Any = Stopping()
        hub = process_of(self.manager).hub
        assert self.loop.can_run()
        self.loop.adopt(Adoption(hub, self.manager, client, Taken(ours.detach(), first, False), server))
        assert theirs.recv(1_000) == first
        return theirs
