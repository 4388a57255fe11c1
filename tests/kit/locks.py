"""The locks of the library: all that are made while a test records them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

from sse_batcher.runtime import locks


class Lock(type(threading.RLock())):  # type: ignore[misc]
    """A lock, with a function that is called once, before the next call of `release`. ``with`` does not call that."""

    before_release: Callable[[], object] | None = None

    def release(self) -> None:
        before, self.before_release = self.before_release, None
        if before:
            before()
        super().release()


class Locks:
    """Locks that were recorded."""

    def __init__(self) -> None:
        self.all: list[Lock] = []

    def make(self) -> Lock:
        self.all.append(Lock())
        return self.all[-1]

    @contextmanager
    def held(self, at_least: int) -> Iterator[None]:
        """Hold all of them, of which there must be so many."""
        assert len(self.all) >= at_least
        with ExitStack() as stack:
            for lock in self.all:
                stack.enter_context(lock)
            yield


@contextmanager
def recorded() -> Iterator[Locks]:
    """Record each lock of the library that is made within the block."""
    made = Locks()
    with patch.object(locks, "threading", SimpleNamespace(RLock=made.make)):
        yield made
