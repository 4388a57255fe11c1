"""What is asked of the kernel about a connection: a duplicate, what the client has taken, whether it has hung up.

Any thread. Nothing here blocks or takes a lock.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from contextlib import suppress

from .server import ServerInfo

MIN_DUPLICATE_FD = 1024
"""The lowest file descriptor for a duplicate. Lower ones are left to servers that use `select`, which can handle no
higher ones."""

# Of Linux's `tcp_info`: segments unacknowledged, bytes acknowledged, bytes not sent. And: segments unacknowledged,
# bytes received, bytes not sent, bytes sent (since Linux 4.19), and how many of these were sent again.
_TCP_INFO = struct.Struct("=24xI92xQ16xI")
_TCP_BYTES = struct.Struct("=24xI100xQ8xI52xQQ")


if sys.platform == "win32":

    def duplicate(fd: int) -> int:
        """Raise `OSError`: this system has no file descriptors of connections."""
        raise OSError("not on this system")

else:
    import fcntl

    def duplicate(fd: int) -> int:
        """Return a second file descriptor of the same connection. Raises `OSError` if there is none left."""
        try:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, MIN_DUPLICATE_FD)
        except OSError:  # the process may not have so high a number
            return os.dup(fd)


def duplicate_connection(fd: int) -> socket.socket | None:
    """Return a duplicate of this connection; None if there is no file descriptor left, or it is no connection."""
    try:
        number = duplicate(fd)
    except OSError:
        return None
    connection: socket.socket | None = None
    try:
        blocking = os.get_blocking(fd)
        connection = socket.socket(fileno=number)
        # With `socket.setdefaulttimeout`, the line above has changed the mode, for the server's descriptor, too.
        os.set_blocking(fd, blocking)
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
    """Return a number that changes when the other side takes some of what it was sent; None if it has taken all.

    `busy_since`: since when there has been something that it has not taken. This is the answer if the system does not
    tell more, as for sockets that are not TCP.
    """
    return _confirmed(connection) if _is_tcp(connection) else busy_since


def _is_tcp(connection: socket.socket) -> bool:
    return hasattr(socket, "TCP_INFO") and connection.family in (socket.AF_INET, socket.AF_INET6)


def _confirmed(connection: socket.socket) -> int | None:
    """Return how many bytes the other side has confirmed so far; None if it has confirmed all."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    unacknowledged, acknowledged, unsent = _TCP_INFO.unpack(info)
    return acknowledged if unacknowledged or unsent else None


def written(connection: socket.socket) -> tuple[int, bool] | None:
    """Return how many bytes were written so far, and whether the other side has taken all of them.

    None if the system does not tell.
    """
    if not _is_tcp(connection):
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_BYTES.size)
    except OSError:  # closed meanwhile
        return None
    if len(info) < _TCP_BYTES.size:
        return None
    unacknowledged, received, unsent, sent, again = _TCP_BYTES.unpack(info)
    # The request was received on this connection. A system that counts no received bytes, such as gVisor, counts no
    # sent bytes either.
    return (sent - again + unsent, not (unacknowledged or unsent)) if received else None


def has_hung_up(fd: int) -> bool:
    """Return whether the other side of this connection sends nothing more, or the connection is broken."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return any(events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def end_connection(server: ServerInfo) -> None:
    """Let the server see that no other request comes on the connection of this request."""
    connection = None if server.fd is None else duplicate_connection(server.fd)
    if connection is not None:
        with connection:
            end_requests(server, connection)


def end_requests(server: ServerInfo, connection: socket.socket) -> None:
    """Let gunicorn see that no other request comes. Otherwise it waits for one as long as it keeps connections alive.

    Not done for other servers: some read from the connection before they have sent the whole response.
    """
    if server.name.startswith("gunicorn"):
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RD)
