"""The flushes of an engine: which batches each of them waits for, and whether one of these has failed.

Pure. The caller passes what happens to the batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..reasons import BatchReason


class Flush:
    """A request to close all windows, queued among the events, and what its answer is given to.

    `since` is `Flushes.done` when it was requested. `answer` is called once, with whether all was delivered.
    """

    __slots__ = ("answer", "ok", "reason", "since", "target", "time")

    def __init__(self, reason: BatchReason, time: float, since: int, answer: Callable[[bool], object]) -> None:
        self.reason = reason
        self.time = time
        self.since = since
        self.answer = answer
        self.target = 0
        """The number of the last batch that it waits for. Set by `Flushes.begin`."""
        self.ok = True
        """Whether none of the batches that it waits for has failed so far. Set by `Flushes`."""


class Flushes:
    """The flushes that wait for batches, which are numbered in the order in which they are delivered.

    Not thread-safe, but `done` may be read by any thread.
    """

    def __init__(self) -> None:
        self.done = 0
        """How many batches the sink has taken, or that have failed."""
        self._ready = 0  # how many batches were ready so far
        self._newest_failed = 0  # the number of the last batch that has failed
        self._waiting: deque[Flush] = deque()  # sorted by target

    def note_ready(self, count: int) -> None:
        """Note that so many more batches are ready to be delivered."""
        self._ready += count

    def begin(self, flush: Flush) -> None:
        """Let a flush wait for all batches that are ready. One that has failed since the request counts, too."""
        flush.target = self._ready
        flush.ok = self._newest_failed <= flush.since
        self._waiting.append(flush)

    def note_done(self, taken: bool) -> None:
        """Note that the next batch was delivered. `taken`: whether the sink took it; if not, it has failed."""
        self.done += 1
        if taken:
            return
        self._newest_failed = self.done
        for flush in self._waiting:
            flush.ok = flush.ok and flush.target < self.done

    def answer(self) -> None:
        """Answer the flushes whose batches are all done, in the order in which they began."""
        waiting = self._waiting
        while waiting and waiting[0].target <= self.done:
            flush = waiting.popleft()
            flush.answer(flush.ok)
