"""The backend for one process, without any other service.

`publish` delivers in the thread that calls it, the batcher's. The other methods are thread-safe.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable

from ..event import Batch, User
from ..runtime.process import process_began
from ..streams.history import ResumePoint, Slice
from ..streams.roles import Receiver
from ..wire import Frame, Position
from .kicks import MICROSECONDS, KickedUsers, Stamps

# A cursor comes from outside, so each part has a maximum length, and the cursor is rebuilt from its parts.
_CURSOR = re.compile(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,18})(?:\.([1-9][0-9]{0,8}))?", re.ASCII)


class MemoryBackend:
    """A position is the number of the frame; its id is ``<epoch>-<number>``."""

    start: Position = (0,)

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(4)
        self._number = 0
        self._receiver: Receiver | None = None
        self._stamps = Stamps()
        # Kicks are forgotten with the process. The processes before it may have kicked the user of an older token.
        self._since = int(process_began() * MICROSECONDS)
        self._kicks = KickedUsers(self._since)

    def connect(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def publish(self, batch: Batch) -> None:
        self._number += 1
        position = (self._number,)
        receiver = self._receiver
        assert receiver is not None, "connect() comes first"
        try:
            receiver.deliver(Frame(batch, position, self.format(position)))
        except Exception:
            receiver.lose(batch.audience, position)
            raise

    def kick(self, user: User | None, channel: str | None) -> None:
        receiver = self._receiver
        assert receiver is not None, "connect() comes first"
        if user is not None:
            self._kicks.add(user, self.stamp())
        receiver.dismiss("kicked", user, channel)

    def stamp(self) -> int:
        return self._stamps.next(self.now())

    def remember_kicks(self) -> None:
        """Have the next stamp be later than the beginning of the process, although the clock may have been set back."""
        self._stamps.raise_to(self._since)

    def kicked_until(self, user: User) -> int:
        return self._kicks.until(user)

    def find_position(self) -> bool:
        return True

    def open(self, cursor: str | None) -> None:
        """Do nothing: the whole history is here."""

    def now(self) -> float:
        return time.time() * 1000

    def wait_until_delivered(self, timeout: float | None) -> bool:
        return True

    def close(self, timeout: float | None) -> bool:
        return True

    is_known = True
    silent_for = answered_ago = 0.0
    unread = ignored = 0
    processes: int | None = None

    def format(self, position: Position) -> str:
        return f"{self._epoch}-{position[0]}"

    def parse(self, cursor: str) -> ResumePoint:
        match = _CURSOR.fullmatch(cursor)
        if match is None:
            return ResumePoint(refused="malformed")
        if match[1] != self._epoch:
            return ResumePoint(refused="epoch")
        return ResumePoint((int(match[2]),), int(match[3] or 0))

    def replay(self, channels: Iterable[str], point: ResumePoint, user: User | None) -> Slice | None:
        """Return None: frames that the history has dropped are nowhere else."""
        return None

    def normalize(self, cursor: str) -> str | None:
        match = _CURSOR.fullmatch(cursor)
        return match and match[0]
