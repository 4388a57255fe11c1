"""`WeakRegistry`: the objects of one kind that exist, without keeping them alive.

Any thread. Takes no lock: single steps of the dictionary are atomic.
"""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

T = TypeVar("T")


class WeakRegistry(Generic[T]):
    """A set of objects by identity. An object is removed when it is garbage-collected.

    Not a `weakref.WeakSet`: that compares objects by `==`, and its iteration fails if another thread adds one.
    """

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[T]] = {}  # by `id`

    def add(self, thing: T) -> None:
        """Add an object. A second call for the same object changes nothing."""
        references, key = self._references, id(thing)
        references[key] = weakref.ref(thing, lambda _: references.pop(key, None))

    def remove(self, thing: T) -> bool:
        """Remove an object. Return whether it was there: of several threads that remove it, one gets True."""
        return self._references.pop(id(thing), None) is not None

    def all(self) -> list[T]:
        """Return the objects, in the order in which they were added."""
        found = [reference() for reference in list(self._references.values())]
        return [thing for thing in found if thing is not None]
