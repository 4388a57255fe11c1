"""Sending to sockets that must not make anybody wait.

`send(fd, data, size, FLAGS)` is the C library's, called without letting go of the interpreter's lock: it does not wait,
and each time the lock is given away a thread that computes keeps it for a whole switch interval, 5 ms, so that a
thousand sends would take five seconds. Who sends to many lets go of it himself, now and then.

Where that cannot be had (no ctypes, no such symbol, or an interpreter without the lock) it is `os.write`, on a
descriptor that does not block, which does let go. Any thread.
"""

from __future__ import annotations

import errno
import importlib
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)

_FULL = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS, errno.ENOMEM}

Send = Callable[[int, bytes, int, int], int]
"""Returns how many bytes were taken, or something below zero, which the function beside it turns into an `errno`."""


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


def _from_libc() -> tuple[Send, Callable[[int], int]]:
    ctypes: Any = importlib.import_module("ctypes")
    function = ctypes.PyDLL(None, use_errno=True).send
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_ssize_t
    return function, lambda _: ctypes.get_errno()


def _from_os() -> tuple[Send, Callable[[int], int]]:
    def write(fd: int, data: bytes, size: int, flags: int) -> int:
        try:
            return os.write(fd, data)
        except OSError as error:
            return -(error.errno or errno.EIO)

    return write, abs


def _keeps_the_lock() -> bool:
    """Whether this interpreter has a lock that is worth keeping."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _find() -> tuple[Send, Callable[[int], int]]:
    if FLAGS and _keeps_the_lock():
        try:
            return _from_libc()
        except (ImportError, AttributeError, OSError):
            pass
    return _from_os()


send, _error_of = _find()
