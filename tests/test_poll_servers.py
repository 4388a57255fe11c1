"""Polls under servers: fakes that let connections go, and those that people run."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sse_batcher import ClientOptions, SSEManager
from sse_batcher.transports.attached import AttachedStream
from sse_batcher.transports.detached.takeover import TakeOver
from sse_batcher.transports.server import ServerInfo
from sse_batcher.wire import HEARTBEAT

from .kit import detached
from .kit.detached import served
from .kit.exchange import Exchange
from .kit.polls import types
from .kit.servers import SERVERS, Kind, Server, serving
from .kit.sse_parser import ServerEvent, parse
from .kit.waiting import TIMEOUT, wait_until

manager = detached.manager
stream = detached.stream
no_descriptor_is_left = detached.no_descriptor_is_left
nothing_was_logged_yet = detached.nothing_was_logged_yet


# -- a server that lets connections go ---------------------------------------------------------------------------------


@detached.every_server
def test_a_poll_that_waits_leaves_its_thread(
    manager: SSEManager, stream: Callable[..., detached.Stream], server: detached.Server
) -> None:
    waiting = stream(server, poll=True, cursor=manager.cursor())
    (opened,) = waiting.take(1)
    assert opened.type == "sse_open"
    assert waiting.leaves_its_thread()
    detached.wait_for_transports(manager, 0, 1)
    manager.enqueue("log", 1)
    (event,) = waiting.rest()
    assert (event.type, event.json) == ("log", 1)
    detached.wait_for_transports(manager, 0, 0)
    assert manager.get_stats().undone == 0


@pytest.mark.parametrize("what", ["new", "behind", "gap", "kicked"])
def test_a_poll_that_ends_at_once_is_not_detached(
    manager: SSEManager, stream: Callable[..., detached.Stream], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    begun: list[int] = []

    class Noted(TakeOver):
        def __init__(self, fd: int, *more: Any) -> None:
            begun.append(fd)
            super().__init__(fd, *more)

    monkeypatch.setattr("sse_batcher.transports.detached.stream.TakeOver", Noted)
    cursor, ticket = manager.cursor(), manager.ticket()
    manager.enqueue("log", 1)
    assert manager.flush_all(TIMEOUT)
    manager.kick(user=7)
    request: dict[str, dict[str, Any]] = {
        "new": {},
        "behind": {"cursor": cursor},
        "gap": {"cursor": "old"},
        "kicked": {"cursor": cursor, "user": 7, "ticket": ticket},
    }
    answer = stream(poll=True, **request[what])
    expected = {"new": ["sse_open"], "behind": ["sse_open", "log"], "gap": ["sse_gap"], "kicked": ["sse_open"]}
    assert types(answer.rest()) == expected[what]
    assert answer.leaves_its_thread()
    assert begun == []
    waiting = stream(poll=True, cursor=manager.cursor())  # by which it is seen that others are noted
    waiting.take(1)
    assert waiting.leaves_its_thread()
    assert len(begun) == 1


def test_a_poll_that_is_held_back_on_its_way_goes_on_and_a_stream_does_not(no_descriptor_is_left: None) -> None:
    with SSEManager(clients=ClientOptions(heartbeat=0.01)) as manager:
        for poll in (False, True):
            exchange = Exchange()
            exchange.client.sendall(b"GET /events")  # after which nothing is written to it
            server = ServerInfo("fake", exchange.fd, None, lambda: False)
            body = AttachedStream(manager, served(server, cursor=manager.cursor(), poll=poll))
            assert next(body).startswith(b"event: sse_open\n")
            block = next(body)
            assert (block == HEARTBEAT) == poll
            assert types(parse(block)) == ([] if poll else ["sse_bye"])
            body.close()
            exchange.close()


# -- the servers that people run ---------------------------------------------------------------------------------------

POLL_WAIT = 2.0


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, id=name, marks=pytest.mark.external) for name, kind in SERVERS.items()],
)
def shared_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kind: Kind = request.param
    with serving(kind, tmp_path_factory.mktemp("server"), BATCH_WINDOW="0.02", POLL_WAIT=str(POLL_WAIT)) as server:
        yield server
        assert server.faults() == []


def asked(server: Server, cursor: str = "") -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A poll whose head has come."""
    connection = server.connect()
    connection.request("GET", "/events?poll=1", headers={"Last-Event-ID": cursor} if cursor else {})
    return connection, connection.getresponse()


def is_over(begun: float) -> bool:
    """Whether a poll that was sent at this time need not wait any more."""
    return time.monotonic() > begun + POLL_WAIT


def answered(server: Server, cursor: str = "") -> list[ServerEvent]:
    connection, response = asked(server, cursor)
    try:
        return parse(response.read(), strict=True)  # IncompleteRead if it is cut off
    finally:
        connection.close()


def test_under_each_server_polls_wait_and_bring_everything_once(shared_server: Server) -> None:
    with shared_server.watched() as server:
        (opened,) = answered(server)
        assert opened.type == "sse_open"
        assert types(answered(server, opened.id)) == ["sse_open"]  # after its time
        brought = 0
        for number in range(6):
            begun = time.monotonic()
            waiting = [asked(server, opened.id) for _ in range(3)]
            wait_until(lambda: server.stats()["clients"] == 3 or is_over(begun), "all three wait")  # noqa: B023
            server.enqueue(("item", number))
            answers = [[event.json for event in parse(response.read(), strict=True)[1:]] for _, response in waiting]
            for connection, _ in waiting:
                connection.close()
            assert [event.json for event in answered(server, opened.id)[1:]] == [number]  # it was behind
            (opened,) = answered(server)
            brought += answers == [[number]] * 3
            if brought == 3:
                break
            # One whose time is over gets nothing, if the machine stood still.
            assert answers == [[number]] * 3 or (is_over(begun) and all(answer in ([], [number]) for answer in answers))
        assert brought == 3
        wait_until(lambda: server.stats()["clients"] == 0, "all are gone")
        assert server.stats()["undone"] == 0
