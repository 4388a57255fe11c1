"""The reader: the one thread of a process that reads the stream back, and delivers it.

Own events, too, so that all processes agree on the order. `State` is what is known of the stream.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ...errors import BackendError
from ...event import BROADCAST, Batch
from ...reasons import GapReason
from ...runtime.locks import new_lock
from ...runtime.worker import Worker
from ...streams.roles import Receiver
from ...wire import Frame, Position
from .connections import Link, conflict, errors, pauses, understood
from .entries import START, Entry, Kick, Unreadable, after, before, id_of, numbers, read_fields, to_fields

_log = logging.getLogger("sse_batcher.backends.redis")

BLOCK_MS = 500
"""How long one call of the reader waits for news. Well below the time-out of a call."""
AT_ONCE = 500
"""Entries in one call."""
MAX_PUBLISHERS = 10_000
MAX_DOUBLES = 1_000
"""Entries that came twice, of which it is known."""
UNREADABLE_SECONDS = 1.0
"""How long, at least, after clients were told of entries that cannot be read, until they are told again."""

_EPOCH = re.compile(rb"[0-9a-f]{8}")


RawEntry = tuple[bytes, dict[bytes, bytes]]
"""The id of an entry, and its fields."""


class Keys:
    """The names of the keys."""

    def __init__(self, prefix: str) -> None:
        self.stream = f"{prefix}:stream"
        self.epoch = f"{prefix}:epoch"


class State:
    """What is known of the stream.

    `lock` guards `ready`, `read`, `settled`, `generation` and `epochs`, and `changed` tells of them. `adding` is held
    while an entry is added, so that numbers rise in the stream, too. `publisher` names this process among those that
    publish.
    """

    def __init__(self) -> None:
        self.publisher = secrets.token_hex(8)
        self.lock = new_lock()
        self.changed = threading.Condition(self.lock)
        self.adding = new_lock()
        self.ready = False
        self.known = False  # whether it has been ready: never False again
        self.gave_up = False
        self.read: Position = START
        self.head: Position = START
        """The newest place that the receiver knows. By the reader, before it says in `read` that it was there."""
        self.generation = 0
        self.epochs: dict[int, str] = {}
        self.added = 0
        """The number of our newest batch that Redis has taken. By who adds it."""
        self.settled = 0
        """Our batches up to this number were read back, or are gone. By the reader."""
        self.ignored = 0
        # For who reads older entries again, up to `read`: those not to be delivered, and before what place nothing can
        # be had whole. Written by the reader, before it says in `read` that it was there.
        self.floor: Position = START
        self.doubles: OrderedDict[Position, None] = OrderedDict()
        # Milliseconds from our monotonic clock to the clock of Redis; until that is known, to the system's. By the
        # reader; one number, so that others always see a whole one.
        self._to_redis = time.time() * 1000 - time.monotonic() * 1000

    def note_double(self, position: Position) -> None:
        """This entry was there before, under another position."""
        self.doubles[position] = None
        if len(self.doubles) > MAX_DOUBLES:
            self.floor = max(self.floor, next(iter(self.doubles)))  # first this: it is not known of any more
            self.doubles.popitem(last=False)

    # -- the clock that makes the ids ----------------------------------------------------------------------------------

    def now(self) -> float:
        """The time of Redis, in milliseconds since 1970: the time of its newest entry, or later."""
        return time.monotonic() * 1000 + self._to_redis

    def set_clock(self, seconds: int, microseconds: int) -> None:
        """Redis has just said that it is so late."""
        self._to_redis = seconds * 1000 + microseconds / 1000 - time.monotonic() * 1000

    def see_time(self, milliseconds: int) -> None:
        """There is an entry of this time."""
        if milliseconds > self.now():
            self._to_redis = milliseconds - time.monotonic() * 1000


class Reader:
    """The thread that reads the stream. Holds the receiver weakly, so that a dropped manager ends it.

    `clock` is monotonic time in seconds.
    """

    def __init__(
        self, receiver: Receiver, keys: Keys, link: Link, state: State, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.started = False
        self._link = link
        self._receiver = weakref.ref(receiver)
        self._keys = keys
        self._state = state
        self._clock = clock
        self._closed = threading.Event()
        self._pauses = pauses()
        # An entry that is still there if nothing after it was trimmed: the one read last, or the first one to be read.
        # With its fields: after a failover another one may have got the same id. None: nothing that was read is there.
        self._anchor: RawEntry | None = None
        self._numbers: OrderedDict[str, int] = OrderedDict()  # of each publisher, the newest that was read
        # The same, when the line of entries broke last: what was read before that is not where others have it.
        self._numbers_before: dict[str, int] = {}
        self._moved = False  # such an entry has come again, or another line begins, and clients were not told of it yet
        # The channels of entries that cannot be read, of which clients were not told yet; and when they may be told.
        self._untold: dict[str, None] = {}
        self._next_telling = float("-inf")
        self._has_logged = False
        self._worker = Worker(self, "sse_batcher-redis")

    def start(self) -> None:
        """Read from now on. Idempotent."""
        if not self.started:
            self.started = True
            self._worker.wake()
        if not self._closed.is_set():
            self._worker.ensure()

    def close(self, timeout: float | None) -> bool:
        self._closed.set()
        self._worker.stop()
        self._link.disconnect()  # or it would wait for news until its call ends by itself
        return self._worker.join(timeout)

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`: wait for news, and deliver them."""
        receiver = self._receiver()
        if receiver is None or self._closed.is_set():
            self._link.drop()
            self._link.rest()
            return None
        self._link.ask()
        try:
            if not self._state.ready:
                self._find_epoch(receiver)
            self._read_on(receiver)
        except Exception as error:
            if self._closed.is_set():
                return 0.0  # whatever redis-py makes of a connection that was cut under it
            if not isinstance(error, errors()):
                self._link.drop()
                raise
            self._link.fail(error)
            return next(self._pauses)
        self._pauses = pauses()
        self._link.succeed()
        return 0.0

    # -- the first look, and the first at another stream ---------------------------------------------------------------

    def _find_epoch(self, receiver: Receiver) -> None:
        """See whether this is a stream that was not met before, and begin where it begins."""
        state = self._state
        epoch, first = self._look()
        if not self._is_current(epoch) and (not _EPOCH.fullmatch(epoch) or not first or self._was_met(epoch)):
            self._begin_epoch(epoch)
            epoch, first = self._look()
        if not _EPOCH.fullmatch(epoch):
            raise BackendError(f"the key {self._keys.epoch} holds {epoch!r}, which is not an epoch")
        if self._is_current(epoch):
            return
        begins = not state.epochs
        if not begins:
            _log.warning(
                "the stream %s is not the one that was read before: Redis has lost data, another master has taken "
                "over, or somebody has deleted a key. Clients get sse_gap",
                self._keys.stream,
            )
        with state.lock:
            state.generation += not begins
            state.epochs[state.generation] = epoch.decode()
            state.changed.notify_all()
        # The numbers stay: where it is only the key that was lost, what is in the stream was had already.
        self._break_line()
        self._anchor = first
        position: Position = (state.generation, *(before(numbers(first[0])) if first else (0, 0)), 0)
        if begins:
            self._lose(receiver, BROADCAST, position, "too_old")
        # Clients are told after what they have had already, or as soon as there is nothing more: a moment later.
        self._moved = not begins
        self._advance(position)

    def _is_current(self, epoch: bytes) -> bool:
        return epoch.decode("ascii", "replace") == self._state.epochs.get(self._state.generation)

    def _was_met(self, epoch: bytes) -> bool:
        """Whether it is an older one that has come back: there may be cursors of it that mean something else."""
        return epoch.decode("ascii", "replace") in self._state.epochs.values()

    def _look(self) -> tuple[bytes, RawEntry | None]:
        """The epoch, and the first entry. Takes the time, too."""
        pipeline = self._link.client.pipeline(transaction=False)
        pipeline.get(self._keys.epoch)
        pipeline.xrange(self._keys.stream, count=1)
        pipeline.time()
        with understood():
            epoch, first, now = pipeline.execute()
            self._state.set_clock(*now)
            return _text(epoch), next(iter(_raw(first)), None)

    def _begin_epoch(self, known: bytes) -> None:
        """Give the epoch another name than this one, unless another process has done so, and an entry with it.

        Every place that anybody is told of it is that of this entry, or after it: so where the stream begins says
        whether all is there. Versions of Redis before 7 have no other way to tell.
        """
        with self._link.client.pipeline(transaction=True) as pipeline:
            pipeline.watch(self._keys.epoch)
            if (pipeline.get(self._keys.epoch) or b"") != known:
                return
            pipeline.xadd(self._keys.stream, to_fields(Entry(secrets.token_hex(8), 0, None)))  # first, see above
            pipeline.multi()
            pipeline.set(self._keys.epoch, secrets.token_hex(4))
            with suppress(conflict()):
                pipeline.execute()

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _read_on(self, receiver: Receiver) -> None:
        state, keys, anchor = self._state, self._keys, self._anchor
        added = state.added  # before the question, so that the answer is about all of these
        # In one go: what is new, and afterwards whether this is still the same stream, and whether the last entry read
        # is still there, or the first one that is to be. If it is, nothing after it was trimmed.
        pipeline = self._link.client.pipeline(transaction=False)
        pipeline.xread({keys.stream: id_of(state.read)}, count=AT_ONCE, block=BLOCK_MS if state.ready else None)
        pipeline.get(keys.epoch)
        pipeline.xrange(keys.stream, *(("-", "+") if anchor is None else (anchor[0], anchor[0])), count=1)
        with understood():
            news, epoch, kept = pipeline.execute()
            entries, epoch, kept = _entries(news), _text(epoch), _raw(kept)
        if not self._is_current(epoch):
            self._set_ready(False)
            return
        if anchor is not None and kept != [anchor]:
            with understood():
                kept = _raw(self._link.client.xrange(keys.stream, count=1))
            if not self._is_older(kept):
                self._break_line()
                self._lose(receiver, BROADCAST, after(state.read), "overflow")
        elif anchor is not None:
            kept = []
        if self._is_older(kept):
            # What was read last is gone, and there is something before it: not trimmed, but another line of entries,
            # whose ids may be below those that clients have.
            self._begin_epoch(epoch)
            self._set_ready(False)
            return
        self._deliver(receiver, entries)
        if entries:
            state.see_time(numbers(entries[-1][0])[0])
        self._tell_rest(receiver)
        if not entries:
            self._tell_moved(receiver)
            with state.lock:
                state.settled = max(state.settled, added)
                state.changed.notify_all()
            if not state.ready:
                self._set_ready(True)

    def _is_older(self, found: list[RawEntry]) -> bool:
        """Whether there is an entry that has an id up to that of the last one read."""
        return bool(found) and numbers(found[0][0]) <= self._state.read[1:3]

    def _break_line(self) -> None:
        """What was read up to now is not in the stream any more, or not where it was."""
        self._anchor = None
        self._numbers_before = dict(self._numbers)

    def _set_ready(self, ready: bool) -> None:
        state = self._state
        with state.lock:
            state.ready = ready
            state.known = state.known or ready
            state.gave_up = state.gave_up and not ready
            state.changed.notify_all()

    def _deliver(self, receiver: Receiver, entries: Iterable[RawEntry]) -> None:
        state = self._state
        for id, fields in entries:
            position: Position = (state.generation, *numbers(id), 0)
            if position <= state.read:
                continue  # a proxy has repeated an answer
            entry = read_fields(fields)
            if entry is None:
                state.ignored += 1
                if state.ignored == 1:
                    _log.warning("an entry of %s is not one of ours, and is ignored: %s", self._keys.stream, id)
            elif isinstance(entry.content, Kick):
                receiver.dismiss("kicked", *entry.content)
            elif entry.content is not None:
                self._deliver_batch(receiver, entry, position)
            self._advance(position, entry)
            self._anchor = id, fields

    def _deliver_batch(self, receiver: Receiver, entry: Entry, position: Position) -> None:
        """Deliver a batch, unless it was read before: a publisher that had no answer adds it again."""
        state, number, content = self._state, entry.number, entry.content
        last = self._numbers.pop(entry.publisher, None)
        self._numbers[entry.publisher] = number if last is None else max(last, number)
        if len(self._numbers) > MAX_PUBLISHERS:
            self._numbers.popitem(last=False)
        if last is not None and number <= last:
            state.note_double(position)
            self._moved = self._moved or number <= self._numbers_before.get(entry.publisher, -1)
            return
        self._tell_moved(receiver)
        if last is not None and number > last + 1:
            self._lose(receiver, BROADCAST, after(state.read), "publish_failed")
        if isinstance(content, Unreadable):
            self._note_unreadable(receiver, content, position)
        elif isinstance(content, Batch):
            # If the clock of Redis was set back, ids have the time of the newest one until it has come to that again.
            time = int(state.now()) if state.ready and position[1] == state.read[1] else position[1]
            frame = Frame(content, position, f"{state.epochs[position[0]]}-{id_of(position)}", time)
            try:
                receiver.deliver(frame)
                state.head = position
            except Exception:  # or it would be read again and again
                _log.exception("a batch of %s cannot be delivered, and is lost", self._keys.stream)
                self._lose(receiver, content.channel, position, "publish_failed")

    def _note_unreadable(self, receiver: Receiver, content: Unreadable, position: Position) -> None:
        state = self._state
        state.ignored += 1
        self._untold[content.channel] = None
        if not self._has_logged:
            self._has_logged = True
            _log.error(
                "a batch of %s cannot be read: %s. Its clients get sse_gap. If another process has a newer version of "
                "sse_batcher, upgrade this one. Further ones are counted as ignored, and not logged",
                self._keys.stream,
                content.reason,
            )
        # Here and now, so that the place is exact. Before there are clients, none can be told too often.
        if self._clock() >= self._next_telling:
            self._tell_unreadable(receiver, position)

    def _tell_unreadable(self, receiver: Receiver, position: Position) -> None:
        """Let the clients of these channels know that they have missed something before this place."""
        for channel in self._untold:
            receiver.lose(channel, position, "publish_failed")
        self._state.head = position
        self._untold.clear()
        if self._state.known:
            self._next_telling = self._clock() + UNREADABLE_SECONDS

    def _tell_rest(self, receiver: Receiver) -> None:
        if self._untold and self._clock() >= self._next_telling:
            # Clients may have got later ones meanwhile, and have come back with their cursors.
            place = after(self._state.read)
            self._state.floor = max(self._state.floor, place)
            self._tell_unreadable(receiver, place)

    def _tell_moved(self, receiver: Receiver) -> None:
        """Let all clients know that this is another line of entries.

        What was in the old one may be lost. What this process had already, and is at another place now, it does not
        deliver: a client that comes from another process may have missed it there, and would miss it here, too.
        """
        if self._moved:
            self._moved = False
            self._lose(receiver, BROADCAST, after(self._state.read), "epoch")

    def _lose(self, receiver: Receiver, channel: str, position: Position, reason: GapReason) -> None:
        self._state.floor = max(self._state.floor, position)
        receiver.lose(channel, position, reason)
        self._state.head = position

    def _advance(self, position: Position, entry: Entry | None = None) -> None:
        state = self._state
        with state.lock:
            state.read = position
            if entry is not None and entry.publisher == state.publisher:
                state.settled = max(state.settled, entry.number)
            state.changed.notify_all()


def _entries(news: Any) -> list[RawEntry]:
    """Those of the one stream, in each shape that versions of redis-py and of the protocol give it."""
    if not news:
        return []
    if isinstance(news, dict):
        (entries,) = news.values()
        return _raw(
            [entry for group in entries for entry in group] if entries and isinstance(entries[0], list) else entries
        )
    return _raw(news[0][1])


def _raw(found: Any) -> list[RawEntry]:
    """What was found. Raises `TypeError` or `ValueError` if these are no entries."""
    entries = [(id, fields) for id, fields in found]
    if not all(isinstance(id, bytes) and isinstance(fields, dict) for id, fields in entries):
        raise TypeError("entries are expected")
    return entries


def _text(found: Any) -> bytes:
    """The value of a key, empty if there is none. Raises `TypeError` if this is none."""
    if not isinstance(found, (bytes, type(None))):
        raise TypeError("the value of a key is expected")
    return found or b""
