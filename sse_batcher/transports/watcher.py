"""The watcher: one thread in each process, which sees what the thread that drives an attached stream cannot see.

That thread waits for the next frame and does not notice that its client has left. Or it sends to a client that takes
nothing, and cannot stop. In both cases it does not notice that the server wants to end.
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from ..errors import TooManyClientsError
from ..runtime.dropped import Dropped
from ..runtime.locks import new_lock
from ..runtime.log_fields import log_fields
from ..runtime.log_once import LogOnce
from ..runtime.process import PerProcess
from ..runtime.worker import Owner, Worker
from .server import ServerInfo
from .sockets import duplicate_connection, end_requests, has_hung_up, sign_of_life, written

_log = logging.getLogger("sse_batcher.watcher")

WATCH_TICK_SECONDS = 0.2
"""Seconds between two checks of whether the server is stopping, and of which clients take nothing."""

FULL_SHARE = 0.8
"""The share of a server's threads that streams may hold before a warning is logged. It is logged, too, if only one
thread is left."""

STOP_SAMPLE = 10
"""How many streams are asked at each tick whether their server is stopping."""


class Stream(Protocol):
    """What is watched. Both methods are called by the watcher's thread, and must not block."""

    def close(self) -> None:
        """End the stream, because its client has hung up."""

    def drain(self) -> None:
        """Let all streams end, because the server is stopping."""


