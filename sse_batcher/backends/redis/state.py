"""What a process knows about the Redis stream, and the names of the keys in Redis."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import OrderedDict

from ...runtime.locks import new_lock
from ...wire import Position
from .entries import START

MAX_DUPLICATES = 1_000
"""Maximum number of remembered entries that came twice."""
CLOCK_SECONDS = 10.0
"""How old the last answer to TIME may be, by which tokens and kicks get their times."""


class Keys:
    """The names of the keys in Redis."""

    def __init__(self, prefix: str) -> None:
        self.stream = f"{prefix}:stream"
        self.epoch = f"{prefix}:epoch"
        self.kicked = f"{prefix}:kicked"
        self.processes = f"{prefix}:processes"


class State:
    """What this process knows about the stream. Only the reader changes it, except `gave_up` and `added`.

    `publisher` names this process among those that publish.
    """

    def __init__(self) -> None:
        self.publisher = secrets.token_hex(8)

        # `lock` guards writing the fields up to `adding`, and `changed` is notified of changes. They are also read
        # without it. A harmless race: each is read as a whole, and its reader then sees the state of a moment ago.
        self.lock = new_lock()
        self.changed = threading.Condition(self.lock)
        self.ready = False
        """Whether the reader has reached the end of the stream, and the stream was not replaced since."""
        self.known = False
        """Whether `ready` has ever been True."""
        self.gave_up = False
        """Whether a client has waited long for `ready` in vain. Set by the threads of clients."""
        self.read: Position = START
        """Everything up to it was read."""
        self.settled = 0
        """Batches of this process up to this number were read back, or are gone."""
        self.generation = 0
        """The number of the present epoch."""
        self.epochs: dict[int, str] = {}
        """The names of all epochs that were seen, by generation."""

        # Held while an entry is added, so that the numbers of a publisher rise in the stream. Guards writing `added`,
        # which the reader reads without it: an older number is harmless.
        self.adding = new_lock()
        self.added = 0
        """The number of this process's newest batch that Redis has taken. Set by the publishing thread."""

        # No lock: the reader writes these, each in one step. It sets `head`, `floor` and `duplicates` before `read`, so
        # that a thread that reads `read` first finds them up to date.
        self.head: Position = START
        """The newest position that the receiver knows."""
        self.floor: Position = START
        """Up to here, entries may be missing, so the archive must not read on from an older position."""
        self.duplicates: OrderedDict[Position, None] = OrderedDict()
        """Entries that the archive must not deliver, since they were delivered under another position."""
        self.ignored = 0
        """How many entries sse_batcher did not write, or could not read."""
        # The milliseconds from this process's monotonic clock to two others. Until Redis is asked: to the system's.
        self._to_redis = self._to_ids = time.time() * 1000 - time.monotonic() * 1000
        self._asked_at = -math.inf

    def note_duplicate(self, position: Position) -> None:
        """Note that this entry was delivered before, under another position."""
        self.duplicates[position] = None
        if len(self.duplicates) > MAX_DUPLICATES:
            # In this order, so that the archive never delivers a duplicate that was forgotten.
            self.floor = max(self.floor, next(iter(self.duplicates)))
            self.duplicates.popitem(last=False)

    # -- two clocks, in milliseconds since 1970 ------------------------------------------------------------------------

    def now(self) -> float:
        """Return the time of the ids: that of the newest entry, or later."""
        return time.monotonic() * 1000 + self._to_ids

    def redis_time(self) -> float:
        """Return the time of Redis. An id, which any program may choose, does not change it."""
        return time.monotonic() * 1000 + self._to_redis

    @property
    def is_clock_old(self) -> bool:
        """Whether Redis should be asked for its time again: its clock may have been set."""
        return time.monotonic() - self._asked_at >= CLOCK_SECONDS

    def set_clock(self, microseconds: int) -> None:
        """Set the clock of Redis to the time that it has just given."""
        self._asked_at = time.monotonic()
        self._to_redis = microseconds / 1000 - self._asked_at * 1000

    def begin_ids(self) -> None:
        """Set the time of the ids to that of Redis."""
        self._to_ids = self._to_redis

    def see_time(self, milliseconds: int) -> None:
        """Set the time of the ids forward if an entry has a later time."""
        if milliseconds > self.now():
            self._to_ids = milliseconds - time.monotonic() * 1000
