"""The backend for several processes on one or more machines: one Redis stream. Extra: ``redis``.

`RedisBackend.publish` runs in the batcher's thread, and waits there while Redis is away. Each process has one reader
thread, started by the first client, that reads the stream back and delivers (`reader`). For cursors that are older than
the process's history, the stream is read again (`archive`). An entry has the batch, not its bytes on the wire
(`entries`). Another key has the stream's epoch, a random name: if that key is gone or has changed, the stream was
replaced. Follows https://redis.io/docs/latest/commands/xadd/ and xread.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ...errors import BackendError, InvalidEventError
from ...event import Batch, User, check_channel
from ...runtime.locks import run_if_free
from ...runtime.log_fields import log_fields
from ...streams.history import ResumePoint, Slice
from ...streams.roles import Receiver
from ...wire import Position
from ..kicks import MICROSECONDS, Stamps
from .archive import Archive
from .connections import Link, connector, errors, is_exhausted, pauses, understood
from .entries import START, Entry, Kick, numbers, to_fields
from .inspection import Inspection
from .kicks import RedisKicks
from .reader import Reader
from .state import Keys, State

_log = logging.getLogger("sse_batcher.backends.redis")

OPEN_SECONDS = 2.0
"""How long a new client waits for the history, if it is one of the few that may wait long. A kick waits as long."""
MAX_LONG_WAITS = 2
"""How many clients may wait that long at the same time. Each holds a thread of the server."""
SHORT_SECONDS = 0.1
"""How long all other clients wait. It is enough when Redis works."""
CATCH_UP_SECONDS = 0.5
"""How long a new client waits, at most, until the reader has reached the client's cursor."""
LATE_SECONDS = 10
"""How far the time of Redis, as far as it is known here, may be behind."""

# A cursor comes from outside, so each part has a maximum length, and the cursor is rebuilt from its parts.
_CURSOR = re.compile(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})(?:(-1)|\.([1-9][0-9]{0,8}))?", re.ASCII)


