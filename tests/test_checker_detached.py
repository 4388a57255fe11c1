"""Nothing is lost silently on detached streams: as `test_checker_interleavings`, with the loop as one more thread.

The network is ours: a connection has room for a few hundred bytes, so that frames are cut in the middle all the time.
"""

from __future__ import annotations

import os
import re
import select
import socket
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import product
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import Phase, settings

from sse_batcher.backends.memory import MemoryBackend
from sse_batcher.event import BROADCAST, Audience, Batch, User
from sse_batcher.reasons import GapReason
from sse_batcher.streams.history import ResumePoint, Slice
from sse_batcher.streams.hub import Hub
from sse_batcher.streams.roles import Cursors
from sse_batcher.transports.detached import feed as feeds
from sse_batcher.transports.detached.feed import Feed
from sse_batcher.transports.detached.loop import Adoption
from sse_batcher.transports.detached.takeover import Taken
from sse_batcher.wire import LAST_CHUNK, Frame, Position, chunk

from .kit.checker import Facts, Violation
from .kit.interleavings import MEANWHILE, WAITING, Interleavings, Seat, SteppedViewer
from .kit.record import Record
from .kit.site import SteppedLoop
from .kit.turns import Turns

USED = {"group": ("send", "sized", "taken"), "connection": ("send_to", "hang_up"), "loop": ("hang_up",)}
"""Of `sending`, by which module."""

ROOM = 150
"""Bytes that a connection takes before it is full."""


class Pipe:
    """A connection, as both ends know it: what is on its way, and what was known when it was sent."""

    def __init__(self) -> None:
        self.parts: list[tuple[bytes, Facts]] = []
        self.left = False  # the client
        self.closed = False  # by the server

    @property
    def on_its_way(self) -> bytes:
        return b"".join(data for data, _ in self.parts)

    @property
    def room(self) -> int:
        return max(0, ROOM - len(self.on_its_way))


class Network:
    """What the loop asks of the system: sockets, and an epoll of them."""

    FULL, GONE = -1, -2

    def __init__(self, turns: Turns, facts: Callable[[], Facts]) -> None:
        self._turns = turns
        self._facts = facts
        self._pipes: dict[int, Pipe] = {}
        self._watched: dict[int, int] = {}

    def open(self) -> tuple[int, Pipe]:
        """Make a connection. Its number is that of a real one, which stays open, so that no number is used twice."""
        fd, pipe = socket.socket(socket.AF_UNIX).detach(), Pipe()
        self._pipes[fd] = pipe
        return fd, pipe

    def send(self, fd: int, data: bytes, size: int, flags: int) -> int:
        self._turns.place()
        pipe = self._pipes[fd]
        assert size == len(data)
        assert not pipe.closed
        if pipe.left:
            return self.GONE
        part = data[: pipe.room]
        pipe.parts.append((part, self._facts()))
        return len(part) if part or not data else self.FULL

    def send_to(self, fd: int, data: bytes) -> int | None:
        return self.taken(self.send(fd, data, len(data), 0))

    def sized(self, size: int) -> int:
        return size

    def taken(self, sent: int) -> int | None:
        return {self.FULL: 0, self.GONE: None}.get(sent, sent)

    def hang_up(self, fd: int) -> None:
        assert not self._pipes[fd].closed
        self._pipes[fd].closed = True

    def register(self, fd: int, events: int) -> None:
        if fd in self._pipes:  # not the loop's bell: here the loop never waits
            self._watched[fd] = events

    modify = register

    def unregister(self, fd: int) -> None:
        del self._watched[fd]

    def close(self) -> None:
        for fd in self._pipes:
            with suppress(OSError):  # the loop has closed it, after a violation
                os.close(fd)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self._turns.place()
        happened = []
        for fd, events in self._watched.items():
            pipe = self._pipes[fd]
            left = select.EPOLLRDHUP if pipe.left else 0
            happened.append((fd, left | (events & select.EPOLLOUT if pipe.room else 0)))
        return [(fd, events) for fd, events in happened if events]


