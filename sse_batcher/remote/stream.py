"""One stream over HTTP, read with deadlines, and each piece with its time of arrival.

The caller's thread, which may wait for the network. Not thread-safe. Times are those of `time.monotonic`. Redirects are
not followed, cookies are not kept, and a proxy of the environment is not used: the caller sees what the server answers.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from typing import Literal, NamedTuple

from ..parser import Block, BlockTooLongError, Comment, Parser
from .message import Head, RemoteError, Request, ResponseReader

CONNECT_SECONDS = 10.0
RECEIVE_BYTES = 65_536
FRAMING_BYTES = 1_000_000
"""How much longer than its body an answer that is no stream may be, with the lines around its chunks."""

End = Literal["complete", "closed", "reset"]
"""How a response has ended.

- ``complete``: as HTTP says: with the last chunk, after its length, or, without either, by a closed connection.
- ``closed``: the connection was closed before that.
- ``reset``: the connection was broken by an error.
"""


class _DeadlineError(TimeoutError):
    """The deadline has passed, although more may have come."""


class Piece(NamedTuple):
    """What arrived at one time."""

    at: float
    """When it came."""
    received: int
    """Bytes that came over the connection (inside TLS), with HTTP's own. In the first piece, those after the head."""
    body: bytes
    """The bytes of the body among them."""
    items: list[Block | Comment]
    """The blocks and comments that are complete by them."""


class RemoteStream:
    """An answer of a server, whose body is read piece by piece. `connect` makes it; `close` or ``with`` closes it."""

    def __init__(
        self, sock: socket.socket, reader: ResponseReader, head: Head, times: tuple[float, float], first: bytes
    ) -> None:
        self.head = head
        """The status, the version of HTTP, and the headers."""
        self.began, self.answered = times
        """When the connection was begun, and when the head of the answer was complete."""
        self.parser = Parser()
        """Has the newest cursor (`last_id`) and `retry`."""
        self.end: End | None = None
        """How the response has ended. None: it has not."""
        self._sock = sock
        self._reader = reader
        self._first: bytes | None = first

    def __enter__(self) -> RemoteStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def is_stream(self) -> bool:
        """Whether the answer is an event stream: the status is 200, and the type ``text/event-stream``."""
        return self.head.is_stream

    @property
    def coded_start(self) -> bytes:
        """The first bytes of a compressed body, as they came."""
        return self._reader.coded_start

    def read(self, timeout: float) -> Piece | None:
        """Wait for the next piece, at most `timeout` seconds. Returns None if none has come, or after the `end`.

        A long body that is compressed comes in several pieces, of which only the first one has `Piece.received`.

        Raises `RemoteError` if what comes is not valid, or is compressed and must not be.
        """
        self._reader.check_coding()
        deadline = time.monotonic() + timeout
        while True:
            if self._first is not None:  # arrived with the head
                at, received, body = self.answered, len(self._first), self._first
                self._first = None
            elif self._reader.has_more:
                at, received = time.monotonic(), 0
                if at >= deadline:
                    return None
                body = self._reader.feed(b"")
            else:
                if self.end is not None:
                    return None
                try:
                    data = _receive(self._sock, deadline)
                except TimeoutError:
                    return None
                except OSError:
                    self.end = "reset"
                    return None
                at, received = time.monotonic(), len(data)
                if not data:
                    self._reader.close()
                    self.end = "complete" if self._reader.is_complete else "closed"
                    return None
                body = self._reader.feed(data)
            if self._reader.is_complete and not self._reader.has_more:
                self.end = "complete"
            if received or body:
                try:
                    return Piece(at, received, body, self.parser.feed(body))
                except BlockTooLongError as error:
                    raise RemoteError(str(error), "answer") from None

    def read_rest(self, timeout: float, limit: int = 1_000_000) -> bytes:
        """Return the rest of the body, for an answer that is not a stream: what comes in time, up to `limit` bytes."""
        deadline = time.monotonic() + timeout
        body = b""
        received = 0
        while len(body) < limit and received < limit + FRAMING_BYTES:
            piece = self.read(deadline - time.monotonic())
            if piece is None:
                break
            body += piece.body
            received += piece.received
        return body[:limit]

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


def connect(request: Request, timeout: float = CONNECT_SECONDS, context: ssl.SSLContext | None = None) -> RemoteStream:
    """Send a request, and return the answer once its head is there.

    `timeout` is in seconds, for all of it except the look-up of the host's name. `context` is for TLS: None checks
    certificates with the authorities of the system, which the environment variable ``SSL_CERT_FILE`` can replace.
    Raises `RemoteError`.
    """
    began = time.monotonic()
    deadline = began + timeout
    sock = _open(request, timeout, deadline, context)
    try:
        method = request.head.split(b" ", 1)[0].decode()
        reader = ResponseReader(method, takes_codings=request.takes_codings)
        first = _send(sock, request, reader, timeout, deadline)
        assert reader.head is not None
        return RemoteStream(sock, reader, reader.head, (began, time.monotonic()), first)
    except BaseException:
        sock.close()
        raise


def _open(request: Request, timeout: float, deadline: float, context: ssl.SSLContext | None) -> socket.socket:
    where = f"{request.host}, port {request.port}"
    try:
        sock = socket.create_connection((request.host, request.port), timeout)
    except socket.gaierror as error:
        raise RemoteError(f"the address of {request.host} was not found: {error.strerror}", "name") from error
    except TimeoutError as error:
        raise RemoteError(f"{where} did not accept a connection within {timeout:g} s", "connect") from error
    except OSError as error:
        raise RemoteError(f"cannot connect to {where}: {error.strerror or error}", "connect") from error
    if not request.tls:
        return sock
    context = context or ssl.create_default_context()
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        return context.wrap_socket(sock, server_hostname=request.host)
    except ssl.SSLCertVerificationError as error:
        raise RemoteError(
            f"the certificate of {where} is not trusted: {error.verify_message}. If it is of an authority of your "
            f"own, name that authority's file in SSL_CERT_FILE",
            "tls",
        ) from error
    except OSError as error:
        raise RemoteError(f"{where} does not speak TLS: {error.strerror or error}", "tls") from error
    finally:
        # After a success, the socket is detached, and this does nothing.
        sock.close()


def _send(sock: socket.socket, request: Request, reader: ResponseReader, timeout: float, deadline: float) -> bytes:
    """Send it, and wait for the head. Returns the beginning of the body, if some came with the head."""
    where = f"{request.host}, port {request.port}"
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.sendall(request.head)
        while True:
            data = _receive(sock, deadline)
            if not data:
                raise RemoteError(f"{where} closed the connection without an answer", "answer")
            body = reader.feed(data)
            if reader.head is not None:
                return body
    except TimeoutError as error:
        raise RemoteError(
            f"{where} accepted the connection, and did not answer within {timeout:g} s", "answer"
        ) from error
    except OSError as error:
        raise RemoteError(
            f"{where} broke the connection before its answer: {error.strerror or error}", "answer"
        ) from error


def _receive(sock: socket.socket, deadline: float) -> bytes:
    """Return what comes; nothing at the end of the connection. Raises `TimeoutError` at the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        # With a time-out, however short, a server that never stops sending would never reach it.
        raise _DeadlineError
    sock.settimeout(left)
    try:
        return sock.recv(RECEIVE_BYTES)
    except ssl.SSLError as error:
        with suppress(AttributeError):
            if error.reason == "UNEXPECTED_EOF_WHILE_READING":  # closed without a word of TLS
                return b""
        raise