class RedisBackend:
    """One process's part of the backend. `connect` makes a ``redis.Redis``. `prefix` is that of the keys.

    Redis keeps about `frames` entries. `clock` returns monotonic time in seconds. `state` is for tests.
    """

    start = START

    def __init__(
        self,
        connect: Callable[[], Any],
        prefix: str,
        frames: int,
        clock: Callable[[], float] = time.monotonic,
        state: State | None = None,
    ) -> None:
        self._frames = frames
        self._keys = Keys(prefix)
        self._connect = connect
        self._clock = clock
        self._number = 0  # of the newest batch; guarded by `State.adding`, as `_publishing` is
        self._publishing = Link(connect, "Publishing to")
        self._reading = Link(connect, "Reading from")
        self._closing = threading.Event()
        self._state = State() if state is None else state
        self._reader: Reader | None = None
        self._archive = Archive(self._keys, connect, self._state, self._reading)
        self._stamps = Stamps()
        self._kicks = RedisKicks(self._keys.kicked, connect, self._reading)
        # Callers of `open` that may wait long. No lock guards it. A harmless race: of callers that come at the same
        # time, more than `MAX_LONG_WAITS` may wait long.
        self._long_waits: dict[object, None] = {}

    def connect(self, receiver: Receiver) -> None:
        self._reader = Reader(receiver, self._keys, self._reading, self._state, self._clock)

    def publish(self, batch: Batch) -> None:
        """Add an entry, however long it takes: later events wait in the batcher. Raises only after `close`."""
        state, link = self._state, self._publishing
        with state.adding:
            self._number += 1
            fields = to_fields(Entry(state.publisher, self._number, batch))
            for pause in pauses():
                link.expect_answer()
                try:
                    self._add_locked(fields)
                except errors() as error:
                    if self._closing.is_set():
                        link.drop()
                        raise
                    link.note_failure(error)
                else:
                    link.note_answer()
                    state.added = self._number
                    return
                # The next attempt has the same number. If this entry was added although no answer came, readers see the
                # number twice, and deliver one of the two.
                self._closing.wait(pause)

    def kick(self, user: User | None, channel: str | None) -> None:
        """Have all processes end these streams. Raises `BackendError` if Redis does not take it."""
        if not isinstance(user, (str, int, type(None))):
            raise InvalidEventError(f"a user is a str or an int, not {type(user).__name__}", field="user")
        if channel is not None:
            check_channel(channel)  # other processes would ignore the entry

        def add_locked() -> None:
            try:
                if user is not None:  # before the streams end, since they come back at once
                    with understood():
                        kicked = self._kicks.add(self._publishing.client, user, self._next_stamp())
                    self._stamps.raise_to(kicked)
                self._add_locked(to_fields(Entry(self._state.publisher, 0, Kick(user, channel))))
                self._publishing.note_answer()
            except errors() as error:
                self._publishing.drop()
                raise BackendError(f"Redis did not take the kick: {error}") from error

        # The batcher's thread holds the lock as long as Redis is away.
        if not run_if_free(self._state.adding, add_locked, timeout=OPEN_SECONDS):
            raise BackendError("Redis does not answer, so the kick was not sent: try again")

    def stamp(self) -> int:
        """As in `Backend`: by the clock of Redis, so that those of several hosts may differ."""
        if not self._state.known:
            with suppress(BackendError):  # then it is the clock of this host
                self.open(None)
        return self._next_stamp()

    def _next_stamp(self) -> int:
        return self._stamps.next(self._state.redis_time())

    def remember_kicks(self) -> None:
        since = self._kicks.begin()
        # What is known here of the time of Redis may be a little behind. More than that is a clock that was wrong once:
        # with its time, this process would refuse all other tokens as too old.
        if since <= self._state.redis_time() * 1_000 + LATE_SECONDS * MICROSECONDS:
            self._stamps.raise_to(since)

    def kicked_until(self, user: User) -> int:
        return self._kicks.until(user)

    def _add_locked(self, fields: dict[bytes, bytes]) -> None:
        """Add an entry. Needs `State.adding`. Raises one of `errors`."""
        try:
            with understood():
                numbers(self._publishing.client.xadd(self._keys.stream, fields, maxlen=self._frames))
        except errors() as error:
            if not is_exhausted(error):
                raise
            self._restart_stream_locked(fields)

    def _restart_stream_locked(self, fields: dict[bytes, bytes]) -> None:
        """Delete the stream and begin it with this entry, since an entry of another program has the largest id.

        No entry can follow that one, even after it was deleted. Readers notice that ids are lower than before, and
        clients get ``sse_gap``. Needs `State.adding`.
        """
        key = self._keys.stream
        with self._publishing.client.pipeline(transaction=True) as pipeline:
            pipeline.watch(key)
            try:
                pipeline.xadd(key, fields, maxlen=self._frames)
                return  # another process has restarted it
            except errors() as error:
                if not is_exhausted(error):
                    raise
            pipeline.multi()
            pipeline.delete(key)
            pipeline.xadd(key, fields, maxlen=self._frames)
            pipeline.execute()
        _log.warning(
            "the stream %s was deleted and begun again: an entry of another program had the largest possible id, so "
            "that nothing could be added. Clients get sse_gap",
            key,
            extra=log_fields("redis_stream_restarted", stream=key),
        )

    def inspect(self) -> Inspection:
        """Return what looks into Redis for a command. It has a connection of its own."""
        return Inspection(self._keys, self._connect)

    # -- clients -------------------------------------------------------------------------------------------------------

    @property
    def is_known(self) -> bool:
        return self._state.known

    def find_position(self) -> bool:
        """Return whether the end of the stream is known, where new clients begin. Starts the reader; never waits."""
        if not self._state.known:
            self._start()
        return self._state.known

    def open(self, cursor: str | None) -> None:
        """Wait until the history is here, up to this client's cursor. Raises `BackendError` if it is not in time.

        Only a few callers wait long, since each of them holds a thread of the server.
        """
        self._start()
        me = object()
        try:
            seconds = SHORT_SECONDS
            if len(self._long_waits) < MAX_LONG_WAITS:
                self._long_waits[me] = None
                seconds = OPEN_SECONDS
            self._wait_until_ready(seconds)
            position = self.parse(cursor).position if cursor else None
            if position is not None and self._is_ahead(position):
                self._wait_for(position, min(seconds, CATCH_UP_SECONDS))
        finally:
            self._long_waits.pop(me, None)

    def _wait_until_ready(self, seconds: float) -> None:
        state = self._state
        with state.lock:
            if not state.changed.wait_for(lambda: state.ready, 0 if state.gave_up else seconds):
                # After a long wait without success, the next clients do not wait.
                state.gave_up = state.gave_up or seconds == OPEN_SECONDS
                raise BackendError("Redis does not answer: it is not known where a new stream would begin")

    def _is_ahead(self, position: Position) -> bool:
        return position[:3] > self._state.read[:3]

    def _wait_for(self, position: Position, seconds: float) -> None:
        """Wait until the reader has reached this position, which is ahead of it.

        The client may come from a process that has read further than this one. Redis is asked first whether the
        position exists, since a client may send any cursor.
        """
        state = self._state
        if self._archive.has(position):
            with state.lock:
                if not state.changed.wait_for(lambda: not self._is_ahead(position), seconds):
                    raise BackendError("this process has not read as far as the client has")

    def _start(self) -> None:
        assert self._reader is not None, "connect() comes first"
        self._reader.start()

    def wait_until_delivered(self, timeout: float | None) -> bool:
        """Wait until this process has read back what it has published. Returns at once if it does not read."""
        state, added = self._state, self._state.added
        if self._reader is None or not self._reader.started:
            return True
        with state.lock:
            return state.changed.wait_for(lambda: state.settled >= added, timeout)

    def close(self, timeout: float | None) -> bool:
        self._closing.set()
        self._archive.close()
        self._kicks.close()
        run_if_free(self._state.adding, self._publishing.drop)  # does not wait: the holder may be waiting for Redis
        return self._reader is None or self._reader.close(timeout)

    @property
    def silent_for(self) -> float:
        """For how many seconds Redis has not answered the reader or the publisher, whichever is longer."""
        return max(self._publishing.silent_for, self._reading.silent_for)

    @property
    def answered_ago(self) -> float:
        """Seconds since Redis has answered both the reader and the publisher; if it never has, since the first call."""
        if self._reader is None or not self._reader.started:
            return self._publishing.answered_ago
        # The reader calls Redis all the time, the publisher only if there is something to publish.
        return max(self._publishing.silent_for, self._reading.answered_ago)

    @property
    def unread(self) -> int:
        """How many batches of this process Redis has, and the reader has not read yet. 0 if there is no reader."""
        if self._reader is None or not self._reader.started:
            return 0
        return max(0, self._state.added - self._state.settled)

    @property
    def processes(self) -> int | None:
        """How many processes have read the stream in the last half minute; None if that is not known."""
        return None if self._reader is None else self._reader.presence.count

    @property
    def ignored(self) -> int:
        """How many entries sse_batcher did not write, or could not read."""
        return self._state.ignored

    def now(self) -> float:
        """Return the time of the ids in milliseconds since 1970, as far as it is known here."""
        return self._state.now()

    # -- cursors -------------------------------------------------------------------------------------------------------

    def format(self, position: Position) -> str:
        generation, milliseconds, sequence, is_after = position
        return f"{self._state.epochs[generation]}-{milliseconds}-{sequence}{'-1' if is_after else ''}"

    def parse(self, cursor: str) -> ResumePoint:
        match = _CURSOR.fullmatch(cursor)
        if match is None or int(match[2]) >= 2**64 or int(match[3]) >= 2**64:  # Redis would refuse such a number
            return ResumePoint(refused="malformed")
        # The reader may go on at any moment, so each value is read once. `read` is first, since the reader sets it
        # after `head`: nothing up to this `read` was delivered after that head.
        state, generation = self._state, self._state.generation
        if match[1] != state.epochs.get(generation):
            return ResumePoint(refused="epoch")
        position: Position = (generation, int(match[2]), int(match[3]), int(bool(match[4])))
        read, head = state.read, state.head
        if head < position and position[:3] <= read[:3]:
            # Another process has given its clients a cursor there. Here, nothing was delivered since the head.
            return ResumePoint(head)
        return ResumePoint(position, int(match[5] or 0))

    def replay(self, channels: Iterable[str], point: ResumePoint, user: User | None) -> Slice | None:
        """Return the next frames from the stream itself, for a point that the process's history does not reach."""
        return self._archive.read(channels, point, user)

    def normalize(self, cursor: str) -> str | None:
        match = _CURSOR.fullmatch(cursor)
        return match and match[0]


def open_redis(backend: Any, frames: int) -> RedisBackend:
    """Return the backend for a URL, or for a ready ``redis.Redis``. Connects to nothing.

    URLs are ``redis://[user:password@]host[:port]/[db]``, ``rediss://`` for TLS, ``unix://path``, and
    ``redis+sentinel://[user:password@]host:port[,host:port]/service[/db]``. ``?prefix=`` is the prefix of the keys.
    Redis keeps about `frames` entries. Raises `ConfigurationError`.
    """
    connect, prefix = connector(backend)
    return RedisBackend(connect, prefix, frames)
