"""What clients cost: one that stalls, many that are idle, many that return. `python benchmarks/clients.py`.

`taskset -c 0 python benchmarks/clients.py` is the same on one core. Medians of several rounds; the things compared take
turns within each round, since machines are noisy.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import threading
import time
import tracemalloc
from collections.abc import Callable

from sse_batcher import BatchOptions, Client, ClientOptions, HistoryOptions, SSEManager

ROUNDS = 5
CLIENTS = 100
EVENTS = 200
PAUSE = 0.005  # seconds between two events: what is measured is the way of one, not a queue of them
IDLE_CLIENTS = 1_000
RECONNECTS = 10_000
HISTORY = 10_000
AT_ONCE = BatchOptions(max_batch_size=1)


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), medians of {ROUNDS} rounds\n")
    print(f"{'':52}{'ms':>10}{'ratio':>8}")
    print(f"{f'p99 of enqueue to driver, {CLIENTS} clients':52}", end="", flush=True)
    without, with_one, ratio = compare_stalled()
    print(f"{without:10.2f}{1:8.2f}")
    print(f"{f'the same of the others, {CLIENTS} clients, one stalled':52}{with_one:10.2f}{ratio:8.2f}")
    print(f"\n{'':52}{'µs':>10}{'ratio':>8}")
    for name, value, ratio in compare_reconnects():
        print(f"{name:52}{value:10.1f}{ratio:8.2f}")
    print(f"\n{'':52}{'bytes':>10}")
    print(f"{f'one of {IDLE_CLIENTS:,} idle clients, as objects':52}{idle_bytes():10,.0f}")
    print(f"{'the same, each with a user of its own':52}{idle_bytes(users=True):10,.0f}")
    print(f"{f'one of {IDLE_CLIENTS:,} idle clients, each with its thread (RSS)':52}{idle_rss():10,.0f}")


def compare_stalled() -> tuple[float, float, float]:
    """Milliseconds from `enqueue` to a driver that has the bytes, of the slowest of a hundred, and their ratio.

    Without and with one client that takes nothing. The ratio is the median of the rounds'.
    """
    rounds = [(p99(stalled=False), p99(stalled=True)) for _ in range(ROUNDS)]
    without, with_one = zip(*rounds, strict=True)
    ratio = statistics.median(after / before for before, after in rounds)
    return statistics.median(without), statistics.median(with_one), ratio


def p99(*, stalled: bool) -> float:
    took: list[float] = []
    with SSEManager(batching=AT_ONCE, clients=ClientOptions(queue_frames=16)) as manager:
        clients = [manager.subscribe() for _ in range(CLIENTS)]
        driven = clients[1:] if stalled else clients  # the stalled one is the first that is queued for
        ready = threading.Barrier(len(driven) + 1)

        def drive(client: Client) -> None:
            next(client)
            ready.wait()
            for _ in range(EVENTS):
                block = next(client)
                took.append(time.perf_counter() - float(block.split(b"data: ", 1)[1].split(b"\n", 1)[0]))

        threads = [threading.Thread(target=drive, args=(client,)) for client in driven]
        for thread in threads:
            thread.start()
        ready.wait()
        for _ in range(EVENTS):
            manager.enqueue("tick", time.perf_counter())
            time.sleep(PAUSE)
        for thread in threads:
            thread.join()
    assert len(took) == len(driven) * EVENTS
    return sorted(took)[len(took) * 99 // 100] * 1_000


def compare_reconnects() -> list[tuple[str, float, float]]:
    """Microseconds a connect until the client has its first block, and with a cursor its first frame, too."""
    with SSEManager(batching=AT_ONCE, history=HistoryOptions(history_frames=HISTORY)) as manager:
        for number in range(HISTORY):
            manager.enqueue("tick", number, channel="busy" if number % 10 else "default")
        manager.flush_all()
        epoch, _, head = manager.cursor().partition("-")

        def connect(behind: int | None) -> Callable[[], None]:
            cursor = None if behind is None else f"{epoch}-{int(head) - behind}"

            def once() -> None:
                client = manager.subscribe(last_event_id=cursor)
                next(client)
                if behind:
                    next(client)
                client.close()

            return once

        kinds = {
            "a new client": connect(None),
            "one that returns with the head": connect(0),
            "one that has missed the newest frame of its channel": connect(10),
            "one that has missed 900 frames of its channel": connect(9_000),
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(ROUNDS):
            for name, once in kinds.items():
                began = time.perf_counter()
                for _ in range(RECONNECTS // ROUNDS):
                    once()
                times[name].append((time.perf_counter() - began) / (RECONNECTS // ROUNDS) * 1e6)
    plain = statistics.median(times["a new client"])
    return [(name, statistics.median(took), statistics.median(took) / plain) for name, took in times.items()]


def idle_bytes(*, users: bool = False) -> float:
    """What Python holds for a client that is open and gets nothing. With `users`, each has one, a str."""
    with SSEManager() as manager:
        for _ in range(10):
            next(manager.subscribe())
        gc.collect()
        tracemalloc.start()
        clients = [manager.subscribe(user=f"user-{n}" if users else None) for n in range(IDLE_CLIENTS)]
        for client in clients:
            next(client)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size / len(clients)


def idle_rss() -> float:
    """What the process grows by for a client whose thread waits for the next frame. Linux only."""
    with SSEManager(clients=ClientOptions(heartbeat=3600)) as manager:
        ready = threading.Barrier(IDLE_CLIENTS + 1)

        def drive(client: Client) -> None:
            next(client)
            ready.wait()
            for _ in client:
                pass

        before = rss()
        clients = [manager.subscribe() for _ in range(IDLE_CLIENTS)]
        threads = [threading.Thread(target=drive, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        ready.wait()
        grown = rss() - before
        manager.shutdown()
        for thread in threads:
            thread.join()
        return grown / IDLE_CLIENTS


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
