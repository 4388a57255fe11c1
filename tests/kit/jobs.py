"""A program that starts jobs in processes of their own, which enqueue and end at once. Run by `test_jobs`.

``python -m tests.kit.jobs KIND``. The backend is ``$BACKEND``. A batch window is open for ten seconds, so that nothing
is delivered but what is delivered at the end of a process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from sse_batcher import BatchOptions, SSEManager
from sse_batcher.runtime import process

from .waiting import TIMEOUT

logging.basicConfig(format="%(levelname)s %(message)s")
process.EXIT_SECONDS = float(os.environ.get("EXIT_SECONDS", "30"))
manager = SSEManager(batching=BatchOptions(batch_window=10), backend=os.environ["BACKEND"])
fork = multiprocessing.get_context("fork")

if __name__ == "__mp_main__" and "AT_IMPORT" in os.environ:
    manager.enqueue("n", 0)  # before multiprocessing has set the job up

Target = Callable[[], None]


def job(number: int = 1) -> None:
    manager.enqueue("n", number)


def run(target: Target, context: str = "fork", *, daemon: bool = False, exitcode: int = 0) -> None:
    child = multiprocessing.get_context(context).Process(target=target, daemon=daemon)  # type: ignore[attr-defined]
    child.start()
    child.join()
    assert child.exitcode == exitcode, child.exitcode


def by_fork() -> None:
    run(job)


def by_spawn() -> None:
    run(job, "spawn")


def by_forkserver() -> None:
    run(job, "forkserver")


def daemonic() -> None:
    run(job, daemon=True)


def of_a_parent_in_use() -> None:
    """The parent has a thread of ours, and delivers its own event at its own end."""
    job(0)
    run(job)


def that_raises() -> None:
    def fail() -> None:
        job()
        raise SystemExit(3)

    run(fail, exitcode=3)


def with_a_child() -> None:
    run(by_fork)


def whose_finalizer_enqueues() -> None:
    def finalize() -> None:
        from multiprocessing import util

        job(0)
        util.Finalize(None, job, exitpriority=-100)

    run(finalize)


def whose_thread_goes_on() -> None:
    """It enqueues after the job has returned, which is where Python 3.12 and earlier call finalizers."""

    def start() -> None:
        job(0)
        threading.Thread(target=enqueue_later).start()

    run(start)


def whose_thread_comes_first() -> None:
    run(lambda: threading.Thread(target=enqueue_later).start())


def enqueue_later() -> None:
    threading.main_thread().join()  # which has returned from the job then
    job()


def in_a_pool() -> None:
    with fork.Pool(1) as pool:
        pool.map(job, range(2))
        pool.close()
        pool.join()


def in_a_pool_that_is_killed() -> None:
    with fork.Pool(1) as pool:
        pool.map(flushed_job, range(2))


def flushed_job(number: int) -> None:
    job(number)
    manager.flush_all(TIMEOUT)


def in_an_executor() -> None:
    with ProcessPoolExecutor(1, mp_context=fork) as executor:
        list(executor.map(job, range(2)))


def forked_by_hand() -> None:
    pid = os.fork()
    if not pid:
        job()
        manager.flush_all(TIMEOUT)
        os._exit(0)
    os.waitpid(pid, 0)


def with_two_managers() -> None:
    other = SSEManager(batching=BatchOptions(batch_window=10), backend=os.environ["BACKEND"])

    def both() -> None:
        job()
        other.enqueue("n", 1)

    run(both)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
