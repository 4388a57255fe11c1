"""Calls in other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .waiting import TIMEOUT


def start_in_thread(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Call a function in a new thread. The result is a function that waits for what the first one returns or raises."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "the other thread does not come back"
        return outcome.result(0)

    return result


def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new thread, and return or raise what it does. Fails if it does not come back."""
    return start_in_thread(function, *args)()
