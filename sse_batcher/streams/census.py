"""The census: which streams are open now, and what was handed to streams, for `ManagerStats`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, NamedTuple

from ..reasons import EndReason
from .counts import Counts
from .history import History
from .open_stream import OpenStream
from .registry import Registry


class Census(NamedTuple):
    """What the hub knows at one moment. Copied under its lock; the rest, which takes longer, is done without it."""

    streams: list[OpenStream]
    counts: Counts
    closed: dict[EndReason, int]
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
            len(history),
            history.bytes,
            None if oldest is None else oldest.time,
        )

    def stats(self, now: float, now_ms: float) -> dict[str, Any]:
        """Return fields of `ManagerStats`. `now` is by the hub's clock, `now_ms` by that of the frames.

        Reads the streams while others write to them. A harmless race: each value was true a moment ago.
        """
        streams = self.streams
        behind = sum(stream.behind for stream in streams)
        return asdict(self.counts) | {
            "history_frames": self.history_frames,
            "history_bytes": self.history_bytes,
            "history_age": 0.0 if self.oldest_ms is None else max(0.0, (now_ms - self.oldest_ms) / 1000),
            "clients": len(streams),
            "clients_by_channel": dict(Counter(channel for stream in streams for channel in stream.channels)),
            "clients_by_state": {"live": len(streams) - behind, "behind": behind},
            "clients_by_transport": {"attached": 0, "detached": 0} | Counter(stream.transport for stream in streams),
            # Not counted apart: a stream is either open or closed.
            "streams_opened": len(streams) + sum(self.closed.values()),
            "streams_closed": self.closed,
            "oldest_stream": max((now - stream.opened_at for stream in streams), default=0.0),
        }
