"""The history: the newest frames, found by channel and position, and what is known of the older ones.

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
"""How many of the newest frames, at most, keep the variants of themselves that clients need, and the memory of these
frames themselves. What is delivered live is among them. The variants of all frames would take several times the memory
of the frames, and a single client could have them made.
"""


class ResumePoint(NamedTuple):
    """How far a client has got, as it says itself: everything up to `position`.

    With a `part`, it has the first so many events of the frame at `position`, and not yet all of them. `refused` says
    why the cursor was none: ``epoch`` (of another history) or ``malformed``.
    """

    position: Position = ()
    part: int = 0
    refused: GapReason | None = None


class Slice(NamedTuple):
    """Frames in order, and up to which position there are no more for who asked."""

    frames: list[Frame]
    position: Position


class History:
    """Frames by count and bytes, the oldest evicted first; the newest one is always kept.

    The *floor* of a channel is the position of the newest frame that was evicted from it. Who has everything up to a
    position has missed nothing that is gone, as long as no floor of a channel that he asks for is above it: a busy
    channel makes no gap in a quiet one. Channels are forgotten in the order of their last eviction; those that are
    have one floor in common.
    """

    def __init__(self, options: HistoryOptions, start: Position) -> None:
        self.head = start
        """The position of the newest frame that there ever was."""
        self._max_frames = options.history_frames
        self._max_bytes = options.history_bytes
        self._max_age_ms = None if options.history_age is None else options.history_age * 1000
        self._frames: deque[Frame] = deque()  # oldest first
        self._bytes = 0
        self._fresh = 0  # the newest so many have their variants
        self._fresh_bytes = 0
        self._lanes: dict[str, _Lane] = {}
        self._floors: OrderedDict[str, Position] = OrderedDict()  # in the order of the last eviction
        self._common_floor = start
        self._highest_floor = start

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def bytes(self) -> int:
        """About the memory that all frames kept take, without the variants of the newest ones."""
        return self._bytes

    @property
    def oldest(self) -> Frame | None:
        """The oldest frame kept."""
        return self._frames[0] if self._frames else None

    def append(self, frame: Frame) -> None:
        """Keep a frame, which is newer than all others, and evict what is too much."""
        _ = frame.plain  # made here, if it is not yet; if that fails, nothing was kept
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
        """A frame of this channel, the newest, will never come: as if it had been evicted at once."""
        self.head = position
        self._raise_floor(channel, position)

    def expire(self, now_ms: float) -> None:
        """Evict what is older than the age limit, if there is one. `now_ms`: by the clock of the frames' `time`."""
        while self._frames and self.is_expired(self._frames[0], now_ms):
            self._evict()

    def is_expired(self, frame: Frame, now_ms: float) -> bool:
        """Whether this frame, kept here or elsewhere, is older than the age limit, if there is one."""
        return self._max_age_ms is not None and frame.time < now_ms - self._max_age_ms

    def covers(self, channels: Iterable[str], point: ResumePoint) -> bool:
        """Whether everything after the cursor is here, for who asks for these channels (and ``*``, as all do)."""
        floor = max(self._floors.get(channel, self._common_floor) for channel in (*channels, BROADCAST))
        return bool(floor < point.position if point.part else floor <= point.position)

    def read(self, channels: Iterable[str], point: ResumePoint, max_frames: int, max_bytes: int) -> list[Frame]:
        """The frames after the point, and first the one that it has a part of. In order, one and as many as fit."""
        lanes = [self._lanes[channel] for channel in (*channels, BROADCAST) if channel in self._lanes]
        frames: list[Frame] = []
        for frame in heapq.merge(*(lane.after(point) for lane in lanes), key=_position):
            max_bytes -= len(frame.plain)
            if len(frames) == max_frames or (frames and max_bytes < 0):
                break
            frames.append(frame)
        return frames

    def read_all(self, channels: Container[str], point: ResumePoint, max_frames: int, max_bytes: int) -> list[Frame]:
        """As `read`, for who asks for so many channels (``*`` is one) that it is shorter to look at all frames."""
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
        """Of which of these channels something after the cursor is not here any more. ``*`` is one of them."""

        def is_gone(floor: Position) -> bool:
            return bool(floor >= point.position if point.part else floor > point.position)

        if not is_gone(self._highest_floor):  # nearly always, however many they are
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
    """The frames of one channel: a list that is cut off at the front, so that a position is found by halving."""

    __slots__ = ("frames", "start")

    def __init__(self) -> None:
        self.frames: list[Any] = []  # frames; before `start` None, so that they are let go at once
        self.start = 0

    def after(self, point: ResumePoint) -> Iterator[Frame]:
        find = bisect_left if point.part else bisect_right
        first = find(self.frames, point.position, self.start, key=_position)
        return (self.frames[index] for index in range(first, len(self.frames)))

    def drop_oldest(self) -> bool:
        """Forget the oldest frame. Whether that was the last one."""
        self.frames[self.start] = None
        self.start += 1
        if 2 * self.start > len(self.frames):
            del self.frames[: self.start]
            self.start = 0
        return not self.frames


def _position(frame: Frame) -> Position:
    return frame.position
