"""Apps and managers come and go, and leave nothing behind. Nothing happens before they are used."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from flask import Flask

import sse_batcher
from sse_batcher import SSE, EventBatcher, SSEManager

from .kit.waiting import TIMEOUT, wait_until

MANY = 500
STEP = 100


def test_five_hundred_apps_leave_nothing_behind() -> None:
    _assert_nothing_is_left(_use_app)


def test_five_hundred_managers_dropped_without_shutdown_leave_nothing_behind() -> None:
    _assert_nothing_is_left(_use_manager)


def _use_app() -> None:
    app = Flask(__name__)
    sse = SSE(app)
    with app.test_client().get("/events") as response:
        assert next(response.iter_encoded()).startswith(b"event: sse_open\n")
        sse.enqueue("item", 1)
        assert sse.manager.flush_all(TIMEOUT)
        assert next(response.iter_encoded()).startswith(b"event: item\n")


def _use_manager() -> None:
    manager = SSEManager()
    client = manager.subscribe()
    manager.enqueue("item", 1)
    assert manager.flush_all(TIMEOUT)
    assert [next(client)[:10] for _ in range(2)] == [b"event: sse", b"event: ite"]
    manager.enqueue("item", 2)  # this one is still pending when the manager is dropped


def _assert_nothing_is_left(use: Callable[[], None]) -> None:
    before = _alive()
    sizes = []
    for count in range(1, MANY + 1):
        use()
        if count % 50 == 0:
            _collect()
        if count % STEP == 0:
            sizes.append(sys.getallocatedblocks())
    assert _alive() == before
    # The interpreter's own tables grow now and then, by some hundred blocks at once. What is left by each grows in all
    # steps.
    grown = [after - before for before, after in pairwise(sizes)]
    assert min(grown) < STEP / 2, f"{grown} blocks of memory more"


def _collect() -> None:
    """Collect what was dropped, and what its threads held until they ended."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("sse_batcher"):
            # Not one long `join`: without the GIL, the thread that has made an object also has to free it.
            wait_until(lambda thread=thread: not thread.is_alive(), f"{thread.name} ends")  # type: ignore[misc]
    gc.collect()


def _alive() -> int:
    _collect()
    return sum(type(thing) in {SSEManager, EventBatcher, Flask} for thing in gc.get_objects())


def test_an_import_starts_no_thread_and_does_not_import_flask() -> None:
    _run(
        """
        import sys, threading
        import sse_batcher
        assert not {"flask", "werkzeug", "redis"} & sys.modules.keys()
        assert threading.active_count() == 1
        """
    )


def test_constructors_start_no_thread() -> None:
    _run(
        """
        import threading
        from flask import Flask
        from sse_batcher import SSE, EventBatcher, SSEManager
        things = EventBatcher(print), SSEManager(), SSE(Flask("app"))
        assert threading.active_count() == 1
        things[1].enqueue("item", 1)
        assert threading.active_count() == 2
        """
    )


def _run(code: str) -> None:
    lines = "\n".join(line.strip() for line in code.splitlines())
    path = str(Path(sse_batcher.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", lines],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert result.returncode == 0, result.stderr
