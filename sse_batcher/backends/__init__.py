"""Backends: they give each batch its position, and deliver it to the hub of each process.

`open_backend` makes the backend for a URL. See "The way of an event" in docs/explanation/architecture.md.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..errors import ConfigurationError
from ..event import Batch, User
from ..streams.roles import Cursors, Receiver
from .memory import MemoryBackend
from .redis import open_redis
from .redis.connections import not_a_backend, without_secrets

SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://")


class Backend(Cursors, Protocol):
    """Orders batches and delivers them as frames.

    It is also the `Cursors` of its history, since only the backend makes positions.
    """

    def connect(self, receiver: Receiver) -> None:
        """Set the receiver of the frames. They are delivered in the order of positions, by one thread at a time."""

    def publish(self, batch: Batch) -> None:
        """Take a batch. May block. Called by one thread at a time.

        If the batch is lost, calls the receiver's `lose` and raises.
        """

    def kick(self, user: str | int | None, channel: str | None) -> None:
        """End the streams of this user, or of this channel, in all processes. Raises `BackendError`.

        If there is a user, the tokens of this user that were made before are refused.
        """

    def stamp(self) -> int:
        """Return the time for a token that is made or checked now, in microseconds since 1970.

        Later than all that this process has returned, and than all its kicks. May wait until the clock is known.
        """

    def remember_kicks(self) -> None:
        """Call before a token is made for a user, since kicks of the user must be remembered. Raises `BackendError`."""

    def kicked_until(self, user: User) -> int:
        """Return the stamp up to which tokens of this user are refused. May wait. Raises `BackendError`."""

    @property
    def is_known(self) -> bool:
        """Whether the newest position is known here. Starts nothing, and never waits."""

    def find_position(self) -> bool:
        """Return whether the newest position is known here. If not, start to find it; never waits."""

    def open(self, cursor: str | None) -> None:
        """Wait until the history is here, up to this client's cursor: a few seconds at most. Raises `BackendError`."""

    def wait_until_delivered(self, timeout: float | None) -> bool:
        """Wait until what this process has published was delivered to its own clients. Return whether it was.

        `timeout` is in seconds; None: no limit.
        """

    def close(self, timeout: float | None) -> bool:
        """Stop to publish and to deliver. Return whether that was done within `timeout` seconds."""

    @property
    def silent_for(self) -> float:
        """For how many seconds it has not answered; 0 if no answer is due."""

    @property
    def answered_ago(self) -> float:
        """Seconds since its last answer; if there was none, since the first call; 0 if there was no call."""

    @property
    def unread(self) -> int:
        """How many batches of this process were published, and have not come back to it yet."""

    @property
    def processes(self) -> int | None:
        """How many processes have this history; None if that is not known."""

    @property
    def ignored(self) -> int:
        """How many entries were ignored: those of other programs, and those that cannot be read."""


def open_backend(backend: Any, frames: int) -> Backend:
    """Return the backend for a URL or for a ready ``redis.Redis``. Connects to nothing.

    ``memory://`` is for one process. For the URLs of Redis see `open_redis`. `frames` is how many frames Redis keeps.
    Raises `ConfigurationError`.
    """
    if backend == "memory://":
        return MemoryBackend()
    if isinstance(backend, str) and not backend.startswith(SCHEMES):
        raise ConfigurationError(
            f"backend must be 'memory://', or begin with one of {', '.join(SCHEMES)}, not {without_secrets(backend)!r}",
            option="backend",
        )
    if not isinstance(backend, str) and not hasattr(backend, "xadd"):  # checked without the package redis
        raise not_a_backend(backend)
    return open_redis(backend, frames)
