"""The servers that people run, with and without nginx before them.

All keep one contract. What differs is in `SERVERS`; its configuration, and how it ends, is at the end.
"""

from __future__ import annotations

import http.client
import signal
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from email.message import Message
from pathlib import Path
from typing import BinaryIO

import pytest

from sse_batcher.wire import HEARTBEAT

from .kit import nginx
from .kit.leaving import wait_for_transports
from .kit.servers import (
    GTHREAD,
    HOST,
    SERVERS,
    UWSGI,
    Kind,
    Server,
    Stream,
    cheroot,
    detached,
    faults_in,
    gunicorn,
    running,
    serving,
    uwsgi,
    waitress,
)
from .kit.waiting import TIMEOUT, wait_until

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Content-Type-Options": "nosniff",
    "Content-Encoding": "identity",
}
FOR_NGINX = {"X-Accel-Buffering": "no"}
HEARTBEAT_SECONDS = 0.3  # in `serverapp`

external = pytest.mark.external


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, id=name, marks=external if kind.external else ()) for name, kind in SERVERS.items()],
)
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture(scope="module")
def shared_server(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(kind, tmp_path_factory.mktemp("server")) as server:
        yield server
        assert server.faults() == []


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    with shared_server.watched():
        yield shared_server


def test_the_head_and_the_first_block_come_before_anything_happens(server: Server, kind: Kind) -> None:
    expected = HEADERS if kind.nginx else HEADERS | FOR_NGINX  # which takes it out
    with Stream(server) as stream:
        assert stream.response.status == 200
        assert expected.items() <= dict(stream.response.getheaders()).items()
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
        for last_try in (False, False, True):
            server.enqueue(*[("item", {"n": n}) for n in range(30)], ("hub_state", "end"))
            *batches, _ = stream.until("hub_state")
            events = [batch.data["events"] if batch.event == "item_batch" else [batch.data] for batch in batches]
            assert [event for batch in events for event in batch] == [{"n": n} for n in range(30)]
            # If the machine stands still in the middle, a window ends there.
            if last_try or len(batches) == 3:
                break
        assert [(batch.event, batch.data["batchSize"]) for batch in batches] == [("item_batch", 10)] * 3


def test_a_critical_event_arrives_at_once_and_after_what_was_waiting(server: Server) -> None:
    with Stream(server) as stream:
        stream.until("sse_open")
        server.enqueue(("item", 1), ("item", 2), ("hub_state", {"state": "ready"}))
        batch, critical = stream.until("hub_state")
        assert (batch.event, batch.data["events"], batch.data["reason"]) == ("item_batch", [1, 2], "critical")
        assert critical.data == {"state": "ready"}


def test_a_critical_event_does_not_wait_for_the_next_heartbeat(server: Server) -> None:
    delays = []
    with Stream(server) as stream:
        stream.until("sse_open")
        for n in range(10):
            start = time.monotonic()
            server.enqueue(("hub_state", n))
            stream.until("hub_state")
            delays.append(time.monotonic() - start)
    # One that waits would leave with a heartbeat, and so would the next one, nearly a whole one later.
    assert min(delays) < HEARTBEAT_SECONDS / 2


def test_all_streams_get_the_same_and_leave_a_thread_for_other_requests(server: Server, kind: Kind) -> None:
    _wait_for_no_clients(server)  # each of which still has a thread
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(server)) for _ in range(kind.streams)]
        for stream in streams:
            stream.until("sse_open")
        stats = server.stats()  # without a thread for it, it would have no answer while the streams are open
        assert stats["clients"] == len(streams)
        assert stats["undone"] == 0
        is_detached = transport(kind) == "detached"
        wait_for_transports(server, len(streams) * (not is_detached), len(streams) * is_detached)
        server.enqueue(*[("item", n) for n in range(20)], ("hub_state", "end"))
        first, *others = [stream.until("hub_state") for stream in streams]
        assert [block.event for block in first] == ["item_batch", "item_batch", "hub_state"]
        assert all(other == first for other in others)
    _wait_for_no_clients(server)


