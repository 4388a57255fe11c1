"""Time that the test moves."""

from __future__ import annotations


class Clock:
    """A clock for what takes one as an argument. It counts how often it was read, in `asked`."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now
