"""What the beginning and the end of a process mean for us: a forked child starts afresh, and what is open is closed.

Any thread. Takes no lock, since one that was taken before a fork may be held for ever after it. The one exception is
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
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from ..errors import ConfigurationError

_log = logging.getLogger("sse_batcher.process")

T = TypeVar("T")


def require_threads() -> None:
    """Refuse a host that runs no threads of ours: uWSGI without them starts each, and never lets it go on."""
    uwsgi = sys.modules.get("uwsgi")
    options = getattr(uwsgi, "opt", None)
    if options is not None and not any(name in options for name in ("threads", "enable-threads")):
        raise ConfigurationError("uWSGI runs without threads: start it with --threads N, or with --enable-threads")


_WIPE_ON_FORK = 18  # Linux's MADV_WIPEONFORK, for which Python has no name


class _Pid:
    """This process's number, for which the system is asked once: asked twice an event, it took a tenth of `enqueue`.

    The kernel wipes `known` in a child that was forked, however it was. Where it does not, it is asked each time.
    """

    def __init__(self) -> None:
        self.known: mmap.mmap | bytes = bytes(1)
        self.value = 0
        if sys.platform == "linux":
            page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # before Linux 4.14
                page.madvise(_WIPE_ON_FORK)
                self.known = page

    def ask(self) -> int:
        self.value = os.getpid()
        if isinstance(self.known, mmap.mmap):
            self.known[0] = 1  # last: who finds it takes the value
        return self.value


_pid = _Pid()


class PerProcess(Generic[T]):
    """One `T` for each process that asks for it; a forked child leaves its parent's behind.

    Told by the pid and not by `os.register_at_fork`, because uWSGI forks without Python's hooks.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._by_pid: dict[int, T] = {}

    def get(self) -> T:
        """This process's. Of several threads that come first at once, all get the same."""
        pid = _pid.value if _pid.known[0] else _pid.ask()
        mine = self._by_pid.get(pid)
        if mine is None:
            mine = self._by_pid.setdefault(pid, self._make())  # atomic: one of them wins
            self._by_pid = {pid: mine}
        return mine

    def existing(self) -> T | None:
        """Return this process's `T`, if it has one already."""
        return self._by_pid.get(os.getpid())

    def inherited(self) -> T | None:
        """The one of the process that this one was forked from, as long as this one has none of its own."""
        pid = os.getpid()
        others = [thing for owner, thing in list(self._by_pid.items()) if owner != pid]
        return others[0] if others and pid not in self._by_pid else None

    def left_behind(self) -> list[T]:
        """Those of processes that this one was forked from; each once."""
        mine = {pid: thing for pid, thing in self._by_pid.items() if pid == os.getpid()}
        theirs = [thing for pid, thing in self._by_pid.items() if pid not in mine]
        self._by_pid = mine
        return theirs


EXIT_SECONDS = 5.0
"""How long closing everything may delay the end of a process, in seconds."""


class Closable(Protocol):
    def close(self, timeout: float | None) -> bool: ...


class _Open(dict[int, "weakref.ref[Closable]"]):
    """What is open in one process. By id, each removed when its object is collected.

    A dict, since its single steps are atomic: objects come and go in any thread while another one walks it.
    """

    job_end_registered = False
    """Whether `multiprocessing` calls us at the end of this process."""


_open = PerProcess(_Open)


def close_at_exit(closable: Closable) -> None:
    """Call `closable.close(timeout)` when this process ends, unless it is collected before.

    `atexit` does not run in a process that ends by `os._exit`. There, the finalizers of `multiprocessing` or a signal
    of Celery are used. Nothing is closed before any other `os._exit`.
    """
    mine = _open.get()
    key = id(closable)
    mine[key] = weakref.ref(closable, lambda _: mine.pop(key, None))
    _register_job_end()


@atexit.register
def _close_all(**_: Any) -> None:
    """Close what is open in this process. A second call finds only what was opened since the first."""
    mine = _open.get()
    end = time.monotonic() + EXIT_SECONDS
    in_time = True
    for key in list(mine):
        reference = mine.pop(key, None)
        closable = None if reference is None else reference()
        if closable is None:
            continue
        try:
            in_time &= closable.close(max(0.0, end - time.monotonic()))
        except Exception:
            _log.exception("closing %r at exit failed", closable)
    if not in_time:
        _log.warning(
            "not everything was delivered and closed within %g seconds at the end of this process: what was not "
            "delivered is lost",
            EXIT_SECONDS,
        )


# -- jobs: processes started by multiprocessing, or by billiard, which is Celery's copy of it --------------------------

LAST = -1_000
"""An exit priority after all others: the app's own finalizers may enqueue."""


def _register_job_end(_: object = None) -> None:
    """In a job, have `_close_all` called at its end. A child forgets what its parent has registered for this."""
    mine = _open.get()
    process: Any = sys.modules.get("multiprocessing.process")
    util: Any = sys.modules.get("multiprocessing.util")
    if mine.job_end_registered or process is None or util is None:
        return
    current = process.current_process()
    if getattr(current, "_parent_pid", None) is not None:
        mine.job_end_registered = True
        if util.is_exiting() and threading.current_thread() is not threading.main_thread():
            _close_after_threads()  # the caller goes on after the job; if it fails, events are delivered by callers
        else:
            util.Finalize(None, _end_job, exitpriority=LAST)
        celery: Any = sys.modules.get("celery.signals")
        if celery is not None:  # its pools run no finalizers
            celery.worker_process_shutdown.connect(_close_all)
    elif getattr(current, "_inheriting", False):
        # A new interpreter imports the main module before it becomes a job.
        util.register_after_fork(_open, _register_job_end)


def _end_job() -> None:
    # Up to Python 3.12, this comes before Python waits for the job's threads, which may still enqueue. billiard, which
    # sets no parent process, does not wait for them.
    waits = sys.modules["multiprocessing.process"].parent_process() is not None
    if not (waits and _other_threads() and _close_after_threads()):
        _close_all()


def _close_after_threads() -> bool:
    """Start a thread that closes all when the others have ended; Python waits for it, too. False if none can start."""

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
    """Those that Python waits for, but for the main thread and the caller's."""
    mine = (threading.main_thread(), threading.current_thread())
    return [thread for thread in threading.enumerate() if not thread.daemon and thread not in mine]
