"""One of the clients of `load`: what its connection does next, and what it has got.

Not blocking. Used by the one thread of `load`.
"""

from __future__ import annotations

import os
import selectors
import socket
import ssl
from typing import Any

from ..parser import Block, BlockTooLongError, Parser
from ..remote.message import RemoteError, Request, ResponseReader

RECEIVE_BYTES = 65_536
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class RefusedError(Exception):
    """The stream cannot be opened. The text is the reason, in few words."""


class EndedError(Exception):
    """The stream has ended after it was open. The text is the reason, in few words."""


Memo = dict[bytes, list[Block]]
"""What bytes mean that came between two blocks. Most clients get the same bytes, and parsing them costs the most."""
MOST_REMEMBERED = 256


class BlockReader:
    """Turns the bytes of one connection into blocks. Readers of the same stream share a `Memo`."""

    __slots__ = ("_is_clean", "_parser", "_reader")

    def __init__(self, *, takes_codings: bool = True) -> None:
        self._reader = ResponseReader(takes_codings=takes_codings)
        self._parser = Parser()
        self._is_clean = False  # all bytes so far were whole chunks of whole blocks

    @property
    def has_head(self) -> bool:
        """Whether the head of the response is complete."""
        return self._reader.head is not None

    def blocks(self, data: bytes, memo: Memo) -> list[Block]:
        """Return the blocks that are complete by these bytes. Raises `RefusedError` and `RemoteError`."""
        was_clean = self._is_clean
        if was_clean and (known := memo.get(data)) is not None:
            return known
        body = self._reader.feed(data)
        head = self._reader.head
        if head is None:
            return []
        if not head.is_stream:
            raise RefusedError(f"status {head.status}" if head.status != 200 else "not an event stream")
        self._reader.check_coding()
        try:
            blocks = self._parser.blocks(body)
            while self._reader.has_more:
                blocks += self._parser.blocks(self._reader.feed(b""))
        except BlockTooLongError as error:
            raise RemoteError(str(error), "answer") from None
        self._is_clean = self._reader.is_between_chunks and self._parser.is_between_blocks
        if was_clean and self._is_clean:
            if len(memo) >= MOST_REMEMBERED:
                memo.clear()
            memo[data] = blocks
        return blocks


class LoadClient:
    """A client whose connection has begun. `address` is one of `socket.getaddrinfo`. `context`: for TLS, or None.

    `began` is when.
    """

    __slots__ = (
        *("began", "begin", "bye", "context", "count", "fd", "is_open", "last", "waits_for"),
        *("_reader", "_request", "_sock", "_step", "_unsent"),
    )

    def __init__(
        self, request: Request, family: int, address: Any, context: ssl.SSLContext | None, began: float
    ) -> None:
        self.began = began
        self.begin = ""
        """The cursor after which its frames count. Empty: its stream, or its snapshot, has not begun."""
        self.bye = ""
        """The reason of ``sse_bye``."""
        self.count = 0
        self.last = ""
        self.is_open = False
        """Whether it has got ``sse_open``, or ``sse_gap`` in its place, and the connection is there."""
        self.context = context
        self._request = request
        self._reader = BlockReader(takes_codings=request.takes_codings)
        self._unsent = request.head
        self._step = self._connected
        self.waits_for = WRITE
        """What to wait for before `go_on`: `READ` or `WRITE`."""
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        self.fd = self._sock.fileno()
        self._sock.setblocking(False)
        self._sock.connect_ex(address)  # its error is that of the socket later

    def go_on(self, memo: Memo) -> tuple[int, list[Block]]:
        """Do what the connection is ready for. Return how many bytes came, and which blocks are complete.

        Raises `RefusedError` or `EndedError`.
        """
        try:
            return self._step(memo)
        except ssl.SSLWantReadError:
            self.waits_for = READ
        except ssl.SSLWantWriteError:
            self.waits_for = WRITE
        except BlockingIOError:
            pass
        except OSError as error:
            reason = _reason(error)
            raise EndedError(f"broken: {reason}") if self.is_open else RefusedError(reason) from error
        return 0, []

    def close(self) -> None:
        self._sock.close()

    def _connected(self, memo: Memo) -> tuple[int, list[Block]]:
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        if self.context is None:
            return self._send(memo)
        self._sock = self.context.wrap_socket(
            self._sock, server_hostname=self._request.host, do_handshake_on_connect=False
        )
        return self._shake_hands(memo)

    def _shake_hands(self, memo: Memo) -> tuple[int, list[Block]]:
        self._step = self._shake_hands
        assert isinstance(self._sock, ssl.SSLSocket)
        self._sock.do_handshake()
        return self._send(memo)

    def _send(self, memo: Memo) -> tuple[int, list[Block]]:
        self._step = self._send
        self.waits_for = WRITE
        self._unsent = self._unsent[self._sock.send(self._unsent) :]
        if not self._unsent:
            self._step = self._receive
            self.waits_for = READ
        return 0, []

    def _receive(self, memo: Memo) -> tuple[int, list[Block]]:
        data = self._sock.recv(RECEIVE_BYTES)
        while isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            data += self._sock.recv(RECEIVE_BYTES)
        if not data:
            self._end()
        return len(data), self._reader.blocks(data, memo)

    def _end(self) -> None:
        if not self.is_open:
            raise RefusedError("closed at once" if self._reader.has_head else "closed without an answer")
        raise EndedError(self.bye or "closed without sse_bye")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message}"
    return f"TLS: {error.reason}" if isinstance(error, ssl.SSLError) else error.strerror or str(error)