class InterleavedLoop(SteppedLoop):
    """A loop that the machine steps, and that gives others their turn after each send."""

    def __init__(self, network: Network) -> None:
        super().__init__(lambda: 0.0, epoll=network, sends_per_turn=1, turn_seconds=0)
        self._steps = self._replays = False

    def run(self) -> None:
        """Until there is nothing left to do. By one thread at a time, as a loop is."""
        if not self._steps:
            self._steps = True
            try:
                while self.is_busy or self.epoll.poll(0) or self.replays():
                    self.turn(0)
            finally:
                self._steps = False

    def replays(self) -> bool:
        """Let the thread that replays have its turn, which is another one. Whether anything came of it."""
        if not self._replays:
            self._replays = True
            try:
                super().replays()
            finally:
                self._replays = False
        return self.is_busy


class DetachedViewer(SteppedViewer):
    """As the other, at the end of a connection that has little room."""

    def __init__(
        self,
        hub: Hub,
        record: Record,
        seat: Seat,
        loop: InterleavedLoop,
        network: Network,
        *,
        chunked: bool,
        gzipped: bool = False,
    ) -> None:
        super().__init__(hub, record, seat.channels, seat.user, gzipped=gzipped)
        self._loop = loop
        self._network = network
        self._chunked = chunked
        self._chunks = b""
        self._is_complete = False
        self._pipe: Pipe | None = None

    def come(self, cursor: str | None, batches: bool, poll: bool) -> None:
        super().come(cursor, batches, poll)
        client = self._client
        assert client is not None
        fd, self._pipe = self._network.open()
        first = next(client)
        unsent = chunk(first) if self._chunked else first
        if client.farewell is None:
            taken = Taken(fd, unsent, self._chunked)
            self._loop.adopt(Adoption(self._hub, SimpleNamespace(drain=None), client, taken, SERVER))
        else:  # a poll that was answered at once: the server sends that
            self._pipe.parts.append((unsent + LAST_CHUNK * self._chunked, self._record.facts()))
            self._pipe.closed = True
            client.close()

    def take(self, most: int) -> None:
        with self._alone() as alone:
            while alone and most > 0 and self._pipe is not None:
                most -= 1
                self._loop.run()
                ends = [match.end() for match in re.finditer(b"\n\n(\r\n)?", self._pipe.on_its_way)]
                self._arrive(ends[0] if ends else ROOM)
                self._loop.run()
                if not self._pipe.on_its_way:
                    if not self._pipe.closed:
                        return
                    self._check_end()
                    self._has_ended()

    def _check_end(self) -> None:
        if not (self._told_to_end or self.life[-1].poll):
            raise Violation("end", f"nobody told it to: {self.life[-1]}")
        if self._chunked and not self._is_complete:
            raise Violation("end", f"the response was cut off: {self.life[-1]}")

    def take_all(self) -> None:
        self.take(100 * len(self._record.sent) + 100)
        if self._pipe is not None:
            if self._told_to_end:
                raise Violation("end", f"it was told to end, and goes on: {self.life[-1]}")
            if self._pipe.on_its_way:
                raise Violation("duplicate", f"there is no end of {self.life[-1]}")
            self._has_all()

    def end(self) -> None:
        self.kick()  # one that is detached ends with all others, or so

    def _leave(self, blocks: int, more: int) -> None:
        if self._pipe is not None:
            ends = [0] + [match.end() for match in re.finditer(b"\n\n", self._pipe.on_its_way)]
            # In a compressed stream, ends of blocks cannot be seen: it is cut at any byte.
            self._arrive(17 * blocks + more if self.gzipped else ends[min(blocks, len(ends) - 1)] + more)
            self._pipe.left = True
        self._client = self._pipe = None
        self._chunks = b""
        self._is_complete = False

    def _arrive(self, size: int) -> None:
        assert self._pipe is not None
        while size > 0 and self._pipe.parts:
            data, self._facts = self._pipe.parts.pop(0)
            if len(data) > size:
                self._pipe.parts.insert(0, (data[size:], self._facts))
            text = self._dechunk(data[:size]) if self._chunked else data[:size]
            self.ids += [event.id for event in self._browser.feed(self._decompress(text))]
            size -= len(data)

    def _dechunk(self, data: bytes) -> bytes:
        self._chunks += data
        text = b""
        while match := re.match(rb"([0-9a-f]+)\r\n", self._chunks):
            end = match.end() + int(match[1], 16)
            if len(self._chunks) < end + 2:
                break
            self._is_complete = end == match.end()
            assert self._chunks[end : end + 2] == b"\r\n"
            text += self._chunks[match.end() : end]
            self._chunks = self._chunks[end + 2 :]
        return text


