"""A hub and its viewers whose threads take turns: a state machine that draws what happens, and in which order."""

from __future__ import annotations

import queue
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, takewhile
from typing import Any

import greenlet  # type: ignore[import-untyped]
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from sse_batcher import Client, ClientOptions, HistoryOptions
from sse_batcher.event import Batch, Event
from sse_batcher.streams.hub import Hub
from sse_batcher.wire import HEARTBEAT

from .checker import Browser, Violation, judge
from .record import Record, RecordedBackend


class Turns:
    """Threads that take turns, as greenlets: each goes on until it comes to a place where another may come in."""

    def __init__(self) -> None:
        self._places = 0
        self.failed = False

    def place(self) -> None:
        self._places += 1
        if self._places > MOST_PLACES:
            raise Violation("livelock", "a thread waits forever")
        here = greenlet.getcurrent()
        if here.parent is not None and not self.failed:
            here.parent.switch()

    def run(self, works: Iterable[Callable[[], object]], turns: Iterable[int]) -> None:
        """Each goes on for as many places as its turn says, and after the last turn to its end."""
        running = [greenlet.greenlet(work) for work in works]
        places = iter(turns)
        try:
            while running:
                for thread in running:
                    for _ in range(next(places, 100)):
                        if not thread.dead:
                            thread.switch()
                running = [thread for thread in running if not thread.dead]
        finally:
            self.failed = bool(running)  # one of them; the others end where they are
            for thread in running:
                with suppress(Violation):
                    thread.throw()


MOST_PLACES = 10_000
"""More places than all that happens has."""


class SteppedLock:
    """A lock of greenlets. What it is asked for, it answers as `threading.RLock` does."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._owner: Any = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._turns.place()
        while blocking and timeout < 0 and self._owner is not None:
            self._turns.place()
        if self._owner is not None:
            return False
        self._owner = greenlet.getcurrent()
        return True

    def release(self) -> None:
        if not self._is_owned():
            raise RuntimeError("cannot release un-acquired lock")
        self._owner = None
        self._turns.place()

    def _is_owned(self) -> bool:
        return self._owner is greenlet.getcurrent()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class SteppedQueue:
    """Waits for nothing: where it is empty, the time for a heartbeat has come."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._turns.place()
        self._items.append(item)

    def get_nowait(self) -> Any:
        self._turns.place()
        if not self._items:
            raise queue.Empty
        item = self._items.popleft()
        self._turns.place()  # with the item in hand
        return item

    def get(self, *, timeout: float) -> Any:
        return self.get_nowait()

    def qsize(self) -> int:
        return len(self._items)


