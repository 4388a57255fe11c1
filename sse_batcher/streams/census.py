"""The census: which streams are open now, and what was handed to streams, for `ManagerStats`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, NamedTuple

from ..reasons import EndReason
from ..stats import Histogram
from ..wire import Frame
from .counts import Counts, LoopCounts
from .history import History, ResumePoint
from .open_stream import OpenStream
from .registry import Registry

LOOKUPS = 100
"""For how many streams at most the first frame is looked up that waits for one. The lock is held meanwhile."""


class Census(NamedTuple):
    """What the hub knows at one moment. Copied under its lock; the rest, which takes longer, is done without it."""

    streams: list[OpenStream]
    counts: Counts
    closed: dict[EndReason, int]
    lifetimes: Histogram
    history_frames: int
    history_bytes: int
    oldest_ms: int | None
    """The time of the oldest frame in the history, in milliseconds since 1970; None if there is none."""

    @classmethod
    def take_locked(cls, registry: Registry, history: History) -> Census:
        """Copy what the hub's lock guards."""
        oldest = history.oldest
        return cls(
            registry.streams(),
            registry.counts(),
            registry.closed(),
            registry.lifetimes(),
            len(history),
            history.bytes,
            None if oldest is None else oldest.time,
        )

    def waiting(self) -> list[tuple[OpenStream, ResumePoint]]:
        """Return the streams for which frames may wait, and their points, the one furthest behind first.

        Reads the streams while others write to them. A harmless race: each value was true a moment ago.
        """
        waiting = [(stream, stream.point) for stream in self.streams if stream.is_waiting]
        # Without a position, it is in step with others by now, and has what they have.
        waiting = [(stream, point) for stream, point in waiting if point.position != ()]
        return sorted(waiting, key=lambda each: each[1].position)

    def stats(self, now: float, now_ms: float, first_waiting: Frame | None, loop: LoopCounts) -> dict[str, Any]:
        """Return fields of `ManagerStats`. `now` is by the hub's clock, `now_ms` by that of the frames.

        `first_waiting`: what `first_waiting_locked` has returned. `loop`: the counts of the loop that drives detached
        streams. Reads the streams while others write to them, as `waiting`.
        """
        streams = self.streams
        behind = sum(stream.behind for stream in streams)
        return asdict(self.counts) | {
            "history_frames": self.history_frames,
            "history_bytes": self.history_bytes,
            "history_age": _age(self.oldest_ms, now_ms),
            "clients": len(streams),
            "clients_by_channel": dict(Counter(channel for stream in streams for channel in stream.channels)),
            "clients_by_state": {"live": len(streams) - behind, "behind": behind},
            "clients_by_transport": {"attached": 0, "detached": 0} | Counter(stream.transport for stream in streams),
            # Not counted apart: a stream is either open or closed.
            "streams_opened": len(streams) + sum(self.closed.values()),
            "streams_closed": self.closed,
            "lifetimes": self.lifetimes,
            "oldest_stream": max((now - stream.opened_at for stream in streams), default=0.0),
            "client_lag": _age(None if first_waiting is None else first_waiting.time, now_ms),
            "loop_delay": loop.delays.histogram(),
            "gil_yields": loop.yields,
            "gil_yielded": loop.yielded,
        }


def first_waiting_locked(waiting: list[tuple[OpenStream, ResumePoint]], history: History) -> Frame | None:
    """Return the oldest frame in the history that one of these streams was not handed; None if there is none.

    `waiting` is what `Census.waiting` has returned. Needs the hub's lock.
    """
    oldest: Frame | None = None
    for stream, point in waiting[:LOOKUPS]:
        if oldest is not None and point.position >= oldest.position:
            break  # what waits for this stream, and for all that follow, is newer
        found = history.first_after(stream.channels, point, stream.info.user)
        if found is not None and (oldest is None or found.position < oldest.position):
            oldest = found
    return oldest


def _age(time_ms: int | None, now_ms: float) -> float:
    """Return how long ago a frame was delivered, in seconds; 0 for None."""
    return 0.0 if time_ms is None else max(0.0, (now_ms - time_ms) / 1000)