class Watch:
    """One stream that is watched, and a duplicate of its connection.

    The duplicate keeps the connection's number from being given to another connection while we use it. `send_timeout`:
    seconds after which a client that takes nothing of what the server sends is given up.

    `lock` keeps `_connection` from being closed during a `shutdown`. That call releases the GIL before it uses the
    descriptor's number, which could belong to another connection by then. What is used without the lock:

    - `written` and `fileno` read `_connection`. Harmless race: a socket that was closed meanwhile raises `OSError`, or
      has the number -1.
    - `busy_since` is written by the thread that drives the stream, and read by the watcher's thread. Harmless race: an
      old value delays the end of a stalled stream by one tick.

    All other attributes belong to the watcher's thread.
    """

    def __init__(self, stream: Stream, server: ServerInfo, send_timeout: float) -> None:
        # A weak reference, or a stream that is dropped without a close would keep itself and its manager alive.
        self.stream = weakref.ref(stream)
        self.server = server
        self.busy_since: float | None = None
        """Since when the server has had a block to send, by `time.monotonic`; None while it waits for one."""
        self.drained = False
        """Whether the stream was drained since the server is stopping. This is done once only: its manager may take
        streams again while this one is still open."""
        self._send_timeout = send_timeout
        self._seen: float | None = None  # the last sign of life, and when it changed
        self._seen_at = 0.0
        self.lock = new_lock()
        self._connection = None if server.fd is None else duplicate_connection(server.fd)

    def fileno(self) -> int:
        """Return the file descriptor of the duplicate; -1 if there is none."""
        connection = self._connection
        return -1 if connection is None else connection.fileno()

    def give_up_if_stalled(self, now: float) -> None:
        """Shut the connection down if the client has taken no byte for `send_timeout`. The server's send fails then.

        The time is counted from the client's last sign of life, not from the beginning of the block, so that a client
        may read slowly. This is also done if all data fits into the buffers of the kernel or the server: the other side
        may be gone for good.
        """
        with self.lock, suppress(OSError):
            if self._connection is None:
                return
            seen = sign_of_life(self._connection, self.busy_since)
            if seen is None or seen != self._seen:
                self._seen, self._seen_at = seen, now
            elif now - self._seen_at >= self._send_timeout:
                self._connection.shutdown(socket.SHUT_RDWR)

    def written(self) -> tuple[int, bool] | None:
        """Return how many bytes the server has written so far, and whether the client has taken all of them.

        None if the system does not tell.
        """
        connection = self._connection
        return None if connection is None else written(connection)

    def end_connection(self) -> None:
        """Let the server see that no other request comes on this connection. Call this after its last response."""
        with self.lock:
            if self._connection is not None:
                end_requests(self.server, self._connection)

    def close(self) -> None:
        """Close the duplicate. Idempotent."""
        with self.lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class Watcher:
    """The open attached streams of one process. `make_worker` and `make_epoll` are for tests.

    Takes no lock of its own. `add` and `remove` may be called by any thread; `work` and `tick` run in the watcher's
    thread.

    - `_watches` and `_by_fd` are written by all of these. Single steps of dictionaries are atomic. A file descriptor is
      unregistered and removed from `_by_fd` under the lock of its `Watch`, so its number is not used again before that.
    - `_parked` is True while the thread does not exist or is about to end. The thread looks for streams after it has
      set it, and `add` reads it after it has listed the stream, so either the thread goes on or `add` wakes it.
      Harmless race: both do.
    """

    def __init__(
        self,
        *,
        make_worker: Callable[[Owner, str], Worker] = Worker,
        make_epoll: Callable[[], Any] | None = None,
    ) -> None:
        self._watches: dict[Watch, None] = {}
        self._by_fd: dict[int, Watch] = {}
        self._epoll: Any = None
        self._bell = -1  # an eventfd in the epoll: lets the thread end at once when no stream is left
        if hasattr(select, "epoll"):  # on Linux, unless gevent has patched the module
            try:
                self._epoll, self._bell = _open_epoll(make_epoll or select.epoll)
                # Of threads that make the watcher of their process at the same time, all except one drop theirs. An
                # epoll object closes itself.
                Dropped(self, partial(os.close, self._bell))
            except OSError as error:
                _log.warning(
                    "in this process, clients that leave are noticed at the second heartbeat only: %s",
                    error,
                    extra=log_fields("leaving_noticed_late", error=error),
                )
        self._parked = True
        self._next_tick = 0.0
        self._threads: int | None = None  # of the server; not its `ServerInfo`, which keeps the app alive
        self._asked = 0
        self.log_once = LogOnce(_log)
        """What was logged by this watcher. A new `LogOnce` lets each warning be logged again."""
        self._worker = make_worker(self, "sse_batcher-watcher")
        self._worker.stop()  # so its thread ends when no stream is left, and the next stream starts another one

    def __len__(self) -> int:
        """The number of streams that are watched."""
        return len(self._watches)

    @property
    def stalled_for(self) -> float:
        """For how many seconds its thread should have checked the streams, and has not. Takes no lock."""
        return 0.0 if self._parked else max(0.0, time.monotonic() - self._next_tick)

    @property
    def leaves_no_thread(self) -> bool:
        """Whether streams hold all threads of the server, or all except one. Takes no lock.

        False if it is unknown how many there are. With two, both have to be held: it would be usual otherwise.
        """
        return self._threads is not None and len(self._watches) >= max(2, self._threads - 1)

    def add(self, watch: Watch, limit: float = math.inf) -> bool:
        """Watch a stream that is being opened. Returns False if `limit` streams are watched already."""
        self._watches[watch] = None
        # After it is listed: of two streams that come at the same time, each one counts the other.
        if len(self._watches) > limit:
            self.remove(watch)
            self._warn_of_refusals(watch.server, int(limit))
            return False
        self._threads = watch.server.threads
        fd = watch.fileno()
        if self._epoll is not None and fd >= 0:
            self._by_fd[fd] = watch
            with suppress(OSError):  # the system's limit of watched descriptors: heartbeats show later that it has left
                self._epoll.register(fd, select.EPOLLRDHUP)
        self._warn_if_full(watch.server, limit)
        if self._parked:  # after the stream is listed: see the class
            self._next_tick = time.monotonic()  # before `_parked`: see `stalled_for`
            self._parked = False
            self._worker.wake()
        self._worker.ensure()
        return True

    def remove(self, watch: Watch) -> None:
        """Watch a stream no longer. Idempotent."""
        if watch not in self._watches:
            return
        with watch.lock:
            fd = watch.fileno()
            if self._by_fd.get(fd) is watch:
                with suppress(OSError):
                    self._epoll.unregister(fd)
                del self._by_fd[fd]
        watch.close()
        # Last: a removal that a signal handler interrupts can be repeated.
        self._watches.pop(watch, None)
        if self._epoll is not None and not self._watches:
            os.eventfd_write(self._bell, 1)

    def work(self) -> float | None:
        """Wait for clients that leave, for one tick at most. One turn of the thread, for `Worker`."""
        if not self._watches:
            self._parked = True
            if not self._watches:
                return None
            self._next_tick = time.monotonic()
            self._parked = False
        pause = WATCH_TICK_SECONDS
        if self._epoll is not None:
            pause = 0.0
            for fd, _ in self._epoll.poll(WATCH_TICK_SECONDS):
                if fd == self._bell:
                    os.eventfd_read(fd)
                watch = self._by_fd.get(fd)
                # Asked again: since the poll, the number may have been given to another connection.
                if watch is not None and has_hung_up(fd):
                    self._end(watch)
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + WATCH_TICK_SECONDS
            self.tick(now)
        return pause

    def tick(self, now: float) -> None:
        """Check all streams: whether they were dropped, stalled, or have to end. `now` is by `time.monotonic`."""
        watches = list(self._watches)
        for watch in watches:
            if watch.stream() is None:
                self.remove(watch)
            watch.give_up_if_stalled(now)
        # Nearly always, all streams have the same server. So some are asked at each tick, in turn, and all of them only
        # if one says that its server is stopping.
        first = self._asked % max(1, len(watches))
        self._asked += STOP_SAMPLE
        if any(map(_has_to_drain, watches[first : first + STOP_SAMPLE])):
            for watch in filter(_has_to_drain, watches):
                watch.drained = True
                stream = watch.stream()
                if stream is not None:
                    stream.drain()

    def warn_of_buffering(self) -> None:
        """Log once that something holds the blocks of streams back."""
        self.log_once.log(
            logging.ERROR,
            "streams are held back: a middleware, or a function of the app that reads the whole response, asks for "
            "more of a stream before it passes on what it has. So clients get nothing before their stream ends. Let it "
            "leave out responses with the Content-Type text/event-stream, or do not apply it to the route of the "
            "streams. Until then, such streams end at once with all that there is, and their clients reconnect",
            extra=log_fields("streams_buffered"),
        )

    def warn_of_limit(self, error: TooManyClientsError) -> None:
        """Log once that a stream is refused, and which option limits the streams."""
        self.log_once.log(
            logging.WARNING,
            "a stream is refused, as are all others above a limit: %s. Their clients get sse_busy (limit) and come "
            "back after 10 to 30 seconds",
            error,
            extra=log_fields("clients_limited", error=error),
        )

    def _end(self, watch: Watch) -> None:
        self.remove(watch)
        stream = watch.stream()
        if stream is not None:
            stream.close()

    def _warn_if_full(self, server: ServerInfo, limit: float) -> None:
        """Log once that streams hold most of the server's threads, unless `limit` keeps enough for other requests."""
        held, threads = len(self._watches), server.threads
        if limit < math.inf or threads is None or held < min(FULL_SHARE * threads, max(2, threads - 1)):
            return
        self.log_once.log(
            logging.WARNING,
            "%d of the %d threads of this %s process are held by open streams, one each; when all are, no other "
            'request is served. Leave out transport="attached" (SSE_TRANSPORT): then streams hold no thread, if that '
            "is possible. Or give the server more threads, and set max_clients (SSE_MAX_CLIENTS) below their number",
            held,
            threads,
            server.name,
            extra=log_fields("threads_nearly_full", threads=threads, held=held, server=server.name),
        )

    def _warn_of_refusals(self, server: ServerInfo, limit: int) -> None:
        """Log once that streams are refused, because other requests need the server's threads."""
        if server.threads == 1:
            self.log_once.log(
                logging.WARNING,
                "this %s process serves one request at a time: a stream that holds its thread would block all other "
                'requests, so clients get sse_busy (threads). If transport="attached" (SSE_TRANSPORT) is set, leave it '
                "out: then streams hold no thread, if that is possible. Or give the server threads",
                server.name,
                extra=log_fields("one_thread", server=server.name),
            )
        else:
            self.log_once.log(
                logging.WARNING,
                "%d of the %s threads of this %s process are held by streams that cannot be detached. The others are "
                "kept for other requests, so further clients get sse_busy (threads). Give the server more threads",
                limit,
                server.threads,
                server.name,
                extra=log_fields("threads_full", threads=server.threads, held=limit, server=server.name),
            )


def _open_epoll(make_epoll: Callable[[], Any]) -> tuple[Any, int]:
    """Return an epoll object, and an eventfd in it with which it can be woken."""
    epoll = make_epoll()
    try:
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        epoll.register(bell, select.EPOLLIN)
    except OSError:
        epoll.close()
        raise
    return epoll, bell


def _has_to_drain(watch: Watch) -> bool:
    """Return whether the server is stopping and the stream was not drained yet."""
    if not watch.server.is_stopping():
        watch.drained = False  # the server has gone on: when it stops in the end, that counts
        return False
    return not watch.drained


watcher = PerProcess(Watcher)
"""The watcher of this process."""
