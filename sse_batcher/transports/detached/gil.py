"""When the loop gives the GIL to other threads.

Runs on the loop's thread. Takes no lock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from ...streams.counts import LoopCounts

PAUSE_SECONDS = 0.00005
"""Length of a pause of the `GilYielder`, in seconds. Another thread needs this long to wake up and take the GIL."""

SHORT_INTERVAL_SECONDS, LONG_INTERVAL_SECONDS = 0.0005, 0.008
"""Seconds between two pauses, while other threads want the GIL and while they do not. A pause costs as much as ten
sends."""

DEMAND_SECONDS = 0.05
"""Seconds for which the `GilYielder` assumes that other threads want the GIL, after one has taken it in a pause."""


if sys.platform == "linux":
    import resource

    def count_voluntary_waits() -> int:
        """Return how often this thread has had to wait."""
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

else:  # the loop needs epoll, so it does not run here

    def count_voluntary_waits() -> int:
        """Return 0."""
        return 0


class GilYielder:
    """Decides when the loop pauses between sends, to give the GIL to other threads.

    The sends do not release the GIL (see `sending`), so without pauses the other threads of the process would stand
    still. A thread that serves a request needs the GIL several times, and waits for the next pause each time. So the
    pauses are frequent while other threads use them. That they do is seen from the system's count of this thread's
    waits: a thread that has the GIL when a pause is over makes this thread wait a second time.

    A CPU-bound thread that gets the GIL in a pause keeps it for a whole switch interval (5 ms). After that, the loop
    may send for as long.

    `clock` gives seconds, from any start. `sleep` pauses for so many seconds. `count_waits` returns how often the
    calling thread has had to wait. The pauses are counted in `counts`. Used by the loop's thread only.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        count_waits: Callable[[], int] = count_voluntary_waits,
        counts: LoopCounts | None = None,
    ) -> None:
        self._counts = LoopCounts() if counts is None else counts
        self._clock = clock
        self._sleep = sleep
        self._count_waits = count_waits
        self._next_pause = 0.0
        self._used_at = -DEMAND_SECONDS  # when another thread took the GIL in a pause

    def begin(self) -> float:
        """Start an interval. Call this after the loop has waited for events: other threads had the GIL meanwhile.

        Returns the time.
        """
        now = self._clock()
        self._next_pause = now + self._interval(now)
        return now

    def pause(self) -> bool:
        """Pause if the interval is over. Returns whether there was a pause. Call this after each turn of sends."""
        began = self._clock()
        if began < self._next_pause:
            return False
        waits = self._count_waits()
        self._sleep(PAUSE_SECONDS)
        ended = self._clock()
        if self._count_waits() > waits + 1:
            self._used_at = ended
        self._counts.yields += 1
        self._counts.yielded += ended - began
        self._next_pause = ended + max(self._interval(ended), min(ended - began, LONG_INTERVAL_SECONDS))
        return True

    def _interval(self, now: float) -> float:
        return SHORT_INTERVAL_SECONDS if now - self._used_at < DEMAND_SECONDS else LONG_INTERVAL_SECONDS
