"""The stage: what all managers run on during a test. Time that the test moves, and no thread.

A test's own thread does everything, at once. Other threads may enqueue; locks of the workers keep them apart.
"""

from __future__ import annotations

import functools
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..backends.memory import MemoryBackend
from ..batching.batcher import EventBatcher
from ..batching.engine import Engine
from ..encoding import Encode
from ..errors import SSEBatcherError, UsageError
from ..event import Batch, Event
from ..manager import SSEManager
from ..manager import managers as all_managers
from ..manager_state import process_of, stand_ins, swap_state
from ..options import TypeRules
from ..process_state import Parts, ProcessState
from ..reasons import BatchReason
from ..runtime.locks import new_lock, run_if_free
from ..runtime.worker import Owner, Worker
from ..streams.client import Reference

TICK_SECONDS = 1e-6
"""Turns that are due so soon are due now: the sum of several floats may be a little off."""

MAX_IDLE_READS = 1_000
"""How often a stream may say that it has nothing before something that reads on and on is taken for a middleware that
collects the whole response."""

LOCK_SECONDS = 5.0
"""How long a thread waits for another one that delivers, in seconds."""


class Recorder(Protocol):
    """What is given each event of the managers that it reaches."""

    def reaches(self, manager: SSEManager) -> bool: ...

    def add(self, event: Event, key: str | None, encode: Encode) -> None:
        """Note an event that was accepted, the JSON of its key, and the encoder of its manager."""

    def remove(self, event: Event) -> None:
        """Forget an event: it was refused after all."""

    def replace(self, event: Event) -> None:
        """Note that a newer event with the same key has replaced this one."""

    def count_refusal(self) -> None:
        """Note that an event was refused."""


class Reader(Protocol):
    """A stream that the test has opened."""

    idle_reads: int
    """How often the stream has said that it has nothing."""

    def read(self, wait: bool = True) -> None:
        """Take all that is there now. Without `wait`, not if another thread does it at this moment."""

    def close(self) -> None: ...


