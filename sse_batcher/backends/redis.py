"""The backend of many processes on many hosts: one Redis stream, which each process reads back. Extra: ``redis``.

`RedisBackend.publish` runs in the batcher's thread, and waits there while Redis is away. One reader thread a process,
started by the first client, reads the stream and delivers (`reader`); for older cursors than the process's history has,
it is read again (`archive`). An entry holds the batch and not its bytes on the
wire (`entries`). Beside the stream, one key names its epoch: where that is gone or another one, the stream is another,
too. Follows https://redis.io/docs/latest/commands/xadd/ and xread.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from ..errors import BackendError
from ..event import Batch
from ..history import Cursor, Slice
from ..roles import Receiver
from ..worker import Deadline
from .archive import Archive
from .connections import Link, connector, errors, pauses
from .entries import START, Entry, Kick, Position, numbers, to_fields
from .reader import Keys, Reader, State

OPEN_SECONDS = 2.0
"""How long a new client waits for the history, or for the reader to come to where the client has been."""

# A cursor comes from outside: it is matched whole, bounded, and rebuilt from its parts.
_CURSOR = re.compile(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,18})-(0|[1-9][0-9]{0,19})(?:\.([1-9][0-9]{0,8}))?", re.ASCII)


class RedisBackend:
    """`connect` makes a ``redis.Redis``. `prefix`: of the two keys. `frames`: about how many entries are kept."""

    start = START

    def __init__(self, connect: Callable[[], Any], prefix: str, frames: int) -> None:
        self._frames = frames
        self._keys = Keys(prefix)
        self._connect = connect
        self._publisher = secrets.token_hex(8)
        self._number = 0
        self._link = Link(connect)  # of who publishes
        self._closing = threading.Event()
        self._state = State()
        self._reader: Reader | None = None
        self._archive = Archive(self._keys, connect, self._state)
        self._published: Position = START  # the newest of our own

    def connect(self, receiver: Receiver) -> None:
        self._reader = Reader(receiver, self._keys, self._frames, self._connect, self._state)

    def publish(self, batch: Batch) -> None:
        """Add an entry, however long it takes: what comes meanwhile waits in the batcher. Raises after `close` only."""
        with self._state.adding:
            self._number += 1
            fields = to_fields(Entry(self._publisher, self._number, batch))
            for pause in pauses():
                try:
                    self._published = max(self._published, self._xadd(fields))
                    return
                except errors() as error:
                    self._link.drop()
                    if self._closing.is_set():
                        raise
                    self._state.tell_failure("takes no batches", error)
                # The number stays: an entry that was added though no answer came is known by it, and read once.
                self._closing.wait(pause)

    def kick(self, user: Hashable, channel: str | None) -> None:
        """Have all processes end these streams. Raises `BackendError` where Redis does not take it."""
        if not isinstance(user, (str, int, type(None))):
            raise ValueError(f"between processes a user is a str or an int, not {user!r}")
        # Who publishes holds it for as long as Redis is away.
        if not self._state.adding.acquire(timeout=OPEN_SECONDS):
            raise BackendError("Redis does not take anything, and so no kick: try again")
        try:
            self._xadd(to_fields(Entry(self._publisher, 0, Kick(user, channel))))
        except errors() as error:
            self._link.drop()
            raise BackendError(f"Redis did not take the kick: {error}") from error
        finally:
            self._state.adding.release()

    def _xadd(self, fields: dict[bytes, bytes]) -> Position:
        self._state.tell_question()
        id = self._link.client.xadd(self._keys.stream, fields, maxlen=self._frames, approximate=True)
        self._state.tell_answer()
        return (self._state.generation, *numbers(id))

    # -- clients -------------------------------------------------------------------------------------------------------

    def open(self, cursor: str | None) -> None:
        """Have the history here, up to where this client has been. Raises `BackendError` where that cannot be had."""
        state = self._state
        assert self._reader is not None, "connect() comes first"
        self._reader.start()
        deadline = Deadline(OPEN_SECONDS)
        with state.changed:
            if not state.changed.wait_for(lambda: state.ready, 0 if state.gave_up else deadline.left()):
                state.gave_up = True  # who comes next does not wait for as long
                raise BackendError("Redis does not answer: it is not known where a new stream would begin")
            # He may come from a process that has read further than this one.
            place = self.read(cursor).position if cursor else None
            if place is not None:
                state.changed.wait_for(lambda: state.read >= place, min(0.5, deadline.left() or 0.0))

    def wait_until_delivered(self, timeout: float | None) -> bool:
        """Wait until what this process has published was read back, where it reads at all."""
        state = self._state
        if self._reader is None or not self._reader.started:
            return True
        with state.changed:
            return state.changed.wait_for(lambda: state.read >= self._published, timeout)

    def close(self, timeout: float | None) -> bool:
        self._closing.set()
        self._archive.close()
        if self._state.adding.acquire(blocking=False):  # who holds it may have to wait for Redis
            self._link.drop()
            self._state.adding.release()
        return self._reader is None or self._reader.close(timeout)

    @property
    def silent_for(self) -> float:
        """Seconds for which Redis owes an answer."""
        return self._state.silent_for

    @property
    def answered_ago(self) -> float:
        """Seconds since Redis has answered, or, where it never has, since it was first asked."""
        return self._state.answered_ago

    @property
    def ignored(self) -> int:
        """Entries that are none of ours, or broken."""
        return self._state.ignored

    # -- cursors -------------------------------------------------------------------------------------------------------

    def format(self, position: Position) -> str:
        generation, milliseconds, sequence = position
        return f"{self._state.epochs[generation]}-{milliseconds}-{sequence}"

    def read(self, cursor: str) -> Cursor:
        match = _CURSOR.fullmatch(cursor)
        if match is None or int(match[3]) >= 2**64:  # which Redis would refuse
            return Cursor(refused="malformed")
        state = self._state
        if match[1] != state.epochs.get(state.generation):
            return Cursor(refused="epoch")
        return Cursor((state.generation, int(match[2]), int(match[3])), int(match[4] or 0))

    def replay(self, channels: Iterable[str], cursor: Cursor) -> Slice | None:
        """What the stream still has after this cursor, where the process's own history does not."""
        return self._archive.read(channels, cursor)

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
