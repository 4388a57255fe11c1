"""A stream for the watcher, which writes down what the watcher asks of it, and workers for the watcher."""

from __future__ import annotations

import queue

from sse_batcher.runtime.worker import Owner, Worker


class Watched:
    """A stream that records the calls of its watcher."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def close(self) -> None:
        self.told.put("close")

    def drain(self) -> None:
        self.told.put("drain")


class Workers(list[Worker]):
    """Makes workers, and lists them."""

    def __call__(self, owner: Owner, name: str) -> Worker:
        self.append(Worker(owner, name))
        return self[-1]


class IdleWorker(Worker):
    """A worker that starts no thread: the test takes its turns."""

    def ensure(self) -> bool:
        return True
