"""How long tests wait, and how: for threads and other processes, which need time that a test cannot count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TIMEOUT = 15.0
"""Seconds after which a test fails if something that has to happen has not happened."""

TRIES = 3
"""How often, at most, a test tries what fails if the machine stands still for some seconds."""


def wait_until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
    """Ask again and again until the condition holds. `what` says in the failure what was expected."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} seconds"
        threading.Event().wait(0.02)


def tried(attempt: Callable[[], T], is_right: Callable[[T], bool]) -> T:
    """What the first attempt that is right gives, or the last of `TRIES`. The test checks it afterwards."""
    for _ in range(TRIES):
        result = attempt()
        if is_right(result):
            break
    return result
