"""Which `ProcessState` a manager has in this process, and what makes it.

Any thread. A process makes it at the first use of the manager; in a test, a stand-in may make it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .process_state import Parts, ProcessState, Settings
from .runtime.process import close_at_exit, require_threads

if TYPE_CHECKING:
    from .manager import SSEManager
    from .streams.revalidation import Ask


def process_of(manager: SSEManager) -> ProcessState:
    """This process's part of a manager, for transports, `wsgi` and the Flask part."""
    return manager._process.get()


def existing_process_of(manager: SSEManager) -> ProcessState | None:
    """The same, None if the manager was not used in this process."""
    return manager._process.existing()


class StandIn(Protocol):
    """What makes the process states of managers in a test."""

    def reaches(self, manager: SSEManager) -> bool:
        """Return whether the states of this manager are made by it."""

    def make_state(self, manager: SSEManager, make: Callable[[Parts], ProcessState]) -> ProcessState:
        """Make the state of this manager, at its first use."""


stand_ins: list[StandIn] = []
"""For the testing kit; empty in production. The first one that reaches a manager counts."""


def swap_state(manager: SSEManager, state: ProcessState | None) -> ProcessState | None:
    """Put another state in the place of this process's part of a manager, for the testing kit.

    None: it is made at the next use, by a stand-in if there is one. Returns the state before, None if there was none.
    """
    return manager._process.swap(state)


def new_process(reference: weakref.ref[SSEManager], settings: Settings) -> ProcessState:
    """Make this process's part of a manager, at its first use; the manager's `PerProcess` calls this."""
    require_threads()
    manager, parent = reference(), None
    if manager is not None:  # it is None if the garbage collector has begun to collect the manager
        close_at_exit(manager)  # again: the manager may have been made in another process, before a fork
        parent = manager._process.inherited()
    find_revalidate = functools.partial(_revalidate_of, reference)
    make = functools.partial(ProcessState, settings, sender=reference, find_revalidate=find_revalidate, parent=parent)
    for stand_in in stand_ins:
        if manager is not None and stand_in.reaches(manager):
            return stand_in.make_state(manager, lambda parts: make(parts=parts))
    return make()


def _revalidate_of(reference: weakref.ref[SSEManager]) -> Ask | None:
    manager = reference()
    return None if manager is None else manager.revalidate
