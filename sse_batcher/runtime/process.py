"""The beginning and the end of a process: each forked child has its own objects, and what is open is closed at the end.

Thread-safe. Takes no lock, since a lock that was held during a fork is held forever in the child. The one exception is
the end of a child of `multiprocessing`: listing its threads takes a lock, which Python replaces in a child.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from ..errors import ConfigurationError
from .log_fields import log_fields
from .weak_registry import WeakRegistry

_log = logging.getLogger("sse_batcher.process")

T = TypeVar("T")


def require_threads() -> None:
    """Raise `ConfigurationError` under uWSGI without threads, which starts threads and then never runs them."""
    uwsgi = sys.modules.get("uwsgi")
    options = getattr(uwsgi, "opt", None)
    if options is not None and not any(name in options for name in ("threads", "enable-threads")):
        raise ConfigurationError("uWSGI runs without threads: start it with --threads N, or with --enable-threads")


_MADV_WIPEONFORK = 18  # of Linux; the module mmap does not define it


class ProcessId:
    """The process id, which is read from the system only once: two system calls took a tenth of the time of `enqueue`.

    The kernel sets `known` to zero in a forked child, however it was forked. If the kernel cannot do that, `ask` is
    called each time.
    """

    def __init__(self) -> None:
        self.known: mmap.mmap | bytes = bytes(1)
        self.value = 0
        if sys.platform == "linux":
            page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # before Linux 4.14
                page.madvise(_MADV_WIPEONFORK)
                self.known = page

    def ask(self) -> int:
        """Ask the system, and note the answer in `value`."""
        self.value = os.getpid()
        if isinstance(self.known, mmap.mmap):
            self.known[0] = 1  # last: a thread that finds it set uses the value
        return self.value


process_id = ProcessId()
"""The id of this process."""


class PerProcess(Generic[T]):
    """One `T` for each process that uses it. A forked child makes its own.

    A fork is recognised by the process id and not by `os.register_at_fork`, because uWSGI forks without Python's hooks.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._by_pid: dict[int, T] = {}

    def get(self) -> T:
        """Return this process's `T`. Threads that make it at the same time all get the same one."""
        pid = process_id.value if process_id.known[0] else process_id.ask()
        mine = self._by_pid.get(pid)
        if mine is None:
            mine = self._by_pid.setdefault(pid, self._make())  # atomic: one of them wins
            self._by_pid = {pid: mine}
        return mine

    def swap(self, thing: T | None) -> T | None:
        """Put another `T` in the place of this process's; None: it is made at the next use. Return the one before."""
        pid = os.getpid()
        before = self._by_pid.get(pid)
        self._by_pid = {} if thing is None else {pid: thing}
        return before

    def existing(self) -> T | None:
        """Return this process's `T`, if it has one already."""
        return self._by_pid.get(os.getpid())

    def inherited(self) -> T | None:
        """Return the parent process's `T`, as long as this process has not made its own."""
        pid = os.getpid()
        others = [thing for owner, thing in list(self._by_pid.items()) if owner != pid]
        return others[0] if others and pid not in self._by_pid else None

    def left_behind(self) -> list[T]:
        """Return the `T` of each process that this one descends from, and forget them."""
        mine = {pid: thing for pid, thing in self._by_pid.items() if pid == os.getpid()}
        theirs = [thing for pid, thing in self._by_pid.items() if pid not in mine]
        self._by_pid = mine
        return theirs


_began = PerProcess(time.time)
_began.get()


def process_began() -> float:
    """Return when this process began to use this library, in seconds since 1970. In a forked child: the first call."""
    return _began.get()


EXIT_SECONDS = 5.0
"""How long closing everything may delay the end of a process, in seconds."""


class Closable(Protocol):
    """An object that `close_at_exit` can close."""

    def close(self, timeout: float | None) -> bool: ...


