"""A batcher whose time and thread are in the test's hands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sse_batcher import Batch, BatchOptions, EventBatcher

from .clock import Clock


class Parked:
    """Stands in for the worker: a thread that is never scheduled, and remembers that it was woken."""

    def __init__(self) -> None:
        self.restarts = 0
        self.wakes = 0
        self.awake = False
        self.runs = True

    def ensure(self) -> bool:
        return True

    def is_woken(self) -> bool:
        return self.awake

    def wake(self) -> None:
        """As the worker's: a wake-up that waits stands for all that follow."""
        self.wakes += not self.awake
        self.awake = True

    def stop(self) -> None:
        pass

    def join(self, timeout: float | None) -> bool:
        return True

    def is_caller(self) -> bool:
        return True  # so that no caller waits for it


class SteppedBatcher(EventBatcher):
    """An `EventBatcher` without its thread: `step` is one turn of it, `advance` lets time pass as the thread would."""

    def __init__(self, sink: Callable[[Batch], None] | None = None, **options: Any) -> None:
        self.clock = Clock()
        self.batches: list[Batch] = []
        super().__init__(
            sink or self.batches.append, BatchOptions(**options), clock=self.clock, wall=lambda: self.clock.now
        )
        self.engine = self._engine.get()
        self.worker = self.engine._worker = Parked()  # type: ignore[assignment]

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