def stepped(turns: Turns) -> Callable[[Any, str, Any], None]:
    """A `__setattr__`: before an attribute is written, another thread may come in."""

    def write(owner: Any, name: str, value: Any) -> None:
        turns.place()
        object.__setattr__(owner, name, value)

    return write


SERVER: Any = SimpleNamespace(is_stopping=lambda: False)


class DetachedInterleavings(Interleavings):
    """The same hubs, viewers at the loop's connections, and the loop. Three of them are in one group."""

    VIEWERS = (Seat(("a",), 7), Seat(("a",), 8), Seat(("a", "b"), 7, hub=1), Seat(("a",), None))

    def __init__(self) -> None:
        super().__init__()
        self.others = [self.loop.run]

    def viewer(self, seat: Seat) -> SteppedViewer:
        if not hasattr(self, "loop"):
            self.network = Network(self.turns, self.record.facts)
            self.loop = InterleavedLoop(self.network)
            for module, names in USED.items():
                for name in names:
                    self.patch.setattr(f"sse_batcher.transports.detached.{module}.{name}", getattr(self.network, name))
            self.patch.setattr(Feed, "__setattr__", stepped(self.turns))
        chunked, gzipped = "b" in seat.channels, self.compresses(seat)
        return DetachedViewer(
            self.hubs[seat.hub], self.record, seat, self.loop, self.network, chunked=chunked, gzipped=gzipped
        )

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.loop.let_go()

    def leave_all(self) -> None:
        super().leave_all()
        self.loop.run()
        assert (len(self.loop), self.loop.feeds) == (0, {})
        assert all(hub.is_empty() for hub in self.hubs)


class SteppedNotes(dict[Any, None]):
    """A dictionary: before a value is added or removed, another thread may come in."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def __setitem__(self, key: Any, value: None) -> None:
        self._turns.place()
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self._turns.place()
        super().__delitem__(key)


class RareInterleavings(DetachedInterleavings):
    """Streams that read some of their channels alone; others have the same channels from their group."""

    VIEWERS = (Seat(("a",), 7), Seat(("a", "b"), 8), Seat(("a", "b"), None), Seat(("b",), 7))

    def __init__(self) -> None:
        super().__init__()
        self.patch.setattr(feeds, "MAX_GROUPS_OF_RARE_CHANNELS", 0)
        self.patch.setattr(feeds, "COMMON_READERS", 2)
        init, turns = Feed.__init__, self.turns

        def init_with_notes(feed: Feed, *args: Any) -> None:
            init(feed, *args)
            feed.noted = SteppedNotes(turns)

        self.patch.setattr(Feed, "__init__", init_with_notes)


class Archive(MemoryBackend):
    """What one hub knows of positions, and a backend that still has what the hub's history has not."""

    def __init__(self, backend: MemoryBackend, turns: Turns) -> None:
        super().__init__()
        self.format, self.parse = backend.format, backend.parse  # type: ignore[method-assign]
        self._turns = turns
        self._kept: list[tuple[Position, Batch | None]] = []

    def keep(self, hub: Hub, patch: pytest.MonkeyPatch) -> None:
        """Keep what is delivered to this hub; of what was lost, that it was."""
        deliver, lose = hub.deliver, hub.lose

        def keep(frame: Frame) -> None:
            self._kept.append((frame.position, frame.batch))
            deliver(frame)

        def keep_nothing(audience: Audience, position: Position, reason: GapReason = "publish_failed") -> None:
            self._kept.append((position, None))
            lose(audience, position, reason)

        patch.setattr(hub, "deliver", keep)
        patch.setattr(hub, "lose", keep_nothing)

    def replay(self, channels: Iterable[str], point: ResumePoint, user: User | None) -> Slice | None:
        self._turns.place()
        asked = {*channels, BROADCAST}
        first = bisect_left if point.part else bisect_right
        rest = self._kept[first(self._kept, point.position, key=itemgetter(0)) :]
        frames = []
        for position, batch in rest[:3]:
            if batch is None:
                return None
            if batch.channel in asked or user in batch.users:
                frames.append(Frame(batch, position, self.format(position)))
        self._turns.place()
        return Slice(frames, position)


