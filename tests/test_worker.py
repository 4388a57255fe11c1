"""The worker: its thread takes turns, and hears of a wake-up that comes while it ends."""

from __future__ import annotations

import gc
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from sse_batcher.runtime import worker
from sse_batcher.runtime.worker import Deadline, Worker, take

from .kit.waiting import TIMEOUT


class Owner:
    """Reports each turn."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.worker = Worker(self, "sse_batcher-test")

    def work(self) -> None:
        self.turns.release()

    def had_a_turn(self) -> bool:
        return self.turns.acquire(timeout=TIMEOUT)


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.worker.stop()
    assert owner.worker.join(TIMEOUT)


class LookedInto(SimpleQueue):  # type: ignore[type-arg]
    """Wake-ups. Something happens before or after the last check of a thread that ends."""

    worker: Worker
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None

    def empty(self) -> bool:
        before = after = None
        if self.worker._newest().over:
            (before, after), self.before, self.after = (self.before, self.after), None, None
        if before:
            before()
        answer = super().empty()
        if after:
            after()
        return answer


def running(owner: Owner) -> LookedInto:
    """Starts the worker, and returns its wake-ups."""
    wakeups = LookedInto()
    wakeups.worker = owner.worker
    owner.worker._wakeups = wakeups
    assert owner.worker.ensure()
    assert owner.had_a_turn()
    return wakeups


def test_a_thread_is_started_once_and_takes_a_turn_for_each_wake_up(owner: Owner) -> None:
    before = threading.active_count()
    for _ in range(3):
        assert owner.worker.ensure()
        owner.worker.wake()
        assert owner.had_a_turn()
    assert threading.active_count() == before + 1


def test_a_wake_up_just_before_the_last_check_is_not_lost(owner: Owner) -> None:
    running(owner).before = owner.worker.wake
    owner.worker.stop()
    assert owner.had_a_turn()
    assert owner.had_a_turn()


def test_a_wake_up_just_after_the_last_check_starts_another_thread(owner: Owner) -> None:
    def wake() -> None:
        owner.worker.wake()
        assert owner.worker.ensure()

    running(owner).after = wake
    owner.worker.stop()
    assert owner.had_a_turn()
    assert owner.had_a_turn()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_wake_up_while_the_successor_of_a_dead_thread_ends_is_not_lost(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, start = owner.worker, threading.Thread.start

    def die() -> None:
        monkeypatch.setattr(owner, "work", work)
        monkeypatch.setattr(threading.Thread, "start", start_and_meet)
        raise SystemExit

    def start_and_meet(successor: threading.Thread) -> None:
        """The successor has nothing to do and ends; another thread wakes it before the dying thread is gone."""
        monkeypatch.setattr(threading.Thread, "start", start)
        successor.start()
        successor.join(TIMEOUT)
        meeting = threading.Thread(target=lambda: (worker.wake(), worker.ensure()))
        meeting.start()
        meeting.join(TIMEOUT)

    work = owner.work
    monkeypatch.setattr(owner, "work", die)
    worker._stopping = True  # its threads end whenever there is nothing to do
    assert worker.ensure()
    assert owner.had_a_turn()  # the successor's
    assert owner.had_a_turn()  # for the wake-up
    assert worker.restarts == 1


def test_of_threads_that_are_started_at_once_one_works(owner: Owner) -> None:
    working: list[threading.Thread] = []
    free = threading.Event()

    def work() -> None:
        working.append(threading.current_thread())
        owner.turns.release()
        assert free.wait(TIMEOUT)

    owner.work = work  # type: ignore[method-assign]
    assert owner.worker.ensure()
    assert owner.had_a_turn()
    # Several callers may do so before the first thread has claimed its term.
    surplus = [threading.Thread(target=owner.worker._main) for _ in range(5)]
    for thread in surplus:
        thread.start()
    for thread in surplus:
        thread.join(TIMEOUT)
    assert working == [owner.worker.thread]
    assert owner.worker.restarts == 0
    free.set()


def test_threads_that_meet_at_a_term_that_is_over_agree_on_the_next(owner: Owner) -> None:
    """Each finds the same next term, and one gets it, also if it has read an old one first."""
    first = owner.worker._term
    first.claim()
    first.over = True
    seconds = [first.next() for _ in range(3)]
    assert seconds[0] is seconds[1] is seconds[2]
    in_thread = threading.Thread(target=seconds[0].claim)
    in_thread.start()
    in_thread.join(TIMEOUT)
    assert not seconds[0].claim()
    assert owner.worker._newest() is seconds[0]


def test_a_caller_that_interrupts_the_start_of_the_thread_does_not_wait_for_it(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[bool] = []
    start = threading.Thread.start

    def start_and_ask(thread: threading.Thread) -> None:
        """Do what a signal handler may do inside `Thread.start`."""
        answers.append(owner.worker.is_caller())
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_and_ask)
    assert owner.worker.ensure()
    assert answers == [True]
    assert not owner.worker.is_caller()


def test_a_thread_that_is_stopped_in_the_middle_of_a_turn_ends_after_one_more(owner: Owner) -> None:
    turns: list[int] = []

    def work() -> None:
        turns.append(1)
        if len(turns) == 1:
            owner.worker.stop()

    owner.work = work  # type: ignore[method-assign]
    assert owner.worker.ensure()
    assert owner.worker.join(TIMEOUT)
    assert len(turns) == 2  # the second for the wake-up


def test_an_owner_may_outlive_the_names_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of the interpreter, which sets them to None before it has freed all objects."""
    failures: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    owner = Owner()
    wakeups = owner.worker._wakeups
    with monkeypatch.context() as patched:
        for name in vars(worker).keys() - {"__builtins__"}:
            patched.setattr(worker, name, None)
        del owner
        gc.collect()
    assert not failures
    assert wakeups.get_nowait() is None


def test_a_worker_that_cannot_be_started_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    owner = Owner()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert not owner.worker.ensure()
    monkeypatch.undo()
    assert owner.worker.ensure()
    owner.worker.stop()
    assert owner.worker.join(TIMEOUT)


def test_a_deadline_is_one_limit_for_several_waits() -> None:
    assert Deadline(None).left() is None
    assert Deadline(-1).left() == 0
    deadline = Deadline(TIMEOUT)
    first, second = deadline.left(), deadline.left()
    assert TIMEOUT >= first >= second > TIMEOUT / 2


# -- the check that must come before the wait --------------------------------------------------------------------------


class Cautious(SimpleQueue):  # type: ignore[type-arg]
    """A queue that waits with a time limit only right after a check, as CPython up to 3.12 needs it."""

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
