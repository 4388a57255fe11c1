"""A reload of gunicorn with Redis: clients are handed over in waves, and lose nothing."""

from __future__ import annotations

import heapq
import re
import selectors
import signal
import socket
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from sse_batcher import BatchOptions, SSEManager
from sse_batcher.streams.handover import RETURN_MS, WAVE_SECONDS, WAVE_STREAMS

from .kit.redisserver import RedisServer, redis_fixture
from .kit.servers import HOST, Server, running
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.external

CLIENTS = 7 * WAVE_STREAMS  # so that one of two workers has at least four waves
PAUSE = WAVE_SECONDS / 2  # seconds between two events
RELOADS = 3  # so many at most, until streams end in waves: if the machine stands still, all of them end afterwards

APP = """
import os
from flask import Flask
from sse_batcher import SSE

app = Flask(__name__)
app.config.update(SSE_BACKEND=os.environ["BACKEND"], SSE_TRANSPORT=os.environ["TRANSPORT"])
sse = SSE(app)

@app.after_request
def tell_process(response):
    response.headers["X-Process"] = str(os.getpid())
    return response
"""

redis = redis_fixture()


@pytest.fixture(params=["auto", "attached"])
def site(
    request: pytest.FixtureRequest, redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    (tmp_path / "site_app.py").write_text(textwrap.dedent(APP))
    monkeypatch.setenv("BACKEND", redis.url)
    monkeypatch.setenv("TRANSPORT", request.param)
    threads = 8 if request.param == "auto" else CLIENTS + 8
    options = ("-k", "gthread", "--workers=2", f"--threads={threads}", f"--bind={HOST}:{{port}}", "site_app:app")
    with running(("-m", "gunicorn", *options), tmp_path) as server:
        yield server


class Stream:
    """One response of a browser: the worker that it has met, and the numbers that it has got."""

    def __init__(self) -> None:
        self.data = b""
        self.parsed = 0
        self.worker = ""
        self.first = self.last = ""
        """The type of the first block, and of one that has ended it."""
        self.numbers: list[int] = []
        self.retry = 0
        """The newest time to return, in milliseconds."""


def opened(streams: list[Stream]) -> list[Stream]:
    """Those that were not refused, as a new process may do while it is not yet connected to Redis."""
    return [stream for stream in streams if stream.last != "sse_busy"]


class Browsers:
    """Browsers that come back after the `retry` that they were sent, as an `EventSource` does."""

    def __init__(self, port: int) -> None:
        self._address = (HOST, port)
        self._selector = selectors.DefaultSelector()
        self._returning: list[tuple[float, int]] = []
        self._cursors = [""] * CLIENTS
        self.streams: list[list[Stream]] = [[] for _ in range(CLIENTS)]
        for number in range(CLIENTS):
            self._open(number)

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def until(self, done: str, at_least: int) -> None:
        """Read until each browser has had at least so many streams, and has got an event by the newest one."""
        deadline = time.monotonic() + TIMEOUT
        while not all(len(opened(streams)) >= at_least and streams[-1].numbers for streams in self.streams):
            assert time.monotonic() < deadline, done
            self.step()

    def step(self) -> None:
        while self._returning and self._returning[0][0] <= time.monotonic():
            self._open(heapq.heappop(self._returning)[1])
        for key, _ in self._selector.select(0.05):
            connection, number = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            try:
                data = connection.recv(1 << 18)
            except ConnectionError:
                data = b""
            stream = self.streams[number][-1]
            stream.data += data
            self._parse(number, stream)
            if stream.last or not data:
                self._selector.unregister(connection)
                connection.close()
                heapq.heappush(self._returning, (time.monotonic() + stream.retry / 1_000, number))

    def _open(self, number: int) -> None:
        connection = socket.create_connection(self._address, timeout=TIMEOUT)
        cursor = self._cursors[number]
        header = f"Last-Event-ID: {cursor}\r\n" if cursor else ""
        connection.sendall(f"GET /events HTTP/1.0\r\nHost: x\r\n{header}\r\n".encode())
        self.streams[number].append(Stream())
        self._selector.register(connection, selectors.EVENT_READ, number)

    def _parse(self, number: int, stream: Stream) -> None:
        head, _, body = stream.data.partition(b"\r\n\r\n")
        complete, _, _ = body.rpartition(b"\n\n")
        if len(complete) == stream.parsed:
            return
        if not stream.worker:
            stream.worker = re.findall(r"X-Process: (\d+)", head.decode())[0]
        news, stream.parsed = complete[stream.parsed :].decode(), len(complete)
        for block in news.strip().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != ":")
            self._cursors[number] = fields.get("id", self._cursors[number])
            stream.retry = int(fields.get("retry", stream.retry))
            event = fields.get("event", "")
            if event == "n":
                stream.numbers.append(int(fields["data"]))
            elif event in {"sse_bye", "sse_busy"}:
                stream.last = event
            elif event:
                stream.first = stream.first or event


def test_a_reload_ends_streams_in_waves_and_their_clients_lose_nothing(site: Server, redis: RedisServer) -> None:
    over = threading.Event()
    sent = 0
    with SSEManager(batching=BatchOptions(batch_window=0), backend=redis.url) as manager:

        def publish() -> None:
            nonlocal sent
            while not over.wait(PAUSE):
                manager.enqueue("n", sent)
                sent += 1

        publisher = threading.Thread(target=publish)
        with closing(Browsers(site.port)) as browsers:
            publisher.start()
            try:
                browsers.until("all streams are open", 1)
                for reload in range(1, RELOADS + 1):
                    site.process.send_signal(signal.SIGHUP)
                    browsers.until("all clients have come back", reload + 1)
                    if have_ended_in_waves(browsers):
                        break
            finally:
                over.set()
                publisher.join(TIMEOUT)
            deadline = time.monotonic() + TIMEOUT
            while any(streams[-1].numbers[-1] != sent - 1 for streams in browsers.streams):
                assert time.monotonic() < deadline, "all events have come"
                browsers.step()
    for streams in browsers.streams:
        each = opened(streams)
        assert len(each) == reload + 1
        assert {stream.first for stream in each} == {"sse_open"}
        assert {stream.last for stream in each[:-1]} == {"sse_bye"}
        numbers = [number for stream in each for number in stream.numbers]
        assert numbers == list(range(numbers[0], sent)), "each event comes once and in order"
        assert all(old.worker != new.worker for old, new in pairwise(each))
    assert have_ended_in_waves(browsers)


def have_ended_in_waves(browsers: Browsers) -> bool:
    """Whether, in the newest reload, streams of later waves got events after the first ones had ended.

    Looks at the worker with more streams. The other one may have so few that they end at once.
    """
    at_end = defaultdict(list)
    for streams in browsers.streams:
        old = opened(streams)[-2]
        at_end[old.worker].append((old.numbers[-1], old.retry))
    numbers, retries = zip(*max(at_end.values(), key=len), strict=True)
    return max(retries) <= RETURN_MS[1] and max(numbers) > min(numbers)
