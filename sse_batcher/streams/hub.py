"""The hub: which clients get which frames.

`deliver` is called by one thread at a time, the backend's; everything else from any thread. `_lock` guards the
members, the listeners, the history and the dismissals. Listeners are told of frames outside it.

A *member* is an open stream. A *listener* is told of each frame of its channels: a client with a queue of its own,
which is both, or a feed, which reads the history for many members at once.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

from .. import wire
from ..errors import BackendError, ClosedError, TooManyClientsError
from ..event import BROADCAST
from ..options import ClientOptions, HistoryOptions
from ..reasons import BusyReason, ByeReason, EndReason, GapReason
from ..runtime.locks import new_lock, run_if_free
from .client import Client, ClientInfo, Counts, OpenStream
from .dismissals import Dismissals
from .history import History, ResumePoint, Slice
from .roles import Cursors, Feed, Listener

RETRY_AFTER_LEASE_MS = (100, 1_000)
RETRY_AT_LIMIT_MS = (10_000, 30_000)
_RETRY_MS = {"lease": RETRY_AFTER_LEASE_MS} | dict.fromkeys(
    ("limit", "threads", "http2", "snapshot"), RETRY_AT_LIMIT_MS
)
"""When a client comes back that was refused, or sent away, for one of these reasons."""


class Snapshot(NamedTuple):
    """What a client that begins anew is sent first: the state, as of `cursor` or later, in `blocks`.

    The last block has the cursor as its id, the others have none.
    """

    cursor: str
    blocks: bytes


class Farewell(NamedTuple):
    """How a stream ended. `reason` is ``left``, or that of its ``sse_bye``; `duration` is in seconds.

    `frames` and `bytes` were handed to the stream.
    """

    reason: EndReason
    duration: float
    frames: int
    bytes: int


class Hub:
    """The open clients of one process, and the history that they read."""

    def __init__(
        self,
        options: ClientOptions,
        history: HistoryOptions,
        cursors: Cursors,
        *,
        on_connect: Callable[[ClientInfo], None],
        on_disconnect: Callable[[ClientInfo, Farewell], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._options = options
        self._cursors = cursors
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._lock = new_lock()
        # Notified after a client has left. It has a lock of its own, since waiting releases a lock without a look at
        # `_leaving`. Taken before `_lock`, never inside it.
        self._left_lock = new_lock()
        self._left = threading.Condition(self._left_lock)
        self._members: dict[OpenStream, None] = {}
        self._users: dict[str | int, dict[OpenStream, None]] = {}
        self._listeners: dict[str, dict[Listener, None]] = {}  # by channel; all of them under "*"
        self._history = History(history, cursors.start)
        self._dismissals = Dismissals()
        self.closing: ByeReason | None = None
        """Why no more clients are taken, and all streams end; None while that is not so. Changed under the lock. Code
        without the lock looks at it once: it may be None again at any moment."""
        self._closed_for_good = False  # these two under the lock
        self._closed_at = 0.0
        self._numbers = itertools.count(1)
        # Clients to be forgotten, and why. Leaving must not wait for the lock: the garbage collector may end a stream
        # on a thread that holds it. Whoever holds it forgets them right after it is released.
        self._leaving: deque[tuple[OpenStream, EndReason]] = deque()
        self._farewells: deque[tuple[ClientInfo, Farewell]] = deque()  # forgotten, and not told of yet
        self.thread_restarts = 0
        """How often a thread that drives its streams was started again. By that thread."""
        self._replays = 0
        self._gone = Counts()  # of listeners that are no more

    def deliver(self, frame: wire.Frame) -> None:
        """Keep a frame, and tell the listeners of its channel."""
        _ = frame.plain  # encoded before the lock is taken, not while everybody waits for it
        # Under one lock: a client that comes meanwhile is either listed, or finds the frame in the history.
        with _Tidy(self), self._lock:
            self._history.append(frame)
            listeners = self._listening(frame.batch.channel)
        for listener in listeners:
            listener.offer(frame)

    def lose(self, channel: str, position: wire.Position, reason: GapReason = "publish_failed") -> None:
        """Let all clients of this channel know that they have missed something, and those that return later, too."""
        with _Tidy(self), self._lock:
            self._history.lose(channel, position)
            listeners = self._listening(channel)
            for listener in listeners:
                # Here, or one that reads the history at this moment is told of another reason.
                listener.lose(channel, position, reason)
        for listener in listeners:
            listener.fall_behind()

    def connect(
        self,
        channels: tuple[str, ...],
        last_event_id: str | None = None,
        *,
        batches: bool = True,
        snapshot: Snapshot | None = None,
        user: str | int | None = None,
        ticket: int | None = None,
    ) -> Client:
        """Add a client. It reads the history from its cursor on, and is live where there is nothing more to read.

        One that cannot go on where it was begins at the head, or with the snapshot. If it was dismissed since the
        `ticket`, it ends with its first step, and gets nothing of these. Raises `ClosedError` and
        `TooManyClientsError`, and `BackendError` where it is not known whether it can go on.
        """
        replayed = self._is_replayed(channels, last_event_id)
        client: Client | None = None
        try:
            with _Tidy(self), self._lock:
                if self.closing is not None:
                    raise ClosedError("this manager was shut down and takes no more clients")
                self._check_limits(user)
                point, refused = self._resume(channels, last_event_id, replayed)
                resumed = point is not None
                if point is None:
                    point = self._cursors.parse(snapshot.cursor) if snapshot else ResumePoint(self._history.head)
                client = Client(self, self._options, ClientInfo(next(self._numbers), channels, user), point, batches)
                if point.position == self._history.head and not point.part:
                    client.go_live()
                self._replays += resumed
                self._enroll(client)
                self._enlist(client, channels)
                # Under the same lock: a dismissal either comes before this look, or finds the client in the lists.
                dismissed = None if ticket is None else self._dismissals.after(ticket, user, channels)
            client.state = snapshot.blocks if snapshot and not resumed else b""
            # The id comes with the state: a client that is cut off before that has to get it again.
            client.first_block = self._opening(client, refused, named=not client.state, granted=channels)
            if dismissed is not None:
                client.dismiss(dismissed)
            self._on_connect(client.info)
        except BaseException:
            if client is not None:
                self.remove(client, "left")  # the caller does not get it
            raise
        return client

    def can_resume(self, channels: tuple[str, ...], last_event_id: str | None) -> bool:
        """Whether a client that came with this id now would miss nothing. Raises `BackendError`."""
        replayed = self._is_replayed(channels, last_event_id)
        with _Tidy(self), self._lock:
            return self._resume(channels, last_event_id, replayed)[0] is not None

    @property
    def head(self) -> wire.Position:
        """The position of the newest frame: a client that has everything up to it gets all that comes from now on.

        Read without the lock, since each request of the site pays for it. A harmless race: an older one brings more.
        """
        return self._history.head

    def busy_block(self, reason: BusyReason, cursor: str | None) -> bytes:
        """The only block of a stream that cannot be served now."""
        id = self._cursors.normalize(cursor) if cursor else None
        return self._control("sse_busy", id, reason=reason)

    @property
    def ticket(self) -> int:
        """What a request takes before the app decides what it may have, for `connect`."""
        return self._dismissals.newest  # one number, so without the lock

    def dismiss(self, reason: ByeReason, user: str | int | None = None, channel: str | None = None) -> int:
        """End the streams of this user, or of this channel, or of this user in this channel, now.

        Those that are still being opened, too, if they have an older ticket. Returns how many open ones end by this.
        """
        with _Tidy(self), self._lock:
            self._dismissals.add(reason, user, channel)
            members = list(self._members if user is None else self._users.get(user, ()))
        return sum(member.dismiss(reason) for member in members if channel is None or channel in member.channels)

    def is_empty(self) -> bool:
        """Whether no stream is open. Takes no lock: a forked child may ask this of its parent's hub."""
        return not self._members

    def has_user(self, user: str | int | None) -> bool:
        """Whether this user has a stream."""
        with _Tidy(self), self._lock:
            return user in self._users

    def close(self, reason: ByeReason, *, for_good: bool = True) -> None:
        """Take no more clients, and let all streams end after what is queued for them.

        Unless it is `for_good`, `reopen` takes clients again.
        """
        with _Tidy(self), self._lock:
            self.closing = self.closing or reason
            self._closed_for_good = self._closed_for_good or for_good
            self._closed_at = self.clock()
            listeners = self._listening(BROADCAST)
        for listener in listeners:
            listener.end(reason)

    def reopen(self, after: float) -> bool:
        """Take clients again, if this was closed at least `after` seconds ago, and not for good. Whether it was."""
        with _Tidy(self), self._lock:
            if self.closing is None or self._closed_for_good or self.clock() - self._closed_at < after:
                return False
            self.closing = None
            return True

    def wait_until_left(self, timeout: float | None) -> bool:
        """Wait until every client that another thread drives has left. One that nobody iterates is not waited for."""
        me = threading.get_ident()

        def have_left() -> bool:
            while True:
                with self._lock:
                    answer = all(member.driver in (None, me) for member in self._members)
                if not self._leaving:
                    return answer
                self._forget_leaving()  # a client left while we held the lock: look again

        with self._left_lock:
            return self._left.wait_for(have_left, timeout)

    def count(self) -> dict[str, Any]:
        """Counters over all clients, those that have left included."""
        counts = Counts()
        with _Tidy(self), self._lock:
            now = self.clock()
            members = list(self._members)
            for each in (self._gone, *(listener.counts for listener in self._listeners.get(BROADCAST, ()))):
                counts.add(each)
            replays, oldest = self._replays, self._history.oldest
            history = {"history_frames": len(self._history), "history_bytes": self._history.bytes}
        behind = sum(member.behind for member in members)
        detached = sum(not isinstance(member, Client) for member in members)
        return (
            asdict(counts)
            | history
            | {
                "clients": len(members),
                "clients_by_channel": dict(Counter(channel for member in members for channel in member.channels)),
                "clients_by_state": {"live": len(members) - behind, "behind": behind},
                "clients_by_transport": {"attached": len(members) - detached, "detached": detached},
                "oldest_stream": max((now - member.opened_at for member in members), default=0.0),
                "replays": replays,
                "history_age": 0.0 if oldest is None else max(0.0, (self._cursors.now() - oldest.time) / 1000),
            }
        )

    # -- for clients ---------------------------------------------------------------------------------------------------

    def catch_up(self, client: Client) -> bytes | None:
        if self.advance(client):
            return None
        try:
            older = self.replay(client.channels, client.point)
        except BackendError:
            older = None
        if older is None:
            return self.skip(client)
        client.read_older(older)
        return None

    def farewell(self, client: OpenStream, reason: ByeReason, *, named: bool = True) -> bytes:
        return self._control("sse_bye", self._id(client.point) if named else None, reason=reason)

    def remove(self, client: OpenStream, reason: EndReason) -> None:
        self._leaving.append((client, reason))
        self._forget_leaving()

    # -- for feeds and their members -----------------------------------------------------------------------------------

    def advance(self, member: OpenStream) -> bool:
        """Give a member that is behind its next slice of the history, or make it live if there is none.

        False if some of what it has not got is no longer in the history: see `replay` and `skip`.
        """
        with _Tidy(self), self._lock:
            self._history.expire(self._cursors.now())
            if not self._history.covers(member.channels, member.point):
                return False
            most = self._options.queue_frames, self._options.queue_bytes
            frames = self._history.read(member.channels, member.point, *most)
            if frames:
                member.read_on(frames)
            else:
                member.go_live()
            return True

    def replay(self, channels: tuple[str, ...], point: ResumePoint) -> Slice | None:
        """What comes after a cursor that is too old for the history. None if the backend does not have it either.

        May wait for the backend. Raises `BackendError`.
        """
        older = self._cursors.replay(channels, point)
        now = self._cursors.now()
        if older is not None and any(self._history.is_expired(frame, now) for frame in older.frames):
            return None
        return older

    def skip(self, member: OpenStream) -> bytes:
        """Make a member live at the head. Returns the block that tells it that it has missed something, and why."""
        with _Tidy(self), self._lock:
            reason: GapReason = "overflow"
            if member.lost is not None and member.lost[0] > member.point.position:
                reason = member.lost[1]
            member.point = ResumePoint(self._history.head)
            member.go_live()
        return self._opening(member, reason)

    def replace(self, client: Client, member: OpenStream, feed: Feed) -> bool:
        """Let a member of a feed go on with the stream of a client that nobody drives any more.

        It is behind, at the client's cursor. False if the client has left already.
        """
        with _Tidy(self), self._lock:
            if client not in self._members:
                return False
            self._unlist(client, (*client.channels, BROADCAST))
            self._strike(client)
            self._enroll(member)
            self._enlist(feed, client.channels)
            client.give_way(member)
        return True

    def unlist(self, feed: Feed, channels: Iterable[str]) -> None:
        """None of its members asks for these channels any more; with ``*`` among them, it has none."""
        with _Tidy(self), self._lock:
            self._unlist(feed, channels)

    def news(self, feed: Feed, first: wire.Position) -> tuple[list[wire.Frame], list[str]]:
        """The next frames that a feed has not read yet, none if it is up to date; and of which channels some are gone.

        `first` is the position of the frame with which it was told of news: it has everything before that.
        """
        with _Tidy(self), self._lock:
            # Not from its own position on, which may be old: where channels are many, the floor of a quiet one may have
            # risen above that, though nothing of it is missing.
            point = ResumePoint(first, part=1) if first > feed.position else ResumePoint(feed.position)
            channels, history = feed.channels, self._history
            most = self._options.queue_frames, self._options.queue_bytes
            return history.read_all(channels, point, *most), history.gone(channels, point)

    def next_frames(self, channels: tuple[str, ...], position: wire.Position) -> list[wire.Frame] | None:
        """What comes after this position, for members that are told of by their feed. None if some of it is gone."""
        with _Tidy(self), self._lock:
            point = ResumePoint(position)
            if not self._history.covers(channels, point):
                return None
            return self._history.read(channels, point, self._options.queue_frames, self._options.queue_bytes)

    # -- internal ------------------------------------------------------------------------------------------------------

    def _forget_leaving(self) -> None:
        # Looks again after the lock was released: another thread may have failed to get it in between.
        while self._leaving and run_if_free(self._lock, self._strike_leaving):
            while self._farewells:
                with suppress(IndexError):  # another thread was faster
                    self._on_disconnect(*self._farewells.popleft())
            with self._left_lock:
                self._left.notify_all()

    def _strike_leaving(self) -> None:
        """Take the members off the lists that are leaving. If something is raised, the next call goes on from there."""
        while self._leaving:
            member, reason = self._leaving[0]
            if member in self._members:
                farewell = Farewell(reason, self.clock() - member.opened_at, *member.handed)
                if isinstance(member, Client):
                    self._unlist(member, (*member.channels, BROADCAST))
                self._strike(member)
                self._farewells.append((member.info, farewell))
            self._leaving.popleft()

    def _enroll(self, member: OpenStream) -> None:
        self._members[member] = None
        if member.info.user is not None:
            self._users.setdefault(member.info.user, {})[member] = None

    def _strike(self, member: OpenStream) -> None:
        if member.info.user is not None:
            _remove(self._users, member.info.user, member)
        del self._members[member]  # last: a member that is still here is struck once more

    def _enlist(self, listener: Listener, channels: Iterable[str]) -> None:
        for channel in (*channels, BROADCAST):
            self._listeners.setdefault(channel, {})[listener] = None

    def _unlist(self, listener: Listener, channels: Iterable[str]) -> None:
        for channel in channels:
            if channel == BROADCAST:
                self._count_gone(listener)
            _remove(self._listeners, channel, listener)

    def _count_gone(self, listener: Listener) -> None:
        listed = self._listeners.get(BROADCAST, {})
        if listener in listed:
            gone = Counts()
            gone.add(self._gone)
            gone.add(listener.counts)
            # No call lies between the two, so no signal handler does: it is counted once, also if it is interrupted.
            del listed[listener]
            self._gone = gone

    def _check_limits(self, user: str | int | None) -> None:
        most = self._options.max_clients
        if most is not None and len(self._members) >= most:
            raise TooManyClientsError(f"{most} streams are open: close some, or raise max_clients")
        most = self._options.max_clients_per_user
        if most is not None and user is not None and len(self._users.get(user, ())) >= most:
            raise TooManyClientsError(
                f"{most} streams of the user {user!r} are open: close some, or raise max_clients_per_user"
            )

    def _listening(self, channel: str) -> list[Listener]:
        return list(self._listeners.get(channel, ()))

    def _is_replayed(self, channels: tuple[str, ...], last_event_id: str | None) -> bool:
        """Whether it takes the backend to go on at this id, and it can. Not under the lock. Raises `BackendError`."""
        with _Tidy(self), self._lock:
            if not last_event_id or self._resume(channels, last_event_id)[1] != "too_old":
                return False
        return self.replay(channels, self._cursors.parse(last_event_id)) is not None

    def _resume(
        self, channels: tuple[str, ...], last_event_id: str | None, replayed: bool = False
    ) -> tuple[ResumePoint | None, GapReason | None]:
        """Where a client goes on, None if it begins anew; and why, if it wanted to go on and cannot. Under the lock."""
        if not last_event_id:
            return None, None
        self._history.expire(self._cursors.now())
        point = self._cursors.parse(last_event_id)
        if point.refused is not None:
            return None, point.refused
        if point.position > self._history.head:
            return None, "malformed"  # no such frame was ever sent
        return (point, None) if replayed or self._history.covers(channels, point) else (None, "too_old")

    def _opening(
        self, client: OpenStream, refused: GapReason | None, *, named: bool = True, granted: tuple[str, ...] = ()
    ) -> bytes:
        """The first block of a stream, with the channels that were `granted`; or of what goes on after a gap."""
        data: dict[str, Any] = {"heartbeat": self._options.heartbeat}
        if granted:
            data["channels"] = granted
        id = self._id(client.point) if named else None
        if refused is None:
            return self._control("sse_open", id, **data)
        client.counts.gaps += 1
        return self._control("sse_gap", id, **data, reason=refused)

    def _id(self, point: ResumePoint) -> str:
        return self._cursors.format(point.position) + (f".{point.part}" if point.part else "")

    def _control(self, event: str, id: str | None, **data: Any) -> bytes:
        return wire.control(event, data, retry=self._retry_ms(data.get("reason")), id=id)

    def _retry_ms(self, reason: str | None) -> int:
        if reason in _RETRY_MS:
            return random.randint(*_RETRY_MS[reason])
        if self._options.retry_ms is not None:
            return self._options.retry_ms
        # Browsers have no jitter of their own; and the more they are, the longer their return has to be spread.
        return random.randint(1_000, 2_000 + len(self._members))


K = TypeVar("K")
V = TypeVar("V")


def _remove(index: dict[K, dict[V, None]], key: K, value: V) -> None:
    """Take a value out of those of a key, if it is there: what was interrupted is done once more."""
    values = index.get(key, {})
    values.pop(value, None)
    if not values:
        index.pop(key, None)


class _Tidy:
    """Forgets the clients that have left while the hub's lock was held: ``with _Tidy(hub), hub._lock``.

    Outside of the lock, so that the lock is released by its own exit (see `locks`), and whatever was raised.
    """

    __slots__ = ("_hub",)

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        if self._hub._leaving:
            self._hub._forget_leaving()
