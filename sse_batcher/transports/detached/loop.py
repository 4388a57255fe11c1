"""The loop: the one thread of a process that drives all detached streams, that is, writes to their connections.

Any thread hands a connection over with `Loop.adopt` and leaves notes with `Loop.post`. Everything else runs on the
loop's thread. The thread exists while there are detached streams. If it dies, it is replaced, and its connections are
closed, so that their clients reconnect.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeAlias

from ...manager import SSEManager
from ...manager_state import process_of
from ...runtime.dropped import Dropped
from ...runtime.log_fields import log_fields
from ...runtime.log_once import LogOnce
from ...runtime.process import PerProcess
from ...runtime.worker import Owner, Worker
from ...streams.client import QueueClient
from ...streams.counts import LoopCounts
from ...streams.hub import Hub
from ..server import ServerInfo
from .connection import LEFT, SocketClient
from .feed import Feed
from .gil import GilYielder
from .group import Group
from .sending import hang_up
from .takeover import Taken, TakeOver

_log = logging.getLogger("sse_batcher.transports.loop")

Task: TypeAlias = SocketClient | Group | Feed
"""What the loop runs in slices: the steps of its `serve`."""

LOOP_TICK_SECONDS = 0.2
"""Seconds between two checks of the time, and of whether the server is stopping."""

ROUND_SECONDS = 2.0
"""Seconds within which each client is checked once. At each tick, a part of them is. A new client is checked in the
round after the one in which it has come."""

SENDS_PER_TURN = 100
"""Maximum number of sends before other groups get their turn and, if it is time, other threads get the GIL."""

TURN_SECONDS = 0.002
"""Maximum time spent sending between two polls, in seconds.

A poll releases the GIL for an instant. Another thread that waits for the GIL cannot wake up in so short a time, but its
switch interval (5 ms) starts again from zero. So it gets the GIL in the pauses of the `GilYielder`, and does not take
it by force in between."""

GATHER_SECONDS = 0.002
"""After streams were handed over, how long the loop lets further ones come before it looks at them, in seconds.

