"""Locks that are released whatever is raised, at whatever instant.

A signal handler may raise after any call in the main thread. If it raises between `lock.acquire()` and the ``try`` that
follows, nothing releases the lock. So it is taken by ``with lock:`` or by `run_if_free`, and never through a context
manager that is written in Python, as `threading.Condition` is: its `__exit__` may be interrupted at once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


def new_lock() -> threading.RLock:
    """A re-entrant lock for ``with``, made at the call, since gevent may patch `threading` after we are imported."""
    lock = threading.RLock()
    return _GuardedLock() if _WITH_HAS_A_GAP and type(lock) is _RLock else lock


def is_mine(lock: threading.RLock) -> bool:
    """Whether the calling thread holds this lock. Not public, but what `threading.Condition` asks of every lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]


def run_if_free(lock: threading.RLock, function: Callable[[], object], timeout: float = 0.0) -> bool:
    """Call the function with the lock held, unless another thread holds it, or a frame below on this one.

    Waits for another thread for up to `timeout` seconds. Returns whether the function was called.
    """
    if is_mine(lock):
        return False
    try:
        # Inside the `try`: it is also released if something is raised as soon as it is held.
        if not lock.acquire(timeout=timeout):
            return False
        function()
    finally:
        # The first thing here, in C and not by a function of ours: nothing can be raised before it is done.
        try:  # noqa: SIM105
            lock.release()
        except RuntimeError:  # it was not ours
            pass
    return True


# CPython 3.14 runs signal handlers between the lock's own `__enter__` and the block, where nothing releases it. Of
# 31,000 handlers that raised in a loop of `with lock: pass`, 18,000 left it held; none in 3.11 to 3.13. None was seen
# in 3.15 either, but there it is still a call, and handlers run after calls.
_WITH_HAS_A_GAP = sys.version_info >= (3, 14)
_RLock = type(threading.RLock())


class _GuardedLock(_RLock):  # type: ignore[valid-type, misc]
    """Released if something is raised before the block begins. The exit is the lock's own, which has no such gap."""

    def __enter__(self) -> bool:
        try:
            return bool(self.acquire())
        except BaseException:
            try:  # noqa: SIM105
                self.release()
            except RuntimeError:  # it was raised before the lock was ours
                pass
            raise