def test_a_client_that_leaves_is_forgotten_within_so_many_heartbeats(server: Server, kind: Kind) -> None:
    # Once is enough: if the machine stands still, the next heartbeat may come before the watcher has its turn.
    assert any(_heartbeats_after_it_has_left(server) <= kind.forgotten for _ in range(3))


def _heartbeats_after_it_has_left(server: Server) -> float:
    _wait_for_no_clients(server)
    with Stream(server) as stream:
        stream.until("sse_open")
        assert server.stats()["clients"] == 1
        while stream.line() != HEARTBEAT.decode():
            pass  # right after one, the next is far away
    before = server.stats()["bytes"]
    _wait_for_no_clients(server)
    return float(server.stats()["bytes"] - before) / len(HEARTBEAT)


def transport(kind: Kind) -> str:
    return {"auto": "detached"}.get(kind.transport, kind.transport)


def _wait_for_no_clients(server: Server) -> None:
    wait_until(lambda: server.stats()["clients"] == 0, "all clients are gone")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_each_version_of_http_gets_the_stream_at_once(server: Server, kind: Kind, version: str) -> None:
    with _connection(server) as (connection, answer):
        headers = _request(connection, answer, "GET", version)
        assert "Content-Length" not in headers
        chunked = version in kind.chunked
        assert headers["Transfer-Encoding"] == ("chunked" if chunked else None)
        if kind.transport == "auto" and not kind.nginx:
            assert headers.get_all("Connection") == ["close"]
        if chunked:
            size = int(answer.readline(), 16)
            assert answer.read(size).startswith(b"event: sse_open\n")
        else:
            assert answer.readline() == b"event: sse_open\n"
        server.enqueue(("hub_state", version))
        while answer.readline() != b"event: hub_state\n":
            pass


def test_after_head_the_connection_is_usable_or_closed(server: Server, kind: Kind) -> None:
    with _connection(server) as (connection, answer):
        head = _request(connection, answer, "HEAD")
        assert HEADERS.items() <= dict(head).items()
        assert (head["Connection"] == "close") == (kind.after_head == "closed")
        if kind.after_head == "kept":
            assert "GET" in _request(connection, answer, "OPTIONS")["Allow"]
        else:
            assert answer.read() in {b"", b"0\r\n\r\n"}  # waitress ends a body that may not be there


