"""Control blocks: what the hub itself says to a client. ``sse_open``, ``sse_gap``, ``sse_busy`` and ``sse_bye``.

Thread-safe, and takes no lock.
"""

from __future__ import annotations

import random
from collections.abc import Sized
from functools import lru_cache
from typing import Any

from .. import wire
from ..options import ClientOptions
from ..reasons import BusyReason, ByeReason, GapReason
from .history import ResumePoint
from .roles import Cursors

RETRY_AFTER_LEASE_MS = (100, 1_000)
RETRY_AT_LIMIT_MS = (10_000, 30_000)
_RETRY_MS: dict[str | None, tuple[int, int]] = {
    "lease": RETRY_AFTER_LEASE_MS,
    "limit": RETRY_AT_LIMIT_MS,
    "threads": RETRY_AT_LIMIT_MS,
    "http2": RETRY_AT_LIMIT_MS,
    "snapshot": RETRY_AT_LIMIT_MS,
    "error": RETRY_AT_LIMIT_MS,
}
"""The range of milliseconds that a client waits before it comes back, if its stream was refused or ended for one of
these reasons."""


class ControlBlocks:
    """Makes the control blocks of one hub. `open_streams` and `open_polls` have as many elements as are open."""

    def __init__(self, options: ClientOptions, cursors: Cursors, open_streams: Sized, open_polls: Sized) -> None:
        self._heartbeat = options.heartbeat
        self._retry_option = options.retry_ms
        self._cursors = cursors
        self._open_streams = open_streams
        self._open_polls = open_polls
        self.return_ms: tuple[int, int] | None = None
        """The range of milliseconds that clients wait whose streams end in waves. Set by `Handover`; None: no waves."""

    def opening(
        self,
        point: ResumePoint,
        missed: GapReason | None,
        *,
        channels: tuple[str, ...] | None = None,
        named: bool = True,
        poll: bool = False,
    ) -> bytes:
        """Make the first block of a stream with these channels; None: the block after a gap in a stream.

        ``sse_gap`` if the client has `missed` something, else ``sse_open``. `named`: with the point as its id. `poll`:
        the stream is a poll, so the client comes back often.
        """
        id = self._id(point) if named else None
        retry = self._poll_retry_ms() if poll else self._retry_ms(missed)
        data = _opening_data(self._heartbeat, channels, missed)
        return wire.control("sse_open" if missed is None else "sse_gap", data, retry=retry, id=id)

    def bye(self, point: ResumePoint, reason: ByeReason, *, named: bool = True) -> bytes:
        """Make the last block of a stream. `named`: with the point as its id."""
        return self._block("sse_bye", self._id(point) if named else None, reason)

    def busy(self, reason: BusyReason, cursor: str | None) -> bytes:
        """Make the only block of a stream that cannot be opened now. Its id is the `cursor`, if that is well-formed."""
        return self._block("sse_busy", self._cursors.normalize(cursor) if cursor else None, reason)

    def _id(self, point: ResumePoint) -> str:
        return self._cursors.format(point.position) + (f".{point.part}" if point.part else "")

    def _block(self, event: str, id: str | None, reason: BusyReason | ByeReason) -> bytes:
        return wire.control(event, wire.control_data({"reason": reason}), retry=self._retry_ms(reason), id=id)

    def _retry_ms(self, reason: str | None) -> int:
        if reason in _RETRY_MS:
            return random.randint(*_RETRY_MS[reason])
        if self._retry_option is not None:
            return self._retry_option
        if reason == "shutdown" and self.return_ms is not None:
            return random.randint(*self.return_ms)
        # Browsers add no jitter. And the more clients there are, the longer their return has to be spread.
        return random.randint(1_000, 2_000 + len(self._open_streams))

    def _poll_retry_ms(self) -> int:
        # From 500, since Firefox knows no less. A broadcast ends all polls at once: the more there are, the longer the
        # time over which their return has to be spread.
        return self._retry_option or random.randint(500, 1_000 + len(self._open_polls))


@lru_cache(maxsize=256, typed=True)  # 15 and 15.0 are equal, and their JSON is not
def _opening_data(heartbeat: float, channels: tuple[str, ...] | None, missed: GapReason | None) -> str:
    """Return the JSON of the first block of a stream. Nearly all streams of a process have one of few."""
    data: dict[str, Any] = {"heartbeat": heartbeat}
    if channels is not None:
        data["channels"] = channels
    if missed is not None:
        data["reason"] = missed
    return wire.control_data(data)
