"""`Dropped`: a function is called when an object is dropped."""

from __future__ import annotations

import gc
import weakref
from functools import partial

from sse_batcher.runtime.dropped import Dropped


class Thing:
    """Something that can be dropped."""


def test_the_function_is_called_once_when_the_object_is_dropped() -> None:
    calls: list[str] = []
    thing = Thing()
    guard = Dropped(thing, lambda: calls.append("dropped"))
    assert calls == []
    del thing
    assert calls == ["dropped"]
    guard.cancel()
    assert calls == ["dropped"]


def test_an_object_in_a_cycle_is_dropped_by_the_garbage_collector() -> None:
    calls: list[str] = []
    thing = Thing()
    thing.myself = thing  # type: ignore[attr-defined]
    Dropped(thing, lambda: calls.append("dropped"))
    del thing
    gc.collect()
    assert calls == ["dropped"]


def test_an_object_may_have_several_and_each_is_cancelled_alone() -> None:
    calls: list[str] = []
    thing = Thing()
    guards = [Dropped(thing, lambda name=name: calls.append(name)) for name in ("first", "second", "third")]
    guards[1].cancel()
    del thing
    assert sorted(calls) == ["first", "third"]


def test_a_second_cancel_does_not_reach_another_object() -> None:
    calls: list[str] = []
    things = [Thing() for _ in range(50)]
    cancelled = [Dropped(thing, lambda: calls.append("cancelled")) for thing in things]
    for guard in cancelled:
        guard.cancel()
    kept = [Dropped(thing, lambda: calls.append("kept")) for thing in things]  # some have a number of those before
    for guard in cancelled:
        guard.cancel()
    things.clear()
    assert calls == ["kept"] * len(kept)


def test_a_cancel_after_the_object_was_dropped_does_not_reach_another_object() -> None:
    calls: list[str] = []
    things = [Thing() for _ in range(50)]
    dropped = [Dropped(thing, lambda: None) for thing in things]
    things.clear()
    others = [Thing() for _ in range(50)]
    kept = [Dropped(thing, lambda: calls.append("kept")) for thing in others]
    for guard in dropped:
        guard.cancel()
    others.clear()
    assert calls == ["kept"] * len(kept)


def test_what_the_function_refers_to_is_not_kept_after_that() -> None:
    dropped, cancelled = Thing(), Thing()
    held = [Thing(), Thing()]
    references = [weakref.ref(each) for each in held]
    Dropped(dropped, partial(isinstance, held[0], Thing))
    Dropped(cancelled, partial(isinstance, held[1], Thing)).cancel()
    held.clear()
    del dropped
    assert [reference() for reference in references] == [None, None]
