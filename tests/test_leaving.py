"""Clients that leave or take nothing, and servers that leave them: what the watcher and the lease are for.

Under real servers. Heartbeats are an hour apart, so none of them can help.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from .kit import nginx
from .kit.leaving import ENDING, process_of, read_until, reset, serving_app, wait_for_clients
from .kit.servers import (
    APPS,
    GTHREAD,
    HOST,
    SERVERS,
    THREADS,
    UWSGI,
    Kind,
    Server,
    Stream,
    gunicorn,
    running,
    serving,
    with_threads,
)
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

FIVE = ("werkzeug", "gunicorn", "waitress", "cheroot", "uwsgi")
BOTH = [pytest.param((name, "attached"), id=name) for name in FIVE]
BOTH += [pytest.param((name, "auto"), id=f"{name}-detached") for name in FIVE]
transports = pytest.mark.parametrize(
    "transport", [pytest.param("attached", id="attached"), pytest.param("auto", id="detached")]
)
REQUEST = b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n"


def one(transport: str) -> dict[str, int]:
    """The clients by transport, when there is one, opened with this option."""
    return {"attached": int(transport != "auto"), "detached": int(transport == "auto")}


def fields_of(stream: Stream) -> dict[str, str]:
    """The next block, with all of its fields."""
    fields: dict[str, str] = {}
    while (line := stream.line()) not in {"", "\n"}:
        name, _, value = line.rstrip("\n").partition(": ")
        fields[name] = value
    return fields


# -- clients that left -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BOTH)
def shared_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    name, transport = request.param
    command = tuple(argument.replace("serverapp", "leavingapp") for argument in SERVERS[name].command)
    config = json.dumps({"SSE_BATCH_WINDOW": 0.02, "SSE_TRANSPORT": transport})
    with running(command, tmp_path_factory.mktemp("leaving"), CONFIG=config) as server:
        with Stream(server) as stream:
            stream.until("sse_open")
            # The first block comes before the connection has changed hands.
            wait_until(lambda: server.stats()["clients_by_transport"] == one(transport), f"a stream is {transport}")
        yield server
        assert server.faults() == []
        assert server.stats()["undone"] == 0


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    with shared_server.watched():
        shared_server.request("POST", "/kick", "default")  # clients that a failed test has left
        wait_for_clients(shared_server, 0)
        yield shared_server


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["closes", "resets"])
def test_a_client_that_leaves_is_forgotten_before_a_heartbeat(
    server: Server, leave: Callable[[socket.socket], None]
) -> None:
    with socket.create_connection((HOST, server.port), timeout=TIMEOUT) as connection:
        connection.sendall(REQUEST)
        read_until(connection, b"\n\n")  # the first block's: the lines of the head end otherwise
        assert server.stats()["clients"] == 1
        leave(connection)
        wait_for_clients(server, 0)


def test_a_kick_while_a_stream_opens_ends_it(server: Server) -> None:
    with socket.create_connection((HOST, server.port), timeout=TIMEOUT) as connection:
        connection.sendall(REQUEST.replace(b"/events", b"/events?channel=slow"))
        assert server.request("POST", "/kick-slow") == "0"
        for mark in (b"event: sse_open\n", b"event: sse_bye\n", b'"reason":"kicked"'):
            read_until(connection, mark)
        wait_for_clients(server, 0)


READER = """
import socket, sys, threading
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.sendall(sys.argv[3].encode())
count = 0
while connection.recv(1):
    count += 1
    if count > 5_000:
        print("reading", flush=True)
        threading.Event().wait(0.01)
