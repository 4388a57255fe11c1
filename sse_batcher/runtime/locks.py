"""Locks that are always released, even if a signal handler raises an exception at any moment.

A signal handler may raise after any call in the main thread. If it raises between `lock.acquire()` and the ``try`` that
follows, nothing releases the lock. So take a lock by ``with lock:`` or by `run_if_free`, and never through a context
manager that is written in Python, such as `threading.Condition`: its `__exit__` may be interrupted before the release.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


def new_lock() -> threading.RLock:
    """Return a new re-entrant lock for ``with``."""
    # Not a class of this module: gevent may patch `threading` after the import.
    lock = threading.RLock()
    return _GuardedLock() if _WITH_HAS_A_GAP and type(lock) is _RLock else lock


def is_mine(lock: threading.RLock) -> bool:
    """Return whether the calling thread holds this lock."""
    # Not public, but `threading.Condition` calls it on every lock, too.
    return bool(lock._is_owned())  # type: ignore[attr-defined]


def run_if_free(lock: threading.RLock, function: Callable[[], object], timeout: float = 0.0) -> bool:
    """Call the function with the lock held. Return whether it was called.

    It is not called if the calling thread holds the lock already, or if another thread holds it for longer than
    `timeout` seconds.
    """
    if is_mine(lock):
        return False
    try:
        # Inside the `try`, so that the lock is released if a handler raises as soon as it is held.
        if not lock.acquire(timeout=timeout):
            return False
        function()
    finally:
        # This must come first and call a function written in C, so that no handler can raise before the release.
        try:  # noqa: SIM105
            lock.release()
        except RuntimeError:  # the lock was not taken
            pass
    return True


# CPython 3.14 runs signal handlers between the lock's own `__enter__` and the block, where nothing releases the lock.
# Of 31,000 handlers that raised in a loop of `with lock: pass`, 18,000 left it held; none did in 3.11 to 3.13. None was
# seen in 3.15 either, but `__enter__` is still a call there, and handlers run after calls.
_WITH_HAS_A_GAP = sys.version_info >= (3, 14)
_RLock = type(threading.RLock())


class _GuardedLock(_RLock):  # type: ignore[valid-type, misc]
    """Is released if something is raised before the block begins. The inherited `__exit__` has no such gap."""

    def __enter__(self) -> bool:
        try:
            return bool(self.acquire())
        except BaseException:
            try:  # noqa: SIM105
                self.release()
            except RuntimeError:  # it was raised before the lock was taken
                pass
            raise
