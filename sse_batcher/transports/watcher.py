"""The watcher: one thread a process, which sees what a thread that drives a stream cannot see.

A driver that waits for the next frame does not notice that its client has left, one that sends to a client which takes
nothing cannot stop, and neither knows that the server wants to end. Any thread adds and removes; the driver alone
writes `Watch.busy_since`; the rest is the watcher's.
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import struct
import time
import weakref
from contextlib import suppress
from typing import Any, Protocol

from ..errors import TooManyClientsError
from ..runtime.locks import new_lock
from ..runtime.process import PerProcess
from ..runtime.worker import Worker
from .server import ServerInfo, duplicate

_log = logging.getLogger("sse_batcher.watcher")

TICK = 0.2
"""Seconds between two looks at whether the server is stopping, and at who takes nothing."""

FULL = 0.8
"""The part of a server's threads that streams may hold before the log says so; it does, too, if one is left."""

SAMPLE = 10
"""How many streams are asked at once whether their server is stopping."""

# Of Linux's `tcp_info`: segments unacknowledged, bytes acknowledged, bytes not sent; and segments unacknowledged, bytes
# received, not sent, sent (since Linux 4.19), and of these sent again.
_TCP_INFO = struct.Struct("=24xI92xQ16xI")
_TCP_BYTES = struct.Struct("=24xI100xQ8xI52xQQ")


class Stream(Protocol):
    """What is watched. Both are called by the watcher's thread, and must not wait."""

    def close(self) -> None:
        """The client has hung up."""

    def drain(self) -> None:
        """The server is stopping."""


