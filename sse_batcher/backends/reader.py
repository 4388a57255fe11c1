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
from collections.abc import Iterable
from typing import Any

from ..errors import BackendError
from ..event import BROADCAST, Batch
from ..roles import Receiver
from ..wire import Frame
from ..worker import Worker
from .connections import Link, errors, pauses
from .entries import START, Entry, Kick, Position, before, id_of, numbers, read_fields, to_fields

_log = logging.getLogger("sse_batcher.backends.redis")

BLOCK_MS = 500
"""How long one call of the reader waits for news. Well below the time-out of a call."""
AT_ONCE = 500
"""Entries in one call."""
MAX_PUBLISHERS = 10_000
MAX_DOUBLES = 1_000
"""Entries that came twice, of which it is known."""

_EPOCH = re.compile(rb"[0-9a-f]{8}")


class Keys:
    """The names of the keys."""

    def __init__(self, prefix: str) -> None:
        self.stream = f"{prefix}:stream"
        self.epoch = f"{prefix}:epoch"


class State:
    """What is known of the stream. `changed` guards and tells of `ready`, `read`, `generation` and `epochs`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.adding = threading.Lock()  # held by who adds an entry, so that numbers rise in the stream, too
        self.ready = False
        self.gave_up = False
        self.read: Position = START
        self.generation = 0
        self.epochs: dict[int, str] = {}
        self.ignored = 0
        # For who reads older entries again, up to `read`: those not to be delivered, and before what place nothing can
        # be had whole. Written by the reader, before it says in `read` that it was there.
        self.floor: Position = START
        self.doubles: OrderedDict[Position, None] = OrderedDict()
        self._asked_at: float | None = None
        self._answered_at: float | None = None
        self._failing = False

    def note_double(self, position: Position) -> None:
        """This entry was there before, under another position."""
        self.doubles[position] = None
        if len(self.doubles) > MAX_DOUBLES:
            self.floor = max(self.floor, next(iter(self.doubles)))  # first this: it is not known of any more
            self.doubles.popitem(last=False)

    @property
    def silent_for(self) -> float:
        since = self._asked_at
        return 0.0 if since is None else time.monotonic() - since

    @property
    def answered_ago(self) -> float:
        since = self._answered_at
        return self.silent_for if since is None else time.monotonic() - since

    def tell_question(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def tell_answer(self) -> None:
        self._answered_at = time.monotonic()
        self.wait_no_more()
        if self._failing:
            self._failing = False
            _log.info("Redis answers again")

    def wait_no_more(self) -> None:
        self._asked_at = None

    def tell_failure(self, what: str, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            _log.error("Redis %s: %s. It is tried again until it does; nothing more is logged until then", what, error)


class Reader:
    """The thread that reads the stream. Holds the receiver weakly, so that a dropped manager ends it."""

    def __init__(self, receiver: Receiver, keys: Keys, frames: int, connect: Any, state: State) -> None:
        self.started = False
        self._receiver = weakref.ref(receiver)
        self._keys = keys
        self._frames = frames
        self._state = state
        self._link = Link(connect)
        self._closed = threading.Event()
        self._pauses = pauses()
        self._anchor = b""  # the id of the entry that is still there if nothing after it was trimmed
        self._lost = ""  # why something before the next entry is missing
        self._numbers: OrderedDict[str, int] = OrderedDict()  # of each publisher, the newest that was read
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
            self._state.wait_no_more()
            return None
        self._state.tell_question()
        try:
            if not self._state.ready:
                self._find_epoch(receiver)
            self._read_on(receiver)
        except Exception as error:
            if self._closed.is_set():
                return 0.0  # whatever redis-py makes of a connection that was cut under it
            self._link.drop()
            if not isinstance(error, errors()):
                raise
            self._state.tell_failure("cannot be read", error)
            return next(self._pauses)
        self._pauses = pauses()
        self._state.tell_answer()
        return 0.0

    # -- the first look, and the first at another stream ---------------------------------------------------------------

    def _find_epoch(self, receiver: Receiver) -> None:
        """See whether this is a stream that was not met before, and begin where it begins."""
        state = self._state
        epoch, first = self._look()
        if not _EPOCH.fullmatch(epoch) or not first:
            self._begin_epoch(replaces=bool(epoch) and not _EPOCH.fullmatch(epoch))
            epoch, first = self._look()
        if not _EPOCH.fullmatch(epoch):
            raise BackendError(f"the key {self._keys.epoch} holds {epoch!r}, which is no epoch")
        name = epoch.decode()
        if state.epochs.get(state.generation) == name:
            return
        reason = "epoch" if state.epochs else "too_old"
        with state.changed:
            state.generation += bool(state.epochs)
            state.epochs[state.generation] = name
            state.changed.notify_all()
        # The numbers stay: where it is only the key that was lost, what is in the stream was had already.
        position: Position = (state.generation, *(before(numbers(first)) if first else (0, 0)))
        self._lose(receiver, BROADCAST, position, reason)
        self._lost = ""
        self._advance(position)
        self._anchor = first

    def _look(self) -> tuple[bytes, bytes]:
        """The epoch, and the id of the first entry."""
        pipeline = self._link.client.pipeline(transaction=False)
        pipeline.get(self._keys.epoch)
        pipeline.xrange(self._keys.stream, count=1)
        epoch, entries = pipeline.execute()
        return epoch or b"", entries[0][0] if entries else b""

    def _begin_epoch(self, *, replaces: bool) -> None:
        """Give the epoch a name, if it has none, and an entry with it.

        Every place that anybody is told of it is that of this entry, or after it: so where the stream begins says
        whether all is there. Versions of Redis before 7 have no other way to tell.
        """
        pipeline = self._link.client.pipeline(transaction=True)
        pipeline.set(self._keys.epoch, secrets.token_hex(4), nx=not replaces)
        pipeline.xadd(self._keys.stream, to_fields(Entry(secrets.token_hex(8), 0, None)))
        pipeline.execute()

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _read_on(self, receiver: Receiver) -> None:
        state, keys = self._state, self._keys
        # In one go: what is new, and afterwards whether this is still the same stream, and whether the last entry read
        # is still there, or the first one that is to be. If it is, nothing after it was trimmed.
        pipeline = self._link.client.pipeline(transaction=False)
        pipeline.xread({keys.stream: id_of(state.read)}, count=AT_ONCE, block=BLOCK_MS if state.ready else None)
        pipeline.get(keys.epoch)
        pipeline.xrange(keys.stream, min=self._anchor or "-", max=self._anchor or "+", count=1)
        news, epoch, kept = pipeline.execute()
        entries = _entries(news)
        if epoch is None or epoch.decode("ascii", "replace") != state.epochs[state.generation]:
            self._set_ready(False)
            return
        if self._anchor and not kept:
            self._lost = self._lost or "overflow"
            state.floor = max(state.floor, state.read)
        self._deliver(receiver, entries)
        if not entries and not state.ready:
            self._set_ready(True)

    def _set_ready(self, ready: bool) -> None:
        state = self._state
        with state.changed:
            state.ready = ready
            state.gave_up = state.gave_up and not ready
            state.changed.notify_all()

    def _deliver(self, receiver: Receiver, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> None:
        state = self._state
        for id, fields in entries:
            position: Position = (state.generation, *numbers(id))
            entry = read_fields(fields)
            if entry is None:
                state.ignored += 1
                if state.ignored == 1:
                    _log.warning("an entry of %s is none of ours and ignored: %s", self._keys.stream, id)
            elif self._had(entry):
                state.note_double(position)
            elif entry.content is not None:
                self._deliver_one(receiver, entry.content, position)
            self._advance(position)
            self._anchor = id

    def _deliver_one(self, receiver: Receiver, content: Batch | Kick, position: Position) -> None:
        if self._lost:
            # Up to here, and not to just before it: there may be no place between this entry and the last one.
            self._lose(receiver, BROADCAST, position, self._lost)
        if isinstance(content, Kick):
            receiver.dismiss("kicked", *content)
        elif not self._lost:
            epoch = self._state.epochs[position[0]]
            try:
                receiver.deliver(Frame(content, position, f"{epoch}-{id_of(position)}"))
            except Exception:  # or it would be read again and again
                _log.exception("a batch of %s cannot be delivered, and is lost", self._keys.stream)
                self._lose(receiver, content.channel, position)
        self._lost = ""

    def _lose(self, receiver: Receiver, channel: str, position: Position, reason: str = "publish_failed") -> None:
        self._state.floor = max(self._state.floor, position)
        receiver.lose(channel, position, reason)

    def _had(self, entry: Entry) -> bool:
        """Whether it was read before: its publisher added it twice, since it had no answer. Notes what is missing."""
        if not isinstance(entry.content, Batch):
            return False
        last = self._numbers.pop(entry.publisher, None)
        self._numbers[entry.publisher] = entry.number if last is None else max(last, entry.number)
        if len(self._numbers) > MAX_PUBLISHERS:
            self._numbers.popitem(last=False)
        if last is not None and entry.number > last + 1:
            self._lost = self._lost or "publish_failed"
        return last is not None and entry.number <= last

    def _advance(self, position: Position) -> None:
        with self._state.changed:
            self._state.read = position
            self._state.changed.notify_all()


def _entries(news: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Those of the one stream, in each shape that versions of redis-py and of the protocol give it."""
    if not news:
        return []
    if isinstance(news, dict):
        (entries,) = news.values()
        return [entry for group in entries for entry in group] if entries and isinstance(entries[0], list) else entries
    return list(news[0][1])
