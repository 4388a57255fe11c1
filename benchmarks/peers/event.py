"""The event that all of them publish, and the bursts in which they do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

PAD = "x" * 130


def event(number: int) -> dict[str, Any]:
    """What the load generator looks for: a number, and when it was published. About 180 bytes of JSON."""
    return {"n": number, "t": time.monotonic_ns(), "text": PAD}


def bursts(query: dict[str, str]) -> Iterator[tuple[float, range]]:
    """How long to wait for the next burst, and its numbers: `n` from `first` on, `bursts` times, one every `every` s.

    One that comes late, because publishing the one before has taken longer, comes at once.
    """
    number, size, every = int(query["first"]), int(query["n"]), float(query.get("every", "0"))
    began = time.monotonic()
    for burst in range(int(query.get("bursts", "1"))):
        yield max(0.0, began + burst * every - time.monotonic()), range(number, number + size)
        number += size


def publish(query: dict[str, str], burst: Callable[[range], None]) -> dict[str, float]:
    """Have `burst` publish each, and return the microseconds it takes, as the median."""
    took = []
    for pause, numbers in bursts(query):
        time.sleep(pause)
        began = time.perf_counter_ns()
        burst(numbers)
        took.append((time.perf_counter_ns() - began) / 1e3)
    return {"took_us": statistics.median(took)}