"""


def test_a_client_that_is_killed_while_it_reads_is_forgotten_before_a_heartbeat(server: Server) -> None:
    arguments = [sys.executable, "-c", READER, HOST, str(server.port), REQUEST.decode()]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as reader:
        try:
            wait_for_clients(server, 1)
            server.enqueue(("item", "x" * 50_000))  # little enough to leave the server at once
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"reading\n"
            assert server.stats()["clients"] == 1
        finally:
            reader.kill()
        wait_for_clients(server, 0)


# -- five hundred resets -----------------------------------------------------------------------------------------------


CLIENTS_AT_ONCE = THREADS - 2


def _before_the_request(connection: socket.socket, server: Server, name: str) -> None:
    pass


def _in_the_request_line(connection: socket.socket, server: Server, name: str) -> None:
    connection.sendall(REQUEST[:8])


def _after_the_request(connection: socket.socket, server: Server, name: str) -> None:
    connection.sendall(REQUEST)


def _after_the_head(connection: socket.socket, server: Server, name: str) -> None:
    connection.sendall(REQUEST)
    read_until(connection, b"\r\n\r\n")


def _in_the_first_block(connection: socket.socket, server: Server, name: str) -> None:
    connection.sendall(REQUEST)
    read_until(connection, b"event: sse_")


def _between_frames(connection: socket.socket, server: Server, name: str) -> None:
    connection.sendall(REQUEST)
    for _ in range(4):
        read_until(connection, b"\n\n")


def _at_the_end(connection: socket.socket, server: Server, name: str) -> None:
    connection.sendall(REQUEST.replace(b"/events", f"/events?channel={name}".encode()))
    read_until(connection, b"\n\n")
    server.request("POST", "/kick", name)
    read_until(connection, b"event: sse_bye\n")


STAGES = (
    _before_the_request,
    _in_the_request_line,
    _after_the_request,
    _after_the_head,
    _in_the_first_block,
    _between_frames,
    _at_the_end,
)


def test_five_hundred_clients_that_reset_at_every_stage_leave_nothing_behind(server: Server) -> None:
    def leave(number: int) -> None:
        with socket.create_connection((HOST, server.port), timeout=TIMEOUT) as connection:
            STAGES[number % len(STAGES)](connection, server, f"own{number}")
            reset(connection)

    def settled() -> dict[str, Any]:
        wait_for_clients(server, 0)
        # They end when no client is left to be watched, or written to.
        wait_until(lambda: not ENDING & set(process_of(server)["threads"]), "our threads have ended")
        found = process_of(server)
        # gunicorn starts its threads one by one, when all it has are busy.
        found["threads"] = [name for name in found["threads"] if not name.startswith("ThreadPoolExecutor")]
        return found

    server.request("POST", "/flood")
    with ExitStack() as stack:  # each thread is used once, so that all is there that is made at first use
        for stream in [stack.enter_context(Stream(server)) for _ in range(THREADS - 1)]:
            stream.until("item_batch")
        process_of(server)
    before = settled()
    with ThreadPoolExecutor(CLIENTS_AT_ONCE) as pool:
        list(pool.map(leave, range(500)))
    wait_for_clients(server, 0)

    after = before

    def no_more() -> bool:
        nonlocal after
        after = settled()
        return all(len(after[what]) <= len(before[what]) for what in ("threads", "descriptors"))

    try:
        wait_until(no_more, "no more threads and descriptors than before")
    finally:
        sys.stdout.write(f"before: {before}\nafter: {after}\n")
    server.request("DELETE", "/flood")
    assert server.faults() == []


# -- clients that take nothing -----------------------------------------------------------------------------------------


def _connect_with_small_buffer(server: Server) -> socket.socket:
    """Its kernel tells the server's of every few kB that are read. With a large buffer it would be silent for long."""
    connection = socket.socket()
    connection.settimeout(TIMEOUT)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.connect((HOST, server.port))
    connection.sendall(REQUEST)
    return connection


SEND_TIMEOUT = 1.5


class SlowReader:
    """Reads a little at a time in a thread, until it is asked to hurry."""

    def __init__(self, connection: socket.socket) -> None:
        self.longest_pause = 0.0
        """The longest time between two reads, in seconds: more than it means to make if the machine stood still."""
        self._connection = connection
        self._hurry = threading.Event()
        self._received = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        before = time.monotonic()
        with suppress(OSError):  # also if the test has failed, and closed it
            while not self._hurry.wait(0.02):
                self._received = self._connection.recv(1_000)
                self.longest_pause = max(self.longest_pause, time.monotonic() - before)
                before = time.monotonic()

    def gets(self, text: bytes) -> bool:
        """Whether this comes before the stream ends, when it reads quickly from now on."""
        self._hurry.set()
        self._thread.join()
        try:
            with self._connection.makefile("rb") as rest:
                return any(text in line for line in rest)
        except ConnectionError:
            return False


