"""Looking into Redis from outside of the site's processes, for commands: what the stream has, and what is added to it.

It only reads. The caller's thread, which waits for Redis.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import BackendError
from ...event import Batch
from ..kicks import MICROSECONDS
from .connections import errors, pauses, understood
from .entries import (
    Kick,
    RawEntry,
    Unreadable,
    before,
    microseconds_of,
    new_entries,
    numbers,
    raw_entries,
    read_fields,
    value_of,
)
from .presence import count_present
from .reader import BLOCK_MS, ENTRIES_PER_READ
from .state import Keys

_CURSOR = re.compile(r"([0-9a-f]{8})-([0-9]{1,20})-([0-9]{1,20})(?:-1|(\.[0-9]{1,9}))?", re.ASCII)


class News(NamedTuple):
    """Something that the stream says: a batch, or in words what else has happened."""

    content: Batch | str
    time: float
    """When it was added, by the clock of Redis, in seconds since 1970."""
    cursor: str
    """The cursor after it. Empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisFacts:
    """What Redis knows of all processes. None: Redis does not say, or there is none. Ages are in seconds."""

    stream: str
    """The key of the stream."""
    entries: int
    memory_bytes: int | None
    epoch: str | None
    oldest_age: float | None
    newest_age: float | None
    processes: int | None
    """Processes that read the stream, because they have clients."""
    kicked_users: int | None
    """Users whose older tokens are refused."""


class Inspection:
    """What `RedisBackend.inspect` returns. `connect` makes a client, which ``with`` closes. Not thread-safe."""

    def __init__(self, keys: Keys, connect: Callable[[], Any]) -> None:
        self._keys = keys
        self._client = connect()

    def __enter__(self) -> Inspection:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()

    def facts(self) -> RedisFacts:
        """Ask for all of it once. Raises `BackendError` if Redis does not answer."""
        stream = self._keys.stream
        try:
            with understood():
                now = microseconds_of(self._client.time()) / MICROSECONDS
                oldest = raw_entries(self._client.xrange(stream, count=1))
                entries, newest = self._length(), self._newest(1)
                return RedisFacts(
                    stream=stream,
                    entries=entries,
                    memory_bytes=self._if_allowed(lambda: self._client.memory_usage(stream)),
                    epoch=self._epoch() or None,
                    oldest_age=_age(oldest, now),
                    newest_age=_age(newest, now),
                    processes=self._if_allowed(lambda: count_present(self._client, self._keys.processes, now)),
                    kicked_users=self._if_allowed(lambda: max(0, self._client.zcard(self._keys.kicked) - 1)),
                )
        except errors() as error:
            raise BackendError(f"reading from Redis failed: {error}") from error

    def follow(self, last: int, cursor: str) -> Iterator[News]:
        """Return what is added from this call on, one by one; first the newest `last` entries, or all after the cursor.

        It never ends: if Redis is away, it waits. Raises `BackendError` if Redis does not answer this call.
        """
        try:
            with understood():
                epoch = self._epoch()
                begin, missed = self._beginning(last, cursor, epoch)
        except errors() as error:
            raise BackendError(f"reading from Redis failed: {error}") from error
        return self._follow(begin, epoch, missed)

    def _follow(self, begin: tuple[int, int], epoch: str, missed: str) -> Iterator[News]:
        if missed:
            yield News(missed, time.time(), "")
        retries = pauses()
        is_away = False
        while True:
            try:
                with understood():
                    entries, first, now_epoch = self._read(begin)
            except errors() as error:
                if not is_away:
                    is_away = True
                    yield News(f"Redis does not answer, and is asked again and again: {error}", time.time(), "")
                time.sleep(next(retries))
                continue
            if is_away:
                is_away, retries = False, pauses()
                yield News("Redis answers again", time.time(), "")
            if epoch and now_epoch != epoch:
                text = "Redis has lost data, or the stream was replaced: events may be missing, or come again"
                yield News(text, time.time(), "")
                begin = (0, 0)
                epoch = now_epoch
                continue
            epoch = now_epoch
            if begin != (0, 0) and first and numbers(first[0][0]) > begin and entries:
                yield News("this command was too slow: events may be missing", time.time(), "")
            for id, fields in entries:
                begin = numbers(id)
                yield from self._news(epoch, id, fields)

    def _read(self, begin: tuple[int, int]) -> tuple[list[RawEntry], list[RawEntry], str]:
        """Return the next entries, the first one of the stream, and the epoch."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.xread({self._keys.stream: f"{begin[0]}-{begin[1]}"}, count=ENTRIES_PER_READ, block=BLOCK_MS)
        pipeline.xrange(self._keys.stream, count=1)
        pipeline.get(self._keys.epoch)
        news, first, epoch = pipeline.execute()
        return new_entries(news), raw_entries(first), value_of(epoch).decode("ascii", "replace")

    def _beginning(self, last: int, cursor: str, epoch: str) -> tuple[tuple[int, int], str]:
        """Return the id after which to read, and in words whether something after the cursor is missing."""
        newest = self._newest(last + 1)
        if not cursor:
            whole = len(newest) <= last
            return ((0, 0) if whole else numbers(newest[-1][0])), ""
        found = _CURSOR.fullmatch(cursor)
        if found is None or found[1] != epoch or max(int(found[2]), int(found[3])) >= 2**64:
            return (numbers(newest[0][0]) if newest else (0, 0)), (
                "events may be missing: the cursor is of another history, or has another form"
            )
        begin = int(found[2]), int(found[3])
        if found[4]:
            begin = before(begin)  # the client has a part of this entry
        first = raw_entries(self._client.xrange(self._keys.stream, count=1))
        is_trimmed = bool(first) and numbers(first[0][0]) > begin
        return begin, "events may be missing: Redis no longer has all that came after the cursor" if is_trimmed else ""

    def _newest(self, count: int) -> list[RawEntry]:
        """Return the newest entries, the newest first."""
        return raw_entries(self._client.xrevrange(self._keys.stream, count=count))

    def _length(self) -> int:
        return int(self._client.xlen(self._keys.stream))

    def _epoch(self) -> str:
        return value_of(self._client.get(self._keys.epoch)).decode("ascii", "replace")

    def _if_allowed(self, ask: Callable[[], Any]) -> int | None:
        """Return the answer; None if Redis refuses the command, to this user or in this version."""
        try:
            answer = ask()
        except errors() as error:
            if isinstance(error, OSError) or "timeout" in type(error).__name__.lower():
                raise
            return None
        return None if answer is None else int(answer)

    def _news(self, epoch: str, id: bytes, fields: dict[bytes, bytes]) -> Iterator[News]:
        name = id.decode()
        at = numbers(id)[0] / 1_000
        cursor = f"{epoch}-{name}" if epoch else ""
        entry = read_fields(fields)
        content = None if entry is None else entry.content
        if isinstance(content, Batch):
            yield News(content, at, cursor)
        elif isinstance(content, Kick):
            what = [f"the user {json.dumps(content.user)}"] if content.user is not None else []
            what += [f"the channel {json.dumps(content.channel)}"] if content.channel is not None else []
            yield News(f"kicked: {' in '.join(what)}", at, cursor)
        elif isinstance(content, Unreadable):
            yield News(f"an entry cannot be read ({content.reason})", at, cursor)
        elif entry is None:
            yield News(f"the entry {name} was not written by sse_batcher", at, cursor)


def _age(entries: list[RawEntry], now: float) -> float | None:
    return max(0.0, now - numbers(entries[0][0])[0] / 1_000) if entries else None
