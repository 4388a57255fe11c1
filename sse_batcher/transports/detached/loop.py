"""The loop: one thread a process, which writes to all detached streams.

Any thread hands a connection over by `adopt`, and leaves notes by `post`; everything else runs on the loop's thread. It
is there while there are streams. If it dies it is replaced, and its connections are closed: the clients come back.
"""

from __future__ import annotations

import importlib
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from ...runtime.process import PerProcess
from ...runtime.worker import Worker
from ...streams.client import QueueClient
from ...streams.hub import Hub
from ..server import ServerInfo
from .connection import LEFT, SocketClient, Task
from .feed import Feed, Owner
from .group import AT_ONCE
from .sending import hang_up
from .takeover import Taken, TakeOver

_log = logging.getLogger("sse_batcher.transports.loop")

_resource: Any = importlib.import_module("resource") if os.name == "posix" else None  # there where there is epoll

TICK = 0.2
"""Seconds between two looks at whether the server is stopping, and at the time."""

ROUND = 2.0
"""Seconds in which each connection is looked at once."""

TURN = 0.002
"""Seconds of sending after which it is looked what has happened meanwhile. That lets go of the interpreter's lock for
an instant. Who waits for it cannot wake up in so short a time, but counts anew the 5 ms after which he takes it by
force: he gets it in the pauses, and not beside them."""

PAUSE = 0.00005
"""Seconds in which other threads get the lock. They have to wake up first."""

OFTEN, SELDOM = 0.0005, 0.008
"""Seconds from one pause to the next, while others want the lock and while they do not. A pause takes as long as ten
sends."""

MOST_KEPT = 67_108_864
"""Bytes that may wait for clients which take nothing, in all, of what is kept for each of them alone."""

COURTESY = 0.05
"""Seconds for which it is remembered that others want it."""


