"""Backends: who gives a batch its position, and brings it to the hub.

`open_backend` makes the one that a URL names.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..errors import ConfigurationError
from ..event import Batch
from ..streams.roles import Cursors, Receiver
from .memory import MemoryBackend
from .redis import open_redis

SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://")


class Backend(Cursors, Protocol):
    """Orders batches and delivers them as frames.

    Also the `Cursors` of its history: positions are made here alone.
    """

    def connect(self, receiver: Receiver) -> None:
        """Say who gets the frames. They are delivered in the order of their positions, by one thread at a time."""

    def publish(self, batch: Batch) -> None:
        """Take a batch. May block. Called by one thread at a time. Where it is lost, tells the receiver and raises."""

    def kick(self, user: str | int | None, channel: str | None) -> None:
        """Have these streams ended, in each process. Raises `BackendError`."""

    def is_known(self) -> bool:
        """Whether it is known here where the history stands. Begins to find out; never waits."""

    def open(self, cursor: str | None) -> None:
        """Have the history here, up to where this client has been. May wait a little; raises `BackendError`."""

    def wait_until_delivered(self, timeout: float | None) -> bool:
        """Wait until what this process has published was delivered to its own clients, too."""

    def close(self, timeout: float | None) -> bool:
        """Publish and deliver no more. True if that has ended within `timeout` seconds."""

    @property
    def silent_for(self) -> float:
        """Seconds for which it owes an answer, to anybody here who waits for one."""

    @property
    def answered_ago(self) -> float:
        """Seconds since it has answered, or, where it never has, since it was first asked; 0 where it never was."""

    @property
    def ignored(self) -> int:
        """Entries that were met and ignored: those of others, and those that cannot be read."""


def open_backend(backend: Any, frames: int) -> Backend:
    """The backend that a URL names, or that a ready ``redis.Redis`` leads to. `frames`: how many are kept.

    ``memory://``: this process alone. For those of Redis see `open_redis`. Connects to nothing.
    """
    if backend == "memory://":
        return MemoryBackend()
    if isinstance(backend, str) and not backend.startswith(SCHEMES):
        raise ConfigurationError(
            f"backend must be 'memory://', or begin with one of {', '.join(SCHEMES)}, not {backend!r}", option="backend"
        )
    if not isinstance(backend, str) and not hasattr(backend, "xadd"):  # looked at before the package is needed
        raise ConfigurationError(f"backend must be a URL or a redis.Redis, not {backend!r}", option="backend")
    return open_redis(backend, frames)
