"""Counts: how much was handed to streams, how long they were open, and how long their loop took.

Pure. Each object is written by one thread, the driver of the streams that it counts, or under a lock.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from ..stats import Histogram

LIFETIMES = (1, 5, 15, 30, 60, 120, 300, 900, 1_800, 3_600, 14_400, 86_400)
"""Limits for how long a stream is open, in seconds. Proxies often end one after 30, 60 or 100 s; a lease is 30 minutes;
and few pages are open for longer than a day."""

DELAYS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Limits for how late a loop is, in seconds."""


@dataclass(slots=True, eq=False)
class Counts:
    """What was handed to one stream, or to all streams of a feed."""

    frames: int = 0
    bytes: int = 0
    saved_frames: int = 0
    """How many more frames there would be if each event had been sent alone."""
    saved_bytes: int = 0
    """How many more bytes there would be then."""
    overflows: int = 0
    """How often a client fell so far behind that it was left to read the history."""
    replays: int = 0
    """Streams that went on at the client's cursor."""
    gaps: int = 0
    """How often a client got an ``sse_gap``."""
    undone: int = 0
    """How often a connection was given back to the server, though its stream was about to be detached."""

    def add(self, other: Counts) -> None:
        """Add the other's counts to these."""
        # Not a loop over the fields, which takes five times as long: this is done for each stream that is detached.
        self.frames += other.frames
        self.bytes += other.bytes
        self.saved_frames += other.saved_frames
        self.saved_bytes += other.saved_bytes
        self.overflows += other.overflows
        self.replays += other.replays
        self.gaps += other.gaps
        self.undone += other.undone


class Buckets:
    """How many values were within each of some limits, which rise."""

    __slots__ = ("_counts", "_limits", "_sum")

    def __init__(self, limits: tuple[float, ...]) -> None:
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value. Takes the same time however many were counted."""
        self._counts[bisect_left(self._limits, value)] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        """Return the counts as of now. May be called while another thread adds: at worst, one value is missing."""
        names = [*(f"{limit:g}" for limit in self._limits), "+Inf"]
        return Histogram(buckets=dict(zip(names, self._counts, strict=True)), sum=self._sum)


@dataclass(slots=True, eq=False)
class LoopCounts:
    """What a loop has done for the streams of all its hubs. Written by its thread."""

    delays: Buckets = field(default_factory=lambda: Buckets(DELAYS))
    """By how much it was late, in seconds."""
    yields: int = 0
    """How often it has paused, to give other threads the GIL."""
    yielded: float = 0.0
    """How long these pauses took, in seconds."""
