"""An open stream, as the hub knows it: its channels and user, how far it has got, and what it was handed.

There are two kinds: `client.QueueClient`, which a thread iterates, and `SocketClient` of the detached transport, which
writes to a socket of ours.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ..event import Audience
from ..reasons import ByeReason, EndReason, GapReason
from ..wire import Frame, Position
from .counts import Counts
from .history import ResumePoint


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What is known about a client, as a plain value."""

    id: int
    """Counts the clients of a process, from 1."""
    channels: tuple[str, ...]
    """The channels that it was granted."""
    user: str | int | None = None
    """The user of the stream; None if it belongs to no user."""
    connected_at: float = field(default_factory=time.time)
    """When its stream was opened, in seconds since 1970."""
    address: str | None = None
    """Where the request came from: its ``REMOTE_ADDR``. None if that is not known."""


class OpenStream(ABC):
    """One open stream. Compared by identity."""

    __slots__ = ("__weakref__", "farewell", "info", "lease", "opened_at", "point", "poll")

    transport: Literal["attached", "detached"]
    """Whether a thread iterates it, or our loop writes to its socket."""
    driver: int | None = None
    """The thread that hands blocks to it; None before the first one."""

    def __init__(
        self, info: ClientInfo, point: ResumePoint, opened_at: float, lease: float, *, poll: bool = False
    ) -> None:
        self.info = info
        self.point = point
        """All frames up to it were handed to the stream. Written by the driver; under the hub's lock by `Hub.skip`,
        which the driver calls."""
        self.opened_at = opened_at
        """When it was opened, by the hub's clock."""
        self.lease = lease
        """When it has to end, by the hub's clock."""
        self.farewell: EndReason | None = None
        """Why it ends; None before its last block was handed out. Written by the driver."""
        self.poll = poll
        """Whether the client polls: the stream ends as soon as it has handed out something, and without ``sse_bye``."""

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that it was granted. It also gets the frames of ``*``, as every stream does."""
        return self.info.channels

    @property
    @abstractmethod
    def counts(self) -> Counts:
        """The counters of what is handed to it."""

    @property
    @abstractmethod
    def behind(self) -> bool:
        """Whether it reads the history at this moment, instead of getting each frame as it is delivered."""

    @property
    @abstractmethod
    def is_waiting(self) -> bool:
        """Whether frames may have been delivered for it that it was not handed. Read by any thread, for counters."""

    @property
    @abstractmethod
    def lost(self) -> tuple[Position, GapReason] | None:
        """The position of the newest frame that was lost before delivery, and why. Needs the hub's lock."""

    @property
    @abstractmethod
    def handed(self) -> tuple[int, int]:
        """The frames and bytes that were handed to it."""

    @abstractmethod
    def dismiss(self, reason: ByeReason) -> bool:
        """Let the stream end with ``sse_bye`` now: nothing that waits for it is handed out. Thread-safe.

        Return False, and change nothing, if it was dismissed before.
        """

    @abstractmethod
    def offer(self, frame: Frame) -> None:
        """Take a frame for its user, or of a channel that no feed reads for it. As `Reader.offer`."""

    @abstractmethod
    def lose(self, audience: Audience, position: Position, reason: GapReason) -> None:
        """Note that such a frame was lost before delivery. As `Reader.lose`."""

    @abstractmethod
    def fall_behind(self) -> None:
        """Read what comes after `point` from the history. Called by the driver or the delivering thread."""

    @abstractmethod
    def read_on(self, frames: Iterable[Frame]) -> None:
        """Take the next slice of the history. Called by the hub, under its lock."""

    @abstractmethod
    def go_live(self) -> None:
        """Take all frames that are delivered from now on: the history has nothing after `point`.

        Called by the hub, under its lock.
        """