class Clock:
    """The time of a test. It stands still until `advance`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._now = self._start = 1_000.0
        self._wall = time.time()

    def __call__(self) -> float:
        return self._now

    def wall(self) -> float:
        """Return the time in seconds since 1970, as the test sees it."""
        return self._wall + self._now - self._start

    def advance(self, seconds: float) -> None:
        """Let this number of seconds pass: what is due happens in its order, in this thread. Returns at once.

        Raises `UsageError` after the end of all blocks and fixtures that have held the time.
        """
        if not self._stage.is_held:
            raise UsageError("this clock is over: the blocks and fixtures that held the time have ended")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise UsageError(f"time passes by a number of seconds, 0 or more, not {seconds!r}")
        end = self._now + seconds
        while (due := self._stage.next_due()) <= end + TICK_SECONDS:
            self._now = max(self._now, due)
            self._stage.take_due_turns()
        self._now = max(self._now, end)
        self._stage.read_all()

    def __repr__(self) -> str:
        return f"<Clock: {self._now - self._start:g} s>"


class HandWorker(Worker):
    """A worker without a thread: its turns are taken by the thread that wakes it, or that moves the time.

    `delivers`: it delivers batches. While one does that, those that run functions of the app wait.
    """

    def __init__(self, owner: Owner, name: str, stage: Stage, *, delivers: bool) -> None:
        super().__init__(owner, name)
        self.due = math.inf
        self.delivers = delivers
        self._stage = stage
        self._lock = new_lock()  # guards the turn
        self._woken = False
        self._turns_of: int | None = None
        stage.workers.add(self)

    def wake(self) -> None:
        self._woken = True
        if self.delivers or not self._stage.is_delivering():
            self.take_turns()

    def is_woken(self) -> bool:
        return False

    def ensure(self) -> bool:
        return True

    def stop(self) -> None:
        self.wake()

    def join(self, timeout: float | None) -> bool:
        return not self.is_caller()

    def is_caller(self) -> bool:
        return self._turns_of == threading.get_ident()

    @property
    def runs(self) -> bool:
        return True

    def take_turns(self) -> None:
        """Take the turns for which it was woken."""
        while self._woken and run_if_free(self._lock, self._take_turns_locked, LOCK_SECONDS):
            pass
        if self.delivers and not self._stage.is_delivering():
            self._stage.run_app_functions()

    def take_due_turn(self, now: float) -> None:
        """Take a turn if it is due."""
        if self.due <= now:
            self.due = math.inf
            self.wake()

    def _take_turns_locked(self) -> None:
        self._turns_of = threading.get_ident()
        try:
            with self._stage.delivering(self.delivers):
                while self._woken:
                    self._woken = False
                    owner = self._owner()
                    pause = None if owner is None else owner.work()
                    self.due = math.inf if pause is None else self._stage.clock() + max(pause, TICK_SECONDS)
        finally:
            self._turns_of = None


class StagedEngine(Engine):
    """An engine whose events are recorded. Each call takes a turn, so that nothing waits in the inbox."""

    def __init__(
        self,
        stage: Stage,
        manager: weakref.ref[SSEManager],
        encode: Encode,
        sink: Callable[[Batch], None],
        options: Any,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        def deliver(batch: Batch) -> None:
            sink(batch)
            stage.read_all()

        make_worker = functools.partial(HandWorker, stage=stage, delivers=True)
        super().__init__(deliver, options, clock, wall, make_worker=make_worker)
        self._stage = stage
        self._manager = manager
        self._encode = encode
        self._most_bytes = options.max_pending_bytes // 2

    def add(self, event: Event, size: int, rules: TypeRules, key: str | None) -> None:
        """As usual. A test whose time stands still has no backlog: the windows close instead."""
        for recorder in self._recorders():
            recorder.add(event, key, self._encode)
        if self._pending_bytes + size > self._most_bytes:
            self.flush("time_window", 0)
        try:
            super().add(event, size, rules, key)
        except SSEBatcherError:
            for recorder in self._recorders():
                recorder.remove(event)
            raise
        self._worker.wake()

    def flush(self, reason: BatchReason, timeout: float | None) -> bool:
        """As usual. The answer is there at once, or never."""
        return super().flush(reason, 0 if timeout is None else timeout)

    def close(self, timeout: float | None = 5.0) -> bool:
        """As usual. First, this thread reads all streams: a shutdown waits for those that other threads read last."""
        self._stage.read_all()
        return super().close(timeout)

    def count_refusal(self) -> None:
        super().count_refusal()
        for recorder in self._recorders():
            recorder.count_refusal()

    def _count_replaced_locked(self, event: Event, rules: TypeRules, key: str | None) -> None:
        super()._count_replaced_locked(event, rules, key)
        for recorder in self._recorders():
            recorder.replace(event)

    def _recorders(self) -> list[Recorder]:
        manager = self._manager()
        return [] if manager is None else [each for each in self._stage.recorders if each.reaches(manager)]


class StagedBackend(MemoryBackend):
    """The memory of a test. It notes which frames are text, which nothing on the wire says."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    def publish(self, batch: Batch) -> None:
        self._stage.are_texts[self.format((self._number + 1,))] = [event.is_text for event in batch.events]
        super().publish(batch)

    def now(self) -> float:
        return self._stage.clock.wall() * 1000

    def forget(self) -> None:
        """Begin another history, as a server that was restarted does: nothing made before is a cursor in it."""
        self._epoch = type(self)(self._stage)._epoch


