"""Batchers whose time, thread or inbox is in the test's hands, and a sink that can be stuck or broken."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from sse_batcher import Batch, BatchOptions, EventBatcher
from sse_batcher.batching.engine import Engine
from sse_batcher.runtime.worker import Owner, Worker

from .clock import Clock
from .waiting import TIMEOUT

LONG = BatchOptions(batch_window=10)
AT_ONCE = BatchOptions(max_batch_size=1)


class Sink:
    """Keeps batches, and can be stuck or broken."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.arrived = threading.Semaphore(0)
        self.entered = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.error: BaseException | None = None

    def __call__(self, batch: Batch) -> None:
        self.entered.set()
        assert self.free.wait(TIMEOUT)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.batches.append(batch)
        self.arrived.release()

    def stick(self) -> None:
        self.entered.clear()
        self.free.clear()

    def data(self) -> list[Any]:
        return [event.data for batch in self.batches for event in batch.events]


OpenBatcher = Callable[..., EventBatcher]
"""The type of the fixture `open_batcher`."""


class ParkedWorker(Worker):
    """A worker whose thread is never scheduled. It counts the wake-ups."""

    runs = True

    def __init__(self, owner: Owner, name: str) -> None:
        super().__init__(owner, name)
        self.wakes = 0
        self.awake = False

    def ensure(self) -> bool:
        return True

    def is_woken(self) -> bool:
        return self.awake

    def wake(self) -> None:
        """As the worker's: a wake-up that waits stands for all that follow."""
        self.wakes += not self.awake
        self.awake = True

    def is_caller(self) -> bool:
        return True  # so that no caller waits for it

    def join(self, timeout: float | None) -> bool:
        return True


class NoWorker(Worker):
    """A worker that can start no thread."""

    def ensure(self) -> bool:
        return False


class Wakeups(SimpleQueue):  # type: ignore[type-arg]
    """Wake-ups, with a function that is called before the thread waits for one: `before_wait(timeout)`."""

    before_wait: Callable[[float | None], object] | None = None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if self.before_wait:
            self.before_wait(timeout)
        return super().get(block, timeout)


class Inbox(deque):  # type: ignore[type-arg]
    """An inbox, with functions that are called once each, `before` and `after` the next item goes in."""

    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None

    def append(self, item: Any) -> None:
        (before, after), self.before, self.after = (self.before, self.after), None, None
        if before:
            before()
        super().append(item)
        if after:
            after()


class OwnBatcher(EventBatcher):
    """An `EventBatcher` whose engine is made with parts of the test: `make_worker` and `inbox`, as `Engine` has them.

    `engine` and `worker` are those of the process that made it.
    """

    def __init__(
        self,
        sink: Callable[[Batch], None],
        options: BatchOptions | None = None,
        *,
        make_worker: Callable[[Owner, str], Worker] = Worker,
        inbox: deque[Any] | None = None,
        **keywords: Any,
    ) -> None:
        engines: list[Engine] = []
        workers: list[Worker] = []

        def make_and_keep(owner: Owner, name: str) -> Worker:
            workers.append(make_worker(owner, name))
            return workers[-1]

        def make_engine(*arguments: Any) -> Engine:
            engines.append(Engine(*arguments, make_worker=make_and_keep, inbox=inbox))
            return engines[-1]

        super().__init__(sink, options, make_engine=make_engine, **keywords)
        self.get_stats()  # makes the engine
        self.engine, self.worker = engines[0], workers[0]

    def __enter__(self) -> OwnBatcher:
        return self


class SteppedBatcher(OwnBatcher):
    """An `EventBatcher` without its thread: `step` is one turn of it, `advance` lets time pass as the thread would."""

    worker: ParkedWorker

    def __init__(
        self, sink: Callable[[Batch], None] | None = None, *, inbox: deque[Any] | None = None, **options: Any
    ) -> None:
        self.clock = Clock()
        self.batches: list[Batch] = []
        super().__init__(
            sink or self.batches.append,
            BatchOptions(**options),
            make_worker=ParkedWorker,
            inbox=inbox,
            clock=self.clock,
            wall=lambda: self.clock.now,
        )

    def step(self) -> float | None:
        self.worker.awake = False
        return self.engine.step(self.clock.now)

    def advance(self, seconds: float) -> None:
        """Let time pass; the thread looks whenever it wants to, and at the end if somebody woke it."""
        end = self.clock.now + seconds + 1e-9  # 0.03 + 0.07 is 0.1, give or take a bit
        while (deadline := self.step()) is not None and deadline <= end:
            self.clock.now = max(self.clock.now, deadline)
        self.clock.now = end
        self.step()

    def sent(self) -> list[list[Any]]:
        """The data of each batch so far."""
        return [[event.data for event in batch.events] for batch in self.batches]
