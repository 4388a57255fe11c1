"""A stream for the watcher, which writes down what the watcher asks of it."""

from __future__ import annotations

import queue


class Watched:
    """A stream that records the calls of its watcher."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def close(self) -> None:
        self.told.put("close")

    def drain(self) -> None:
        self.told.put("drain")
