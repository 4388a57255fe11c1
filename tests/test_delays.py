"""How long events and frames wait, and how late the loop is: what the counters say of it."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import pytest

from sse_batcher import Batch
from sse_batcher.streams.counts import LoopCounts
from sse_batcher.transports.detached.gil import PAUSE_SECONDS, GilYielder
from sse_batcher.transports.detached.loop import LOOP_TICK_SECONDS

from .kit.batching import SteppedBatcher
from .kit.clock import Clock
from .kit.site import Site


def late(site: Site) -> dict[str, int]:
    """How often the loop was late, by the limit that it was within."""
    return {limit: count for limit, count in site.loop.counts.delays.histogram().buckets.items() if count}


# -- pending events ----------------------------------------------------------------------------------------------------


def test_nothing_pending_has_no_age() -> None:
    batcher = SteppedBatcher()
    assert batcher.get_stats().pending_age == 0
    batcher.enqueue("t", 1)
    batcher.advance(1)
    assert (batcher.sent(), batcher.get_stats().pending_age) == ([[1]], 0)


@pytest.mark.parametrize("stepped", [False, True], ids=["in the inbox", "in a window"])
def test_an_event_ages_from_the_moment_when_it_was_accepted(stepped: bool) -> None:
    batcher = SteppedBatcher(batch_window=10)
    batcher.enqueue("t", 1)
    if stepped:
        batcher.step()
    batcher.clock.now += 4
    batcher.enqueue("t", 2)
    assert batcher.get_stats().pending_age == 4


def test_the_oldest_window_counts_whatever_its_length() -> None:
    batcher = SteppedBatcher(batch_window=3, per_type={"long": {"batch_window": 10}})
    batcher.enqueue("long", 1)
    batcher.advance(2)
    batcher.enqueue("t", 2)
    batcher.advance(2)
    assert batcher.get_stats().pending_age == pytest.approx(4)
    batcher.advance(7)
    assert batcher.get_stats().pending_age == 0


def test_a_window_that_has_closed_early_does_not_count() -> None:
    batcher = SteppedBatcher(batch_window=5, per_type={"long": {"batch_window": 10, "max_batch_size": 2}})
    batcher.enqueue("long", 1)
    batcher.advance(1)
    batcher.enqueue("t", 2)
    batcher.advance(1)
    batcher.enqueue("long", 3)
    batcher.advance(1)
    assert (batcher.sent(), batcher.get_stats().pending_age) == ([[1, 3]], pytest.approx(2))


def test_batches_that_wait_for_the_backend_age() -> None:
    ages = []

    def sink(batch: Batch) -> None:
        batcher.clock.now += 3
        ages.append(batcher.get_stats().pending_age)

    batcher = SteppedBatcher(sink, max_batch_size=1)
    for number in range(3):
        batcher.enqueue("t", number)
        batcher.clock.now += 1
    batcher.step()
    # All came together, a second apart, and each waits for those before it.
    assert ages == [6, 8, 10]
    assert batcher.get_stats().pending_age == 0


def test_an_empty_window_after_a_leading_event_has_no_age() -> None:
    batcher = SteppedBatcher(batch_window=10, per_type={"leads": {"leading": True}})
    batcher.enqueue("leads", 1)
    batcher.advance(5)
    batcher.enqueue("t", 2)
    batcher.advance(1)
    assert (batcher.sent(), batcher.get_stats().pending_age) == ([[1]], pytest.approx(1))


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_a_loop_that_ticks_in_time_is_not_late(site: Site) -> None:
    site.connect()
    before = sum(late(site).values())
    site.wait(10 * LOOP_TICK_SECONDS)
    assert late(site) == {"0.001": before + 10}


def test_a_tick_that_comes_late_is_counted_by_how_much(site: Site) -> None:
    site.connect()
    site.wait(LOOP_TICK_SECONDS)
    before = late(site)
    site.clock.now += LOOP_TICK_SECONDS + 0.4  # another thread had the GIL for so long
    site.loop.run()
    assert late(site) == {**before, "0.5": 1}


def test_a_loop_that_works_without_a_wait_is_late_by_all_that_time(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(loop={"sends_per_turn": 1, "turn_seconds": 0})
    clients = [site.connect() for _ in range(20)]
    site.wait(LOOP_TICK_SECONDS)
    before = late(site)
    turn = site.loop.turn

    def slow(timeout: float) -> None:
        turn(timeout)
        site.clock.now += 0.1

    monkeypatch.setattr(site.loop, "turn", slow)
    site.deliver()
    counts = {limit: count - before.get(limit, 0) for limit, count in late(site).items()}
    # Two seconds of work, looked at every 0.2 seconds; the first time before it has begun.
    assert counts["1"] >= 2
    assert counts["2.5"] >= 4
    assert len(clients) == 20


class Waits:
    """An epoll that notes how long it was asked to wait, and does not."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.timeouts: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self.timeouts.append(timeout)
        return self._epoll.poll(0)


def test_a_wait_for_events_ends_when_the_next_tick_is_due(make_site: Callable[..., Site]) -> None:
    waits = Waits()
    site = make_site(loop={"epoll": waits})
    site.connect()
    site.wait(LOOP_TICK_SECONDS)
    waits.timeouts.clear()
    site.clock.now += LOOP_TICK_SECONDS / 4
    site.loop.turn(LOOP_TICK_SECONDS)
    site.clock.now += LOOP_TICK_SECONDS
    site.loop.turn(LOOP_TICK_SECONDS)
    assert waits.timeouts == [pytest.approx(LOOP_TICK_SECONDS * 3 / 4), 0]


def test_the_hubs_counters_have_the_loops(site: Site) -> None:
    assert sum(site.hub.count()["loop_delay"].buckets.values()) == 0
    site.connect()
    site.wait(LOOP_TICK_SECONDS)
    site.loop.counts.yields, site.loop.counts.yielded = 3, 0.5
    counts = site.hub.count()
    assert counts["loop_delay"] == site.loop.counts.delays.histogram()
    assert sum(counts["loop_delay"].buckets.values()) > 0
    assert (counts["gil_yields"], counts["gil_yielded"]) == (3, 0.5)


def test_pauses_are_counted_with_the_time_that_they_took() -> None:
    clock, counts = Clock(), LoopCounts()

    def sleep(seconds: float) -> None:
        clock.now += seconds + 0.005  # another thread had the GIL for a switch interval

    yielder = GilYielder(clock, sleep, lambda: 0, counts)
    assert yielder.pause()
    assert not yielder.pause()  # the interval has just begun
    clock.now += 1
    assert yielder.pause()
    assert (counts.yields, counts.yielded) == (2, pytest.approx(2 * (PAUSE_SECONDS + 0.005)))
