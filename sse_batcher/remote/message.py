"""What a client sends and gets over HTTP/1.1: the bytes of a request, and a reader of responses.

Pure. Follows RFC 9112.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from email.message import Message
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urlsplit

from .url import PORTS, is_utf8, without_token

MAX_HEAD_BYTES = 100_000
CODED_START_BYTES = 20
"""How many of the first bytes of a compressed body are kept."""
MAX_STEP_BYTES = 1_000_000
"""The most bytes of a compressed body that are decompressed at once. They may be a thousand times as long as what came.
"""
MAX_LENGTH_DIGITS = 18
_SAFE = "!#$%&'()*+,/:;=?@[]~"  # what may stand in a URL as it is
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?")
_STATUS_LINE = re.compile(rb"(HTTP/\d\.\d) (\d{3})(?: (.*))?")

Stage = Literal["arguments", "name", "connect", "tls", "answer"]
"""What a client was doing when it failed.

- ``arguments``: reading its own arguments, such as the URL.
- ``name``: looking up the address of the host.
- ``connect``, ``tls``: opening the connection.
- ``answer``: sending the request, or waiting for the answer, or reading it.
"""


class RemoteError(Exception):
    """There is no answer, or no valid one. Its text is a sentence for people. `stage` says what was being done."""

    def __init__(self, message: str, stage: Stage) -> None:
        super().__init__(message)
        self.stage = stage


class Request(NamedTuple):
    """What is asked, and where. Made by `make_request`."""

    url: str
    host: str
    port: int
    tls: bool
    target: str
    """The path and the query, as they are sent."""
    headers: tuple[tuple[str, str], ...]
    head: bytes
    """The bytes to send, for HTTP/1.1."""
    takes_codings: bool
    """Whether the body of the answer may be compressed."""


def make_request(
    url: str,
    *,
    headers: Iterable[tuple[str, str]] = (),
    token: str | None = None,
    cursor: str = "",
    method: str = "GET",
    takes_codings: bool = True,
) -> Request:
    """Make a request of a stream, or of another page.

    `headers`
        More headers, or others in the place of the usual ones: ``Accept: text/event-stream``,
        ``Accept-Encoding: identity``, ``Cache-Control: no-cache``, ``Host`` and ``User-Agent``.
    `token`
        A bearer token.
    `cursor`
        The id after which the stream goes on (``Last-Event-ID``). Empty: it begins with what happens now.
    `takes_codings`
        Whether a body that is compressed is read, also if the request does not ask for that. Otherwise it is an error.

    Raises `RemoteError` if an argument is not valid.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RemoteError(f"{without_token(url)!r} is not a URL: {error}", "arguments") from None
    if parts.scheme not in PORTS or not parts.hostname:
        raise RemoteError(f"{without_token(url)!r} is not a URL with http:// or https://", "arguments")
    if not is_utf8(url):
        raise RemoteError(f"{without_token(url)!r} is not a URL: it has a byte that is not UTF-8", "arguments")
    if parts.username is not None:
        raise RemoteError("a URL must have no user name and password: say them by a header", "arguments")
    host = _ascii_host(parts.hostname)
    written_host = f"[{host}]" if ":" in host else host
    port = PORTS[parts.scheme] if port is None else port
    target = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    usual = {
        "Host": written_host if port == PORTS[parts.scheme] else f"{written_host}:{port}",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "Cache-Control": "no-cache",
        "User-Agent": "sse_batcher",
        **({"Authorization": f"Bearer {token}"} if token else {}),
        **({"Last-Event-ID": cursor.encode(errors="replace").decode("latin-1")} if cursor else {}),
    }
    given = list(headers)
    replaced = {name.lower() for name, _ in given}
    lines = [(name, value) for name, value in usual.items() if name.lower() not in replaced] + given
    for name, value in lines:
        if not _HEADER_NAME.fullmatch(name) or re.search("[\r\n\0]", value) or not _is_latin(value):
            raise RemoteError(f"the header {name!r} has a name or a value that is not valid", "arguments")
    head = "".join(f"{line}\r\n" for line in (f"{method} {target} HTTP/1.1", *map(": ".join, lines), ""))
    tls = parts.scheme == "https"
    return Request(url, host, port, tls, target, tuple(lines), head.encode("latin-1"), takes_codings)


def parse_header(line: str) -> tuple[str, str]:
    """Return the name and the value of a header as a command's argument has it: ``Name: value``."""
    name, colon, value = line.partition(":")
    if not colon or not _HEADER_NAME.fullmatch(name):
        raise RemoteError(f"a header is written as 'Name: value', not {line!r}", "arguments")
    return name, value.strip()


def _ascii_host(host: str) -> str:
    try:
        encoded = host.encode("idna").decode("ascii")  # for ASCII, a check: Python encodes it again to connect
        return host if host.isascii() else encoded
    except UnicodeError:
        raise RemoteError(f"{host!r} is not the name of a host", "arguments") from None


def _is_latin(text: str) -> bool:
    return all(ord(character) < 256 for character in text)


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text is, an empty one if it is anything else. A server may send any text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class Head(NamedTuple):
    """The first lines of a response."""

    version: str
    """Such as ``HTTP/1.1``."""
    status: int
    reason: str
    headers: Message
    """With any case of a name. `get_all` returns all lines of one name."""

    @property
    def is_stream(self) -> bool:
        """Whether it begins an event stream."""
        return self.status == 200 and self.headers.get_content_type() == "text/event-stream"