class ReplayedInterleavings(DetachedInterleavings):
    """As `DetachedInterleavings`, with a backend that still has what the history has not, except what was lost."""

    def __init__(self) -> None:
        super().__init__()
        for archive, hub in zip(self.archives, self.hubs, strict=True):
            archive.keep(hub, self.patch)
        self.others.append(self.loop.replays)

    def cursors_of(self, number: int) -> Cursors:
        if not hasattr(self, "archives"):
            self.archives: list[Archive] = []
        self.archives.append(Archive(self.backend, self.turns))
        return self.archives[-1]


def test_of_all_interleavings_with_one_switch_none_breaks_the_promise() -> None:
    for waiting, thing, turns in product(
        WAITING,
        MEANWHILE,
        [*([n] for n in range(16)), *([100, 0, n] for n in range(16)), *([100, n] for n in range(16))],
    ):
        for number, kind in enumerate((DetachedInterleavings, ReplayedInterleavings)):
            poll = (turns[-1] + number) % 2 == 1
            machine = kind()
            try:
                machine.at_once(0, waiting, [thing], True, turns, for_user=poll)
                machine.at_once(2, waiting, [thing], False, turns, not poll, poll)
            except Violation as violation:
                raise AssertionError(f"at_once(0, {waiting}, {[thing]}, ..., {turns})") from violation
            finally:
                machine.teardown()


@pytest.mark.parametrize("kind", [DetachedInterleavings, RareInterleavings, ReplayedInterleavings])
def test_of_all_moments_at_which_a_frame_for_a_user_comes_none_breaks_the_promise(
    kind: type[DetachedInterleavings],
) -> None:
    """Its group is busy with the first frame, and knows of the second, or not, when it comes before the fourth."""
    frames = [("publish", audience, "t", 1, False) for audience in ("a", "a", "a")]
    for name, before, meanwhile in product(("publish", "lose"), range(10, 20), range(0, 25, 2)):
        machine = kind()
        own = (name, (7,), "t", 1, True)
        replays = [0] * (len(machine.others) - 1)
        turns = [100, before, *replays, 100, 0, 0, meanwhile, *replays, 100, 100]
        try:
            machine.burst([*frames[:2], own, frames[2]], turns)
        except Violation as violation:
            raise AssertionError(f"burst(..., {turns})") from violation
        finally:
            machine.teardown()


SEARCH = settings(
    max_examples=320,
    stateful_step_count=12,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.reuse, Phase.generate, Phase.shrink],
)


@pytest.mark.timeout(180)  # to find a small example, if there is one
class TestDetachedInterleavings(DetachedInterleavings.TestCase):  # type: ignore[misc, valid-type]
    settings = SEARCH


@pytest.mark.timeout(180)
class TestRareInterleavings(RareInterleavings.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(SEARCH, max_examples=150)


@pytest.mark.timeout(180)
class TestReplayedInterleavings(ReplayedInterleavings.TestCase):  # type: ignore[misc, valid-type]
    settings = SEARCH


class CompressedInterleavings(ReplayedInterleavings):
    """The same with compressed streams, beside one that is not. Broadcasts are compressed, too."""

    VIEWERS = (Seat(("a",), None), Seat(("a",), None), Seat(("a", "b"), None, hub=1), Seat(("a",), 7))
    COMPRESS = ("a", "b", "*")


@pytest.mark.timeout(180)
class TestCompressedInterleavings(CompressedInterleavings.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(SEARCH, max_examples=60)
