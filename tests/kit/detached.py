"""Streams that are detached, or could be: fakes of servers, one client of each, and fixtures for their tests.

A module that uses the fixtures gives them names of its own: ``manager = detached.manager``.
"""

from __future__ import annotations

import gc
import http.client
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

import pytest

import sse_batcher
from sse_batcher import BatchOptions, ClientOptions, SSEManager
from sse_batcher.runtime.log_once import LogOnce
from sse_batcher.runtime.process import PerProcess
from sse_batcher.transports import open_stream
from sse_batcher.transports.attached import ServedRequest
from sse_batcher.transports.detached.loop import loop
from sse_batcher.transports.detached.stream import DetachedStream, DetachPolicy
from sse_batcher.transports.detached.takeover import TakeOver
from sse_batcher.transports.server import ServerInfo
from sse_batcher.transports.watcher import watcher
from sse_batcher.wire import HEADERS, LAST_CHUNK

from .delivery import asked_for
from .exchange import Exchange, descriptors
from .sse_parser import EventStreamParser, ServerEvent
from .waiting import TIMEOUT, wait_until

OPTIONS = ClientOptions(max_clients=20)
LOG = "sse_batcher.transports"
LARGE = "x" * 1_000_000

Body = Iterable[bytes]
Middleware = Callable[[Body], Body]


class Server:
    """Serves one response after the other, each in a thread and on a connection of its own.

    `size`: how it writes the size of a chunk. `later`: it writes in another thread than the one that asks the app.
    """

    def __init__(self, *, chunked: bool = True, size: bytes = b"%x", later: bool = False) -> None:
        self.chunked = chunked
        self.size = size
        self.later = later

    def serve(self, fd: int, body: Body, sent: Sent | None = None) -> None:
        """As PEP 3333 has it."""
        to_write: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        sent = sent or Sent()
        writer = threading.Thread(target=lambda: self.write(fd, iter(to_write.get, None), sent))
        with suppress(BrokenPipeError, ConnectionResetError):
            if self.later:
                writer.start()
                for block in self.response(body):
                    sent.accepted += len(block)
                    to_write.put(block)
            else:
                self.write(fd, self.response(body))
        if hasattr(body, "close"):
            body.close()
        if self.later:
            to_write.put(None)
            writer.join()
        os.close(fd)

    def response(self, body: Body) -> Iterator[bytes]:
        begun = False
        for block in body:
            if not begun:
                begun = True
                yield self.head()
            yield b"%b\r\n%b\r\n" % (self.size % len(block), block) if self.chunked else block
        if self.chunked:
            yield LAST_CHUNK

    def head(self) -> bytes:
        more = "Transfer-Encoding: chunked" if self.chunked else "Connection: close"
        fields = [f"{name}: {value}" for name, value in HEADERS]
        return "\r\n".join(["HTTP/1.1 200 OK", *fields, more, "", ""]).encode()

    def write(self, fd: int, texts: Iterable[bytes], sent: Sent | None = None) -> None:
        sent = sent or Sent()
        with suppress(BrokenPipeError, ConnectionResetError):
            for text in texts:
                while text:
                    size = os.write(fd, text)
                    sent.written += size
                    text = text[size:]  # noqa: PLW2901


class Sent:
    """What a server that writes in another thread has on one connection. Each number is written by one thread."""

    def __init__(self) -> None:
        self.accepted = 0
        self.written = 0

    def rest(self) -> int:
        return self.accepted - self.written