class ResponseReader:
    """Takes the bytes of one connection, and returns the body of the response. Not thread-safe.

    `takes_codings`: see `make_request`. Without it, a compressed body is not decompressed, and `check_coding` fails.
    """

    def __init__(self, method: str = "GET", *, takes_codings: bool = True) -> None:
        self.head: Head | None = None
        """None until it is complete."""
        self.is_complete = False
        """Whether the body has come to its end, as the response itself says."""
        self.coded_start = b""
        """The first bytes of a compressed body, as they came."""
        self.has_more = False
        """Whether `feed` without bytes would return more of what has already come."""
        self._has_body = method != "HEAD"
        self._takes_codings = takes_codings
        self._refused_coding = ""
        self._rest = b""  # of a head, or of a line with the size of a chunk
        self._is_chunked = False
        self._left: int | None = None  # bytes of the body, or of the chunk with its line end. None: until the close
        self._decompressor: zlib._Decompress | None = None
        self._compressed = b""  # what came, and is not decompressed yet

    def feed(self, data: bytes) -> bytes:
        """Return the bytes of the body that came with these: without chunks, and decompressed if it is gzip or deflate.

        Of a compressed body, it returns up to `MAX_STEP_BYTES`, and then says `has_more`. Raises `RemoteError` if this
        is not a response of HTTP/1.
        """
        if self.head is None:
            data = self._take_head(data)
            if self.head is None:
                return b""
        if self._is_chunked:
            data = b"".join(self._chunks(data))
        elif self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
            self.is_complete = self._left == 0
        if self._decompressor is None:
            return data
        self.coded_start += data[: CODED_START_BYTES - len(self.coded_start)]
        return self._decompressed(self._decompressor, data)

    def _decompressed(self, decompressor: zlib._Decompress, data: bytes) -> bytes:
        if decompressor.eof:
            return b""  # it would keep all that follows
        try:
            body = decompressor.decompress(self._compressed + data, MAX_STEP_BYTES)
        except zlib.error as error:
            raise RemoteError(f"the compressed body is broken: {error}", "answer") from None
        self._compressed = decompressor.unconsumed_tail
        # After a full step, the decompressor may hold more, although it has taken all bytes.
        self.has_more = not decompressor.eof and (bool(self._compressed) or len(body) == MAX_STEP_BYTES)
        return body

    def check_coding(self) -> None:
        """Raise `RemoteError` if the body is compressed, and must not be."""
        if self._refused_coding:
            raise RemoteError(
                f"the answer is compressed ({self._refused_coding[:50]}), although the request asks for no "
                f"compression: python -m sse_batcher doctor URL says what compresses it",
                "answer",
            )

    @property
    def is_between_chunks(self) -> bool:
        """Whether what came ends with a whole chunk, so that the next bytes mean the same to any reader."""
        plain = self._decompressor is None
        return self.head is not None and self._is_chunked and plain and not (self._left or self._rest)

    def close(self) -> None:
        """Say that the server has closed the connection: without a length, this is the end of the body."""
        if self.head is not None and not self._is_chunked and self._left is None:
            self.is_complete = True

    def _take_head(self, data: bytes) -> bytes:
        """Return what follows the head, once that is complete. Informational responses before it are left out."""
        self._rest += data
        while (found := re.search(b"\r?\n\r?\n", self._rest)) is not None:
            lines, self._rest = self._rest[: found.end()], self._rest[found.end() :]
            head = _parse_head(lines)
            if head.status >= 200 or head.status == 101:
                self._begin_body(head)
                rest, self._rest = self._rest, b""
                return rest
        if len(self._rest) > MAX_HEAD_BYTES or not b"HTTP/".startswith(self._rest[:5]):
            raise RemoteError("the answer is not HTTP/1.1", "answer")
        return b""

    def _begin_body(self, head: Head) -> None:
        self.head = head
        coding = str(head.headers.get("Content-Encoding", "")).strip().lower()
        if not self._takes_codings:
            self._refused_coding = "" if coding == "identity" else coding
        elif coding in {"gzip", "x-gzip", "deflate"}:
            self._decompressor = zlib.decompressobj(32 + zlib.MAX_WBITS)  # of both, as the first bytes say
        length = head.headers.get("Content-Length", "")
        if not self._has_body or head.status in {204, 304}:
            self._left = 0
            self.is_complete = True
        elif "chunked" in head.headers.get("Transfer-Encoding", "").lower():
            self._is_chunked = True
            self._left = 0
        elif length.isascii() and length.isdecimal() and len(length) <= MAX_LENGTH_DIGITS:
            self._left = int(length)
            self.is_complete = self._left == 0

    def _chunks(self, data: bytes) -> Iterator[bytes]:
        data = self._rest + data
        self._rest = b""
        while data and not self.is_complete:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                yield piece[: max(0, self._left - len(b"\r\n"))]
                self._left -= len(piece)
                continue
            line, end, following = data.partition(b"\n")
            if not end and len(line) < 1_000:
                self._rest = line
                return
            found = _CHUNK_SIZE.fullmatch(line.rstrip(b"\r"))
            if found is None:
                raise RemoteError("the chunks of the answer are broken", "answer")
            size = int(found[1], 16)
            self.is_complete = size == 0
            self._left = size + len(b"\r\n")
            data = following


def _parse_head(lines: bytes) -> Head:
    first, _, rest = lines.partition(b"\n")
    found = _STATUS_LINE.fullmatch(first.rstrip(b"\r"))
    if found is None:
        raise RemoteError("the answer is not HTTP/1.1", "answer")
    try:
        headers = http.client.parse_headers(io.BytesIO(rest))
    except http.client.HTTPException as error:
        raise RemoteError(f"the headers of the answer are not valid: {error!r}", "answer") from None
    version, status, reason = found.groups(b"")
    return Head(version.decode(), int(status), reason.decode("latin-1").strip(), headers)
