"""A group: the detached clients of one hub that have the same channels, framing and encoding, so get the same bytes.

The group knows nothing of frames that its clients read alone, for their users and of rare channels (see
`Feed.group_of`): for each of these, the client leaves the group, and joins it again.

Runs on the loop's thread only. Takes no lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...streams.history import ResumePoint
from ...wire import HEARTBEAT, LAST_CHUNK, Frame, Position, chunk, stored
from .connection import LEFT, SocketClient
from .sending import FLAGS, send, sized, taken

if TYPE_CHECKING:
    from .feed import Feed

IN_STEP = ResumePoint()
"""The `point` of all clients that are in step with their group, since their position is the group's. Shared by all of
them, so that nothing has to be written to each client when the group moves on."""


class Key(NamedTuple):
    """What the clients of a group have in common."""

    channels: tuple[str, ...]
    """Those that the group reads for them, sorted."""
    batches: bool
    poll: bool
    gzipped: bool
    chunked: bool


class Group:
    """The clients that are sent the same bytes, and how far they have got.

    Only live clients are listed here. They are in one of two dictionaries, each with its file descriptor:

    - `in_step`: their position is `position`, the group's.
    - `ahead`: they have read further in the history than the group, before they joined it. The group must not send them
      the frames up to their own position again.
    """

    __slots__ = (
        *("ahead", "batches", "busy", "channels", "chunked", "counts", "end_of_body", "feed", "gzipped"),
        *("heartbeat", "heartbeat_block", "hub", "in_step", "key", "loop", "poll", "position", "postponed"),
        *("send_timeout", "sent_at", "size", "_bytes", "_frames", "_left", "_missed_frames"),
    )

    def __init__(self, feed: Feed, key: Key, position: Position) -> None:
        """`position`: that of the first client."""
        self.feed = feed
        self.loop = feed.loop
        self.hub = feed.hub
        self.counts = feed.counts
        self.key = key
        self.channels, self.batches, self.poll, self.gzipped, self.chunked = key
        self.end_of_body = LAST_CHUNK if self.chunked else b""
        """What ends a response, after its last block."""
        self.position = position
        self._frames = self._bytes = 0  # handed to each client that was live all the time
        self.in_step: dict[SocketClient, int] = {}
        self.ahead: dict[SocketClient, int] = {}
        self.busy = False
        """Whether the group is in the middle of sending to its clients, between two of their turns."""
        # The descriptors of clients that left during the present send. They may belong to other streams by now.
        self._left: dict[int, None] = {}
        self.postponed: list[SocketClient] = []
        """Clients that have to be served as soon as the group is no longer busy."""
        self.size = 0
        """The number of clients, including those that are behind."""
        # Whether frames came, or the hub was closed, while the group was busy: it has to look for them itself.
        self._missed_frames = False
        self.send_timeout = feed.options.send_timeout
        self.heartbeat = feed.options.heartbeat
        """Seconds of silence after which a heartbeat is sent."""
        self.heartbeat_block = self.framed(HEARTBEAT)
        """A heartbeat in the framing of this group."""
        self.sent_at = self.loop.clock()
        """When the last send to all clients began, by the loop's clock."""

    @property
    def handed(self) -> tuple[int, int]:
        """The numbers of frames and bytes that were handed to each client that was live all the time."""
        return self._frames, self._bytes

    # -- its clients ---------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Count one more client. With the first one, the feed begins to read for this group."""
        if not self.size:
            self.feed.enlist(self)
        self.size += 1

    def shrink(self) -> None:
        """Count one client less. After the last one, the feed forgets this group."""
        self.size -= 1
        if not self.size:
            self.feed.unlist(self)

    def join(self, client: SocketClient) -> None:
        """Make a client live. It must have been handed all frames that the history has for it."""
        client.live = True
        client.count(-self._frames, -self._bytes)
        if client.point.position > self.position:
            self.ahead[client] = client.fd
        else:
            self.in_step[client] = client.fd
            client.point = IN_STEP

    def leave(self, client: SocketClient) -> None:
        """Let a client have a position of its own from here on. Does nothing if it is not live."""
        if client in self.in_step:
            del self.in_step[client]
            client.point = ResumePoint(self.position)
        elif client in self.ahead:
            del self.ahead[client]
        else:
            return
        if self.busy:
            self._left[client.fd] = None
        client.live = False
        client.count(self._frames, self._bytes)

    # -- for its feed and the loop -------------------------------------------------------------------------------------

    def give(self, frames: Sequence[Frame]) -> None:
        """Begin to send these frames to the clients, in turns of `Loop.sends_per_turn` sends."""
        if self.busy:
            self._missed_frames = True
            return
        # The group may have these frames already: a new group begins after the newest one, and a group that was busy
        # has read on in the history.
        news = [frame for frame in frames if frame.position > self.position]
        if news:
            self.loop.start(self, self._hand_out(news))

    def split_up(self) -> None:
        """Let each client go on alone, because frames are missing or the hub is closing."""
        if self.busy:
            self._missed_frames = True  # what has happened is found after the present send
            return
        for client in [*self.in_step, *self.ahead]:
            client.leave_group()

    def settle(self) -> None:
        """Move up to where the feed is, if this group was given everything up to there.

        For clients that are to end, and before the group is busy with something else than frames. The position of a
        quiet group is old otherwise, and the floor that all quiet channels, or users, have in common may have risen
        above it: what goes on from there would find a false gap.
        """
        reached = self.feed.reached
        if reached is not None and not (self.busy or self._missed_frames):
            self.position = max(self.position, reached)

    def until_heartbeat(self, now: float) -> float:
        """Return the seconds until the next heartbeat is due; 0 or less if it is due now."""
        return self.sent_at + self.heartbeat - now

    def serve(self) -> Iterator[None]:
        """Send a heartbeat if it is due. Yields between turns."""
        if not self.busy and self.until_heartbeat(self.loop.clock()) <= 0:
            self.settle()  # if frames come meanwhile, it reads on from here
            yield from self._send([self.heartbeat_block])
            yield from self._hand_out(self._read_missed())

    def encoded(self, frame: Frame) -> bytes:
        """Return a frame as the clients of this group get it."""
        return frame.encoded(batches=self.batches, chunked=self.chunked, gzipped=self.gzipped)

    def framed(self, block: bytes) -> bytes:
        """Return any other block as the clients of this group get it."""
        coded = stored(block) if self.gzipped else block  # not compressed here: see `deflated`
        return chunk(coded) if self.chunked else coded

    def count_frames(self, frames: Sequence[Frame], clients: int) -> None:
        """Count that each of so many clients was handed these frames."""
        counts = self.counts
        counts.frames += clients * len(frames)
        if self.batches:
            for frame in frames:
                counts.saved_frames += clients * (len(frame.batch.events) - 1)
                counts.saved_bytes += clients * frame.saved_bytes

    def _hand_out(self, frames: Sequence[Frame]) -> Iterator[None]:
        while frames and self.poll:
            self.split_up()  # each poll ends with its answer, so it reads that alone
            self.position = frames[-1].position  # now that no client has the group's position
            frames = self._read_missed()
        while frames:
            self._admit(frames[0].position, frames[-1].position)
            yield from self._send([self.encoded(frame) for frame in frames], frames)
            frames = self._read_missed()

    def _read_missed(self) -> Sequence[Frame]:
        """Return the next frames that came while the group was busy. The feed has not waited for the group."""
        if not self._missed_frames:
            return ()
        frames = self.hub.next_frames(self.channels, self.position)
        self.feed.let_read_alone()  # after the look at the history, and before the group goes on: see `Feed.note`
        if not frames:
            self._missed_frames = False
            if frames is None or self.hub.closing is not None:
                self.split_up()
        return frames or ()

    def _admit(self, first: Position, last: Position) -> None:
        """Sort the clients that are ahead, before the group sends the frames from `first` to `last`.

        A client at or after `last` has all of them, and stays ahead.
        """
        for client in list(self.ahead):
            position = client.point.position
            if position < first:
                # The group has no frame between its position and `first`, so moving it up to the client loses nothing.
                self.position = max(self.position, position)
                del self.ahead[client]
                self.in_step[client] = client.fd
                client.point = IN_STEP
            elif position < last:
                # The client has some of these frames and needs the others, which it reads from the history itself.
                client.leave_group()

    def _send(self, pieces: Sequence[bytes], frames: Sequence[Frame] = ()) -> Iterator[None]:
        """Send all pieces to all clients, as one block of bytes. Yields between turns.

        The pieces are the encoded `frames`. Without frames they are something else, which clients that are ahead get,
        too. This is the hot loop: a few microseconds a client, nearly all of them in the kernel.
        """
        self.busy = True
        self._left.clear()
        data = b"".join(pieces)
        size = len(data)
        ready = sized(size)
        before = self.position
        if frames:
            self.position = frames[-1].position
        self._frames += len(frames)
        self._bytes += size
        self.sent_at = self.loop.clock()
        # Only descriptors: with many clients, each object that is looked at has to be fetched from memory.
        fds = list(self.in_step.values())
        if not frames:
            fds += self.ahead.values()
        else:
            for client in self.ahead:
                client.count(-len(frames), -size)  # counted already, when the client read these frames itself
        reached = 0  # clients that have taken all
        turn = self.loop.sends_per_turn
        for start in range(0, len(fds), turn):
            if start:
                yield
            some = fds[start : start + turn]
            if self._left:
                some = [fd for fd in some if fd not in self._left]
            reached += len(some)
            for fd in some:
                sent = send(fd, data, ready, FLAGS)
                if sent != size:
                    reached -= 1
                    self._handle_short_send(self.loop.clients[fd], taken(sent), pieces, frames, before)
            self.loop.sends += len(some)
        self.counts.bytes += reached * size
        self.count_frames(frames, reached)
        self.busy = False
        # Before the next frames: a client that was dismissed while the group was busy must get nothing more.
        postponed, self.postponed = self.postponed, []
        for client in postponed:
            client.leave_group()
        self.feed.read_for(postponed)

    def _handle_short_send(
        self, client: SocketClient, sent: int | None, pieces: Sequence[bytes], frames: Sequence[Frame], before: Position
    ) -> None:
        """Let a client fall behind, whose socket has taken only `sent` bytes; None if its connection is gone.

        `before`: the position of the group before this send.
        """
        self.leave(client)
        begun = 0 if sent is None else client.cut(sent, pieces)
        if frames:
            client.point = ResumePoint(frames[begun - 1].position if begun else before)
        handed = sum(map(len, pieces[:begun]))
        client.count(len(frames[:begun]) - len(frames), handed - sum(map(len, pieces)))
        self.counts.bytes += handed
        self.count_frames(frames[:begun], 1)
        if sent is None:
            client.close(LEFT)
        else:
            self.counts.overflows += 1
