"""A record of what the backend delivers to the hub, for the judge of `checker`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from sse_batcher import HistoryOptions
from sse_batcher.backends.memory import MemoryBackend
from sse_batcher.streams.roles import Receiver
from sse_batcher.wire import Frame

from .checker import Facts, Sent


class Record:
    """Stands between backend and hub, and writes down what goes through. Called by one thread at a time."""

    def __init__(self, history: HistoryOptions) -> None:
        self.sent: list[Sent] = []
        self.fail = False
        self._room = history.history_frames
        self._kept: list[int] = []  # the numbers of the frames that were not lost
        self._receiver: Receiver | None = None

    def facts(self) -> Facts:
        """See `tests.kit.checker.Facts`."""
        gone = self._kept[-self._room - 1] if len(self._kept) > self._room else 0
        return len(self.sent), gone

    @property
    def stands(self) -> bool:
        return self._receiver is not None

    def stand_before(self, receiver: Receiver) -> Record:
        self._receiver = receiver
        return self

    def deliver(self, frame: Frame) -> None:
        events = tuple((event.type, event.data) for event in frame.batch.events)
        self.sent.append(Sent(frame.id, frame.batch.channel, events, lost=self.fail))
        if self.fail:
            raise OSError("lost on purpose")
        self._kept.append(len(self.sent))
        assert self._receiver is not None
        self._receiver.deliver(frame)

    def lose(self, channel: str, position: Any, reason: str = "publish_failed") -> None:
        assert self._receiver is not None
        self._receiver.lose(channel, position, reason)

    def dismiss(self, reason: str, user: Hashable = None, channel: str | None = None) -> None:
        raise AssertionError("no client is kicked here")


class RecordedBackend(MemoryBackend):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def connect(self, receiver: Receiver) -> None:
        super().connect(self.record.stand_before(receiver))
