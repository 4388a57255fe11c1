"""What any client may send: odd requests, long answers, old cursors. None of it may hold a thread that others need.

Under real servers that have four threads, or one.
"""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from sse_batcher import SSEManager

from .kit.leaving import process_of, read_until, reset, serving_app, wait_for_clients, wait_for_transports
from .kit.redisserver import cursor_of, redis_server
from .kit.servers import HOST, SERVERS, Server, Stream, gunicorn, with_threads
from .kit.sse_parser import EventStreamParser
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

THREADS = 4
COMMANDS = {"gunicorn-sync": gunicorn()} | {
    name: with_threads(SERVERS[name].command, THREADS)
    for name in ("gunicorn", "werkzeug", "waitress", "cheroot", "uwsgi")
}
each_server = pytest.mark.parametrize("name", COMMANDS)

ODD = {
    "HTTP/1.2": b"GET /events HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/2.0": b"GET /events HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /events\r\n\r\n",
    "another protocol": b"GET /events FOO/1.1\r\nHost: x\r\n\r\n",
    "a body": b"GET /events HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    "chunks": b"GET /events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "a body to come": b"GET /events HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
    "chunks to come": b"GET /events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    "an upgrade to HTTP/2": b"GET /events HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
    "two requests": 2 * b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n",
}
OWN = {("cheroot", "a body to come"), ("gunicorn", "a body to come"), ("gunicorn", "chunks to come")}
"""These servers wait some seconds for the body, whatever the answer is: any other page costs that, too."""


@each_server
def test_odd_requests_leave_threads_to_others(name: str, tmp_path: Path) -> None:
    with serving_app(COMMANDS[name], tmp_path) as server, ExitStack() as stack:
        for what, request in ODD.items():
            if (name, what) in OWN:
                continue
            odd = [stack.enter_context(connect(server, request)) for _ in range(2 * THREADS)]
            for connection in odd:
                read_on(connection, TIMEOUT if what == "another protocol" else 0.1)
            streams = [stack.enter_context(Stream(server)) for _ in range(2 * THREADS)]
            for stream in streams:
                stream.until("sse_open")
            wait_until(lambda: leave_threads(name, server, len(streams)), f"{what}: all are detached")  # noqa: B023
            for connection in odd:
                connection.close()
            for stream in streams:
                stream.__exit__()
            wait_for_clients(server, 0)
        assert server.stats()["undone"] == 0


def leave_threads(name: str, server: Server, streams: int) -> bool:
    """Whether so many streams are detached, and few are attached. An odd one may be on its way from there."""
    counts = server.stats()["clients_by_transport"]
    is_free = name == "werkzeug" or counts["attached"] <= THREADS // 2  # which has a thread for each
    return is_free and counts["detached"] >= streams


def connect(server: Server, request: bytes) -> socket.socket:
    connection = socket.create_connection((HOST, server.port), timeout=TIMEOUT)
    connection.sendall(request)
    return connection


def read_on(connection: socket.socket, timeout: float) -> None:
    """Up to the stream's first block; close it if the answer ends. Some servers wait for the rest of the request.

    Where they refuse it, the answer ends for sure, and gunicorn holds a thread until its client has closed.
    """
    connection.settimeout(timeout)
    heard = b""
    with suppress(TimeoutError):
        while b"sse_open" not in heard:
            heard += (more := connection.recv(1_000))
            if not more:
                connection.close()
                return


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


