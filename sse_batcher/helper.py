"""The helper: one thread a manager on which app code runs that belongs to no request.

So neither the thread that delivers batches nor one that serves clients ever waits for an app's receiver.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from contextlib import AbstractContextManager

from .worker import Worker

_log = logging.getLogger("sse_batcher.helper")

QUEUE_LENGTH = 1_000


class Helper:
    """Runs tasks one after the other, each inside `context()`. Its thread is started by the first."""

    def __init__(self, context: Callable[[], AbstractContextManager[object]]) -> None:
        self.dropped = 0
        self._context = context
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._worker = Worker(self, "sse_batcher-helper")

    def post(self, task: Callable[[], None]) -> None:
        """Have `task` run soon. Never waits: with 1,000 waiting, or where no thread can be started, it is dropped and
        counted. Callable from any thread."""
        if self._tasks.qsize() >= QUEUE_LENGTH:
            self.dropped += 1
            return
        # First the task, then the thread: one that is started after `close` takes a single turn.
        self._tasks.put(task)
        self._worker.wake()
        if not self._worker.ensure():
            self.dropped += 1

    def close(self, timeout: float | None) -> bool:
        """Run what was posted, and end the thread. True if it ended within `timeout` seconds."""
        self._worker.stop()
        return self._worker.join(timeout)

    def work(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                return
            try:
                with self._context():
                    task()
            except Exception:
                _log.exception("a task on the helper thread failed")
