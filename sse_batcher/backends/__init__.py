"""Backends: who gives a batch its position, and brings it to the hub.

`open_backend` makes the one that a URL names.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..errors import ConfigurationError
from ..event import Batch
from ..history import Cursor
from ..hub import Receiver
from .memory import MemoryBackend


class Backend(Protocol):
    """Orders batches and delivers them as frames.

    Also the `Cursors` of its history: the position is made and compared here alone.
    """

    start: Any

    def connect(self, receiver: Receiver) -> None:
        """Say who gets the frames. They are delivered in the order of their positions, by one thread at a time."""

    def publish(self, batch: Batch) -> None:
        """Take a batch. May block. Called by one thread at a time. Where it is lost, tells the receiver and raises."""

    def format(self, position: Any) -> str: ...

    def read(self, cursor: str) -> Cursor: ...

    def normalize(self, cursor: str) -> str | None: ...


def open_backend(url: str) -> Backend:
    """The backend that `url` names. ``memory://``: this process alone."""
    if url != "memory://":
        raise ConfigurationError(f"backend must be 'memory://', not {url!r}", option="backend")
    return MemoryBackend()
