"""Detached clients: connections that are ours, and the groups of those that get the same bytes.

Run by the loop's thread alone. From elsewhere come only `Group.offer`, `fall_behind` and `end`, and
`Connection.dismiss`, which leave a note and wake it.

A connection is *live* while its socket takes all that it is given: it stands where its group stands, and has no place
of its own. If its socket is full it leaves the group in the middle of what was just sent, keeps the rest of the one
frame that was cut, and is *behind*: when its socket takes more, it reads the history from there. Nothing else is kept
for it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from ..client import Client, Counts, Member
from ..history import Cursor
from ..hub import Hub
from ..watcher import has_taken_all, sign_of_life
from ..wire import HEARTBEAT, LAST_CHUNK, Frame, chunk
from .sending import FLAGS, hang_up, send, send_to, sized, taken
from .takeover import Taken

SHARED = Cursor()
"""Of who stands where the group stands."""

LEFT = "left"
"""The reason for an end without a word."""

LOOKS = 4
"""How often, within its `send_timeout`, it is asked whether a client takes what it is sent."""

AT_ONCE = 250
"""Sends, at most, before other threads get a turn, and other groups."""


class Owner(Protocol):
    """Whose streams they are. Kept alive by them."""

    def drain(self) -> None:
        """The server is stopping."""


class Loop(Protocol):
    """What connections and groups need of the thread that runs them."""

    clock: Callable[[], float]
    sends: int
    """How many since the others had their turn."""

    def post(self, item: Connection | Group) -> None:
        """Have `item.serve()` run soon. Any thread."""

    def watch(self, connection: Connection, *, for_room: bool) -> None:
        """Tell it when its client has left, and, if asked to, when its socket takes more."""

    def forget(self, connection: Connection) -> None:
        """It is about to be closed."""


class Connection(Member):
    """One detached client."""

    __slots__ = (
        *("dismissed", "fd", "full_since", "group", "live", "rest"),
        *("_bytes", "_frames", "_next_look", "_seen", "_seen_at", "_slice"),
    )

    driver = 0  # none that waits for us to leave is the loop's

    def __init__(self, client: Client, group: Group, taken: Taken) -> None:
        super().__init__(client.info, client.cursor, client.opened_at, client.lease)
        self.fd = taken.fd
        self.group = group
        self.rest: bytes | memoryview = taken.unsent
        """What has to be sent before anything else: it was begun, or comes first."""
        self.live = False
        self.dismissed: str | None = None
        """Why it ends before anything more is handed out. Any thread."""
        self.full_since: float | None = None
        """Since when its socket is full; None if it is not."""
        self._seen: float | None = None
        self._seen_at = self._next_look = 0.0
        self._slice: Sequence[Frame] = ()
        self._frames, self._bytes = client.handed  # while it is live, less what its group had been handed before

    # -- for the hub ---------------------------------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        return not self.live

    @property
    def counts(self) -> Counts:
        return self.group.counts

    @property
    def lost(self) -> tuple[Any, str] | None:
        return self.group.lost

    @property
    def handed(self) -> tuple[int, int]:
        if not self.live:
            return self._frames, self._bytes
        return self._frames + self.group.frames, self._bytes + self.group.bytes

    def dismiss(self, reason: str) -> None:
        self.dismissed = self.dismissed or reason
        self.group.loop.post(self)

    def read_on(self, frames: Iterable[Frame]) -> None:
        self._slice = list(frames)

    def go_live(self) -> None:
        """It joins its group right after, on this thread: that is the one that reads for the group, too."""

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
        if now >= self._next_look:
            self._next_look = now + self.group.send_timeout / LOOKS
            self._give_up_if_stalled(now)

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

    def close(self, reason: str) -> None:
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
        group = self.group
        block = group.hub.catch_up(self)
        if self._slice:
            frames, self._slice = self._slice, ()
            pieces = [group.encoded(frame) for frame in frames]
            if self.cursor.part and frames[0].position == self.cursor.position:
                rest = frames[0].rest(self.cursor.part)
                pieces[0] = chunk(rest) if group.chunked else rest
            return self._send(pieces, frames)
        if block is not None and not self._say(group.framed(block)):
            return False
        if group.hub.closing is not None:
            return self._end(group.hub.closing)
        group.join(self)
        return False

    def _end(self, reason: str) -> bool:
        """Say goodbye, and close as soon as that is sent."""
        self.farewell = reason
        group = self.group
        block = group.framed(group.hub.farewell(self, reason))
        return self._say(block + LAST_CHUNK if group.chunked else block)

    def _send(self, pieces: Sequence[bytes], frames: Sequence[Frame]) -> bool:
        """Send these frames, of which the pieces are the bytes. Whether all of it was taken."""
        data = b"".join(pieces)
        self.group.loop.sends += 1
        sent = send_to(self.fd, data)
        if sent is None:
            self.close(LEFT)
            return False
        begun = len(pieces) if sent == len(data) else self.cut(sent, pieces)
        if begun:
            self.cursor = Cursor(frames[begun - 1].position)
        handed = sum(map(len, pieces[:begun]))
        self.count(len(frames[:begun]), handed)
        self.group.counts.bytes += handed
        self.group.tally(frames[:begun], 1)
        return sent == len(data)

    def _say(self, block: bytes) -> bool:
        """Send a block that is in no history, and kept until it was taken. Whether all of it was taken now."""
        self.rest = block
        self.count(0, len(block))
        self.group.counts.bytes += len(block)
        return self._send_rest()

    def _send_rest(self) -> bool:
        data = bytes(self.rest)
        self.group.loop.sends += 1
        sent = send_to(self.fd, data)
        if sent is None:
            self.close(LEFT)
        elif sent == len(data):
            self.rest = b""
            return True
        else:
            self.rest = self.rest[sent:]
            self.full_since = None if sent else self.full_since
            self.wait_for_room()
        return False


class Group:
    """The clients of one hub with the same channels and the same framing.

    `position`: where those of them that are live stand. They are in `members`; or in `fresh`, if they have read further
    than the group.
    """

    lost: tuple[Any, str] | None = None

    def __init__(self, loop: Loop, hub: Hub, owner: Owner, client: Client, *, chunked: bool) -> None:
        self.loop = loop
        self.hub = hub
        self.owner = owner
        self.channels = client.channels
        self.batches = client.batches
        self.chunked = chunked
        self.position = client.cursor.position
        self.counts = Counts()
        self.frames = self.bytes = 0  # what each that was live all the time was handed
        self.members: dict[Connection, None] = {}
        self.fresh: dict[Connection, None] = {}
        self.postponed: list[Connection] = []
        self.busy = False
        self.connections = 0  # those that are behind included
        self.send_timeout = client.options.send_timeout
        self._heartbeat = client.options.heartbeat
        self._beat = chunk(HEARTBEAT) if chunked else HEARTBEAT
        self._sent_at = loop.clock()
        # Whether it was told of news that it has not read yet, and of which frame first. Written by the delivering
        # thread in this order, the other way round by ours.
        self._first: Any = self.position
        self._told = False

    # -- for the hub ---------------------------------------------------------------------------------------------------

    def offer(self, frame: Frame) -> None:
        self._tell(frame.position)

    def fall_behind(self) -> None:
        assert self.lost is not None
        self._tell(self.lost[0])

    def end(self, reason: str) -> None:
        self.loop.post(self)  # the hub knows the reason

    def _tell(self, position: Any) -> None:
        if not self._told:
            self._first = position
            self._told = True
            self.loop.post(self)

    # -- its connections -----------------------------------------------------------------------------------------------

    def join(self, connection: Connection) -> None:
        """This one has everything up to its cursor, and there is nothing after that."""
        connection.live = True
        connection.count(-self.frames, -self.bytes)
        if connection.cursor.position > self.position:
            self.fresh[connection] = None
        else:
            self.members[connection] = None
            connection.cursor = SHARED

    def leave(self, connection: Connection) -> None:
        """It has a place of its own from here on. Idempotent."""
        if connection in self.members:
            del self.members[connection]
            connection.cursor = Cursor(self.position)
        elif connection in self.fresh:
            del self.fresh[connection]
        else:
            return
        connection.live = False
        connection.count(self.frames, self.bytes)

    # -- by the loop ---------------------------------------------------------------------------------------------------

    def serve(self) -> Iterator[None]:
        """Hand out what there is, with a pause after each `AT_ONCE` sends."""
        if self.busy:
            return  # who is at it looks again before it ends
        while self._told or self._is_silent():
            if not self._told:
                yield from self._send([self._beat])
                continue
            # In this order: a frame that comes in between is read now, and told of once more.
            first = self._first
            self._told = False
            while frames := self.hub.news(self, first):  # all of it: of the next one it is said that this was read
                yield from self._hand_out(frames)
            if frames is None:
                self._send_away()
        if self.hub.closing is not None:
            self._send_away()

    def look(self) -> None:
        """Look at the time."""
        if self._is_silent():
            self.loop.post(self)

    def encoded(self, frame: Frame) -> bytes:
        return frame.encoded(batches=self.batches, chunked=self.chunked)

    def framed(self, block: bytes) -> bytes:
        return chunk(block) if self.chunked else block

    def tally(self, frames: Sequence[Frame], clients: int) -> None:
        """So many clients were handed these frames."""
        counts = self.counts
        counts.frames += clients * len(frames)
        if self.batches:
            counts.saved_frames += clients * sum(len(frame.batch.events) - 1 for frame in frames)
            counts.saved_bytes += clients * sum(frame.saved_bytes for frame in frames)

    def _is_silent(self) -> bool:
        return self.loop.clock() - self._sent_at >= self._heartbeat

    def _hand_out(self, frames: list[Frame]) -> Iterator[None]:
        self._admit(frames[0].position, frames[-1].position)
        yield from self._send([self.encoded(frame) for frame in frames], frames)

    def _admit(self, first: Any, last: Any) -> None:
        """Let those in that have read further than the group, which is about to go on from `first` to `last`."""
        for connection in list(self.fresh):
            position = connection.cursor.position
            if position < first:
                # There is nothing between the two, or the group would have read it: all stand where the last one does.
                self.position = max(self.position, position)
                del self.fresh[connection]
                self.members[connection] = None
                connection.cursor = SHARED
            elif position < last:
                self.leave(connection)  # it needs a part of them, which it reads itself
                self.loop.post(connection)

    def _send(self, pieces: Sequence[bytes], frames: Sequence[Frame] = ()) -> Iterator[None]:
        """Send to all members, in one piece. The hot loop: a few microseconds for each, nearly all the kernel's."""
        self.busy = True
        data = b"".join(pieces)
        size = len(data)
        ready = sized(size)
        before = self.position
        if frames:
            self.position = frames[-1].position
        self.frames += len(frames)
        self.bytes += size
        self._sent_at = self.loop.clock()
        members = list(self.members)
        short = 0
        for start in range(0, len(members), AT_ONCE):
            if start:
                yield
            some = members[start : start + AT_ONCE]
            for connection in some:
                sent = send(connection.fd, data, ready, FLAGS)
                if sent != size:
                    short += 1
                    self._fell_short(connection, taken(sent), pieces, frames, before)
            self.loop.sends += len(some)
        self.counts.bytes += (len(members) - short) * size
        self.tally(frames, len(members) - short)
        self.busy = False
        # Before the next frame: those who were dismissed meanwhile get nothing more.
        postponed, self.postponed = self.postponed, []
        for connection in postponed:
            self.leave(connection)
            self.loop.post(connection)

    def _fell_short(
        self, connection: Connection, sent: int | None, pieces: Sequence[bytes], frames: Sequence[Frame], before: Any
    ) -> None:
        """This one has not taken all of it."""
        self.leave(connection)
        begun = 0 if sent is None else connection.cut(sent, pieces)
        connection.cursor = Cursor(frames[begun - 1].position if frames and begun else before)
        handed = sum(map(len, pieces[:begun]))
        connection.count(len(frames[:begun]) - len(frames), handed - sum(map(len, pieces)))
        self.counts.bytes += handed
        self.tally(frames[:begun], 1)
        if sent is None:
            connection.close(LEFT)
        else:
            self.counts.overflows += 1

    def _send_away(self) -> None:
        """Each goes on alone: something is gone, or all streams end."""
        for connection in [*self.members, *self.fresh]:
            self.leave(connection)
            self.loop.post(connection)
