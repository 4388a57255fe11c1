"""A detached client: a connection that is ours.

Run by the loop's thread alone. From elsewhere comes only `SocketClient.dismiss`, which leaves a note and wakes it.

A connection is *live* while its socket takes all that it is given: it stands where its group stands, and has no place
of its own. If its socket is full it leaves the group in the middle of what was just sent, keeps the rest of the one
frame that was cut, and is *behind*: when its socket takes more, it reads the history from there. Nothing else is kept
for it. If the history no longer has what comes next, it *waits* for a slice from the backend, and sends that.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol

from ...reasons import ByeReason, EndReason, GapReason
from ...streams.client import QueueClient
from ...streams.counts import Counts
from ...streams.history import ResumePoint, Slice
from ...streams.hub import Hub
from ...streams.open_stream import OpenStream
from ...streams.roles import Listener
from ...wire import LAST_CHUNK, Frame, Position, chunk
from ..watcher import sign_of_life
from .sending import hang_up, has_taken_all, send_to
from .takeover import Taken

LEFT: Final = "left"
"""The reason for an end without a word."""

AT_ONCE = 262_144
"""Bytes of a rest that are copied and sent at once, so that it may be long, and be taken little by little."""

LOOKS = 4
"""How often, within its `send_timeout`, it is asked whether a client takes what it is sent."""


class Task(Protocol):
    """What the loop runs in slices."""

    def serve(self) -> Iterator[None]:
        """Do what there is to do, with a pause after each slice."""


class Loop(Protocol):
    """What connections, groups and feeds need of the thread that runs them."""

    clock: Callable[[], float]
    sends: int
    """How many since the others had their turn."""
    kept: dict[SocketClient, int]
    """The bytes that are kept for one client alone, which has not taken them yet. In the order of its last progress."""

    @property
    def turn_is_over(self) -> bool:
        """Whether it is the turn of others."""

    def post(self, item: Task) -> None:
        """Have it served soon. Any thread."""

    def start(self, item: Task, steps: Iterator[None]) -> None:
        """Run these steps of it, up to a pause now and the rest in its turns."""

    def lose(self, item: Task) -> None:
        """In the handler of what it has raised: end what it was at, and no more."""

    def watch(self, connection: SocketClient, *, for_room: bool) -> None:
        """Tell it when its client has left, and, if asked to, when its socket takes more."""

    def keep(self, connection: SocketClient, size: int) -> None:
        """Note how many bytes are kept for this client alone. Closes others if that is too much in all."""

    def forget(self, connection: SocketClient) -> None:
        """It is about to be closed."""


class Feed(Task, Protocol):
    """What connections need of what reads for their group."""

    def replay(self, connection: SocketClient) -> None:
        """Have the connection answered with what only the backend still has."""


class Group(Protocol):
    """What connections need of those that get the same bytes."""

    loop: Loop
    hub: Hub
    counts: Counts
    chunked: bool
    beat: bytes
    """A heartbeat, as its members get it."""
    heartbeat: float
    send_timeout: float
    busy: bool
    """It is sending to its members, with pauses."""
    postponed: list[SocketClient]
    """Who is to be served when it is not."""

    @property
    def feed(self) -> Feed:
        """What reads for it."""

    @property
    def handed(self) -> tuple[int, int]:
        """The frames and bytes that were handed to each that was live all the time."""

    @property
    def lost(self) -> tuple[Position, GapReason] | None:
        """The position of the newest frame of its channels that was lost before it came, and why."""

    def shrink(self) -> None:
        """It has one connection less."""

    def join(self, connection: SocketClient) -> None:
        """This one has everything up to its cursor, and there is nothing after that."""

    def leave(self, connection: SocketClient) -> None:
        """It has a place of its own from here on. Idempotent."""

    def encoded(self, frame: Frame) -> bytes:
        """A frame as its members get it."""

    def framed(self, block: bytes) -> bytes:
        """Any other block as they get it."""

    def tally(self, frames: Sequence[Frame], clients: int) -> None:
        """So many clients were handed these frames."""


class Wait:
    """What a connection waits for: a slice of what only the backend still has."""

    __slots__ = ("answer", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        """Since when it waits, or since its last heartbeat then."""
        self.answer: tuple[Slice | None] | None = None
        """None in it if that is gone for good. By the thread that answers, when all of it is there."""


class SocketClient(OpenStream):
    """One detached client."""

    __slots__ = (
        *("dismissed", "fd", "full_since", "group", "live", "rest"),
        *("_bytes", "_frames", "_next_look", "_seen", "_seen_at", "_slice", "_wait"),
    )

    transport = "detached"
    driver = 0  # none that waits for us to leave is the loop's

    def __init__(self, client: QueueClient, group: Group, taken: Taken) -> None:
        super().__init__(client.info, client.point, client.opened_at, client.lease)
        self.fd = taken.fd
        self.group = group
        self.rest: bytes | memoryview = taken.unsent
        """What has to be sent before anything else: it was begun, or comes first."""
        self.live = False
        self.dismissed: EndReason | None = None
        """Why it ends before anything more is handed out. Any thread."""
        self.full_since: float | None = None
        """Since when its socket is full; None if it is not."""
        self._seen: float | None = None
        self._seen_at = self._next_look = 0.0
        self._slice: Sequence[Frame] = ()
        self._wait: Wait | None = None
        self._frames, self._bytes = client.handed  # while it is live, less what its group had been handed before

    # -- for the hub ---------------------------------------------------------------------------------------------------

    @property
    def listener(self) -> Listener | None:
        return None  # its feed is offered the frames

    @property
    def behind(self) -> bool:
        return not self.live

    @property
    def counts(self) -> Counts:
        return self.group.counts

    @property
    def lost(self) -> tuple[Position, GapReason] | None:
        return self.group.lost

    @property
    def handed(self) -> tuple[int, int]:
        if not self.live:
            return self._frames, self._bytes
        frames, size = self.group.handed
        return self._frames + frames, self._bytes + size

    def dismiss(self, reason: EndReason) -> bool:
        first = self.dismissed is None
        self.dismissed = self.dismissed or reason
        self.group.loop.post(self)
        return first

    def read_on(self, frames: Iterable[Frame]) -> None:
        self._slice = list(frames)

    def go_live(self) -> None:
        """It joins its group right after, on this thread: that is the one that reads for the group, too."""

    # -- for what answers it -------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether an answer is still of use. Any thread: at worst, one is made for nothing."""
        return self._wait is not None and self.dismissed is None and self.fd >= 0

    def answer(self, older: Slice | None) -> None:
        """Bring what it has asked for: the next slice after its cursor, None if that is gone for good. Any thread."""
        wait = self._wait
        if wait is not None:
            wait.answer = (older,)
            self.group.loop.post(self)

    # -- for its group -------------------------------------------------------------------------------------------------

    def count(self, frames: int, size: int) -> None:
        """So much was handed to it."""
        self._frames += frames
        self._bytes += size

    def cut(self, sent: int, pieces: Sequence[bytes]) -> int:
        """Only so many bytes of these were taken. Keep the rest of the one that was cut. Returns how many begun."""
        begun = 0
        while sent >= len(pieces[begun]):
            sent -= len(pieces[begun])
            begun += 1
        if sent:
            self.rest = memoryview(pieces[begun])[sent:]
            begun += 1
        self.wait_for_room()
        return begun

    def wait_for_room(self) -> None:
        if self.full_since is None:
            self.full_since = self.group.loop.clock()
            self.group.loop.watch(self, for_room=True)

    # -- by the loop ---------------------------------------------------------------------------------------------------

    def serve(self) -> Iterator[None]:
        """Do what there is to do, with a pause after each slice."""
        while self._step():
            yield

    def has_room(self) -> None:
        """Its socket takes more."""
        self.full_since = None
        self.group.loop.watch(self, for_room=False)

    def look(self, now: float) -> None:
        """Look at the time. `now` is the loop's, which may have another clock than the hub."""
        if self.fd < 0:
            return  # closed since this round began
        if self.group.hub.clock() >= self.lease:
            self.dismiss("lease")
        if self._wait is not None:
            self._look_while_it_waits(now, self._wait)
        if now >= self._next_look:
            self._next_look = now + self.group.send_timeout / LOOKS
            self._give_up_if_stalled(now)

    def _look_while_it_waits(self, now: float, wait: Wait) -> None:
        closing = self.group.hub.closing
        if closing is not None:
            self.dismiss(closing)  # it gets the rest from another process
        elif now - wait.since >= self.group.heartbeat and not self.rest:
            wait.since = now
            self._say(self.group.beat)

    def _give_up_if_stalled(self, now: float) -> None:
        """As `watcher.Watch` does. Not by TCP_USER_TIMEOUT, which ends who reads slowly, too."""
        try:
            seen = None if has_taken_all(self.fd) else self._sign_of_life()
        except OSError:
            return  # its end, of which the loop is told
        if seen is None or seen != self._seen:
            self._seen, self._seen_at = seen, now
        elif now - self._seen_at >= self.group.send_timeout:
            self.dismissed = LEFT  # whatever was said before: it takes nothing
            self.group.loop.post(self)

    def _sign_of_life(self) -> float | None:
        connection = socket.socket(fileno=self.fd)
        try:
            return sign_of_life(connection, self.full_since)
        finally:
            connection.detach()

    def close(self, reason: EndReason) -> None:
        """Close the connection, and be forgotten. Idempotent."""
        if self.fd < 0:
            return
        self.group.leave(self)
        self.group.loop.forget(self)
        fd, self.fd = self.fd, -1
        hang_up(fd)
        self.rest = b""
        self.group.hub.remove(self, self.farewell or reason)

    def _step(self) -> bool:
        """Whether there is more to do at once."""
        if self.fd < 0 or (self.live and self.dismissed is None):
            return False
        if self.live and self.group.busy:
            self.group.postponed.append(self)  # where it stands is not known before the group has sent to all
            return False
        self.group.leave(self)
        if self.dismissed == LEFT:
            self.close(LEFT)
            return False
        if self.rest and not self._send_rest():
            return False
        if self.farewell is not None:
            self.close(self.farewell)
            return False
        return self._end(self.dismissed) if self.dismissed is not None else self._catch_up()

    def _catch_up(self) -> bool:
        """Send what comes next, ask for it, or go live. Whether there is more to do at once."""
        if self._wait is not None:
            return self._wait.answer is not None and self._take_answer(*self._wait.answer)
        if not self.group.hub.advance(self):
            return self._ask()
        if not self._slice:
            return self._go_on()
        frames, self._slice = self._slice, ()
        return self._send(frames)

    def _go_on(self) -> bool:
        """It has everything: it is live from here on, unless all streams end."""
        group, closing = self.group, self.group.hub.closing
        if closing is not None:
            return self._end(closing)
        group.join(self)
        return False

    def _ask(self) -> bool:
        """Wait for what the history does not have. If all streams end, the client gets that elsewhere."""
        group, closing = self.group, self.group.hub.closing
        if closing is not None:
            return self._end(closing)
        self._wait = Wait(group.loop.clock())
        group.feed.replay(self)
        return False

    def _take_answer(self, older: Slice | None) -> bool:
        self._wait = None
        if older is None:
            return self._say(self.group.framed(self.group.hub.skip(self))) and self._go_on()
        if older.frames:
            return self._send(older.frames, shared=False)
        self.point = ResumePoint(older.position)
        return True

    def _end(self, reason: ByeReason) -> bool:
        """Say goodbye, and close as soon as that is sent."""
        self.farewell = reason
        group = self.group
        block = group.framed(group.hub.control.bye(self.point, reason))
        return self._say(block + LAST_CHUNK if group.chunked else block)

    def _send(self, frames: Sequence[Frame], *, shared: bool = True) -> bool:
        """Send these frames. Whether all of it was taken. `shared`: the history has them, too."""
        group = self.group
        pieces = [group.encoded(frame) for frame in frames]
        if self.point.part and frames[0].position == self.point.position:
            rest = frames[0].rest(self.point.part)
            pieces[0] = chunk(rest) if group.chunked else rest
        data = b"".join(pieces)
        group.loop.sends += 1
        sent = send_to(self.fd, data)
        if sent is None:
            self.close(LEFT)
            return False
        begun = len(pieces) if sent == len(data) else self.cut(sent, pieces)
        if begun:
            self.point = ResumePoint(frames[begun - 1].position)
        handed = sum(map(len, pieces[:begun]))
        self.count(len(frames[:begun]), handed)
        group.counts.bytes += handed
        group.tally(frames[:begun], 1)
        if self.rest and not shared:
            self._tell_what_it_keeps()
        return sent == len(data)

    def _say(self, block: bytes) -> bool:
        """Send a block that is in no history, and kept until it was taken. Whether all of it was taken now."""
        self.rest = block
        self.count(0, len(block))
        self.group.counts.bytes += len(block)
        return self._send_rest()

    def _send_rest(self) -> bool:
        """Whether all of it was taken."""
        # The rest of a frame is a memoryview from the beginning. The history has that, too, unless `kept` counts it.
        keeps = isinstance(self.rest, bytes) or self in self.group.loop.kept
        all_of_it = True
        while self.rest and all_of_it:
            data = bytes(self.rest[:AT_ONCE])
            self.group.loop.sends += 1
            sent = send_to(self.fd, data)
            if sent is None:
                self.close(LEFT)
                return False
            all_of_it = sent == len(data)
            self.rest = memoryview(self.rest)[sent:]
            self.full_since = None if sent else self.full_since
        if all_of_it:
            self.rest = b""
        else:
            self.wait_for_room()
        if keeps:
            self._tell_what_it_keeps()
        return all_of_it

    def _tell_what_it_keeps(self) -> None:
        """Count the whole that the rest is a part of, since that is what stays in memory."""
        whole = self.rest.obj if isinstance(self.rest, memoryview) else self.rest
        self.group.loop.keep(self, memoryview(whole).nbytes)
