"""Clients: the public handle of a stream, and the stream with a queue behind it.

The thread that iterates a client is its *driver*, usually a server's worker thread. The hub's delivering thread calls
`offer`, `lose` and `fall_behind`. Any thread may call `end`, `dismiss` and `close`, also as the finalizer of a
response. There is no lock: each field says which thread writes it.
"""

from __future__ import annotations

import math
import queue
import random
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import ref

from ..event import Audience
from ..reasons import ByeReason, GapReason
from ..runtime.worker import take
from ..wire import GZIP_START, HEARTBEAT, Frame, Position, deflated, stored
from .counts import Counts
from .history import ResumePoint, Slice
from .open_stream import ClientInfo, OpenStream
from .opening import Opening, StreamRequest

if TYPE_CHECKING:
    from .hub import Hub

Reference = Callable[[], Frame | None]
"""Returns a frame, or None if it is gone."""


def _held(frame: Frame) -> Reference:
    return lambda: frame


def _END() -> None:
    """Stand in the queue for the end of the stream."""


class Client(Iterator[bytes]):
    """One open stream. Iterating it gives all its bytes: the first block, frames, and heartbeats while there are none.

    Made by `SSEManager.subscribe`. One thread iterates. The iteration ends after `close`, or after an ``sse_bye``: when
    the manager is shut down, the user is kicked, or the stream has reached its `max_stream_age`.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def info(self) -> ClientInfo:
        """The number, channels and user of the client, and when it connected."""

    @abstractmethod
    def close(self) -> None:
        """End the stream at once, without ``sse_bye``, and with it the iteration. Thread-safe, and idempotent."""


def new_queue() -> queue.SimpleQueue[Reference | None]:
    """Return a new queue for one client."""
    return queue.SimpleQueue()  # looked up at the call, since gevent may patch the module after our import


class QueueClient(OpenStream, Client):
    """A stream with a queue of its own: what `SSEManager.subscribe` returns. All but `Client`'s methods is internal."""

    transport = "attached"

    def __init__(self, hub: Hub, info: ClientInfo, opening: Opening, request: StreamRequest) -> None:
        now, age = hub.clock(), hub.options.max_stream_age
        lease = math.inf if age is None else now + age * random.uniform(0.8, 1.0)
        poll = request.poll
        super().__init__(info, opening.point, now, now + hub.options.poll_wait if poll else lease, poll=poll)
        self.options = hub.options
        self.batches = request.batches
        self.gzipped = request.gzipped
        self._is_plain = self.batches and not self.gzipped
        self.missed = opening.missed
        """Why it may have missed something before it began; None if it has not."""
        self._hub = hub
        # Written by the driver; `overflows` by the delivering thread, too. A harmless race: one may be uncounted.
        gaps = (opening.missed is not None) + (opening.stale is not None)
        self._counts = Counts(replays=int(opening.resumed), gaps=gaps)
        # Written by the hub, under its lock.
        self._lost: tuple[Position, GapReason] | None = None
        # Holds weak references to frames: what waits here is kept alive by the history alone, so a thousand clients
        # that have stopped reading take no more memory than it. None means "look at the flags". A SimpleQueue, since a
        # signal handler may call its `put` in the middle of another one. It has no limit of its own: `offer` limits the
        # frames and the bytes. The delivering thread writes `_bytes_queued`, and the driver `_bytes_taken`. Their
        # difference is approximate: a frame may be counted as queued before `go_live`, and put into the queue after it.
        self._queue = hub.make_queue()
        self._bytes_queued = 0
        self._bytes_taken = 0
        # While it is behind, nothing is queued for it, and it reads the history in slices. Set by the delivering thread
        # or the driver; unset by the driver, under the hub's lock, if nothing comes after its position.
        self._behind = True
        self._resumed = opening.resumed
        self._slice: deque[Reference] = deque()  # by the driver
        self._started = False  # by the driver
        self._state = opening.state  # by the driver: empty as soon as it was handed out
        if opening.stale is not None:
            # As inside the stream, without channels: after a gap as its first block, a page expects the state from us.
            self._state += hub.control.opening(self.point, opening.stale, poll=poll)
        # Written by any thread, and never unset.
        self._ending: ByeReason | None = None  # why it ends after what is queued
        self._dismissed: ByeReason | None = None  # why it ends before anything more is handed out
        self._closed = False
        self._successor: OpenStream | None = None  # by the loop's thread, under the hub's lock

    def __repr__(self) -> str:
        channels = ", ".join(map(repr, self.channels)) or "no channel"
        user = "" if self.info.user is None else f", user {self.info.user!r}"
        state = "closed" if self._closed else "behind" if self._behind else "live"
        return f"<Client {self.info.id}: {channels}{user}, {state}>"

    def __iter__(self) -> QueueClient:
        return self

    def __next__(self) -> bytes:
        self.driver = threading.get_ident()
        if self.farewell is not None:
            # Only now has the server written the last block, and `shutdown` waits for that.
            self.close()
        if self._closed:
            raise StopIteration
        if not self._started:
            self._started = True
            return self._sent(self._begin())
        block: bytes | None
        while not self._closed:
            if self._hub.clock() >= self.lease:
                self.dismiss("lease")
            if self._dismissed is not None:
                block = self._say_goodbye(self._dismissed)
            elif self._behind:
                block = self._answer_poll() if self.poll else self._next_of_history()
            else:
                block = self._next_of_queue()
            if block is not None:
                return self._sent(block)
        raise StopIteration

    def close(self) -> None:
        """End the stream at once, without ``sse_bye``, and with it the iteration. Thread-safe, and idempotent."""
        self._closed = True
        self._queue.put(None)
        self._hub.remove(self, self.farewell or "left")

    # -- for the hub ---------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> Counts:
        """The counters of what is handed to it."""
        return self._counts

    @property
    def behind(self) -> bool:
        """Whether it reads the history at this moment, and nothing is queued for it."""
        return self._behind

    @property
    def is_waiting(self) -> bool:
        return self._behind or self._bytes_queued != self._bytes_taken

    @property
    def lost(self) -> tuple[Position, GapReason] | None:
        """The position of the newest frame that was lost before delivery, and why. Needs the hub's lock."""
        return self._lost

    @property
    def handed(self) -> tuple[int, int]:
        """The frames and bytes that were handed to the stream."""
        return self._counts.frames, self._counts.bytes

    def offer(self, frame: Frame) -> None:
        """Queue a frame. Never waits: a client whose queue is full falls behind. Called by one thread at a time."""
        if self._behind or self._closed:
            return
        size = len(self._bytes_of(frame))
        waiting = self._queue.qsize()
        too_many = waiting >= self.options.queue_frames
        if not too_many and not (waiting and self._bytes_queued - self._bytes_taken + size > self.options.queue_bytes):
            self._bytes_queued += size
            self._queue.put(ref(frame))
            return
        self._counts.overflows += 1
        self.fall_behind()

    def lose(self, audience: Audience, position: Position, reason: GapReason) -> None:
        """Note that a frame was lost before delivery. Called by the hub, under its lock."""
        self._lost = position, reason

    def fall_behind(self) -> None:
        """Queue nothing more: what was queued, and what follows, is read from the history.

        Called by the delivering thread, or by the driver.
        """
        # First the flag, then the queue, then the marker. The driver may take a frame out of the middle while the queue
        # is being emptied: it sees the flag and drops it. The marker comes last, or it would be thrown away, too.
        self._behind = True
        self._empty_queue()
        self._queue.put(None)
        if self._ending is not None:
            # An earlier `_END` may be lost: removed above, or taken by the driver, which drops all while it is behind.
            self._queue.put(_END)

    def read_on(self, frames: Iterable[Frame]) -> None:
        """Take the next slice of the history. Called by the hub, under its lock."""
        self._slice.extend(map(ref, frames))

    def read_older(self, older: Slice) -> None:
        """Take the next slice of what the history no longer has, and keep its frames alive. Called by the hub."""
        self._slice.extend(_held(frame) for frame in older.frames)
        if not older.frames:
            self.point = ResumePoint(older.position)

    def go_live(self) -> None:
        """Queue all frames that are delivered from now on. Called by the hub, under its lock."""
        self._bytes_taken = self._bytes_queued
        self._behind = False

    def end(self, reason: ByeReason) -> None:
        """Let the stream end with ``sse_bye`` after what is queued. Thread-safe."""
        self._ending = self._ending or reason
        self._queue.put(_END)

    def dismiss(self, reason: ByeReason) -> bool:
        """Let the stream end with ``sse_bye`` now: nothing that waits for it is handed out. Thread-safe.

        Return False, and change nothing, if it was dismissed before.
        """
        first = self._dismissed is None  # of two threads at once, both may be first. A harmless race: one reason stays
        self._dismissed = self._dismissed or reason
        self._queue.put(None)
        # After the flag: `give_way` sets its own first and then looks at this one, so that one of them sees the other.
        if self._successor is not None:
            self._successor.dismiss(reason)
        return first

    def give_way(self, successor: OpenStream) -> None:
        """Let another stream go on with this one, which is not iterated any more. Called under the hub's lock."""
        self._successor = successor
        if self._dismissed is not None:
            successor.dismiss(self._dismissed)

    def first_block(self) -> bytes:
        """Make the first block of the stream, without the state."""
        # The id comes with the state: a client that is cut off before that has to get it again.
        return self._hub.control.opening(
            self.point, self.missed, channels=self.channels, named=not self._state, poll=self.poll
        )

    def _begin(self) -> bytes:
        """Return the first block with the state; or with the last block, if the stream is dismissed already.

        For a poll, also what there is for it.
        """
        first = self.first_block()
        if self.gzipped:
            first = GZIP_START + stored(first)
        if self._dismissed is not None:
            return first + (self._say_goodbye(self._dismissed) or b"")
        state, self._state = self._state, b""
        if self.gzipped:
            state = deflated(state)
        if self.poll and not self._resumed:
            self.farewell = "polled"  # the client has its cursor, and comes back with it
        elif self.poll:
            first += self._answer_poll() or b""
        return first + state

    def _answer_poll(self) -> bytes | None:
        """Return the first slice of what there is for a poll, and end it; None: there is nothing, and it is live."""
        blocks: list[bytes] = []
        while self._behind and self._dismissed is None and not (blocks and not self._slice):
            block = self._next_of_history()
            if block is not None:
                blocks.append(block)
        if not blocks or self._dismissed is not None:
            return None
        self.farewell = "polled"
        return b"".join(blocks)

    def _next_of_history(self) -> bytes | None:
        """Return the next block of a client that is behind. None: look again, it may be live now."""
        if not self._slice:
            gap = self._hub.catch_up(self)
            return None if gap is None else self._encoded(gap)
        frame = self._slice.popleft()()
        if frame is None:  # evicted meanwhile: the hub finds out what that means
            self._slice.clear()
            return None
        return self._handed(frame)

    def _next_of_queue(self) -> bytes | None:
        """Return the next block of a live client, after at most the time of a heartbeat. None: look again."""
        rest = self.lease - self._hub.clock()
        try:
            reference = take(self._queue, max(0.0, min(self.options.heartbeat, rest)))
        except queue.Empty:
            return self._encoded(HEARTBEAT) if self._hub.clock() < self.lease else None
        is_dismissed = self._dismissed is not None  # read once
        if is_dismissed:
            self._queue.put(reference)  # it is not handed out: `_say_goodbye` has to find it
        # A frame that was taken while the queue was being emptied is in the history.
        if reference is None or self._closed or self._behind or is_dismissed:
            return None
        if reference is _END:
            return self._say_goodbye(self._ending or "shutdown")
        if self.poll:
            self.fall_behind()  # it reads its answer from the history
            return None
        frame = reference()
        if frame is None:  # evicted before its turn
            self._counts.overflows += 1
            self.fall_behind()
            return None
        self._bytes_taken += len(self._bytes_of(frame))
        # A frame at or below the position was read from the history: its delivery began before the client went live.
        return self._handed(frame) if frame.position > self.point.position else None

    def _say_goodbye(self, reason: ByeReason) -> bytes | None:
        """Return the last block. None for a poll, which ends without one."""
        self.farewell = reason
        if self.poll:
            self.close()
            return None
        # In this order: what was offered until now is queued or handed out, or the stream is behind. `fall_behind` may
        # empty the queue at the same time, and sets its flag first.
        offered = self._hub.offered
        if not self._take_waiting() and not self._behind and offered > self.point.position:
            self.point = ResumePoint(offered)
        self._hub.settle(self)
        # Without an id if the state was not handed out: a client that comes back with an id would never get it.
        return self._encoded(self._hub.control.bye(self.point, reason, named=not self._state))

    def _handed(self, frame: Frame) -> bytes | None:
        position, part, _ = self.point
        self.point = ResumePoint(frame.position)
        self._counts.frames += 1
        if part and frame.position == position:
            rest = frame.rest(part)  # nothing is left if the part is larger than the frame: the id was not ours
            return self._encoded(rest) or None
        if self.batches:
            self._counts.saved_frames += len(frame.batch.events) - 1
            self._counts.saved_bytes += frame.saved_bytes
        return self._bytes_of(frame)

    def _bytes_of(self, frame: Frame) -> bytes:
        if self._is_plain:
            return frame.plain
        return frame.encoded(batches=self.batches, chunked=False, gzipped=self.gzipped)

    def _encoded(self, block: bytes) -> bytes:
        """Return a block that is no frame as the client gets it. It is short, and not worth compressing."""
        return stored(block) if self.gzipped else block

    def _sent(self, data: bytes) -> bytes:
        self._counts.bytes += len(data)
        return data

    def _empty_queue(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass

    def _take_waiting(self) -> bool:
        """Empty the queue. Return whether a frame was in it that was not handed out."""
        is_waiting = False
        try:
            while True:
                reference = self._queue.get_nowait()
                if reference is not None and reference is not _END:
                    frame = reference()
                    # One that was evicted counts, since its position is not known any more.
                    is_waiting = is_waiting or frame is None or frame.position > self.point.position
        except queue.Empty:
            return is_waiting
