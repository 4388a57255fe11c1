"""A group: the detached clients of one hub with the same channels and the same framing, which get the same bytes.

Run by the loop's thread alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ...reasons import GapReason
from ...streams.client import QueueClient
from ...streams.counts import Counts
from ...streams.history import ResumePoint
from ...streams.hub import Hub
from ...wire import HEARTBEAT, Frame, Position, chunk
from .connection import LEFT, Loop, SocketClient
from .sending import FLAGS, send, sized, taken

SHARED = ResumePoint()
"""Of who stands where the group stands."""

AT_ONCE = 100
"""Sends, at most, before others have their turn: other groups, and, when it is time, other threads."""

_CHUNKED_BEAT = chunk(HEARTBEAT)


class Feed(Protocol):
    """What groups need of what reads for them."""

    loop: Loop
    hub: Hub
    counts: Counts

    def enlist(self, group: Group) -> None:
        """It has its first connection. The hub tells of its channels already."""

    def unlist(self, group: Group) -> None:
        """It has none any more."""

    def serve(self) -> Iterator[None]:
        """Hand out what there is."""

    def replay(self, connection: SocketClient) -> None:
        """Have the connection answered with what only the backend still has."""

    def lost_in(self, channels: Sequence[str]) -> tuple[Position, GapReason] | None:
        """The position of the newest frame of these channels that was lost before it came, and why."""


class Group:
    """`position`: where those of its clients that are live stand. They are in `members`; or in `fresh`, if they have
    read further than the group.
    """

    __slots__ = (
        *("batches", "beat", "busy", "channels", "chunked", "counts", "feed", "fresh", "heartbeat", "hub", "loop"),
        *("members", "position", "postponed", "send_timeout", "sent_at"),
        *("_bytes", "_connections", "_frames", "_late"),
    )

    def __init__(self, feed: Feed, client: QueueClient, *, chunked: bool) -> None:
        self.feed = feed
        self.loop = feed.loop
        self.hub = feed.hub
        self.counts = feed.counts
        self.channels = client.channels
        self.batches = client.batches
        self.chunked = chunked
        self.position = client.point.position
        self._frames = self._bytes = 0
        self.members: dict[SocketClient, None] = {}
        self.fresh: dict[SocketClient, None] = {}
        self.postponed: list[SocketClient] = []
        self.busy = False
        self._connections = 0  # those that are behind included
        self.send_timeout = client.options.send_timeout
        self._late = False  # something came while it was sending
        self.heartbeat = client.options.heartbeat
        self.beat = _CHUNKED_BEAT if chunked else HEARTBEAT
        self.sent_at = self.loop.clock()

    @property
    def handed(self) -> tuple[int, int]:
        return self._frames, self._bytes

    @property
    def lost(self) -> tuple[Position, GapReason] | None:
        return self.feed.lost_in(self.channels)

    # -- its connections -----------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """It has one more connection."""
        if not self._connections:
            self.feed.enlist(self)
        self._connections += 1

    def shrink(self) -> None:
        self._connections -= 1
        if not self._connections:
            self.feed.unlist(self)

    def join(self, connection: SocketClient) -> None:
        connection.live = True
        connection.count(-self._frames, -self._bytes)
        if connection.point.position > self.position:
            self.fresh[connection] = None
        else:
            self.members[connection] = None
            connection.point = SHARED

    def leave(self, connection: SocketClient) -> None:
        if connection in self.members:
            del self.members[connection]
            connection.point = ResumePoint(self.position)
        elif connection in self.fresh:
            del self.fresh[connection]
        else:
            return
        connection.live = False
        connection.count(self._frames, self._bytes)

    # -- for its feed, and by the loop ---------------------------------------------------------------------------------

    def give(self, frames: Sequence[Frame]) -> None:
        """Begin to hand out these frames; others have their turn after each `AT_ONCE` sends."""
        if self.busy:
            self._late = True
            return
        # One that has come since the frames were delivered begins after them, and one that was late has read on.
        news = [frame for frame in frames if frame.position > self.position]
        if news:
            self.loop.start(self, self._hand_out(news))

    def send_away(self) -> None:
        """Each goes on alone: something is gone, or all streams end."""
        if self.busy:
            self._late = True  # it finds that itself
            return
        for connection in [*self.members, *self.fresh]:
            self.leave(connection)
            self.loop.post(connection)

    def until_heartbeat(self, now: float) -> float:
        """Seconds until its members have to get one; 0 or less: now."""
        return self.sent_at + self.heartbeat - now

    def serve(self) -> Iterator[None]:
        """Send a heartbeat, if it is time for one."""
        if not self.busy and self.until_heartbeat(self.loop.clock()) <= 0:
            yield from self._send([self.beat])
            yield from self._hand_out(self._missed())

    def encoded(self, frame: Frame) -> bytes:
        return frame.encoded(batches=self.batches, chunked=self.chunked)

    def framed(self, block: bytes) -> bytes:
        return chunk(block) if self.chunked else block

    def tally(self, frames: Sequence[Frame], clients: int) -> None:
        counts = self.counts
        counts.frames += clients * len(frames)
        if self.batches:
            for frame in frames:
                counts.saved_frames += clients * (len(frame.batch.events) - 1)
                counts.saved_bytes += clients * frame.saved_bytes

    def _hand_out(self, frames: Sequence[Frame]) -> Iterator[None]:
        while frames:
            self._admit(frames[0].position, frames[-1].position)
            yield from self._send([self.encoded(frame) for frame in frames], frames)
            frames = self._missed()

    def _missed(self) -> Sequence[Frame]:
        """The next of what has come while it was sending, which its feed has not waited for."""
        if not self._late:
            return ()
        frames = self.hub.next_frames(self.channels, self.position)
        if not frames:
            self._late = False
            if frames is None or self.hub.closing is not None:
                self.send_away()
        return frames or ()

    def _admit(self, first: Any, last: Any) -> None:
        """Let those in that have read further than the group, which is about to go on from `first` to `last`."""
        for connection in list(self.fresh):
            position = connection.point.position
            if position < first:
                # There is nothing between the two, or the group would have read it: all stand where the last one does.
                self.position = max(self.position, position)
                del self.fresh[connection]
                self.members[connection] = None
                connection.point = SHARED
            elif position < last:
                self.leave(connection)  # it needs a part of them, which it reads itself
                self.loop.post(connection)

    def _send(self, pieces: Sequence[bytes], frames: Sequence[Frame] = ()) -> Iterator[None]:
        """Send to all members, in one piece. The hot loop: a few microseconds for each, nearly all the kernel's.

        These frames; or what is none, which is for those who have read further, too.
        """
        self.busy = True
        data = b"".join(pieces)
        size = len(data)
        ready = sized(size)
        before = self.position
        if frames:
            self.position = frames[-1].position
        self._frames += len(frames)
        self._bytes += size
        self.sent_at = self.loop.clock()
        members = list(self.members)
        if not frames:
            members += self.fresh
        else:
            for connection in self.fresh:
                connection.count(-len(frames), -size)  # it had them before
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
        self, connection: SocketClient, sent: int | None, pieces: Sequence[bytes], frames: Sequence[Frame], before: Any
    ) -> None:
        """This one has not taken all of it."""
        self.leave(connection)
        begun = 0 if sent is None else connection.cut(sent, pieces)
        if frames:
            connection.point = ResumePoint(frames[begun - 1].position if begun else before)
        handed = sum(map(len, pieces[:begun]))
        connection.count(len(frames[:begun]) - len(frames), handed - sum(map(len, pieces)))
        self.counts.bytes += handed
        self.tally(frames[:begun], 1)
        if sent is None:
            connection.close(LEFT)
        else:
            self.counts.overflows += 1
