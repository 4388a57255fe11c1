"""Detached streams, on fakes of each kind of server: what leaves the server's thread, and what is given back to it."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any, NoReturn

import pytest

from sse_batcher import SSEManager
from sse_batcher.manager_state import process_of
from sse_batcher.runtime.process import PerProcess
from sse_batcher.transports import open_stream
from sse_batcher.transports.detached import stream as streams
from sse_batcher.transports.detached import takeover
from sse_batcher.transports.detached.loop import Loop, loop
from sse_batcher.transports.detached.takeover import TakeOver
from sse_batcher.transports.server import ServerInfo
from sse_batcher.transports.sockets import MIN_DUPLICATE_FD

from .kit import detached
from .kit.detached import (
    LARGE,
    LOG,
    OPTIONS,
    Body,
    Sent,
    Server,
    Stream,
    detached_stream,
    every_server,
    served,
    undone,
    wait_for_transports,
    watched,
)
from .kit.exchange import Exchange, descriptors
from .kit.interrupts import interrupt
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="streams are detached where there is epoll")

# The fixtures of this module.
no_descriptor_is_left = detached.no_descriptor_is_left
nothing_was_logged_yet = detached.nothing_was_logged_yet
manager = detached.manager
stream = detached.stream

# -- detached ----------------------------------------------------------------------------------------------------------


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
    socket.setdefaulttimeout(4 * TIMEOUT)
    try:
        assert manager.shutdown(timeout=TIMEOUT)
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


def test_without_descriptors_for_the_loop_the_first_stream_stays_attached(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> select.epoll:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(streams, "loop", PerProcess(lambda: Loop(make_epoll=refuse)))
    exchange = Exchange()
    with caplog.at_level(logging.INFO, LOG), closing(detached_stream(manager, exchange.fd)) as body:
        assert next(body).startswith(b"event: sse_open\n")
        assert "a stream stays attached: [Errno 24] Too many open files" in caplog.text
        assert exchange.goes_on(b"")
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


# -- exceptions of signal handlers -------------------------------------------------------------------------------------


def test_an_exception_in_a_take_over_ends_at_most_its_stream(manager: SSEManager) -> None:
    """As a time limit of the app, in a server that serves requests in its main thread."""
    hanging: list[int] = []
    left = descriptors()
    for place in itertools.count():
        exchange, server = Exchange(), Server()
        info = ServerInfo("fake", exchange.fd, None, lambda: False, lets_go=True)
        body = open_stream(manager, served(info))
        interrupted = interrupt(lambda: server.write(exchange.fd, server.response(body)), place)  # noqa: B023
        body.close()
        os.close(exchange.fd)
        manager.kick(channel="default")
        # Whether it got anything or not, there is an end. A machine that stands still costs only one of these waits.
        exchange.client.settimeout(0.25)
        for _ in range(8):
            with suppress(TimeoutError):
                while exchange.client.recv(65_536):
                    pass
                break
        else:
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
