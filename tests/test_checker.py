"""Nothing is lost silently, whatever happens: looked for at random, in the manner of Jepsen, by `tests.checker`.

First the judge itself; then all interleavings of one process, in one thread and without sockets; then real HTTP
through `tests.fault_proxy`.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from random import Random
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from sse_batcher import BatchOptions, Client, ClientOptions, HistoryOptions, SSEManager, stream
from sse_batcher.backends.memory import MemoryBackend
from sse_batcher.cli import serving
from sse_batcher.event import Batch, Event
from sse_batcher.hub import Hub, Receiver
from sse_batcher.wire import HEARTBEAT, Frame

from .checker import Browser, Connection, Facts, Got, Sent, Violation, judge, judge_publishing
from .fault_proxy import FaultProxy, Faults
from .sse_parser import ServerEvent

PATIENCE = 30.0

# -- the judge ---------------------------------------------------------------------------------------------------------

SENT = [
    Sent("e-1", "a", (("t", 1),)),
    Sent("e-2", "b", (("t", 2),)),
    Sent("e-3", "a", (("t", 3), ("t", 4), ("t", 5))),
    Sent("e-4", "*", (("u", 6),)),
    Sent("e-5", "a", (("t", 7),), lost=True),
    Sent("e-6", "a", (("t", 8),)),
]
ALL = len(SENT)


def block(event: str, id: str, data: Any = None, sent: int = ALL, gone: int = 0) -> Got:
    return Got(ServerEvent(event, json.dumps(data), id), sent, gone)


ONE = block("t", "e-1", 1)
THREE = block("t_batch", "e-3", {"events": [3, 4, 5]})
FOUR = block("u", "e-4", 6)
SIX = block("t", "e-6", 8)
GAP = block("sse_gap", "e-5")
PARTS = [block("t", "e-3.1", 3), block("t", "e-3.2", 4), block("t", "e-3", 5)]


def opened(id: str, *got: Got, **more: Any) -> Connection:
    return Connection(("a",), got=[block("sse_open", id), *got], **more)


def verdict(*life: Connection) -> str | None:
    try:
        judge("e-0", SENT, life)
    except Violation as violation:
        return violation.kind
    return None


@pytest.mark.parametrize(
    "life",
    [
        [opened("e-0", ONE, THREE, FOUR, GAP, SIX, drained=6)],
        [opened("e-0", ONE, block("sse_bye", "e-1")), opened("e-1", THREE, asked="e-1")],
        [opened("e-0", ONE, THREE), opened("e-1", THREE, FOUR, asked="e-1")],
        [opened("e-1", *PARTS, FOUR, batches=False, drained=4)],
        [opened("e-1", PARTS[0], batches=False), opened("e-3.1", *PARTS[1:], FOUR, asked="e-3.1", drained=4)],
        [opened("e-0", ONE), Connection(("a",), "e-1", got=[block("sse_gap", "e-4", gone=3)], drained=4)],
        [Connection(("a",), "other-7", got=[block("sse_gap", "e-4")])],
        [opened("e-0", ONE), Connection(("a",), "e-1", got=[block("sse_busy", "e-1")])],
        [Connection(("a",))],
    ],
    ids=["whole", "returns", "rewinds", "no batches", "inside a batch", "gap", "another history", "busy", "nothing"],
)
def test_a_good_record_is_accepted(life: list[Connection]) -> None:
    assert verdict(*life) is None


@pytest.mark.parametrize(
    ("kind", "life"),
    [
        ("loss", [opened("e-0", THREE)]),
        ("loss", [opened("e-0", ONE, THREE, FOUR, SIX)]),
        ("loss", [opened("e-0", ONE, drained=3)]),
        ("loss", [opened("e-0", ONE, drained=1), opened("e-1", FOUR, asked="e-1")]),
        ("loss", [opened("e-1", PARTS[0], PARTS[2], batches=False)]),
        ("loss", [opened("e-1", *PARTS[1:], batches=False)]),
        ("duplicate", [opened("e-0", ONE, ONE)]),
        ("duplicate", [opened("e-0", ONE), opened("e-1", ONE, asked="e-1")]),
        ("duplicate", [opened("e-1", PARTS[0], PARTS[0], batches=False)]),
        ("duplicate", [opened("e-0", ONE), opened("e-1", THREE, GAP, THREE, asked="e-1")]),
        ("order", [opened("e-0", THREE, ONE)]),
        ("order", [opened("e-0", ONE, FOUR, THREE)]),
        ("channel", [opened("e-0", ONE, block("t", "e-2", 2))]),
        ("cursor", [opened("e-0", ONE), opened("e-3", asked="e-1")]),
        ("cursor", [Connection(("a",), got=[block("sse_open", "e-4", sent=3)])]),
        ("cursor", [opened("e-0", ONE, block("sse_bye", "e-3"))]),
        ("cursor", [opened("e-0", ONE, THREE, FOUR, block("sse_gap", "e-3", gone=6))]),
        ("cursor", [opened("e-0", ONE), opened("e-3", asked="e-3")]),
        ("cursor", [opened("f-0")]),
        ("false gap", [opened("e-0", ONE, block("sse_gap", "e-4", sent=4, gone=1))]),
        ("false gap", [Connection(("a",), got=[GAP])]),
        ("false gap", [opened("e-0", ONE), Connection(("b",), "e-1", got=[block("sse_gap", "e-4", gone=1)])]),
        ("content", [opened("e-0", block("t", "e-1", 10))]),
        ("content", [opened("e-0", ONE, block("t_batch", "e-3", {"events": [3, 4]}))]),
        ("content", [opened("e-0", block("t", "e-9", 1))]),
        ("content", [opened("e-0", block("sse_bye", "e-0"), ONE)]),
        ("content", [Connection(("a",), got=[ONE])]),
        ("content", [opened("e-0", block("sse_open", "e-0"))]),
    ],
)
def test_a_record_of_a_broken_promise_is_rejected(kind: str, life: list[Connection]) -> None:
    assert verdict(*life) == kind


def test_what_was_published_has_to_be_in_the_frames_once_and_in_order() -> None:
    judge_publishing([("a", "t", [1, 3, 4, 5, 7, 8]), ("b", "t", [2]), ("a", "t", [3, 8])], SENT)
    for wrong in ([3, 1], [1, 3, 4, 5, 6], [1, 9]):
        with pytest.raises(Violation, match="publishing"):
            judge_publishing([("a", "t", wrong)], SENT)


def test_a_block_that_is_cut_anywhere_is_none_and_leaves_the_cursor_alone() -> None:
    data = b"event: t\ndata: 1\nid: e-1\n\nevent: t\ndata: 2\nid: e-2\n\n"
    for end in range(len(data)):
        browser = Browser(("a",), lambda: (0, 0))
        browser.connect()
        browser.feed(data[:end])
        complete = data[:end].count(b"\n\n")
        assert len(browser.life[0].got) == complete
        assert browser.connect() == (None, "e-1")[complete]


# -- what was sent -----------------------------------------------------------------------------------------------------


class Record:
    """Stands between backend and hub, and writes down what goes through. Called by one thread at a time."""

    def __init__(self, history: HistoryOptions) -> None:
        self.sent: list[Sent] = []
        self.fail = False
        self._room = history.history_frames
        self._kept: list[int] = []  # the numbers of the frames that were not lost
        self._last: Frame | None = None
        self._receiver: Receiver | None = None

    def facts(self) -> Facts:
        """See `tests.checker.Facts`."""
        gone = self._kept[-self._room - 1] if len(self._kept) > self._room else 0
        return len(self.sent), gone

    def stand_before(self, receiver: Receiver) -> Record:
        self._receiver = receiver
        return self

    def deliver(self, frame: Frame) -> None:
        events = tuple((event.type, event.data) for event in frame.batch.events)
        self.sent.append(Sent(frame.id, frame.batch.channel, events, lost=self.fail))
        if self.fail:
            raise OSError("lost on purpose")
        self._kept.append(len(self.sent))
        assert self._receiver is not None
        self._receiver.deliver(frame)

    def lose(self, channel: str, position: Any) -> None:
        assert self._receiver is not None
        self._receiver.lose(channel, position)


class RecordedBackend(MemoryBackend):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def connect(self, receiver: Receiver) -> None:
        super().connect(self.record.stand_before(receiver))


# -- one process, every interleaving -----------------------------------------------------------------------------------


class SteppedLock:
    """The hub's lock, in a world of one thread: what is planned happens before it is taken, or after it is let go.

    There, and where a frame is queued, other threads may come in between.
    """

    def __init__(self, between: Callable[[], None]) -> None:
        self._between = between
        self._held = False

    def acquire(self, blocking: bool = True) -> bool:
        if not self._held:
            self._between()
        assert not (self._held and blocking), "a thread waits for itself"
        taken = not self._held
        self._held = True
        return taken

    def release(self) -> None:
        self._held = False
        self._between()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class Viewer:
    """A browser, and the server's end of its connection. What was taken last is still on its way."""

    def __init__(self, hub: Hub, record: Record, channels: tuple[str, ...], between: Callable[[], None]) -> None:
        self.browser = Browser(channels, record.facts)
        self.client: Client | None = None
        self.busy = False  # in its driver's hands
        self.ids: list[str] = []
        self._hub = hub
        self._between = between
        self._on_its_way = b""

    def connect(self, cursor: str | None, batches: bool) -> None:
        self.leave(0)
        asked = self.browser.connect(cursor, batches=batches)
        client = self._hub.connect(self.browser.channels, asked, batches=batches)
        offer = client.offer

        def offer_late(frame: Frame) -> None:
            self._between()
            offer(frame)

        client.offer = offer_late  # type: ignore[method-assign]
        self.client = client

    def take(self, most: int) -> bool:
        """Take so many blocks, or all there are. Whether there may be more."""
        client = self.client
        self.busy = True
        try:
            while client is not None and most > 0:
                self._arrive(len(self._on_its_way))
                data = next(client, b"")
                if data == HEARTBEAT:
                    return False
                if not data:
                    self.leave(0)
                    return False
                self._on_its_way = data
                most -= 1
        finally:
            self.busy = False
        return client is not None

    def leave(self, arrives: int) -> None:
        """The connection ends, after so many bytes of what is on its way."""
        self._arrive(arrives)
        self._on_its_way = b""
        if self.client is not None:
            self.client.close()
        self.client = None

    def _arrive(self, size: int) -> None:
        self.ids += [event.id for event in self.browser.feed(self._on_its_way[:size])]
        self._on_its_way = b""

    @property
    def on_its_way(self) -> int:
        return len(self._on_its_way)


