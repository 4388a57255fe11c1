"""What one Redis stream carries: `python benchmarks/stream.py`. Starts a redis-server of its own.

One process publishes as fast as Redis takes it; others read it back, as each process with clients does. Medians of
several rounds.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from typing import Any

from sse_batcher import BatchOptions, HistoryOptions, SSEManager

ROUNDS = 3
BATCHES = 10_000
EVENTS = 30  # in a batch, of about 60 bytes each
READERS = (1, 2)
HISTORY = HistoryOptions(history_frames=10 * BATCHES, history_bytes=2**30)  # so that no client gets a gap


def main() -> None:
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("skipped: redis-server is not installed")
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), medians of {ROUNDS} rounds")
    print(f"{BATCHES:,} batches of one event, and {BATCHES // 10:,} of {EVENTS}\n")
    print(f"{'':24}{'batches/s':>12}{'events/s':>12}")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        command = [program, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            time.sleep(1)
            for readers in READERS:
                for size, batches in ((1, BATCHES), (EVENTS, BATCHES // 10)):
                    urls = [f"redis://127.0.0.1:{port}/0?prefix={readers}-{size}-{n}" for n in range(ROUNDS)]
                    rates = [one_round(url, readers, size, batches) for url in urls]
                    rate = statistics.median(rates)
                    print(f"{f'{readers} readers, {size} in a batch':24}{rate:12,.0f}{rate * size:12,.0f}")
        finally:
            server.kill()
            server.wait()


def one_round(url: str, readers: int, size: int, batches: int) -> float:
    """Batches a second, from the first that is published until the last reader has the last."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(readers + 1)
    processes = [context.Process(target=read, args=(url, ready)) for _ in range(readers)]
    for process in processes:
        process.start()
    ready.wait()
    began = time.perf_counter()
    options = BatchOptions(batch_window=5, max_batch_size=size, dedup_key=None)
    with SSEManager(batching=options, backend=url, history=HISTORY) as manager:
        for number in range(batches * size):
            manager.enqueue("tick", {"n": number, "text": "as long as an event of a hub"})
        manager.enqueue("error", "the end")
        manager.flush_all()
        for process in processes:
            process.join()
    return batches / (time.perf_counter() - began)


def read(url: str, ready: Any) -> None:
    with SSEManager(backend=url, history=HISTORY) as manager:
        client = manager.subscribe()
        next(client)
        ready.wait()
        for block in client:
            if block.startswith(b"event: error"):
                return


if __name__ == "__main__":
    main()
