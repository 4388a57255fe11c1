"""Together: requests at the same time.

Threads of its own, which end with the functions that they call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

LOOK_SECONDS = 0.5


def call_together(functions: Iterable[Callable[[], T]], at_once: int) -> list[T]:
    """Call functions at the same time, up to `at_once` of them. Returns what they return, in their order.

    Ctrl-C ends it at once, also while a server lets them wait: a `ThreadPoolExecutor` waits for all its threads then,
    and once more when the program ends. Raises the first error of a function.
    """
    calls: deque[tuple[Future[T], Callable[[], T]]] = deque((Future(), function) for function in functions)
    futures = [future for future, _ in calls]

    def work() -> None:
        while True:
            try:
                future, function = calls.popleft()
            except IndexError:
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    try:
        for _ in range(min(at_once, len(calls))):
            threading.Thread(target=work, name="sse_batcher doctor", daemon=True).start()
        while wait(futures, LOOK_SECONDS).not_done:  # Windows does not interrupt a wait without a limit
            pass
    finally:
        calls.clear()
    return [future.result() for future in futures]
