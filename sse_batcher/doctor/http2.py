"""HTTP/2: whether a stream over it blocks the other requests of its connection.

The caller's thread. As little of RFC 9113 as two requests need: their headers are written without compression (RFC
7541, 6.2.2), and those of the answers are not read.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ..remote.message import Request

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING = 0, 1, 3, 4, 6
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_STREAM, _SHORT = 1, 3
"""The numbers of the two requests on the connection."""
_MAX_BODY_BYTES = 65_536
"""The first block of a stream is shorter than this."""
_MAX_FRAME_BYTES = 16_384
"""The longest payload of a frame, since our settings allow no other (RFC 9113, 6.5.2)."""
_FRAME_HEAD_BYTES = 9
_NOT_IN_HTTP2 = {"host", "connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"}
"""Headers that must not be sent over HTTP/2 (RFC 9113, 8.2.2). ``:authority`` stands for ``Host``."""


class _Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def try_http2(
    stream: Request, short: Request, timeout: float, context: ssl.SSLContext
) -> Literal["busy", "blocked", "works"] | None:
    """Open a stream over HTTP/2, and send a short request to the same server on the same connection.

    Returns ``busy`` if the stream is refused because of HTTP/2, ``blocked`` if the short request is not answered within
    `timeout` seconds while the stream is open, ``works`` if it is, and None if the server does not speak HTTP/2 or
    opens no stream. `context` is for this connection alone, since it is changed.
    """
    if not stream.tls:
        return None
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with (
            socket.create_connection((stream.host, stream.port), timeout) as plain,
            context.wrap_socket(plain, server_hostname=stream.host) as sock,
        ):
            return _ask(sock, stream, short, timeout) if sock.selected_alpn_protocol() == "h2" else None
    except OSError:
        return None


def _ask(
    sock: ssl.SSLSocket, stream: Request, short: Request, timeout: float
) -> Literal["busy", "blocked", "works"] | None:
    connection = _Connection(sock)
    connection.request(_STREAM, stream)
    body = bytearray()
    for frame in connection.frames(timeout):
        if frame.stream == _STREAM and frame.kind == _DATA:
            begun = max(0, len(body) - 1)  # the line ends may come in two frames
            body += frame.payload
            if body.find(b"\n\n", begun) >= 0 or len(body) > _MAX_BODY_BYTES:
                break
        if frame.stream == _STREAM and (frame.kind == _RESET or frame.flags & _END_STREAM):
            break
    if b"event: sse_busy" in body:
        return "busy" if b'"http2"' in body else None
    if b"\n\n" not in body:
        return None
    connection.request(_SHORT, short)
    return "works" if any(frame.stream == _SHORT for frame in connection.frames(timeout)) else "blocked"


class _Connection:
    """The frames of one connection."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._rest = bytearray()
        sock.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b""))

    def request(self, stream: int, request: Request) -> None:
        fields = [(":method", "GET"), (":scheme", "https"), (":path", request.target)]
        fields += [(":authority", value) for name, value in request.headers if name.lower() == "host"]
        fields += [(name.lower(), value) for name, value in request.headers if name.lower() not in _NOT_IN_HTTP2]
        block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)
        self._sock.sendall(_frame(_HEADERS, _END_STREAM | _END_HEADERS, stream, block))

    def frames(self, timeout: float) -> Iterator[_Frame]:
        """Yield what comes, for at most `timeout` seconds, also if there is always more."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._sock.settimeout(left)
            frame = self._take()
            if frame is not None:
                yield frame
                continue
            try:
                data = self._sock.recv(65_536)
            except OSError:
                return
            if not data:
                return
            self._rest += data

    def _take(self) -> _Frame | None:
        """Return the next frame, None if it is not complete. Raises `OSError` if the connection is broken."""
        if len(self._rest) < _FRAME_HEAD_BYTES:
            return None
        length, (kind, flags, stream) = int.from_bytes(self._rest[:3], "big"), struct.unpack_from(">BBI", self._rest, 3)
        if length > _MAX_FRAME_BYTES:
            raise OSError("a frame is longer than HTTP/2 allows")
        end = _FRAME_HEAD_BYTES + length
        if len(self._rest) < end:
            return None
        payload = bytes(self._rest[_FRAME_HEAD_BYTES:end])
        del self._rest[:end]  # a bytearray moves its beginning, and copies nothing
        if kind in {_SETTINGS, _PING} and not flags & _ACK:
            self._sock.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        return _Frame(kind, flags, stream & 0x7FFFFFFF, payload)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: str) -> bytes:
    """Return a string as HPACK has it: its length, and its bytes as they are."""
    data = text.encode("latin-1")
    size = len(data)
    if size < 127:
        return bytes([size]) + data
    size -= 127
    length = bytearray([127])
    while size >= 128:
        length.append(size % 128 | 128)
        size //= 128
    return bytes([*length, size]) + data
