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

from sse_batcher import BatchOptions, EventBatcher, Text

ROUNDS = 7
CALLS = 40_000  # in all threads together
SIZE = 200  # bytes of an event's JSON, or of a text in UTF-8
IDLE_SECONDS = 3.0


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), medians of {ROUNDS} rounds\n")
    print(f"{'':44}{'µs a call':>12}{'ratio':>8}{'must be':>10}")
    for threads in (1, 8):
        baseline, ours = compare(threads)
        print(f"{f'json.dumps and a locked append, {threads} thread(s)':44}{baseline:12.2f}{1:8.2f}")
        print(f"{f'enqueue, {threads} thread(s)':44}{ours:12.2f}{ours / baseline:8.2f}{'<= 2':>10}")
    print(f"\n{'':44}{'µs a call':>12}{'ratio':>8}{'must be':>10}")
    for name, took, ratio, bound in compare_texts():
        print(f"{name:44}{took:12.2f}{ratio:8.2f}{bound:>10}")
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


def compare_texts() -> list[tuple[str, float, float, str]]:
    """`enqueue` of a dict and of texts with as many bytes: a name, µs a call, the ratio to the dict, and its bound.

    The call makes the `Text` out of a `str`, as apps do. The ratio is the median of those of the rounds.
    """
    ascii_text, other_text = "x" * SIZE, "é" * (SIZE // 2)
    calls: dict[str, Callable[[EventBatcher, object], None]] = {
        f"enqueue of a dict, {SIZE} bytes": lambda batcher, data: batcher.enqueue("state", data),
        f"enqueue of a Text, {SIZE} bytes": lambda batcher, _: batcher.enqueue("row", Text(ascii_text)),
        "the same, not ASCII": lambda batcher, _: batcher.enqueue("row", Text(other_text)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            with EventBatcher(lambda batch: None) as batcher:
                times[name].append(microseconds(lambda data, call=call, batcher=batcher: call(batcher, data), 1))
    of_dict, of_text, of_other = times.values()
    ratios = [
        statistics.median(text / plain for text, plain in zip(texts, of_dict, strict=True))
        for texts in (of_dict, of_text, of_other)
    ]
    bounds = ("", "<= 1", "")
    return [
        (name, statistics.median(took), ratio, bound)
        for (name, took), ratio, bound in zip(times.items(), ratios, bounds, strict=True)
    ]


def microseconds(call: Callable[[object], None], threads: int) -> float:
    events = [event(server, SIZE) for server in range(100)]
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
