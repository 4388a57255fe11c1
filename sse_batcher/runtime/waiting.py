"""Waiting for the next thing in a queue.

Any thread.
"""

from __future__ import annotations

import queue
from typing import TypeVar

T = TypeVar("T")


def take(source: queue.SimpleQueue[T], timeout: float | None) -> T:
    """Take the next thing out of a queue that nobody else takes from, within `timeout` seconds (None: no limit).

    Raises `queue.Empty`. Not just ``source.get(timeout=timeout)``: CPython up to 3.12 then waits for ever, if the last
    take had not waited and the time is up before the first look (the rest of the time is negative then, which means
    no limit). A look that finds nothing leaves the queue in a state in which this cannot be.
    """
    try:
        return source.get_nowait()
    except queue.Empty:
        return source.get(timeout=timeout)
