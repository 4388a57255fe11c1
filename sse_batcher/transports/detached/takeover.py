"""Taking a connection over from the server, in the middle of its response.

The server's thread that serves the request calls all of this, one step after the other:

1. `TakeOver` puts one end of a socket pair in the place of the server's file descriptor. We keep the connection itself
   and the other end, the *tap*.
2. The server writes the head of its response and the first block, as if to the client. Both arrive in the tap, with all
   that middleware has added, and show how the server frames the body.
3. `finish` checks what has arrived. If it is as expected, the connection is ours. Otherwise, `undo` puts the connection
   back and sends the client what has arrived.

Nothing of the server is patched.
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
from functools import lru_cache
from typing import NamedTuple

from ...runtime.locks import new_lock
from ...wire import GZIP_START, chunk
from ..sockets import duplicate
from .sending import send_to

WRITE_TIMEOUT_SECONDS = 2.0
"""How long to wait for a server that writes in another thread, and for a client to take what is passed on, in
seconds."""

POLL_SECONDS = 0.05
"""Seconds between two checks of whether such a server has something left to write."""

MAX_PRELUDE_BYTES = 16_384
"""Maximum size of the part of the first block that the server is given. Together with a head of the usual size, it fits
into a socket's buffer, so the server does not have to wait until the loop reads from the tap."""

MAX_HEAD_BYTES = 16_777_216
"""Maximum size of what the server may write. After that, it finds that the client has hung up."""

READ_BYTES = 65_536
"""The size of one read from the tap."""

MAX_KNOWN_HEAD_BYTES = 1_024
"""The largest head that is remembered for the next streams."""

_END_OF_HEAD = b"\r\n\r\n"
_STATUS = re.compile(rb"HTTP/[1-9](\.\d)? 200[ \r]")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")


