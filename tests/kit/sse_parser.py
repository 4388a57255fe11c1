"""A parser of event streams, written from the WHATWG standard and from nothing of ours.

https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"

# The grammar of section 9.2.5, for one line without its end. What it calls an event ends with an empty line.
_COMMENT = re.compile(r":[^\r\n]*")
_FIELD = re.compile(r"[^\r\n:]+(:\x20?[^\r\n]*)?")


class GrammarError(AssertionError):
    """A stream that no server should send."""


class ServerEvent(NamedTuple):
    """What a browser would dispatch."""

    type: str
    data: str
    id: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class EventStreamParser:
    """Feed it bytes as they come; it returns the events that are complete.

    `strict`: what breaks the grammar, and what a client would have to ignore or repair, is a `GrammarError`.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.last_event_id = ""
        self.retry: int | None = None
        self.comments: list[str] = []
        self._id_buffer = ""
        self._type = ""
        self._data = ""
        self._tail = b""
        self._after_cr = False
        self._at_start = True
        self._in_block = False

    def feed(self, data: bytes) -> list[ServerEvent]:
        if not data:
            return []
        # The CR has ended its line already, so that the parser does not wait for an LF that may never come.
        skip = self._after_cr and data.startswith(b"\n")
        self._after_cr = data.endswith(b"\r")
        *lines, self._tail = _LINE_END.split(self._tail + data[skip:])
        events = [self._line(line) for line in lines]
        return [event for event in events if event is not None]

    def close(self) -> None:
        """The end of the stream: a block that is not complete is thrown away. A comment needs no block."""
        if self.strict and (self._tail or self._in_block):
            raise GrammarError(f"the stream ends inside a block: {self._tail!r}")

    def _line(self, raw: bytes) -> ServerEvent | None:
        if self._at_start:
            self._at_start = False
            raw = raw.removeprefix(_BOM)
        line = raw.decode(errors="strict" if self.strict else "replace")
        if not line:
            return self._dispatch()
        if self.strict and not _COMMENT.fullmatch(line) and not _FIELD.fullmatch(line):
            raise GrammarError(f"neither comment nor field: {line!r}")
        if line.startswith(":"):
            self.comments.append(line[1:])
            return None
        name, _, value = line.partition(":")
        self._field(name, value.removeprefix(" "))
        self._in_block = True
        return None

    def _field(self, name: str, value: str) -> None:
        if name == "event":
            self._type = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id" and "\0" not in value:
            self._id_buffer = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            self.retry = int(value)
        elif self.strict:
            raise GrammarError(f"a client ignores this line: {name!r}: {value!r}")

    def _dispatch(self) -> ServerEvent | None:
        if self.strict and not self._data:
            raise GrammarError(f"a block without data, or an empty line too many (type {self._type!r})")
        self.last_event_id = self._id_buffer
        event = ServerEvent(self._type or "message", self._data.removesuffix("\n"), self.last_event_id)
        dispatched = event if self._data else None
        self._type = self._data = ""
        self._in_block = False
        return dispatched


def parse(stream: bytes, *, strict: bool = False, step: int | None = None) -> list[ServerEvent]:
    """All events of a whole stream, fed in pieces of `step` bytes."""
    parser = EventStreamParser(strict=strict)
    step = step or len(stream) or 1
    events = [event for at in range(0, len(stream), step) for event in parser.feed(stream[at : at + step])]
    parser.close()
    return events


def take_events(chunks: Iterable[bytes], count: int) -> list[ServerEvent]:
    """The next `count` events of a stream of ours, which is checked strictly. Reads no further chunk.

    Fails at the first heartbeat: nothing came for as long as that.
    """
    parser = EventStreamParser(strict=True)
    events: list[ServerEvent] = []
    iterator: Iterator[bytes] = iter(chunks)
    while len(events) < count:
        events += parser.feed(next(iterator))
        assert not parser.comments, f"a heartbeat, and no event after {events}"
    parser.close()
    assert len(events) == count, f"more events in a chunk than asked for: {events}"
    return events