@pytest.mark.parametrize("which", BOTH)
def test_a_client_that_takes_nothing_is_given_up_and_a_slow_reader_is_not(
    which: tuple[str, str], tmp_path: Path
) -> None:
    """The thread of the former, if it has one, serves others. The latter reads for longer than the time limit."""
    name, transport = which
    command = with_threads(SERVERS[name].command, 3)
    # The history has room for all of it: the slow one does not miss anything.
    config = {"batching": False, "send_timeout": SEND_TIMEOUT, "transport": transport, "history_bytes": 100_000_000}
    with serving_app(command, tmp_path, **config) as server:
        for _ in range(5):
            slow = _outlives_a_client_that_takes_nothing(server)
            assert server.faults() == []
            if slow is None:
                return
            # Not fast enough, as the machine stood still: whether it would be given up then says nothing.
            assert slow.longest_pause > SEND_TIMEOUT / 3, "the slow one is given up"
            wait_for_clients(server, 0)
    raise AssertionError("the slow one is given up each time")


def _outlives_a_client_that_takes_nothing(server: Server) -> SlowReader | None:
    """Return the slow reader if it does not."""
    with _connect_with_small_buffer(server) as connection, _connect_with_small_buffer(server):
        wait_for_clients(server, 2)
        slow, end = SlowReader(connection), time.monotonic() + 2 * SEND_TIMEOUT
        server.request("POST", "/fill")
        wait_until(lambda: time.monotonic() > end and server.stats()["clients"] < 2, "one is given up")
        # The slow one has one of three threads; a stream, and requests beside it, need both others.
        with Stream(server) as stream:
            stream.until("sse_open")
            clients = server.stats()["clients"]
            server.enqueue(("item", "last"))
            assert [block.data for block in stream.until("item")] == ["last"]
        return None if slow.gets(b'"last"') and clients == 2 else slow


@transports
def test_a_client_that_confirms_nothing_is_given_up_even_if_all_fits_into_buffers(
    transport: str, tmp_path: Path
) -> None:
    """As of one whose cable was pulled, no more is seen of it than that."""
    config = {"batching": False, "send_timeout": 1, "transport": transport}
    with serving_app(GTHREAD, tmp_path, **config) as server, _connect_with_small_buffer(server):
        wait_for_clients(server, 1)
        server.enqueue(("item", "x" * 50_000))
        wait_for_clients(server, 0)
        assert server.faults() == []


@transports
def test_nginx_sends_no_further_request_over_a_connection_whose_stream_has_ended(
    transport: str, tmp_path: Path
) -> None:
    command = tuple(argument.replace("serverapp", "leavingapp") for argument in GTHREAD)
    kind = Kind(command, nginx=nginx.KEEPING)
    config = json.dumps({"SSE_TRANSPORT": transport})
    with serving(kind, tmp_path, CONFIG=config) as server, server.watched():
        for _ in range(200):
            with Stream(server) as stream:
                stream.until("sse_open")
                server.request("POST", "/kick", "default")
                stream.until("sse_bye")
                assert stream.to_end() == []
            server.request("POST", "/enqueue", [])
        assert server.faults() == []


# -- gunicorn ends, or restarts ----------------------------------------------------------------------------------------

KEEPS = "--keep-alive=60"
"""For how many seconds gunicorn keeps a connection after a response, if it has threads."""


@pytest.mark.parametrize(
    ("command", "transport"),
    [
        pytest.param(gunicorn("-k", "gthread", "--threads=64", KEEPS), "attached", id="gthread"),
        pytest.param(gunicorn("-k", "gthread", "--threads=4", KEEPS), "auto", id="gthread-detached"),
        pytest.param(gunicorn(), "auto", id="sync-detached"),
        pytest.param(gunicorn("-k", "gthread", "--threads=4", "--reuse-port", KEEPS), "auto", id="reuse-port-detached"),
    ],
)
def test_fifty_streams_get_all_events_and_a_bye_when_gunicorn_is_terminated(
    command: tuple[str, ...], transport: str, tmp_path: Path
) -> None:
    """Though it gives requests that are under way 30 seconds."""
    with serving_app(command, tmp_path, batch_window=10, transport=transport) as server, ExitStack() as stack:
        streams = [stack.enter_context(Stream(server)) for _ in range(50)]
        for stream in streams:
            stream.until("sse_open")
        server.enqueue(("item", 1), ("item", 2))
        start = time.monotonic()
        server.process.terminate()
        blocks = [stream.to_end() for stream in streams]
        assert server.process.wait(TIMEOUT) == 0
        assert time.monotonic() - start < 2 * TIMEOUT  # it would keep the connections, which are open still, for longer
        assert server.faults() == []
    for batch, farewell in blocks:
        assert (batch.event, batch.data["events"]) == ("item_batch", [1, 2])
        assert (farewell.event, farewell.data["reason"]) == ("sse_bye", "shutdown")