def wait_for_event(fd: int, event: int, timeout: float) -> bool:
    """Wait up to `timeout` seconds for this event of `select.poll`. Returns whether it came."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(1000 * timeout))


class Taken(NamedTuple):
    """A connection that is ours: its descriptor, what has to be sent first, and whether the body is sent in chunks."""

    fd: int
    unsent: bytes
    chunked: bool


class TakeOver:
    """One response that is being diverted.

    `fd` is the server's file descriptor of the connection, and `unsent` returns how many bytes the server has still to
    write to it, as `server.inspect_server` gives them. `timeout` is how long to wait for a server or a client, in
    seconds (`WRITE_TIMEOUT_SECONDS` by default), and `wait` does so. Raises `OSError` if there are no file descriptors
    left, or `fd` is no connection; nothing has changed then.

    `_lock` guards `_claimed`, `_read` and `_tap` between `relieve`, in the loop's thread, and `_claim`. After `_claim`,
    all attributes belong to the thread that called it, and need no lock.
    """

    def __init__(
        self,
        fd: int,
        unsent: Callable[[], int],
        *,
        timeout: float | None = None,
        wait: Callable[[int, int, float], bool] = wait_for_event,
    ) -> None:
        self._fd = fd
        self._unsent = unsent
        self._timeout = WRITE_TIMEOUT_SECONDS if timeout is None else timeout
        self._wait = wait
        self._maker = _me()
        self._read = b""  # what the server has written so far
        self._over = False  # whether it was finished or undone
        self._lock = new_lock()  # re-entrant: the garbage collector may call `drop` in the middle of `relieve`
        self._claimed = False  # whether `finish`, `undo` or `drop` was called
        self._connection = duplicate(fd)
        try:
            ours, theirs = socket.socketpair()
        except BaseException:
            os.close(self._connection)
            raise
        try:
            # As the server has set its own descriptor: if that does not block, the new one must not block either.
            os.set_blocking(theirs.fileno(), os.get_blocking(fd))
            # Otherwise, with `socket.setdefaulttimeout`, it would wait for what is not there.
            ours.setblocking(False)
            self._diverted = os.fstat(theirs.fileno())
            os.dup2(theirs.fileno(), fd, inheritable=False)
            theirs.close()
        except BaseException:
            # If a signal handler raises this after `dup2`, it ends the connection, and the client reconnects.
            os.close(self._connection)
            ours.close()
            theirs.close()
            raise
        self._tap = ours

    def relieve(self) -> bool:
        """Read what the server has written, so that it does not wait forever for room. Called by the loop's thread.

        Returns False if the server's thread has begun to finish or undo the take-over, and reads the tap itself.
        """
        with self._lock:
            if not self._claimed:
                with suppress(OSError):
                    self._drain(MAX_HEAD_BYTES)
                    if len(self._read) > MAX_HEAD_BYTES:
                        self._tap.shutdown(socket.SHUT_RD)
            return not self._claimed

    def finish(self, prelude: bytes, rest: bytes = b"") -> Taken | None:
        """Take the connection, if the server has written a head and this prelude, and nothing else.

        `rest` has to be sent after the prelude. Returns None if something else was written, or not all of it came in
        time: the take-over is undone then, and the stream goes on attached.
        """
        self._claim()
        deadline = time.monotonic() + self._timeout
        try:
            while True:
                # Asked before the look at the tap. If nothing is left to write, and the prelude is not in the tap, it
                # never comes: something between the server and us has asked for more before it passed on what it had.
                unsent = self._unsent()
                found = self._find_framing(prelude)
                if found is not None:
                    break
                if not unsent or time.monotonic() >= deadline:
                    raise _UnexpectedError
                self._wait(self._tap.fileno(), select.POLLIN, POLL_SECONDS)
        except (_UnexpectedError, OSError):
            self.undo()
            return None
        chunked = found == "chunked"
        taken = Taken(self._connection, _closing(self._read) + (chunk(rest) if chunked else rest), chunked)
        # Last: if something is raised before, the connection can still be given back.
        self._tap.close()
        self._over = True
        return taken

    def undo(self) -> None:
        """Give the connection back, and send the client what the server has written meanwhile. Idempotent.

        If the server has closed its descriptor, or uses its number for something else by now, our descriptors are
        closed and nothing else happens.
        """
        self._claim()
        if self._over:
            return
        self._over = True
        try:
            with suppress(OSError):  # the server has closed its descriptor
                complete = self._await_unsent()
                if os.path.samestat(os.fstat(self._fd), self._diverted):
                    os.dup2(self._connection, self._fd, inheritable=False)
                    self._drain()  # after `dup2`: from now on, nothing can be written to the tap
                    if complete or not self._read:
                        self._pass_on()
                    else:
                        self._shut_down()
        finally:
            os.close(self._connection)
            self._tap.close()

    def drop(self) -> None:
        """Undo the take-over of a stream that was dropped without a close. For the garbage collector, in any thread.

        In a forked child, or in another thread than the one that began, the server's descriptor is not touched, because
        the server may be closing it at this moment: the server finds that the client has hung up.
        """
        if self._maker == _me():
            self.undo()
            return
        if self._maker[0] == os.getpid():  # not in a forked child, where the lock may be held forever
            self._claim()
        if not self._over:
            self._over = True
            os.close(self._connection)
            self._tap.close()

    def _claim(self) -> None:
        """Keep `relieve` from reading the tap from now on."""
        with self._lock:
            self._claimed = True

    def _find_framing(self, prelude: bytes) -> str | None:
        """Read the tap. Returns what `_framing` returns, and raises `_UnexpectedError` as it does."""
        with suppress(BlockingIOError):
            text = self._tap.recv(READ_BYTES)
            self._read += text
            # Fewer bytes than asked for are all that there are: such a read takes them however they were written.
            if 0 < len(text) < READ_BYTES and (found := _framing(self._read, prelude)) is not None:
                return found
        is_open = self._drain()
        found = _framing(self._read, prelude)
        if found is None and not is_open:
            raise _UnexpectedError
        return found

    def _drain(self, most: float = math.inf) -> bool:
        """Read what is in the tap, up to a bit more than `most` bytes in all.

        Returns False if the server has closed its end.
        """
        with suppress(BlockingIOError):
            while len(self._read) <= most:
                text = self._tap.recv(READ_BYTES)
                if not text:
                    return False
                self._read += text
        return True

    def _await_unsent(self) -> bool:
        """Wait until another thread of the server has written all that it has: it would overtake what is passed on.

        Returns False if that takes too long.
        """
        deadline = time.monotonic() + self._timeout
        while self._unsent() and self._drain():
            if time.monotonic() >= deadline:
                return False
            self._wait(self._tap.fileno(), select.POLLIN, POLL_SECONDS)
        return True

    def _shut_down(self) -> None:
        """End the connection for server and client: bytes are missing between what was sent and what would follow."""
        connection = socket.socket(fileno=self._connection)
        try:
            connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()

    def _pass_on(self) -> None:
        """Send the client what was read. The connection's modes are not changed: the server has set them."""
        while self._read:
            sent = send_to(self._connection, self._read)
            if sent is None:
                return  # the client has left, as the server will see itself
            if sent == 0 and not self._wait(self._connection, select.POLLOUT, self._timeout):
                self._shut_down()  # the client takes nothing
                return
            self._read = self._read[sent:]