Otherwise, while many streams open, each one would wake the loop's thread, which then competes with the threads of the
server for the GIL. Everything else wakes it at once."""

MAX_KEPT_BYTES = 67_108_864
"""Maximum number of bytes, in all, that are kept for single clients until their sockets take them."""


class Adoption(NamedTuple):
    """A stream that is handed over to the loop.

    `client`: the attached client, which the thread that calls `Loop.adopt` does not use any more. `taken`: its
    connection.
    """

    hub: Hub
    manager: SSEManager
    client: QueueClient
    taken: Taken
    server: ServerInfo


class Loop:
    """The detached streams of one process.

    `clock` gives seconds, from any start. `sends_per_turn` and `turn_seconds` limit how long others wait for their
    turn, `max_kept_bytes` what is kept for slow clients. `make_worker` makes the threads: that of the loop, and one for
    each hub that replays. `make_epoll` is for tests. Raises `OSError` if there are no file descriptors left.

    Takes no lock. The methods under "any thread" may be called by any thread. These attributes are used without a lock:

    - `_inbox` and `_attended`: other threads add, the loop's thread removes, each in one atomic step of the container.
    - `_rung` is True while the bell (an eventfd in the epoll) has been rung and not yet heard. `post` appends its note
      before it reads the flag, and `turn` clears the flag before it looks at the inbox, so no note is overlooked.
      Harmless race: two threads may both ring.
    - `_gathers_until` is a time as long as the loop looks at its inbox by then anyway, so that `adopt` need not ring.
      Otherwise, it is None. Only the thread writes it. As above, `adopt` appends its note before it reads this, and
      `turn` clears it before it looks at the inbox.
    - `_parked` is True while the thread does not exist or is about to end. Only the thread writes it, so that an
      interrupted caller cannot leave it wrong. The thread looks for work after it has set it, and callers read it after
      they have added work, so either the thread goes on or the caller starts another one. Harmless race: both do.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        sends_per_turn: int = SENDS_PER_TURN,
        turn_seconds: float = TURN_SECONDS,
        max_kept_bytes: int = MAX_KEPT_BYTES,
        make_worker: Callable[[Owner, str], Worker] = Worker,
        make_epoll: Callable[[], select.epoll] | None = None,
    ) -> None:
        self.clock = clock
        self.sends_per_turn = sends_per_turn
        self.sends = 0
        """The number of sends in this turn. Counted by clients and groups."""
        self.kept: dict[SocketClient, int] = {}
        """How many bytes are kept for each client that has not taken them yet. No history has these bytes. The client
        that has made no progress for longest comes first."""
        self.kept_bytes = 0
        """The sum of `kept`."""
        self.slice_bytes = 0
        """The bytes of all frames that clients have read from the history, and not begun to send."""
        self.clients: dict[int, SocketClient] = {}
        """The open streams, by file descriptor."""
        self.feeds: dict[Hub, Feed] = {}
        """The feeds of hubs that have open streams here."""
        self.make_worker = make_worker
        self._turn_seconds = turn_seconds
        self._max_kept_bytes = max_kept_bytes
        self._inbox: deque[Adoption | Task] = deque()
        self._attended: dict[TakeOver, None] = {}
        self._running: deque[tuple[Task, Iterator[None]]] = deque()
        self._log_once = LogOnce(_log)
        self._server: ServerInfo | None = None  # that of the newest stream: a process has one server
        self._drained = False  # whether this server was stopping at the last tick
        self._epoll = select.epoll() if make_epoll is None else make_epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Of threads that make the loop of their process at the same time, all except one drop theirs. An epoll object
        # closes itself.
        self._dropped = Dropped(self, partial(os.close, self._bell))
        self._epoll.register(self._bell, select.EPOLLIN)
        self._rung = False
        self._gathers_until: float | None = None
        self.counts = LoopCounts()
        """By how much it was late, and its pauses, for the counters of all hubs."""
        self._yielder = GilYielder(clock, counts=self.counts)
        self._next_tick = self._busy_since = clock()  # when its last wait for events was over
        self._round: Iterator[SocketClient] = iter(())  # those that are still to be checked
        self._checks_per_tick = 1  # in this round
        self._parked = True
        self._worker = make_worker(self, "sse_batcher-loop")
        self._worker.stop()  # so its thread ends when no stream is left, and the next stream starts another one

    def __len__(self) -> int:
        """The number of open streams."""
        return len(self.clients)

    @property
    def is_busy(self) -> bool:
        """Whether the next turn has something to do at once, without waiting for an event."""
        return bool(self._running or self._inbox)

    @property
    def turn_is_over(self) -> bool:
        """Whether clients, groups and feeds have to let others send now."""
        return self.sends >= self.sends_per_turn

    # -- any thread ----------------------------------------------------------------------------------------------------

    @property
    def stalled_for(self) -> float:
        """For how many seconds its thread should have checked the streams, and has not. Takes no lock."""
        return 0.0 if self._parked else max(0.0, self.clock() - self._next_tick)

    def can_run(self) -> bool:
        """Start the thread unless it runs. Returns False if no thread can be started: the process is about to end."""
        if self._parked:
            self._worker.wake()
        return self._worker.ensure()

    def adopt(self, adoption: Adoption) -> None:
        """Take over this stream. Never blocks. Any thread."""
        self._inbox.append(adoption)
        self._announce(is_expected=self._gathers_until is not None or self._rung)

    def post(self, item: Task) -> None:
        """Let the loop's thread serve this soon. Never blocks. Any thread."""
        self._inbox.append(item)
        self._announce(is_expected=self._rung)

    def _announce(self, *, is_expected: bool) -> None:
        """Wake the thread for a note, unless it is going to look at its notes. Call this after the note was left.

        The thread clears the flags before it looks, so if one was still set after the note, it has yet to look.
        """
        if not is_expected:
            self._rung = True
            os.eventfd_write(self._bell, 1)
        if self._parked:
            self.can_run()

    def attend(self, takeover: TakeOver) -> None:
        """Call `TakeOver.relieve` at each tick, so that the server does not block. Never blocks. Any thread."""
        self._attended[takeover] = None
        if self._parked:
            self.can_run()

    def release(self, takeover: TakeOver) -> None:
        """End what `attend` began: the server's thread goes on with this take-over. Idempotent. Any thread."""
        self._attended.pop(takeover, None)

    # -- for clients, groups and feeds ---------------------------------------------------------------------------------

    def watch(self, client: SocketClient, *, for_room: bool) -> None:
        """Let epoll report when the client leaves and, with `for_room`, when its socket takes data again."""
        events = select.EPOLLRDHUP | (select.EPOLLOUT if for_room else 0)
        self._epoll.modify(client.fd, events)

    def keep(self, client: SocketClient, size: int) -> None:
        """Note how many bytes are kept for this client alone; 0 if none.

        If there are too many in all, the clients that have made no progress for longest are closed.
        """
        self.kept_bytes += size - self.kept.pop(client, 0)
        if size:
            self.kept[client] = size
        while self.kept_bytes > self._max_kept_bytes and len(self.kept) > 1:
            self._log_once.log(
                logging.WARNING,
                "%d bytes wait for clients that take nothing: those that have stalled for longest are closed",
                self.kept_bytes,
                extra=log_fields("slow_clients_closed", bytes=self.kept_bytes, clients=len(self.clients)),
            )
            next(iter(self.kept)).close(LEFT)

    def forget(self, client: SocketClient) -> None:
        """Remove a client that is about to close its connection."""
        del self.clients[client.fd]
        self.kept_bytes -= self.kept.pop(client, 0)
        with suppress(OSError):
            # Closing the descriptor is not enough: a forked child may have the same connection open.
            self._epoll.unregister(client.fd)
        client.group.shrink()
        hub = client.group.hub
        if not self.feeds[hub].channels:
            del self.feeds[hub]

    def start(self, task: Task, steps: Iterator[None]) -> None:
        """Run the first of these steps now, and the others in later turns. If one fails, close the task's clients."""
        try:
            for _ in steps:
                self._running.append((task, steps))
                return
        except Exception:
            self.close_failed(task)

    def close_failed(self, task: Task) -> None:
        """Close the client that has failed, or all clients of the group or feed. Call this in the exception handler."""
        _log.exception(
            "a detached stream failed: it is closed, and its client reconnects", extra=log_fields("stream_failed")
        )
        for client in [task] if isinstance(task, SocketClient) else self._clients_of(task):
            client.close(LEFT)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def work(self) -> float | None:
        """Do one turn, or end if there is nothing left to do. For `Worker`."""
        if self._is_idle():
            # They would keep managers from being collected, by clients that have left, and by the app of the server.
            self._round, self._server = iter(()), None
            self._parked = True
            if self._is_idle():
                return None
        if self._parked:
            self._next_tick = self.clock()  # before `_parked`: see `stalled_for`
            self._parked = False
        try:
            self.turn(LOOP_TICK_SECONDS)
        except BaseException:
            self._give_up()
            raise
        return 0.0

    def turn(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for something to do, and do some of it."""
        busy = self.is_busy
        # Not longer than until the next tick, so that the tick is late only if something keeps the loop from it.
        until = self._next_tick if self._gathers_until is None else min(self._next_tick, self._gathers_until)
        happened = self._epoll.poll(0 if busy else max(0.0, min(timeout, until - self.clock())))
        if not happened:
            self._rung = False  # in case a caller was interrupted between setting the flag and ringing
        if not busy:
            self._busy_since = self._yielder.begin()
        for fd, events in happened:
            if fd == self._bell:
                os.eventfd_read(fd)
                self._rung = False
            else:
                self._handle_events(self.clients[fd], events)
        self._take_notes()
        for feed in list(self.feeds.values()):
            feed.read_ahead()
        now = self.clock()
        if now >= self._next_tick:
            self.counts.delays.add(now - (min(self._next_tick, self._busy_since) if busy else self._next_tick))
            self._next_tick = now + LOOP_TICK_SECONDS
            self.tick(now)
        while self._running:
            self.start(*self._running.popleft())
            if self.turn_is_over:
                self.sends = 0
                if self._yielder.pause() or self.clock() >= now + self._turn_seconds:
                    return

    def tick(self, now: float) -> None:
        """Check whether the server is stopping, and do what depends on time. `now` is by the loop's clock."""
        if self._server is not None:
            drained, self._drained = self._drained, self._server.is_stopping()
            # Once only: managers may take streams again while some of these are still open.
            if self._drained and not drained:
                for feed in list(self.feeds.values()):
                    process_of(feed.manager).drain()
        for feed in list(self.feeds.values()):
            feed.check(now)
        for takeover in list(self._attended):
            if not takeover.relieve():
                self.release(takeover)  # its stream was dropped
        some = list(islice(self._round, self._checks_per_tick))
        if not some:
            self._begin_round()
        for client in some:
            try:
                client.check(now)
            except Exception:
                self.close_failed(client)

    def _begin_round(self) -> None:
        """Begin to check all clients, at the next tick."""
        clients = list(self.clients.values())
        # Not as many as there are clients at that tick: if most have ended since, the round would take minutes.
        self._checks_per_tick = 1 + int(len(clients) * LOOP_TICK_SECONDS / ROUND_SECONDS)
        self._round = iter(clients)

    def _take_notes(self) -> None:
        """Take in what other threads have left in the inbox."""
        self._gathers_until, adopted = None, False
        while self._inbox:
            item = self._inbox.popleft()
            task: Task | None
            if isinstance(item, Adoption):
                task, adopted = self._take_in(item), True
            else:
                task = item
            if task is not None:
                self._running.append((task, task.serve()))
        if adopted:
            self._gathers_until = self.clock() + GATHER_SECONDS

    def _is_idle(self) -> bool:
        return not (self.clients or self.is_busy or self._attended)

    def _handle_events(self, client: SocketClient, events: int) -> None:
        """Note what epoll has reported for a client, and serve the client."""
        if client.dismissed == LEFT:
            return  # noted before; the client is closed as soon as its group is no longer busy
        if events & ~select.EPOLLOUT:
            client.dismissed = LEFT
        else:
            client.has_room()
        self._running.append((client, client.serve()))

    def _take_in(self, adoption: Adoption) -> SocketClient | None:
        """Replace the attached client by one of ours. Returns None if its stream has ended meanwhile."""
        hub, manager, attached, taken, server = adoption
        self._server = server
        self._drained = False
        is_open = False
        try:
            feed = self.feeds.get(hub) or Feed(self, hub, manager, attached)
            group = feed.group_of(attached, chunked=taken.chunked)
            client = SocketClient(attached, group, taken)
            is_open = hub.replace(attached, client, feed, group.channels)
        except Exception:
            _log.exception(
                "a stream cannot be detached: it is closed, and its client reconnects",
                extra=log_fields("detach_failed", client=attached.info.id),
            )
            attached.close()
        if not is_open:
            hang_up(taken.fd)
            return None
        self.feeds[hub] = feed
        group.grow()
        self.clients[taken.fd] = client
        try:
            _prepare(taken.fd)
            self._epoll.register(taken.fd, select.EPOLLRDHUP)
        except OSError as error:
            _log.warning(
                "the connection of a detached stream cannot be watched, and is closed: %s",
                error,
                extra=log_fields("watch_failed", client=client.info.id, error=error),
            )
            client.close(LEFT)
        return client

    def _clients_of(self, task: Group | Feed) -> list[SocketClient]:
        return [client for client in self.clients.values() if task in (client.group, client.group.feed)]

    def _give_up(self) -> None:
        """Close all connections, because the thread dies: it is not known which streams it leaves in the middle."""
        for hub in self.feeds:
            hub.count_thread_restart()
        self._running.clear()
        for client in list(self.clients.values()):
            client.close(LEFT)

    # -- a forked child ------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Close the connections that a forked child has inherited.

        As long as they are open in the child, a client does not see that its stream has ended in the parent.
        """
        adoptions = [item.taken.fd for item in self._inbox if isinstance(item, Adoption)]
        self._dropped.cancel()
        for fd in (*self.clients, *adoptions, self._bell):
            with suppress(OSError):
                os.close(fd)
        for takeover in list(self._attended):
            takeover.drop()
        self._epoll.close()


def _prepare(fd: int) -> None:
    """Make a connection that was taken over non-blocking, and let it send small blocks at once."""
    os.set_blocking(fd, False)
    connection = socket.socket(fileno=fd)
    try:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    finally:
        connection.detach()


loop = PerProcess(Loop)
"""The loop of this process."""


def _let_go_of_parents() -> None:
    for parents in loop.left_behind():
        parents.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_parents)
