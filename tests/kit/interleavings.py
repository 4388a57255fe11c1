"""Hubs and their viewers whose threads take turns: a state machine that draws what happens, and in which order."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, takewhile
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from sse_batcher import Client, ClientOptions, HistoryOptions, Text
from sse_batcher.backends.memory import MemoryBackend
from sse_batcher.event import Audience, Batch, Event, User
from sse_batcher.streams.hub import Hub
from sse_batcher.streams.opening import StreamRequest
from sse_batcher.streams.roles import Cursors
from sse_batcher.wire import HEARTBEAT

from .checker import Browser, Violation, judge
from .record import Record
from .turns import SteppedLock, SteppedQueue, Turns


class SteppedViewer:
    """A browser, and the server's end of its connection. What was taken last is still on its way."""

    def __init__(
        self, hub: Hub, record: Record, channels: tuple[str, ...], user: User | None, *, gzipped: bool = False
    ) -> None:
        self.channels = channels
        self.user = user
        self.gzipped = gzipped
        self._decompress: Callable[[bytes], bytes] = bytes
        self.ids: list[str] = []
        self._hub = hub
        self._record = record
        self._facts = record.facts()
        self._browser = Browser(channels, lambda: self._facts, user)
        self.life = self._browser.life
        self._client: Client | None = None
        self._on_its_way = b""
        self._told: Client | None = None  # the stream that has to end
        self._busy = False  # in the hands of one of the threads

    @property
    def audiences(self) -> list[Audience]:
        """One of its channels, and its user."""
        return [self.channels[0], "*" if self.user is None else (self.user,)]

    def id(self, back: int) -> str | None:
        """The id it had so many blocks ago."""
        return self.ids[-1 - back] if back < len(self.ids) else self._browser.last_id

    def connect(self, cursor: str | None, batches: bool, poll: bool) -> None:
        with self._alone() as alone:
            if alone:
                self._leave(0, 0)
                self.come(cursor, batches, poll)

    def connect_again(self, back: int, batches: bool, poll: bool) -> None:
        self.connect(self.id(back), batches, poll)

    def come(self, cursor: str | None, batches: bool, poll: bool) -> None:
        asked = self._browser.connect(cursor, batches=batches, poll=poll)
        self._decompress = zlib.decompressobj(wbits=31).decompress if self.gzipped else bytes
        self._client = self._hub.connect(
            StreamRequest(self.channels, asked, batches, user=self.user, poll=poll, gzipped=self.gzipped)
        )

    def stay(self) -> None:
        """Be connected, and have taken all there is."""
        if self._client is None:
            self.connect(None, True, False)
        self.take_all()

    def take(self, most: int) -> None:
        """Take so many blocks, or all there are. A poll that was answered is followed by the next one."""
        with self._alone() as alone:
            while alone and most > 0 and self._client is not None:
                most -= 1
                self._arrive(len(self._on_its_way))
                self._on_its_way = self._decompress(next(self._client, b""))
                self._facts = self._record.facts()
                if self._on_its_way == HEARTBEAT:
                    return
                if not self._on_its_way:
                    self._has_ended()

    def _has_ended(self) -> None:
        """The server has ended the connection, in good order."""
        connection = self.life[-1]
        connection.answered = connection.poll and not self._told_to_end
        self._leave(0, 0)
        if connection.answered:
            self.come(None, connection.batches, poll=True)

    def take_all(self) -> None:
        """Take all there is, while nothing else happens."""
        self.take(2 * len(self._record.sent) + 10)
        if self._client is not None:
            if self._told_to_end:
                raise Violation("end", f"it was told to end, and goes on: {self.life[-1]}")
            if self._on_its_way != HEARTBEAT:
                raise Violation("duplicate", f"there is no end of {self.life[-1]}")
            self._has_all()

    def _has_all(self) -> None:
        connection = self.life[-1]
        connection.drained = len(self._record.sent)
        if connection.poll and len(connection.got) > 1:
            raise Violation("poll", f"it has its answer, and goes on: {connection}")

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
        if self._client is not None:
            self._told = self._client
            end(self._client)

    @property
    def _told_to_end(self) -> bool:
        return self._client is not None and self._client is self._told

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


