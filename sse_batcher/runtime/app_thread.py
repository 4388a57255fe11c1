"""The app thread: runs functions of the app outside of requests, such as receivers of signals.

The threads that deliver batches and serve clients never wait for such a function. `AppThread` takes no lock: the queues
are thread-safe, and everything else belongs to its thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from .log_fields import log_fields
from .worker import Owner, Worker

_log = logging.getLogger("sse_batcher.helper")

MAX_WAITING_TASKS = 1_000

Task = Callable[[], None]


class AppThread:
    """Runs tasks one after the other, each inside `context()`. The first task starts the thread.

    `clock` returns monotonic time in seconds. `name` is that of the thread, and `make_worker` makes it.
    """

    def __init__(
        self,
        context: Callable[[], AbstractContextManager[object]],
        clock: Callable[[], float] = time.monotonic,
        name: str = "sse_batcher-app",
        make_worker: Callable[[Owner, str], Worker] = Worker,
    ) -> None:
        # Written by all threads that post. A harmless race: if two drop a task at the same time, one may be uncounted.
        self.dropped = 0
        self._context = context
        self._clock = clock
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._numbers = itertools.count()  # keeps the order of tasks that are due at the same time
        self._new_timed: queue.SimpleQueue[tuple[float, int, Task]] = queue.SimpleQueue()
        self._timed: list[tuple[float, int, Task]] = []  # a heap by time, of the thread alone
        self._closed = False
        self._worker = make_worker(self, name)

    def post(self, task: Task) -> None:
        """Run `task` soon. Never waits. Thread-safe.

        The task is dropped and counted if 1,000 tasks are waiting, or if no thread can be started.
        """
        if self._tasks.qsize() >= MAX_WAITING_TASKS:
            self.dropped += 1
            return
        # First the task, then the thread: a thread that is started after `close` takes a single turn.
        self._tasks.put(task)
        self._start()

    def post_later(self, seconds: float, task: Task) -> None:
        """Run `task` after so many seconds, unless the app thread is closed before. Thread-safe."""
        self._new_timed.put((self._clock() + seconds, next(self._numbers), task))
        self._start()

    def close(self, timeout: float | None) -> bool:
        """Run the tasks that were posted, and end the thread. Return whether it ended within `timeout` seconds."""
        self._closed = True
        self._worker.stop()
        return self._worker.join(timeout)

    def work(self) -> float | None:
        """Take one turn of the thread, for `Worker`. Return the seconds until the next one; None: when woken."""
        while not self._new_timed.empty():
            heapq.heappush(self._timed, self._new_timed.get())
        while self._timed and self._timed[0][0] <= self._clock() and not self._closed:
            self._run(heapq.heappop(self._timed)[2])
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            self._run(task)
        if self._closed or not self._timed:
            return None
        return max(0.0, self._timed[0][0] - self._clock())

    def _start(self) -> None:
        self._worker.wake()
        if not self._worker.ensure():
            self.dropped += 1

    def _run(self, task: Task) -> None:
        try:
            with self._context():
                task()
        except Exception:
            _log.exception("a task on the app thread failed", extra=log_fields("task_failed"))
