"""The clients that people run against the servers that people run: httpx-sse, and sseclient-py over requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx
import httpx_sse
import pytest
import requests
import sseclient

from .servers import COMMANDS, TIMEOUT, Block, Server, running

Connect = Callable[..., AbstractContextManager[Iterator[Block]]]


@contextmanager
def with_httpx_sse(url: str, **headers: str) -> Iterator[Iterator[Block]]:
    with (
        httpx.Client(timeout=TIMEOUT, trust_env=False) as client,
        httpx_sse.connect_sse(client, "GET", url, headers=headers) as source,
    ):
        yield (Block(event.event, json.loads(event.data), event.id) for event in source.iter_sse())


@contextmanager
def with_sseclient(url: str, **headers: str) -> Iterator[Iterator[Block]]:
    with requests.Session() as session:
        session.trust_env = False
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            events = sseclient.SSEClient(response).events()
            yield (Block(event.event, json.loads(event.data), event.id) for event in events)


@pytest.fixture(scope="module", params=COMMANDS)
def shared_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(COMMANDS[request.param], tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    with shared_server.watched():
        yield shared_server


@pytest.fixture(params=[with_httpx_sse, with_sseclient])
def connect(request: pytest.FixtureRequest) -> Connect:
    function: Connect = request.param
    return function


def until(events: Iterator[Block], last: str) -> list[Block]:
    """The events up to the next one of this type."""
    blocks = []
    for block in events:
        blocks.append(block)
        if block.event == last:
            return blocks
    raise AssertionError(f"the stream ended before {last!r}, after {blocks}")


def test_a_client_gets_everything_in_order_and_nothing_else(server: Server, connect: Connect) -> None:
    with connect(server.url + "/events") as events:
        assert next(events).event == "sse_open"
        server.enqueue(("item", {"text": "one\nline \u2028 \u00e9"}))
        (lone,) = until(events, "item")  # heartbeats pass before it, and are no events
        assert lone.data == {"text": "one\nline \u2028 \u00e9"}

        server.enqueue(*[("item", n) for n in range(30)], ("hub_state", "ready"), ("item", 30), ("error", "last"))
        received = until(events, "error")
        assert [block.event for block in received] == ["item_batch"] * 3 + ["hub_state", "item", "error"]
        assert [n for batch in received[:3] for n in batch.data["events"]] == list(range(30))
        assert [block.data for block in received[3:]] == ["ready", 30, "last"]


def test_a_client_that_returns_with_the_last_id_has_missed_nothing(server: Server, connect: Connect) -> None:
    with connect(server.url + "/events") as events:
        next(events)
        server.enqueue(("hub_state", 1))
        (block,) = until(events, "hub_state")
        assert block.id
    with connect(server.url + "/events", **{"Last-Event-ID": block.id}) as events:
        resumed = next(events)
        assert (resumed.event, resumed.id) == ("sse_open", block.id)
        server.enqueue(("hub_state", 2))
        assert next(events).data == 2
