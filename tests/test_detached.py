"""Detached streams, through whatever may stand between them and a server. The server here is a fake of each kind."""

from __future__ import annotations

import gc
import http.client
import itertools
import json
import logging
import os
import queue
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

import sse_batcher
from sse_batcher import BatchOptions, ClientOptions, SSEManager
from sse_batcher.manager import process_of
from sse_batcher.runtime.log_once import LogOnce
from sse_batcher.runtime.process import PerProcess
from sse_batcher.transports import open_stream
from sse_batcher.transports.attached import Request
from sse_batcher.transports.detached import takeover
from sse_batcher.transports.detached.loop import Loop, loop
from sse_batcher.transports.detached.stream import DetachedStream, DetachPolicy
from sse_batcher.transports.detached.takeover import TakeOver
from sse_batcher.transports.server import MIN_DUPLICATE_FD, ServerInfo
from sse_batcher.transports.watcher import watcher
from sse_batcher.wire import HEADERS, LAST_CHUNK

from .kit.exchange import Exchange, descriptors
from .kit.interrupts import interrupt
from .kit.process import AsProcess
from .kit.sse_parser import EventStreamParser, ServerEvent
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="streams are detached where there is epoll")

ROOT = Path(sse_batcher.__file__).parents[1]
OPTIONS = ClientOptions(transport="auto", max_clients=20)
LOG = "sse_batcher.transports"
LARGE = "x" * 1_000_000

Body = Iterable[bytes]
Middleware = Callable[[Body], Body]


# -- servers -----------------------------------------------------------------------------------------------------------


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
        body = (middleware or nothing)(open_stream(manager, Request(("default",), info, **request)))
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
def _no_descriptor_is_left() -> Iterator[None]:
    loop.get()
    watcher.get()
    gc.collect()  # what tests before this one have left
    before = descriptors()
    yield
    wait_until(lambda: descriptors() == before, "all is closed")


@pytest.fixture(autouse=True)
def _nothing_was_said_or_undone_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PerProcess(DetachPolicy)
    monkeypatch.setattr("sse_batcher.transports.detached.stream.detach_policy", policy)
    monkeypatch.setattr(sse_batcher.transports, "detach_policy", policy)
    watcher.get().log_once = LogOnce(logging.getLogger("sse_batcher.watcher"))


@pytest.fixture
def manager(_no_descriptor_is_left: None) -> Iterator[SSEManager]:
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


# -- middleware --------------------------------------------------------------------------------------------------------


def nothing(body: Body) -> Body:
    return body


def generator(body: Body) -> Iterator[bytes]:
    with closing(body):  # type: ignore[type-var]
        yield from body


def careless(body: Body) -> Iterator[bytes]:
    """Never closes what it wraps."""
    yield from body


class Prefetch(Iterator[bytes]):
    """Looks at the first items before it returns the response."""

    def __init__(self, body: Body, count: int) -> None:
        self.body: Any = body
        self.items = itertools.chain(list(itertools.islice(body, count)), body)

    def __next__(self) -> bytes:
        return next(self.items)

    def close(self) -> None:
        self.body.close()


def one_ahead(body: Body) -> Body:
    return Prefetch(body, 1)


def two_ahead(body: Body) -> Body:
    return Prefetch(body, 2)


def one_behind(body: Body) -> Iterator[bytes]:
    """Asks for the next item before it gives the last one away."""
    with closing(body):  # type: ignore[type-var]
        iterator = iter(body)
        last = next(iterator)
        for item in iterator:
            yield last
            last = item
        yield last


def shouting(body: Body) -> Iterator[bytes]:
    """Changes what goes through it."""
    with closing(body):  # type: ignore[type-var]
        for item in body:
            yield item.replace(b"heartbeat", b"HEARTBEAT")


def chatty(body: Body) -> Iterator[bytes]:
    """Adds something."""
    with closing(body):  # type: ignore[type-var]
        yield b":hello\n"
        yield from body


# -- detached ----------------------------------------------------------------------------------------------------------


