"""Which streams are detached, what is logged about that, and how many of the server's threads the others may hold."""

from __future__ import annotations

import logging
import re
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from sse_batcher import ClientOptions, SSEManager
from sse_batcher.manager_state import process_of
from sse_batcher.transports import open_stream
from sse_batcher.transports.detached import takeover
from sse_batcher.transports.detached.stream import DetachedStream
from sse_batcher.transports.server import ServerInfo

from .kit import detached
from .kit.detached import LOG, Body, Stream, detached_stream, said, served, transports, undone
from .kit.exchange import Exchange
from .kit.sse_parser import EventStreamParser

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="streams are detached where there is epoll")

# The fixtures of this module.
no_descriptor_is_left = detached.no_descriptor_is_left
nothing_was_logged_yet = detached.nothing_was_logged_yet
manager = detached.manager
stream = detached.stream

# -- what is said ------------------------------------------------------------------------------------------------------


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
        (
            {"name": "gunicorn gevent", "lets_go": False},
            "greenlet of the server each: gunicorn gevent does not serve requests in threads",
        ),
        (
            {"name": "gunicorn gthread", "lets_go": False},
            "thread of the server each: gunicorn gthread does not give plain connections away",
        ),
        ({"name": "uwsgi", "fd": None}, "thread of the server each: uwsgi does not give plain connections away"),
    ],
    ids=["gevent", "TLS", "not shown"],
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
    assert said(caplog) == [("INFO", f"streams stay attached, and hold a {why}")]


@pytest.mark.parametrize("name", ["", "mod_wsgi"])
def test_it_is_a_warning_if_the_server_may_run_out_of_threads(
    manager: SSEManager, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with caplog.at_level(logging.INFO, LOG):
        for _ in range(2):
            with closing(detached_stream(manager, None, name=name, lets_go=False)) as body:
                next(body)
    ((level, text),) = said(caplog)
    assert level == "WARNING"
    assert text.startswith("streams stay attached, and hold a thread of the server each: ")
    assert "SSE_MAX_CLIENTS" in text


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
    assert (level, "there is no epoll" in text) == ("INFO", True)
    exchange.close()


def test_with_transport_attached_the_log_names_that_option_once(caplog: pytest.LogCaptureFixture) -> None:
    request = served(ServerInfo("fake", None, None, lambda: False, lets_go=True))
    attached = ClientOptions(transport="attached")
    with SSEManager(clients=attached) as manager, caplog.at_level(logging.INFO, LOG):
        for _ in range(2):
            assert not isinstance(open_stream(manager, request), DetachedStream)
    ((level, text),) = said(caplog)
    assert (level, 'transport="attached" asks for it' in text) == ("INFO", True)


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


@pytest.mark.parametrize(("threads", "for_streams"), [(1, 0), (2, 1), (5, 2), (16, 8), (20, 10), (20, 17)])
def test_streams_that_cannot_be_detached_leave_threads_to_others(
    manager: SSEManager,
    attached: Attached,
    threads: int,
    for_streams: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of them, or enough if there are many."""
    if for_streams > threads // 2:
        monkeypatch.setattr("sse_batcher.transports.attached.FREE_THREADS", threads - for_streams)
    with ExitStack() as stack, caplog.at_level(logging.INFO):
        bodies = [stack.enter_context(closing(attached(threads))) for _ in range(for_streams)]
        for body in bodies:
            assert next(body).startswith(b"event: sse_open\n")
        for _ in range(3):
            assert reasons(attached(threads)) == [("sse_busy", "threads")]
        assert transports(manager) == (for_streams, 0)
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
        return open_stream(manager, served(info))

    with SSEManager(clients=ClientOptions(transport="attached")) as manager, ExitStack() as stack:
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
