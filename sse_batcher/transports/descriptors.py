"""The file descriptors of this process: whether there is room for another stream.

Any thread. Takes no lock. A server that has none left ends, or stops accepting: gunicorn's worker dies with all of its
streams. So streams are refused while there is still room for other connections, files and databases.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

from ..runtime.process import PerProcess

_log = logging.getLogger("sse_batcher.descriptors")

_resource: Any = importlib.import_module("resource") if os.name == "posix" else None

PAUSE = 50
"""How many times as long as it took to count them they are not counted again. Before Linux 6.2, 10,000 take 9 ms."""

EACH = 2
"""How many a new stream takes until then: its connection, and our duplicate of that."""


class Descriptors:
    """Those of one process. `clock` is in seconds, from any start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._room = 0.0
        self._next_count = -math.inf
        self._told = False

    def take(self) -> bool:
        """Whether there is room for one more stream, which is about to take it. The log says once that there is none.

        Two threads at once may both get the room for one: a harmless race, since others have a reserve.
        """
        began = self._clock()
        if began >= self._next_count:
            self._room = _room()
            ended = self._clock()
            self._next_count = ended + PAUSE * (ended - began)
        if self._room >= EACH:
            self._room -= EACH
            return True
        if not self._told:
            self._told = True
            _log.warning(
                "further streams are refused: this process may have %s file descriptors, and most are in use. Raise "
                "this limit (ulimit -n, LimitNOFILE= of systemd, --ulimit nofile= of Docker), or run more processes. "
                "max_clients (SSE_MAX_CLIENTS) is a limit of your own",
                _limit(),
            )
        return False


def reserve(limit: int) -> int:
    """How many of them are left to everything but streams.

    gunicorn accepts 1,000 connections at once, unless told otherwise, before any of our code is asked.
    """
    return min(limit // 4, 1024)


def _room() -> float:
    """How many streams may take now. There is no limit if the system does not tell."""
    limit, used = _limit(), _used()
    return math.inf if limit is None or used is None else limit - reserve(limit) - used


def _limit() -> int | None:
    """How many this process may have."""
    if _resource is None:
        return None
    limit, _ = _resource.getrlimit(_resource.RLIMIT_NOFILE)
    return None if limit == _resource.RLIM_INFINITY else int(limit)


def _used() -> int | None:
    """How many it has."""
    try:
        # The size is their number since Linux 6.2, and 0 before.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


descriptors = PerProcess(Descriptors)
"""This process's."""
