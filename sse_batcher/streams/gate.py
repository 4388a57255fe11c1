"""The gate: whether a hub takes clients, and how its streams end while it does not.

Knows no lock and no clock. A gate never changes: the hub replaces it in one step, so that threads may look at it
without the hub's lock.
"""

from __future__ import annotations

from typing import NamedTuple

from ..reasons import ByeReason
from .open_stream import OpenStream


class Gate(NamedTuple):
    """The state of a hub. Without arguments: it is open."""

    closing: ByeReason | None = None
    """Why all streams end; None: they do not end, or they end in waves."""
    handover: list[OpenStream] | None = None
    """The streams that are still to end, while they end in waves: see `Handover`. None: they do not."""
    since: float = 0.0
    """When the hub was closed last, or began to end its streams in waves, by its clock."""
    for_good: bool = False
    """Whether the hub never opens again."""

    @property
    def refuses(self) -> bool:
        """Whether no more clients are taken."""
        return self.closing is not None or self.handover is not None

    def close(self, reason: ByeReason, now: float, *, for_good: bool) -> Gate:
        """Return the gate of a hub whose streams all end. If they end already, the reason stays."""
        return Gate(self.closing or reason, None, now, self.for_good or for_good)

    def hand_over(self, streams: list[OpenStream], now: float) -> Gate:
        """Return the gate of a hub whose streams end in waves."""
        return Gate(None, streams, now, self.for_good)

    def may_open(self, now: float, after: float) -> bool:
        """Return whether it is shut, has been so for at least `after` seconds, and may open again."""
        return self.refuses and not self.for_good and now - self.since >= after
