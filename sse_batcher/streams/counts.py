"""Counts: how much was handed to streams.

Pure. Each object is written by one thread, the driver of the streams that it counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


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
        for item in fields(Counts):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
