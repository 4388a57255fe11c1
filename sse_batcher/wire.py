"""The one encoder: everything that is ever sent to a client is made here.

Pure. Follows https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

from .errors import InvalidEventError
from .event import BATCH_SUFFIX, MIXED, Batch, Event
from .reasons import BatchReason

HEADERS = (
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache, no-transform"),
    # Keeps compressors away that hold events back and do not look for no-transform: what has an encoding, they leave.
    ("Content-Encoding", "identity"),
    ("X-Accel-Buffering", "no"),
    ("X-Content-Type-Options", "nosniff"),
)

Position = tuple[int, ...]
"""A frame's place in the history. In one history all positions have the same length, and they rise with each frame."""

_LINE_END = re.compile("\r\n|\r|\n")  # and no other: str.splitlines() also cuts at U+2028 and lets data forge an event
_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}\Z")
_FORBIDDEN_IN_TYPE = re.compile("[\r\n\0]")
_LONGEST_REASON = max(get_args(BatchReason), key=len)
_encode = json.JSONEncoder(separators=(",", ":")).encode  # which json.dumps() makes for each call


def block(*, event: str, data: str, retry: int | None = None, id: str | None = None) -> bytes:
    """One block: event, retry, data, and the id last.

    With the id first, a connection that is cut inside the block makes some clients resume after an event they never
    got. `retry` is in milliseconds. Raises `InvalidEventError` for what would break out of its field.
    """
    if _FORBIDDEN_IN_TYPE.search(event) or not event:
        raise InvalidEventError(f"the type {event!r} is empty or holds CR, LF or NUL", field="type")
    lines = [f"event: {event}"]
    if retry is not None:
        if isinstance(retry, bool) or not isinstance(retry, int) or retry < 0:
            raise InvalidEventError(f"retry is a whole number of milliseconds, not {retry!r}", field="retry")
        lines.append(f"retry: {retry}")
    lines.extend(f"data: {line}" for line in _LINE_END.split(data))
    if id is not None:
        if not _ID.match(id):
            raise InvalidEventError(f"an id is 1 to 128 of A-Z a-z 0-9 . _ ~ -, not {id[:200]!r}", field="id")
        lines.append(f"id: {id}")
    return _utf8("\n".join(lines) + "\n\n")


def comment(text: str = "") -> bytes:
    """Comment lines, which clients ignore. Without a blank line: some clients report that as an empty event."""
    return _utf8("".join(f":{' ' if line else ''}{line}\n" for line in _LINE_END.split(text)))


def control(event: str, data: Mapping[str, Any], *, retry: int, id: str | None) -> bytes:
    """A block of the stream's own: ``sse_open``, ``sse_gap``, ``sse_busy`` or ``sse_bye``."""
    return block(event=event, data=_encode(data), retry=retry, id=id)


def event_block(event: Event, id: str) -> bytes:
    """The block of one event, as it is without batching."""
    return block(event=event.type, data=event.json, id=id)


def batch_block(batch: Batch, id: str) -> bytes:
    """The block of a batch: a lone event as it would be without batching, several as one ``<type>_batch`` event."""
    if len(batch.events) == 1:
        return event_block(batch.events[0], id)
    if batch.type == MIXED:
        values = [mixed_value(event.type, event.json) for event in batch.events]
    else:
        values = [event.json for event in batch.events]
    name = batch.type + BATCH_SUFFIX
    return block(event=name, data=_envelope(name, values, batch.reason, batch.timestamp), id=id)


def mixed_value(event_type: str, data_json: str) -> str:
    """One event inside a ``mixed_batch``."""
    return f'{{"type":{json.dumps(event_type)},"data":{data_json}}}'


@lru_cache(maxsize=4096)
def mixed_bytes(event_type: str) -> int:
    """The bytes that one event of this type has in a ``mixed_batch`` beside its own JSON."""
    return len(mixed_value(event_type, ""))


@lru_cache(maxsize=4096)
def envelope_bytes(event_type: str, max_batch_size: int) -> int:
    """The bytes that a batch's JSON has beside its events and the commas between them, at most."""
    empty = len(_envelope(event_type + BATCH_SUFFIX, [], _LONGEST_REASON, 10**13))
    return empty + len(str(max_batch_size)) - len("0")


