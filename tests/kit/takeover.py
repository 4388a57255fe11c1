"""Taking a connection over: responses of servers, and what a take-over can be given instead of the system's.

A module that uses the fixtures gives them names of its own: ``taps = takeover.taps``.
"""

from __future__ import annotations

import gc
import re
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from sse_batcher.transports.detached import takeover
from sse_batcher.transports.detached.takeover import TakeOver, wait_for_event
from sse_batcher.wire import LAST_CHUNK, chunk

from .exchange import Exchange, descriptors
from .waiting import TIMEOUT

PRELUDE = b"event: sse_open\ndata: {}\nid: x.123456789\n\n"  # its length has a letter in hexadecimal
SSE = b"Content-Type: text/event-stream; charset=utf-8"
CHUNKED = b"Transfer-Encoding: chunked"

Wait = Callable[[int, int, float], bool]


def head(*fields: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((status, b"Server: x", *fields, b"", b""))


GOOD = {
    "plain": head(SSE, b"Connection: close") + PRELUDE,
    "chunked": head(SSE, CHUNKED) + chunk(PRELUDE),
    "kept": head(b"connection:Keep-Alive", SSE, CHUNKED, b"Keep-Alive: timeout=5") + chunk(PRELUDE),
    "HTTP/1.2": head(SSE, CHUNKED, status=b"HTTP/1.2 200 OK") + chunk(PRELUDE),
    "HTTP/2.0": head(SSE, status=b"HTTP/2.0 200 OK") + PRELUDE,
    "HTTP/1.0": head(SSE, status=b"HTTP/1.0 200 OK") + PRELUDE,
    "no reason": head(SSE, status=b"HTTP/1.1 200") + PRELUDE,
    "upper-case": head(SSE.upper().replace(b"TEXT/EVENT-STREAM", b"Text/Event-Stream"), CHUNKED.upper())
    + b"%X\r\n%b\r\n" % (len(PRELUDE), PRELUDE),
    "zeros": head(SSE, CHUNKED) + b"%06x\r\n%b\r\n" % (len(PRELUDE), PRELUDE),
    "no space": head(SSE.replace(b" ", b""), CHUNKED.replace(b" ", b"")) + chunk(PRELUDE),
    "identity": head(SSE, CHUNKED, b"Content-Encoding: identity") + chunk(PRELUDE),
    "middleware": head(b"Set-Cookie: a=1", b"Set-Cookie: b=text/html", b"X-Empty:", SSE, CHUNKED) + chunk(PRELUDE),
}


def closing(response: bytes) -> bytes:
    """The same, but the connection ends with it: so it is said, whatever the server has said."""
    text, end, body = response.partition(b"\r\n\r\n")
    text = re.sub(rb"(?i)\r\n(connection|keep-alive):[^\r]*", b"", text)
    return text + b"\r\nConnection: close" + end + body


BAD = {
    "404": head(SSE, CHUNKED, status=b"HTTP/1.1 404 Not Found") + chunk(PRELUDE),
    "206": head(SSE, CHUNKED, status=b"HTTP/1.1 206 Partial Content") + chunk(PRELUDE),
    "2000": head(SSE, CHUNKED, status=b"HTTP/1.1 2000 OK") + chunk(PRELUDE),
    "FOO/1.1": head(SSE, status=b"FOO/1.1 200 OK") + PRELUDE,
    "length": head(SSE, b"content-length: %d" % len(PRELUDE)) + PRELUDE,
    "gzip": head(SSE, CHUNKED, b"Content-Encoding: gzip") + chunk(PRELUDE),
    "identity and gzip": head(SSE, CHUNKED, b"Content-Encoding: identity, gzip") + chunk(PRELUDE),
    "another coding": head(SSE, b"Transfer-Encoding: gzip, chunked") + chunk(PRELUDE),
    "html": head(b"Content-Type: text/html", CHUNKED) + chunk(PRELUDE),
    "no type": head(CHUNKED) + chunk(PRELUDE),
    "changed": head(SSE) + PRELUDE.replace(b"{}", b"[]"),
    "changed, chunked": head(SSE, CHUNKED) + chunk(PRELUDE.replace(b"{}", b"[]")),
    "more": head(SSE) + PRELUDE + b"\n",
    "more in the chunk": head(SSE, CHUNKED) + chunk(PRELUDE + b"\n"),
    "more after the chunk": head(SSE, CHUNKED) + chunk(PRELUDE) + b"0",
    "two chunks": head(SSE, CHUNKED) + chunk(PRELUDE[:9]) + chunk(PRELUDE[9:]),
    "wrong size": head(SSE, CHUNKED) + b"%x\r\n%b\r\n" % (len(PRELUDE) + 2, PRELUDE),
    "an end": head(SSE, CHUNKED) + chunk(PRELUDE) + LAST_CHUNK,
    "no chunk": head(SSE, CHUNKED) + PRELUDE,
    "an extension": head(SSE, CHUNKED) + b"%x;a=b\r\n%b\r\n" % (len(PRELUDE), PRELUDE),
    "no end of the head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000,
    "no HTTP": b"\r\n\r\n" + PRELUDE,
}

every_good = pytest.mark.parametrize("response", GOOD.values(), ids=GOOD)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    gc.collect()  # what tests before this one have left
    before = descriptors()
    yield
    assert descriptors() == before


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise OSError(24, "Too many open files")


def take_over(exchange: Exchange, timeout: float = TIMEOUT, wait: Wait = wait_for_event) -> TakeOver:
    return TakeOver(exchange.fd, lambda: exchange.unsent, timeout=timeout, wait=wait)


def never(*_: Any) -> NoReturn:
    """A wait that must not happen."""
    raise AssertionError("it waits")


class Waits:
    """Waits for a server, and notes each time how long that might take. `do` is called before each wait."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do = do
        self.all: list[float] = []

    def __call__(self, fd: int, event: int, timeout: float) -> bool:
        assert event == select.POLLIN
        self.all.append(timeout)
        self.do()
        return wait_for_event(fd, event, timeout)


class Tap(socket.socket):
    """The end of a socket pair from which we read what the server writes."""

    before_read: Callable[[], Any] | None = None
    """Called once, before the next read."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self.before_read is not None:
            before_read, self.before_read = self.before_read, None
            before_read()
        return super().recv(size, flags)


@pytest.fixture
def taps(monkeypatch: pytest.MonkeyPatch) -> list[Tap]:
    """The taps of all take-overs of this test."""
    taps: list[Tap] = []
    pair = socket.socketpair

    def socketpair() -> tuple[Tap, socket.socket]:
        ours, theirs = pair()
        taps.append(Tap(fileno=ours.detach()))
        return taps[-1], theirs

    monkeypatch.setattr(takeover.socket, "socketpair", socketpair)
    return taps


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    exchange = Exchange()
    yield exchange
    exchange.close()
