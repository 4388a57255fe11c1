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
from .sse_parser import ServerEvent, parse

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


ONE, THREE, FOUR, SIX = (
    block("t", "e-1", 1),
    block("t_batch", "e-3", {"events": [3, 4, 5]}),
    *(
        block("u", "e-4", 6),
        block("t", "e-6", 8),
    ),
)
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
        ("cursor", [opened("e-1", ONE), opened("e-3", asked="e-1")]),
        ("cursor", [opened("e-4", sent=3)] if False else [Connection(("a",), got=[block("sse_open", "e-4", sent=3)])]),
        ("cursor", [opened("e-0", ONE, block("sse_bye", "e-3"))]),
        ("cursor", [opened("e-0", ONE, THREE, FOUR, block("sse_gap", "e-3", gone=6))]),
        ("cursor", [opened("e-0", ONE), opened("e-3", asked="e-3")]),
        ("cursor", [opened("f-0")]),
        ("false gap", [opened("e-0", ONE, block("sse_gap", "e-4", sent=4, gone=1))]),
        ("false gap", [Connection(("a",), got=[GAP])]),
        ("false gap", [opened("e-0", ONE), Connection(("b",), "e-1", got=[block("sse_gap", "e-4", gone=1)])]),
        ("content", [opened("e-0", block("t", "e-1", 10))]),
        ("content", [opened("e-0", ONE, block("t_batch", "e-3", {"events": [3, 4]}))]),
        ("content", [opened("e-0", ONE, *PARTS)] if False else [opened("e-0", block("t", "e-9", 1))]),
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
    """The hub's lock, in a world of one thread: what is planned happens right before it is taken, or after it is let go.

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
            ClientOptions(queue_frames=3, heartbeat=1e-6),
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

    @rule(frames=st.lists(FRAME, min_size=1, max_size=4))
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
    @rule(number=NUMBERS, share=st.floats(0, 1))
    def cut(self, number: int, share: float) -> None:
        viewer = self.viewer(number)
        viewer.leave(round(share * viewer.on_its_way))

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
    settings = settings(max_examples=150, stateful_step_count=40, phases=[p for p in __import__("hypothesis").Phase if p.name != "shrink"])
