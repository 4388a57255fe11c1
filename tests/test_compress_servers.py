"""Compressed streams over real servers, through nginx with and without its own gzip, and in clients that people use.

Browsers are in `test_browser_servers`, which has started them anyway.
"""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

from .kit import nginx
from .kit.clients import PYTHON_CLIENTS, Job, Node
from .kit.servers import GTHREAD, Kind, Server, detached, gunicorn, serving
from .kit.services import program
from .kit.slicer import Relay
from .kit.sse_parser import EventStreamParser, ServerEvent
from .kit.waiting import wait_until

pytestmark = pytest.mark.external

GZIP = " gzip on; gzip_types text/event-stream; gzip_min_length 0; gzip_proxied any;"
KINDS = {
    "attached": Kind(GTHREAD),
    "detached": detached(Kind(gunicorn())),
    "nginx": detached(Kind(GTHREAD, nginx=nginx.PASS)),
    "nginx-gzip-attached": Kind(GTHREAD, nginx=nginx.KEEPING + GZIP),
    "nginx-gzip-detached": detached(Kind(GTHREAD, nginx=nginx.KEEPING + GZIP)),
}
WITH_CLIENTS = ("attached", "nginx-gzip-detached")
"""Servers that all clients come to."""
BURST = [("item", {"name": f"item {number}", "state": "ready"}) for number in range(10)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    # With a long window, a burst is one batch, because it is as large as a batch may be.
    options = {"COMPRESS": "default", "BATCH_WINDOW": "10"}
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(serving(kind, tmp_path_factory.mktemp(name), **options))
            for name, kind in KINDS.items()
        }


class Reader:
    """A client made of the standard library."""

    def __init__(self, server: Server, query: str = "", accepts: str = "gzip", **headers: str) -> None:
        self._connection = server.connect()
        self._connection.request("GET", f"/events{query}", headers={"Accept-Encoding": accepts, **headers})
        self.response = self._connection.getresponse()
        self.headers = self.response.headers
        is_compressed = self.headers["Content-Encoding"] == "gzip"
        self._decompress = zlib.decompressobj(wbits=31).decompress if is_compressed else bytes
        self._parser = EventStreamParser(strict=True)
        self.comments = self._parser.comments
        self.size = 0

    def take(self, count: int) -> list[ServerEvent]:
        """The next so many events. Nothing comes with them that is more."""
        events: list[ServerEvent] = []
        while len(events) < count:
            events += self.read()
        assert len(events) == count
        return events

    def read(self) -> list[ServerEvent]:
        """The events that come next, none if that is a heartbeat."""
        data = self.response.read1(65_536)
        assert data, "the end"
        self.size += len(data)
        return self._parser.feed(self._decompress(data))

    def close(self) -> None:
        self.response.close()
        self._connection.close()


@pytest.mark.parametrize("name", KINDS)
def test_each_block_of_a_compressed_stream_arrives_at_once(servers: Mapping[str, Server], name: str) -> None:
    server = servers[name]
    plain, compressed = Reader(server, accepts="identity"), Reader(server)
    assert [each.headers.get("Content-Encoding", "identity") for each in (plain, compressed)] == ["identity", "gzip"]
    for reader in (plain, compressed):
        assert "Accept-Encoding" in reader.headers["Vary"]
        (opened,) = reader.take(1)
        assert opened.type == "sse_open"
    sizes = plain.size, compressed.size
    for number in range(3):
        server.enqueue(("hub_state", number))
        both = [reader.take(1) for reader in (plain, compressed)]
        assert both[0] == both[1]
    server.enqueue(*BURST)
    both = [reader.take(1) for reader in (plain, compressed)]
    assert both[0] == both[1]
    assert [event["state"] for event in both[1][0].json["events"]] == ["ready"] * 10
    assert compressed.size - sizes[1] < 0.8 * (plain.size - sizes[0])
    cursor = both[1][-1].id
    plain.close()
    compressed.close()
    if KINDS[name].transport == "auto":
        assert server.stats()["undone"] == 0

    server.enqueue(*BURST)
    again = Reader(server, "?batch=0", **{"Last-Event-ID": cursor})
    opened, *items = again.take(11)
    assert (opened.id, [item.json for item in items]) == (cursor, [data for _, data in BURST])
    while not again.comments:
        assert again.read() == []
    again.close()

    poll = Reader(server, "?poll=1", **{"Last-Event-ID": cursor})
    assert [event.type for event in poll.take(2)] == ["sse_open", "item_batch"]
    assert poll.response.read() == b""
    poll.close()


def test_curl_decompresses_each_event_as_it_comes(servers: Mapping[str, Server]) -> None:
    curl = program("curl", package="Debian: curl")
    for name in WITH_CLIENTS:
        server = servers[name]
        command = [curl, "--silent", "--no-buffer", "--compressed", f"{server.url}/events"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for wanted in ("sse_open", "hub_state", "hub_state"):
                while f"event: {wanted}\n".encode() != process.stdout.readline():
                    pass
                server.enqueue(("hub_state", 1))
            process.kill()


@pytest.mark.parametrize("name", WITH_CLIENTS)
@pytest.mark.parametrize("client", PYTHON_CLIENTS)
def test_a_client_in_python_gets_each_event_at_once_and_comes_back(
    servers: Mapping[str, Server], name: str, client: str
) -> None:
    server = servers[name]
    with PYTHON_CLIENTS[client].connect(f"{server.url}/events") as events:
        assert next(events).type == "sse_open"
        server.enqueue(("hub_state", 1))
        first = next(events)
        server.enqueue(*BURST)
        batch = next(events)
    server.enqueue(("hub_state", "missed"))
    with PYTHON_CLIENTS[client].connect(f"{server.url}/events", batch.id) as events:
        assert next(events).id == batch.id
        missed = next(events)
    assert (first.json, len(batch.json["events"]), missed.json) == (1, 10, "missed")


@pytest.mark.parametrize("name", WITH_CLIENTS[1:])
def test_a_client_in_node_gets_each_event_at_once_and_comes_back(
    servers: Mapping[str, Server], name: str, node: Node
) -> None:
    types = ["sse_open", "sse_gap", "hub_state", "item_batch"]
    with Relay(servers[name].port) as relay:
        job: Job = {"urls": [f"{relay.url}/events"], "types": types, "last": "end", "atOnce": 1}
        with node.collecting(dict.fromkeys(node.names, job)) as run:

            def wait_for(*expected: str) -> None:
                def have_come() -> bool:
                    streams = [events for each in run.read().values() for events in each.values()]
                    return [[event.type for event in events] for events in streams] == [[*expected]] * len(node.names)

                wait_until(have_come, f"all have {expected}")

            wait_for("sse_open")
            servers[name].enqueue(("hub_state", 1))
            wait_for("sse_open", "hub_state")
            servers[name].enqueue(*BURST)
            wait_for("sse_open", "hub_state", "item_batch")
            with relay.broken():
                servers[name].enqueue(("hub_state", "missed"))
            wait_for("sse_open", "hub_state", "item_batch", "sse_open", "hub_state")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("node"))
