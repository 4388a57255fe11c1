"""What jobs in processes of their own enqueue is delivered, though they end by `os._exit`. Real Redis, real workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sse_batcher import SSEManager

from .redisserver import RedisServer, redis_server
from .test_redis import Viewer

pytestmark = pytest.mark.external

ROOT = Path(__file__).parents[1]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def browser(redis: RedisServer) -> Iterator[Viewer]:
    """A client of the site, which is another process than the jobs."""
    with SSEManager(backend=redis.url) as site, Viewer(site) as viewer:
        yield viewer


def run(kind: str, redis: RedisServer, **environment: str) -> str:
    """Run a kind of `jobs`; what it has logged."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore:.*fork.*:DeprecationWarning", "-m", "tests.jobs", kind],
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
    assert time.monotonic() - began < 10
    assert "not everything was delivered and closed within 0.5 seconds" in logged
