"""What two processes and Redis cost, beside flask-sse and Flask-SocketIO. `python benchmarks/processes.py`.

Needs redis-server, and `pip install gunicorn redis flask-sse flask-socketio simple-websocket`; what of the last three
is not installed is left out. Linux only. Medians of several rounds, in which the things compared take turns.

Each is `gunicorn -k gthread` with two workers, 100 clients that stay, and a publisher in a process of its own. A
delivery is one event that came to one client, in a batch or alone. CPU is that of the workers and the publisher, from
the first event to the last delivery, without Redis and the clients. Flask-SocketIO has WebSockets, and no pings
meanwhile. The seconds include the publisher's pauses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flask import Flask

ROUNDS = 3
WORKERS = 2
THREADS = 150  # of each worker, which may get all clients
CLIENTS = 100
EVENTS = 3_000
BURST = 30
PAUSE = 0.1  # seconds between two bursts
SILENCE = 15  # seconds without a delivery after which the rest is lost
SEQUENCE = b'"seq"'  # once in each event, however it comes
HELLO = b"\x81\x82\0\0\0\0" + b"40"  # "connect me", as a WebSocket frame of a client

KINDS = {"batched": "sse_batcher", "unbatched": "sse_batcher", "flask-sse": "flask_sse", "socketio": "flask_socketio"}
NAMES = {
    "batched": "sse_batcher, batched",
    "unbatched": "sse_batcher, SSE_BATCHING=False",
    "flask-sse": "flask-sse",
    "socketio": "Flask-SocketIO, WebSocket",
}


class Result(NamedTuple):
    per_cpu: float  # deliveries a second of CPU
    wall: float  # seconds from the first event to the last delivery
    connections: float  # to Redis, of the workers and the publisher
    arrived: float  # of the deliveries, 1 is all


def main() -> None:
    if shutil.which("redis-server") is None:
        print("skipped: redis-server is not installed")
        return
    kinds = [kind for kind, module in KINDS.items() if importlib.util.find_spec(module)]
    if missing := [NAMES[kind] for kind in KINDS if kind not in kinds]:
        print(f"not installed, and left out: {', '.join(missing)}")
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), medians of {ROUNDS} rounds")
    print(f"{WORKERS} workers, {CLIENTS} clients, {EVENTS:,} events, {BURST} every {PAUSE * 1_000:.0f} ms\n")
    results: dict[str, list[Result]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in kinds:
            results[kind].append(measure(kind))
    medians = {kind: Result(*map(statistics.median, zip(*rounds, strict=True))) for kind, rounds in results.items()}
    print(f"{'':34}{'deliveries/CPU s':>17}{'ratio':>8}{'wall s':>8}{'ratio':>8}{'Redis conn.':>13}{'arrived':>10}")
    base = medians.get("flask-sse")
    for kind, (per_cpu, wall, connections, _) in medians.items():
        ratios = (f"{per_cpu / base.per_cpu:.2f}", f"{wall / base.wall:.2f}") if base else ("", "")
        least = min(result.arrived for result in results[kind])
        print(
            f"{NAMES[kind]:34}{per_cpu:17,.0f}{ratios[0]:>8}{wall:8.1f}{ratios[1]:>8}{connections:13.0f}{least:10.2%}"
        )


# -- the apps, and the publisher ---------------------------------------------------------------------------------------


def create_app(kind: str) -> Flask:
    """Make the app for gunicorn, and for the publisher, which calls `app.publish`."""
    url = os.environ["BENCHMARK_REDIS"]
    app: Any = Flask(__name__)
    app.get("/pid")(lambda: str(os.getpid()))
    if kind == "flask-sse":
        from flask_sse import sse as blueprint  # noqa: PLC0415

        app.config["REDIS_URL"] = url
        app.register_blueprint(blueprint, url_prefix="/events")
        app.publish = lambda data: blueprint.publish(data, type="tick")
    elif kind == "socketio":
        from flask_socketio import SocketIO  # noqa: PLC0415

        socketio = SocketIO(app, async_mode="threading", message_queue=url, ping_interval=600)
        app.publish = lambda data: socketio.emit("tick", data)
    else:
        from sse_batcher import SSE  # noqa: PLC0415

        app.config.update(SSE_BACKEND=url, SSE_BATCHING=kind == "batched")
        sse = SSE(app)
        app.publish = lambda data: sse.enqueue("tick", data)
    return app


def publish(kind: str, events: int) -> None:
    """Publish when a line comes in, and stay until the next: our CPU is read meanwhile."""
    app: Any = create_app(kind)
    with app.app_context():
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(events):
            if number and number % BURST == 0:
                time.sleep(PAUSE)
            app.publish({"seq": number, "name": f"sensor {number % BURST}", "text": "x" * 150})
        sys.stdin.readline()


# -- one measurement ---------------------------------------------------------------------------------------------------


def measure(kind: str) -> Result:
    import redis  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        here, port, redis_port = os.path.dirname(os.path.abspath(__file__)), free_port(), free_port()
        # XDG_RUNTIME_DIR is where newer gunicorns put their control socket; else in the home directory
        env = os.environ | {"BENCHMARK_REDIS": f"redis://127.0.0.1:{redis_port}/0", "XDG_RUNTIME_DIR": folder}
        log = stack.enter_context(open(os.path.join(folder, "log"), "wb"))

        def start(*command: str, **options: Any) -> subprocess.Popen[bytes]:
            options = {"stdout": log, "stderr": log, "cwd": folder, "env": env} | options
            return stack.enter_context(stopping(subprocess.Popen(command, **options)))

        start("redis-server", "--port", str(redis_port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1")
        server = redis.Redis(port=redis_port)
        wait_until(server.ping, redis.ConnectionError)
        gunicorn = ("-m", "gunicorn", "-k", "gthread", f"--workers={WORKERS}", f"--threads={THREADS}")
        app = (f"--chdir={here}", f"--bind=127.0.0.1:{port}", "--graceful-timeout=2", f"processes:create_app('{kind}')")
        start(sys.executable, *gunicorn, *app)
        pids: set[int] = set()
        wait_until(lambda: pids.add(ask_pid(port)) or len(pids) == WORKERS, OSError)
        command = (sys.executable, os.path.abspath(__file__), "publish", kind, str(EVENTS))
        publisher = start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert publisher.stdin is not None
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == b"ready\n"
        pids.add(publisher.pid)

        clients = stack.enter_context(contextlib.closing(Clients(kind, port)))
        subscribed = lambda: dict(server.pubsub_numsub("sse"))[b"sse"]  # noqa: E731  # its clients hear nothing yet
        wait_until(lambda: clients.read(0.05) or (subscribed() if kind == "flask-sse" else clients.opened) == CLIENTS)
        time.sleep(0.5)
        cpu, began = cpu_seconds(pids), time.monotonic()
        publisher.stdin.write(b"go\n")
        publisher.stdin.flush()
        last = began
        while clients.events < CLIENTS * EVENTS and time.monotonic() - last < SILENCE:
            if clients.read(0.5):
                last = time.monotonic()
        cpu = cpu_seconds(pids) - cpu
        connections = len(server.client_list()) - 1  # without ours
        return Result(clients.events / cpu, last - began, connections, clients.events / (CLIENTS * EVENTS))


class Clients:
    """Sockets that count what comes."""

    def __init__(self, kind: str, port: int) -> None:
        self.opened = self.events = 0
        self._selector = selectors.DefaultSelector()
        # What comes before a client is open, and what it answers. flask-sse says nothing before the first event.
        marks = {"flask-sse": [], "socketio": [(b'0{"sid"', HELLO), (b'40{"sid"', b"")]}
        self._marks: list[tuple[bytes, bytes]] = marks.get(kind, [(b"sse_open", b"")])
        request = "GET /events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
        if kind == "socketio":
            request = (
                "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
            )
        for _ in range(CLIENTS):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(request.encode())
            self._selector.register(client, selectors.EVENT_READ, {"marks": 0, "rest": b"", "events": 0})

    def read(self, seconds: float) -> int:
        """Take what comes, and return how many events it was."""
        before = self.events
        for key, _ in self._selector.select(seconds):
            client, state = key.fileobj, key.data
            assert isinstance(client, socket.socket)
            chunk = client.recv(262_144)
            if not chunk:
                raise ConnectionError(f"the server ended a stream: {state['rest']!r}")
            data = state["rest"] + chunk
            came = min(data.count(SEQUENCE), EVENTS - state["events"])  # twice would not make up for what is lost
            state["events"] += came
            self.events += came
            state["rest"] = data[1 - len(SEQUENCE) :]  # it may be cut anywhere
            if state["marks"] < len(self._marks):
                mark, answer = self._marks[state["marks"]]
                state["rest"] = data  # nothing is counted before all are open
                if mark in data:
                    state["marks"] += 1
                    state["rest"] = b""
                    self.opened += state["marks"] == len(self._marks)
                    client.sendall(answer)
        return self.events - before

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


def cpu_seconds(pids: set[int]) -> float:
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return ticks / os.sysconf("SC_CLK_TCK")


def ask_pid(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/pid", timeout=10) as answer:
        return int(answer.read())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def wait_until(done: Callable[[], Any], *expected: type[Exception]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(*expected):
            if done():
                return
        time.sleep(0.02)
    raise TimeoutError("something does not start within 30 s")


@contextlib.contextmanager
def stopping(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["publish"]:
        publish(sys.argv[2], int(sys.argv[3]))
    else:
        main()