@transports
def test_clients_of_a_gunicorn_that_is_reloaded_go_on_with_its_new_worker(transport: str, tmp_path: Path) -> None:
    with serving_app(GTHREAD, tmp_path, transport=transport) as server:
        old = process_of(server)["pid"]
        cursors = []
        with ExitStack() as stack:
            streams = [stack.enter_context(Stream(server)) for _ in range(10)]
            for stream in streams:
                stream.until("sse_open")
            start = time.monotonic()
            server.process.send_signal(signal.SIGHUP)
            for stream in streams:
                (farewell,) = stream.to_end()
                assert (farewell.event, farewell.data["reason"]) == ("sse_bye", "shutdown")
                cursors.append(farewell.id)
        wait_until(lambda: not Path(f"/proc/{old}").exists(), "the old worker has ended")
        assert time.monotonic() - start < TIMEOUT  # gunicorn's limit for its requests is 30 s
        with ExitStack() as stack:
            streams = [stack.enter_context(Stream(server, {"Last-Event-ID": cursor or ""})) for cursor in cursors]
            for stream in streams:
                assert int(stream.response.headers["X-Pid"]) != old
                # The history was the old one's.
                (gap,) = stream.until("sse_gap")
                assert gap.data["reason"] == "epoch"
            server.enqueue(("item", "new"))
            for stream in streams:
                assert [block.data for block in stream.until("item")] == ["new"]
        assert server.faults() == []


# -- other ways to run gunicorn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "transport"),
    [
        # Each takes four connections at most, so that both must take some.
        pytest.param(("--preload", "--threads=4", "--worker-connections=4"), "attached", id="attached"),
        pytest.param(("--preload", "--threads=4", "--worker-connections=4"), "auto", id="detached"),
        # Here the kernel draws who takes one, and it may be the same for long.
        pytest.param(("--reuse-port", "--threads=50"), "attached", id="reuse-port"),
        pytest.param(("--reuse-port", "--threads=4"), "auto", id="reuse-port-detached"),
    ],
)
def test_streams_work_in_workers_forked_after_the_app_has_sent_events(
    options: tuple[str, ...], transport: str, tmp_path: Path
) -> None:
    command = gunicorn("-k", "gthread", "--workers=2", *options)
    with serving_app(command, tmp_path, transport=transport) as server, ExitStack() as stack:
        by_worker: dict[str, Stream] = {}
        extra = []
        while len(by_worker) < 2:
            stream = stack.enter_context(Stream(server))
            assert [block.event for block in stream.until("sse_open")] == ["sse_open"]
            if by_worker.setdefault(stream.response.headers["X-Pid"], stream) is not stream:
                extra.append(stream)
        assert str(server.process.pid) not in by_worker
        for stream in extra:
            stream.__exit__()  # which leaves room for other requests
        sent: dict[str, int] = {}
        number = 0
        while len(sent) < 2:
            number += 1
            sent.setdefault(server.request("POST", "/enqueue", [("hub_state", number)]), number)
        for worker, stream in by_worker.items():
            # The memory backend's clients are those of one process.
            (block,) = stream.until("hub_state")
            assert block.data == sent[worker]
        wait_until(lambda: server.stats()["clients_by_transport"] == one(transport), f"the stream is {transport}")
        assert server.faults() == []


def test_max_requests_of_gunicorn_is_logged_as_a_warning(tmp_path: Path) -> None:
    """In place of the line that says that streams are detached."""
    with serving_app((*GTHREAD, "--max-requests=1000"), tmp_path, transport="auto") as server:
        with Stream(server) as stream:
            stream.until("sse_open")
            wait_until(lambda: server.stats()["clients_by_transport"] == one("auto"), "the stream is detached")
        (line,) = [line for line in server.output().splitlines() if "sse_batcher.transports" in line]
        assert line.startswith(
            "[WARNING] sse_batcher.transports: streams are detached from the threads of this gunicorn"
        )
        assert line.endswith("max_requests=1000 ends all streams each time it is reached: leave it out")


HELD = "held by open streams"


def _end_of(server: Server, stream: Stream, signal_number: int = signal.SIGTERM) -> list[str]:
    """What a stream still gets when its server gets a signal to end. The server does not wait for its time limit."""
    start = time.monotonic()
    server.process.send_signal(signal_number)
    blocks = [block.event for block in stream.to_end()]
    server.process.wait(TIMEOUT)
    assert time.monotonic() - start < TIMEOUT  # gunicorn's limit is 30 s
    assert server.faults() == []
    return blocks