class Seat(NamedTuple):
    """Whose stream a viewer has, and the hub that it comes to."""

    channels: tuple[str, ...]
    user: User | None
    hub: int = 0


QUEUE = 3


HISTORY = HistoryOptions(history_frames=6)


NUMBERS = st.integers(0, 3)


BLOCKS = st.integers(0, 3)


AUDIENCES: list[Audience] = ["a", "b", "*", "z", (7,), (7, 8), (9,)]
"""Some frames are for users, and some for no viewer."""


POLLS = st.sampled_from([False, False, True])
"""A third of the connections are polls."""


FRAME = (
    st.sampled_from(AUDIENCES),
    st.sampled_from(["t", "u"]),
    st.integers(1, 3),
    st.sampled_from([False, False, True]),
)
"""Its audience, type and size, and whether it is of texts, as a third of all frames are."""


THING = st.one_of(
    st.tuples(st.just("publish"), *FRAME),
    st.tuples(st.just("lose"), *FRAME),
    st.tuples(st.just("take"), st.sampled_from([1, 2, 100])),
    st.tuples(st.just("return"), BLOCKS, st.booleans(), POLLS),
    st.tuples(st.just("cut"), BLOCKS, BLOCKS),
    st.tuples(st.just("end")),
    st.tuples(st.just("kick")),
)


MEANWHILE = [
    ("take", 100),
    ("return", 0, True, False),
    ("return", 2, False, True),
    ("end",),
    ("kick",),
    ("lose", "a", "t", 1, False),
    ("publish", (7,), "t", 1, True),
]


WAITING = [0, QUEUE, QUEUE + 1, 2 * QUEUE + 2]
"""Frames for a viewer that is at the head, has a full queue, is behind, is too far behind."""


