"""File descriptors: whether this process has room for another stream.

A server that has no file descriptors left ends, or accepts no connections any more: gunicorn's worker dies with all of
its streams. So streams are refused while there is still room for other connections, files and databases.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable

from ..runtime.log_fields import log_fields
from ..runtime.log_once import LogOnce
from ..runtime.process import PerProcess

_log = logging.getLogger("sse_batcher.descriptors")

RECOUNT_FACTOR = 500
"""The file descriptors are not counted again for this many times as long as counting them took, which is 1 to 2 ms.
Before Linux 6.2, counting 10,000 takes 9 ms."""

MAX_RECOUNT_SECONDS = 0.5
"""They are counted again after this time in any case: a thread that has to wait for the GIL while it counts seems to
count for long, and meanwhile all streams that come, also those that have ended, would count as open."""

DESCRIPTORS_PER_STREAM = 2
"""How many file descriptors a new stream takes until they are counted again: its connection, and our duplicate of
it."""

MAX_RESERVE = 1024
"""The most file descriptors that are reserved for everything but streams. By default, gunicorn accepts 1,000
connections at once, before any of our code is asked."""


class Descriptors:
    """The file descriptors of one process.

    Any thread. Takes no lock. `clock` gives seconds, from any start. `limit` returns how many file descriptors the
    process may have, and `used` how many it has; None if that is unknown. `reserve` returns how many of a limit are not
    for streams.

    Harmless race: two threads may both take the last room, or both count. The reserve has room for that.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        limit: Callable[[], int | None] | None = None,
        used: Callable[[], int | None] | None = None,
        reserve: Callable[[int], int] | None = None,
    ) -> None:
        self._clock = clock
        self._limit = limit or descriptor_limit
        self._used = used or descriptors_in_use
        self._reserve = reserve or reserved
        self._room = 0.0
        self._next_count = -math.inf
        self._log_once = LogOnce(_log)

    def take(self) -> bool:
        """Take room for one more stream. Returns False, and logs a warning once, if there is none."""
        began = self._clock()
        if began >= self._next_count:
            self._room = self._count_room()
            ended = self._clock()
            self._next_count = ended + min(RECOUNT_FACTOR * (ended - began), MAX_RECOUNT_SECONDS)
        if self._room >= DESCRIPTORS_PER_STREAM:
            self._room -= DESCRIPTORS_PER_STREAM
            return True
        self._log_once.log(
            logging.WARNING,
            "further streams are refused: this process may have %s file descriptors, and most are in use. Raise "
            "this limit (ulimit -n, LimitNOFILE= of systemd, --ulimit nofile= of Docker), or run more processes. "
            "max_clients (SSE_MAX_CLIENTS) is a limit of your own",
            self._limit(),
            extra=log_fields("descriptors_used_up", limit=self._limit()),
        )
        return False

    def _count_room(self) -> float:
        """Return how many file descriptors streams may take now; infinite if the system does not tell."""
        limit, used = self._limit(), self._used()
        return math.inf if limit is None or used is None else limit - self._reserve(limit) - used


def reserved(limit: int) -> int:
    """Return how many of so many file descriptors are left to everything but streams."""
    return min(limit // 4, MAX_RESERVE)


if sys.platform == "win32":

    def descriptor_limit() -> int | None:
        """Return None: this system has no such limit."""
        return None

else:
    import resource

    def descriptor_limit() -> int | None:
        """Return how many file descriptors this process may have; None if there is no limit."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return None if limit == resource.RLIM_INFINITY else limit


def descriptors_in_use() -> int | None:
    """Return how many file descriptors this process has; None if the system does not tell."""
    try:
        # The size is their number since Linux 6.2, and 0 before.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


descriptors = PerProcess(Descriptors)
"""The file descriptors of this process."""
