"""What `load` counts, and its report.

Pure: times are numbers that the caller passes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .text import printable, size

_RESOLUTION = 10_000
"""Delays are kept in steps of a tenth of a millisecond."""

MAX_DIGITS = 20
"""No number of a cursor is longer."""


class Frames:
    """Which frames came, when each one came first, and how long the other clients then waited for it."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, float | None]] = {}
        self._delays: Counter[int] = Counter()
        self._since_closed: Counter[int] = Counter()
        self.is_over = False
        """Whether frames that no client has got yet are left out from now on."""

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, id: str) -> bool:
        return id in self._first

    def add(self, id: str, at: float, closed: float | None) -> None:
        """Note a frame that no client had before. `closed`: when the server says that it has closed the batch."""
        if not self.is_over:
            self._first[id] = at, closed

    def arrived(self, id: str, at: float) -> bool:
        """Note that a client got this frame. Returns False for a frame that is left out."""
        found = self._first.get(id)
        if found is None:
            return False
        first, closed = found
        self._delays[round((at - first) * _RESOLUTION)] += 1
        if closed is not None:
            self._since_closed[round((at - closed) * _RESOLUTION)] += 1
        return True

    def ids(self) -> list[str]:
        """Return the ids of all frames."""
        return list(self._first)

    def delays(self) -> dict[str, float] | None:
        """Return percentiles in milliseconds, of all clients that got a frame, the first one included."""
        return percentiles(self._delays)

    def since_closed(self) -> dict[str, float] | None:
        """Return the same since the server closed the batches."""
        return percentiles(self._since_closed)


def order(id: str) -> tuple[str, tuple[Any, ...]]:
    """Return the history that a cursor is of, and what sorts cursors of one history: its numbers, and the part."""
    frame, _, part = id.partition(".")
    epoch, *numbers = frame.split("-")
    return epoch, (tuple(map(_number, numbers)), _number(part) if part else math.inf)


def _number(text: str) -> int:
    """Return what a part of a cursor says, 0 for one that is not ours."""
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What one client got since its stream began, or since its newest gap."""

    begin: str
    """The cursor after which it began."""
    last: str
    """That of the newest frame; empty: it got none."""
    count: int
    """How many frames it got."""
    is_open: bool
    """Whether it was open at the end, so that it should have all frames."""


def losses(frames: Frames, clients: Iterable[Seen]) -> Counter[int]:
    """Return how many clients have lost how many frames: those that another client of the same history got."""
    histories: dict[str, list[Any]] = {}
    for epoch, place in sorted(map(order, frames.ids())):
        histories.setdefault(epoch, []).append(place)
    lost: Counter[int] = Counter()
    for seen in clients:
        epoch, begin = order(seen.begin)
        places = histories.get(epoch, [])
        end = len(places) if seen.is_open else bisect_right(places, order(seen.last or seen.begin)[1])
        missing = end - bisect_right(places, begin) - seen.count
        if missing > 0:
            lost[missing] += 1
    return lost


def percentiles(counts: Mapping[int, int]) -> dict[str, float] | None:
    """Return percentiles in milliseconds of delays that were counted by their tenths of a millisecond."""
    total = sum(counts.values())
    if not total:
        return None
    wanted = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    found: dict[str, float] = {}
    seen = 0
    for step in sorted(counts):
        seen += counts[step]
        for name, share in wanted.items():
            if name not in found and seen >= share * total:
                found[name] = step * 1_000 / _RESOLUTION
    return found


class Tally:
    """Everything that is counted while `load` runs."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.begun = 0
        self.opened = 0
        self.open = 0
        self.refused: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()
        self.frames = Frames()
        self.received = 0  # frames, over all clients
        self.bytes = 0
        self.opening: Counter[int] = Counter()  # seconds from the beginning of a connection to sse_open
        self.first_begun: float | None = None
        self.last_opened: float | None = None

    def began(self, at: float) -> None:
        """A client begins to connect."""
        self.begun += 1
        self.first_begun = at if self.first_begun is None else self.first_begun

    def has_opened(self, began: float, at: float) -> None:
        """A client has got ``sse_open``, or ``sse_gap`` in its place."""
        self.opened += 1
        self.open += 1
        self.last_opened = at
        self.opening[round((at - began) * _RESOLUTION)] += 1

    @property
    def settled(self) -> int:
        """How many clients were opened or refused."""
        return self.opened + sum(self.refused.values())

    def progress(self) -> str:
        """Return one line about what happens now."""
        refused = sum(self.refused.values())
        ended = sum(self.ended.values())
        return (
            f"{self.open:,} open of {self.wanted:,}, {self.begun - self.settled} opening, {refused:,} refused, "
            f"{ended:,} ended, {len(self.frames):,} frames, {size(self.bytes)}"
        )