def test_options_says_what_is_allowed_and_ends(server: Server) -> None:
    with _connection(server) as (connection, answer):
        headers = _request(connection, answer, "OPTIONS")
        assert set(headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
        assert headers["Content-Length"] == "0"


@contextmanager
def _connection(server: Server) -> Iterator[tuple[socket.socket, BinaryIO]]:
    with (
        socket.create_connection((HOST, server.port), timeout=TIMEOUT) as connection,
        connection.makefile("rb") as answer,
    ):
        yield connection, answer


def _request(connection: socket.socket, answer: BinaryIO, method: str, version: str = "1.1") -> Message:
    """Ask for the stream; the head of the answer, which has to be a good one."""
    connection.sendall(f"{method} /events HTTP/{version}\r\nHost: {HOST}\r\n\r\n".encode())
    assert answer.readline().split()[1] == b"200"
    return http.client.parse_headers(answer)


# -- what stays attached -----------------------------------------------------------------------------------------------


CHEROOT_TLS = """
from cheroot.ssl.builtin import BuiltinSSLAdapter
from cheroot.wsgi import Server
from serverapp import app
import os
server = Server(("127.0.0.1", int(os.environ["PORT"])), app)
server.ssl_adapter = BuiltinSSLAdapter("tls.pem", "tls.pem")
server.start()
"""
GRANIAN = (
    "-m",
    "granian",
    "--interface=wsgi",
    f"--host={HOST}",
    "--port={port}",
    "--blocking-threads=4",
    "serverapp:app",
)
STAYS = {
    "gunicorn-gevent": (
        Kind(gunicorn("-k", "gevent")),
        "greenlet of the server each: gunicorn gevent does not serve requests in threads",
    ),
    "gunicorn-tls": (
        Kind((*GTHREAD, "--certfile=tls.pem", "--keyfile=tls.pem"), tls=True),
        "gunicorn gthread does not",
    ),
    "werkzeug-tls": (
        Kind((*SERVERS["werkzeug"].command, "--cert=tls.pem", "--key=tls.pem"), tls=True),
        "werkzeug does not give plain connections away",
    ),
    "cheroot-tls": (Kind(("-c", CHEROOT_TLS), tls=True), "cheroot does not give plain connections away"),
    "granian": (Kind(GRANIAN, requirement="granian click"), "this server does not give plain connections away. When"),
}


@external
@pytest.mark.parametrize("name", STAYS)
def test_streams_stay_attached_where_the_connection_cannot_be_had_and_the_log_says_why(
    name: str, tmp_path: Path
) -> None:
    kind, reason = STAYS[name]
    with serving(kind._replace(transport="auto"), tmp_path) as server, server.watched():
        with Stream(server) as stream, Stream(server) as other:
            stream.until("sse_open")
            other.until("sse_open")
            assert server.stats()["clients_by_transport"] == {"attached": 2, "detached": 0}
            (line,) = {line for line in server.output().splitlines() if "] sse_batcher.transports: streams" in line}
            assert reason in line
            # Only of granian, it is unknown how many threads it has.
            assert line.startswith("[WARNING]" if name == "granian" else "[INFO]")
            server.enqueue(("hub_state", 1))
            assert stream.until("hub_state") == other.until("hub_state")
        _wait_for_no_clients(server)
        assert server.faults() == []


# -- how they end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "signal_number", "farewell"),
    [
        # Where a signal has the server stop by itself. Where it kills the process, no stream hears of it.
        ("werkzeug", signal.SIGINT, True),
        ("werkzeug", signal.SIGTERM, False),
        ("gunicorn", signal.SIGINT, True),
        ("gunicorn", signal.SIGTERM, True),
        ("waitress", signal.SIGINT, True),
        ("waitress", signal.SIGTERM, False),
        pytest.param("gunicorn-gevent", signal.SIGINT, True, marks=external),
        pytest.param("gunicorn-gevent", signal.SIGTERM, True, marks=external),
        pytest.param("cheroot", signal.SIGINT, True, marks=external),
        pytest.param("cheroot", signal.SIGTERM, False, marks=external),
        pytest.param("uwsgi", signal.SIGINT, False, marks=external),
        pytest.param("uwsgi", signal.SIGTERM, False, marks=external),  # with --die-on-term; else it restarts
        pytest.param("nginx", signal.SIGTERM, False, marks=external),  # which is killed, too
        pytest.param("werkzeug-detached", signal.SIGINT, True, marks=external),
        pytest.param("werkzeug-detached", signal.SIGTERM, False, marks=external),
        pytest.param("gunicorn-detached", signal.SIGINT, True, marks=external),
        pytest.param("gunicorn-detached", signal.SIGTERM, True, marks=external),
        pytest.param("gunicorn-sync-detached", signal.SIGINT, True, marks=external),
        pytest.param("gunicorn-sync-detached", signal.SIGTERM, True, marks=external),
        pytest.param("waitress-detached", signal.SIGINT, True, marks=external),
        pytest.param("waitress-detached", signal.SIGTERM, False, marks=external),
        pytest.param("cheroot-detached", signal.SIGINT, True, marks=external),
        pytest.param("cheroot-detached", signal.SIGTERM, False, marks=external),
        pytest.param("uwsgi-detached", signal.SIGINT, True, marks=external),  # nothing keeps its threads from ending
        pytest.param("uwsgi-detached", signal.SIGTERM, True, marks=external),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_server_that_is_stopped_ends_and_so_does_every_stream(
    name: str, signal_number: signal.Signals, farewell: bool, tmp_path: Path
) -> None:
    with serving(SERVERS[name], tmp_path) as server, ExitStack() as stack:
        streams = [stack.enter_context(Stream(server)) for _ in range(3)]
        for stream in streams:
            stream.until("sse_open")
        server.stop(signal_number)
        assert server.faults() == []
        endings = [[block.event for block in stream.to_end()] for stream in streams]
        assert endings == [["sse_bye"] if farewell else []] * 3


def test_a_line_of_ours_within_a_traceback_of_ctrl_c_hides_nothing_and_accuses_nobody() -> None:
    ours = "[INFO] sse_batcher.manager: stream 1 (default) ended after 0.4 s: shutdown\n"
    ctrl_c = f'Traceback (most recent call last):\n  File "server.py", line 1, in start\n    {ours}self.serve()\n{ours}'
    assert faults_in(ctrl_c + "KeyboardInterrupt\n") == []
    assert len(faults_in(ctrl_c + "ValueError: no\n")) == 2
    assert len(faults_in(ctrl_c + ours.replace("shutdown", "error") + "KeyboardInterrupt\n")) == 1


# -- the configuration of each -----------------------------------------------------------------------------------------


@external
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(Kind(gunicorn("-k", "gthread", "--threads=2", "--timeout=2")), id="gunicorn --timeout"),
        pytest.param(Kind(gunicorn("-k", "gevent", "--timeout=2")), id="gevent --timeout"),
        pytest.param(Kind(waitress("--channel-timeout=2", "--cleanup-interval=1")), id="waitress --channel-timeout"),
        pytest.param(Kind(cheroot("--timeout=2")), id="cheroot --timeout"),
        pytest.param(Kind((*UWSGI, "--socket-timeout=2")), id="uwsgi --socket-timeout"),
        pytest.param(Kind(uwsgi(f"--http={HOST}:{{port}}", "--http-timeout=2")), id="uwsgi --http-timeout"),
        pytest.param(Kind(GTHREAD, nginx=f"{nginx.PASS} proxy_read_timeout 2s;"), id="nginx proxy_read_timeout"),
        # Of those that would end an attached one, too: a detached stream is no request under way.
        pytest.param(detached(Kind(gunicorn("--timeout=1"))), id="gunicorn sync, detached"),
        pytest.param(detached(Kind((*UWSGI, "--harakiri=1"))), id="uwsgi --harakiri, detached"),
        pytest.param(detached(Kind(waitress("--channel-timeout=2", "--cleanup-interval=1"))), id="waitress, detached"),
    ],
)
def test_a_stream_outlives_timeouts_that_are_longer_than_its_heartbeat(kind: Kind, tmp_path: Path) -> None:
    # Once is enough: if the machine stands still, there are no heartbeats for longer than the timeout.
    with serving(kind, tmp_path) as server, server.watched():
        assert any(_outlives(server, 4) for _ in range(3))


