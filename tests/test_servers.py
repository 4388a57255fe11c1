"""The servers that people run: werkzeug's, gunicorn with threads, waitress."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sse_batcher.wire import HEARTBEAT

from .servers import COMMANDS, Server, Stream, running, wait_until

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


@pytest.fixture(scope="module", params=COMMANDS)
def name(request: pytest.FixtureRequest) -> str:
    server_name: str = request.param
    return server_name


@pytest.fixture(scope="module")
def shared_server(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(COMMANDS[name], tmp_path_factory.mktemp(name)) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    with shared_server.watched():
        yield shared_server


def test_the_head_and_the_first_block_come_before_anything_happens(server: Server) -> None:
    with Stream(server) as stream:
        assert stream.response.status == 200
        assert HEADERS.items() <= dict(stream.response.getheaders()).items()
        assert stream.line() == "event: sse_open\n"


def test_a_lone_event_arrives_as_it_is(server: Server) -> None:
    with Stream(server) as stream:
        stream.until("sse_open")
        server.enqueue(("item", {"n": 1}))
        (block,) = stream.until("item")
        assert block.data == {"n": 1}


def test_thirty_events_at_once_arrive_as_three_batches(server: Server) -> None:
    with Stream(server) as stream:
        stream.until("sse_open")
        server.enqueue(*[("item", {"n": n}) for n in range(30)], ("hub_state", "end"))
        *batches, _ = stream.until("hub_state")
        assert [(batch.event, batch.data["batchSize"]) for batch in batches] == [("item_batch", 10)] * 3
        assert [event for batch in batches for event in batch.data["events"]] == [{"n": n} for n in range(30)]


def test_a_critical_event_arrives_at_once_and_after_what_was_waiting(server: Server) -> None:
    with Stream(server) as stream:
        stream.until("sse_open")
        server.enqueue(("item", 1), ("item", 2), ("hub_state", {"state": "ready"}))
        batch, critical = stream.until("hub_state")
        assert (batch.event, batch.data["events"], batch.data["reason"]) == ("item_batch", [1, 2], "critical")
        assert critical.data == {"state": "ready"}


def test_a_client_that_leaves_is_forgotten_within_two_heartbeats(server: Server, name: str) -> None:
    # The first write finds nothing wrong and is answered by a reset, the second one fails. That of waitress fails
    # behind the stream's back, which is told at the third.
    assert _heartbeats_until_forgotten(server) <= (3 if name == "waitress" else 2)


def test_waitress_with_lookahead_forgets_a_client_at_the_next_heartbeat(tmp_path: Path) -> None:
    *options, app = COMMANDS["waitress"]
    with running((*options, "--channel-request-lookahead=1", app), tmp_path) as server:
        assert _heartbeats_until_forgotten(server) <= 1


def _heartbeats_until_forgotten(server: Server) -> float:
    """How many heartbeats are made for a client that has left before it is gone."""
    wait_until(lambda: server.stats()["clients"] == 0, "earlier clients are gone")
    with Stream(server) as stream:
        stream.until("sse_open")
        assert server.stats()["clients"] == 1
        while stream.line() != HEARTBEAT.decode():
            pass  # right after one, the next is far away
    before = server.stats()["bytes"]
    wait_until(lambda: server.stats()["clients"] == 0, "the client is gone")
    return (server.stats()["bytes"] - before) / len(HEARTBEAT)


@pytest.mark.parametrize(
    ("name", "signal_number"),
    [
        ("werkzeug", signal.SIGINT),
        ("werkzeug", signal.SIGTERM),
        ("gunicorn", signal.SIGINT),
        ("gunicorn", signal.SIGTERM),
        ("waitress", signal.SIGINT),  # takes five seconds: it gives its threads this time to end
        ("waitress", signal.SIGTERM),
    ],
    ids=lambda value: getattr(value, "name", value),
    scope="function",
)
def test_a_server_that_is_stopped_ends_and_so_does_every_stream(
    name: str, signal_number: signal.Signals, tmp_path: Path
) -> None:
    with running(COMMANDS[name], tmp_path) as server, ExitStack() as stack:
        streams = [stack.enter_context(Stream(server)) for _ in range(3)]
        for stream in streams:
            stream.until("sse_open")
        server.stop(signal_number)
        endings = [stream.to_end() for stream in streams]
        if signal_number == signal.SIGINT and name != "gunicorn":
            # These two let Python end in good order. SIGTERM does not, and gunicorn kills a worker that still streams.
            assert [[block.event for block in blocks] for blocks in endings] == [["sse_bye"]] * 3
