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
from ..hub import Receiver
from ..wire import Frame
from ..worker import Worker
from .connections import errors, pauses
from .entries import START, Entry, Kick, Position, after, before, id_of, numbers, read_fields

_log = logging.getLogger("sse_batcher.backends.redis")

BLOCK_MS = 500
"""How long one call of the reader waits for news. Well below the time-out of a call."""
AT_ONCE = 500
"""Entries in one call."""
MAX_PUBLISHERS = 10_000

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
        self._asked_at: float | None = None
        self._failing = False

    @property
    def silent_for(self) -> float:
        since = self._asked_at
        return 0.0 if since is None else time.monotonic() - since

    def tell_question(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def tell_answer(self) -> None:
        self._asked_at = None
        if self._failing:
            self._failing = False
            _log.info("Redis answers again")

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
        self._connect = connect
        self._state = state
        self._client: Any = None
        self._closed = False
        self._pauses = pauses()
        self._lost = ""  # why something before the next entry is missing
        self._numbers: OrderedDict[str, int] = OrderedDict()  # of each publisher, the newest that was read
        self._worker = Worker(self, "sse_batcher-redis")

    def start(self) -> None:
        """Read from now on. Idempotent."""
        if not self.started:
            self.started = True
            self._worker.wake()
        if not self._closed:
            self._worker.ensure()

    def close(self, timeout: float | None) -> bool:
        self._closed = True
        self._worker.stop()
        return self._worker.join(timeout)

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`: wait for news, and deliver them."""
        receiver = self._receiver()
        if receiver is None or self._closed:
            self._client = None
            self._state.tell_answer()  # none is waited for any more
            return None
        self._state.tell_question()
        try:
            if self._client is None:
                self._client = self._connect()
            if self._state.ready:
                self._read_on(receiver)
            else:
                self._begin(receiver)
        except errors() as error:
            self._client = None
            self._state.tell_failure("cannot be read", error)
            return next(self._pauses)
        self._pauses = pauses()
        self._state.tell_answer()
        return 0.0

    # -- the first look, and the first at another stream ---------------------------------------------------------------

    def _begin(self, receiver: Receiver) -> None:
        """Read what there is, up to the end."""
        client, state = self._client, self._state
        self._set_epoch(self._epoch(), receiver)
        before_first = self._before_first()
        if before_first > state.read:
            receiver.lose(BROADCAST, before_first, "too_old")
            self._advance(before_first)
        while entries := client.xrange(self._keys.stream, min=after(state.read), count=AT_ONCE):
            self._deliver(receiver, entries)
        with state.changed:
            state.ready, state.gave_up = True, False
            state.changed.notify_all()

    def _epoch(self) -> bytes:
        client, key = self._client, self._keys.epoch
        epoch = client.get(key)
        if epoch is None or not _EPOCH.fullmatch(epoch):
            client.set(key, secrets.token_hex(4), nx=epoch is None)
            epoch = client.get(key) or b""
        if not _EPOCH.fullmatch(epoch):
            raise BackendError(f"the key {key} holds {epoch!r}, which is no epoch")
        return bytes(epoch)

    def _before_first(self) -> Position:
        """The position of the newest entry that was there once and is no more, or a later one before all that are."""
        try:
            info = self._client.xinfo_stream(self._keys.stream)
        except errors("ResponseError"):
            return self._state.read  # there is no such stream yet
        if info.get("entries-added") == info["length"]:
            return self._state.read  # none has ever gone. Redis 6 does not say
        first = info["first-entry"]
        return (
            self._state.generation,
            *(before(numbers(first[0])) if first else numbers(info["last-generated-id"])),
        )

    def _set_epoch(self, epoch: bytes, receiver: Receiver) -> None:
        state, name = self._state, epoch.decode()
        if state.epochs.get(state.generation) == name:
            return
        if state.epochs:
            with state.changed:
                state.generation += 1
                state.epochs[state.generation] = name
                state.ready = False
                state.changed.notify_all()
            # The numbers stay: where it is only the key that was lost, what is in the stream was had already.
            self._lost = ""
            receiver.lose(BROADCAST, (state.generation, 0, 0), "epoch")
            self._advance((state.generation, 0, 0))
        else:
            state.epochs[0] = name

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _read_on(self, receiver: Receiver) -> None:
        state, keys = self._state, self._keys
        last = id_of(state.read)
        # In one go: what is new, and afterwards whether this is still the same stream, and whether the last entry read
        # is still there. If it is, nothing after it was trimmed.
        pipeline = self._client.pipeline(transaction=False)
        pipeline.xread({keys.stream: last}, count=AT_ONCE, block=BLOCK_MS)
        pipeline.get(keys.epoch)
        pipeline.xrange(keys.stream, min=last, max=last)
        news, epoch, kept = pipeline.execute()
        if epoch is None or epoch.decode("ascii", "replace") != state.epochs[state.generation]:
            self._begin_anew()
            return
        if not kept and state.read[1:] != (0, 0):
            self._lost = self._lost or "overflow"
        self._deliver(receiver, _entries(news))

    def _begin_anew(self) -> None:
        with self._state.changed:
            self._state.ready = False

    def _deliver(self, receiver: Receiver, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> None:
        state = self._state
        for id, fields in entries:
            position: Position = (state.generation, *numbers(id))
            entry = read_fields(fields)
            if entry is None:
                state.ignored += 1
                if state.ignored == 1:
                    _log.warning("an entry of %s is none of ours and ignored: %s", self._keys.stream, id)
            elif not self._had(entry):
                self._deliver_one(receiver, entry.content, position)
            self._advance(position)

    def _deliver_one(self, receiver: Receiver, content: Batch | Kick, position: Position) -> None:
        if self._lost:
            # Up to here, and not to just before it: there may be no place between this entry and the last one.
            receiver.lose(BROADCAST, position, self._lost)
        if isinstance(content, Kick):
            receiver.dismiss("kicked", *content)
        elif not self._lost:
            epoch = self._state.epochs[position[0]]
            try:
                receiver.deliver(Frame(content, position, f"{epoch}-{id_of(position)}"))
            except Exception:  # or it would be read again and again
                _log.exception("a batch of %s cannot be delivered, and is lost", self._keys.stream)
                receiver.lose(content.channel, position)
        self._lost = ""

    def _had(self, entry: Entry) -> bool:
        """Whether it was read before: its publisher added it twice, since it had no answer. Notes what is missing."""
        if isinstance(entry.content, Kick):
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