class Stream:
    """One client of a server of this kind, which is served in a thread."""

    def __init__(
        self,
        manager: SSEManager,
        server: Server | None = None,
        middleware: Middleware | None = None,
        *,
        exchange: Exchange | None = None,
        name: str = "fake",
        lets_go: bool = True,
        max_requests: int | None = None,
        **request: Any,
    ) -> None:
        server = server or Server()
        self.exchange = exchange or Exchange()
        fd = self.exchange.fd
        sent = Sent()
        info = ServerInfo(name, fd, None, lambda: False, lets_go, sent.rest, max_requests=max_requests)
        body = (middleware or nothing)(open_stream(manager, served(info, **request)))
        self.thread = threading.Thread(target=server.serve, args=(fd, body, sent), daemon=True)
        self.thread.start()
        self.answer = http.client.HTTPResponse(self.exchange.client)
        self.answer.begin()
        self.parser = EventStreamParser(strict=True)
        self.events: list[ServerEvent] = []

    def take(self, count: int) -> list[ServerEvent]:
        """The next so many events."""
        while len(self.events) < count:
            data = self.answer.read1(65_536)
            assert data, f"the end, after {self.events}"
            self.events += self.parser.feed(data)
        taken, self.events = self.events[:count], self.events[count:]
        return taken

    def types(self, count: int) -> list[str]:
        return [event.type for event in self.take(count)]

    def rest(self) -> list[ServerEvent]:
        """What is left, to a proper end."""
        events = self.events + self.parser.feed(self.answer.read())
        self.parser.close()
        return events

    def leaves_its_thread(self) -> bool:
        """Whether the server is done with it, as far as that can see. For a stream that goes on."""
        self.thread.join(TIMEOUT)
        return not self.thread.is_alive()

    def close(self) -> None:
        self.exchange.client.close()
        self.answer.close()


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    loop.get()
    watcher.get()
    gc.collect()  # what tests before this one have left
    before = descriptors()
    yield
    wait_until(lambda: descriptors() == before, "all is closed")


@pytest.fixture(autouse=True)
def nothing_was_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PerProcess(DetachPolicy)
    monkeypatch.setattr("sse_batcher.transports.detached.stream.detach_policy", policy)
    monkeypatch.setattr(sse_batcher.transports, "detach_policy", policy)
    watcher.get().log_once = LogOnce(logging.getLogger("sse_batcher.watcher"))


@pytest.fixture
def manager(no_descriptor_is_left: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[SSEManager]:
    # No take-over is undone because the machine stood still.
    monkeypatch.setattr("sse_batcher.transports.detached.takeover.WRITE_TIMEOUT_SECONDS", TIMEOUT)
    with SSEManager(batching=BatchOptions(batch_window=0), clients=OPTIONS) as manager:
        yield manager
    assert manager.get_stats().clients == 0


@pytest.fixture
def stream(manager: SSEManager) -> Iterator[Callable[..., Stream]]:
    streams: list[Stream] = []

    def stream(*args: Any, **more: Any) -> Stream:
        streams.append(Stream(manager, *args, **more))
        return streams[-1]

    yield stream
    manager.shutdown()
    for each in streams:
        each.thread.join(TIMEOUT)
        each.close()


def transports(manager: SSEManager) -> tuple[int, int]:
    """How many streams are attached, and how many detached."""
    counts = manager.get_stats().clients_by_transport
    return counts["attached"], counts["detached"]


def wait_for_transports(manager: SSEManager, attached: int, detached: int) -> None:
    """Until so many streams are attached, and so many detached: the loop takes in what is on its way."""
    wait_until(lambda: transports(manager) == (attached, detached), f"{attached} attached, {detached} detached")


SERVERS = {
    "chunked": Server(),
    "plain": Server(chunked=False),
    "upper-case": Server(size=b"%X"),
    "padded": Server(size=b"%08x"),
    "later": Server(later=True),
    "later, plain": Server(later=True, chunked=False),
}

every_server = pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)


def nothing(body: Body) -> Body:
    return body


def watched() -> int:
    """How many streams have a watcher, as those need that hold a thread of the server."""
    return len(watcher.get())


def served(server: ServerInfo, **options: Any) -> ServedRequest:
    """A request for the default channel that came through this server. Arguments are those of `asked_for`."""
    return ServedRequest(asked_for("default", **options), server)


def detached_stream(manager: SSEManager, fd: int | None, **info: Any) -> DetachedStream:
    described = ServerInfo("fake", fd, None, lambda: False, lets_go=True)._replace(**info)
    return DetachedStream(manager, served(described))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A take-over waits for nothing for long."""
    monkeypatch.setattr("sse_batcher.transports.detached.stream.TakeOver", partial(TakeOver, timeout=0.01))


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.message) for record in caplog.records if record.name == LOG]


def undone(manager: SSEManager, **info: Any) -> bool:
    """Whether the connection of a stream that asks for more, before its server has written, was about to be taken."""
    exchange = Exchange()
    with closing(detached_stream(manager, exchange.fd, **info)) as body:
        first = next(body)
        diverted = not exchange.is_restored()
        manager.enqueue("log", 1)
        assert b"event: log\n" in next(body)
        assert watched() == 1
        assert exchange.goes_on(b"")
        assert first.startswith(b"event: sse_open\n")
    exchange.close()
    return diverted
