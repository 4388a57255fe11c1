"""A loop without its thread, real connections to it, and what their clients read."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from sse_batcher import SSEManager
from sse_batcher.event import Audience, Batch, Event, User
from sse_batcher.manager_state import process_of
from sse_batcher.runtime.worker import Owner, Worker
from sse_batcher.streams.client import QueueClient
from sse_batcher.transports.detached.loop import LOOP_TICK_SECONDS, Adoption, Loop
from sse_batcher.transports.detached.takeover import Taken
from sse_batcher.wire import Frame, chunk

from .clock import Clock
from .delivery import Delivery
from .sse_parser import ServerEvent, parse
from .waiting import TIMEOUT


class Stopping:
    """A server that stops when a test says so."""

    def __init__(self) -> None:
        self.stopping = False

    def is_stopping(self) -> bool:
        return self.stopping


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

    def __init__(self, clock: Callable[[], float], *, epoll: Any = None, **options: Any) -> None:
        self.workers: list[SteppedWorker] = []
        self.epoll: Any = select.epoll() if epoll is None else epoll
        super().__init__(clock, make_worker=self._make_worker, make_epoll=lambda: self.epoll, **options)

    def _make_worker(self, owner: Owner, name: str) -> Worker:
        self.workers.append(SteppedWorker(owner, name))
        return self.workers[-1]

    def run(self) -> None:
        """Until there is nothing left to do at this time."""
        self.turn(0)
        while self.is_busy or self.epoll.poll(0) or self.replays():
            self.turn(0)

    def replays(self) -> bool:
        """Let the threads that replay have their turn. Returns whether anything came of it."""
        for worker in self.workers:
            if worker.owner is not self:
                worker.owner.work()
        return self.is_busy


class Site:
    """A hub, a loop, and clients at the other end of its connections."""

    def __init__(self, *, loop: dict[str, Any] | None = None, **options: Any) -> None:
        self.clock = Clock()
        history = options.pop("history", None)
        self.delivery = Delivery(history, clock=self.clock, **options)
        self.hub = self.delivery.hub
        self.loop = SteppedLoop(self.clock, **(loop or {}))
        self.server: Any = Stopping()
        self.manager = SSEManager(batching=False)
        """The manager of all streams, as the loop sees it. The streams are the hub's, and it has none."""
        self._sockets: list[socket.socket] = []

    def connect(
        self,
        *channels: str,
        cursor: str | None = None,
        batches: bool = True,
        chunked: bool = False,
        small: bool = False,
        user: User | None = None,
    ) -> socket.socket:
        """The client's end of a stream that is detached, after its first block. `small`: its buffers hold little.

        Without a channel: of the default channel, or of a user and no channel.
        """
        client = self.delivery.connect(*channels, cursor=cursor, user=user, batches=batches)
        first = next(client)
        unsent = chunk(first) if chunked else first
        theirs = self.hand_over(client, unsent, chunked=chunked, small=small)
        self.loop.run()
        assert theirs.recv(len(unsent)) == unsent
        return theirs

    def hand_over(
        self, client: QueueClient, unsent: bytes, *, chunked: bool = False, small: bool = False
    ) -> socket.socket:
        """Let the loop have this stream soon, with what has to be sent first. Returns the client's end."""
        ours, theirs = socket.socketpair()
        self._sockets.append(theirs)
        theirs.setblocking(False)
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        taken = Taken(ours.detach(), unsent, chunked)
        self.loop.adopt(Adoption(self.hub, self.manager, client, taken, self.server))
        return theirs

    def deliver(self, times: int = 1, data: Any = None, channel: Audience = "default") -> None:
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


@pytest.fixture
def make_site() -> Iterator[Callable[..., Any]]:
    """Makes sites of this kind, with these options, and closes them in the end."""
    sites: list[Site] = []

    def make(kind: type[Site] = Site, **options: Any) -> Site:
        sites.append(kind(**options))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def site(make_site: Callable[..., Site], request: pytest.FixtureRequest) -> Site:
    """A site, whose options a test may give as the parameter of this fixture."""
    return make_site(**getattr(request, "param", {}))


def turns_of(sends: int) -> pytest.MarkDecorator:
    """A site whose loop lets others have their turn after so many sends."""
    options = {"loop": {"sends_per_turn": sends, "turn_seconds": 0}}
    return pytest.mark.parametrize("site", [options], indirect=True, ids=[f"turns-of-{sends}"])


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

    def connect(self, *channels: str) -> socket.socket:
        client = self.manager.subscribe(channels=channels) if channels else self.manager.subscribe()
        first = next(client)
        ours, theirs = socket.socketpair()
        theirs.settimeout(TIMEOUT)
        server: Any = Stopping()
        hub = process_of(self.manager).hub
        assert self.loop.can_run()
        self.loop.adopt(Adoption(hub, self.manager, client, Taken(ours.detach(), first, False), server))
        assert theirs.recv(1_000) == first
        return theirs


@pytest.fixture
def threaded() -> Iterator[Threaded]:
    threaded = Threaded()
    yield threaded
    assert threaded.manager.shutdown(TIMEOUT)


def fail(*_: Any) -> bool:
    """Stand in for a function that fails, or that must not be called."""
    raise ZeroDivisionError


def batched(site: Site, channel: str, count: int) -> Frame:
    """A frame of so many events, which was delivered."""
    site.delivery.position += 1
    position = site.delivery.position
    made = tuple(Event("t", channel, str(number)) for number in range(count))
    frame = Frame(Batch(channel, "t", made, "manual", 0), position, f"x-{position}")
    site.hub.deliver(frame)
    return frame


def has_data(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
