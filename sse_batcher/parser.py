"""A parser of event streams, for clients: those of tests, and the commands that open a stream.

Pure. Follows https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .wire import DEFAULT_TYPE

MAX_RETRY_DIGITS = 15
"""A longer `retry` is ignored: Python refuses to read numbers of thousands of digits."""

MAX_BLOCK_BYTES = 64_000_000
"""A longer block, or comment, is an error, so that a stream without an end of line cannot take all memory."""

_LINE_END = re.compile(rb"\r\n|\r|\n")


class BlockTooLongError(ValueError):
    """A block or a comment of a stream is longer than `MAX_BLOCK_BYTES`."""


class Block(NamedTuple):
    """One complete block of a stream."""

    type: str
    data: str
    id: str
    """The newest id of the stream when it came: this block's, if it has one."""
    has_id: bool
    """Whether it has an id of its own."""


class Comment(NamedTuple):
    """A comment line. Heartbeats are comments without a text."""

    text: str


class Parser:
    """Takes the bytes of one connection, and returns what is complete. Not thread-safe."""

    def __init__(self, last_id: str = "") -> None:
        self.last_id = last_id
        """The id of the newest complete block: the cursor of a client that comes back."""
        self.retry: int | None = None
        """After how many milliseconds the client has to come back, as the server said last."""
        self._parts: list[bytes] = []  # of a line that is not complete
        self._parts_size = self._data_size = 0  # bytes of that line, and of the lines of `_data`
        self._is_after_cr = False
        self._type = ""
        self._data: list[str] = []
        self._id = last_id
        self._has_id = False

    @property
    def is_between_blocks(self) -> bool:
        """Whether what came ends with a whole block or comment, so that the next bytes mean the same to any parser."""
        return not (self._parts or self._data or self._type or self._has_id or self._is_after_cr)

    def blocks(self, data: bytes) -> list[Block]:
        """Return the blocks that are complete now, without the comments."""
        return [item for item in self.feed(data) if isinstance(item, Block)]

    def feed(self, data: bytes) -> list[Block | Comment]:
        """Return the blocks that are complete now, and the comments, in their order.

        A block without data is no event, and is left out; its id and `retry` count. Raises `BlockTooLongError`.
        """
        if not data:
            return []
        # A CR has ended its line already: an LF after it may never come.
        skip = self._is_after_cr and data.startswith(b"\n")
        self._is_after_cr = data.endswith(b"\r")
        first, *others = _LINE_END.split(data[skip:])
        if first:
            self._parts.append(first)
        self._parts_size += len(first)
        items: list[Block | Comment | None] = []
        if others:
            # Only now: to join and search all of a long line for each of its pieces would take quadratic time.
            *lines, rest = [b"".join(self._parts), *others]
            self._parts, self._parts_size = [rest] if rest else [], len(rest)
            items = [self._take(line.decode(errors="replace")) for line in lines]
        if self._parts_size + self._data_size > MAX_BLOCK_BYTES:
            raise BlockTooLongError(f"the stream has a block of more than {MAX_BLOCK_BYTES // 1_000_000} MB")
        return [item for item in items if item is not None]

    def _take(self, line: str) -> Block | Comment | None:
        if not line:
            return self._end_block()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            return Comment(value)
        if name == "event":
            self._type = value
        elif name == "data":
            self._data.append(value)
            self._data_size += len(line)
        elif name == "id" and "\0" not in value:
            self._id, self._has_id = value, True
        elif name == "retry" and value.isascii() and value.isdecimal() and len(value) <= MAX_RETRY_DIGITS:
            self.retry = int(value)
        return None

    def _end_block(self) -> Block | None:
        self.last_id = self._id
        block = Block(self._type or DEFAULT_TYPE, "\n".join(self._data), self._id, self._has_id)
        is_empty = not self._data
        self._type, self._data, self._data_size, self._has_id = "", [], 0, False
        return None if is_empty else block
