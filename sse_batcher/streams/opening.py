"""How a stream begins: what a client asks for, and from where it can go on.

`Openings` has no lock of its own; the hub's lock guards the history.
"""

from __future__ import annotations

from typing import NamedTuple

from ..event import User
from ..reasons import GapReason
from .history import History, ResumePoint, Slice
from .roles import Cursors


class Snapshot(NamedTuple):
    """What a client that begins without a usable cursor is sent first: the state, as of `cursor` or later, in `blocks`.

    The last block has the cursor as its id, the others have none.
    """

    cursor: str
    """Where the history stood before the state was taken."""
    blocks: bytes
    """The state, as the stream sends it."""


class StreamRequest(NamedTuple):
    """What a client asks for. Channels and user were checked before."""

    channels: tuple[str, ...]
    last_event_id: str | None = None
    """The client's cursor, which may be any text. None or empty: it has none."""
    batches: bool = True
    """Whether the client knows batches, or gets a block for each event."""
    snapshot: Snapshot | None = None
    """What a client gets that cannot go on at its cursor."""
    user: User | None = None
    ticket: int | None = None
    """Taken before the app decided what the user may have: a kick after it ends the stream. See `Hub.ticket`."""
    poll: bool = False
    """Whether the stream ends as soon as the client has got something."""
    address: str | None = None
    """Where the request came from: its ``REMOTE_ADDR``. None if that is not known."""
    gzipped: bool = False
    """Whether the bytes of the stream are compressed, as the headers of the response say."""


class Opening(NamedTuple):
    """How a stream begins."""

    point: ResumePoint
    """The client has everything up to it, or gets that with the `state`."""
    resumed: bool = False
    """Whether the client goes on at its own cursor."""
    missed: GapReason | None = None
    """Why it does not, although it has a cursor: it may have missed something."""
    state: bytes = b""
    """The blocks of a snapshot, which come after the first block. The last one has the point as its id."""
    stale: GapReason | None = None
    """Why what came between the state and the point may be missing; None if nothing is."""


class Openings:
    """Finds how streams begin. `cursors` are those of the backend. What ends in ``_locked`` needs the hub's lock."""

    def __init__(self, history: History, cursors: Cursors) -> None:
        self._history = history
        self._cursors = cursors

    def find_locked(self, request: StreamRequest, *, replayed: bool = False) -> Opening:
        """Find how this stream would begin now. `replayed`: see `can_replay`."""
        missed: GapReason | None = None
        if request.last_event_id:
            self._history.expire(self._cursors.now())
            point = self._parsed_locked(request.last_event_id)
            missed = point.refused
            if missed is None and not replayed and not self._history.covers(request.channels, point, request.user):
                missed = "too_old"
            if missed is None:
                return Opening(self.settled_locked(request.channels, request.user, point), resumed=True)
        snapshot = request.snapshot
        if snapshot is None:
            return Opening(ResumePoint(self._history.head), missed=missed)
        point = self._parsed_locked(snapshot.cursor)
        stale = point.refused  # since the state was taken, another history has begun
        begin = ResumePoint(self._history.head) if stale else point
        return Opening(begin, missed=missed, state=snapshot.blocks, stale=stale)

    def settled_locked(self, channels: tuple[str, ...], user: User | None, point: ResumePoint) -> ResumePoint:
        """Return the head, if there is nothing for such a stream between it and the point. Otherwise the point."""
        history = self._history
        is_up_to_date = history.covers(channels, point, user) and not history.has_news(channels, point, user)
        return ResumePoint(history.head) if is_up_to_date and history.head > point.position else point

    def can_replay(self, request: StreamRequest) -> bool:
        """Return whether the backend has what the history no longer has, for a cursor that is too old for the history.

        May wait for the backend, so call it without the lock. Raises `BackendError`.
        """
        assert request.last_event_id, "a cursor that is too old"
        point = self._cursors.parse(request.last_event_id)
        # It was usable a moment ago, and the backend may have begun another history since then.
        return point.refused is None and self.older(request.channels, point, request.user) is not None

    def older(self, channels: tuple[str, ...], point: ResumePoint, user: User | None) -> Slice | None:
        """Return what the backend has after a point that is too old for the history. None if some of it is gone.

        May wait for the backend, so call it without the lock. Raises `BackendError`.
        """
        older = self._cursors.replay(channels, point, user)
        now = self._cursors.now()
        if older is not None and any(self._history.is_expired(frame, now) for frame in older.frames):
            return None
        return older

    def _parsed_locked(self, cursor: str) -> ResumePoint:
        """Read a cursor. It is refused, too, if no frame up to its position was delivered here."""
        point = self._cursors.parse(cursor)
        if point.refused is None and point.position > self._history.head:
            return ResumePoint(refused="malformed")
        return point