@lru_cache(maxsize=4096)
def _event_bytes(event_type: str) -> int:
    """The bytes that the block of a lone event has beside its JSON and its id."""
    return len(block(event=event_type, data="", id="x")) - 1


def _envelope(name: str, values: list[str], reason: BatchReason, timestamp: int) -> str:
    return (
        f'{{"type":{json.dumps(name)},"batchSize":{len(values)},"events":[{",".join(values)}],'
        f'"reason":"{reason}","timestamp":{timestamp}}}'
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidEventError("a lone surrogate cannot be sent: it is not UTF-8", field="data") from error


HEARTBEAT = comment()
"""What keeps a stream alive: one line, and no block."""

LAST_CHUNK = b"0\r\n\r\n"
"""What ends a body in chunks."""


def chunk(data: bytes) -> bytes:
    """One chunk of HTTP/1.1 (RFC 9112, 7.1). Of nothing: nothing, since an empty chunk would be the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


_FRAME_BYTES = 512
_EVENT_BYTES = 128
"""The memory of a frame and of each of its events, beside their text: the Python objects, as measured."""


class Frame:
    """A batch with its place in the history, and its bytes in each variant that clients need.

    Each variant is made once, on first need, and is the same object for every client. Two threads that need one at the
    same moment may both make it: a harmless race, the bytes are equal. Only `plain` is kept for as long as the frame:
    see `drop_variants`.
    """

    # Weakly referenced: what waits for a client must not keep alive what the history has let go.
    __slots__ = (
        *("__weakref__", "_plain", "_saved_bytes", "_variants", "batch", "held_bytes", "id", "position", "time"),
    )

    def __init__(self, batch: Batch, position: Position, id: str, time: int | None = None) -> None:
        self.batch = batch
        self.position = position
        self.id = id
        self.time = batch.timestamp if time is None else time
        self.held_bytes = 0
        """About the memory that it takes, without variants but `plain`: that, the JSON that it was made of, and their
        Python objects. 0 as long as nobody has asked for `plain`.
        """
        self._plain: bytes | None = None
        self._variants: dict[tuple[bool, bool], bytes] | None = {}  # all but `plain`, by the arguments of `encoded`
        self._saved_bytes: int | None = None

    @property
    def plain(self) -> bytes:
        """The block as it is, for a server that does its own framing."""
        if self._plain is None:
            made = batch_block(self.batch, self.id)
            # The JSON is a little shorter than the block, which has all of it.
            self.held_bytes = 2 * len(made) + _FRAME_BYTES + _EVENT_BYTES * len(self.batch.events)
            self._plain = made
        return self._plain

    def drop_variants(self) -> None:
        """Let go of all variants but `plain`, and keep none from now on: each is made again when it is needed.

        Called by whoever keeps the frame, while others read it. A thread that is making a variant may still put it
        into the old dictionary: a harmless race, since that is about to be forgotten, too.
        """
        self._variants = None

    @property
    def saved_bytes(self) -> int:
        """How many bytes more it would be, had each event come alone, with an id of the same length."""
        if self._saved_bytes is None:
            events = self.batch.events
            without = sum(_event_bytes(event.type) + len(event.json) + len(self.id) for event in events)
            self._saved_bytes = without - len(self.plain) if len(events) > 1 else 0
        return self._saved_bytes

    @property
    def unbatched(self) -> bytes:
        """A block for each event, for a client that knows no batches."""
        return self.encoded(batches=False, chunked=False)

    def encoded(self, *, batches: bool, chunked: bool) -> bytes:
        """The bytes for one kind of client. `batches`: it knows them. `chunked`: we make HTTP chunks for it."""
        if batches or len(self.batch.events) == 1:  # then both are the same
            if not chunked:
                return self.plain
            batches = True
        variants = self._variants
        made = variants.get((batches, chunked)) if variants else None
        if made is None:
            made = chunk(self.encoded(batches=batches, chunked=False)) if chunked else self.rest(0)
            if variants is not None:
                variants[batches, chunked] = made
        return made

    def rest(self, part: int) -> bytes:
        """The blocks of all events but the first `part`. Where a stream is cut between two of them, nothing is lost.

        The id of the k-th says that k events of this frame have arrived; that of the last is the frame's.
        """
        events = self.batch.events
        ids = [f"{self.id}.{count}" for count in range(1, len(events))] + [self.id]
        return b"".join(event_block(event, id) for event, id in zip(events[part:], ids[part:], strict=True))
