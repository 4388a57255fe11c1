"""When the loop gives up the GIL to threads that wait for it."""

from __future__ import annotations

import pytest

from sse_batcher.transports.detached.gil import (
    DEMAND_SECONDS,
    LONG_INTERVAL_SECONDS,
    SHORT_INTERVAL_SECONDS,
    GilYielder,
)

from .kit.clock import Clock


class Counted:
    """How often this thread has had to wait, and how often it has paused."""

    def __init__(self) -> None:
        self.waits = self.pauses = 0
        self.clock = Clock()
        self.taken: float | None = None  # seconds for which another thread has the lock after each pause
        self.yielder = GilYielder(self.clock, self._sleep, lambda: self.waits)

    def _sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.waits += 1
        self.clock.now += seconds
        if self.taken is not None:
            self.waits += 1
            self.clock.now += self.taken

    def send(self, seconds: float, slice: float = 0.0001) -> int:
        """Send for so long, without what the pauses take. How many there were."""
        before = self.pauses
        for _ in range(round(seconds / slice)):
            self.clock.now += slice
            self.yielder.pause()
        return self.pauses - before


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_pauses_are_rare_while_no_other_thread_wants_the_gil(counted: Counted) -> None:
    counted.clock.now += 1
    counted.waits += 10  # for something to do
    counted.yielder.begin()
    assert counted.send(LONG_INTERVAL_SECONDS / 2) == 0
    assert counted.send(1) == pytest.approx(1 / LONG_INTERVAL_SECONDS, rel=0.03)


def test_pauses_are_frequent_for_a_while_after_another_thread_used_one(counted: Counted) -> None:
    counted.taken = SHORT_INTERVAL_SECONDS / 5
    assert counted.send(LONG_INTERVAL_SECONDS) >= 1
    assert counted.send(1) == pytest.approx(1 / SHORT_INTERVAL_SECONDS, rel=0.2)
    counted.taken = None
    counted.yielder.begin()
    assert counted.send(DEMAND_SECONDS / 2) == pytest.approx(DEMAND_SECONDS / 2 / SHORT_INTERVAL_SECONDS, rel=0.2)
    counted.send(DEMAND_SECONDS / 2)
    assert counted.send(1) == pytest.approx(1 / LONG_INTERVAL_SECONDS, rel=0.03)


def test_a_cpu_bound_thread_has_the_gil_for_half_of_the_time(counted: Counted) -> None:
    counted.taken = 0.005
    assert counted.send(1) == pytest.approx(1 / 0.005, rel=0.05)


def test_after_a_long_stop_the_next_pause_is_at_most_a_long_interval_away(counted: Counted) -> None:
    counted.taken = 60
    counted.send(LONG_INTERVAL_SECONDS)
    counted.taken = None
    assert counted.send(LONG_INTERVAL_SECONDS) > 0
