"""Roles: what the hub, the backend that delivers to it, and those that it tells of frames need of each other."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from ..reasons import ByeReason, GapReason
from ..wire import Frame, Position
from .client import Counts
from .history import ResumePoint, Slice


class Cursors(Protocol):
    """What a backend says about positions. They rise in the order of delivery, and only the backend looks inside."""

    start: Position
    """The position before the first frame."""

    def format(self, position: Position) -> str:
        """The id that stands for a position."""

    def parse(self, cursor: str) -> ResumePoint:
        """What a client's cursor says. It comes from outside, and may be anything."""

    def replay(self, channels: Iterable[str], point: ResumePoint) -> Slice | None:
        """The next frames after a cursor of this history, where the hub's own has let them go. None: they are gone.

        May wait a little. Raises `BackendError` where that cannot be said.
        """

    def now(self) -> float:
        """The time by the clock that gives frames their time, in milliseconds since 1970."""

    def normalize(self, cursor: str) -> str | None:
        """A well-formed cursor, of this history or another, made anew from its parts. None for anything else."""


class Receiver(Protocol):
    """Who gets what a backend has ordered. Called by one thread at a time, in the order of the positions."""

    def deliver(self, frame: Frame) -> None:
        """Take a frame."""

    def lose(self, channel: str, position: Position, reason: GapReason = "publish_failed") -> None:
        """Take notice that the frame at this position, of this channel, will never come. `reason`: of the gap."""

    def dismiss(self, reason: ByeReason, user: str | int | None = None, channel: str | None = None) -> object:
        """End the streams of this user, or of this channel, or of this user in this channel, now."""


class Listener(Protocol):
    """Who is told of each frame of the channels that it is listed for. Compared by identity."""

    @property
    def counts(self) -> Counts:
        """What its streams were handed."""

    def offer(self, frame: Frame) -> None:
        """A frame was delivered. Must not wait. By one thread at a time."""

    def lose(self, channel: str, position: Position, reason: GapReason) -> None:
        """The frame at this position, of this channel, was lost before it came. Under the hub's lock."""

    def fall_behind(self) -> None:
        """Called after `lose`, by that same thread, without the lock."""

    def end(self, reason: ByeReason) -> None:
        """Let its streams end with ``sse_bye`` after all that was delivered. Any thread."""


class Feed(Listener, Protocol):
    """A listener that reads the history for all of its members at once."""

    position: Position
    """All frames up to it, of its channels, were read; by its one thread."""

    @property
    def channels(self) -> Collection[str]:
        """What any of its members asks for, and ``*``."""
