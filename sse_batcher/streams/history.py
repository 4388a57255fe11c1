"""The history: the newest frames, found by channel or user and by position, and where older ones are missing.

Pure: knows no thread, lock or clock. Not thread-safe; the hub's lock guards it.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Container, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from ..event import BROADCAST, EVERY_USER, Audience, User
from ..options import HistoryOptions
from ..reasons import GapReason
from ..wire import Frame, Position

MAX_FLOORS = 50_000
"""How many channels, and how many users, have a floor of their own. Each takes about 230 bytes."""

FRESH_FRAMES = 256
FRESH_BYTES = 2_097_152
"""How many of the newest frames keep their variants (see `Frame.encoded`), and how many bytes of memory these frames
may take without them. Frames that are delivered live are among them. The variants of all frames would take several
times the memory of the frames, and one client could have them made.
"""


Name = TypeVar("Name", str, User)


class ResumePoint(NamedTuple):
    """How far a client has got: a parsed cursor."""

    position: Position = ()
    """The client has every frame up to it."""
    part: int = 0
    """If not 0: of the frame at `position`, the client has only the first `part` events."""
    refused: GapReason | None = None
    """Why the cursor cannot be used: ``epoch`` (it is of another history) or ``malformed``."""


class Slice(NamedTuple):
    """Frames in order, and the position up to which there are no more for this stream."""

    frames: list[Frame]
    position: Position


class Wait(NamedTuple):
    """Since when something waits for a stream."""

    since: int | None
    """The time of the oldest frame that waits, in milliseconds since 1970; None if that is not known."""
    is_longer: bool
    """Whether older frames have waited, and are gone."""


class History:
    """The newest frames, as many as the options allow; the oldest are evicted first, the newest is always kept.

    The *floor* of a channel is the position of the newest frame that was evicted from it. A client has lost nothing as
    long as no floor of its channels is above its position. So a busy channel makes no gap in a quiet one. The floors of
    at most `MAX_FLOORS` channels are remembered, those with the newest evictions; all others have one common floor.

    Users have the same, apart from channels: as many frames again, and floors of their own. So frames for many users
    evict no frame of a channel.
    """

    def __init__(self, options: HistoryOptions, start: Position) -> None:
        self.head = start
        """The position of the newest frame ever, whether it is kept or was lost."""
        self._max_age_ms = None if options.history_age is None else options.history_age * 1000
        self._channels: _Shelf[str] = _Shelf(options, start)
        self._users: _Shelf[User] = _Shelf(options, start)

    def __len__(self) -> int:
        return len(self._channels.frames) + len(self._users.frames)

    @property
    def bytes(self) -> int:
        """The memory that all frames take, roughly, without the variants of the newest ones."""
        return self._channels.bytes + self._users.bytes

    @property
    def oldest(self) -> Frame | None:
        """The oldest frame; None if there is none."""
        oldest = [shelf.frames[0] for shelf in (self._channels, self._users) if shelf.frames]
        return min(oldest, key=_position, default=None)

    def append(self, frame: Frame) -> None:
        """Keep a frame, which is newer than all others, and evict the oldest if there are too many."""
        audience = frame.batch.audience
        if isinstance(audience, str):
            self._channels.append(frame, (audience,))
        else:
            self._users.append(frame, audience)
        self.head = frame.position

    def lose(self, audience: Audience, position: Position) -> None:
        """Note that a frame for this audience, newer than all others, will never come. It counts as evicted."""
        self.head = position
        if isinstance(audience, str):
            self._channels.raise_floor(audience, position)
        elif audience == EVERY_USER:
            self._users.raise_all_floors(position)
        else:
            for user in audience:
                self._users.raise_floor(user, position)

    def expire(self, now_ms: float) -> None:
        """Evict frames older than the age limit, if there is one. `now_ms` is by the clock of the frames' `time`."""
        for shelf in (self._channels, self._users):
            while shelf.frames and self.is_expired(shelf.frames[0], now_ms):
                shelf.evict()

    def is_expired(self, frame: Frame, now_ms: float) -> bool:
        """Return whether a frame, kept here or elsewhere, is older than the age limit. Needs no lock."""
        return self._max_age_ms is not None and frame.time < now_ms - self._max_age_ms

    def covers(self, channels: Iterable[str], point: ResumePoint, user: User | None = None) -> bool:
        """Return whether all frames of these channels, of ``*`` and of the user that came after the point are here."""
        floor = max(map(self._channels.floor, (*channels, BROADCAST)))
        if user is not None:
            floor = max(floor, self._users.floor(user))
        return bool(floor < point.position if point.part else floor <= point.position)

    def has_news(self, channels: Iterable[str], point: ResumePoint, user: User | None = None) -> bool:
        """Return whether `read` would return a frame."""
        newest = [self._channels.newest(channel) for channel in (*channels, BROADCAST)]
        if user is not None:
            newest.append(self._users.newest(user))
        return any(
            found is not None and (found >= point.position if point.part else found > point.position)
            for found in newest
        )

    def read(
        self,
        channels: Iterable[str],
        point: ResumePoint,
        max_frames: int,
        max_bytes: int,
        user: User | None = None,
    ) -> list[Frame]:
        """Return the frames of these channels, of ``*`` and of the user after the point, in order.

        At least one, and as many as fit. First comes the frame that the client has a part of.
        """
        lanes = [*self._channels.find((*channels, BROADCAST)), *self._users.find(() if user is None else (user,))]
        in_order = heapq.merge(*(lane.after(point) for lane in lanes), key=_position)
        return _first(in_order, max_frames, max_bytes)

    def first_after(self, channels: Iterable[str], point: ResumePoint, user: User | None = None) -> Frame | None:
        """Return the first frame that `read` would return; None if there is none."""
        return next(iter(self.read(channels, point, 1, 0, user)), None)

    def newest(self, count: int) -> list[Frame]:
        """Return up to so many of the newest frames, the newest first."""
        shelves = [itertools.islice(reversed(shelf.frames), count) for shelf in (self._channels, self._users)]
        return list(itertools.islice(heapq.merge(*shelves, key=_position, reverse=True), count))

    def wait(self, channels: Iterable[str], point: ResumePoint, user: User | None = None) -> Wait:
        """Return since when something waits for a stream that is behind, at this point.

        If there is nothing after the point, the stream is in the middle of the frame at it.
        """
        if not point.position:  # it was in step with others a moment ago
            return Wait(None, False)
        names = tuple(channels)
        for inclusive in (0, 1):
            frames = self.read(names, ResumePoint(point.position, part=inclusive), 1, 1, user)
            if frames:
                return Wait(frames[0].time, not self.covers(names, point, user))
        return Wait(None, not self.covers(names, point, user))

    def read_all(self, channels: Container[str], point: ResumePoint, max_frames: int, max_bytes: int) -> list[Frame]:
        """As `read`, for so many channels that it is quicker to look at all frames. ``*`` must be among them.

        Without frames for users, which their streams read alone.
        """
        of_channels = (frame for frame in self._channels.after(point) if frame.batch.audience in channels)
        return _first(of_channels, max_frames, max_bytes)

    def gone(self, channels: Iterable[str], point: ResumePoint) -> list[str]:
        """Return those of these channels of which a frame after the point is gone. ``*`` must be named, too."""
        return self._channels.gone(channels, point)


