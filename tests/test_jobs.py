"""What jobs in processes of their own enqueue is delivered, though they end by `os._exit`. Real Redis, real workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sse_batcher import SSEManager

from .kit.documents import block, text_of
from .kit.redisserver import RedisServer, redis_fixture
from .kit.repository import ROOT
from .kit.viewers import Viewer
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external


redis = redis_fixture()


@pytest.fixture
def browser(redis: RedisServer) -> Iterator[Viewer]:
    """A client of the site, which is another process than the jobs."""
    with SSEManager(backend=redis.url) as site, Viewer(site) as viewer:
        yield viewer


def run(kind: str, redis: RedisServer, **environment: str) -> str:
    """Run a kind of `jobs`; what it has logged."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-m", "tests.kit.jobs", kind],
        cwd=ROOT,
        env={**os.environ, "BACKEND": redis.url, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("by_fork", [1]),
        ("by_spawn", [1]),
        ("by_forkserver", [1]),
        ("daemonic", [1]),
        ("of_a_parent_in_use", [1, 0]),
        ("that_raises", [1]),
        ("with_a_child", [1]),
        ("whose_finalizer_enqueues", [0, 1]),
        ("whose_thread_goes_on", [0, 1]),
        ("whose_thread_comes_first", [1]),
        ("in_a_pool", [0, 1]),
        ("in_a_pool_that_is_killed", [0, 1]),
        ("in_an_executor", [0, 1]),
        ("forked_by_hand", [1]),
    ],
)
def test_a_job_delivers(kind: str, numbers: list[int], redis: RedisServer, browser: Viewer) -> None:
    assert run(kind, redis) == ""
    assert browser.numbers(numbers[-1]) == numbers


def test_a_job_of_a_module_that_enqueues_delivers(redis: RedisServer, browser: Viewer) -> None:
    assert run("by_forkserver", redis, AT_IMPORT="yes") == ""
    assert browser.numbers(1)[-1] == 1


def test_a_job_does_not_wait_long_for_redis(redis: RedisServer) -> None:
    redis.kill()
    began = time.monotonic()
    logged = run("with_two_managers", redis, EXIT_SECONDS="0.5")
    assert time.monotonic() - began < 2 * TIMEOUT  # as long as the end of a process may last by default
    assert "not everything was delivered and closed within 0.5 seconds" in logged


# -- RQ and Celery -----------------------------------------------------------------------------------------------------

JOB = """
def job(number):
    manager.enqueue("n", number)
    if number == 2:
        raise RuntimeError("it fails after it has enqueued")
"""

TASKS = """
import os
from celery import Celery
from sse_batcher import BatchOptions, SSEManager

manager = SSEManager(batching=BatchOptions(batch_window=10), backend=os.environ["BACKEND"])
app = Celery(broker=os.environ["BACKEND"], backend=os.environ["BACKEND"])

@app.task(name="job")
def job(number):
    manager.enqueue("n", number)
"""


def test_rq_jobs_deliver_as_the_guide_says(redis: RedisServer, browser: Viewer, tmp_path: Path) -> None:
    import rq

    program = block(text_of("guides/redis"), "python", "rq.Worker")
    assert "redis://localhost:6379/0" in program
    (tmp_path / "jobs.py").write_text(program.replace("redis://localhost:6379/0", redis.url) + JOB)
    queue = rq.Queue(connection=redis.client)
    for number in (1, 2, 3):
        queue.enqueue("jobs.job", number)
    worker = ("worker", "--burst", "--worker-class", "jobs.Worker", "--url", redis.url)
    done = subprocess.run(
        [sys.executable, "-m", "rq.cli", *worker],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert browser.numbers(3) == [1, 2, 3]


class Celery:
    """A worker of Celery, and what sends it tasks. In processes of their own, so that nothing of it stays here."""

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        (folder / "tasks.py").write_text(TASKS)
        self._redis = redis
        self._folder = folder
        self._environment = {
            **os.environ,
            "BACKEND": redis.url,
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        }

    @contextmanager
    def worker(self, *options: str) -> Iterator[None]:
        quick = ("--concurrency=1", "--without-mingle", "--without-gossip", "--without-heartbeat")
        worker = self._python("-m", "celery", "-A", "tasks", "worker", *quick, *options)
        try:
            yield
        finally:
            worker.terminate()
            worker.wait(TIMEOUT)

    def do(self, *numbers: int) -> None:
        """Have these tasks done, one after the other, in one process if the worker has one for all of them."""
        calls = "; ".join(f"tasks.job.delay({number})" for number in numbers)
        assert self._python("-c", f"import tasks; {calls}").wait(TIMEOUT) == 0
        results = "celery-task-meta-*"
        wait_until(lambda: len(self._redis.client.keys(results)) == len(numbers), "the tasks are done")

    def _python(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *arguments], cwd=self._folder, env=self._environment)


@pytest.fixture
def celery(redis: RedisServer, tmp_path: Path) -> Celery:
    return Celery(redis, tmp_path)


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_celery_tasks_deliver(pool: str, celery: Celery, browser: Viewer) -> None:
    with celery.worker(f"--pool={pool}"):
        celery.do(1, 2)  # the second would fail if the first had closed the manager
    assert browser.numbers(2) == [1, 2]


def test_celery_tasks_with_a_process_each_deliver(celery: Celery, browser: Viewer) -> None:
    with celery.worker("--max-tasks-per-child=1"):
        celery.do(1)
        assert browser.numbers(1) == [1]
