"""Taking a connection over from the server, in the middle of its response.

The server's thread that serves the request calls all of this, one step after the other, and believes to talk to the
client: until `finish` or `undo` its descriptor leads to us, so that we get the head that it writes, with all that
middleware has put in, and see how it frames the body. Nothing of the server is patched.
"""

from __future__ import annotations

import math
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from ...runtime.locks import new_lock
from ...wire import chunk
from ..server import duplicate
from .sending import send_to

PATIENCE = 2.0
"""Seconds for a server that writes from another thread."""

GLANCE = 0.05
"""Seconds from one look to the next at whether such a server has still something to write."""

LONGEST_PRELUDE = 16_384
"""Bytes that may be given to the server as the first of the body. With a head of the usual size, they fit into a
socket's buffer, so that the server does not have to wait until the loop reads from it."""

LONGEST_HEAD = 16_777_216
"""Bytes after which the server can write no more: it finds that the client has hung up."""

_END_OF_HEAD = b"\r\n\r\n"
_STATUS = re.compile(rb"HTTP/[1-9](\.\d)? 200[ \r]")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")


class Taken(NamedTuple):
    """A connection that is ours: its descriptor, what the client has to be sent first, and how the body is framed."""

    fd: int
    unsent: bytes
    chunked: bool


class TakeOver:
    """One response that is being diverted.

    `fd` is the server's descriptor of the connection, and `unsent` says what the server has still to write to it, as
    `server.inspect_server` gives them. Raises `OSError` if there are no descriptors left, or this is no connection.
    Nothing has changed then.
    """

    def __init__(self, fd: int, unsent: Callable[[], int]) -> None:
        self._fd = fd
        self._unsent = unsent
        self._maker = _me()
        self._read = b""
        self._over = False
        # Guards what was read and the tap, until the server's thread claims them. Re-entrant, since the garbage
        # collector may call `drop` in the middle of `relieve`.
        self._lock = new_lock()
        self._claimed = False
        self._connection = duplicate(fd)
        try:
            ours, theirs = socket.socketpair()
        except BaseException:
            os.close(self._connection)
            raise
        try:
            # As the server has set its own: one that does not block stays so.
            os.set_blocking(theirs.fileno(), os.get_blocking(fd))
            # `socket.setdefaulttimeout` would have it wait for what is not there.
            ours.setblocking(False)
            self._diverted = os.fstat(theirs.fileno())
            os.dup2(theirs.fileno(), fd, inheritable=False)
            theirs.close()
        except BaseException:
            # If it comes after the change, from a signal handler, this ends the connection, and the client comes back.
            os.close(self._connection)
            ours.close()
            theirs.close()
            raise
        self._tap = ours

    def relieve(self) -> bool:
        """Make room for what the server writes, so that it never waits for ever. Called by another thread.

        False if the server's thread reads that itself by now.
        """
        with self._lock:
            if not self._claimed:
                with suppress(OSError):
                    self._drain(LONGEST_HEAD)
                    if len(self._read) > LONGEST_HEAD:
                        self._tap.shutdown(socket.SHUT_RD)
            return not self._claimed

    def finish(self, prelude: bytes, rest: bytes = b"") -> Taken | None:
        """Take the connection, if the server has written a head and this prelude, and nothing else. None if it has not.

        Undone then; the stream goes on attached. `rest` is to be sent after the prelude.
        """
        self._claim()
        deadline = time.monotonic() + PATIENCE
        try:
            while True:
                # Asked before the look. If there is nothing left to write, what is not there by now will not come:
                # something between the server and us has asked for more before it has passed on what it had.
                unsent = self._unsent()
                found = self._look(prelude)
                if found is not None:
                    break
                if not unsent or time.monotonic() >= deadline:
                    raise _OtherwiseError
                _readable(self._tap, GLANCE)
        except (_OtherwiseError, OSError):
            self.undo()
            return None
        chunked = found == "chunked"
        taken = Taken(self._connection, _closing(self._read) + (chunk(rest) if chunked else rest), chunked)
        # Last: whatever is raised before, the connection is still here to be given back.
        self._tap.close()
        self._over = True
        return taken

    def undo(self) -> None:
        """Give the connection back, and send what the server has written meanwhile.

        Where its descriptor is no longer what we have put there, the server has closed it: so do we. Idempotent.
        """
        self._claim()
        if self._over:
            return
        self._over = True
        try:
            with suppress(OSError):  # closed: so will be the connection
                everything = self._await_unsent()
                if os.path.samestat(os.fstat(self._fd), self._diverted):
                    os.dup2(self._connection, self._fd, inheritable=False)
                    self._drain()  # after that: now nobody can write to the tap any more
                    if everything or not self._read:
                        self._pass_on()
                    else:
                        self._shut_down()
        finally:
            os.close(self._connection)
            self._tap.close()

    def drop(self) -> None:
        """Who would have finished or undone it is gone. For the garbage collector, in any thread.

        Undone; but in a forked child, or in another thread, the server's own may be closing the descriptor at this
        moment, so that is not touched: the server finds that the client has hung up.
        """
        if self._maker == _me():
            self.undo()
            return
        if self._maker[0] == os.getpid():  # in a forked child, the lock may be held for ever
            self._claim()
        if not self._over:
            self._over = True
            os.close(self._connection)
            self._tap.close()

    def _claim(self) -> None:
        with self._lock:
            self._claimed = True

    def _look(self, prelude: bytes) -> str | None:
        is_open = self._drain()
        found = _framing(self._read, prelude)
        if found is None and not is_open:
            raise _OtherwiseError
        return found

    def _drain(self, most: float = math.inf) -> bool:
        """Read all that there is in the tap. False at its end: the server has closed the connection."""
        with suppress(BlockingIOError):
            while len(self._read) <= most:
                text = self._tap.recv(65_536)
                if not text:
                    return False
                self._read += text
        return True

    def _await_unsent(self) -> bool:
        """Let another thread of the server write all that it has: it would overtake what is passed on.

        False if that takes too long.
        """
        deadline = time.monotonic() + PATIENCE
        while self._unsent() and self._drain():
            if time.monotonic() >= deadline:
                return False
            _readable(self._tap, GLANCE)
        return True

    def _shut_down(self) -> None:
        """Let neither the server nor the client go on: something is missing between what was sent and what follows."""
        connection = socket.socket(fileno=self._connection)
        try:
            connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()

    def _pass_on(self) -> None:
        """Send the client what was read. Without a change of the connection's modes, which the server has set."""
        while self._read:
            sent = send_to(self._connection, self._read)
            if sent is None:
                return  # the client is gone, as the server will see itself
            if sent == 0 and not _writable(self._connection, PATIENCE):
                self._shut_down()  # it takes nothing
                return
            self._read = self._read[sent:]


