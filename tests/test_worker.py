"""The worker: a thread that parks, and what becomes of who wakes it while it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from sse_batcher.worker import Deadline, Worker

PATIENCE = 10.0


class Owner:
    """Tells of each turn."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.worker = Worker(self, "sse_batcher-test")

    def work(self) -> None:
        self.turns.release()

    def had_a_turn(self) -> bool:
        return self.turns.acquire(timeout=PATIENCE)


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.worker.stop()
    assert owner.worker.join(PATIENCE)


class LookedInto(SimpleQueue):  # type: ignore[type-arg]
    """Wake-ups, with something that happens before or after the last look of a thread that ends."""

    worker: Worker
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None

    def empty(self) -> bool:
        before = after = None
        if self.worker._over:
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


def test_who_wakes_a_thread_just_before_its_last_look_is_heard(owner: Owner) -> None:
    running(owner).before = owner.worker.wake
    owner.worker.stop()
    assert owner.had_a_turn()
    assert owner.had_a_turn()


def test_who_wakes_a_thread_just_after_its_last_look_starts_another(owner: Owner) -> None:
    def wake() -> None:
        owner.worker.wake()
        assert owner.worker.ensure()

    running(owner).after = wake
    owner.worker.stop()
    assert owner.had_a_turn()
    assert owner.had_a_turn()


def test_who_wakes_a_thread_that_is_over_while_its_starter_has_not_let_go_is_heard(owner: Owner) -> None:
    def wake() -> None:
        owner.worker.wake()
        assert owner.worker.ensure()  # cannot: the test's own thread is still inside `ensure`

    wakeups = LookedInto()
    wakeups.worker = owner.worker
    wakeups.after = wake
    owner.worker._wakeups = wakeups
    owner.worker._stopping = True
    assert owner.worker.ensure()
    assert owner.had_a_turn()
    assert owner.had_a_turn()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_wakes_the_successor_of_a_dead_thread_that_is_over_again_is_heard(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, start = owner.worker, owner.worker._start

    def die() -> None:
        monkeypatch.setattr(owner, "work", work)
        monkeypatch.setattr(worker, "_start", start_and_meet)
        raise SystemExit

    def start_and_meet() -> bool:
        """The successor has nothing to do, and is over; somebody wakes it before the dying thread has let go."""
        monkeypatch.setattr(worker, "_start", start)
        started = start()
        assert worker._thread is not None
        worker._thread.join(PATIENCE)
        meeting = threading.Thread(target=lambda: (worker.wake(), worker.ensure()))
        meeting.start()
        meeting.join(PATIENCE)
        return started

    work = owner.work
    monkeypatch.setattr(owner, "work", die)
    worker._stopping = True  # its threads end whenever there is nothing to do
    assert worker.ensure()
    assert owner.had_a_turn()  # the successor's
    assert owner.had_a_turn()  # for who woke it


def test_a_thread_that_is_stopped_in_the_middle_of_a_turn_ends_after_one_more(owner: Owner) -> None:
    turns: list[int] = []

    def work() -> None:
        turns.append(1)
        if len(turns) == 1:
            owner.worker.stop()

    owner.work = work  # type: ignore[method-assign]
    assert owner.worker.ensure()
    assert owner.worker.join(PATIENCE)
    assert len(turns) == 2  # the second for the wake-up


def test_a_worker_that_cannot_be_started_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    owner = Owner()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert not owner.worker.ensure()
    monkeypatch.undo()
    assert owner.worker.ensure()
    owner.worker.stop()
    assert owner.worker.join(PATIENCE)


def test_a_deadline_is_one_limit_for_several_waits() -> None:
    assert Deadline(None).left() is None
    assert Deadline(-1).left() == 0
    deadline = Deadline(PATIENCE)
    first, second = deadline.left(), deadline.left()
    assert PATIENCE >= first >= second > PATIENCE / 2