class Watch:
    """One stream that is watched, and a duplicate of its connection, so that nobody else gets its number meanwhile.

    `send_timeout`: seconds after which a client that takes nothing of what the server sends is given up.
    """

    def __init__(self, stream: Stream, server: ServerInfo, send_timeout: float) -> None:
        # Weakly: a stream that is dropped without a close must not keep itself and its manager.
        self.stream = weakref.ref(stream)
        self.server = server
        self.busy_since: float | None = None
        """Since when the server has had a block in its hands, by `time.monotonic`; None while it waits for one."""
        self.drained = False
        """Whether the stream was drained. Once only: its manager may open again while this one is still there."""
        self._send_timeout = send_timeout
        self._seen: float | None = None
        self._seen_at = 0.0
        # Guards the duplicate's end: a shutdown must not meet a number that belongs to another connection by now.
        self.lock = new_lock()
        self._connection = None if server.fd is None else _duplicate(server.fd)

    def fileno(self) -> int:
        """The duplicate's number, -1 where there is none."""
        connection = self._connection
        return -1 if connection is None else connection.fileno()

    def give_up_if_stalled(self, now: float) -> None:
        """Shut the connection down if the client has not taken a byte for too long; the server's send fails then.

        Counted from its last sign of life and not from the block's beginning: who reads slowly is served slowly. Also
        where all of it fits into the kernel's buffers, or into the server's own: the other side may be gone for good.
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
        """How many bytes the server has written to the connection so far, and whether the client has taken them all.

        None if the system does not tell.
        """
        connection = self._connection
        if connection is None or not _is_tcp(connection):
            return None
        try:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_BYTES.size)
        except OSError:  # closed meanwhile
            return None
        if len(info) < _TCP_BYTES.size:
            return None
        unacknowledged, received, unsent, sent, again = _TCP_BYTES.unpack(info)
        # The request was received. A system that has not counted it, such as gVisor, does not count what is sent.
        return (sent - again + unsent, not (unacknowledged or unsent)) if received else None

    def end_connection(self) -> None:
        """Let the server see that no further request will come, once the stream is sent and the server is stopping."""
        with self.lock:
            if self._connection is not None:
                _end_requests(self.server, self._connection)

    def close(self) -> None:
        with self.lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class Watcher:
    """The open streams of one process that a server's threads drive."""

    def __init__(self) -> None:
        self._watches: dict[Watch, None] = {}  # single steps of dictionaries are atomic
        self._by_fd: dict[int, Watch] = {}
        self._epoll: Any = None
        self._bell = -1  # lets the thread end at once when nothing is left to watch
        if hasattr(select, "epoll"):  # Linux's, and gone where gevent has patched this module
            try:
                self._epoll, self._bell = _open_epoll()
            except OSError as error:
                # Said once: there is one watcher a process.
                _log.warning("clients that leave are noticed at the second heartbeat only, in this process: %s", error)
        self._parked = True  # the thread is not there, or about to end
        self._next_tick = 0.0
        self._asked = 0
        self._told_of_threads = self._told_of_refusals = self._told_of_buffering = self._told_of_limit = False
        self._worker = Worker(self, "sse_batcher-watcher")
        self._worker.stop()  # its thread ends whenever no stream is left, and is started by the next one

    def add(self, watch: Watch, most: float = math.inf) -> bool:
        """Watch a stream, from the moment in which it is opened. False if `most` are watched already."""
        self._watches[watch] = None
        # Looked at afterwards: of two that come at the same time, neither is overlooked.
        if len(self._watches) > most:
            self.remove(watch)
            self._tell_of_refusals(watch.server, int(most))
            return False
        fd = watch.fileno()
        if self._epoll is not None and fd >= 0:
            self._by_fd[fd] = watch
            with suppress(OSError):  # the system's limit of what may be watched: heartbeats have to do
                self._epoll.register(fd, select.EPOLLRDHUP)
        self._tell_if_full(watch.server)
        # After the stream is listed: a thread that is about to end looks once more.
        if self._parked:
            self._parked = False
            self._worker.wake()
        self._worker.ensure()
        return True

    def remove(self, watch: Watch) -> None:
        """Watch it no more. Idempotent."""
        if watch not in self._watches:
            return
        with watch.lock:  # or its number might be that of another connection by the time it is unregistered
            fd = watch.fileno()
            if self._by_fd.get(fd) is watch:
                with suppress(OSError):
                    self._epoll.unregister(fd)
                del self._by_fd[fd]
        watch.close()
        # Last: a removal that is interrupted is done once more.
        self._watches.pop(watch, None)
        if self._epoll is not None and not self._watches:
            os.eventfd_write(self._bell, 1)

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`."""
        if not self._watches:
            self._parked = True
            if not self._watches:
                return None
            self._parked = False
        pause = TICK
        if self._epoll is not None:
            pause = 0.0
            for fd, _ in self._epoll.poll(TICK):
                if fd == self._bell:
                    os.eventfd_read(fd)
                watch = self._by_fd.get(fd)
                # Asked again: the number may have been given to another connection since.
                if watch is not None and _has_hung_up(fd):
                    self._leave(watch)
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK
            self.tick(now)
        return pause

    def tick(self, now: float) -> None:
        """Look at all streams. `now` is that of `time.monotonic`."""
        watches = list(self._watches)
        for watch in watches:
            if watch.stream() is None:
                self.remove(watch)
            watch.give_up_if_stalled(now)
        # Nearly always all have the same server: some are asked, in turn, and all only if one says yes.
        first = self._asked % max(1, len(watches))
        self._asked += SAMPLE
        if any(map(_is_to_drain, watches[first : first + SAMPLE])):
            for watch in filter(_is_to_drain, watches):
                watch.drained = True
                stream = watch.stream()
                if stream is not None:
                    stream.drain()

    def tell_of_buffering(self) -> None:
        """Say once that something keeps what streams hand out."""
        if not self._told_of_buffering:
            self._told_of_buffering = True
            _log.error(
                "streams are held back: a middleware, or a function of the app that reads the whole response, asks for "
                "more of a stream before it passes on what it has. So clients get nothing before their stream ends. "
                "Let it leave out responses with the Content-Type text/event-stream, or put the stream outside of it. "
                "Until then, such streams end at once with all that there is, and the clients come back for more"
            )

    def tell_of_limit(self, error: TooManyClientsError) -> None:
        """Log once that a stream is refused, and by which option."""
        if not self._told_of_limit:
            self._told_of_limit = True
            _log.warning(
                "a stream is refused, as all further ones are that exceed a limit: %s. Their clients get sse_busy "
                "(limit) and come back after 10 to 30 seconds",
                error,
            )

    def _leave(self, watch: Watch) -> None:
        self.remove(watch)
        stream = watch.stream()
        if stream is not None:
            stream.close()

    def _tell_if_full(self, server: ServerInfo) -> None:
        held = len(self._watches)
        if (
            self._told_of_threads
            or server.threads is None
            or held < min(FULL * server.threads, max(2, server.threads - 1))
        ):
            return
        self._told_of_threads = True
        _log.warning(
            "%d of the %d threads of this %s process are held by open streams, one each; when all are, nothing else is "
            'served. Set transport="auto" (SSE_TRANSPORT = "auto"), which lets streams do without them where that can '
            "be; or give the server more threads, and set max_clients (SSE_MAX_CLIENTS) below their number.",
            held,
            server.threads,
            server.name,
        )

    def _tell_of_refusals(self, server: ServerInfo, most: int) -> None:
        if self._told_of_refusals:
            return
        self._told_of_refusals = True
        if server.threads == 1:
            _log.warning(
                "this %s process serves one request at a time: an open stream would keep all others waiting, so "
                'clients get sse_busy (threads). Set transport="auto" (SSE_TRANSPORT = "auto"), which lets streams do '
                "without a thread if that is possible; or give the server threads",
                server.name,
            )
        else:
            _log.warning(
                "%d of the %s threads of this %s process are held by streams that cannot be detached. The others are "
                "kept for other requests, so further clients get sse_busy (threads). Give the server more threads",
                most,
                server.threads,
                server.name,
            )


def _open_epoll() -> tuple[Any, int]:
    """One, and the descriptor that rings in it."""
    epoll = select.epoll()
    try:
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        epoll.register(bell, select.EPOLLIN)
    except OSError:
        epoll.close()
        raise
    return epoll, bell


def end_connection(server: ServerInfo) -> None:
    """Let the server see that no further request will come over this connection, once the response is sent."""
    connection = None if server.fd is None else _duplicate(server.fd)
    if connection is not None:
        with connection:
            _end_requests(server, connection)


def _end_requests(server: ServerInfo, connection: socket.socket) -> None:
    """Let gunicorn see that no further request will come. It would wait for one for as long as it keeps connections
    alive. Other servers might look before they have sent all."""
    if server.name.startswith("gunicorn"):
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RD)


def _is_to_drain(watch: Watch) -> bool:
    """Whether its server is stopping, and the stream was not drained yet."""
    return not watch.drained and watch.server.is_stopping()


def _duplicate(fd: int) -> socket.socket | None:
    """The same connection under a number of its own; None where there is none left, or it is no connection."""
    try:
        number = duplicate(fd)
    except OSError:
        return None
    connection: socket.socket | None = None
    try:
        blocking = os.get_blocking(fd)
        connection = socket.socket(fileno=number)
        os.set_blocking(fd, blocking)  # `socket.setdefaulttimeout` has changed it, for the server's descriptor, too
    except BaseException as error:
        with suppress(OSError):
            if connection is None:
                os.close(number)
            else:
                connection.close()
        if isinstance(error, OSError):
            return None
        raise
    return connection


def sign_of_life(connection: socket.socket, busy_since: float | None) -> float | None:
    """What changes whenever the other side takes something of what it is sent; None where it has taken all.

    `busy_since`: since when it has been sent something that it has not taken all of. It has to do where the system does
    not tell more.
    """
    return _under_way(connection) if _is_tcp(connection) else busy_since


def _is_tcp(connection: socket.socket) -> bool:
    return hasattr(socket, "TCP_INFO") and connection.family in (socket.AF_INET, socket.AF_INET6)


def _under_way(connection: socket.socket) -> int | None:
    """The bytes that the other side has confirmed so far; None where it has confirmed all."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    unacknowledged, acknowledged, unsent = _TCP_INFO.unpack(info)
    return acknowledged if unacknowledged or unsent else None


def _has_hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return any(events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


watcher = PerProcess(Watcher)
"""This process's."""
