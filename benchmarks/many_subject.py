"""A server with its clients, and the measurements that are made of the two."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from many_load import Load, LoadError, Ping, Round, ping
from many_server import Kind, Server

BURST = 30  # events
FLOODED = 100  # clients
PATIENCE = 40.0  # seconds in which all clients must have all of a burst
BUSY = 4.0  # seconds in which a request computes without pause
CONSTANT = 50  # bursts, one every window, while another page is asked for
WINDOW = 0.1  # seconds


@dataclass
class Result:
    """What was measured of one server with so many clients. Lists have one value a round."""

    kind: Kind
    clients: int
    kb: float = 0
    threads: int = 0
    connects: float = 0
    burst_p50: list[float] = field(default_factory=list)
    burst_p99: list[float] = field(default_factory=list)
    burst_last: list[float] = field(default_factory=list)
    single_last: list[float] = field(default_factory=list)
    publish_us: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    enqueue_us: list[float] = field(default_factory=list)
    dumps_us: list[float] = field(default_factory=list)
    flood: list[float] = field(default_factory=list)
    busy_last: list[float] = field(default_factory=list)
    busy_bare: list[float] = field(default_factory=list)
    """The same of the bare loop, while our request computes."""
    ping: Ping | None = None
    ping_bare: Ping | None = None
    """The same of our page, while the bursts are those of the bare loop."""
    missing: int = 0
    disordered: int = 0
    load_cpu_ms: float = 0
    fault: str = ""

    def median(self, name: str) -> float | None:
        values: list[float] = getattr(self, name)
        return statistics.median(values) if values else None


class Subject:
    """A server that runs, and its clients. What is measured goes into `result`."""

    def __init__(self, server: Server, load: Load, program: Path, result: Result) -> None:
        self.server = server
        self.load = load
        self._program = program
        self.result = result

    def burst(self) -> float:
        """One burst, and milliseconds until the last client has all of it."""
        before = self.server.cpu()
        seen, took = self.round(BURST, self.server.publish)
        result = self.result
        result.burst_p50.append(seen.p50_ms)
        result.burst_p99.append(seen.p99_ms)
        result.burst_last.append(seen.last_ms)
        result.publish_us.append(took)
        if seen.last_ms > 1_000:  # too slow for a run of bursts; and then the request that publishes costs nothing
            result.cpu_us.append((self.server.cpu() - before) / seen.events)
        return seen.last_ms

    def single(self) -> None:
        """One event that waits for no window, where there is one."""
        sort = "critical" if self.server.kind.ours else ""
        publish = lambda first, count: self.server.publish(first, count, sort=sort)  # noqa: E731
        self.result.single_last.append(self.round(1, publish)[0].last_ms)

    @property
    def interval(self) -> float | None:
        """Seconds from burst to burst in which each is over well before the next. None: it is too slow for that."""
        last = self.result.median("burst_last")
        return None if last is None or last > 1_000 else 1.5 * last / 1e3 + 0.02

    def run(self, seconds: float, every: float) -> None:
        """CPU of a run of bursts, told by one request, one in so many seconds."""
        if self.interval is None:
            return
        bursts = max(2, min(20, int(seconds / every)))
        before = self.server.cpu()
        publish = lambda first, _: self.server.publish(first, BURST, bursts=bursts, every=every)  # noqa: E731
        seen, _ = self.round(BURST * bursts, publish, bursts * every + PATIENCE)
        self.result.cpu_us.append((self.server.cpu() - before) / seen.events)
        self.result.load_cpu_ms = seen.load_cpu_ms / bursts

    def flood(self) -> None:
        """Deliveries a second of many events, published back to back."""
        count = self.server.kind.flood
        seen, _ = self.round(count, self.server.publish, 3 * PATIENCE)
        self.result.flood.append(seen.events / seen.last_ms * 1e3)

    def enqueue(self, calls: int) -> None:
        """Microseconds of a call of ours, back to back, and of `json.dumps` of the same events."""

        def publish(first: int, count: int) -> float:
            took = self.server.post(f"/enqueue?first={first}&n={count}")
            self.result.dumps_us.append(float(took["dumps_us"]))
            return float(took["median_us"])

        self.result.enqueue_us.append(self.round(calls, publish, 3 * PATIENCE)[1])

    def busy(self, rounds: int, bare: Subject | None = None) -> None:
        """Bursts while one request computes without pause, in turns with those of the bare loop.

        What takes longer than the request does counts as it is.
        """
        with in_background(lambda: self.server.request("GET", f"/burn?seconds={BUSY}")):
            time.sleep(0.2)
            end = time.monotonic() + BUSY - 0.2
            while not self.result.busy_last or (len(self.result.busy_last) < rounds and time.monotonic() < end - 1):
                self.result.busy_last.append(self.round(BURST, self.server.publish)[0].last_ms)
                if bare is not None:
                    self.result.busy_bare.append(bare.round(BURST, bare.server.publish)[0].last_ms)

    def other_page(self, bare: Subject | None = None) -> None:
        """How long another page takes during constant bursts to all clients; and during those of the bare loop."""
        if bare is not None:
            self.result.ping_bare = self._ping_during_bursts_of(bare)
        self.result.ping = self._ping_during_bursts_of(self)

    def _ping_during_bursts_of(self, other: Subject) -> Ping:
        pings: list[Ping] = []

        def publish(first: int, _: int) -> float:
            bursts = lambda: other.server.publish(first, BURST, bursts=CONSTANT, every=WINDOW)  # noqa: E731
            with in_background(bursts):
                pings.append(ping(self._program, self.server.port, (CONSTANT - 2) * WINDOW))
            return 0

        other.round(BURST * CONSTANT, publish, CONSTANT * WINDOW + PATIENCE)
        return pings[0]

    def round(
        self, count: int, publish: Callable[[int, int], float], timeout: float = PATIENCE, *, lossy: bool = False
    ) -> tuple[Round, float]:
        """Have `publish` publish so many events, and wait until all clients have them. Returns also what it returned.

        Raises `LoadError` if a client has not all of them after `timeout` seconds, unless it is `lossy`.
        """
        took: list[float] = []
        first = self.server.numbers(count)
        seen = self.load.round(first, count, lambda: took.append(publish(first, count)), timeout)
        self.result.missing += seen.missing
        self.result.disordered += seen.disordered
        if seen.complete < seen.clients and not lossy:
            raise LoadError(f"{seen.complete:,} of {seen.clients:,} clients had {count:,} events in {timeout:.0f} s")
        if seen.last_ms < 0:
            raise LoadError("no client had the first event")
        return seen, took[0]


@contextlib.contextmanager
def opened(kind: Kind, clients: int, program: Path, folder: Path) -> Iterator[Subject]:
    """Start a server, and open that many streams; what that costs is in the result."""
    result = Result(kind, clients)
    with Server(kind, clients, folder) as server:
        with Load(program, server.port, kind.path) as first:  # what the first request imports is no client's
            first.connect(1)
            Subject(server, first, program, Result(kind, 1)).burst()
        time.sleep(0.3)
        before = server.rss()
        with Load(program, server.port, kind.path) as load:
            result.connects = clients / load.connect(clients)
            time.sleep(0.5)
            result.kb = (server.rss() - before) / 1024 / clients
            result.threads = server.threads()
            yield Subject(server, load, program, result)


@contextlib.contextmanager
def in_background(call: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        thread.join()
