"""Many processes for real: gunicorn with four workers, a fifth process that publishes, and Redis between them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .kit.redisserver import RedisServer, redis_fixture
from .kit.servers import HOST, Server, running
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

CLIENTS = 200
BATCHES = 1_000

APP = """
import os
from flask import Flask
from sse_batcher import SSE

app = Flask(__name__)
app.config.update(SSE_BACKEND=os.environ["BACKEND"], SSE_HEARTBEAT=5)
sse = SSE(app)

@app.after_request
def tell_process(response):
    response.headers["X-Process"] = str(os.getpid())
    return response

@app.get("/stats")
def stats():
    return sse.manager.get_stats().as_dict()
"""

PUBLISHER = """
import sys
from sse_batcher import BatchOptions, SSEManager

first, last = map(int, sys.argv[2:])
with SSEManager(batching=BatchOptions(batch_window=5, max_batch_size=2), backend=sys.argv[1]) as manager:
    for number in range(first, last):
        manager.enqueue("n", number)
    manager.broadcast("hub_state", last)
    assert manager.flush_all(30)
"""


redis = redis_fixture()


@pytest.fixture
def site(redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "site_app.py").write_text(textwrap.dedent(APP))
    monkeypatch.setenv("BACKEND", redis.url)
    options = ("-k", "gthread", "--workers=4", "--threads=256", f"--bind={HOST}:{{port}}", "site_app:app")
    with running(("-m", "gunicorn", *options), tmp_path) as server:
        yield server


def publish(redis: RedisServer, first: int, last: int) -> None:
    """From a process of its own: these numbers, two in a batch, and the end."""
    subprocess.run([sys.executable, "-c", PUBLISHER, redis.url, str(first), str(last)], check=True, timeout=60)


class Client:
    """A browser that keeps what it has got, and the worker that it has met."""

    def __init__(self, site: Server, cursor: str = "") -> None:
        header = f"Last-Event-ID: {cursor}\r\n" if cursor else ""
        self.data = b""
        while not self.data or b"event: sse_busy" in self.data:  # a worker that is slow to read its first position
            self.data = b""
            self._connection = socket.create_connection((HOST, site.port), timeout=TIMEOUT)
            self._connection.sendall(f"GET /events HTTP/1.0\r\nHost: x\r\n{header}\r\n".encode())
            self.until(rb"\n\n")
        process = re.search(rb"X-Process: (\d+)", self.data)
        assert process is not None
        self.process = int(process[1])

    def until(self, pattern: bytes) -> None:
        while not re.search(pattern, self.data[-200_000:]):
            data = self._connection.recv(1 << 20)
            assert data, "it was cut off"
            self.data += data

    def to_cut(self) -> None:
        try:
            while data := self._connection.recv(1 << 20):
                self.data += data
        except ConnectionError:
            pass

    @property
    def cursor(self) -> str:
        complete = self.data[: self.data.rindex(b"\n\n")]
        return re.findall(rb"^id: (\S+)", complete, re.M)[-1].decode()

    @property
    def numbers(self) -> list[int]:
        complete = self.data[: self.data.rindex(b"\n\n")]
        return [
            n
            for data in re.findall(rb"^event: n_batch\ndata: (.*)", complete, re.M)
            for n in json.loads(data)["events"]
        ]

    def close(self) -> None:
        self._connection.close()


def test_a_thousand_batches_of_a_fifth_process_reach_all_clients_of_four_once_and_in_order(
    site: Server, redis: RedisServer
) -> None:
    with ExitStack() as stack:
        clients: list[Client] = []
        # Which worker takes a connection is chance: many may come to one.
        while len(clients) < CLIENTS or len({client.process for client in clients}) < 4:
            clients.append(Client(site))
            stack.callback(clients[-1].close)
        publish(redis, 0, 2 * BATCHES)
        for client in clients:
            client.until(rb"event: hub_state\n(?:.*\n)*?\n")
            assert client.numbers == list(range(2 * BATCHES))
        assert {client.cursor for client in clients} == {clients[0].cursor}


def test_clients_of_a_worker_that_is_killed_go_on_at_another_one(site: Server, redis: RedisServer) -> None:
    with ExitStack() as stack:
        clients = []
        while len({client.process for client in clients}) < 2:
            clients.append(Client(site))
            stack.callback(clients[-1].close)
        publish(redis, 0, 100)
        for client in clients:
            client.until(rb"event: hub_state\n(?:.*\n)*?\n")
        killed = clients[-1].process
        os.kill(killed, signal.SIGKILL)
        publish(redis, 100, 200)
        for client in clients:
            if client.process != killed:
                client.until(rb"hub_state\ndata: 200\n(?:.*\n)*?\n")
                assert client.numbers == list(range(200))
                continue
            client.to_cut()
            again = Client(site, client.cursor)
            stack.callback(again.close)
            assert again.process != killed
            again.until(rb"hub_state\ndata: 200\n(?:.*\n)*?\n")
            assert client.numbers + again.numbers == list(range(200))
            assert b"sse_gap" not in again.data


def test_workers_that_stop_tell_their_clients(site: Server, redis: RedisServer) -> None:
    clients = [Client(site) for _ in range(8)]
    site.process.terminate()
    for client in clients:
        client.until(rb"event: sse_bye\n(?:.*\n)*?\n")
        client.close()
    wait_until(lambda: site.process.poll() is not None, "gunicorn ends")