class Interleavings(RuleBasedStateMachine):
    """Two hubs of one backend and three viewers: what happens to them, one thing after the other, and at once."""

    VIEWERS: tuple[Seat, ...] = (Seat(("a",), 7), Seat(("b",), 8), Seat(("a", "b"), 7, hub=1))
    COMPRESS: tuple[str, ...] = ()
    """The option `compress`. Viewers ask for gzip."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()
        self.patch = pytest.MonkeyPatch()
        self.record = Record(HISTORY)
        self.backend = MemoryBackend()
        self.backend.connect(self.record)
        self.publisher = SteppedLock(self.turns)  # a backend delivers one frame at a time
        self.numbers = count(1)
        self.start = self.backend.format(self.backend.start)
        self.hubs = [self.make_hub(number) for number in range(2)]
        self.record.stand_before(*self.hubs)
        self.viewers: Sequence[SteppedViewer] = [self.viewer(seat) for seat in self.VIEWERS]
        self.others: list[Callable[[], None]] = []  # what goes on at the same time, whatever happens

    def make_hub(self, number: int) -> Hub:
        """Make the hub of one process. All have the positions of one backend."""
        return Hub(
            ClientOptions(queue_frames=QUEUE, compress=self.COMPRESS),
            HISTORY,
            self.cursors_of(number),
            on_connect=lambda client: None,
            on_disconnect=lambda client, farewell: None,
            lock=SteppedLock(self.turns),  # type: ignore[arg-type]
            make_queue=lambda: SteppedQueue(self.turns),  # type: ignore[arg-type,return-value]
        )

    def cursors_of(self, number: int) -> Cursors:
        return self.backend

    def viewer(self, seat: Seat) -> SteppedViewer:
        hub, gzipped = self.hubs[seat.hub], self.compresses(seat)
        return SteppedViewer(hub, self.record, seat.channels, seat.user, gzipped=gzipped)

    def compresses(self, seat: Seat) -> bool:
        return seat.user is None and {*self.COMPRESS}.issuperset(seat.channels)

    def publish(self, audience: Audience, event_type: str, size: int, texts: bool, *, lost: bool = False) -> None:
        with self.publisher:
            numbers = [next(self.numbers) for _ in range(size)]
            bodies = [Text(f"row {number} \N{PARTY POPPER}\n") if texts else str(number) for number in numbers]
            events = tuple(Event(event_type, audience, body) for body in bodies)
            self.record.fail = lost
            with suppress(OSError):
                self.backend.publish(Batch(audience, event_type, events, "manual", 0, "--" if texts else None))

    def lose(self, audience: Audience, event_type: str, size: int, texts: bool) -> None:
        self.publish(audience, event_type, size, texts, lost=True)

    def bury(self, id: str | None, over: int) -> None:
        """Publish so much that the frame of this id is only just in the history, or only just out of it."""
        frame = (id or self.start).partition(".")[0]
        newer = [*takewhile(lambda sent: sent.id != frame, reversed(self.record.sent))]
        own = [sent for sent in self.record.sent if sent.id == frame]
        audience: Audience = "z" if not own or isinstance(own[0].audience, str) else (9,)
        kept = [isinstance(sent.audience, str) == isinstance(audience, str) for sent in newer if not sent.lost]
        for _ in range(HISTORY.history_frames - kept.count(True) - 1 + over):
            self.publish(audience, "t", 1, False)

    def work(self, number: int, thing: tuple[Any, ...]) -> Callable[[], None]:
        viewer = self.viewers[number % len(self.viewers)]
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
        for_user=st.booleans(),
        poll=POLLS,
    )
    def at_once(
        self,
        number: int,
        waiting: int,
        things: Sequence[tuple[Any, ...]],
        first: bool,
        turns: Sequence[int],
        for_user: bool = False,
        poll: bool = False,
    ) -> None:
        """Something happens to a viewer while a frame is published, which comes first or last."""
        viewer = self.viewers[number % len(self.viewers)]
        viewer.connect(None, True, poll)
        viewer.take_all()
        publish = ("publish", viewer.audiences[for_user], "t", 1, False)
        for _ in range(waiting):
            self.work(number, publish)()
        works = [self.work(number, thing) for thing in ([publish, *things] if first else [*things, publish])]
        self.turns.run([*works, *self.others], turns)
        viewer.take_all()

    @rule(
        frames=st.lists(
            st.sampled_from(["publish", "publish", "lose"]).flatmap(lambda name: st.tuples(st.just(name), *FRAME)),
            min_size=2,
            max_size=5,
        ),
        turns=st.lists(st.sampled_from([0, 0, *range(1, 10), 100, 100]), max_size=16),
    )
    def burst(self, frames: Sequence[tuple[Any, ...]], turns: Sequence[int]) -> None:
        """Frames come one after the other while all viewers are there, and are sent some of them meanwhile."""
        for viewer in self.viewers:
            viewer.stay()
        first, *rest = (self.work(0, frame) for frame in frames)
        self.turns.run([first, *self.others, *rest], turns)
        for viewer in self.viewers:
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
        for_user=st.booleans(),
        texts=st.booleans(),
        poll=POLLS,
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
        for_user: bool,
        texts: bool,
        poll: bool,
    ) -> None:
        """A viewer is cut off, maybe inside a frame, misses frames, some of which are lost, and returns.

        Its place comes to the edge of the history before that, or after it has taken some blocks.
        """
        viewer = self.viewers[number % len(self.viewers)]
        own = viewer.audiences
        if size:
            viewer.connect(None, False, poll)
            viewer.take_all()
            self.publish(own[for_user], "t", size, texts)
            viewer.take(1)
        viewer.cut(blocks, more)
        id = viewer.id(back)
        for lost in missed:
            self.publish(own[not for_user], "t", 1, texts, lost=lost)
        if taken:
            viewer.connect(id, batches, poll)
            viewer.take(taken)
        if over is not None:
            self.bury(id, over)
        if not taken:
            viewer.connect(id, batches, poll)
        viewer.take_all()

    def teardown(self) -> None:
        try:
            for viewer in [] if self.turns.failed else self.viewers:
                viewer.take_all()
                viewer.connect(None, True, False)
                viewer.take_all()
                judge(self.start, self.record.sent, viewer.life)
            if not self.turns.failed:
                self.leave_all()
        finally:
            self.patch.undo()

    def leave_all(self) -> None:
        for viewer in self.viewers:
            viewer.cut(0, 0)