@each_server
def test_clients_that_leave_at_once_leave_nothing_behind(name: str, tmp_path: Path) -> None:
    with serving_app(COMMANDS[name], tmp_path) as server, ExitStack() as stack:
        for leave in (socket.socket.close, reset, half_close):
            for _ in range(10):
                connection = stack.enter_context(connect(server, b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n"))
                leave(connection)
        with Stream(server) as stream:
            stream.until("sse_open")
            wait_for_transports(server, 0, 1)
            assert server.stats()["undone"] == 0


# -- long answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [300_000, 5_000_000])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "uwsgi"])  # its headers are shorter than that
def test_a_stream_with_a_long_head_opens_and_needs_no_thread(name: str, size: int, tmp_path: Path) -> None:
    with serving_app(COMMANDS[name], tmp_path) as server, ExitStack() as stack:
        request = b"GET /events?head=%d HTTP/1.1\r\nHost: x\r\n\r\n" % size
        connections = [stack.enter_context(connect(server, request)) for _ in range(THREADS)]
        for connection in connections:
            heard = b""
            while not heard.endswith(b"\n\n") or b"sse_open" not in heard[-1_000:]:
                heard += (more := connection.recv(1_000_000))
                assert more
                heard = heard.removesuffix(b"\r\n") if heard.endswith(b"\n\n\r\n") else heard
            assert heard.startswith(b"HTTP/1.1 200 ")
            assert heard.count(b"x" * 1_000) >= size // 1_000
        wait_for_transports(server, 0, THREADS)
        assert server.stats()["undone"] == 0


@pytest.mark.parametrize("name", ["gunicorn", "waitress", "cheroot"])  # the others close after each answer
def test_a_long_answer_before_a_stream_on_the_same_connection_arrives_whole(name: str, tmp_path: Path) -> None:
    with serving_app(COMMANDS[name], tmp_path) as server, ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
            connection.settimeout(TIMEOUT)
            connection.connect((HOST, server.port))
            size = 8_000_000
            connection.sendall(
                b"GET /large?n=%d HTTP/1.1\r\nHost: x\r\n\r\nGET /events HTTP/1.1\r\nHost: x\r\n\r\n" % size
            )
            read_until(connection, b"\r\n\r\n")
            body = connection.makefile("rb")
            assert body.read(size) == b"x" * size
            head = b"".join(iter(body.readline, b"\r\n"))
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"event-stream" in head
            assert b"event: sse_" in body.readline() + body.readline()
        with Stream(server) as stream:
            stream.until("sse_open")
            wait_until(lambda: server.stats()["clients_by_transport"]["detached"] >= 1, "it is detached")


@each_server
def test_a_request_behind_a_stream_is_not_answered_within_it(name: str, tmp_path: Path) -> None:
    with serving_app(COMMANDS[name], tmp_path) as server:
        request = b"GET /events HTTP/1.1\r\nHost: x\r\n\r\nGET /echo?n=secret HTTP/1.1\r\nHost: x\r\n\r\n"
        with connect(server, request) as connection, connection.makefile("rb") as answer:
            heard = []
            for word in (b"sse_open", b"first", b"second"):
                while word not in (line := answer.readline()):
                    assert line
                    heard.append(line)
                server.enqueue(("hub_state", {b"sse_open": "first", b"first": "second"}.get(word, "third")))
            assert not [line for line in heard if b"secret" in line]


# -- old cursors -------------------------------------------------------------------------------------------------------


NUMBERS = 2_000


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A Redis whose stream has more than any buffer takes: its URL, and the place before all of it."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder) as redis, SSEManager(backend=redis.url) as manager:
        start = cursor_of(manager)
        for number in range(NUMBERS):
            manager.enqueue("item", [number, "x" * 5_000])
        assert manager.flush_all(TIMEOUT)
        yield redis.url, start


@pytest.mark.parametrize(
    "command",
    [
        *[pytest.param(COMMANDS[name], id=name) for name in ("gunicorn-sync", "gunicorn", "waitress", "cheroot")],
        # The app publishes when it is imported, so that has to be after the fork.
        pytest.param((*COMMANDS["uwsgi"], "--lazy-apps"), id="uwsgi"),
    ],
)
def test_slow_readers_with_old_cursors_need_no_thread_and_get_all(
    command: tuple[str, ...], tmp_path: Path, filled: tuple[str, str]
) -> None:
    url, start = filled
    config = {"backend": url, "history_bytes": 1, "heartbeat": 1}
    with serving_app(command, tmp_path, **config) as server, ExitStack() as stack:
        with Stream(server) as stream:
            stream.until("sse_open")
        pid = process_of(server)["pid"]
        slow = []
        for _ in range(3 * THREADS):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
            connection.settimeout(TIMEOUT)
            connection.connect((HOST, server.port))
            connection.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\nLast-Event-ID: %b\r\n\r\n" % start.encode())
            slow.append(http.client.HTTPResponse(connection))
            slow[-1].begin()
            assert b"sse_open" in slow[-1].read1(100)
        with Stream(server) as stream:
            waits = []
            for _ in range(3):  # during one of which the machine may stand still
                assert stream.line()  # others go on, too
                asked = time.monotonic()
                assert process_of(server)["pid"] == pid
                waits.append(time.monotonic() - asked)
            assert min(waits) < 1
            wait_for_transports(server, 0, len(slow) + 1)
        server.enqueue(("hub_state", "end"))
        for answer in slow[:2]:
            assert numbers_of(answer) == list(range(NUMBERS))
        assert server.stats()["gaps"] == 0
        assert server.faults() == []


def numbers_of(answer: http.client.HTTPResponse) -> list[int]:
    """Of all events up to the one that was published last."""
    parser = EventStreamParser()
    found: list[int] = []
    while True:
        for event in parser.feed(answer.read1(65_536)):
            if event.type == "hub_state":
                return found
            if event.type.startswith("item"):
                data = event.json
                found += [number for number, _ in (data["events"] if event.type == "item_batch" else [data])]
