"""`Index`: the values of each key, such as the streams of each user, in little memory.

Most users have one stream, and a channel of one's own has one reader. A dict for each of them would take 224 bytes.

Not thread-safe; the owner's lock guards it. Each change is one step, so that a signal handler may interrupt each
method, which can then be called again with the same arguments. `count`, ``in`` and `bool` may be called without the
lock: they were true a moment ago.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

FEW = 4
"""How many values a key may have before it gets a dict, from which one can be removed without a look at the others."""


class Index(Generic[K, V]):
    """The values of each key, in the order in which they were added. Keys without values do not exist."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: dict[K, tuple[V, ...] | dict[V, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[K]:
        return iter(self._values)

    def of(self, key: K) -> Collection[V]:
        """Return the values of this key: do not change them, and do not keep them."""
        return self._values.get(key, ())

    def count(self, key: K) -> int:
        """Return how many values this key has."""
        return len(self._values.get(key, ()))

    def add(self, key: K, value: V) -> None:
        """Add a value to a key. Nothing changes if it has it already."""
        values = self._values.get(key, ())
        if isinstance(values, dict):
            values[value] = None
        elif value not in values:
            values = (*values, value)
            self._values[key] = values if len(values) <= FEW else dict.fromkeys(values)

    def discard(self, key: K, value: V) -> None:
        """Remove a value from a key, if it is there."""
        values = self._values.get(key, ())
        if value not in values:
            return
        if len(values) == 1:
            del self._values[key]
        elif isinstance(values, dict):
            del values[value]
        else:
            self._values[key] = tuple(other for other in values if other != value)
