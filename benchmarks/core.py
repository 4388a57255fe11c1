"""What the core costs, as ratios in one run: `python benchmarks/core.py`.

`taskset -c 0 python benchmarks/core.py` is the same on one core. Medians of several rounds; the things compared take
turns within each round, since machines are noisy.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable

from sse_batcher import BatchOptions, EventBatcher

ROUNDS = 7
CALLS = 40_000  # in all threads together
IDLE_SECONDS = 3.0


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), medians of {ROUNDS} rounds\n")
    print(f"{'':44}{'µs a call':>12}{'ratio':>8}{'must be':>10}")
    for threads in (1, 8):
        baseline, ours = compare(threads)
        print(f"{f'json.dumps and a locked append, {threads} thread(s)':44}{baseline:12.2f}{1:8.2f}")
        print(f"{f'enqueue, {threads} thread(s)':44}{ours:12.2f}{ours / baseline:8.2f}{'<= 2':>10}")
    print(f"\nCPU of an idle batcher: {idle() * 100:.3f} % (must be 0.0)")


def compare(threads: int) -> tuple[float, float]:
    """Microseconds a call until the last one has returned: what any queue of JSON costs, and `enqueue`."""
    lock, sunk = threading.Lock(), []

    def append(data: object) -> None:
        text = json.dumps(data)
        with lock:
            sunk.append(text)

    baseline, ours = [], []
    for _ in range(ROUNDS):
        sunk.clear()
        baseline.append(microseconds(append, threads))
        with EventBatcher(lambda batch: None, BatchOptions(dedup_key="server")) as batcher:
            ours.append(microseconds(lambda data, batcher=batcher: batcher.enqueue("state", data), threads))
    return statistics.median(baseline), statistics.median(ours)


def microseconds(call: Callable[[object], None], threads: int) -> float:
    events = [event(server, 200) for server in range(100)]
    start = threading.Barrier(threads + 1)

    def produce() -> None:
        start.wait()
        for n in range(CALLS // threads):
            call(events[n % 100])

    producers = [threading.Thread(target=produce) for _ in range(threads)]
    for producer in producers:
        producer.start()
    start.wait()
    began = time.perf_counter()
    for producer in producers:
        producer.join()
    return (time.perf_counter() - began) / CALLS * 1e6


def event(server: int, size: int) -> dict[str, object]:
    """A state of one server, of `size` bytes of JSON."""
    data: dict[str, object] = {"server": f"server-{server:02}", "count": 17, "names": ["read", "write"], "text": ""}
    data["text"] = "x" * (size - len(json.dumps(data, separators=(",", ":"))))
    return data


def idle() -> float:
    """The share of one core that a batcher takes when nothing comes, its thread running."""
    with EventBatcher(lambda batch: None) as batcher:
        batcher.enqueue("state", 1)
        batcher.flush_all()
        before = time.process_time()
        time.sleep(IDLE_SECONDS)
        return (time.process_time() - before) / IDLE_SECONDS


if __name__ == "__main__":
    main()
