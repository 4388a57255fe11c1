"""The worker: its thread takes turns, and hears of a wake-up that comes while it ends."""

from __future__ import annotations

import gc
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest

from sse_batcher.runtime import worker
from sse_batcher.runtime.worker import Deadline, Worker, take

from .kit.waiting import TIMEOUT


class Owner:
    """Reports each turn."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.wakeups = LookedInto()
        self.worker = Worker(self, "sse_batcher-test", self.wakeups)

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

    worker: Worker | None = None
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None

    def empty(self) -> bool:
        before = after = None
        if self.worker is not None and not self.worker.runs:
            (before, after), self.before, self.after = (self.before, self.after), None, None
        if before:
            before()
        answer = super().empty()
        if after:
            after()
        return answer


def running(owner: Owner) -> LookedInto:
    """Starts the worker, and returns its wake-ups."""
    assert owner.worker.ensure()
    assert owner.had_a_turn()
    owner.wakeups.worker = owner.worker
    return owner.wakeups


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
    worker.stop()  # no thread runs yet; those that are started end whenever there is nothing to do
    assert worker.ensure()
    assert owner.had_a_turn()  # the successor's
    assert owner.had_a_turn()  # for the wake-up
    assert worker.restarts == 1


def end_threads(owner: Owner, times: int) -> None:
    """Let the worker have had so many threads, one after the other."""
    for _ in range(times):
        assert owner.worker.ensure()
        assert owner.had_a_turn()
        owner.worker.stop()
        assert owner.worker.join(TIMEOUT)
        while owner.turns.acquire(blocking=False):
            pass  # the turns that were not waited for


@pytest.mark.parametrize("ended", [0, 1, 2], ids=["no thread", "a thread", "two threads"])
def test_of_threads_that_are_started_at_once_one_works(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, ended: int
) -> None:
    """Several callers may start one before any of these threads has begun, at first and when others have ended."""
    end_threads(owner, ended)
    worker, start, current = owner.worker, threading.Thread.start, threading.current_thread
    working: list[threading.Thread] = []
    started: list[threading.Thread] = []
    met: set[threading.Thread] = set()
    meeting, entered, free = threading.Barrier(5), threading.Event(), threading.Event()

    def start_later(thread: threading.Thread) -> None:
        started.append(thread)

    def current_and_meet() -> threading.Thread:
        """Let each thread wait for the others when it first asks which one it is: it does that to claim the work."""
        thread = current()
        if thread in started and thread not in met:
            met.add(thread)
            meeting.wait(TIMEOUT)
        return thread

    def work() -> None:
        working.append(current())
        entered.set()
        assert free.wait(TIMEOUT)

    owner.work = work  # type: ignore[method-assign]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_later)
        for _ in range(5):
            assert worker.ensure()
    monkeypatch.setattr(threading, "current_thread", current_and_meet)
    for thread in started:
        start(thread)
    assert entered.wait(TIMEOUT)
    works = worker.thread
    for thread in started:
        if thread is not works:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
    assert working == [works]
    assert len(met) == 5
    assert worker.restarts == 0
    free.set()


def test_a_thread_counts_as_soon_as_it_has_claimed_the_work(owner: Owner) -> None:
    """The garbage collector may run code right after that, and this code must not wait for the thread: it is this."""
    end_threads(owner, 1)
    answers: list[tuple[bool, bool, bool]] = []

    def ask(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_return" and called.__name__ == "setdefault" and frame.f_code.co_filename == worker.__file__:
            mine = owner.worker.thread is threading.current_thread()
            answers.append((mine, owner.worker.runs, owner.worker.is_caller()))

    threading.setprofile(ask)
    try:
        assert owner.worker.ensure()
        assert owner.had_a_turn()  # so it has begun with the function above
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    assert answers[0] == (False, False, False)  # the work of the thread before it
    assert answers[-1] == (True, True, True)


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
    wakeups = owner.wakeups
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
