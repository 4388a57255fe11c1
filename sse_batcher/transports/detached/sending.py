"""Sending to sockets that must not make anybody wait.

`send(fd, data, sized(len(data)), FLAGS)` is the C library's, called without letting go of the interpreter's lock: it
does not wait, and each time the lock is given away a thread that computes keeps it for a whole switch interval, 5 ms,
so that a thousand sends would take five seconds. Who sends to many lets go of it himself, now and then; and the size is
made ready once for all of them, since ctypes takes half a microsecond a call to look at types that it was told of.

Where that cannot be had (no ctypes, no such symbol, or an interpreter without the lock) it is `os.write`, which does
let go. It would wait on a descriptor that blocks, so data for such a descriptor takes a way of its own. Any thread.
"""

from __future__ import annotations

import errno
import importlib
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)

_SIOCOUTQ = 0x5411
"""Asks Linux how many bytes the other side has not confirmed yet, or, where it is not TCP, not read."""

_FULL = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS, errno.ENOMEM}

Send = Callable[[int, bytes, Any, int], int]
"""Returns how many bytes were taken, or something below zero."""


class Way(NamedTuple):
    """A way to send."""

    send: Send
    sized: Callable[[int], Any]
    """A number of bytes, as `send` wants to have it."""
    error_of: Callable[[int], int]
    """The `errno` of a send that has just returned something below zero."""
    has_taken_all: Callable[[int], bool]
    """Whether the other side has confirmed all that it was sent; False where that is not known."""


def send_to(fd: int, data: bytes) -> int | None:
    """Send as much of this as is taken at once. How many bytes that is; None where the connection is gone."""
    return taken(send(fd, data, sized(len(data)), FLAGS))


def taken(sent: int) -> int | None:
    """How many bytes the socket has taken, given what `send` returned; None where the connection is gone.

    To be asked at once, by the same thread.
    """
    if sent >= 0:
        return sent
    return 0 if _error_of(sent) in _FULL else None


def hang_up(fd: int) -> None:
    """Close a connection, so that all that was sent arrives."""
    with socket.socket(fileno=fd) as connection, suppress(OSError):
        connection.setblocking(False)  # even where `socket.setdefaulttimeout` would have it wait
        connection.shutdown(socket.SHUT_WR)
        # What the client has sent and nobody has read would make the end a reset, which may overtake the last block.
        connection.recv(65_536)


def _from_libc() -> Way:
    ctypes: Any = importlib.import_module("ctypes")
    library = ctypes.PyDLL(None, use_errno=True)
    function, ioctl = library.send, library.ioctl
    # No `argtypes`: bytes are passed as a pointer to them and numbers as an int, as they are, but for the size.
    function.restype = ctypes.c_ssize_t
    unconfirmed = ctypes.c_int()
    place = ctypes.byref(unconfirmed)

    def has_taken_all(fd: int) -> bool:
        return bool(ioctl(fd, _SIOCOUTQ, place) == 0 and unconfirmed.value == 0)

    return Way(function, ctypes.c_size_t.from_param, lambda _: ctypes.get_errno(), has_taken_all)


def _from_os() -> Way:
    def write(fd: int, data: bytes, size: int, flags: int) -> int:
        try:
            return _send_once(fd, data, flags) if os.get_blocking(fd) else os.write(fd, data)
        except OSError as error:
            return -(error.errno or errno.EIO)

    return Way(write, int, abs, lambda _: False)


def _send_once(fd: int, data: bytes, flags: int) -> int:
    """Send to a socket that blocks, without waiting, and leave it as it is. Raises `OSError` if it takes nothing.

    The `socket` object makes this three times as slow as `os.write`. Our own connections do not block. That of a server
    may, and it is sent something only if it is given back.
    """
    connection = socket.socket(fileno=fd)
    try:
        # If there is a `socket.setdefaulttimeout`, the descriptor does not block any more, and `send` would wait.
        connection.settimeout(None)
        return connection.send(data, flags)
    finally:
        connection.detach()


def _keeps_the_lock() -> bool:
    """Whether this interpreter has a lock that is worth keeping."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _find() -> Way:
    if FLAGS and sys.platform == "linux" and _keeps_the_lock():
        try:
            return _from_libc()
        except (ImportError, AttributeError, OSError):
            pass
    return _from_os()


send, sized, _error_of, has_taken_all = _find()
"""`has_taken_all` is for one thread. It keeps the lock, too: `fcntl.ioctl` would let go of it for each of thousands."""