@every_server
@pytest.mark.parametrize("middleware", [nothing, generator, careless, one_ahead])
def test_a_stream_leaves_the_servers_thread_after_its_first_block(
    manager: SSEManager, stream: Callable[..., Stream], server: Server, middleware: Middleware
) -> None:
    client = stream(server, middleware)
    assert client.types(1) == ["sse_open"]
    assert client.leaves_its_thread()
    wait_for_transports(manager, 0, 1)
    for number in range(3):
        manager.enqueue("log", number)
        assert [event.json for event in client.take(1)] == [number]
    assert manager.get_stats().undone == 0
    manager.shutdown()
    assert [event.type for event in client.rest()] == ["sse_bye"]


def test_the_connection_has_a_high_number_and_the_servers_own_is_free_again(
    manager: SSEManager, stream: Callable[..., Stream]
) -> None:
    exchange = Exchange()
    client = stream(exchange=exchange)
    client.take(1)
    assert client.leaves_its_thread()
    wait_for_transports(manager, 0, 1)
    assert [fd >= MIN_DUPLICATE_FD for fd in loop.get().clients] == [True]
    with pytest.raises(OSError):
        os.fstat(exchange.fd)


def test_its_steps_are_the_first_block_and_the_end(manager: SSEManager) -> None:
    exchange = Exchange()
    body = detached_stream(manager, exchange.fd)
    first = next(body)
    assert first.startswith(b"event: sse_open\n")
    assert watched() == 0
    exchange.write(Server(chunked=False).head() + first)
    assert list(body) == []
    assert list(body) == []  # for a server that asks again
    body.close()
    wait_for_transports(manager, 0, 1)
    assert watched() == 0
    manager.shutdown()
    exchange.close()


def watched() -> int:
    """How many streams have a watcher, as those need that hold a thread of the server."""
    return len(watcher.get())


def detached_stream(manager: SSEManager, fd: int | None, **info: Any) -> DetachedStream:
    described = ServerInfo("fake", fd, None, lambda: False, lets_go=True)._replace(**info)
    return DetachedStream(manager, Request(("default",), described))


