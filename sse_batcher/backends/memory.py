"""The backend of one process.

`publish` delivers in the thread that calls it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from ..event import Batch
from ..wire import Frame

# A cursor comes from outside: it is matched whole, bounded, and rebuilt from its parts.
_CURSOR = re.compile(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,18})", re.ASCII)


class MemoryBackend:
    """Positions are whole numbers; the id is ``<epoch>-<position>``."""

    start = 0

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(4)
        self._position = self.start
        self._deliver: Callable[[Frame], None] = lambda frame: None

    def connect(self, deliver: Callable[[Frame], None]) -> None:
        self._deliver = deliver

    def publish(self, batch: Batch) -> None:
        self._position += 1
        self._deliver(Frame(batch, self._position, self.format(self._position)))

    def format(self, position: int) -> str:
        return f"{self._epoch}-{position}"

    def read(self, cursor: str) -> int | None:
        match = _CURSOR.fullmatch(cursor)
        return int(match[2]) if match and match[1] == self._epoch else None

    def normalize(self, cursor: str) -> str | None:
        match = _CURSOR.fullmatch(cursor)
        return f"{match[1]}-{int(match[2])}" if match else None
