"""The demo's hub: plays scenarios to all clients, each with the batching that it asked for.

Any thread. `_lock` guards the managers.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
import weakref
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import ClosedError
from ..manager import SSEManager
from ..options import BatchOptions
from ..runtime.worker import Deadline
from .scenarios import Happening, Scenario

CLOSING_SECONDS = 5.0
"""How long all streams have to end. On a busy machine, a thread may wait a second for its turn."""


class Setting(NamedTuple):
    """How a client wants its events: `window` in milliseconds, `size` in events. A size of 1 is no batching."""

    window: int
    size: int


class Demo:
    """A simulated hub. There is one manager for each setting in use, and all get the same events. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weakly: a manager lives as long as one of its streams.
        self._managers: weakref.WeakValueDictionary[Setting, SSEManager] = weakref.WeakValueDictionary()
        self._numbers = itertools.count(1)
        self._ending = threading.Event()

    def manager(self, setting: Setting) -> SSEManager:
        """Return the manager for this setting, and make it if there is none. Its streams have to keep it alive."""
        with self._lock:
            manager = self._managers.get(setting)
            if manager is None:
                options = BatchOptions(
                    batch_window=setting.window / 1000, max_batch_size=setting.size, dedup_key="server"
                )
                manager = self._managers[setting] = SSEManager(batching=options)
        if self._ending.is_set():
            manager.shutdown(0)
        return manager

    def play(self, scenario: Scenario) -> None:
        """Play a scenario, at its own pace. Raises `ClosedError` if the demo ends before it."""
        self.send(scenario.happen(random.Random()))

    def send(self, events: Iterable[Happening]) -> None:
        """Send these events, each at its time and with a number, by which two streams can be compared."""
        began = time.monotonic()
        for at, event_type, data in events:
            if self._ending.wait(max(0.0, began + at - time.monotonic())):
                raise ClosedError("the demo is ending")
            numbered = data | {"n": next(self._numbers)}
            for manager in self._current():
                manager.enqueue(event_type, numbered)

    def close(self) -> None:
        """End all streams in good order. Takes at most about `CLOSING_SECONDS`."""
        self._ending.set()
        deadline = Deadline(CLOSING_SECONDS)
        for manager in self._current():
            manager.shutdown(deadline.left())

    def _current(self) -> list[SSEManager]:
        with self._lock:
            return list(self._managers.values())
