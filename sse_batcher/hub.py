"""The hub: which clients get which frames.

`deliver` is called by one thread at a time, the backend's; everything else from any thread. `_lock` guards the
clients, their channels and the history. Frames are queued outside it.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from . import wire
from .client import Client, ClientInfo
from .errors import BackendError, ClosedError, TooManyClientsError
from .event import BROADCAST
from .history import Cursor, History, Slice
from .options import ClientOptions, HistoryOptions

COUNTED = ("frames", "bytes", "saved_frames", "saved_bytes", "overflows", "gaps")
"""What a client counts."""

RETRY_AFTER_LEASE_MS = (100, 1_000)
RETRY_AT_LIMIT_MS = (10_000, 30_000)


class Cursors(Protocol):
    """What a backend says about positions. They rise in the order of delivery, and only the backend looks inside."""

    start: Any
    """The position before the first frame."""

    def format(self, position: Any) -> str:
        """The id that stands for a position."""

    def read(self, cursor: str) -> Cursor:
        """What a client's cursor says. It comes from outside, and may be anything."""

    def replay(self, channels: Iterable[str], cursor: Cursor) -> Slice | None:
        """The next frames after a cursor of this history, where the hub's own has let them go. None: they are gone.

        May wait a little. Raises `BackendError` where that cannot be said.
        """

    def normalize(self, cursor: str) -> str | None:
        """A well-formed cursor, of this history or another, made anew from its parts. None for anything else."""


class Snapshot(NamedTuple):
    """What a client that begins anew is sent first: the state, as of `cursor` or later, in `blocks`.

    The last block has the cursor as its id, the others have none.
    """

    cursor: str
    blocks: bytes


class Receiver(Protocol):
    """Who gets what a backend has ordered. Called by one thread at a time, in the order of the positions."""

    def deliver(self, frame: wire.Frame) -> None:
        """Take a frame."""

    def lose(self, channel: str, position: Any, reason: str = "publish_failed") -> None:
        """Take notice that the frame at this position, of this channel, will never come. `reason`: of the gap."""

    def dismiss(self, reason: str, user: Hashable = None, channel: str | None = None) -> None:
        """End the streams of this user, or of this channel, or of this user in this channel, now."""


