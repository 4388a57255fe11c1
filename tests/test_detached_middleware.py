"""Detached streams behind middleware: what leaves the stream alone, looks ahead, or changes it."""

from __future__ import annotations

import itertools
import select
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from sse_batcher import SSEManager

from .kit import detached
from .kit.detached import (
    LARGE,
    Body,
    Middleware,
    Server,
    Stream,
    every_server,
    nothing,
    transports,
    wait_for_transports,
)

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="streams are detached where there is epoll")

# The fixtures of this module.
no_descriptor_is_left = detached.no_descriptor_is_left
nothing_was_logged_yet = detached.nothing_was_logged_yet
manager = detached.manager
stream = detached.stream
hasty = detached.hasty

# -- middleware --------------------------------------------------------------------------------------------------------


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


# -- streams behind it -------------------------------------------------------------------------------------------------


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
