"""The kicks of users in Redis: a sorted set, in which each kicked user has the time of the newest kick.

All times are those of Redis, in microseconds since 1970. The set is read when a stream opens with a token that has a
user, so a process also knows the kicks from before it was started. Follows https://redis.io/docs/latest/commands/zadd/
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ...event import User
from ..kicks import MAX_TOKEN_SECONDS, MICROSECONDS
from .connections import Link, SharedLink
from .entries import microseconds_of

_SINCE = "since"
"""The member whose time says since when kicks are known. Users are JSON, so no user is this member."""


class RedisKicks:
    """The set at the key `key`. `reader` is the reader's link. `connect` makes a client. Thread-safe.

    It has one connection, and asks for one thread at a time. If Redis loses the set, it has lost kicks. So tokens that
    were made before the set was begun are refused.
    """

    def __init__(self, key: str, connect: Callable[[], Any], reader: Link) -> None:
        self._key = key
        self._link = SharedLink(connect, "Reading kicks from", "kicks", reader)
        self._since: int | None = None

    def begin(self) -> int:
        """Have tokens accepted that are made after the time that is returned. Raises `BackendError`.

        Only the first call asks Redis.
        """
        if self._since is None:
            self._since = self._link.ask(self._begin)
        return self._since

    def until(self, user: User) -> int:
        """Return the time up to which tokens of this user are refused. Raises `BackendError`."""

        def ask(client: Any) -> int:
            pipeline = client.pipeline(transaction=False)
            pipeline.zscore(self._key, _member(user))
            pipeline.zscore(self._key, _SINCE)
            kicked, since = pipeline.execute()
            return max(int(kicked or 0), self._begin(client) if since is None else int(since))

        return self._link.ask(ask)

    def add(self, client: Any, user: User, stamp: int) -> int:
        """Note a kick, and forget those that no token can be older than. Return its time, which is `stamp` or later.

        Uses the client of the caller, and raises what that raises.
        """
        now = max(stamp, microseconds_of(client.time()))
        oldest = now - MAX_TOKEN_SECONDS * MICROSECONDS
        pipeline = client.pipeline(transaction=True)
        pipeline.zadd(self._key, {_SINCE: now}, nx=True)
        pipeline.zadd(self._key, {_SINCE: oldest}, xx=True, gt=True)  # so that it is not removed with old kicks
        pipeline.zadd(self._key, {_member(user): now}, gt=True)
        pipeline.zremrangebyscore(self._key, "-inf", f"({oldest}")
        pipeline.execute()
        return now

    def close(self) -> None:
        self._link.close()

    def _begin(self, client: Any) -> int:
        """Note that kicks are known since now, unless another process has begun before. Return since when they are."""
        client.zadd(self._key, {_SINCE: microseconds_of(client.time())}, nx=True)
        return int(client.zscore(self._key, _SINCE))


def _member(user: User) -> str:
    return json.dumps(user)
