"""Presence: how many processes read a Redis stream, from a sorted set in which each process notes the time.

The reader's thread, except for `count`. The note is four small commands every ten seconds. It is for the monitor only:
if Redis refuses it, the number is not known, and nothing else changes.
"""

from __future__ import annotations

import math
from typing import Any

from .connections import refusals

NOTE_SECONDS = 10.0
"""How often each process notes that it is there."""
GONE_SECONDS = 30.0
"""A process that has noted nothing for so long does not count any more."""


class Presence:
    """The note of one process. `key` is that of the set, and `name` names the process."""

    def __init__(self, key: str, name: str) -> None:
        self._key = key
        self._name = name
        self._next = -math.inf
        self.count: int | None = None
        """How many processes there were at the last note; None if that is not known. Any thread may read it."""

    def note(self, client: Any, now: float, now_ms: float) -> None:
        """Note that this process is there, and count all, if it is time to.

        `now` is monotonic, in seconds; `now_ms` is the time of Redis. Raises what the client raises, but no refusal.
        """
        if now < self._next:
            return
        self._next = now + NOTE_SECONDS
        pipeline = client.pipeline(transaction=False)
        pipeline.zadd(self._key, {self._name: int(now_ms)})
        pipeline.zremrangebyscore(self._key, "-inf", f"({int(now_ms - 1000 * GONE_SECONDS)}")
        # Of a time at which the clock of Redis was wrong: it would count for as long as the clock was ahead.
        pipeline.zremrangebyscore(self._key, f"({int(now_ms + 1000 * GONE_SECONDS)}", "+inf")
        pipeline.zcard(self._key)
        try:
            self.count = int(pipeline.execute()[-1])
        except refusals():  # such as a missing right, or no memory left
            self.count = None


def count_present(client: Any, key: str, now: float) -> int:
    """Return how many processes are there, by their notes alone. `now`: the time of Redis, in seconds."""
    return int(client.zcount(key, int((now - GONE_SECONDS) * 1000), "+inf"))
