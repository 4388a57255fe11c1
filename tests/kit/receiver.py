"""A receiver that keeps what a backend delivers."""

from __future__ import annotations

from typing import Any


class RecordingReceiver:
    """Its list `received` has a tuple for each call, without the generation of positions."""

    def __init__(self) -> None:
        self.received: list[tuple[Any, ...]] = []

    def deliver(self, frame: Any) -> None:
        self.received.append((frame.batch.events[0].json, frame.position[1:]))

    def lose(self, channel: str, position: Any, reason: str = "publish_failed") -> None:
        self.received.append((reason, channel, position[1:]))

    def dismiss(self, reason: str, user: Any = None, channel: str | None = None) -> None:
        self.received.append((reason, user, channel))