@external
@pytest.mark.parametrize(
    ("kind", "heartbeat"),
    [
        pytest.param(Kind((*UWSGI, "--harakiri=1")), "0.3", id="uwsgi --harakiri"),
        pytest.param(Kind(uwsgi(f"--http={HOST}:{{port}}", "--http-timeout=1")), "9", id="uwsgi --http-timeout"),
        pytest.param(Kind(GTHREAD, nginx=f"{nginx.PASS} proxy_read_timeout 1s;"), "9", id="nginx proxy_read_timeout"),
    ],
)
def test_what_ends_a_stream(kind: Kind, heartbeat: str, tmp_path: Path) -> None:
    with serving(kind, tmp_path, HEARTBEAT=heartbeat) as server, server.watched():
        assert not _outlives(server, TIMEOUT)


def _outlives(server: Server, seconds: float) -> bool:
    """Whether a stream still has heartbeats after this time."""
    with Stream(server) as stream:
        stream.until("sse_open")
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                if not stream.line():
                    return False
        except (http.client.IncompleteRead, ConnectionError):
            return False
    return True


@external
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(gunicorn(), id="gunicorn sync"),
        pytest.param(uwsgi(f"--http-socket={HOST}:{{port}}", threads=1), id="uwsgi"),
    ],
)
def test_with_one_thread_an_attached_stream_is_refused_and_the_log_says_what_to_do(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    with running(arguments, tmp_path, TRANSPORT="attached") as server, server.watched():
        for _ in range(3):
            with Stream(server) as stream:
                (busy,) = stream.to_end()
                assert (busy.event, busy.data) == ("sse_busy", {"reason": "threads"})
        assert server.stats()["clients"] == 0
        (line,) = [line for line in server.output().splitlines() if "WARNING] sse_batcher" in line]
        assert "serves one request at a time" in line
        assert "SSE_TRANSPORT" in line
        assert server.faults() == []


@external
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(detached(Kind(gunicorn())), id="gunicorn sync"),
        pytest.param(detached(Kind(uwsgi(f"--http-socket={HOST}:{{port}}", threads=1))), id="uwsgi"),
    ],
)
def test_with_one_thread_detached_streams_keep_nobody_waiting(kind: Kind, tmp_path: Path) -> None:
    with serving(kind, tmp_path) as server, server.watched(), ExitStack() as stack:
        for _ in range(kind.streams):
            stack.enter_context(Stream(server)).until("sse_open")
        wait_for_transports(server, 0, kind.streams)
        waits = []
        for _ in range(3):  # during one of which the machine may stand still
            start = time.monotonic()
            assert server.stats()["clients"] == kind.streams
            waits.append(time.monotonic() - start)
        assert min(waits) < 1
        assert server.faults() == []


