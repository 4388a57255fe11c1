"""Sending to sockets without blocking and without releasing the GIL.

Any thread. `Group` and `SocketClient` send on the loop's thread, and `TakeOver` on the server's.

`send(fd, data, sized(len(data)), FLAGS)` is the C library's `send`, called through `ctypes.PyDLL`, which does not
release the GIL. The call does not block, so it need not release it. `socket.send` does: each time, a CPU-bound thread
would take the GIL and keep it for a whole switch interval (5 ms), and a thousand sends would take five seconds. So a
thread that sends to many clients has to pause now and then itself (see `gil.GilYielder`). The size is converted once
for many calls, because ctypes takes half a microsecond a call to check types that were declared to it.

If that is not possible (there is no ctypes or no such symbol, or the interpreter runs without a GIL), data is sent by
`os.write`, which releases the GIL. It would block on a descriptor that blocks, so `_send_once` is used for those.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)

_SIOCOUTQ = 0x5411
"""The ioctl request that asks Linux how many bytes the other side has not confirmed yet or, for a socket that is not
TCP, not read yet."""

_FULL = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS, errno.ENOMEM}
"""Errors of a socket that takes nothing now, but may do so later."""

Send = Callable[[int, bytes, Any, int], int]
"""Returns how many bytes were taken, or a negative number."""


class SendMethod(NamedTuple):
    """One way to send, and what belongs to it."""

    send: Send
    sized: Callable[[int], Any]
    """Converts a number of bytes to what `send` expects."""
    error_of: Callable[[int], int]
    """Returns the `errno` of a send that has just returned this negative number."""
    has_taken_all: Callable[[int], bool]
    """Returns whether the other side has confirmed all that it was sent; False if that is unknown."""


def send_to(fd: int, data: bytes) -> int | None:
    """Send as much of this as the socket takes now. Returns how many bytes that is; None if the connection is gone."""
    return taken(send(fd, data, sized(len(data)), FLAGS))


def taken(sent: int) -> int | None:
    """Return how many bytes the socket has taken, given what `send` returned; None if the connection is gone.

    Must be called directly after `send`, by the same thread.
    """
    if sent >= 0:
        return sent
    return 0 if _error_of(sent) in _FULL else None


def hang_up(fd: int) -> None:
    """Close a connection, so that all that was sent arrives."""
    with socket.socket(fileno=fd) as connection, suppress(OSError):
        connection.setblocking(False)  # or `recv` would wait if there is a `socket.setdefaulttimeout`
        connection.shutdown(socket.SHUT_WR)
        # Bytes from the client that were not read would turn the end into a reset, which may overtake the last block.
        connection.recv(65_536)


def _from_libc() -> SendMethod:
    """Find the C library's `send`. Raises `ImportError`, `AttributeError` or `OSError` if there is none."""
    import ctypes  # noqa: PLC0415 (not every Python has it)

    library = ctypes.PyDLL(None, use_errno=True)
    function, ioctl = library.send, library.ioctl
    # No `argtypes`, which cost time: ctypes passes bytes as a pointer and numbers as an int, which is right for all
    # arguments but the size.
    function.restype = ctypes.c_ssize_t
    unconfirmed = ctypes.c_int()
    place = ctypes.byref(unconfirmed)

    def has_taken_all(fd: int) -> bool:
        return bool(ioctl(fd, _SIOCOUTQ, place) == 0 and unconfirmed.value == 0)

    return SendMethod(function, ctypes.c_size_t.from_param, lambda _: ctypes.get_errno(), has_taken_all)


def _from_os() -> SendMethod:
    """Return the fallback. Its `send` returns the negative `errno` of an error."""

    def write(fd: int, data: bytes, size: int, flags: int) -> int:
        try:
            return _send_once(fd, data, flags) if os.get_blocking(fd) else os.write(fd, data)
        except OSError as error:
            return -(error.errno or errno.EIO)

    return SendMethod(write, int, abs, lambda _: False)


def _send_once(fd: int, data: bytes, flags: int) -> int:
    """Send to a descriptor that blocks, without blocking and without changing its mode. Raises `OSError`.

    The `socket` object makes this three times as slow as `os.write`. Descriptors of detached streams do not block.
    Those of the server may, and something is sent to them only when a take-over is undone.
    """
    connection = socket.socket(fileno=fd)
    try:
        # With `socket.setdefaulttimeout`, the line above has made the descriptor non-blocking, and `send` would wait.
        connection.settimeout(None)
        return connection.send(data, flags)
    finally:
        connection.detach()


def _has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _find() -> SendMethod:
    if FLAGS and sys.platform == "linux" and _has_gil():
        try:
            return _from_libc()
        except (ImportError, AttributeError, OSError):
            pass
    return _from_os()


send, sized, _error_of, has_taken_all = _find()
"""The fields of the `SendMethod` of this process.

`has_taken_all` is for one thread only, the loop's. It does not release the GIL either; `fcntl.ioctl` would, once for
each of thousands of clients."""
