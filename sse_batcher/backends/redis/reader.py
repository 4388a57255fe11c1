"""The reader: the one thread of a process that reads the Redis stream back and delivers it.

It delivers the events of its own process, too, so that all processes deliver in the same order.

A *line* is one unbroken sequence of entries. When Redis has lost data, or a replica that had received less becomes the
master, the stream goes on with another line: entries are missing, or have other ids.
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

from ...errors import BackendError
from ...event import BROADCAST, Audience, Batch
from ...reasons import GapReason
from ...runtime.log_fields import log_fields
from ...runtime.log_once import LogOnce
from ...runtime.worker import Worker
from ...streams.roles import Receiver
from ...wire import Frame, Position
from .connections import Link, conflict, errors, pauses, understood
from .entries import (
    Entry,
    Kick,
    RawEntry,
    Unreadable,
    after,
    before,
    id_of,
    microseconds_of,
    new_entries,
    numbers,
    raw_entries,
    read_fields,
    to_fields,
    value_of,
)
from .presence import Presence
from .state import Keys, State

_log = logging.getLogger("sse_batcher.backends.redis")

BLOCK_MS = 500
"""How long one call waits for new entries. Must be well below `connections.CALL_TIMEOUT_SECONDS`."""
ENTRIES_PER_READ = 500
"""How many entries one call asks for."""
MAX_PUBLISHERS = 10_000
"""Maximum number of publishers whose newest number the reader remembers."""
MAX_KICKS = 10_000
"""Maximum number of remembered kicks."""
UNREADABLE_REPORT_SECONDS = 1.0
"""The shortest time between two reports to clients that entries could not be read."""

_EPOCH = re.compile(rb"[0-9a-f]{8}")


class Reader:
    """The thread that reads the stream. It has a weak reference to the receiver, so that it ends with its manager.

    `start` and `close` are thread-safe. Everything else belongs to the thread. `clock` returns monotonic time in
    seconds.
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
        # The entry that was read last, or the first one that is to be read. As long as it is in the stream, nothing
        # after it was trimmed. With its fields, since after a failover another entry may have the same id. None: no
        # entry that was read is still in the stream.
        self._anchor: RawEntry | None = None
        self._numbers: OrderedDict[str, int] = OrderedDict()  # the newest number that was read of each publisher
        # The same, as of the last change of the line. Entries up to these numbers may have another position elsewhere.
        self._numbers_before: dict[str, int] = {}
        # The kicks that were run, with the ids of their entries, the oldest first; and the same, as of that change.
        self._kicks: OrderedDict[tuple[bytes, Entry], None] = OrderedDict()
        self._kicks_before: OrderedDict[tuple[bytes, Entry], None] = OrderedDict()
        self._moved = False  # the line has changed, or such an entry came again, and clients do not know it yet
        # Audiences of entries that could not be read, which was not reported to clients yet; and when it may be.
        self._unreported: dict[Audience, None] = {}
        self._next_report = float("-inf")
        self._once = LogOnce(_log)
        self.presence = Presence(keys.processes, state.publisher)
        self._worker = Worker(self, "sse_batcher-redis")

    def start(self) -> None:
        """Start to read. Idempotent."""
        if not self.started:
            self.started = True
            self._worker.wake()
        if not self._closed.is_set():
            self._worker.ensure()

    def close(self, timeout: float | None) -> bool:
        """End the thread. Return whether it has ended within `timeout` seconds (None: no limit)."""
        self._closed.set()
        self._worker.stop()
        self._link.disconnect()  # ends the call that waits for new entries
        return self._worker.join(timeout)

    def work(self) -> float | None:
        """Take one turn of the thread, for `Worker`: wait for new entries, and deliver them.

        If Redis is away, the next turns try again. When it is back, a turn reads on from the last entry.
        """
        receiver = self._receiver()
        if receiver is None or self._closed.is_set():
            self._link.drop()
            self._link.expect_no_answer()
            return None
        self._link.expect_answer()
        try:
            if not self._state.ready:
                self._find_epoch(receiver)
            self._read_on(receiver)
            if self._state.ready:
                with understood():
                    self.presence.note(self._link.client, self._clock(), self._state.redis_time())
        except Exception as error:
            if self._closed.is_set():
                return 0.0  # any error that redis-py raises because `close` has cut its connection
            if not isinstance(error, errors()):
                self._link.drop()
                raise
            self._link.note_failure(error)
            return next(self._pauses)
        self._pauses = pauses()
        self._link.note_answer()
        return 0.0

    # -- the beginning of a stream, at the start and after it was replaced ---------------------------------------------

    def _find_epoch(self, receiver: Receiver) -> None:
        """If the stream has another epoch than before, go to its first entry."""
        state = self._state
        epoch, first = self._get_beginning()
        if not self._is_current(epoch) and (not _EPOCH.fullmatch(epoch) or not first or self._was_met(epoch)):
            self._begin_epoch(epoch)
            epoch, first = self._get_beginning()
        if not _EPOCH.fullmatch(epoch):
            raise BackendError(f"the key {self._keys.epoch} holds {epoch!r}, which is not an epoch")
        if self._is_current(epoch):
            return
        begins = not state.epochs
        if not begins:
            _log.warning(
                "the stream %s is not the one that was read before: Redis has lost data, another master has taken "
                "over, or a key was deleted. Clients get sse_gap",
                self._keys.stream,
                extra=log_fields("redis_replaced", stream=self._keys.stream),
            )
        with state.lock:
            state.generation += not begins
            state.epochs[state.generation] = epoch.decode()
            state.changed.notify_all()
        # The numbers of publishers stay: if only the key was lost, the entries were delivered already.
        self._break_line()
        self._anchor = first
        position: Position = (state.generation, *(before(numbers(first[0])) if first else (0, 0)), 0)
        if begins:
            self._lose(receiver, BROADCAST, position, "too_old")
        # Clients get the gap before the next new entry, or at the end of the stream.
        self._moved = not begins
        self._advance(position)

    def _is_current(self, epoch: bytes) -> bool:
        return epoch.decode("ascii", "replace") == self._state.epochs.get(self._state.generation)

    def _was_met(self, epoch: bytes) -> bool:
        """Return whether an older epoch has come back. Clients may have cursors of it with another meaning."""
        return epoch.decode("ascii", "replace") in self._state.epochs.values()

    def _get_beginning(self) -> tuple[bytes, RawEntry | None]:
        """Return the epoch and the first entry. Sets the clock, too."""
        pipeline = self._link.client.pipeline(transaction=False)
        pipeline.get(self._keys.epoch)
        pipeline.xrange(self._keys.stream, count=1)
        pipeline.time()
        with understood():
            epoch, first, now = pipeline.execute()
            self._state.set_clock(microseconds_of(now))
            self._state.begin_ids()
            return value_of(epoch), next(iter(raw_entries(first)), None)

    def _begin_epoch(self, known: bytes) -> None:
        """Give the epoch a new name, and begin it with an entry. Does nothing if another process has changed the name.

        Every cursor of the epoch is that of this entry or later. So the first entry of the stream shows whether
        anything was trimmed. Redis before version 7 has no other way to see that.
        """
        with self._link.client.pipeline(transaction=True) as pipeline:
            pipeline.watch(self._keys.epoch)
            if (pipeline.get(self._keys.epoch) or b"") != known:
                return
            pipeline.xadd(self._keys.stream, to_fields(Entry(secrets.token_hex(8), 0, None)))  # before the name
            pipeline.multi()
            pipeline.set(self._keys.epoch, secrets.token_hex(4))
            with suppress(conflict()):
                pipeline.execute()

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _read_on(self, receiver: Receiver) -> None:
        state, keys, anchor = self._state, self._keys, self._anchor
        added = state.added  # read before the call, so that its answer covers all of these batches
        # In this order: the new entries, then whether this is still the same stream, and whether it still has the
        # anchor, so that nothing after it was trimmed.
        pipeline = self._link.client.pipeline(transaction=False)
        pipeline.xread(
            {keys.stream: id_of(state.read)}, count=ENTRIES_PER_READ, block=BLOCK_MS if state.ready else None
        )
        pipeline.get(keys.epoch)
        pipeline.xrange(keys.stream, *(("-", "+") if anchor is None else (anchor[0], anchor[0])), count=1)
        asks_time = state.is_clock_old
        if asks_time:
            pipeline.time()
        with understood():
            news, epoch, kept, *now = pipeline.execute()
            entries, epoch, kept = new_entries(news), value_of(epoch), raw_entries(kept)
            if asks_time:
                state.set_clock(microseconds_of(*now))
        if not self._is_current(epoch):
            self._set_ready(False)
            return
        if anchor is not None and kept != [anchor]:
            with understood():
                kept = raw_entries(self._link.client.xrange(keys.stream, count=1))
            if not self._is_older(kept):
                self._break_line()
                self._lose(receiver, BROADCAST, after(state.read), "overflow")
        elif anchor is not None:
            kept = []
        if self._is_older(kept):
            # The entry that was read last is gone, but there is one before it. So nothing was trimmed: this is another
            # line, in which ids may be lower than the cursors of clients.
            self._begin_epoch(epoch)
            self._set_ready(False)
            return
        self._deliver(receiver, entries)
        if entries:
            state.see_time(numbers(entries[-1][0])[0])
        self._report_rest(receiver)
        if not entries:
            self._report_moved(receiver)
            with state.lock:
                state.settled = max(state.settled, added)
                state.changed.notify_all()
            if not state.ready:
                self._set_ready(True)

    def _is_older(self, found: list[RawEntry]) -> bool:
        """Return whether an entry was found whose id is at most that of the entry that was read last."""
        return bool(found) and numbers(found[0][0]) <= self._state.read[1:3]

    def _break_line(self) -> None:
        """Note that entries that were read are no longer in the stream, or have other ids."""
        self._anchor = None
        self._numbers_before = dict(self._numbers)
        self._kicks_before = self._kicks.copy()

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
                text = (
                    "an entry of %s was not written by sse_batcher, and is ignored: %s. Further ones are only counted"
                )
                self._once.log(
                    logging.WARNING,
                    text,
                    self._keys.stream,
                    id,
                    extra=log_fields("entry_ignored", stream=self._keys.stream, entry=id),
                )
            elif isinstance(entry.content, Kick):
                self._run_kick(receiver, id, entry, entry.content)
            elif entry.content is not None:
                self._deliver_batch(receiver, entry, position)
            self._advance(position, entry)
            self._anchor = id, fields

    def _run_kick(self, receiver: Receiver, id: bytes, entry: Entry, kick: Kick) -> None:
        """End the streams of a kick, unless that was done before: a new epoch is read from its first entry.

        The user may have logged in again since. A batch has a number for that. The id of a kick is not enough, since
        after a failover another kick may have it.
        """
        known = id, entry
        if known not in self._kicks and known not in self._kicks_before:
            receiver.dismiss("kicked", *kick)
        self._kicks[known] = None
        if len(self._kicks) > MAX_KICKS:
            self._kicks.popitem(last=False)

    def _deliver_batch(self, receiver: Receiver, entry: Entry, position: Position) -> None:
        """Deliver a batch, unless it was read before: a publisher that got no answer adds it again."""
        state, number, content = self._state, entry.number, entry.content
        last = self._numbers.pop(entry.publisher, None)
        is_newest = last is not None
        if last is None:
            # The stream may have more publishers than are remembered. When it is read again, a forgotten one takes the
            # place of the oldest one, whose batches come next, and so on. So the numbers from before count, too. They
            # do not tell what is missing, since the publisher may have gone on before it was forgotten.
            last = self._numbers_before.get(entry.publisher)
        self._numbers[entry.publisher] = number if last is None else max(last, number)
        if len(self._numbers) > MAX_PUBLISHERS:
            self._numbers.popitem(last=False)
        if last is not None and number <= last:
            state.note_duplicate(position)
            self._moved = self._moved or number <= self._numbers_before.get(entry.publisher, -1)
            return
        self._report_moved(receiver)
        if is_newest and last is not None and number > last + 1:
            self._lose(receiver, BROADCAST, after(state.read), "publish_failed")
        if isinstance(content, Unreadable):
            self._note_unreadable(receiver, content, position)
        elif isinstance(content, Batch):
            # If the clock of Redis was set back, ids keep the newest entry's time until the clock reaches it again.
            time = int(state.now()) if state.ready and position[1] == state.read[1] else position[1]
            frame = Frame(content, position, f"{state.epochs[position[0]]}-{id_of(position)}", time)
            try:
                receiver.deliver(frame)
                state.head = position
            except Exception:  # or it would be read again and again
                _log.exception(
                    "a batch of %s cannot be delivered, and is lost",
                    self._keys.stream,
                    extra=log_fields("batch_lost", stream=self._keys.stream),
                )
                self._lose(receiver, content.audience, position, "publish_failed")

    def _note_unreadable(self, receiver: Receiver, content: Unreadable, position: Position) -> None:
        state = self._state
        state.ignored += 1
        self._unreported[content.audience] = None
        text = (
            "a batch of %s cannot be read: %s. Its clients get sse_gap. If another process has a newer version of "
            "sse_batcher, upgrade this one. Further ones are only counted"
        )
        self._once.log(
            logging.ERROR,
            text,
            self._keys.stream,
            content.reason,
            extra=log_fields("entry_unreadable", stream=self._keys.stream, reason=content.reason),
        )
        # At once if allowed, so that the position of the gap is exact.
        if self._clock() >= self._next_report:
            self._report_unreadable(receiver, position)

    def _report_unreadable(self, receiver: Receiver, position: Position) -> None:
        """Let the clients of the unreported audiences know that they have missed something up to this position."""
        for audience in self._unreported:
            receiver.lose(audience, position, "publish_failed")
        self._state.head = position
        self._unreported.clear()
        if self._state.known:  # before that there are no clients, and no limit is needed
            self._next_report = self._clock() + UNREADABLE_REPORT_SECONDS

    def _report_rest(self, receiver: Receiver) -> None:
        if self._unreported and self._clock() >= self._next_report:
            # Clients may have received later entries, and come back with their cursors.
            position = after(self._state.read)
            self._state.floor = max(self._state.floor, position)
            self._report_unreadable(receiver, position)

    def _report_moved(self, receiver: Receiver) -> None:
        """Let all clients know that the stream goes on with another line.

        Entries of the old line may be lost. This process does not deliver entries again that have another position now.
        A client that comes from another process may have missed them there, and would miss them here, too.
        """
        if self._moved:
            self._moved = False
            self._lose(receiver, BROADCAST, after(self._state.read), "epoch")

    def _lose(self, receiver: Receiver, audience: Audience, position: Position, reason: GapReason) -> None:
        self._state.floor = max(self._state.floor, position)
        receiver.lose(audience, position, reason)
        self._state.head = position

    def _advance(self, position: Position, entry: Entry | None = None) -> None:
        state = self._state
        with state.lock:
            state.read = position
            if entry is not None and entry.publisher == state.publisher:
                state.settled = max(state.settled, entry.number)
            state.changed.notify_all()
