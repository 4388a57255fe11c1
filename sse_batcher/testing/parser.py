"""A parser of event streams, for what a test's client gets.

Pure. Follows https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..wire import DEFAULT_TYPE

_LINE_END = re.compile(rb"\r\n|\r|\n")


class Block(NamedTuple):
    """One complete block of a stream."""

    type: str
    data: str
    id: str
    """The newest id of the stream when it came: this block's, if it has one."""
    has_id: bool
    """Whether it has an id of its own."""


class Parser:
    """Takes the bytes of one connection, and returns the blocks that are complete."""

    def __init__(self, last_id: str = "") -> None:
        self.last_id = last_id
        """The id of the newest complete block: the cursor of a client that comes back."""
        self.retry: int | None = None
        """After how many milliseconds the client has to come back, as the server said last."""
        self._rest = b""
        self._type = ""
        self._data: list[str] = []
        self._id = last_id
        self._has_id = False

    def feed(self, data: bytes) -> list[Block]:
        # A CR at the end may be half of a CRLF, so it waits.
        whole = self._rest + data
        held = whole.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(whole[:-1] if held else whole)
        self._rest += b"\r" if held else b""
        blocks = [self._take(line.decode(errors="replace")) for line in lines]
        return [block for block in blocks if block is not None]

    def _take(self, line: str) -> Block | None:
        if not line:
            return self._end_block()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._type = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id, self._has_id = value, True
        elif name == "retry" and value.isascii() and value.isdecimal():
            self.retry = int(value)
        return None

    def _end_block(self) -> Block | None:
        self.last_id = self._id
        block = Block(self._type or DEFAULT_TYPE, "\n".join(self._data), self._id, self._has_id)
        is_empty = not self._data
        self._type, self._data, self._has_id = "", [], False
        return None if is_empty else block