class OpenObjects(WeakRegistry[Closable]):
    """The open objects of one process.

    `clock` returns monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.job_end_registered = False
        """Whether `_register_job_end` has done its work in this process."""
        self._clock = clock

    def close_all(self) -> None:
        """Close all objects, within `EXIT_SECONDS` together. A second call closes what was opened since the first."""
        end = self._clock() + EXIT_SECONDS
        in_time = True
        for closable in self.all():
            if not self.remove(closable):
                continue  # another thread closes it
            try:
                in_time &= closable.close(max(0.0, end - self._clock()))
            except Exception:
                _log.exception(
                    "closing %r at exit failed", closable, extra=log_fields("close_failed", object=repr(closable))
                )
        if not in_time:
            _log.warning(
                "not everything was delivered and closed within %g seconds at the end of this process: events that "
                "were not delivered are lost",
                EXIT_SECONDS,
                extra=log_fields("exit_incomplete", seconds=EXIT_SECONDS),
            )


_open = PerProcess(OpenObjects)


def close_at_exit(closable: Closable) -> None:
    """Call `closable.close(timeout)` when this process ends, unless it is garbage-collected before.

    `atexit` does not run in a process that ends by `os._exit`. For jobs of `multiprocessing` and Celery, their own
    finalizers or signals are used instead. Before any other `os._exit`, nothing is closed.
    """
    _open.get().add(closable)
    _register_job_end()


def open_objects() -> list[Closable]:
    """Return the objects of this process for which `close_at_exit` was called, and that are not garbage-collected."""
    return _open.get().all()


@atexit.register
def _close_all(**_: Any) -> None:
    """Close everything that is open in this process."""
    _open.get().close_all()


# -- jobs: processes started by multiprocessing, or by billiard, which is Celery's copy of it --------------------------

LAST_EXIT_PRIORITY = -1_000
"""Lower than all others, so that it comes last: the app's own finalizers may enqueue."""


def _register_job_end(_: object = None) -> None:
    """In a job, arrange that `_close_all` is called at its end. A child does not inherit what its parent registered."""
    mine = _open.get()
    process: Any = sys.modules.get("multiprocessing.process")
    util: Any = sys.modules.get("multiprocessing.util")
    if mine.job_end_registered or process is None or util is None:
        return
    current = process.current_process()
    if getattr(current, "_parent_pid", None) is not None:
        mine.job_end_registered = True
        if util.is_exiting() and threading.current_thread() is not threading.main_thread():
            # The calling thread goes on after the job. If no thread can be started, callers deliver their events.
            _close_after_threads()
        else:
            util.Finalize(None, _end_job, exitpriority=LAST_EXIT_PRIORITY)
        celery: Any = sys.modules.get("celery.signals")
        if celery is not None:  # Celery's pools run no finalizers
            celery.worker_process_shutdown.connect(_close_all)
    elif getattr(current, "_inheriting", False):
        # A new interpreter, which imports the main module before it becomes a job.
        util.register_after_fork(_open, _register_job_end)


def _end_job() -> None:
    # Up to Python 3.12, this runs before Python waits for the job's threads, which may still enqueue. billiard does not
    # wait for them, and sets no parent process.
    waits = sys.modules["multiprocessing.process"].parent_process() is not None
    if not (waits and _other_threads() and _close_after_threads()):
        _close_all()


def _close_after_threads() -> bool:
    """Start a thread that calls `_close_all` when all others have ended. Python waits for it, too.

    Returns False if no thread can be started.
    """

    def close() -> None:
        while threads := _other_threads():
            threads[0].join()
        _close_all()

    try:
        threading.Thread(target=close, name="sse_batcher-end", daemon=False).start()
    except RuntimeError:
        return False
    return True


def _other_threads() -> list[threading.Thread]:
    """Return the threads that Python waits for, without the main thread and the calling one."""
    mine = (threading.main_thread(), threading.current_thread())
    return [thread for thread in threading.enumerate() if not thread.daemon and thread not in mine]
