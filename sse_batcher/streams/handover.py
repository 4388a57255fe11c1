"""The handover: while a server is stopping, its streams end in waves, so that other processes can take them.

If all of them ended at once, their clients would have to wait for a random time, so that they do not come back at once.
In waves, each client is without a stream for a moment only, and the streams that are still to end go on as before. That
needs other processes with the same events, in which the clients can resume.

Runs in the thread that drains. Takes no lock but the hub's.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ..runtime.worker import Deadline
from .hub import Hub

START_SECONDS = 0.5
"""Seconds before the first wave. After a reload, the new processes start meanwhile. The streams go on as before."""

WAVE_SECONDS = 0.1
"""Seconds between two waves."""

WAVE_STREAMS = 50
"""How many streams end in a wave. So few streams may as well end at once."""

HANDOVER_SECONDS = 4.0
"""How long all of it may take, in seconds. Waves are larger if there are so many streams that it would take longer."""

RETURN_MS = (500, 1_000)
"""The range of milliseconds that a client waits before it comes back. Not less, since each attempt is in vain if this
process has no successor."""

RETURNS_PER_SECOND = 600
"""How many clients may come back in a second. If larger waves end more streams, their clients wait longer."""


class Handover:
    """The streams of one hub that end in waves. It takes no more clients from now on, and stays open for the others.

    `Hub.close` and `Hub.reopen` end the handover: then the streams that are left end at once, or go on.
    """

    def __init__(self, hub: Hub, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds, from any start."""
        self._hub = hub
        self._clock = clock
        self._left = hub.hand_over()
        self._next = clock() + START_SECONDS
        most_waves = (HANDOVER_SECONDS - START_SECONDS) / WAVE_SECONDS
        self._size = max(WAVE_STREAMS, math.ceil(len(self._left) / most_waves))
        self.ended = 0
        """How many streams were ended so far."""
        # At most so many clients come back in a second: the waves take a part of the time that this needs.
        seconds = WAVE_SECONDS * math.ceil(len(self._left) / self._size)
        least, most = RETURN_MS
        more = max(0.0, len(self._left) / RETURNS_PER_SECOND - seconds)
        hub.control.return_ms = least, most + int(1_000 * more)

    @property
    def is_valid(self) -> bool:
        """Whether the hub still ends its streams in these waves. No longer if it was closed, or opened again."""
        return self._hub.handover is self._left

    def end_next(self) -> float | None:
        """End the streams whose turn has come. Return the seconds until the next wave; None: there is no other."""
        if not self.is_valid:
            return None
        if self._hub.is_empty():
            self._left.clear()  # the clients have left by themselves
        now = self._clock()
        while self._left and self._next <= now:
            self._next += WAVE_SECONDS
            wave, self._left[: self._size] = self._left[: self._size], []
            self.ended += len(wave)
            for stream in wave:
                stream.dismiss("shutdown")
        return self._next - now if self._left else None

    def run(self, deadline: Deadline) -> None:
        """End all streams in waves. Return after the last one, or when the time is over."""
        never = threading.Event()
        while (pause := self.end_next()) is not None:
            left = deadline.left()
            if left is not None and left < pause:
                return
            never.wait(pause)
