"""A record of what the backend delivers to the hub, for the judge of `checker`."""

from __future__ import annotations

from collections.abc import Hashable

from sse_batcher import HistoryOptions
from sse_batcher.backends.memory import MemoryBackend
from sse_batcher.event import Audience
from sse_batcher.reasons import GapReason
from sse_batcher.streams.roles import Receiver
from sse_batcher.wire import Frame, Position

from .checker import Facts, Sent


class Record:
    """Stands between backend and hub, and writes down what goes through. Called by one thread at a time."""

    def __init__(self, history: HistoryOptions) -> None:
        self.sent: list[Sent] = []
        self.fail = False
        self._room = history.history_frames
        # The numbers of the frames that were not lost.
        self._of_channels: list[int] = []
        self._of_users: list[int] = []
        self._receivers: list[Receiver] = []

    def facts(self) -> Facts:
        """See `tests.kit.checker.Facts`."""
        gone = [kept[-self._room - 1] if len(kept) > self._room else 0 for kept in (self._of_channels, self._of_users)]
        return Facts(len(self.sent), *gone)

    @property
    def stands(self) -> bool:
        return bool(self._receivers)

    def stand_before(self, *receivers: Receiver) -> Record:
        """Pass on to these, each of which is as a process of its own."""
        self._receivers += receivers
        return self

    def deliver(self, frame: Frame) -> None:
        batch = frame.batch
        events = tuple((event.type, event.data) for event in batch.events)
        self.sent.append(Sent(frame.id, batch.audience, events, self.fail, batch.join))
        if self.fail:
            raise OSError("lost on purpose")
        kept = self._of_channels if isinstance(batch.audience, str) else self._of_users
        kept.append(len(self.sent))
        assert self._receivers
        for receiver in self._receivers:
            receiver.deliver(frame)

    def lose(self, audience: Audience, position: Position, reason: GapReason = "publish_failed") -> None:
        assert self._receivers
        for receiver in self._receivers:
            receiver.lose(audience, position, reason)

    def dismiss(self, reason: str, user: Hashable = None, channel: str | None = None) -> None:
        raise AssertionError("no client is kicked here")


class RecordedBackend(MemoryBackend):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def connect(self, receiver: Receiver) -> None:
        super().connect(self.record.stand_before(receiver))
