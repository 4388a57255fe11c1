"""Clients that come and leave at every moment of a take-over, while others ask for pages, and events are published.

A connection that gets the descriptor of another one must not get its bytes: each answer is its own, and each stream
goes on where it was.

A test of each server lasts `SECONDS`, at full speed, or longer if too little has happened by then. For a long run at a
moderate rate, name the seconds for each of the six servers:
``CHURN_SECONDS=600 python -m pytest -m external -s tests/test_churn.py`` takes one hour.
"""

from __future__ import annotations

import http.client
import itertools
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

from .kit.leaving import ENDING, process_of, read_until, reset, serving_app, wait_for_clients
from .kit.servers import HOST, SERVERS, Kind, Server, Stream, with_threads
from .kit.sse_parser import EventStreamParser
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

SECONDS = float(os.environ.get("CHURN_SECONDS", "5"))
PAUSE = 0.1 if "CHURN_SECONDS" in os.environ else 0.0
"""Seconds between two requests of a client, so that a long run leaves something of the machine to other programs."""
STREAMS, PAGES = 12, 3
"""How many clients of each sort there are at once."""


class Reader:
    """Reads one stream, and looks at each event: numbers have to come one by one."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self._parser = EventStreamParser(strict=True)
        self._last: int | None = None
        self.events = 0

    def read(self, size: int) -> None:
        data = self._response.read1(size)
        assert data, "the stream has ended"
        for event in self._parser.feed(data):
            if event.type == "sse_open":
                assert self._last is None
                continue
            for number in event.json["events"] if event.type == "item_batch" else [event.json]:
                assert event.type in {"item", "item_batch"}
                assert self._last is None or number == self._last + 1, f"{number} after {self._last}"
                self._last = number
                self.events += 1


class Churn:
    """What the threads of one test do, and count."""

    def __init__(self, server: Server, kind: Kind) -> None:
        self.counts: Counter[str] = Counter()
        self._server = server
        self._keeps = kind.after_head != "cut"
        self._end = time.monotonic() + SECONDS
        self._latest_end = self._end + TIMEOUT
        self._over = threading.Event()
        self._numbers = itertools.count()

    def run(self) -> None:
        with ThreadPoolExecutor(STREAMS + PAGES) as pool:
            done = [pool.submit(self._streams, seed) for seed in range(STREAMS)]
            done += [pool.submit(self._pages) for _ in range(PAGES)]
            try:
                for future in as_completed(done):
                    future.result()
            finally:
                self._over.set()  # one of them has failed: the others need not go on

    def _goes_on(self) -> bool:
        now = time.monotonic()
        return not self._over.wait(PAUSE) and (now < self._end or (self.has_too_few() and now < self._latest_end))

    def has_too_few(self) -> bool:
        """Whether this is not enough for a test yet: the machine may be slow."""
        return min(self.counts["reading"], self.counts["pages"]) <= 50

    def _streams(self, seed: int) -> None:
        chance = random.Random(seed)
        while self._goes_on():
            self._stream(chance)

    def _stream(self, chance: random.Random) -> None:
        number = next(self._numbers)
        with socket.create_connection((HOST, self._server.port), timeout=TIMEOUT) as connection:
            if self._keeps and chance.random() < 0.3:
                connection.sendall(f"GET /echo?n=0{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                response = http.client.HTTPResponse(connection)
                response.begin()
                assert response.read() == f"0{number}".encode()
                if response.will_close:
                    return
                self.counts["on a connection that was used before"] += 1
            connection.sendall(f"GET /events?n={number} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            phase = chance.choice(["asked", "in the head", "after the head", "opened", "reading", "reading"])
            self.counts[phase] += 1
            if phase == "in the head":
                connection.recv(20)
            elif phase == "after the head":
                read_until(connection, b"\r\n\r\n")
            elif phase in {"opened", "reading"}:
                response = http.client.HTTPResponse(connection)
                response.begin()
                assert (response.status, response.headers["X-N"]) == (200, str(number))
                reader = Reader(response)
                for _ in range(1 if phase == "opened" else chance.randrange(1, 30)):
                    reader.read(chance.choice([1, 37, 4096]))
                self.counts["events"] += reader.events
            if chance.random() < 0.5:
                reset(connection)

    def _pages(self) -> None:
        """One after the other, on a connection that is kept where the server keeps it."""
        connection = http.client.HTTPConnection(HOST, self._server.port, timeout=TIMEOUT)
        while self._goes_on():
            number = str(next(self._numbers))
            connection.request("GET", f"/echo?n={number}")
            response = connection.getresponse()
            assert (response.status, response.read(), response.headers["X-N"]) == (200, number.encode(), number)
            self.counts["pages"] += 1
            if not self._keeps:
                connection.close()
        connection.close()


def settled(server: Server) -> list[str]:
    """Return the server's descriptors when no client is connected."""
    wait_for_clients(server, 0)
    wait_until(lambda: not ENDING & set(process_of(server)["threads"]), "our threads have ended")
    descriptors: list[str] = process_of(server)["descriptors"]
    return descriptors


@pytest.mark.timeout(SECONDS + 3 * TIMEOUT)
@pytest.mark.parametrize("name", ["gunicorn", "gunicorn-sync-detached", "waitress", "cheroot", "werkzeug", "uwsgi"])
def test_clients_that_come_and_leave_at_every_moment_cross_nothing_and_leave_nothing(name: str, tmp_path: Path) -> None:
    kind = SERVERS[name]
    command = with_threads(kind.command, 4)
    if name == "gunicorn":
        command += ("--keep-alive=60",)  # or it closes the pages' connections while the machine stands still
    with serving_app(command, tmp_path, lasting=SECONDS, batch_window=0.02) as server:
        with Stream(server) as stream:
            stream.until("sse_open")
        before = settled(server)
        server.request("POST", "/flood")
        churn = Churn(server, kind)
        try:
            churn.run()
        finally:
            print(name, dict(churn.counts))  # noqa: T201
            server.request("DELETE", "/flood")
        # Asked again: a thread of the server may still be about to close the connection of the last request.
        wait_until(lambda: len(settled(server)) <= len(before), "no more descriptors than before")
        stats = server.stats()
        print(stats, f"{len(before)} descriptors before, {len(settled(server))} after")  # noqa: T201
        assert stats["undone"] == 0
        assert server.faults() == []
        assert not churn.has_too_few()
