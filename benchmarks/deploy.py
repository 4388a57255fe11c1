"""What clients and pages notice of a reload and of a stop. `python benchmarks/deploy.py`.

Needs redis-server, and `pip install gunicorn redis`. Linux only. `gunicorn -k gthread` with two workers and 8 threads
each, and Redis. One thread drives all clients. They do what an `EventSource` does: they wait
for the `retry` that they were sent, and come back with their last id. One more process publishes ten events every half
second. Another one requests a page all the time.

SIGHUP goes to gunicorn's master and reloads, SIGTERM stops. Printed for each signal, with the clients and without any:

- offline: for how long a client had no stream, from the end of one to the ``sse_open`` of the next. An end is an
  ``sse_bye``, or a connection that is cut off.
- page: what a request took from its connect to its last byte, from 1 s before the signal to 3 s after all is over.
- gap: the same of the first request that a new worker has answered; it is left out of the others. gunicorn's old
  workers accept no connections from the signal on, and its new ones have to import the app first.
- lost, twice: events that a client did not get, or got again or in the wrong order; and gaps.
- gone: seconds from the signal until the last old worker had ended.

`--clients`, `--signal` and `--rounds` choose what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import heapq
import os
import platform
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any, NamedTuple

from flask import Flask
from processes import ask_pid, free_port, stopping, wait_until

WORKERS = 2
THREADS = 8
EVENTS = 10  # in a burst
PAUSE = 0.5  # seconds between two bursts
SETTLE = 2.0  # seconds between the last client's stream and the signal
AFTER = 3.0  # seconds that are measured after the last old worker has ended and the last client is back
TIMEOUT = 60.0
PAGE_PAUSE = 0.01
CONNECTING = 100  # clients that open their first stream at the same time
REFUSED_SECONDS = 3.0  # an EventSource that was sent no `retry`

_NUMBER = re.compile(rb'"seq":(\d+)')
_ID = re.compile(rb"^id: (\S+)$", re.MULTILINE)
_RETRY = re.compile(rb"^retry: (\d+)$", re.MULTILINE)


def create_app() -> Flask:
    from sse_batcher import SSE  # noqa: PLC0415

    app = Flask(__name__)
    app.config.update(SSE_BACKEND=os.environ["BENCHMARK_REDIS"])
    SSE(app)
    app.add_url_rule("/pid", "pid", lambda: str(os.getpid()))
    app.add_url_rule("/page", "page", lambda: f"page {os.getpid()}")
    return app


def publish() -> None:
    """Publish until a line comes in. Print the number of events."""
    from sse_batcher import SSEManager  # noqa: PLC0415

    number = 0
    with SSEManager(backend=os.environ["BENCHMARK_REDIS"]) as manager:
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], PAUSE)[0]:
            for _ in range(EVENTS):
                number += 1
                manager.enqueue("tick", {"seq": number, "text": "x" * 100})
        assert manager.flush_all(10)
    print(number, flush=True)


def request_pages(port: int) -> None:
    """Request the page until a line comes in. Print when each request began, what it took, and the worker.

    In seconds and milliseconds.
    """
    took = []
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], PAGE_PAUSE)[0]:
        began = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(b"GET /page HTTP/1.0\r\n\r\n")
                answer = b""
                while data := connection.recv(4_096):
                    answer += data
        except OSError:
            continue  # nothing listens after a stop
        if b"page " in answer:
            took.append((began, (time.monotonic() - began) * 1_000, int(answer.rpartition(b" ")[2])))
    for began, milliseconds, worker in took:
        print(f"{began:.4f} {milliseconds:.2f} {worker}")


# -- the clients -------------------------------------------------------------------------------------------------------


class Client:
    """A browser with one `EventSource`."""

    __slots__ = ("ended_at", "fd", "id", "is_open", "last", "number", "offline", "rest", "retry", "socket")

    def __init__(self, number: int) -> None:
        self.number = number
        self.socket: socket.socket | None = None
        self.fd = -1
        self.id = b""
        self.retry = REFUSED_SECONDS
        self.is_open = False
        self.last: int | None = None  # the newest event
        self.rest = b""
        self.ended_at: float | None = None
        self.offline: list[float] = []


class Clients:
    """All clients. `step` is called all the time."""

    def __init__(self, port: int, count: int) -> None:
        self._address = ("127.0.0.1", port)
        self.all = [Client(number) for number in range(count)]
        self._epoll = select.epoll()
        self._by_fd: dict[int, Client] = {}
        self._returning: list[tuple[float, int]] = []
        self._parsed: dict[bytes, tuple[int, int, bytes]] = {}
        self.open = 0
        self.counts: Counter[str] = Counter()

    def begin(self) -> None:
        """Open all streams."""
        deadline = time.monotonic() + TIMEOUT
        for number in range(len(self.all) + CONNECTING):
            # At most so many are on their way.
            while self.open < min(number - CONNECTING + 1, len(self.all)):
                assert time.monotonic() < deadline, "streams do not open"
                self.step()
            if number < len(self.all):
                self._connect(self.all[number])

    def step(self, seconds: float = 0.05) -> None:
        """Take what comes, for so many seconds at most, and let those return for which it is time."""
        now = time.monotonic()
        while self._returning and self._returning[0][0] <= now:
            self._connect(self.all[heapq.heappop(self._returning)[1]])
        if self._returning:
            seconds = min(seconds, max(0.0, self._returning[0][0] - now))
        for fd, events in self._epoll.poll(seconds):
            client = self._by_fd[fd]
            if events & select.EPOLLOUT:
                self._ask(client)
            else:
                self._read(client, fd)

    def _connect(self, client: Client) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        client.socket, client.fd, client.rest = connection, connection.fileno(), b""
        self._by_fd[client.fd] = client
        self._epoll.register(client.fd, select.EPOLLOUT)
        if connection.connect_ex(self._address) not in (0, errno.EINPROGRESS):
            self._end(client, "refused")

    def _ask(self, client: Client) -> None:
        assert client.socket is not None
        if client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._end(client, "refused")
            return
        cursor = b"Last-Event-ID: " + client.id + b"\r\n" if client.id else b""
        client.socket.send(b"GET /events HTTP/1.0\r\nAccept: text/event-stream\r\n" + cursor + b"\r\n")
        self._epoll.modify(client.fd, select.EPOLLIN)

    def _read(self, client: Client, fd: int) -> None:
        try:
            data = os.read(fd, 65_536)
        except OSError:
            data = b""
        if not data:
            self._end(client, "cut off")
            return
        if client.rest:
            data = client.rest + data
            client.rest = b""
        # Most of what comes is the same for all clients, so it is parsed once.
        known = self._parsed.get(data) or self._parse(data)
        if known is None or not client.is_open:
            self._read_slowly(client, data)
        else:
            self._take(client, *known)

    def _parse(self, data: bytes) -> tuple[int, int, bytes] | None:
        """Return the first and the last number of these blocks, and the last id; None if there is more than events."""
        numbers = [int(number) for number in _NUMBER.findall(data)]
        if not (data.startswith(b"event: tick") and data.endswith(b"\n\n")) or b"event: sse_" in data:
            return None
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            return None
        if len(self._parsed) > 1_000:
            self._parsed.clear()
        known = self._parsed[data] = numbers[0], numbers[-1], _ID.findall(data)[-1]
        return known

    def _take(self, client: Client, first: int, last: int, id: bytes) -> None:
        if client.last is not None and first != client.last + 1:
            self.counts["lost" if first > client.last else "twice"] += 1
        client.last = last
        client.id = id

    def _read_slowly(self, client: Client, data: bytes) -> None:
        """Take what is not the usual: the head of a response, control blocks, and blocks that are cut."""
        if not client.is_open:
            head, end, body = data.partition(b"\r\n\r\n")
            if data.startswith(b"HTTP/"):
                if not end:
                    client.rest = data
                    return
                if b" 200 " not in head[:20]:
                    self._end(client, head[:12].decode())
                    return
                data = body
        blocks, end, client.rest = data.rpartition(b"\n\n")
        for block in (blocks + end).split(b"\n\n"):
            if client.fd >= 0:
                self._take_block(client, block)

    def _take_block(self, client: Client, block: bytes) -> None:
        if retry := _RETRY.search(block):
            client.retry = int(retry[1]) / 1_000
        if ids := _ID.findall(block):
            client.id = ids[-1]
        for number in _NUMBER.findall(block):
            self._take(client, int(number), int(number), client.id)
        if block.startswith((b"event: sse_open", b"event: sse_gap")):
            self.counts["gaps"] += block.startswith(b"event: sse_gap")
            client.is_open = True
            self.open += 1
            if client.ended_at is not None:
                client.offline.append(time.monotonic() - client.ended_at)
                client.ended_at = None
        elif block.startswith(b"event: sse_"):
            self._end(client, re.sub(r'event: (\w+)\n.*"reason":"(\w+)".*', r"\1 \2", block.decode(), flags=re.DOTALL))

    def _end(self, client: Client, why: str) -> None:
        assert client.socket is not None
        self.counts[why] += 1
        now = time.monotonic()
        if client.is_open:
            client.ended_at = now
            self.open -= 1
        client.is_open = False
        self._epoll.unregister(client.fd)
        del self._by_fd[client.fd]
        client.socket.close()
        client.fd = -1
        heapq.heappush(self._returning, (now + client.retry, client.number))

    def close(self) -> None:
        for client in self.all:
            if client.socket is not None:
                client.socket.close()
        self._epoll.close()


# -- one measurement ---------------------------------------------------------------------------------------------------


class Page(NamedTuple):
    began: float
    took: float  # milliseconds
    worker: float


class Result(NamedTuple):
    offline: float  # seconds, median
    longest: float
    page_p50: float  # milliseconds
    page_p99: float
    page_max: float
    gap: float  # milliseconds
    gone: float  # seconds
    wrong: int  # events that were lost, came twice, or not in order; and gaps
    ends: Counter[str]


def measure(count: int, number: signal.Signals) -> Result:
    import redis  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        here, port, redis_port = os.path.dirname(os.path.abspath(__file__)), free_port(), free_port()
        env = os.environ | {"BENCHMARK_REDIS": f"redis://127.0.0.1:{redis_port}/0", "XDG_RUNTIME_DIR": folder}
        log = stack.enter_context(open(os.environ.get("BENCHMARK_LOG", os.path.join(folder, "log")), "wb"))

        def start(*command: str, **options: Any) -> subprocess.Popen[bytes]:
            options = {"stdout": log, "stderr": log, "cwd": folder, "env": env} | options
            return stack.enter_context(stopping(subprocess.Popen(command, **options)))

        def ours(*arguments: str) -> subprocess.Popen[bytes]:
            command = (sys.executable, os.path.abspath(__file__), *arguments)
            process = start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            return process

        start("redis-server", "--port", str(redis_port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1")
        wait_until(redis.Redis(port=redis_port).ping, redis.ConnectionError)
        gunicorn = ("-m", "gunicorn", "-k", "gthread", f"--workers={WORKERS}", f"--threads={THREADS}")
        options = (f"--chdir={here}", f"--bind=127.0.0.1:{port}", "--worker-connections=20000", "deploy:create_app()")
        master = start(sys.executable, *gunicorn, *options)
        wait_until(lambda: ask_pid(port), OSError)
        clients = stack.enter_context(contextlib.closing(Clients(port, count)))
        clients.begin()
        publisher, pages = ours("publish"), ours("pages", str(port))
        run(clients, SETTLE)
        old = children(master.pid)
        clients.counts.clear()
        began = time.monotonic()
        master.send_signal(number)
        deadline, gone = began + TIMEOUT, 0.0

        def is_over() -> bool:
            nonlocal gone
            if not gone and not any(map(runs, old)):
                gone = time.monotonic() - began
            is_back = number != signal.SIGHUP or clients.open == count
            return time.monotonic() > deadline or bool(gone and is_back)

        while not is_over():
            clients.step()
        run(clients, AFTER)
        ended = time.monotonic()
        total = int(stop(publisher)[0])
        run(clients, 1.0)
        took = [Page(*map(float, line.split())) for line in stop(pages)]
        took = [page for page in took if began - 1 <= page.began <= ended]
        return result(clients, total if number == signal.SIGHUP else None, took, old, gone)


def result(clients: Clients, total: int | None, took: list[Page], old: list[int], gone: float) -> Result:
    first = next((page for page in took if page.worker not in old), None)
    page = sorted(page.took for page in took if page is not first) or [0.0]
    counts = clients.counts
    if total is not None:
        counts["lost"] += sum(client.last != total for client in clients.all)
    wrong = sum(counts.pop(name, 0) for name in ("lost", "twice", "gaps"))
    offline = [sum(client.offline) for client in clients.all if client.offline] or [0.0]
    return Result(
        statistics.median(offline),
        max(offline),
        statistics.median(page),
        page[int(0.99 * (len(page) - 1))],
        page[-1],
        first.took if first else 0.0,
        gone,
        wrong,
        counts,
    )


def run(clients: Clients, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        clients.step(min(0.05, left))


def stop(process: subprocess.Popen[bytes]) -> list[bytes]:
    return process.communicate(b"\n", timeout=30)[0].splitlines()


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def runs(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=5_000)
    parser.add_argument("--signal", choices=["HUP", "TERM", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), {asked.rounds} round(s)\n")
    print("| | offline: median, longest | page: p50, p99, longest | gap | lost, twice, gaps | gone | ends |")
    print("|---|--:|--:|--:|--:|--:|---|")
    kinds = [
        (number, count)
        for number in (signal.SIGHUP, signal.SIGTERM)
        if asked.signal in ("both", number.name.removeprefix("SIG"))
        for count in (asked.clients, 0)
    ]
    for _ in range(asked.rounds):
        for number, count in kinds:
            found = measure(count, number)
            ends = ", ".join(f"{times} {why}" for why, times in sorted(found.ends.items()))
            print(
                f"| {number.name}, {count:,} clients | {found.offline:.2f} s, {found.longest:.2f} s | "
                f"{found.page_p50:.1f} ms, {found.page_p99:.1f} ms, {found.page_max:.0f} ms | {found.gap:.0f} ms | "
                f"{found.wrong} | "
                f"{found.gone:.1f} s | {ends} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["publish"]:
        publish()
    elif sys.argv[1:2] == ["pages"]:
        request_pages(int(sys.argv[2]))
    else:
        main()