HISTORY = HistoryOptions(history_frames=6)
CHANNELS = st.sampled_from([("a",), ("b",), ("a", "b")])
NUMBERS = st.integers(0, 3)
NAMES = st.sampled_from(["a", "b", "c", "*"])
FRAME = st.tuples(NAMES, st.sampled_from(["t", "u"]), st.integers(1, 3))


class Interleavings(RuleBasedStateMachine):
    """A hub whose frames are published, taken, lost and cut in any order, and in the middle of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.record = Record(HISTORY)
        self.backend = RecordedBackend(self.record)
        self.start = self.backend.format(self.backend.start)
        self.hub = Hub(
            ClientOptions(queue_frames=3, heartbeat=0.001),
            HISTORY,
            self.backend,
            on_connect=lambda client: None,
            on_disconnect=lambda client, reason: None,
        )
        self.hub._lock = SteppedLock(self.between)  # type: ignore[assignment]
        self.backend.connect(self.hub)
        self.viewers: list[Viewer] = []
        self.planned: list[tuple[int, Callable[[], object]]] = []
        self.publishing = False
        self.numbers = count(1)

    def between(self) -> None:
        """A place where another thread may go on."""
        if self.planned:
            places, happen = self.planned.pop()
            if places:
                self.planned.append((places - 1, happen))
            else:
                happen()

    def viewer(self, number: int) -> Viewer:
        return self.viewers[number % len(self.viewers)]

    def do_publish(self, frame: tuple[str, str, int], *, lost: bool = False) -> None:
        if self.publishing:  # one thread at a time
            return
        channel, event_type, size = frame
        events = tuple(Event(event_type, channel, str(next(self.numbers))) for _ in range(size))
        self.publishing, self.record.fail = True, lost
        with suppress(OSError):
            self.backend.publish(Batch(channel, event_type, events, "manual", 0))
        self.publishing = self.record.fail = False

    def do_take(self, viewer: Viewer, most: int) -> None:
        if not viewer.busy:
            viewer.take(most)

    def do_connect(self, viewer: Viewer, batches: bool, back: int) -> None:
        if not viewer.busy:
            ids = viewer.ids[-1 - back :][:1] if back else []
            viewer.connect(ids[0] if ids else None, batches)

    @rule(frames=st.lists(FRAME, min_size=1, max_size=8))
    def publish(self, frames: list[tuple[str, str, int]]) -> None:
        for frame in frames:
            self.do_publish(frame)

    @rule(frame=FRAME)
    def lose(self, frame: tuple[str, str, int]) -> None:
        self.do_publish(frame, lost=True)

    @rule(channels=CHANNELS, batches=st.booleans())
    def come(self, channels: tuple[str, ...], batches: bool) -> None:
        if len(self.viewers) < 4:
            self.viewers.append(Viewer(self.hub, self.record, channels, self.between))
            self.do_connect(self.viewers[-1], batches, 0)

    @precondition(lambda self: self.viewers)
    @rule(number=NUMBERS, batches=st.booleans(), back=st.integers(0, 3))
    def return_(self, number: int, batches: bool, back: int) -> None:
        self.do_connect(self.viewer(number), batches, back)

    @precondition(lambda self: self.viewers)
    @rule(number=NUMBERS, most=st.integers(1, 6))
    def take(self, number: int, most: int) -> None:
        self.do_take(self.viewer(number), most)

    @precondition(lambda self: self.viewers)
    @rule(number=NUMBERS, tenths=st.integers(0, 10))
    def cut(self, number: int, tenths: int) -> None:
        viewer = self.viewer(number)
        viewer.leave(tenths * viewer.on_its_way // 10)

    @precondition(lambda self: self.viewers)
    @rule(number=NUMBERS)
    def end(self, number: int) -> None:
        client = self.viewer(number).client
        if client is not None:
            client.end("kicked")

    @precondition(lambda self: self.viewers and len(self.planned) < 3)
    @rule(places=st.integers(0, 4), what=st.sampled_from(["publish", "take", "return"]), number=NUMBERS, frame=FRAME)
    def plan(self, places: int, what: str, number: int, frame: tuple[str, str, int]) -> None:
        """Let something happen in the middle of what comes next."""
        viewer = self.viewer(number)
        happen: dict[str, Callable[[], object]] = {
            "publish": lambda: self.do_publish(frame),
            "take": lambda: self.do_take(viewer, 4),
            "return": lambda: self.do_connect(viewer, True, 0),
        }
        self.planned.append((places, happen[what]))

    @precondition(lambda self: self.viewers)
    @rule(number=NUMBERS, back=st.integers(0, 3), places=st.integers(0, 4), frame=FRAME, anew=st.booleans())
    def overtake(self, number: int, back: int, places: int, frame: tuple[str, str, int], anew: bool) -> None:
        """Read the history, or return, while the newest frame is on its way to the queues."""
        viewer = self.viewer(number)
        self.do_connect(viewer, True, back)
        self.do_take(viewer, 10 if anew else 1)
        happen = (lambda: self.do_connect(viewer, True, 0)) if anew else (lambda: self.do_take(viewer, 10))
        self.planned.append((places, happen))
        self.do_publish(frame)

    def teardown(self) -> None:
        self.planned.clear()
        for viewer in self.viewers:
            if viewer.client is None:
                viewer.connect(None, True)
            if not self._drain(viewer):  # it was sent away
                viewer.connect(None, True)
                assert self._drain(viewer)
            viewer.browser.life[-1].drained = len(self.record.sent)
            judge(self.start, self.record.sent, viewer.browser.life)
            viewer.leave(0)

    @staticmethod
    def _drain(viewer: Viewer) -> bool:
        """Take all there is. Whether the stream is still open."""
        while viewer.take(100):
            pass
        return viewer.client is not None


class TestInterleavings(Interleavings.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=80, stateful_step_count=30)


# -- real HTTP, through a proxy that mistreats it ----------------------------------------------------------------------

LARGE = HistoryOptions()
SMALL = HistoryOptions(history_frames=12)


class Service:
    """A server on a thread, what was sent by it, and a proxy before it."""

    def __init__(self, history: HistoryOptions, manager: SSEManager, record: Record, proxy: FaultProxy) -> None:
        self.history = history
        self.manager = manager
        self.record = record
        self.proxy = proxy
        self.start = manager.cursor()

    def read(self, browser: Browser, faults: Faults, *, batches: bool = True, patience: float = PATIENCE) -> Reading:
        return Reading(self, browser, faults, batches, patience)


class Reading:
    """One connection of a browser."""

    def __init__(self, service: Service, browser: Browser, faults: Faults, batches: bool, patience: float) -> None:
        self._browser = browser
        self._patience = patience
        self._socket = service.proxy.connect(faults, patience)
        asked = browser.connect(batches=batches)
        query = "&".join([f"channel={channel}" for channel in browser.channels] + ["batch=0"] * (not batches))
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
    monkeypatch: pytest.MonkeyPatch, history: HistoryOptions, batching: BatchOptions
) -> Iterator[Service]:
    record = Record(history)
    monkeypatch.setattr("sse_batcher.manager.open_backend", lambda url: RecordedBackend(record))
    clients = ClientOptions(queue_frames=8, heartbeat=0.1, send_timeout=5.0, retry_ms=1)
    with SSEManager(batching, clients, history=history) as manager:

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ["werkzeug.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            channels = parse_qs(environ["QUERY_STRING"])["channel"]
            status, headers, body = stream(manager, environ, channels)
            start_response(status, headers)
            return body

        with serving(app) as address, FaultProxy(address) as proxy:
            yield Service(history, manager, record, proxy)


@pytest.mark.external
@pytest.mark.parametrize("batches", [True, False], ids=["batches", "no batches"])
@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_stream_that_is_cut_at_any_byte_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, batches: bool, reset: bool
) -> None:
    batching = BatchOptions(batch_window=10, max_batch_size=3)
    with serving_through_faults(monkeypatch, LARGE, batching) as service:
        first = Browser(("a",), service.record.facts)
        with service.read(first, Faults()) as reading:
            next(reading.events())
        for number in range(5):
            service.manager.enqueue("t", number, channel="a")
        assert service.manager.flush_all(PATIENCE)
        frames = len(service.record.sent)
        for cut in count():
            browser = Browser(("a",), service.record.facts)
            browser.life, browser.last_id = list(first.life), first.last_id
            with service.read(browser, Faults(cut_after=cut, reset=reset), batches=batches) as reading:
                for event in reading.events():
                    if event.id == service.record.sent[-1].id:
                        break
                else:
                    event = None  # type: ignore[assignment]
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
        self.published: list[tuple[str, str, list[Any]]] = []
        self.errors: list[BaseException] = []
        self._changed = threading.Condition()  # guards the three below
        self._connections = 0
        self._publishing = self.PUBLISHERS
        self._deadline = time.monotonic() + 3 * PATIENCE

    def run(self) -> None:
        tasks = [lambda n=n: self._publish(n) for n in range(self.PUBLISHERS)]
        tasks += [lambda n=n: self._browse(n) for n in range(self.BROWSERS)]
        threads = [threading.Thread(target=self._guard, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.errors, self.errors

    def _guard(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            self.errors.append(error)
            raise

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, self._deadline - time.monotonic()):
                raise AssertionError(f"not within the time: {what}")

    def _publish(self, number: int) -> None:
        """Bursts, each after the browsers have come back some more times."""
        random = Random(f"{self.seed} publisher {number}")
        lanes: dict[tuple[str, str], list[Any]] = {}
        bursts = 40
        for burst in range(bursts):
            due = burst * self.BROWSERS * self.CONNECTIONS // (2 * bursts)
            self._wait_for(lambda due=due: self._connections >= due, "enough connections")  # type: ignore[misc]
            for _ in range(random.randrange(1, 25)):
                lane = random.choice(["a", "b", "c", "*"]), random.choice(["t", "u"])
                data = {"by": number, "n": len(lanes.setdefault(lane, [])), "pad": "x" * random.randrange(600)}
                lanes[lane].append(data)
                if lane[0] == "*":
                    self.service.manager.broadcast(lane[1], data)
                else:
                    self.service.manager.enqueue(lane[1], data, channel=lane[0])
        assert self.service.manager.flush_all(PATIENCE)
        with self._changed:
            self.published += [(*lane, values) for lane, values in lanes.items()]
            self._publishing -= 1
            if not self._publishing:
                self.service.manager.broadcast("end", "of all")
                assert self.service.manager.flush_all(PATIENCE)
            self._changed.notify_all()

    def _browse(self, number: int) -> None:
        """Come back again and again, and once more at the end, to read all there is."""
        random = Random(f"{self.seed} browser {number}")
        browser = Browser(random.choice([("a",), ("b",), ("a", "b")]), self.service.record.facts)
        self.browsers.append(browser)
        for _ in range(self.CONNECTIONS):
            faults = self._faults(random)
            with self.service.read(browser, faults, batches=random.random() < 0.7, patience=0.3) as reading:
                with self._changed:
                    self._connections += 1
                    self._changed.notify_all()
                    now = self._connections
                stall = random.choice([None, None, random.randrange(3)])
                last = random.randrange(2, 30)
                for taken, _ in enumerate(reading.events()):
                    if taken == stall:  # until others have come and gone, and much was published
                        until = now + self.BROWSERS
                        with self._changed:
                            self._changed.wait_for(lambda until=until: self._connections >= until, 1.0)  # type: ignore[misc]
                    if taken == last:
                        break
        self._wait_for(lambda: not self._publishing, "the end of publishing")
        with self.service.read(browser, Faults()) as reading:
            for event in reading.events():
                if event.id == self.service.record.sent[-1].id:
                    browser.life[-1].drained = len(self.service.record.sent)
                    return
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
def test_publishers_browsers_and_a_bad_network(
    monkeypatch: pytest.MonkeyPatch, history: HistoryOptions, mixed: bool
) -> None:
    batching = BatchOptions(batch_window=0.01, max_batch_size=5, mixed=mixed, dedup_key=None)
    seed = SEED + 2 * mixed + (history is SMALL)
    print(f"seed: {seed}")  # noqa: T201 - for the one who has to do it again
    with serving_through_faults(monkeypatch, history, batching) as service:
        chaos = Chaos(service, seed)
        chaos.run()
        stats = service.manager.get_stats()
    judge_publishing(chaos.published, service.record.sent)
    counts: Counter[str] = Counter()
    for browser in chaos.browsers:
        counts += judge(service.start, service.record.sent, browser.life)
    assert stats.overflows > 0, "no client was slow"
    assert (counts["sse_gap"] > 0) == (history is SMALL)
    assert counts["sse_open"] > chaos.BROWSERS


SEED = 4