def report(tally: Tally, *, url: str, seconds: float, busy: float, lost: Counter[int]) -> dict[str, Any]:
    """Return what was measured, for JSON. `lost`: how many clients have lost how many frames. `busy`: of one core."""
    span = (tally.last_opened or 0.0) - (tally.first_begun or 0.0)
    return {
        "url": url,
        "seconds": round(seconds, 1),
        "busy": round(busy, 2),
        "clients": {
            "wanted": tally.wanted,
            "opened": tally.opened,
            "open_at_end": tally.open,
            "refused": dict(tally.refused.most_common()),
            "ended": dict(tally.ended.most_common()),
        },
        "opened_per_second": round(tally.opened / span, 1) if tally.opened and span > 0 else None,
        "opening_ms": percentiles(tally.opening),
        "frames": {
            "different": len(tally.frames),
            "received": tally.received,
            "lost": sum(missing * count for missing, count in lost.items()),
            "clients_with_losses": sum(lost.values()),
            "gaps": dict(tally.gaps.most_common()),
        },
        "delay_ms": tally.frames.delays(),
        "since_batch_closed_ms": tally.frames.since_closed(),
        "bytes": tally.bytes,
    }


def as_table(said: dict[str, Any]) -> list[str]:
    """Return the lines for people."""
    clients, frames = said["clients"], said["frames"]
    rate = said["opened_per_second"]
    return [
        f"{said['url']}, {said['seconds']:g} s",
        _row(
            "streams opened", f"{clients['opened']:,} of {clients['wanted']:,}{f', {rate:,} a second' if rate else ''}"
        ),
        _row("  time to sse_open", _milliseconds(said["opening_ms"])),
        _row("refused", _reasons(clients["refused"])),
        _row("ended by the server", _reasons(clients["ended"])),
        _row("open at the end", f"{clients['open_at_end']:,}"),
        _row("frames", f"{frames['different']:,} different, {frames['received']:,} received"),
        _row(
            "lost frames",
            f"{frames['lost']:,}, by {frames['clients_with_losses']:,} clients" if frames["lost"] else "0",
        ),
        _row("gaps", _reasons(frames["gaps"])),
        _row("delay after the first", _milliseconds(said["delay_ms"])),
        _row("  since batch closed", _milliseconds(said["since_batch_closed_ms"])),
        _row("received", size(said["bytes"])),
        _row("this command was busy", f"{said['busy']:.0%} of a core{_caution(said['busy'])}"),
    ]


def _row(label: str, value: str) -> str:
    return f"  {label:<24}{value}"


def _caution(busy: float) -> str:
    return ": the delays are partly its own" if busy > 0.5 else ""


def _reasons(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    shown = ", ".join(f"{printable(reason)}: {count:,}" for reason, count in counts.items())
    return f"{total:,} ({shown})" if total else "0"


def _milliseconds(found: Mapping[str, float] | None) -> str:
    return (
        "nothing to measure" if found is None else ", ".join(f"{name} {value:,.1f} ms" for name, value in found.items())
    )
