"""The app thread: runs functions of the app that belong to no request, such as receivers of signals.

The threads that deliver batches and serve clients never wait for such a function.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from .worker import Worker

_log = logging.getLogger("sse_batcher.helper")

QUEUE_LENGTH = 1_000

Task = Callable[[], None]


class AppThread:
    """Runs tasks one after the other, each inside `context()`. Its thread is started by the first."""

    def __init__(
        self,
        context: Callable[[], AbstractContextManager[object]],
        clock: Callable[[], float] = time.monotonic,
        name: str = "sse_batcher-app",
    ) -> None:
        self.dropped = 0
        self._context = context
        self._clock = clock
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._numbers = itertools.count()  # tasks that are due at the same time keep their order
        self._orders: queue.SimpleQueue[tuple[float, int, Task]] = queue.SimpleQueue()
        self._later: list[tuple[float, int, Task]] = []  # a heap; the thread's own
        self._closed = False
        self._worker = Worker(self, name)

    def post(self, task: Task) -> None:
        """Have `task` run soon. Never waits: with 1,000 waiting, or where no thread can be started, it is dropped and
        counted. Callable from any thread."""
        if self._tasks.qsize() >= QUEUE_LENGTH:
            self.dropped += 1
            return
        # First the task, then the thread: one that is started after `close` takes a single turn.
        self._tasks.put(task)
        self._start()

    def post_later(self, seconds: float, task: Task) -> None:
        """Have `task` run after so many seconds, unless the app thread is closed first. Callable from any thread."""
        self._orders.put((self._clock() + seconds, next(self._numbers), task))
        self._start()

    def close(self, timeout: float | None) -> bool:
        """Run what was posted, and end the thread. True if it ended within `timeout` seconds."""
        self._closed = True
        self._worker.stop()
        return self._worker.join(timeout)

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`."""
        while not self._orders.empty():
            heapq.heappush(self._later, self._orders.get())
        while self._later and self._later[0][0] <= self._clock() and not self._closed:
            self._run(heapq.heappop(self._later)[2])
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            self._run(task)
        if self._closed or not self._later:
            return None
        return max(0.0, self._later[0][0] - self._clock())

    def _start(self) -> None:
        self._worker.wake()
        if not self._worker.ensure():
            self.dropped += 1

    def _run(self, task: Task) -> None:
        try:
            with self._context():
                task()
        except Exception:
            _log.exception("a task on the app thread failed")