def test_gevent_whose_app_came_before_its_patches_can_be_ended(tmp_path: Path) -> None:
    command = gunicorn("-k", "gevent", "--preload")
    with serving_app(command, tmp_path) as server, Stream(server) as stream:
        stream.until("sse_open")
        server.enqueue(("hub_state", 1))
        stream.until("hub_state")
        assert _end_of(server, stream) == ["sse_bye"]


def test_that_streams_hold_four_fifths_of_the_threads_is_logged_once(tmp_path: Path) -> None:
    def said() -> int:
        return server.output().count(HELD)

    def open_one() -> Stream:
        stream = stack.enter_context(Stream(server))
        stream.until("sse_open")
        return stream

    command = gunicorn("-k", "gthread", "--threads=10")
    with serving_app(command, tmp_path, transport="attached") as server, ExitStack() as stack:
        for _ in range(7):
            open_one()
        assert said() == 0
        with open_one():
            assert said() == 1
            assert "[WARNING] sse_batcher.watcher: 8 of the 10 threads of this gunicorn gthread" in server.output()
        wait_for_clients(server, 7)
        open_one()
        open_one()
        assert said() == 1


# -- werkzeug's reloader -----------------------------------------------------------------------------------------------


@contextmanager
def _reloading(folder: Path, transport: str) -> Iterator[tuple[Server, Path]]:
    app = folder / "reloaded.py"
    shutil.copy(APPS / "leavingapp.py", app)
    command = ("-m", "flask", "--app=reloaded", "run", f"--host={HOST}", "--port={port}", "--reload")
    config = json.dumps({"SSE_TRANSPORT": transport})
    with running(command, folder, CONFIG=config) as server, server.watched():
        yield server, app


@transports
def test_werkzeug_that_reloads_ends_its_streams_and_serves_anew(transport: str, tmp_path: Path) -> None:
    with _reloading(tmp_path, transport) as (server, app):
        with Stream(server) as stream:
            stream.until("sse_open")
            old = process_of(server)["pid"]
            os.utime(app)  # it looks every second
            (farewell,) = stream.to_end()
            assert (farewell.event, farewell.data["reason"]) == ("sse_bye", "shutdown")
        # Its socket is kept, so that no client is refused meanwhile.
        with Stream(server, {"Last-Event-ID": farewell.id or ""}) as stream:
            (gap,) = stream.until("sse_gap")
            assert gap.data["reason"] == "epoch"
            assert int(stream.response.headers["X-Pid"]) != old
        assert server.faults() == []


@transports
def test_werkzeug_with_its_reloader_ends_its_streams_at_ctrl_c(transport: str, tmp_path: Path) -> None:
    with _reloading(tmp_path, transport) as (server, _), Stream(server) as stream:
        stream.until("sse_open")
        start = time.monotonic()
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does: to both of its processes
        assert [block.event for block in stream.to_end()] == ["sse_bye"]
        server.process.wait(TIMEOUT)
        assert time.monotonic() - start < TIMEOUT
        assert server.faults() == []


# -- a main thread that ends -------------------------------------------------------------------------------------------

IN_A_THREAD = {
    "werkzeug": "app.run(host, port, threaded=True)",
    "waitress": "import waitress; waitress.serve(app, host=host, port=port, threads=8)",
    "cheroot": "from cheroot.wsgi import Server; Server((host, port), app, numthreads=8).start()",
}
MAIN_THREAD_ENDS = f"""
import os, threading
from leavingapp import app
from sse_batcher import process_state

host, port, end = "{HOST}", int(os.environ["PORT"]), threading.Event()
process_state.REOPEN_SECONDS = 3600.0  # so that the test can look at it before

@app.post("/reopen")
def let_streams_open_again():
    process_state.REOPEN_SECONDS = 0.0
    return ""

@app.post("/end")
def end_main_thread():
    end.set()
    return ""

def serve():
    SERVE

threading.Thread(target=serve).start()
end.wait()
"""


