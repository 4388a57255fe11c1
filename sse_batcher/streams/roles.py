"""Roles: what the hub needs of a backend and of its listeners, and what a backend needs of the hub."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..event import Audience, User
from ..reasons import ByeReason, GapReason
from ..wire import Frame, Position
from .counts import Counts
from .history import ResumePoint, Slice


class Cursors(Protocol):
    """What a backend knows about positions. They rise in the order of delivery, and only the backend looks inside."""

    start: Position
    """The position before the first frame."""

    def format(self, position: Position) -> str:
        """Return the cursor that stands for a position."""

    def parse(self, cursor: str) -> ResumePoint:
        """Read a client's cursor. It comes from outside, and may be any text."""

    def replay(self, channels: Iterable[str], point: ResumePoint, user: User | None) -> Slice | None:
        """Return the next frames after a point that is too old for the hub's history. None: they are gone.

        May wait a little. Raises `BackendError` if the backend does not answer.
        """

    def now(self) -> float:
        """Return the time by the clock that gives frames their `time`, in milliseconds since 1970."""

    def normalize(self, cursor: str) -> str | None:
        """Return a well-formed cursor, of this history or another, rebuilt from its parts. None for any other text."""


class Receiver(Protocol):
    """What a backend delivers to. Called by one thread at a time, in the order of the positions."""

    def deliver(self, frame: Frame) -> None:
        """Take a frame."""

    def lose(self, audience: Audience, position: Position, reason: GapReason = "publish_failed") -> None:
        """Note that the frame for this audience at this position will never come, and why."""

    def dismiss(self, reason: ByeReason, user: User | None = None, channel: str | None = None) -> object:
        """End the streams of this user, or of this channel, or of this user in this channel, now."""


class Reader(Protocol):
    """What the hub offers frames of some channels or of a user: a stream, or the feed of many streams.

    Compared by identity.
    """

    @property
    def counts(self) -> Counts:
        """What its streams were handed."""

    def offer(self, frame: Frame) -> None:
        """Take a frame that was delivered. Must not wait. Called by one thread at a time."""

    def lose(self, audience: Audience, position: Position, reason: GapReason) -> None:
        """Note that this audience's frame at this position was lost before delivery. Called under the hub's lock."""

    def fall_behind(self) -> None:
        """Let its streams read the history. Called after `lose`, by the same thread, without the lock."""


class Listener(Reader, Protocol):
    """A reader that is also offered the frames of ``*``: a stream with a queue of its own, or the feed of many."""

    def end(self, reason: ByeReason) -> None:
        """Let its streams end with ``sse_bye`` after everything that was delivered. Thread-safe."""