class _Shelf(Generic[Name]):
    """The newest frames of all channels, or of all users, and the floors. Within one budget."""

    def __init__(self, options: HistoryOptions, start: Position) -> None:
        self.frames: deque[Frame] = deque()  # oldest first
        self.bytes = 0
        self._max_frames = options.history_frames
        self._max_bytes = options.history_bytes
        self._fresh = 0  # how many of the newest frames keep their variants
        self._fresh_bytes = 0  # of these frames
        self._lanes: dict[Name, _Lane] = {}
        self._floors: OrderedDict[Name, Position] = OrderedDict()  # in the order of the last eviction
        self._common_floor = start
        self._highest_floor = start

    def append(self, frame: Frame, names: Iterable[Name]) -> None:
        """Keep a frame, and evict the oldest if there are too many."""
        _ = frame.plain  # made here, if it is not made yet; if that fails, nothing has changed
        size = frame.held_bytes
        self.bytes += size
        self.frames.append(frame)
        self._fresh += 1
        self._fresh_bytes += size
        while self._fresh > FRESH_FRAMES or (self._fresh_bytes > FRESH_BYTES and self._fresh > 1):
            stale = self.frames[-self._fresh]
            stale.drop_variants()
            self._fresh -= 1
            self._fresh_bytes -= stale.held_bytes
        for name in names:
            lane = self._lanes.get(name)
            if lane is None:
                lane = self._lanes[name] = _Lane()
            lane.frames.append(frame)
        while len(self.frames) > 1 and (len(self.frames) > self._max_frames or self.bytes > self._max_bytes):
            self.evict()

    def evict(self) -> None:
        """Drop the oldest frame."""
        frame = self.frames.popleft()
        size = frame.held_bytes
        self.bytes -= size
        if self._fresh > len(self.frames):
            self._fresh -= 1
            self._fresh_bytes -= size
        audience = frame.batch.audience
        names: Any = (audience,) if isinstance(audience, str) else audience
        for name in names:
            if self._lanes[name].drop_oldest():
                del self._lanes[name]
            self.raise_floor(name, frame.position)

    def find(self, names: Iterable[Name]) -> list[_Lane]:
        """Return the lanes of these names, as far as they have frames."""
        return [self._lanes[name] for name in names if name in self._lanes]

    def newest(self, name: Name) -> Position | None:
        """Return the position of the newest frame of this name; None if there is none."""
        lane = self._lanes.get(name)
        return None if lane is None else lane.frames[-1].position

    def after(self, point: ResumePoint) -> Iterator[Frame]:
        """Return all frames after the point, and the one that the client has a part of."""
        frames = self.frames
        find = bisect_left if point.part else bisect_right
        return (frames[index] for index in range(find(frames, point.position, key=_position), len(frames)))

    def floor(self, name: Name) -> Position:
        """Return the position up to which frames of this name may be gone."""
        return self._floors.get(name, self._common_floor)

    def raise_floor(self, name: Name, position: Position) -> None:
        """Note that the frame of this name at this position is gone."""
        self._highest_floor = max(self._highest_floor, position)
        # Never lower: a frame that was lost may be newer than one that is evicted after it.
        self._floors[name] = max(position, self.floor(name))
        self._floors.move_to_end(name)
        if len(self._floors) > MAX_FLOORS:
            self._common_floor = max(self._common_floor, self._floors.popitem(last=False)[1])

    def raise_all_floors(self, position: Position) -> None:
        """Note that a frame at this position is gone, and that it is not known whose it was."""
        self._highest_floor = self._common_floor = position
        self._floors.clear()

    def gone(self, names: Iterable[Name], point: ResumePoint) -> list[Name]:
        """Return those of these names of which a frame after the point is gone."""

        def is_gone(floor: Position) -> bool:
            return bool(floor >= point.position if point.part else floor > point.position)

        if not is_gone(self._highest_floor):  # nearly always; saves looking at many names
            return []
        return [name for name in names if is_gone(self.floor(name))]


class _Lane:
    """The frames of one channel or user: a list that is cut off at the front. A position is found by bisection."""

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


def _first(in_order: Iterable[Frame], max_frames: int, max_bytes: int) -> list[Frame]:
    """Return the first frames, as many as fit; at least one, if there is one."""
    frames: list[Frame] = []
    for frame in in_order:
        max_bytes -= len(frame.plain)
        if len(frames) == max_frames or (frames and max_bytes < 0):
            break
        frames.append(frame)
    return frames


def _position(frame: Frame) -> Position:
    return frame.position