class GilYielder:
    """When to pause between sends, so that other threads of the process get on.

    A request takes the interpreter's lock several times, and waits for the next pause each time. So there are many
    while somebody uses them: who has the lock when a pause is over keeps this thread waiting once more, and the system
    counts how often a thread waits.

    Who computes without pause has the lock for all of a switch interval, 5 ms; then the sends may take as long.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = 0.0
        self._used_at = -COURTESY

    def begin(self) -> None:
        """After a wait for something to do, in which others could have the lock."""
        now = self._clock()
        self._next = now + self._interval(now)

    def pause(self) -> bool:
        """After a slice: pause if it is time to. Whether it was."""
        began = self._clock()
        if began < self._next:
            return False
        switches = _switches()
        time.sleep(PAUSE)
        ended = self._clock()
        if _switches() > switches + 1:
            self._used_at = ended
        self._next = ended + max(self._interval(ended), min(ended - began, SELDOM))
        return True

    def _interval(self, now: float) -> float:
        return OFTEN if now - self._used_at < COURTESY else SELDOM


def _switches() -> int:
    """How often this thread has waited."""
    return int(_resource.getrusage(_resource.RUSAGE_THREAD).ru_nvcsw)


class Adoption(NamedTuple):
    """A connection that comes to the loop."""

    hub: Hub
    owner: Owner
    client: QueueClient
    taken: Taken
    server: ServerInfo


class Loop:
    """The detached streams of one process. `clock` is in seconds, from any start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.sends = 0
        self._connections: dict[int, SocketClient] = {}
        self._feeds: dict[Hub, Feed] = {}
        self._inbox: deque[Adoption | Task] = deque()  # its single steps are atomic
        self._attended: dict[TakeOver, None] = {}  # the same
        self._running: deque[tuple[Task, Iterator[None]]] = deque()
        self.kept: dict[SocketClient, int] = {}
        self._kept_bytes = 0
        self._told_of_kept = False
        self._server: ServerInfo | None = None  # of the newest stream: one process, one server
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._rung = False
        self._yielder = GilYielder(clock)
        self._next_tick = 0.0
        self._round: Iterator[SocketClient] = iter(())
        self._parked = True  # the thread is not there, or about to end; by the thread, so that it cannot be left wrong
        self._worker = Worker(self, "sse_batcher-loop")
        self._worker.stop()  # its thread ends whenever no stream is left, and is started by the next one

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def restarts(self) -> int:
        """How often the dead thread was started again."""
        return self._worker.restarts

    @property
    def turn_is_over(self) -> bool:
        return self.sends >= AT_ONCE

    # -- any thread ----------------------------------------------------------------------------------------------------

    def can_run(self) -> bool:
        """Whether there is a thread, or can be: there is none any more when the process ends."""
        if self._parked:
            self._worker.wake()
        return self._worker.ensure()

    def adopt(self, adoption: Adoption) -> None:
        """Go on with this stream, whose client nobody else drives from now on."""
        self.post(adoption)

    def post(self, item: Adoption | Task) -> None:
        """Have it served soon. Never waits."""
        self._inbox.append(item)
        # The note first: who finds the bell rung has been in time, since the thread clears that before it looks.
        if not self._rung:
            self._rung = True
            os.eventfd_write(self._bell, 1)
        if self._parked:
            self.can_run()

    def attend(self, takeover: TakeOver) -> None:
        """See to it that a server whose connection is about to be taken over gets on. Never waits."""
        self._attended[takeover] = None
        if self._parked:
            self.can_run()

    def release(self, takeover: TakeOver) -> None:
        """The server's thread goes on with it."""
        self._attended.pop(takeover, None)

    # -- for connections, groups and feeds -----------------------------------------------------------------------------

    def watch(self, connection: SocketClient, *, for_room: bool) -> None:
        events = select.EPOLLRDHUP | (select.EPOLLOUT if for_room else 0)
        self._epoll.modify(connection.fd, events)

    def keep(self, connection: SocketClient, size: int) -> None:
        self._kept_bytes += size - self.kept.pop(connection, 0)
        if size:
            self.kept[connection] = size
        while self._kept_bytes > MOST_KEPT and len(self.kept) > 1:
            if not self._told_of_kept:
                self._told_of_kept = True
                _log.warning(
                    "%d bytes wait for clients that take nothing: those that have stalled for longest are closed",
                    self._kept_bytes,
                )
            next(iter(self.kept)).close(LEFT)

    def forget(self, connection: SocketClient) -> None:
        del self._connections[connection.fd]
        self._kept_bytes -= self.kept.pop(connection, 0)
        with suppress(OSError):
            # Not left to the end of the descriptor: a child that was forked may have it, too.
            self._epoll.unregister(connection.fd)
        connection.group.shrink()
        hub = connection.group.hub
        if not self._feeds[hub].channels:
            del self._feeds[hub]

    def start(self, item: Task, steps: Iterator[None]) -> None:
        try:
            for _ in steps:
                self._running.append((item, steps))
                return
        except Exception:
            self.lose(item)

    def lose(self, item: Task) -> None:
        _log.exception("a detached stream failed: it is closed, and its client comes back")
        for connection in [item] if isinstance(item, SocketClient) else self._connections_of(item):
            connection.close(LEFT)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`."""
        if self._is_idle():
            self._parked = True
            if self._is_idle():
                return None
        self._parked = False
        try:
            self.turn(TICK)
        except BaseException:
            self._give_up()
            raise
        return 0.0

    def turn(self, patience: float) -> None:
        """Wait up to `patience` seconds for something to do, and do some of it."""
        busy = self._running or self._inbox
        happened = self._epoll.poll(0 if busy else patience)
        if not happened:
            self._rung = False  # also if a caller was interrupted between the flag and the bell
        if not busy:
            self._yielder.begin()
        for fd, events in happened:
            if fd == self._bell:
                os.eventfd_read(fd)
                self._rung = False
            else:
                self._tell(self._connections[fd], events)
        while self._inbox:
            item = self._inbox.popleft()
            found = self._take_in(item) if isinstance(item, Adoption) else item
            if found is not None:
                self._running.append((found, found.serve()))
        now = self.clock()
        if now >= self._next_tick:
            self._next_tick = now + TICK
            self.tick(now)
        while self._running:
            self.start(*self._running.popleft())
            if self.turn_is_over:
                self.sends = 0
                if self._yielder.pause() or self.clock() >= now + TURN:
                    return

    def tick(self, now: float) -> None:
        """Look at the time that is left, and at whether the server is stopping."""
        if self._server is not None and self._server.is_stopping():
            self._server = None  # once only: the managers may open again while some of these streams are still there
            for feed in list(self._feeds.values()):
                feed.owner.drain()
        for feed in list(self._feeds.values()):
            feed.look(now)
        for takeover in list(self._attended):
            if not takeover.relieve():
                self.release(takeover)  # its stream was dropped
        # Some at each tick, all in a round.
        some = list(islice(self._round, 1 + int(len(self._connections) * TICK / ROUND)))
        if not some:
            self._round = iter(list(self._connections.values()))
        for connection in some:
            try:
                connection.look(now)
            except Exception:
                self.lose(connection)

    def _is_idle(self) -> bool:
        return not (self._connections or self._inbox or self._running or self._attended)

    def _tell(self, connection: SocketClient, events: int) -> None:
        if connection.dismissed == LEFT:
            return  # told already, and only its group keeps it
        if events & ~select.EPOLLOUT:
            connection.dismissed = LEFT
        else:
            connection.has_room()
        self._running.append((connection, connection.serve()))

    def _take_in(self, adoption: Adoption) -> SocketClient | None:
        """None if the client has left meanwhile."""
        hub, owner, client, taken, self._server = adoption
        is_here = False
        try:
            feed = self._feeds.get(hub) or Feed(self, hub, owner, client)
            group = feed.group_of(client, chunked=taken.chunked)
            connection = SocketClient(client, group, taken)
            is_here = hub.replace(client, connection, feed)
        except Exception:
            _log.exception("a stream cannot be taken in: it is closed, and its client comes back")
            client.close()
        if not is_here:
            hang_up(taken.fd)
            return None
        self._feeds[hub] = feed
        group.grow()
        self._connections[taken.fd] = connection
        try:
            _prepare(taken.fd)
            self._epoll.register(taken.fd, select.EPOLLRDHUP)
        except OSError as error:
            _log.warning("a detached stream cannot be watched, and is closed: %s", error)
            connection.close(LEFT)
        return connection

    def _connections_of(self, item: Task) -> list[SocketClient]:
        """Of a group, or of a feed."""
        return [
            connection for connection in self._connections.values() if item in (connection.group, connection.group.feed)
        ]

    def _give_up(self) -> None:
        """The last act of a thread that dies: whose streams it has left in the middle is not known."""
        for hub in self._feeds:
            hub.count_thread_restart()
        self._running.clear()
        for connection in list(self._connections.values()):
            connection.close(LEFT)

    # -- a forked child ------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Close what a child has inherited: as long as it is open here, no client sees the end of its stream there."""
        adoptions = [item.taken.fd for item in self._inbox if isinstance(item, Adoption)]
        for fd in (*self._connections, *adoptions, self._bell):
            with suppress(OSError):
                os.close(fd)
        for takeover in list(self._attended):
            takeover.drop()
        self._epoll.close()


def _prepare(fd: int) -> None:
    """Set the modes of a connection that is ours."""
    os.set_blocking(fd, False)
    connection = socket.socket(fileno=fd)
    try:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    finally:
        connection.detach()


loop = PerProcess(Loop)
"""This process's."""


def _let_go_of_parents() -> None:
    for parents in loop.left_behind():
        parents.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_parents)
