"""What the beginning and the end of a process mean for us: a forked child starts afresh, and what is open is closed.

Any thread. Takes no lock, since one that was taken before a fork may be held for ever after it.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from .errors import ConfigurationError

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

    def left_behind(self) -> list[T]:
        """Those of processes that this one was forked from; each once."""
        mine = {pid: thing for pid, thing in self._by_pid.items() if pid == os.getpid()}
        theirs = [thing for pid, thing in self._by_pid.items() if pid not in mine]
        self._by_pid = mine
        return theirs


class Closable(Protocol):
    def close(self) -> Any: ...


# By id, each removed when its object is collected. A plain dict, since its single steps are atomic: objects come and
# go in any thread while another one walks it.
_open: dict[int, weakref.ref[Closable]] = {}


def close_at_exit(closable: Closable) -> None:
    """Call `closable.close()` when the interpreter ends, unless it is collected before."""
    key = id(closable)
    _open[key] = weakref.ref(closable, lambda _: _open.pop(key, None))


@atexit.register
def _close_all() -> None:
    for reference in list(_open.values()):
        closable = reference()
        if closable is not None:
            try:
                closable.close()
            except Exception:
                _log.exception("closing %r at exit failed", closable)