@external
def test_streams_of_browsers_that_speak_http2_with_nginx_are_detached_from_uwsgi(tmp_path: Path) -> None:
    """It repeats the version that nginx tells it, in the head of its answer."""
    speaks = nginx.UWSGI_PASS.replace("$server_protocol", "HTTP/2.0")
    with serving(SERVERS["nginx-uwsgi-detached"]._replace(nginx=speaks), tmp_path) as server, server.watched():
        with Stream(server) as stream:
            stream.until("sse_open")
            wait_for_transports(server, 0, 1)
            assert server.stats()["undone"] == 0
            server.enqueue(("hub_state", 1))
            stream.until("hub_state")


@external
def test_gevent_serves_others_beside_a_stream_though_the_app_came_before_its_patches(tmp_path: Path) -> None:
    arguments = gunicorn("-k", "gevent", "--preload")
    with running(arguments, tmp_path) as server, Stream(server) as stream, _connection(server) as (other, answer):
        stream.until("sse_open")
        _request(other, answer, "HEAD")
        server.enqueue(("hub_state", 1))
        stream.until("hub_state")


@external
def test_nginx_that_compresses_streams_still_sends_each_event_at_once(tmp_path: Path) -> None:
    gzip = "proxy_buffering on; gzip on; gzip_types text/event-stream; gzip_min_length 0; gzip_proxied any;"
    gzip += " proxy_hide_header Content-Encoding;"  # which says identity, and nginx compresses nothing that has one
    with (
        serving(Kind(GTHREAD, nginx=nginx.PASS + gzip), tmp_path) as server,
        server.watched(),
        Stream(server, {"Accept-Encoding": "gzip"}) as stream,
    ):
        assert stream.response.headers["Content-Encoding"] == "gzip"
        decompress = zlib.decompressobj(wbits=31).decompress
        for wanted in (b"event: sse_open\n", b"event: hub_state\n"):
            text = b""
            while wanted not in text:
                text += decompress(stream.response.read1())
            assert text.endswith(b"\n\n")
            server.enqueue(("hub_state", 1))


@external
def test_nginx_that_ignores_our_header_holds_everything_back(tmp_path: Path) -> None:
    """What it would do without: the header is needed."""
    deaf = nginx.PASS + " proxy_ignore_headers X-Accel-Buffering;"
    with serving(Kind(GTHREAD, nginx=deaf), tmp_path) as server, _connection(server) as (connection, _):
        connection.sendall(f"GET /events HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        wait_until(lambda: server.stats()["bytes"] > 70, "it has got a block and a heartbeat")
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
