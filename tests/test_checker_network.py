"""Nothing is lost silently over real HTTP: publishers, browsers, and `tests.kit.fault_proxy` between them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import parse_qs, quote

import pytest

from sse_batcher import BatchOptions, ClientOptions, HistoryOptions, SSEManager, Text, stream
from sse_batcher.backends import Backend
from sse_batcher.backends.redis.backend import RedisBackend, open_redis
from sse_batcher.cli import serving
from sse_batcher.event import BROADCAST, Audience
from sse_batcher.options import TRANSPORTS
from sse_batcher.process_state import Parts, ProcessState

from .kit.checker import Browser, Facts, Violation, judge, judge_publishing
from .kit.fault_proxy import FaultProxy, Faults
from .kit.record import Record, RecordedBackend
from .kit.redisserver import cursor_of, redis_server
from .kit.sse_parser import ServerEvent
from .kit.waiting import TIMEOUT, wait_until

LARGE = HistoryOptions()
SMALL = HistoryOptions(history_frames=12)


class Service:
    """Servers on threads, what was sent by them, and a proxy before each.

    Several are as several processes. Then `record` is what the first one has read, and says nothing of the others.
    """

    def __init__(self, managers: Sequence[SSEManager], record: Record, proxies: Sequence[FaultProxy]) -> None:
        self.managers = managers
        self.record = record
        self.start = cursor_of(managers[0])
        self.facts = record.facts if len(managers) == 1 else lambda: Facts(10**9)
        self._proxies = cycle(proxies)

    @property
    def proxy(self) -> FaultProxy:
        """Of the server whose turn it is."""
        return next(self._proxies)

    def read(
        self,
        browser: Browser,
        faults: Faults,
        *,
        batches: bool = True,
        poll: bool = False,
        patience: float = TIMEOUT,
    ) -> Reading:
        return Reading(self, browser, faults, batches, poll, patience)


class Reading:
    """One connection of a browser."""

    def __init__(
        self, service: Service, browser: Browser, faults: Faults, batches: bool, poll: bool, patience: float
    ) -> None:
        self._browser = browser
        self._patience = patience
        self._socket = service.proxy.connect(faults, patience)
        asked = browser.connect(batches=batches, poll=poll)
        parts = [f"channel={channel}" for channel in browser.channels] + [f"user={json.dumps(browser.user)}"]
        query = quote("&".join(parts + ["batch=0"] * (not batches) + ["poll=1"] * poll), safe="&=")
        headers = {"Last-Event-ID": asked} if asked else {}
        self._http = http.client.HTTPConnection("proxy")
        self._http.sock = self._socket
        self._response: http.client.HTTPResponse | None = None
        with suppress(OSError, http.client.HTTPException):
            self._http.request("GET", f"/?{query}", headers=headers)
            self._response = self._http.getresponse()

    def events(self) -> Iterator[ServerEvent]:
        """The events, until the connection ends or none comes for as long as it is waited for."""
        came = time.monotonic()
        with suppress(OSError, http.client.HTTPException):
            while self._response is not None and (data := self._response.read1(BYTES_AT_ONCE)):
                if events := self._browser.feed(data):
                    yield from events
                    came = time.monotonic()
                elif time.monotonic() > came + self._patience:  # nothing but heartbeats
                    return
            # `read1` raises if the chunks are not complete. If the head is not complete, there seem to be none.
            self._browser.life[-1].answered = self._response is not None and self._response.chunked

    def wait_at_most(self, patience: float) -> None:
        self._patience = patience
        self._socket.settimeout(patience)

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._response is not None:
            self._response.close()
        self._http.close()
        self._socket.close()


BYTES_AT_ONCE = 4096


@contextmanager
def serving_through_faults(
    monkeypatch: pytest.MonkeyPatch,
    history: HistoryOptions,
    batching: BatchOptions,
    redis: str | None = None,
    transport: str = "attached",
) -> Iterator[Service]:
    """One server; with the URL of a Redis, two."""
    record = Record(history)
    clients = ClientOptions(queue_frames=8, heartbeat=0.1, send_timeout=60.0, retry_ms=1, transport=transport)

    class Recorded:
        """Makes the states of all managers with a backend that is recorded."""

        def reaches(self, manager: SSEManager) -> bool:
            return True

        def make_state(self, manager: SSEManager, make: Callable[[Parts], ProcessState]) -> ProcessState:
            return make(Parts(make_backend=backend))

    def backend(url: str, frames: int) -> Backend:
        return RecordedBackend(record) if redis is None else recorded_redis(redis, frames, record)

    monkeypatch.setattr("sse_batcher.manager_state.stand_ins", [Recorded()])
    with ExitStack() as stack:
        managers, proxies = [], []
        for _ in range(1 if redis is None else 2):
            manager = stack.enter_context(SSEManager(batching=batching, clients=clients, history=history))
            manager.subscribe().close()  # the first one is recorded
            managers.append(manager)
            address = stack.enter_context(serving(app_of(manager)))
            proxies.append(stack.enter_context(FaultProxy(address)))
        yield Service(managers, record, proxies)


def recorded_redis(url: str, frames: int, record: Record) -> RedisBackend:
    """A backend of Redis; the first one that is connected writes down what it reads."""
    backend = open_redis(url, frames)
    connect = backend.connect
    backend.connect = lambda receiver: connect(  # type: ignore[method-assign]
        receiver if record.stands else record.stand_before(receiver)
    )
    return backend


def app_of(manager: SSEManager) -> Callable[..., Iterable[bytes]]:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["werkzeug.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        query = parse_qs(environ["QUERY_STRING"])
        user = json.loads(query["user"][0])
        status, headers, body = stream(manager, environ, query["channel"], user=user)
        start_response(status, headers)
        return body

    return app


@pytest.mark.external
@pytest.mark.parametrize("batches", [True, False], ids=["batches", "no batches"])
@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stream_that_is_cut_at_any_byte_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, batches: bool, reset: bool, transport: str
) -> None:
    """Also within a character of several bytes, and within a frame for its user."""
    batching = BatchOptions(batch_window=10, max_batch_size=3)
    with serving_through_faults(monkeypatch, LARGE, batching, transport=transport) as service:
        manager = service.managers[0]
        first = Browser(("a",), service.facts, 7)
        with service.read(first, Faults()) as reading:
            next(reading.events())
        for number in range(3):
            manager.enqueue("t", number, channel="a")
        for text in ("\N{PARTY POPPER}\n", "e\N{COMBINING ACUTE ACCENT}"):
            manager.enqueue("row", Text(text), channel="a")
        manager.enqueue("t", 3, user=[7, "7"])
        assert manager.flush_all(TIMEOUT)
        frames = len(service.record.sent)
        for cut in count():
            browser = Browser(("a",), service.facts, 7)
            browser.life, browser.last_id = list(first.life), first.last_id
            with service.read(browser, Faults(cut_after=cut, reset=reset), batches=batches) as reading:
                for event in reading.events():
                    if event.id == service.record.sent[-1].id:
                        break
                else:
                    event = None
            whole = event is not None
            with service.read(browser, Faults(), batches=batches) as reading:
                for event in reading.events():
                    if event.id == service.record.sent[-1].id:
                        break
            browser.life[-1].drained = frames
            counts = judge(service.start, service.record.sent, browser.life)
            assert counts["sse_gap"] == 0
            if whole:
                break
        assert cut > 300


class Chaos:
    """Publishers and browsers, all at once. What each does is drawn from the seed; how they meet is not."""

    PUBLISHERS = 3
    BROWSERS = 20
    CONNECTIONS = 8

    def __init__(self, service: Service, seed: int) -> None:
        self.service = service
        self.seed = seed
        self.browsers: list[Browser] = []
        self.published: list[tuple[Audience, str, list[Any]]] = []
        self.errors: list[BaseException] = []
        self._changed = threading.Condition()  # guards the three below
        self._connections = 0
        self._publishing = self.PUBLISHERS
        self._deadline = time.monotonic() + 12 * TIMEOUT

    def run(self) -> None:
        tasks = [lambda n=n: self._publish(n) for n in range(self.PUBLISHERS)]
        tasks += [lambda n=n: self._browse(n) for n in range(self.BROWSERS)]
        threads = [threading.Thread(target=self._guard, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.errors, f"seed {self.seed}: {self.errors}"

    def judge(self) -> Counter[str]:
        """Count the blocks of all browsers by type."""
        sent, counts = self.service.record.sent, Counter[str]()
        try:
            judge_publishing(self.published, sent)
            for browser in self.browsers:
                counts += judge(self.service.start, sent, browser.life)
        except Violation as violation:
            raise AssertionError(f"seed {self.seed}") from violation
        return counts

    def _guard(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            with self._changed:  # the others do not wait any more
                self.errors.append(error)
                self._changed.notify_all()

    def _have_overflowed(self) -> bool:
        return bool(self.errors) or any(manager.get_stats().overflows for manager in self.service.managers)

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        with self._changed:
            left = self._deadline - time.monotonic()
            if not self._changed.wait_for(lambda: self.errors or condition(), left) or self.errors:
                raise AssertionError(f"not within the time, or another has failed: {what}")

    def _publish(self, number: int) -> None:
        """Bursts, each after the browsers have come back some more times."""
        random = Random(f"{self.seed} publisher {number}")
        manager = self.service.managers[number % len(self.service.managers)]
        lanes: dict[tuple[Audience, str], list[Any]] = {}
        bursts = 40
        for burst in range(bursts):
            due = burst * self.BROWSERS * self.CONNECTIONS // (2 * bursts)
            self._wait_for(lambda due=due: self._connections >= due, "enough connections")  # type: ignore[misc]
            for _ in range(random.randrange(1, 25)):
                audience, event_type = random.choice(AUDIENCES), random.choice(["t", "u"])
                lane = lanes.setdefault((audience, event_type), [])
                data: Any = {"by": number, "n": len(lane), "pad": "x" * random.randrange(600)}
                if random.randrange(3) == 0:
                    data = Text(f"row {number} {len(lane)}\n" + "\N{PARTY POPPER}" * random.randrange(150))
                lane.append(data)
                if audience == BROADCAST:
                    manager.broadcast(event_type, data)
                elif isinstance(audience, str):
                    manager.enqueue(event_type, data, channel=audience)
                else:
                    manager.enqueue(event_type, data, user=audience)
        assert manager.flush_all(TIMEOUT)
        with self._changed:
            self.published += [(*lane, values) for lane, values in lanes.items()]
            self._publishing -= 1
            if not self._publishing:
                manager.broadcast("end", "of all")
                assert manager.flush_all(TIMEOUT)
                wait_until(lambda: self.service.record.sent[-1].events[0][0] == "end", "the first process has read all")
            self._changed.notify_all()

    def _browse(self, number: int) -> None:
        """Come back again and again, and once more at the end, to read all there is. A third of all poll.

        One of them reads nothing on its first connection until a client has fallen behind: so that happens each time.
        """
        random = Random(f"{self.seed} browser {number}")
        channels, user = random.choice([("a",), ("b",), ("a", "b")]), random.choice([7, 7, "7", 8, None])
        poll = number % 3 == 0
        browser = Browser(channels, self.service.facts, user)
        self.browsers.append(browser)
        for connection in range(self.CONNECTIONS):
            is_slow = (number, connection) == (1, 0)
            faults = self._faults(random)
            if is_slow:
                faults = Faults()
            batches = random.random() < 0.7
            patience = TIMEOUT if is_slow else 0.3
            with self.service.read(browser, faults, batches=batches, poll=poll, patience=patience) as reading:
                with self._changed:
                    self._connections += 1
                    self._changed.notify_all()
                    now = self._connections
                stall = random.choice([None, None, random.randrange(3)])
                last = random.randrange(2, 30)
                for taken, _ in enumerate(reading.events()):
                    if is_slow and taken == 0:
                        wait_until(self._have_overflowed, "a client has fallen behind")
                        reading.wait_at_most(0.3)
                    if taken == stall:  # until others have come and gone, and much was published
                        until = now + self.BROWSERS
                        with self._changed:
                            self._changed.wait_for(lambda until=until: self._connections >= until, 1.0)  # type: ignore[misc]
                    if taken == last:
                        break
        self._wait_for(lambda: not self._publishing, "the end of publishing")
        while True:
            with self.service.read(browser, Faults(), poll=poll) as reading:
                for event in reading.events():
                    if event.id == self.service.record.sent[-1].id:
                        browser.life[-1].drained = len(self.service.record.sent)
                        return
            # A poll that was answered is followed by the next one, until the client has all.
            if not browser.life[-1].answered or not poll:
                raise AssertionError(f"the last connection ended before the end: {browser.life[-1]}")

    @staticmethod
    def _faults(random: Random) -> Faults:
        return random.choice(
            [
                Faults(),
                Faults(latency=random.uniform(0, 0.02)),
                Faults(slices=random.randrange(1, 40)),
                Faults(bandwidth=random.uniform(5_000, 50_000)),
                Faults(cut_after=random.randrange(20_000), reset=random.random() < 0.5),
                Faults(slices=7, cut_after=random.randrange(2_000), reset=random.random() < 0.5),
                Faults(hold_after=random.randrange(5_000)),
            ]
        )


@pytest.mark.external
@pytest.mark.timeout(240)
@pytest.mark.parametrize("history", [LARGE, SMALL], ids=["large history", "small history"])
@pytest.mark.parametrize("mixed", [False, True], ids=["by type", "mixed"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_publishers_browsers_and_a_bad_network(
    monkeypatch: pytest.MonkeyPatch, history: HistoryOptions, mixed: bool, transport: str
) -> None:
    batching = BatchOptions(batch_window=0.01, max_batch_size=5, mixed=mixed, dedup_key=None)
    seed = SEED + 2 * mixed + (history is SMALL)
    with serving_through_faults(monkeypatch, history, batching, transport=transport) as service:
        chaos = Chaos(service, seed)
        chaos.run()
        stats = service.managers[0].get_stats()
    counts = chaos.judge()
    assert stats.overflows > 0, f"seed {seed}: no client was slow"
    assert (counts["sse_gap"] > 0) == (history is SMALL), f"seed {seed}"
    assert counts["sse_open"] > chaos.BROWSERS


@pytest.mark.external
@pytest.mark.timeout(240)
def test_two_processes_and_a_redis_whose_connections_are_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sse_batcher.backends.redis.connections.LONGEST_RETRY_PAUSE_SECONDS", 0.1)
    batching = BatchOptions(batch_window=0.01, max_batch_size=5, dedup_key=None)
    with redis_server(tmp_path) as redis, serving_through_faults(monkeypatch, LARGE, batching, redis.url) as service:
        over = threading.Event()

        def cut() -> None:
            while not over.wait(0.05):
                redis.client.client_kill_filter(_type="normal", skipme=True)

        saboteur = threading.Thread(target=cut)
        saboteur.start()
        chaos = Chaos(service, SEED)
        try:
            chaos.run()
        finally:
            over.set()
            saboteur.join()
    counts = chaos.judge()
    assert counts["sse_gap"] == 0
    assert counts["sse_open"] > chaos.BROWSERS


AUDIENCES: list[Audience] = ["a", "b", "c", BROADCAST, (7,), (8, "7"), (7, 8), (99,)]

SEED = 4