class Farewell(NamedTuple):
    """How a stream ended. `reason` is ``left``, or that of its ``sse_bye``; `duration` is in seconds.

    `frames` and `bytes` were handed to the stream.
    """

    reason: str
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
        self._lock = threading.Lock()
        # Notified after a client has left. It has a lock of its own, since waiting lets a lock go without a look at
        # `_leaving`. Taken before `_lock`, never inside it.
        self._left = threading.Condition()
        self._clients: dict[Client, None] = {}
        self._channels: dict[str, dict[Client, None]] = {}
        self._users: dict[Hashable, dict[Client, None]] = {}
        self._history = History(history, cursors.start)
        self._closed = False
        self._numbers = itertools.count(1)
        # Clients to be forgotten, and why. Leaving must not wait for the lock: the garbage collector may end a stream
        # on a thread that holds it. Whoever holds it forgets them before it is let go, or right after.
        self._leaving: deque[tuple[Client, str]] = deque()
        self._replays = 0
        self._gone = Counter[str]()  # what clients that have left had counted

    def deliver(self, frame: wire.Frame) -> None:
        """Keep a frame, and queue it for the clients of its channel."""
        _ = frame.plain  # encoded before the lock is taken, not while everybody waits for it
        # Under one lock: a client that comes meanwhile is either listed, or finds the frame in the history.
        with self._locked():
            self._history.append(frame)
            clients = self._listening(frame.batch.channel)
        for client in clients:
            client.offer(frame)

    def lose(self, channel: str, position: Any, reason: str = "publish_failed") -> None:
        """Let all clients of this channel know that they have missed something, and those that return later, too."""
        with self._locked():
            self._history.lose(channel, position)
            clients = self._listening(channel)
            for client in clients:
                # Here, or one that reads the history at this moment is told of another reason.
                client.lost = (position, reason)
        for client in clients:
            client.fall_behind()

    def connect(
        self,
        channels: tuple[str, ...],
        last_event_id: str | None = None,
        *,
        batches: bool = True,
        snapshot: Snapshot | None = None,
        user: Hashable = None,
    ) -> Client:
        """Add a client. It reads the history from its cursor on, and is live where there is nothing more to read.

        One that cannot go on where it was begins at the head, or with the snapshot. Raises `ClosedError` and
        `TooManyClientsError`, and `BackendError` where it is not known whether it can go on.
        """
        replayed = self._is_replayed(channels, last_event_id)
        with self._locked():
            if self._closed:
                raise ClosedError("this manager was shut down and takes no more clients")
            self._check_limits(user)
            cursor, refused = self._resume(channels, last_event_id, replayed)
            resumed = cursor is not None
            if cursor is None:
                cursor = self._cursors.read(snapshot.cursor) if snapshot else Cursor(self._history.head)
            client = Client(self, self._options, ClientInfo(next(self._numbers), channels, user), cursor, batches)
            if cursor.position == self._history.head and not cursor.part:
                client.go_live()
            self._replays += resumed
            self._clients[client] = None
            for index, key in self._places(client):
                index.setdefault(key, {})[client] = None
        state = snapshot.blocks if snapshot and not resumed else b""
        # The id comes with the state: who is cut off before that has to get it again.
        client.first_block = self._opening(client, refused, named=not state) + state
        self._on_connect(client.info)
        return client

    def can_resume(self, channels: tuple[str, ...], last_event_id: str | None) -> bool:
        """Whether a client that came with this id now would miss nothing. Raises `BackendError`."""
        replayed = self._is_replayed(channels, last_event_id)
        with self._locked():
            return self._resume(channels, last_event_id, replayed)[0] is not None

    def cursor(self) -> str:
        """The id of the newest frame: who comes with it gets everything that is published from now on."""
        with self._locked():
            return self._cursors.format(self._history.head)

    def busy_block(self, reason: str, cursor: str | None) -> bytes:
        """The only block of a stream that cannot be served now."""
        id = self._cursors.normalize(cursor) if cursor else None
        retry = random.randint(*RETRY_AT_LIMIT_MS) if reason == "limit" else None
        return self._control("sse_busy", id, retry, reason=reason)

    def dismiss(self, reason: str, user: Hashable = None, channel: str | None = None) -> None:
        """End the streams of this user, or of this channel, or of this user in this channel, now."""
        with self._locked():
            clients = set(self._clients)
            if user is not None:
                clients &= self._users.get(user, {}).keys()
            if channel is not None:
                clients &= self._channels.get(channel, {}).keys()
        for client in clients:
            client.dismiss(reason)

    def has_user(self, user: Hashable) -> bool:
        """Whether this user has a stream."""
        with self._locked():
            return user in self._users

    def close(self, reason: str) -> None:
        """Take no more clients, and let all streams end after what is queued for them."""
        with self._locked():
            self._closed = True
            clients = list(self._clients)
        for client in clients:
            client.end(reason)

    @property
    def closed(self) -> bool:
        """Whether it takes no more clients."""
        return self._closed

    def wait_until_left(self, timeout: float | None) -> bool:
        """Wait until every client that another thread drives has left. One that nobody iterates is not waited for."""
        me = threading.get_ident()

        def have_left() -> bool:
            while True:
                with self._lock:
                    answer = all(client.driver in (None, me) for client in self._clients)
                if not self._leaving:
                    return answer
                self._forget_leaving()  # somebody came while we held the lock: look again

        with self._left:
            return self._left.wait_for(have_left, timeout)

    def count(self) -> dict[str, Any]:
        """Counters over all clients, those that have left included."""
        with self._locked():
            now = self.clock()
            counts = Counter(self._gone)
            for client in self._clients:
                counts.update({name: getattr(client, name) for name in COUNTED})
            behind = sum(client.behind for client in self._clients)
            oldest = self._history.oldest
            return {name: counts[name] for name in COUNTED} | {
                "clients": len(self._clients),
                "clients_by_channel": {name: len(members) for name, members in self._channels.items()},
                "clients_by_state": {"live": len(self._clients) - behind, "behind": behind},
                "oldest_stream": max((now - client.opened_at for client in self._clients), default=0.0),
                "replays": self._replays,
                "history_frames": len(self._history),
                "history_bytes": self._history.bytes,
                "history_age": 0.0 if oldest is None else max(0.0, time.time() - oldest.batch.timestamp / 1000),
            }

    # -- for clients ---------------------------------------------------------------------------------------------------

    def catch_up(self, client: Client) -> bytes | None:
        with self._locked():
            self._history.expire(time.time() * 1000)
            if self._history.covers(client.channels, client.cursor):
                frames = self._history.read(
                    client.channels, client.cursor, self._options.queue_frames, self._options.queue_bytes
                )
                if frames:
                    client.read_on(frames)
                else:
                    client.go_live()
                return None
        try:
            older = self._replay(client.channels, client.cursor)
        except BackendError:
            older = None
        if older is not None:
            client.read_older(older)
            return None
        with self._locked():
            reason = "overflow"
            if client.lost is not None and client.lost[0] > client.cursor.position:
                reason = client.lost[1]
            client.cursor = Cursor(self._history.head)
            client.go_live()
        return self._opening(client, reason)

    def farewell(self, client: Client, reason: str) -> bytes:
        retry = random.randint(*RETRY_AFTER_LEASE_MS) if reason == "lease" else None
        return self._control("sse_bye", self._id(client.cursor), retry, reason=reason)

    def remove(self, client: Client, reason: str) -> None:
        self._leaving.append((client, reason))
        self._forget_leaving()

    # -- internal ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield
        if self._leaving:
            self._forget_leaving()

    def _forget_leaving(self) -> None:
        # Looks again after the lock was let go: somebody may have failed to get it in between.
        while self._leaving and self._lock.acquire(blocking=False):
            gone = []
            try:
                while self._leaving:
                    client, reason = self._leaving.popleft()
                    if client in self._clients:
                        self._forget(client)
                        duration = self.clock() - client.opened_at
                        gone.append((client.info, Farewell(reason, duration, client.frames, client.bytes)))
            finally:
                self._lock.release()
            for info, farewell in gone:
                self._on_disconnect(info, farewell)
            with self._left:
                self._left.notify_all()

    def _forget(self, client: Client) -> None:
        del self._clients[client]
        for index, key in self._places(client):
            members = index[key]
            del members[client]
            if not members:
                del index[key]
        self._gone.update({name: getattr(client, name) for name in COUNTED})

    def _places(self, client: Client) -> Iterator[tuple[dict[Any, dict[Client, None]], Hashable]]:
        """Where a client is listed, beside `_clients`."""
        for channel in client.channels:
            yield self._channels, channel
        if client.info.user is not None:
            yield self._users, client.info.user

    def _check_limits(self, user: Hashable) -> None:
        most = self._options.max_clients
        if most is not None and len(self._clients) >= most:
            raise TooManyClientsError(f"{most} streams are open: close some, or raise max_clients")
        most = self._options.max_clients_per_user
        if most is not None and user is not None and len(self._users.get(user, ())) >= most:
            raise TooManyClientsError(
                f"{most} streams of the user {user!r} are open: close some, or raise max_clients_per_user"
            )

    def _listening(self, channel: str) -> list[Client]:
        return list(self._clients if channel == BROADCAST else self._channels.get(channel, ()))

    def _replay(self, channels: tuple[str, ...], cursor: Cursor) -> Slice | None:
        """What comes after a cursor that is too old for the history. Not under the lock. Raises `BackendError`."""
        older = self._cursors.replay(channels, cursor)
        now = time.time() * 1000
        if older is not None and any(self._history.is_expired(frame, now) for frame in older.frames):
            return None
        return older

    def _is_replayed(self, channels: tuple[str, ...], last_event_id: str | None) -> bool:
        """Whether it takes the backend to go on at this id, and it can. Not under the lock. Raises `BackendError`."""
        with self._locked():
            if not last_event_id or self._resume(channels, last_event_id)[1] != "too_old":
                return False
        return self._replay(channels, self._cursors.read(last_event_id)) is not None

    def _resume(
        self, channels: tuple[str, ...], last_event_id: str | None, replayed: bool = False
    ) -> tuple[Cursor | None, str | None]:
        """Where a client goes on, None if it begins anew; and why, if it wanted to go on and cannot. Under the lock."""
        if not last_event_id:
            return None, None
        self._history.expire(time.time() * 1000)
        cursor = self._cursors.read(last_event_id)
        if cursor.refused is not None:
            return None, cursor.refused
        if cursor.position > self._history.head:
            return None, "malformed"  # no such frame was ever sent
        return (cursor, None) if replayed or self._history.covers(channels, cursor) else (None, "too_old")

    def _opening(self, client: Client, refused: str | None, *, named: bool = True) -> bytes:
        """The first block of a stream, or of what goes on after a gap."""
        data: dict[str, Any] = {"heartbeat": self._options.heartbeat}
        id = self._id(client.cursor) if named else None
        if refused is None:
            return self._control("sse_open", id, **data)
        client.gaps += 1
        return self._control("sse_gap", id, **data, reason=refused)

    def _id(self, cursor: Cursor) -> str:
        return self._cursors.format(cursor.position) + (f".{cursor.part}" if cursor.part else "")

    def _control(self, event: str, id: str | None, retry: int | None = None, **data: Any) -> bytes:
        return wire.control(event, data, retry=self._retry_ms() if retry is None else retry, id=id)

    def _retry_ms(self) -> int:
        if self._options.retry_ms is not None:
            return self._options.retry_ms
        # Browsers have no jitter of their own; and the more they are, the longer their return has to be spread.
        return random.randint(1_000, 2_000 + len(self._clients))