@transports
@pytest.mark.parametrize("name", IN_A_THREAD)
def test_streams_open_again_when_only_the_main_thread_has_ended(name: str, transport: str, tmp_path: Path) -> None:
    if name == "werkzeug" and sys.version_info[:2] == (3, 12):
        pytest.skip("after the main thread, Python 3.12 starts no thread, and werkzeug needs one for each request")
    script = MAIN_THREAD_ENDS.replace("SERVE", IN_A_THREAD[name])
    with serving_app(("-c", script), tmp_path, transport=transport) as server:
        with Stream(server) as stream:
            (opened,) = stream.until("sse_open")
            server.enqueue(("item", "before the end"))
            server.request("POST", "/end")
            *_, item, farewell = stream.to_end()
            assert (item.data, farewell.event, farewell.data) == ("before the end", "sse_bye", {"reason": "shutdown"})
        assert '"status":"draining"' in _health(server)
        server.request("POST", "/reopen")
        wait_until(lambda: '"status":"ok"' in _health(server), "it is well again")
        server.enqueue(("item", "meanwhile"))
        for _ in range(2):
            with Stream(server, {"Last-Event-ID": opened.id or ""}) as stream:
                items = [block.data for block in stream.until("item") + stream.until("item")]
                assert items[1:] == ["before the end", "meanwhile"]
                server.enqueue(("hub_state", "later"))
                stream.until("hub_state")
        assert server.output().count("streams open again") == 1
        assert server.faults() == []


def _health(server: Server) -> str:
    connection = server.connect()
    connection.request("GET", "/events/health")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


# -- uWSGI -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--lazy-apps",)], ids=["before the fork", "after the fork"])
def test_uwsgi_without_threads_is_refused_with_the_name_of_the_option(options: tuple[str, ...], tmp_path: Path) -> None:
    command = (*(argument for argument in UWSGI if not argument.startswith("--threads")), *options)
    with serving_app(command, tmp_path) as server:
        message = "ConfigurationError: uWSGI runs without threads: start it with --threads N, or with --enable-threads"
        wait_until(lambda: message in server.output(), "the log says why")
        with Stream(server) as stream:
            assert stream.response.status == 500
    with serving_app((*command, "--enable-threads"), tmp_path, transport="auto") as server, Stream(server) as stream:
        stream.until("sse_open")


# -- leases and limits -------------------------------------------------------------------------------------------------


@transports
def test_a_stream_that_ends_with_its_lease_goes_on_without_loss(transport: str, tmp_path: Path) -> None:
    got: list[int] = []
    ages: list[float] = []
    sent = 0
    headers: dict[str, str] = {}
    with serving_app(GTHREAD, tmp_path, transport=transport, max_stream_age=0.5, batch_window=0.05) as server:
        for _ in range(4):
            start = time.monotonic()
            with Stream(server, headers) as stream:
                assert fields_of(stream)["event"] == "sse_open"
                server.enqueue(*[("item", sent + n) for n in range(10)])
                sent += 10
                while (fields := fields_of(stream))["event"] != "sse_bye":
                    data = json.loads(fields["data"])
                    got += data["events"] if fields["event"] == "item_batch" else [data]
                ages.append(time.monotonic() - start)
                assert json.loads(fields["data"]) == {"reason": "lease"}
                assert 100 <= int(fields["retry"]) <= 1_000
                assert stream.line() == ""
                headers = {"Last-Event-ID": fields["id"]}
            server.enqueue(*[("item", sent + n) for n in range(10)])  # while it is away
            sent += 10
        with Stream(server, headers) as stream:
            server.enqueue(("hub_state", "end"))
            for block in stream.until("hub_state"):
                if block.event in {"item", "item_batch"}:
                    got += block.data["events"] if block.event == "item_batch" else [block.data]
    assert got == list(range(sent))
    assert 0.4 <= min(ages) < 2  # the machine may stand still during others


@transports
def test_one_client_too_many_gets_busy_and_holds_nothing(transport: str, tmp_path: Path) -> None:
    command = gunicorn("-k", "gthread", "--threads=4")
    with serving_app(command, tmp_path, transport=transport, max_clients=3) as server, ExitStack() as stack:
        streams = [stack.enter_context(Stream(server)) for _ in range(3)]
        for stream in streams:
            stream.until("sse_open")
        for _ in range(5):  # which need the only thread that is left
            with Stream(server) as stream:
                assert stream.response.status == 200
                fields = fields_of(stream)
                assert (fields["event"], json.loads(fields["data"])) == ("sse_busy", {"reason": "limit"})
                assert 10_000 <= int(fields["retry"]) <= 30_000
                assert stream.line() == ""
                assert server.stats()["clients"] == 3
        streams.pop().__exit__()
        wait_for_clients(server, 2)
        with Stream(server) as stream:
            stream.until("sse_open")
