"""Counters, as frozen values.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .reasons import BatchReason, EndReason, RefusalReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """A histogram of durations, in seconds."""

    buckets: Mapping[str, int] = field(default_factory=dict)
    """How many there were, by the smallest limit that they did not exceed, such as ``"0.5"`` or ``"60"``; ``"+Inf"``:
    they exceeded all of them. Each is counted once."""
    sum: float = 0.0
    """The sum of all durations, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherStats:
    """What a batcher has done since it was made, or since this process was forked.

    Of the events accepted, each is in exactly one place: ``enqueued == replaced + failed + pending_events +
    delivered``.
    """

    enqueued: int = 0
    """Events accepted."""
    replaced: int = 0
    """Events that a newer one of the same key replaced before they were sent."""
    refused: int = 0
    """Calls that raised; their events were not accepted."""
    failed: int = 0
    """Events in batches that the sink or backend did not take."""
    batches: int = 0
    """Batches that it took; a lone event counts as one."""
    by_reason: Mapping[BatchReason, int] = field(default_factory=dict)
    """These batches by the reason for which they were closed."""
    pending_events: int = 0
    """Events accepted and not yet taken by the backend."""
    pending_bytes: int = 0
    """Their data on the wire, plus 200 bytes each and 100 for each of their users."""
    pending_age: float = 0.0
    """Seconds since the oldest of them was accepted, its window included. Of a window, the first event counts, also if
    a newer one has replaced it."""
    publishing_for: float = 0.0
    """Seconds for which the backend has been taking the present batch; 0 if there is none."""
    thread_restarts: int = 0
    """How often a dead thread was started again."""

    def as_dict(self) -> dict[str, Any]:
        """Return a plain dictionary, which `json.dumps` accepts."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerStats(BatcherStats):
    """What a manager has done, and which clients are connected now."""

    frames: int = 0
    """Frames handed to streams, summed over all clients."""
    bytes: int = 0
    """All bytes handed to streams, control blocks and heartbeats included."""
    saved_frames: int = 0
    """How many more frames there would be if each event had been sent alone."""
    saved_bytes: int = 0
    """How many more bytes there would be then. Negative if the JSON around batches outweighs what they save."""
    clients: int = 0
    """Streams that are open now."""
    clients_by_channel: Mapping[str, int] = field(default_factory=dict)
    """These by channel; a stream with several channels is counted in each."""
    clients_by_state: Mapping[str, int] = field(default_factory=dict)
    """These by ``live`` and ``behind``."""
    clients_by_transport: Mapping[str, int] = field(default_factory=dict)
    """These by ``attached`` (each holds a thread of the server) and ``detached``."""
    streams_opened: int = 0
    """Streams that were opened, polls included: as many as are open now or were closed."""
    streams_closed: Mapping[EndReason, int] = field(default_factory=dict)
    """Streams that have ended, by reason, polls included: ``polled`` are polls that were answered."""
    streams_refused: Mapping[RefusalReason, int] = field(default_factory=dict)
    """Requests that got no stream, by reason. Statuses other than 200 are counted at the extension's own URL only."""
    lifetimes: Histogram = field(default_factory=Histogram)
    """For how long the streams that have ended were open, without polls."""
    oldest_stream: float = 0.0
    """Seconds for which the oldest open stream has been open."""
    client_lag: float = 0.0
    """Seconds since the delivery of the oldest frame that an open stream has not been handed yet; 0 if there is none.
    Only frames that are in the history in memory are considered."""
    overflows: int = 0
    """How often a client fell so far behind that it had to read the history."""
    replays: int = 0
    """Streams that continued where the client had stopped."""
    gaps: int = 0
    """How often a client got ``sse_gap``: it may have missed something."""
    undone: int = 0
    """How often a stream that was about to be detached from the server's thread had to stay attached."""
    loop_delay: Histogram = field(default_factory=Histogram)
    """By how much the loop of the detached streams is late, five times a second: for how long it has been at work
    without a wait; or, after a wait, for how long another thread, or another process, has kept it from going on."""
    gil_yields: int = 0
    """How often the loop has paused between sends, to give other threads the GIL."""
    gil_yielded: float = 0.0
    """Seconds that these pauses took. A pause of which no other thread makes use takes 0.1 ms."""
    history_frames: int = 0
    """Frames kept for clients that return or are behind."""
    history_bytes: int = 0
    """The memory that they take, approximately."""
    history_age: float = 0.0
    """Seconds since the oldest of them."""
    backend_silent: float = 0.0
    """For how many seconds an answer of the backend has been due; 0 in memory."""
    backend_answered: float = 0.0
    """Seconds since its last answer, or, without one, since it was first asked; 0 if it was never asked."""
    ignored: int = 0
    """Entries in the Redis stream that were ignored: other programs wrote them, or they could not be read."""
    signals_dropped: int = 0
    """Signals not sent, and log lines not written, because the app thread's queue was full."""
