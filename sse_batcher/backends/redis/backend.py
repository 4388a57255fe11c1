"""The backend of many processes on many hosts: one Redis stream, which each process reads back. Extra: ``redis``.

`RedisBackend.publish` runs in the batcher's thread, and waits there while Redis is away. One reader thread a process,
started by the first client, reads the stream and delivers (`reader`); for older cursors than the process's history has,
it is read again (`archive`). An entry holds the batch and not its bytes on the
wire (`entries`). Beside the stream, one key names its epoch: where that is gone or another one, the stream is another,
too. Follows https://redis.io/docs/latest/commands/xadd/ and xread.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ...errors import BackendError
from ...event import Batch, check_channel
from ...runtime.locks import run_if_free
from ...streams.history import ResumePoint, Slice
from ...streams.roles import Receiver
from ...wire import Position
from .archive import Archive
from .connections import Link, connector, errors, is_exhausted, pauses, understood
from .entries import START, Entry, Kick, numbers, to_fields
from .reader import Keys, Reader, State

_log = logging.getLogger("sse_batcher.backends.redis")

OPEN_SECONDS = 2.0
"""How long a new client waits for the history, if it is one of the few that may wait for long. A kick waits, too."""
MAX_WAITING = 2
"""How many clients may wait for so long at once. Each holds a thread of the server."""
SHORT_SECONDS = 0.1
"""How long all others wait: as long as it takes if all is well."""
CATCH_UP_SECONDS = 0.5
"""How long a new client waits, at most, until the reader comes to where it has been."""

# A cursor comes from outside: it is matched whole, bounded, and rebuilt from its parts.
_CURSOR = re.compile(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})(?:(-1)|\.([1-9][0-9]{0,8}))?", re.ASCII)


class RedisBackend:
    """`connect` makes a ``redis.Redis``. `prefix`: of the two keys. `frames`: about how many entries are kept.

    `clock` is monotonic time in seconds.
    """

    start = START

    def __init__(
        self, connect: Callable[[], Any], prefix: str, frames: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._frames = frames
        self._keys = Keys(prefix)
        self._connect = connect
        self._clock = clock
        self._number = 0
        # One for each user of Redis: what one is refused says nothing about the others.
        self._publishing = Link(connect, "Publishing to")
        self._reading = Link(connect, "Reading from")
        self._closing = threading.Event()
        self._state = State()
        self._reader: Reader | None = None
        self._archive = Archive(self._keys, connect, self._state, self._reading)
        # Callers of `open` that may wait for long. A harmless race: of those that come at once, one more may.
        self._waiting: dict[object, None] = {}

    def connect(self, receiver: Receiver) -> None:
        self._reader = Reader(receiver, self._keys, self._reading, self._state, self._clock)

    def publish(self, batch: Batch) -> None:
        """Add an entry, however long it takes: what comes meanwhile waits in the batcher. Raises after `close` only."""
        state, link = self._state, self._publishing
        with state.adding:
            self._number += 1
            fields = to_fields(Entry(state.publisher, self._number, batch))
            for pause in pauses():
                link.ask()
                try:
                    self._add(fields)
                except errors() as error:
                    if self._closing.is_set():
                        link.drop()
                        raise
                    link.fail(error)
                else:
                    link.succeed()
                    state.added = self._number
                    return
                # The number stays: an entry that was added though no answer came is known by it, and read once.
                self._closing.wait(pause)

    def kick(self, user: str | int | None, channel: str | None) -> None:
        """Have all processes end these streams. Raises `BackendError` if Redis does not take it."""
        if not isinstance(user, (str, int, type(None))):
            raise ValueError(f"between processes a user is a str or an int, not {user!r}")
        if channel is not None:
            check_channel(channel)  # no process would understand it

        def add() -> None:
            try:
                self._add(to_fields(Entry(self._state.publisher, 0, Kick(user, channel))))
                self._publishing.succeed()
            except errors() as error:
                self._publishing.drop()
                raise BackendError(f"Redis did not take the kick: {error}") from error

        # The batcher's thread holds it for as long as Redis is away.
        if not run_if_free(self._state.adding, add, timeout=OPEN_SECONDS):
            raise BackendError("Redis does not take anything, and so no kick: try again")

    def _add(self, fields: dict[bytes, bytes]) -> None:
        """Add an entry, with `adding` held. Raises one of `errors`."""
        try:
            with understood():
                numbers(self._publishing.client.xadd(self._keys.stream, fields, maxlen=self._frames))
        except errors() as error:
            if not is_exhausted(error):
                raise
            self._begin_again(fields)

    def _begin_again(self, fields: dict[bytes, bytes]) -> None:
        """Begin the stream again with this entry, since one of somebody else has the largest id that can be.

        No entry can follow that one, even after it was deleted. Readers see that ids are lower than before, and clients
        get ``sse_gap``.
        """
        key = self._keys.stream
        with self._publishing.client.pipeline(transaction=True) as pipeline:
            pipeline.watch(key)
            try:
                pipeline.xadd(key, fields, maxlen=self._frames)
                return  # another process has begun it again
            except errors() as error:
                if not is_exhausted(error):
                    raise
            pipeline.multi()
            pipeline.delete(key)
            pipeline.xadd(key, fields, maxlen=self._frames)
            pipeline.execute()
        _log.warning(
            "the stream %s was deleted and begun again: an entry of somebody else had the largest possible id, so that "
            "nothing could be added. Clients get sse_gap",
            key,
        )

    # -- clients -------------------------------------------------------------------------------------------------------

    def is_known(self) -> bool:
        """Whether it is known where the history stands. Begins to read it; never waits."""
        if not self._state.known:
            self._start()
        return self._state.known

    def open(self, cursor: str | None) -> None:
        """Have the history here, up to where this client has been. Raises `BackendError` if that cannot be had.

        A few may wait for long, since that holds a thread of the server, and anybody may open streams.
        """
        self._start()
        me = object()
        try:
            seconds = SHORT_SECONDS
            if len(self._waiting) < MAX_WAITING:
                self._waiting[me] = None
                seconds = OPEN_SECONDS
            self._wait_until_ready(seconds)
            place = self.parse(cursor).position if cursor else None
            if place is not None and self._is_ahead(place):
                self._wait_for(place, min(seconds, CATCH_UP_SECONDS))
        finally:
            self._waiting.pop(me, None)

    def _wait_until_ready(self, seconds: float) -> None:
        state = self._state
        with state.lock:
            if not state.changed.wait_for(lambda: state.ready, 0 if state.gave_up else seconds):
                # Clients that come next do not wait for as long.
                state.gave_up = state.gave_up or seconds == OPEN_SECONDS
                raise BackendError("Redis does not answer: it is not known where a new stream would begin")

    def _is_ahead(self, place: Position) -> bool:
        return place[:3] > self._state.read[:3]

    def _wait_for(self, place: Position, seconds: float) -> None:
        """Wait until the reader is at this place of the future, if there is one.

        The client may come from a process that has read further than this one. But it may also have made the place up:
        Redis is asked first.
        """
        state = self._state
        if self._archive.has(place):
            with state.lock:
                if not state.changed.wait_for(lambda: not self._is_ahead(place), seconds):
                    raise BackendError("this process has not read as far as the client has")

    def _start(self) -> None:
        assert self._reader is not None, "connect() comes first"
        self._reader.start()

    def wait_until_delivered(self, timeout: float | None) -> bool:
        """Wait until what this process has published was read back, if it reads at all."""
        state, added = self._state, self._state.added
        if self._reader is None or not self._reader.started:
            return True
        with state.lock:
            return state.changed.wait_for(lambda: state.settled >= added, timeout)

    def close(self, timeout: float | None) -> bool:
        self._closing.set()
        self._archive.close()
        run_if_free(self._state.adding, self._publishing.drop)  # a thread that holds it may have to wait for Redis
        return self._reader is None or self._reader.close(timeout)

    @property
    def silent_for(self) -> float:
        """Seconds for which Redis owes an answer, to the one that has waited for longest."""
        return max(self._publishing.silent_for, self._reading.silent_for)

    @property
    def answered_ago(self) -> float:
        """Seconds since Redis has answered all that ask; if it never has, since it was first asked."""
        if self._reader is None or not self._reader.started:
            return self._publishing.answered_ago
        # The reader asks all the time, the publisher only if there is something to publish.
        return max(self._publishing.silent_for, self._reading.answered_ago)

    @property
    def ignored(self) -> int:
        """Entries that are not ours, or cannot be read."""
        return self._state.ignored

    def now(self) -> float:
        """The time of Redis, as far as it is known here, in milliseconds since 1970."""
        return self._state.now()

    # -- cursors -------------------------------------------------------------------------------------------------------

    def format(self, position: Position) -> str:
        generation, milliseconds, sequence, is_after = position
        return f"{self._state.epochs[generation]}-{milliseconds}-{sequence}{'-1' if is_after else ''}"

    def parse(self, cursor: str) -> ResumePoint:
        match = _CURSOR.fullmatch(cursor)
        if match is None or int(match[2]) >= 2**64 or int(match[3]) >= 2**64:  # which Redis would refuse
            return ResumePoint(refused="malformed")
        # The reader may go on at any moment, so each value is looked at once. `read` is first, since the reader sets it
        # after `head`: nothing up to this `read` was delivered after that head.
        state, generation = self._state, self._state.generation
        if match[1] != state.epochs.get(generation):
            return ResumePoint(refused="epoch")
        position: Position = (generation, int(match[2]), int(match[3]), int(bool(match[4])))
        read, head = state.read, state.head
        if head < position and position[:3] <= read[:3]:
            # Another process has told its clients of something there: here, nothing has come since the head.
            return ResumePoint(head)
        return ResumePoint(position, int(match[5] or 0))

    def replay(self, channels: Iterable[str], point: ResumePoint) -> Slice | None:
        """What the stream still has after this cursor, where the process's own history does not."""
        return self._archive.read(channels, point)

    def normalize(self, cursor: str) -> str | None:
        match = _CURSOR.fullmatch(cursor)
        return match and match[0]


def open_redis(backend: Any, frames: int) -> RedisBackend:
    """The backend of a URL, or of a ready ``redis.Redis``.

    ``redis://[user:password@]host[:port]/[db]``, ``rediss://`` for TLS, ``unix://path``, and
    ``redis+sentinel://[user:password@]host:port[,host:port]/service[/db]``; ``?prefix=`` is the prefix of the keys.
    """
    connect, prefix = connector(backend)
    return RedisBackend(connect, prefix, frames)