class _OtherwiseError(Exception):
    """What the server has written is not what was expected, or did not come."""


def _framing(text: bytes, prelude: bytes) -> str | None:
    """How the body is framed: ``chunked`` or ``plain``; None while not all of it is there. Raises `_OtherwiseError`."""
    head, end, body = text.partition(_END_OF_HEAD)
    if not end:
        if len(text) > LONGEST_HEAD:
            raise _OtherwiseError
        return None
    headers = {name.strip().lower(): value.strip().lower() for name, _, value in _fields(head)}
    encoding = headers.get(b"transfer-encoding", b"")
    if (
        not _STATUS.match(head)
        or not headers.get(b"content-type", b"").startswith(b"text/event-stream")
        or headers.get(b"content-encoding", b"identity") != b"identity"
        or b"content-length" in headers
        or encoding not in {b"", b"chunked"}
    ):
        raise _OtherwiseError
    expected = prelude
    if encoding:
        size = _CHUNK_SIZE.match(body)
        if size is None:
            if len(body) > len(b"12345678\r\n"):
                raise _OtherwiseError
            return None
        if int(size[1], 16) != len(prelude):
            raise _OtherwiseError
        expected = size[0] + prelude + b"\r\n"
    if body == expected:
        return "chunked" if encoding else "plain"
    if not expected.startswith(body):
        raise _OtherwiseError
    return None


def _me() -> tuple[int, int]:
    """This process, and this thread of it."""
    return os.getpid(), threading.get_ident()


def _closing(text: bytes) -> bytes:
    """This with a head that says what is true from now on: no other answer comes over this connection.

    Else a proxy that keeps connections may send the next request before it sees the end, and has no answer then.
    """
    head, end, body = text.partition(_END_OF_HEAD)
    first, *lines = head.split(b"\r\n")
    kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in {b"connection", b"keep-alive"}]
    return b"\r\n".join([first, *kept, b"Connection: close"]) + end + body


def _fields(head: bytes) -> list[tuple[bytes, bytes, bytes]]:
    return [line.partition(b":") for line in head.split(b"\r\n")[1:]]


def _readable(tap: socket.socket, patience: float) -> bool:
    return _is_ready(tap.fileno(), select.POLLIN, patience)


def _writable(fd: int, patience: float) -> bool:
    return _is_ready(fd, select.POLLOUT, patience)


def _is_ready(fd: int, event: int, patience: float) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(1000 * patience))
