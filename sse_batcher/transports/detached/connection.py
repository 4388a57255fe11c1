"""A detached client: an open stream whose connection belongs to us and no longer to the server.

Runs on the loop's thread: the one thread of the process that drives all detached streams. Other threads only call
`SocketClient.dismiss` and `SocketClient.answer`, which leave a note and wake the loop.

A client is in one of three states:

- *live*: its socket has taken all that it was given. It gets each new frame together with its group, and its position
  is the group's position.
- *behind*: its socket was full, so it has left the group, possibly in the middle of a frame. It keeps the unsent rest
  of that one frame and nothing else. When the socket takes data again, it reads on in the history from its own
  position. A client with frames that it reads alone (see `Feed.group_of`) is also behind, until its next turn, and may
  keep these frames so long.
- *waiting*: it is behind, and the history no longer has what comes next. The next slice is read from the backend.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

from ...event import EVERY_USER, Audience
from ...reasons import ByeReason, EndReason, GapReason
from ...streams.client import QueueClient
from ...streams.counts import Counts
from ...streams.history import ResumePoint, Slice
from ...streams.open_stream import OpenStream
from ...wire import Frame, Position
from ..sockets import sign_of_life
from .sending import hang_up, has_taken_all, send_to
from .takeover import Taken

if TYPE_CHECKING:
    from .group import Group

LEFT: Final = "left"
"""The reason of a stream that ends without an ``sse_bye``."""

MAX_SEND_BYTES = 262_144
"""Maximum size of one send from a client's unsent rest, in bytes. Each such send copies the data first, so without this
limit a long rest that is taken in small parts would be copied again and again as a whole."""

STALL_CHECKS = 4
"""How many times within `ClientOptions.send_timeout` the loop checks whether a client still takes data."""


class PendingReplay:
    """A client's request for the next slice of frames that only the backend still has."""

    __slots__ = ("answer", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        """When the client began to wait, or when it got its last heartbeat while it waited, by the loop's clock."""
        self.answer: tuple[Slice | None] | None = None
        """None until there is an answer. The answer is `(None,)` if the frames are gone for good. Written once, by the
        thread of `Replay`."""


class SocketClient(OpenStream):
    """One detached client, made from the `QueueClient` that it replaces and from the connection that was taken over.

    Takes no lock. Its attributes are written by the loop's thread only, with these exceptions:

    - `dismissed` is written by any thread. Harmless race: if two threads write it at the same time, one of the two
      reasons is kept, and each thread posts its note afterwards, so the stream ends in any case. If the reason that the
      client has left is lost in this way, the failing send shows it again.
    - `PendingReplay.answer` is written by the thread of `Replay`, before its note.
    """

    __slots__ = (
        *("dismissed", "fd", "full_since", "group", "live", "rest"),
        *("_bytes", "_frames", "_next_stall_check", "_pending", "_seen", "_seen_at", "_slice"),
    )

    transport = "detached"
    driver = 0  # the id of no thread, so `Hub.wait_until_left` waits for this stream, whichever thread calls it

    def __init__(self, replaced: QueueClient, group: Group, taken: Taken) -> None:
        super().__init__(replaced.info, replaced.point, replaced.opened_at, replaced.lease, poll=replaced.poll)
        self.fd = taken.fd
        """The file descriptor of the connection; -1 after `close`."""
        self.group = group
        self.rest: bytes | memoryview = taken.unsent
        """What has to be sent before anything else: the rest of something that was sent in part, or the first block."""
        self.live = False
        self.dismissed: ByeReason | Literal["left"] | None = None
        """Why the stream ends before anything more is handed out. Written by any thread."""
        self.full_since: float | None = None
        """When its socket became full, by the loop's clock; None if the socket is not full."""
        self._seen: float | None = None  # the last sign of life, and when it changed
        self._seen_at = self._next_stall_check = 0.0
        self._slice: Sequence[Frame] = ()
        self._pending: PendingReplay | None = None
        # What it was handed. While it is live, the totals of its group are added (see `handed`), so that a frame that
        # goes to all clients of a group is counted once. What the group had handed out before is subtracted on joining.
        self._frames, self._bytes = replaced.handed

    # -- for the hub ---------------------------------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        return not self.live

    @property
    def is_waiting(self) -> bool:
        return not self.live

    @property
    def counts(self) -> Counts:
        return self.group.counts

    @property
    def lost(self) -> tuple[Position, GapReason] | None:
        return self.group.feed.lost_in(self.channels, alone=self.reads_alone)

    @property
    def handed(self) -> tuple[int, int]:
        if not self.live:
            return self._frames, self._bytes
        frames, size = self.group.handed
        return self._frames + frames, self._bytes + size

    def dismiss(self, reason: ByeReason | Literal["left"]) -> bool:
        first = self.dismissed is None
        self.dismissed = self.dismissed or reason
        self.group.loop.post(self)
        return first

    def offer(self, frame: Frame) -> None:
        self.group.feed.note(self, frame.position)

    def lose(self, audience: Audience, position: Position, reason: GapReason) -> None:
        self.group.feed.lose(EVERY_USER, position, reason)

    def fall_behind(self) -> None:
        self.group.feed.note(self)

    def read_on(self, frames: Iterable[Frame]) -> None:
        self._slice = list(frames)
        self.group.loop.slice_bytes += _size(self._slice)

    def go_live(self) -> None:
        """Do nothing: the client joins its group next. The feed reads on this thread, so no frame comes in between."""

    # -- for Replay, from its thread -----------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether the client still needs an answer. Any thread. Harmless race: at worst, an answer is not used."""
        return self._pending is not None and self.dismissed is None and self.fd >= 0

    def answer(self, older: Slice | None) -> None:
        """Give the client the next slice after its position; None if those frames are gone for good. Any thread."""
        pending = self._pending
        if pending is not None:
            pending.answer = (older,)
            self.group.loop.post(self)

    # -- for its feed and its group ------------------------------------------------------------------------------------

    @property
    def reads_alone(self) -> bool:
        """Whether there may be frames that it has to read alone: for its user, or of channels its group leaves out."""
        return self.info.user is not None or len(self.group.channels) < len(self.channels)

    def leave_group(self) -> None:
        """Read what comes after the position of the group from the history, now or when the group has time."""
        group = self.group
        if group.busy:
            group.postponed.append(self)  # its position is known only after the group has sent to all of its clients
        else:
            group.leave(self)
            group.loop.post(self)

    @property
    def needs_slice(self) -> bool:
        """Whether the next thing that it does is to read the history. Not while its socket is full."""
        has_more_to_do = bool(self.rest or self._slice) or self._pending is not None or self.dismissed is not None
        return not (self.live or has_more_to_do) and self.full_since is None and self.fd >= 0

    def count(self, frames: int, size: int) -> None:
        """Add these numbers of frames and bytes to what the client was handed. They may be negative."""
        self._frames += frames
        self._bytes += size

    def cut(self, sent: int, pieces: Sequence[bytes]) -> int:
        """Keep the rest of the piece in whose middle a send ended, after `sent` bytes in all, and wait for room.

        `sent` must be less than the size of all pieces. Returns how many pieces were sent as a whole or in part.
        """
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
        """Let the loop report when the socket takes data again."""
        if self.full_since is None:
            self.full_since = self.group.loop.clock()
            self.group.loop.watch(self, for_room=True)

    # -- for the loop --------------------------------------------------------------------------------------------------

    def serve(self) -> Iterator[None]:
        """Send what there is to send. Yields after each slice, so that others get their turn."""
        while self._step():
            yield

    def has_room(self) -> None:
        """Note that the socket takes data again."""
        self.full_since = None
        self.group.loop.watch(self, for_room=False)

    def check(self, now: float) -> None:
        """Do what depends on time: the lease, heartbeats while it waits for a slice, and stalled connections.

        `now` is by the loop's clock, in seconds; the lease is by the hub's clock.
        """
        if self.fd < 0:
            return  # closed since the list of clients for this round was made
        if self.group.hub.clock() >= self.lease:
            self.dismiss("lease")
        if self._pending is not None:
            self._check_while_waiting(now, self._pending)
        if now >= self._next_stall_check:
            self._next_stall_check = now + self.group.send_timeout / STALL_CHECKS
            self._give_up_if_stalled(now)

    def _check_while_waiting(self, now: float, pending: PendingReplay) -> None:
        closing = self.group.hub.closing
        if closing is not None:
            self.dismiss(closing)  # the client gets the remaining frames from another process
        elif now - pending.since >= self.group.heartbeat and not self.rest:
            pending.since = now
            self._say(self.group.heartbeat_block)

    def _give_up_if_stalled(self, now: float) -> None:
        """End the stream if the client has taken no byte for `send_timeout`, as `watcher.Watch` does.

        Not done by the socket option TCP_USER_TIMEOUT, which also ends connections whose client reads slowly.
        """
        try:
            seen = None if has_taken_all(self.fd) else self._sign_of_life()
        except OSError:
            return  # the connection has ended; epoll reports that to the loop
        if seen is None or seen != self._seen:
            self._seen, self._seen_at = seen, now
        elif now - self._seen_at >= self.group.send_timeout:
            self.dismissed = LEFT  # replaces any other reason: an sse_bye would not be taken either
            self.group.loop.post(self)

    def _sign_of_life(self) -> float | None:
        connection = socket.socket(fileno=self.fd)
        try:
            return sign_of_life(connection, self.full_since)
        finally:
            connection.detach()

    def close(self, reason: EndReason) -> None:
        """Close the connection, and let the loop, the group and the hub forget the client. Idempotent."""
        if self.fd < 0:
            return
        self.group.leave(self)
        self.group.loop.forget(self)
        fd, self.fd = self.fd, -1
        hang_up(fd)
        self.rest = b""
        self._take_slice()
        self.group.hub.remove(self, self.farewell or reason)

    def _step(self) -> bool:
        """Do one step of what there is to do. Returns whether the next step can follow at once."""
        if self.fd < 0 or (self.live and self.dismissed is None):
            return False
        if self.live and self.group.busy:
            self.leave_group()
            return False
        if self.live:
            self.group.settle()
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
        """Send the next slice, ask the backend for it, or go live. Returns whether the next step can follow at once."""
        if self._pending is not None:
            return self._pending.answer is not None and self._take_answer(*self._pending.answer)
        if not self._slice and not self.group.hub.advance(self):
            return self._ask()
        if not self._slice:
            return self._join()
        return self._send(self._take_slice())

    def _take_slice(self) -> Sequence[Frame]:
        frames, self._slice = self._slice, ()
        self.group.loop.slice_bytes -= _size(frames)
        return frames

    def _join(self) -> bool:
        """Go live: the client has everything up to now. If the hub is closing, say goodbye instead."""
        closing = self.group.hub.closing
        if closing is not None:
            return self._end(closing)
        self.group.feed.regroup(self)
        self.group.join(self)
        return False

    def _ask(self) -> bool:
        """Ask the backend for the next slice. If the hub is closing, say goodbye: another process has these frames."""
        group, closing = self.group, self.group.hub.closing
        if closing is not None:
            return self._end(closing)
        self._pending = PendingReplay(group.loop.clock())
        group.feed.replay(self)
        return False

    def _take_answer(self, older: Slice | None) -> bool:
        self._pending = None
        if older is None:
            gap = self.group.framed(self.group.hub.skip(self))
            if not self.poll:
                return self._say(gap) and self._join()
            self.farewell = "polled"
            return self._say(gap + self.group.end_of_body)
        if older.frames:
            return self._send(older.frames, in_history=False)
        self.point = ResumePoint(older.position)
        return True

    def _end(self, reason: ByeReason) -> bool:
        """Send the ``sse_bye``, unless it is a poll. The connection is closed in the step after it was taken."""
        self.farewell = reason
        group = self.group
        if self.poll:
            return self._say(group.end_of_body)
        group.hub.settle(self)
        return self._say(group.framed(group.hub.control.bye(self.point, reason)) + group.end_of_body)

    def _send(self, frames: Sequence[Frame], *, in_history: bool = True) -> bool:
        """Send these frames, which are not empty. Returns whether the socket has taken all of them.

        `in_history`: the history keeps them in memory anyway, so that the rest of one of them costs nothing more.
        """
        group = self.group
        pieces = [group.encoded(frame) for frame in frames]
        if self.point.part and frames[0].position == self.point.position:
            pieces[0] = group.framed(frames[0].rest(self.point.part))
        if self.poll:
            pieces[-1] += group.end_of_body
        data = b"".join(pieces)
        group.loop.sends += 1
        sent = send_to(self.fd, data)
        if sent is None:
            self.close(LEFT)
            return False
        begun = len(pieces) if sent == len(data) else self.cut(sent, pieces)
        if begun:
            self.point = ResumePoint(frames[begun - 1].position)
        if self.poll and begun == len(pieces):
            self.farewell = "polled"
        handed = sum(map(len, pieces[:begun]))
        self.count(len(frames[:begun]), handed)
        group.counts.bytes += handed
        group.count_frames(frames[:begun], 1)
        # Bytes may have been made for this client alone: an old frame in chunks, a part of one, or the end of a poll.
        if self.rest and not (in_history and pieces[begun - 1] is group.encoded(frames[begun - 1])):
            self._report_kept_bytes()
        return sent == len(data)

    def _say(self, block: bytes) -> bool:
        """Send a block that is no frame. The client keeps what is not taken. Returns whether all of it was taken."""
        self.rest = block
        self.count(0, len(block))
        self.group.counts.bytes += len(block)
        return self._send_rest()

    def _send_rest(self) -> bool:
        """Send `rest`. Returns whether all of it was taken."""
        # Only a rest that no history keeps is counted in `kept`. It is bytes at first. The rest of a frame of the
        # history is a memoryview from the beginning, and is not counted.
        is_kept = isinstance(self.rest, bytes) or self in self.group.loop.kept
        all_taken = True
        while self.rest and all_taken:
            data = bytes(self.rest[:MAX_SEND_BYTES])
            self.group.loop.sends += 1
            sent = send_to(self.fd, data)
            if sent is None:
                self.close(LEFT)
                return False
            all_taken = sent == len(data)
            self.rest = memoryview(self.rest)[sent:]
            self.full_since = None if sent else self.full_since
        if all_taken:
            self.rest = b""
        else:
            self.wait_for_room()
        if is_kept:
            self._report_kept_bytes()
        return all_taken

    def _report_kept_bytes(self) -> None:
        """Tell the loop the size of the whole that `rest` is a part of, since the whole stays in memory."""
        whole = self.rest.obj if isinstance(self.rest, memoryview) else self.rest
        self.group.loop.keep(self, memoryview(whole).nbytes)


def _size(frames: Iterable[Frame]) -> int:
    return sum(len(frame.plain) for frame in frames)