class SteppedViewer:
    """A browser, and the server's end of its connection. What was taken last is still on its way."""

    def __init__(self, hub: Hub, record: Record, channels: tuple[str, ...]) -> None:
        self.channels = channels
        self.ids: list[str] = []
        self._hub = hub
        self._record = record
        self._facts = record.facts()
        self._browser = Browser(channels, lambda: self._facts)
        self.life = self._browser.life
        self._client: Client | None = None
        self._on_its_way = b""
        self._told_to_end = False
        self._busy = False  # in the hands of one of the threads

    def id(self, back: int) -> str | None:
        """The id it had so many blocks ago."""
        return self.ids[-1 - back] if back < len(self.ids) else self._browser.last_id

    def connect(self, cursor: str | None, batches: bool) -> None:
        with self._alone() as alone:
            if alone:
                self._leave(0, 0)
                asked = self._browser.connect(cursor, batches=batches)
                self._told_to_end = False
                self._client = self._hub.connect(self.channels, asked, batches=batches)

    def connect_again(self, back: int, batches: bool) -> None:
        self.connect(self.id(back), batches)

    def take(self, most: int) -> None:
        """Take so many blocks, or all there are."""
        with self._alone() as alone:
            while alone and most > 0 and self._client is not None:
                most -= 1
                self._arrive(len(self._on_its_way))
                self._on_its_way = next(self._client, b"")
                self._facts = self._record.facts()
                if self._on_its_way == HEARTBEAT:
                    return
                if not self._on_its_way:
                    self._leave(0, 0)

    def take_all(self) -> None:
        """Take all there is, while nothing else happens."""
        self.take(2 * len(self._record.sent) + 10)
        if self._client is not None:
            if self._told_to_end:
                raise Violation("end", f"it was told to end, and goes on: {self.life[-1]}")
            if self._on_its_way != HEARTBEAT:
                raise Violation("duplicate", f"there is no end of {self.life[-1]}")
            self.life[-1].drained = len(self._record.sent)

    def cut(self, blocks: int, more: int) -> None:
        """The connection ends after so many blocks of what is on its way, and so many bytes."""
        with self._alone() as alone:
            if alone:
                self._leave(blocks, more)

    def end(self) -> None:
        self._tell(lambda client: client.end("shutdown"))

    def kick(self) -> None:
        self._tell(lambda client: client.dismiss("kicked"))

    def _tell(self, end: Callable[[Client], None]) -> None:
        client = self._client
        if client is not None:
            end(client)
            self._told_to_end |= client is self._client

    def _leave(self, blocks: int, more: int) -> None:
        ends = [0] + [match.end() for match in re.finditer(b"\n\n", self._on_its_way)]
        self._arrive(ends[min(blocks, len(ends) - 1)] + more)
        if self._client is not None:
            self._client.close()
        self._client = None

    def _arrive(self, size: int) -> None:
        self.ids += [event.id for event in self._browser.feed(self._on_its_way[:size])]
        self._on_its_way = b""

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        alone, self._busy = not self._busy, True
        try:
            yield alone
        finally:
            self._busy = not alone


QUEUE = 3


HISTORY = HistoryOptions(history_frames=6)


NUMBERS = st.integers(0, 2)


BLOCKS = st.integers(0, 3)


FRAME = st.sampled_from(["a", "b", "*", "z"]), st.sampled_from(["t", "u"]), st.integers(1, 3)


THING = st.one_of(
    st.tuples(st.just("publish"), *FRAME),
    st.tuples(st.just("lose"), *FRAME),
    st.tuples(st.just("take"), st.sampled_from([1, 2, 100])),
    st.tuples(st.just("return"), BLOCKS, st.booleans()),
    st.tuples(st.just("cut"), BLOCKS, BLOCKS),
    st.tuples(st.just("end")),
    st.tuples(st.just("kick")),
)


MEANWHILE = [("take", 100), ("return", 0, True), ("return", 2, False), ("end",), ("kick",), ("lose", "a", "t", 1)]


WAITING = [0, QUEUE, QUEUE + 1, 2 * QUEUE + 2]
"""Frames for a viewer that is at the head, has a full queue, is behind, is too far behind."""