class _UnexpectedError(Exception):
    """The server has written something else than expected, or not all of it in time."""


def _framing(text: bytes, prelude: bytes) -> str | None:
    """Return how the body of this response is framed: ``chunked`` or ``plain``; None if the response is incomplete.

    Raises `_UnexpectedError` if it is not a response that can be continued by us, with the prelude as its body so far.
    """
    head, end, body = text.partition(_END_OF_HEAD)
    if not end:
        if len(text) > MAX_HEAD_BYTES:
            raise _UnexpectedError
        return None
    found = _read_head(head)
    coding = b"gzip" if prelude.startswith(GZIP_START) else b"identity"
    if not found.is_expected or found.coding != coding:
        raise _UnexpectedError
    expected = prelude
    if found.chunked:
        size = _CHUNK_SIZE.match(body)
        if size is None:
            if len(body) > len(b"12345678\r\n"):
                raise _UnexpectedError
            return None
        if int(size[1], 16) != len(prelude):
            raise _UnexpectedError
        expected = size[0] + prelude + b"\r\n"
    if body == expected:
        return "chunked" if found.chunked else "plain"
    if not expected.startswith(body):
        raise _UnexpectedError
    return None


def _me() -> tuple[int, int]:
    """Return the ids of this process and this thread."""
    return os.getpid(), threading.get_ident()


def _closing(text: bytes) -> bytes:
    """Return this response with ``Connection: close`` in its head, because no other response comes on this connection.

    Otherwise, a proxy that keeps connections open may send its next request before it sees the end, and gets no answer.
    """
    head, end, body = text.partition(_END_OF_HEAD)
    return _read_head(head).closing + end + body


class _Head(NamedTuple):
    """What the head of a response says."""

    is_expected: bool
    """Whether it may be that of a stream, whatever the coding of its content is."""
    coding: bytes
    """The coding of its content."""
    chunked: bool
    closing: bytes
    """The same head with ``Connection: close``."""


def _read_head(head: bytes) -> _Head:
    """Read a head, without the empty line at its end."""
    # Those with cookies do not come again, and are secret.
    is_kept = len(head) <= MAX_KNOWN_HEAD_BYTES and b"set-cookie" not in head.lower()
    return _read_known_head(head) if is_kept else _read_any_head(head)


def _read_any_head(head: bytes) -> _Head:
    first, *lines = head.split(b"\r\n")
    fields = [line.partition(b":") for line in lines]
    headers = {name.strip().lower(): value.strip().lower() for name, _, value in fields}
    encoding = headers.get(b"transfer-encoding", b"")
    is_expected = (
        bool(_STATUS.match(head))
        and headers.get(b"content-type", b"").startswith(b"text/event-stream")
        and b"content-length" not in headers
        and encoding in {b"", b"chunked"}
    )
    kept = [
        line
        for line, (name, *_) in zip(lines, fields, strict=True)
        if name.strip().lower() not in {b"connection", b"keep-alive"}
    ]
    closing = b"\r\n".join([first, *kept, b"Connection: close"])
    return _Head(is_expected, headers.get(b"content-encoding", b"identity"), bool(encoding), closing)


# Streams that are opened within a second have the same head, with the same `Date`.
_read_known_head = lru_cache(maxsize=8)(_read_any_head)