@every_server
def test_a_first_block_that_is_large_arrives_whole(
    manager: SSEManager, stream: Callable[..., Stream], server: Server
) -> None:
    client = stream(server, snapshot=manager.snapshot(lambda: [("state", LARGE), ("state", "end")]))
    assert client.types(1) == ["sse_open"]
    assert client.leaves_its_thread()
    assert [event.json for event in client.take(2)] == [LARGE, "end"]
    wait_for_transports(manager, 0, 1)
    manager.enqueue("log", 1)
    assert [event.json for event in client.take(1)] == [1]
    manager.shutdown()
    assert [event.type for event in client.rest()] == ["sse_bye"]


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("server", [Server(), Server(chunked=False)], ids=["chunked", "plain"])
def test_a_first_block_about_as_long_as_what_the_server_may_get_arrives_whole(
    manager: SSEManager, stream: Callable[..., Stream], server: Server, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(manager.subscribe()) as another:
        size = len(next(another))  # that of each first block, since only the digits of `retry` differ
    monkeypatch.setattr("sse_batcher.transports.detached.stream.MAX_PRELUDE_BYTES", size - more)
    given: list[int] = []

    def measure(body: Body) -> Iterator[bytes]:
        with closing(body):  # type: ignore[type-var]
            for block in body:
                given.append(len(block))
                yield block

    client = stream(server, measure)
    assert client.types(1) == ["sse_open"]
    assert client.leaves_its_thread()
    assert given == [min(size, size - more)]
    manager.enqueue("log", 1)
    assert client.types(1) == ["log"]
    wait_for_transports(manager, 0, 1)


@every_server
def test_a_head_that_does_not_fit_into_the_buffer_keeps_no_thread(manager: SSEManager, server: Server) -> None:
    exchange = Exchange()
    text = server.head()[:-2] + b"X-Long: " + b"x" * 1_000_000 + b"\r\n\r\n"
    server = Server(chunked=server.chunked, size=server.size, later=server.later)
    server.head = lambda: text  # type: ignore[method-assign]
    sent = Sent()
    body = detached_stream(manager, exchange.fd, unsent=sent.rest)
    thread = threading.Thread(target=server.serve, args=(exchange.fd, body, sent), daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    wait_for_transports(manager, 0, 1)
    assert b"x" * 1_000_000 in exchange.heard(len(text))
    manager.enqueue("log", 1)
    heard = b""
    while b"event: log\n" not in heard:
        heard += exchange.client.recv(1_000)
    manager.shutdown()
    exchange.client.close()


def test_a_stream_that_the_loop_cannot_take_in_ends_alone(
    manager: SSEManager, stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise ZeroDivisionError

    first = stream()
    first.take(1)
    wait_for_transports(manager, 0, 1)
    with monkeypatch.context() as patched:
        patched.setattr("sse_batcher.transports.detached.loop.SocketClient", fail)
        second = Exchange()
        Server().serve(second.fd, detached_stream(manager, second.fd))
        assert second.heard(1) == b""
        wait_until(lambda: manager.get_stats().clients == 1, "it is forgotten")
    manager.enqueue("log", 1)
    assert first.types(1) == ["log"]
    second.client.close()


def test_a_default_timeout_of_the_app_does_not_hold_the_loop_up(
    manager: SSEManager, stream: Callable[..., Stream]
) -> None:
    client = stream()
    client.take(1)
    assert client.leaves_its_thread()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        assert manager.shutdown(timeout=2)
    finally:
        socket.setdefaulttimeout(None)
        client.close()


def test_a_default_timeout_of_the_app_does_not_change_a_connection_that_stays_attached(manager: SSEManager) -> None:
    exchange = Exchange()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with closing(detached_stream(manager, exchange.fd, lets_go=False)) as body:
            next(body)
            assert os.get_blocking(exchange.fd)
    finally:
        socket.setdefaulttimeout(None)
        exchange.close()


# -- undone ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A take-over waits for nothing for long."""
    monkeypatch.setattr("sse_batcher.transports.detached.stream.TakeOver", partial(TakeOver, timeout=0.01))


@pytest.mark.usefixtures("hasty")
@every_server
@pytest.mark.parametrize("middleware", [two_ahead, one_behind, shouting, chatty])
def test_a_stream_that_a_middleware_changes_stays_attached(
    manager: SSEManager, stream: Callable[..., Stream], server: Server, middleware: Middleware
) -> None:
    def wrap(body: Body) -> Body:
        return middleware(Eager(body, manager))

    client = stream(server, wrap)
    expected = [("sse_open", None), ("log", 0), ("log", 1), ("log", 2)]
    taken = client.take(3)
    manager.enqueue("log", 3)
    taken += client.take(1)
    assert [(event.type, event.json if event.type == "log" else None) for event in taken] == expected
    assert transports(manager) == (1, 0)
    assert manager.get_stats().undone == 1
    manager.shutdown()
    assert [event.type for event in client.rest()][-1] == "sse_bye"


class Eager:
    """A stream for which much happens right after its first block, so that a test need not wait."""

    def __init__(self, body: Body, manager: SSEManager) -> None:
        self.body: Any = body
        self.iterator = self.steps(manager)

    def steps(self, manager: SSEManager) -> Iterator[bytes]:
        yield next(self.body)
        for number in range(3):
            manager.enqueue("log", number)
        yield from self.body

    def __iter__(self) -> Iterator[bytes]:
        return self.iterator

    def close(self) -> None:
        self.body.close()


@pytest.mark.usefixtures("hasty")
@every_server
def test_a_first_block_that_is_large_arrives_whole_when_that_is_undone(
    manager: SSEManager, stream: Callable[..., Stream], server: Server
) -> None:
    state = manager.snapshot(lambda: [("state", LARGE), ("state", "end")])
    client = stream(server, two_ahead, snapshot=state)
    assert client.types(1) == ["sse_open"]
    assert [event.json for event in client.take(2)] == [LARGE, "end"]
    manager.enqueue("log", 1)
    assert [event.json for event in client.take(1)] == [1]
    assert (transports(manager), manager.get_stats().undone) == ((1, 0), 1)
    manager.shutdown()
    assert [event.type for event in client.rest()] == ["sse_bye"]


def test_a_server_is_waited_for_only_while_it_has_something_to_write(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(fd: int, event: int, timeout: float) -> bool:
        waits.append(timeout)
        return False

    monkeypatch.setattr("sse_batcher.transports.detached.stream.TakeOver", partial(TakeOver, wait=wait))
    assert undone(manager)
    assert waits == []
    unsent = iter([1, 1, 0, 0])
    assert undone(manager, unsent=lambda: next(unsent))
    assert len(waits) == 2


def test_a_stream_closed_after_its_first_block_gives_the_connection_back(manager: SSEManager) -> None:
    exchange = Exchange()
    body = detached_stream(manager, exchange.fd)
    first = next(body)
    exchange.write(first)
    assert exchange.hears_nothing()
    body.close()
    assert exchange.goes_on(first)
    assert manager.get_stats().clients == 0
    assert list(body) == []
    body.close()
    exchange.close()


def test_a_stream_closed_by_another_thread_gives_the_connection_back(manager: SSEManager) -> None:
    exchange = Exchange()
    body = detached_stream(manager, exchange.fd)
    next(body)
    closing_it = threading.Thread(target=body.close)
    closing_it.start()
    closing_it.join()
    assert exchange.goes_on(b"")
    exchange.close()


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_stream_dropped_after_its_first_block_gives_the_connection_back(
    manager: SSEManager, in_a_cycle: bool
) -> None:
    exchange = Exchange()
    body = detached_stream(manager, exchange.fd)
    next(body)
    exchange.write(b"an error page")
    if in_a_cycle:
        body.myself = body  # type: ignore[attr-defined]
    del body
    gc.collect()
    assert exchange.goes_on(b"an error page")
    exchange.close()


def test_a_stream_interrupted_in_its_second_step_gives_the_connection_back(manager: SSEManager) -> None:
    interrupts = [SystemExit(1)]  # such as a handler of a signal raises

    def unsent() -> int:
        if interrupts:
            raise interrupts.pop()
        return 0

    exchange = Exchange()
    body = detached_stream(manager, exchange.fd, unsent=unsent)
    next(body)
    with pytest.raises(SystemExit):
        next(body)
    body.close()
    del body
    gc.collect()
    assert exchange.goes_on(b"")
    exchange.close()


def test_a_stream_that_is_never_iterated_leaves_the_connection_alone(manager: SSEManager) -> None:
    exchange = Exchange()
    body = detached_stream(manager, exchange.fd)
    body.close()
    assert exchange.goes_on(b"")
    assert list(body) == []
    exchange.close()


def test_without_descriptors_a_stream_stays_attached_and_it_is_logged(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(takeover, "duplicate", refuse)
    exchange = Exchange()
    with caplog.at_level(logging.INFO, LOG), closing(detached_stream(manager, exchange.fd)) as body:
        first = next(body)
        exchange.write(first)
        assert exchange.heard(len(first)) == first
        assert "Too many open files" in caplog.text
        manager.enqueue("log", 1)
        assert b"event: log\n" in next(body)
    exchange.close()


def test_where_no_thread_can_be_started_a_stream_stays_attached(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "can_run", lambda self: False)
    exchange = Exchange()
    with closing(detached_stream(manager, exchange.fd)) as body:
        next(body)
        assert exchange.goes_on(b"")
        manager.enqueue("log", 1)
        assert b"event: log\n" in next(body)
    exchange.close()


# -- no stream at all --------------------------------------------------------------------------------------------------


def test_a_client_above_the_limit_gets_busy_from_the_server(manager: SSEManager, stream: Callable[..., Stream]) -> None:
    assert OPTIONS.max_clients is not None
    clients = [manager.subscribe() for _ in range(OPTIONS.max_clients)]
    client = stream()
    (busy,) = client.rest()
    assert (busy.type, busy.json["reason"]) == ("sse_busy", "limit")
    for each in clients:
        each.close()


def test_a_client_that_comes_while_the_server_stops_gets_busy_from_the_server(
    manager: SSEManager, stream: Callable[..., Stream]
) -> None:
    manager.shutdown()
    (busy,) = stream().rest()
    assert (busy.type, busy.json["reason"]) == ("sse_busy", "draining")
    assert loop.get().clients == {}


def test_a_stream_that_ends_between_its_two_steps_says_goodbye(manager: SSEManager) -> None:
    exchange = Exchange()
    body = detached_stream(manager, exchange.fd)
    first = next(body)
    exchange.write(Server(chunked=False).head() + first)
    shutdown = threading.Thread(target=manager.shutdown)
    shutdown.start()
    wait_until(lambda: process_of(manager).hub.closing is not None, "the end is announced")
    assert list(body) == []
    shutdown.join()
    heard = b""
    while more := exchange.client.recv(1000):
        heard += more
    assert heard.startswith(Server(chunked=False).head() + first + b"event: sse_bye\n")
    exchange.close()


# -- what is said ------------------------------------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.message) for record in caplog.records if record.name == LOG]


def test_that_streams_are_detached_is_logged_once(
    stream: Callable[..., Stream], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, LOG):
        for _ in range(3):
            client = stream(name="gunicorn gthread")
            client.take(1)
            assert client.leaves_its_thread()
    ((level, text),) = said(caplog)
    assert level == "INFO"
    assert text.startswith("streams are detached from the threads of this gunicorn gthread; this process may have ")
    assert text.endswith(" file descriptors (ulimit -n), and each detached stream takes one")


def test_max_requests_of_the_server_is_logged_as_a_warning(
    stream: Callable[..., Stream], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, LOG):
        for _ in range(2):
            stream(max_requests=1000).take(1)
    ((level, text),) = said(caplog)
    assert level == "WARNING"
    assert "max_requests=1000 ends all streams each time it is reached" in text


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"name": "gunicorn gevent", "lets_go": False}, "gunicorn gevent does not give plain connections away"),
        ({"name": "", "lets_go": False}, "this server does not give plain connections away"),
        ({"name": "uwsgi", "fd": None}, "uwsgi does not give plain connections away"),
    ],
    ids=["gevent, or TLS", "unknown", "not shown"],
)
def test_streams_of_a_server_that_does_not_let_go_stay_attached_and_it_is_logged_once(
    manager: SSEManager, caplog: pytest.LogCaptureFixture, info: dict[str, Any], why: str
) -> None:
    with caplog.at_level(logging.INFO, LOG):
        for _ in range(2):
            exchange = Exchange()
            with closing(detached_stream(manager, **{"fd": exchange.fd} | info)) as body:
                next(body)
                assert exchange.goes_on(b"")
                manager.enqueue("log", 1)
                assert b"event: log\n" in next(body)
            exchange.close()
    assert said(caplog) == [("WARNING", f"streams stay attached, and hold a thread of the server each: {why}")]


def test_without_epoll_streams_stay_attached_and_it_is_logged_once(
    manager: SSEManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(select, "epoll")  # as gevent does
    exchange = Exchange()
    with caplog.at_level(logging.INFO, LOG):
        for _ in range(2):
            with closing(detached_stream(manager, exchange.fd)) as body:
                next(body)
                assert exchange.goes_on(b"")
    ((level, text),) = said(caplog)
    assert (level, "there is no epoll" in text) == ("WARNING", True)
    exchange.close()


def test_with_transport_attached_the_log_names_transport_auto_once(caplog: pytest.LogCaptureFixture) -> None:
    request = Request(("default",), ServerInfo("fake", None, None, lambda: False, lets_go=True))
    with SSEManager(batching=BatchOptions(batch_window=0)) as manager, caplog.at_level(logging.INFO, LOG):
        for _ in range(2):
            assert not isinstance(open_stream(manager, request), DetachedStream)
    ((level, text),) = said(caplog)
    assert (level, 'see transport="auto"' in text) == ("INFO", True)


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


def test_an_undone_take_over_is_logged_once_and_the_next_is_tried(
    manager: SSEManager, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, LOG):
        assert [undone(manager) for _ in range(5)] == [True] * 5
    assert manager.get_stats().undone == 5
    (text,) = [text for level, text in said(caplog) if level == "WARNING"]
    assert "the server has not written the expected response" in text


# -- threads that others need ------------------------------------------------------------------------------------------


def reasons(body: Body) -> list[tuple[str, str]]:
    """What a stream that ends says, without its first block if it was open."""
    found = EventStreamParser(strict=True).feed(b"".join(body))
    return [(event.type, event.json["reason"]) for event in found if event.type != "sse_open"]


Attached = Callable[..., DetachedStream]


@pytest.fixture
def attached(manager: SSEManager) -> Iterator[Attached]:
    """Makes a stream that cannot be detached, in a process with so many threads."""
    exchanges: list[Exchange] = []

    def attached(threads: int | None, **info: Any) -> DetachedStream:
        exchanges.append(Exchange())
        return detached_stream(manager, exchanges[-1].fd, threads=threads, **{"obstacle": "it has a body"} | info)

    yield attached
    for exchange in exchanges:
        exchange.close()


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_streams_that_cannot_be_detached_leave_half_of_the_threads_to_others(
    manager: SSEManager, attached: Attached, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack, caplog.at_level(logging.INFO):
        bodies = [stack.enter_context(closing(attached(threads))) for _ in range(threads // 2)]
        for body in bodies:
            assert next(body).startswith(b"event: sse_open\n")
        for _ in range(3):
            assert reasons(attached(threads)) == [("sse_busy", "threads")]
        assert transports(manager) == (threads // 2, 0)
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == 1
        assert ("serves one request at a time" in warnings[0]) == (threads == 1)
        if bodies:
            bodies.pop().close()
            assert next(stack.enter_context(closing(attached(threads)))).startswith(b"event: sse_open\n")


@pytest.mark.parametrize("threads", [1, 2, None])
def test_after_undo_a_stream_goes_on_only_if_its_thread_is_not_needed(
    manager: SSEManager, attached: Attached, threads: int | None
) -> None:
    bodies = [attached(threads, obstacle="") for _ in range(2)]
    with ExitStack() as stack:
        firsts = [next(stack.enter_context(closing(body))) for body in bodies]
        assert all(first.startswith(b"event: sse_open\n") for first in firsts)
        manager.enqueue("log", 1)
        manager.flush_all()
        seconds = [next(body) for body in bodies]
        open_ones = {1: 0, 2: 1, None: 2}[threads]
        assert [second.split()[1] for second in seconds] == [b"log"] * open_ones + [b"sse_bye"] * (2 - open_ones)
        for body, second in zip(bodies[open_ones:], seconds[open_ones:], strict=True):
            assert reasons([second, *body]) == [("sse_bye", "threads")]
            (event,) = EventStreamParser(strict=True).feed(second)
            assert 10_000 <= int(re.search(rb"retry: (\d+)", second)[1]) <= 30_000  # type: ignore[index]
            assert event.id  # it comes back with its place, and gets what it has not got


def test_without_descriptors_and_threads_a_stream_is_refused(
    manager: SSEManager, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(takeover, "duplicate", refuse)
    assert reasons(attached(1, obstacle="")) == [("sse_busy", "threads")]


def test_with_transport_attached_streams_may_hold_all_threads_unless_there_is_one() -> None:
    def attached_stream(manager: SSEManager, threads: int) -> Any:
        info = ServerInfo("fake", None, threads, lambda: False, lets_go=True)
        return open_stream(manager, Request(("default",), info))

    with SSEManager(batching=BatchOptions(batch_window=0)) as manager, ExitStack() as stack:
        assert reasons(attached_stream(manager, 1)) == [("sse_busy", "threads")]
        for _ in range(3):
            body = stack.enter_context(closing(attached_stream(manager, 2)))
            assert next(body).startswith(b"event: sse_open\n")


def test_a_client_that_leaves_while_its_stream_opens_is_forgotten(
    manager: SSEManager, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher sees it before there is a client that could be closed."""
    body = attached(None)
    process = process_of(manager)
    subscribe = process.subscribe

    def leave(*args: Any, **more: Any) -> Any:
        body.close()
        return subscribe(*args, **more)

    monkeypatch.setattr(process, "subscribe", leave)
    assert list(body) == []
    assert manager.get_stats().clients == 0


# -- forked children ---------------------------------------------------------------------------------------------------


def forking(*fds: int) -> None:
    """The program of the next test: a server with two open streams forks, and goes on, and so does its child.

    The third connection is the child's own.
    """
    manager = SSEManager(batching=BatchOptions(batch_window=0), clients=OPTIONS)
    inodes = [os.fstat(fd).st_ino for fd in fds]

    def detach(fd: int) -> None:
        thread = threading.Thread(target=Server().serve, args=(fd, detached_stream(manager, fd)))
        thread.start()
        thread.join()

    for fd in fds[:2]:
        detach(fd)
    wait_for_transports(manager, 0, 2)
    there = os.pipe()
    if os.fork():
        os.close(fds[2])
        os.read(there[0], 1)  # the child has had its say
        manager.enqueue("log", "parent")
        sys.stdin.readline()
        return
    detach(fds[2])
    wait_for_transports(manager, 0, 1)
    mine = " ".join(descriptors())
    manager.enqueue("log", "child")
    wait_until(lambda: manager.get_stats().frames == 1, "it is sent")
    say([f"socket:[{inode}]" in mine for inode in inodes])
    os.write(there[1], b"x")
    sys.stdin.readline()
    say("the child ends")
    os._exit(0)


def say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def test_a_forked_child_keeps_no_connection_of_its_parent_open_whose_streams_go_on() -> None:
    exchanges = [Exchange() for _ in range(3)]
    fds = [exchange.fd for exchange in exchanges]
    program = f"from tests.test_detached import forking; forking(*{fds})"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=fds,
        cwd=ROOT,
    ) as parent:
        for fd in fds:
            os.close(fd)
        assert parent.stdout is not None
        assert parent.stdin is not None
        clients = [answered(exchange) for exchange in exchanges]
        assert json.loads(parent.stdout.readline()) == [False, False, True]
        assert [events(client, 2) for client in clients] == [
            ["sse_open", "parent"],
            ["sse_open", "parent"],
            ["sse_open", "child"],
        ]
        parent.kill()  # nothing is shut down: a client sees now that no process has its connection
        for client in clients[:2]:
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                client.read()
        assert not select.select([exchanges[2].client], [], [], 0)[0]
        parent.stdin.close()
        assert json.loads(parent.stdout.readline()) == "the child ends"
    for exchange in exchanges:
        exchange.client.close()


def answered(exchange: Exchange) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(exchange.client)
    answer.begin()
    return answer


def events(answer: http.client.HTTPResponse, count: int) -> list[str]:
    parser = EventStreamParser(strict=True)
    found: list[ServerEvent] = []
    while len(found) < count:
        found += parser.feed(answer.read1(65_536))
    return [event.json if event.type == "log" else event.type for event in found]


def test_a_forked_child_keeps_no_connection_open_that_its_parent_is_about_to_take(manager: SSEManager) -> None:
    exchange = Exchange()
    with closing(detached_stream(manager, exchange.fd)) as body:
        next(body)
        child = os.fork()
        if not child:
            open_there = [
                os.stat(f"/proc/self/fd/{fd}").st_ino
                for fd in os.listdir("/proc/self/fd")
                if int(fd) >= MIN_DUPLICATE_FD
            ]
            os._exit(exchange.inode in open_there)
        assert os.waitpid(child, 0) == (child, 0)
        assert exchange.hears_nothing()
    assert exchange.is_restored()
    exchange.close()


def test_descriptors_that_a_child_has_closed_are_not_closed_by_its_own_child(as_process: AsProcess) -> None:
    loops = PerProcess(object)
    parents = loops.get()
    with as_process(-1):
        assert loops.left_behind() == [parents]
        childs = loops.get()
    with as_process(-2):
        assert loops.left_behind() == [childs]
        assert loops.left_behind() == []


# -- exceptions of signal handlers -------------------------------------------------------------------------------------


def test_an_exception_in_a_take_over_ends_at_most_its_stream(manager: SSEManager) -> None:
    """As a time limit of the app, in a server that serves requests in its main thread."""
    hanging: list[int] = []
    left = descriptors()
    for place in itertools.count():
        exchange, server = Exchange(), Server()
        info = ServerInfo("fake", exchange.fd, None, lambda: False, lets_go=True)
        body = open_stream(manager, Request(("default",), info))
        interrupted = interrupt(lambda: server.write(exchange.fd, server.response(body)), place)  # noqa: B023
        body.close()
        os.close(exchange.fd)
        manager.kick(channel="default")
        exchange.client.settimeout(2)
        try:
            while exchange.client.recv(65_536):  # whether it got anything or not, there is an end
                pass
        except TimeoutError:
            hanging.append(place)
        exchange.client.close()
        wait_until(lambda: manager.get_stats().clients == 0, "the client is forgotten")
        if not interrupted:
            break
    assert place > 100
    # Two places are left, for an instant each: as soon as the system has given the number of the duplicate, and when
    # the connection is on its way to the loop. Places shift with whether the loop's thread runs: some are met twice.
    assert len(hanging) <= 4
    for leaked in set(descriptors()) - set(left):
        os.close(int(leaked.split()[0]))
