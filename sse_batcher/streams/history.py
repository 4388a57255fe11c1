"""The history: the newest frames, found by channel and position, and where older ones are missing.

Pure: knows no thread, lock or clock. Not thread-safe; the hub's lock guards it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

from ..event import BROADCAST
from ..options import HistoryOptions
from ..reasons import GapReason
from ..wire import Frame, Position

MAX_FLOORS = 10_000
"""How many channels have a floor of their own."""

FRESH_FRAMES = 256
FRESH_BYTES = 2_097_152
"""How many of the newest frames keep their variants (see `Frame.encoded`), and how many bytes of memory these frames
may take without them. Frames that are delivered live are among them. The variants of all frames would take several
times the memory of the frames, and one client could have them made.
"""


class ResumePoint(NamedTuple):
    """How far a client has got: a parsed cursor."""

    position: Position = ()
    """The client has every frame up to it."""
    part: int = 0
    """If not 0: of the frame at `position`, the client has only the first `part` events."""
    refused: GapReason | None = None
    """Why the cursor cannot be used: ``epoch`` (it is of another history) or ``malformed``."""


class Slice(NamedTuple):
    """Frames in order, and the position up to which there are no more for these channels."""

    frames: list[Frame]
    position: Position


class History:
    """The newest frames, as many as the options allow; the oldest are evicted first, the newest is always kept.

    The *floor* of a channel is the position of the newest frame that was evicted from it. A client has lost nothing as
    long as no floor of its channels is above its position. So a busy channel makes no gap in a quiet one. The floors of
    at most `MAX_FLOORS` channels are remembered, those with the newest evictions; all others have one common floor.
    """

    def __init__(self, options: HistoryOptions, start: Position) -> None:
        self.head = start
        """The position of the newest frame ever, whether it is kept or was lost."""
        self._max_frames = options.history_frames
        self._max_bytes = options.history_bytes
        self._max_age_ms = None if options.history_age is None else options.history_age * 1000
        self._frames: deque[Frame] = deque()  # oldest first
        self._bytes = 0
        self._fresh = 0  # how many of the newest frames keep their variants
        self._fresh_bytes = 0  # of these frames
        self._lanes: dict[str, _Lane] = {}
        self._floors: OrderedDict[str, Position] = OrderedDict()  # in the order of the last eviction
        self._common_floor = start
        self._highest_floor = start

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def bytes(self) -> int:
        """The memory that all frames take, roughly, without the variants of the newest ones."""
        return self._bytes

    @property
    def oldest(self) -> Frame | None:
        """The oldest frame; None if there is none."""
        return self._frames[0] if self._frames else None

    def append(self, frame: Frame) -> None:
        """Keep a frame, which is newer than all others, and evict the oldest if there are too many."""
        _ = frame.plain  # made here, if it is not made yet; if that fails, nothing has changed
        size = frame.held_bytes
        self._bytes += size
        self._frames.append(frame)
        self._fresh += 1
        self._fresh_bytes += size
        while self._fresh > FRESH_FRAMES or (self._fresh_bytes > FRESH_BYTES and self._fresh > 1):
            stale = self._frames[-self._fresh]
            stale.drop_variants()
            self._fresh -= 1
            self._fresh_bytes -= stale.held_bytes
        channel = frame.batch.channel
        lane = self._lanes.get(channel)
        if lane is None:
            lane = self._lanes[channel] = _Lane()
        lane.frames.append(frame)
        self.head = frame.position
        while len(self._frames) > 1 and (len(self._frames) > self._max_frames or self._bytes > self._max_bytes):
            self._evict()

    def lose(self, channel: str, position: Position) -> None:
        """Note that a frame of this channel, newer than all others, will never come. It counts as evicted."""
        self.head = position
        self._raise_floor(channel, position)

    def expire(self, now_ms: float) -> None:
        """Evict frames older than the age limit, if there is one. `now_ms` is by the clock of the frames' `time`."""
        while self._frames and self.is_expired(self._frames[0], now_ms):
            self._evict()

    def is_expired(self, frame: Frame, now_ms: float) -> bool:
        """Return whether a frame, kept here or elsewhere, is older than the age limit. Needs no lock."""
        return self._max_age_ms is not None and frame.time < now_ms - self._max_age_ms

    def covers(self, channels: Iterable[str], point: ResumePoint) -> bool:
        """Return whether every frame of these channels, and of ``*``, that came after the point is still here."""
        floor = max(self._floors.get(channel, self._common_floor) for channel in (*channels, BROADCAST))
        return bool(floor < point.position if point.part else floor <= point.position)

    def read(self, channels: Iterable[str], point: ResumePoint, max_frames: int, max_bytes: int) -> list[Frame]:
        """Return the frames of these channels, and of ``*``, after the point, in order.

        At least one, and as many as fit. First comes the frame that the client has a part of.
        """
        lanes = [self._lanes[channel] for channel in (*channels, BROADCAST) if channel in self._lanes]
        frames: list[Frame] = []
        for frame in heapq.merge(*(lane.after(point) for lane in lanes), key=_position):
            max_bytes -= len(frame.plain)
            if len(frames) == max_frames or (frames and max_bytes < 0):
                break
            frames.append(frame)
        return frames

    def read_all(self, channels: Container[str], point: ResumePoint, max_frames: int, max_bytes: int) -> list[Frame]:
        """As `read`, for so many channels that it is quicker to look at all frames. ``*`` must be among them."""
        find = bisect_left if point.part else bisect_right
        frames: list[Frame] = []
        for index in range(find(self._frames, point.position, key=_position), len(self._frames)):
            frame = self._frames[index]
            if frame.batch.channel in channels:
                max_bytes -= len(frame.plain)
                if len(frames) == max_frames or (frames and max_bytes < 0):
                    break
                frames.append(frame)
        return frames

    def gone(self, channels: Iterable[str], point: ResumePoint) -> list[str]:
        """Return those of these channels of which a frame after the point is gone. ``*`` must be named, too."""

        def is_gone(floor: Position) -> bool:
            return bool(floor >= point.position if point.part else floor > point.position)

        if not is_gone(self._highest_floor):  # nearly always; saves looking at many channels
            return []
        return [channel for channel in channels if is_gone(self._floors.get(channel, self._common_floor))]

    def _evict(self) -> None:
        frame = self._frames.popleft()
        size = frame.held_bytes
        self._bytes -= size
        if self._fresh > len(self._frames):
            self._fresh -= 1
            self._fresh_bytes -= size
        channel = frame.batch.channel
        if self._lanes[channel].drop_oldest():
            del self._lanes[channel]
        self._raise_floor(channel, frame.position)

    def _raise_floor(self, channel: str, position: Position) -> None:
        self._highest_floor = max(self._highest_floor, position)
        # Never lower: a frame that was lost may be newer than one that is evicted after it.
        self._floors[channel] = max(position, self._floors.get(channel, self._common_floor))
        self._floors.move_to_end(channel)
        if len(self._floors) > MAX_FLOORS:
            self._common_floor = max(self._common_floor, self._floors.popitem(last=False)[1])


class _Lane:
    """The frames of one channel: a list that is cut off at the front, so that a position is found by bisection."""

    __slots__ = ("frames", "start")

    def __init__(self) -> None:
        self.frames: list[Any] = []  # before `start`, None instead of frames, so that their memory is freed at once
        self.start = 0

    def after(self, point: ResumePoint) -> Iterator[Frame]:
        """Return the frames after the point, and the one that the client has a part of."""
        find = bisect_left if point.part else bisect_right
        first = find(self.frames, point.position, self.start, key=_position)
        return (self.frames[index] for index in range(first, len(self.frames)))

    def drop_oldest(self) -> bool:
        """Forget the oldest frame. Return whether none is left."""
        self.frames[self.start] = None
        self.start += 1
        if 2 * self.start > len(self.frames):
            del self.frames[: self.start]
            self.start = 0
        return not self.frames


def _position(frame: Frame) -> Position:
    return frame.position