class Interleavings(RuleBasedStateMachine):
    """A hub and three viewers: what happens to them, one thing after the other, and at once."""

    CHANNELS: tuple[tuple[str, ...], ...] = (("a",), ("b",), ("a", "b"))

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()
        self.patch = pytest.MonkeyPatch()
        self.record = Record(HISTORY)
        self.backend = RecordedBackend(self.record)
        self.publisher = SteppedLock(self.turns)  # a backend delivers one frame at a time
        self.numbers = count(1)
        self.start = self.backend.format(self.backend.start)
        self.hub = Hub(
            ClientOptions(queue_frames=QUEUE),
            HISTORY,
            self.backend,
            on_connect=lambda client: None,
            on_disconnect=lambda client, farewell: None,
            lock=SteppedLock(self.turns),  # type: ignore[arg-type]
            make_queue=lambda: SteppedQueue(self.turns),  # type: ignore[arg-type,return-value]
        )
        self.backend.connect(self.hub)
        self.viewers: Sequence[SteppedViewer] = [self.viewer(channels) for channels in self.CHANNELS]
        self.others: list[Callable[[], None]] = []  # what goes on at the same time, whatever happens

    def viewer(self, channels: tuple[str, ...]) -> SteppedViewer:
        return SteppedViewer(self.hub, self.record, channels)

    def publish(self, channel: str, event_type: str, size: int, *, lost: bool = False) -> None:
        with self.publisher:
            events = tuple(Event(event_type, channel, str(next(self.numbers))) for _ in range(size))
            self.record.fail = lost
            with suppress(OSError):
                self.backend.publish(Batch(channel, event_type, events, "manual", 0))

    def lose(self, channel: str, event_type: str, size: int) -> None:
        self.publish(channel, event_type, size, lost=True)

    def bury(self, id: str | None, over: int) -> None:
        """Publish so much that the frame of this id is only just in the history, or only just out of it."""
        frame = (id or self.start).partition(".")[0]
        newer = [sent.lost for sent in takewhile(lambda sent: sent.id != frame, reversed(self.record.sent))].count(
            False
        )
        for _ in range(HISTORY.history_frames - newer - 1 + over):
            self.publish("z", "t", 1)

    def work(self, number: int, thing: tuple[Any, ...]) -> Callable[[], None]:
        viewer = self.viewers[number]
        name, *details = thing
        what: dict[str, Callable[..., None]] = {
            "publish": self.publish,
            "lose": self.lose,
            "take": viewer.take,
            "return": viewer.connect_again,
            "cut": viewer.cut,
            "end": viewer.end,
            "kick": viewer.kick,
        }
        return partial(what[name], *details)

    @rule(number=NUMBERS, things=st.lists(THING, min_size=1, max_size=6))
    def one_after_the_other(self, number: int, things: list[tuple[Any, ...]]) -> None:
        for thing in things:
            self.work(number, thing)()

    @rule(
        number=NUMBERS,
        waiting=st.sampled_from(WAITING),
        things=st.lists(st.sampled_from(MEANWHILE), min_size=1, max_size=2),
        first=st.booleans(),
        turns=st.lists(st.sampled_from([*range(10), 100, 100]), max_size=4),
    )
    def at_once(
        self, number: int, waiting: int, things: Sequence[tuple[Any, ...]], first: bool, turns: Sequence[int]
    ) -> None:
        """Something happens to a viewer while a frame is published, which comes first or last."""
        viewer = self.viewers[number]
        viewer.connect(None, True)
        viewer.take_all()
        publish = ("publish", viewer.channels[0], "t", 1)
        for _ in range(waiting):
            self.work(number, publish)()
        works = [self.work(number, thing) for thing in ([publish, *things] if first else [*things, publish])]
        self.turns.run([*works, *self.others], turns)
        viewer.take_all()

    @rule(
        number=NUMBERS,
        size=st.integers(0, 3),
        blocks=BLOCKS,
        more=st.integers(0, 1),
        missed=st.lists(st.booleans(), max_size=3),
        over=st.none() | st.integers(0, 3),
        taken=st.integers(0, 2),
        back=BLOCKS,
        batches=st.booleans(),
    )
    def away(
        self,
        number: int,
        size: int,
        blocks: int,
        more: int,
        missed: Sequence[bool],
        over: int | None,
        taken: int,
        back: int,
        batches: bool,
    ) -> None:
        """A viewer is cut off, maybe inside a frame, misses frames, some of which are lost, and returns.

        Its place comes to the edge of the history before that, or after it has taken some blocks.
        """
        viewer = self.viewers[number]
        if size:
            viewer.connect(None, False)
            viewer.take_all()
            self.publish(viewer.channels[0], "t", size)
            viewer.take(1)
        viewer.cut(blocks, more)
        id = viewer.id(back)
        for lost in missed:
            self.publish(viewer.channels[0], "t", 1, lost=lost)
        if taken:
            viewer.connect(id, batches)
            viewer.take(taken)
        if over is not None:
            self.bury(id, over)
        if not taken:
            viewer.connect(id, batches)
        viewer.take_all()

    def teardown(self) -> None:
        try:
            for viewer in [] if self.turns.failed else self.viewers:
                viewer.take_all()
                viewer.connect(None, True)
                viewer.take_all()
                judge(self.start, self.record.sent, viewer.life)
            if not self.turns.failed:
                self.leave_all()
        finally:
            self.patch.undo()

    def leave_all(self) -> None:
        for viewer in self.viewers:
            viewer.cut(0, 0)
