"""Waiting for a queue: the look that must come before the wait."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from sse_batcher.runtime.waiting import take


class Cautious(queue.SimpleQueue):  # type: ignore[type-arg]
    """A queue that waits with a time limit only right after a look at it, as CPython up to 3.12 needs it."""

    looked = False

    def get_nowait(self) -> Any:
        self.looked = True
        return super().get_nowait()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        assert self.looked or not block, "this would wait for ever where the time is up at once"
        return super().get(block, timeout)


def test_what_is_there_is_taken_at_once() -> None:
    source = Cautious()
    source.put(1)
    source.put(2)
    assert [take(source, None), take(source, 0.0)] == [1, 2]


def test_a_queue_that_was_just_emptied_is_looked_at_before_it_is_waited_for() -> None:
    source = Cautious()
    source.put(1)
    source.get_nowait()
    source.looked = False
    with pytest.raises(queue.Empty):
        take(source, 1e-9)