class StagedQueue(queue.SimpleQueue[Reference | None]):
    """The queue of a client. If it is empty, it says so at once, instead of waiting for the next heartbeat."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    def get(self, block: bool = True, timeout: float | None = None) -> Reference | None:
        try:
            return self.get_nowait()
        except queue.Empty:
            self._stage.count_idle_read()
            raise


class Stage:
    """What the managers of a process run on during a test: a `StandIn` for their states.

    It is there as long as something holds it. `hold` says for which managers.
    """

    def __init__(self) -> None:
        self.clock = Clock(self)
        self.recorders: list[Recorder] = []
        self.readers: list[Reader] = []
        self.are_texts: dict[str, list[bool]] = {}
        """By the id of each frame, whether each of its events is a text."""
        self._pid = os.getpid()
        self._holds: list[Callable[[SSEManager], bool]] = []
        self._before: weakref.WeakKeyDictionary[SSEManager, ProcessState | None] = weakref.WeakKeyDictionary()
        self.workers: weakref.WeakSet[HandWorker] = weakref.WeakSet()
        self._here = threading.local()

    # -- which managers ------------------------------------------------------------------------------------------------

    def hold(self, reaches: Callable[[SSEManager], bool]) -> None:
        """Let the managers for which this is true run on the stage, also those that are made later."""
        self._holds.append(reaches)
        for manager in all_managers():
            if reaches(manager) and manager not in self._before:
                self._before[manager] = swap_state(manager, None)

    def release(self, reaches: Callable[[SSEManager], bool]) -> None:
        """Undo a `hold`: managers that nothing holds any more go on with the state that they had before."""
        self._holds.remove(reaches)
        if not self._holds:
            for reader in list(self.readers):
                reader.close()
        for manager, before in list(self._before.items()):
            if not self.reaches(manager):
                del self._before[manager]
                swap_state(manager, before)

    @property
    def is_held(self) -> bool:
        return bool(self._holds)

    def managers(self) -> list[SSEManager]:
        """Return the managers that have run on it so far."""
        return [manager for manager in list(self._before) if self.reaches(manager)]

    def reaches(self, manager: SSEManager) -> bool:
        """Return whether this manager runs on it. In a forked child, none does."""
        return os.getpid() == self._pid and any(reaches(manager) for reaches in self._holds)

    def make_state(self, manager: SSEManager, make: Callable[[Parts], ProcessState]) -> ProcessState:
        before = self._before.setdefault(manager, None)
        reference = weakref.ref(manager)

        def make_batcher(sink: Callable[[Batch], None], options: Any, *, encode: Encode) -> EventBatcher:
            make_engine = functools.partial(StagedEngine, self, reference, encode)
            return EventBatcher(
                sink, options, encode=encode, clock=self.clock, wall=self.clock.wall, make_engine=make_engine
            )

        parts = Parts(
            clock=self.clock,
            make_worker=self._make_worker,
            make_backend=lambda url, frames: StagedBackend(self),
            make_batcher=make_batcher,
            make_queue=lambda: StagedQueue(self),
            has_server=False,
        )
        state = make(parts)
        if before is not None and before.is_closed:
            state.shutdown(0)  # what production refuses is refused here, too
        return state

    def lose_history(self, reaches: Callable[[SSEManager], bool]) -> None:
        """Let the managers for which this is true begin another history."""
        for manager in self.managers():
            backend = process_of(manager).backend
            if reaches(manager) and isinstance(backend, StagedBackend):
                backend.forget()

    # -- turns ---------------------------------------------------------------------------------------------------------

    def next_due(self) -> float:
        """Return when the next turn is due."""
        return min((worker.due for worker in list(self.workers)), default=math.inf)

    def take_due_turns(self) -> None:
        """Take all turns that are due, those that deliver first."""
        for worker in sorted(self.workers, key=lambda each: not each.delivers):
            worker.take_due_turn(self.clock())

    def run_app_functions(self) -> None:
        """Take the turns that had to wait for a delivery."""
        for worker in list(self.workers):
            if not worker.delivers:
                worker.take_turns()

    def is_delivering(self) -> bool:
        """Return whether this thread delivers."""
        return bool(getattr(self._here, "deliveries", 0))

    @contextmanager
    def delivering(self, delivers: bool) -> Iterator[None]:
        """Mark that this thread delivers, if it does."""
        self._here.deliveries = getattr(self._here, "deliveries", 0) + delivers
        try:
            yield
        finally:
            self._here.deliveries -= delivers

    def _make_worker(self, owner: Owner, name: str) -> HandWorker:
        return HandWorker(owner, name, self, delivers=False)

    # -- streams -------------------------------------------------------------------------------------------------------

    def read_all(self) -> None:
        """Let all readers take what is there."""
        for reader in list(self.readers):
            reader.read(wait=False)

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[None]:
        """Mark that this thread reads a stream for this reader."""
        before = getattr(self._here, "reader", None)
        self._here.reader = reader
        try:
            yield
        finally:
            self._here.reader = before

    def count_idle_read(self) -> None:
        """Note that a stream has nothing. Raises `UsageError` if its reader would wait forever."""
        reader: Reader | None = getattr(self._here, "reader", None)
        if reader is None:
            raise UsageError(
                "this reads on in a stream that has nothing more now, and would wait forever: time stands still in "
                "this test. Use open_stream() of sse_batcher.testing, whose events() returns what has arrived"
            )
        reader.idle_reads += 1
        if reader.idle_reads > MAX_IDLE_READS:
            raise UsageError(
                "something between the stream and the test reads on without passing on what it has, and would wait "
                "forever: a middleware, or a function that reads the whole response. Browsers would get nothing "
                "either. Let it leave out responses with the Content-Type text/event-stream"
            )


_stages: list[Stage] = []


def current_stage() -> Stage | None:
    """Return the stage that is there now, if there is one."""
    return _stages[0] if _stages else None


@contextmanager
def staged(reaches: Callable[[SSEManager], bool] = lambda manager: True) -> Iterator[Stage]:
    """Hold the stage for the managers for which this is true. All holders share one stage, and its time."""
    if not _stages:
        _stages.append(Stage())
        stand_ins.append(_stages[0])
    stage = _stages[0]
    try:
        stage.hold(reaches)
        yield stage
    finally:
        stage.release(reaches)
        if not stage.is_held:
            _stages.remove(stage)
            stand_ins.remove(stage)
