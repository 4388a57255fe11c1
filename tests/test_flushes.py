"""The answers to flushes: when each of them comes, and what it says."""

from __future__ import annotations

import pytest

from sse_batcher.batching.flushes import Flush, Flushes


class Queue:
    """Batches that become ready and are delivered, and flushes among them, with the answers in the order they came."""

    def __init__(self) -> None:
        self.flushes = Flushes()
        self.answers: list[tuple[str, bool]] = []

    def request(self, name: str) -> Flush:
        return Flush("manual", 0.0, self.flushes.done, lambda ok: self.answers.append((name, ok)))

    def flush(self, name: str) -> None:
        self.flushes.begin(self.request(name))

    def deliver(self, *taken: bool) -> None:
        for each in taken:
            self.flushes.note_done(each)
            self.flushes.answer()


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_a_flush_is_answered_after_the_last_batch_that_was_ready(queue: Queue) -> None:
    queue.flushes.note_ready(2)
    queue.flush("a")
    queue.flushes.note_ready(1)
    queue.flush("b")
    queue.deliver(True)
    assert queue.answers == []
    queue.deliver(True)
    assert queue.answers == [("a", True)]
    queue.deliver(True)
    assert queue.answers == [("a", True), ("b", True)]


def test_a_flush_without_batches_is_answered_at_the_next_look(queue: Queue) -> None:
    queue.flush("a")
    queue.flush("b")
    queue.flushes.answer()
    queue.flushes.answer()
    assert queue.answers == [("a", True), ("b", True)]


def test_a_failed_batch_counts_for_flushes_that_wait_for_it(queue: Queue) -> None:
    queue.flushes.note_ready(1)
    queue.flush("before")
    queue.flushes.note_ready(1)
    queue.flush("with it")
    queue.flushes.note_ready(1)
    queue.flush("after")
    queue.deliver(True, False, True)
    assert queue.answers == [("before", True), ("with it", False), ("after", False)]


def test_a_flush_that_waits_for_nothing_counts_no_later_failure(queue: Queue) -> None:
    queue.flush("a")
    queue.flushes.note_ready(1)
    queue.deliver(False)
    assert queue.answers == [("a", True)]


def test_a_failure_before_the_request_does_not_count(queue: Queue) -> None:
    queue.flushes.note_ready(1)
    queue.deliver(False)
    queue.flush("a")
    queue.flushes.answer()
    assert queue.answers == [("a", True)]


def test_a_failure_between_the_request_and_the_flush_counts(queue: Queue) -> None:
    queue.flushes.note_ready(1)
    late = queue.request("a")
    queue.deliver(False)
    queue.flushes.begin(late)
    queue.flushes.answer()
    assert queue.answers == [("a", False)]
