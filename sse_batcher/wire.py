"""The wire format: every byte that is sent to a client is encoded here.

Pure. Follows https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

from .errors import InvalidEventError
from .event import BATCH_SUFFIX, MIXED, Batch, Event, audience_bytes, body_bytes, is_text
from .reasons import BatchReason

HEADERS = (
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache, no-transform"),
    # Some compressors hold events back and ignore no-transform. They leave a response alone that has an encoding.
    ("Content-Encoding", "identity"),
    ("X-Accel-Buffering", "no"),
    ("X-Content-Type-Options", "nosniff"),
)

GZIP_HEADERS = (
    *(field for field in HEADERS if field[0] != "Content-Encoding"),
    ("Content-Encoding", "gzip"),
)
"""As `HEADERS`, for a stream that is compressed."""

Position = tuple[int, ...]
"""A frame's place in the history. In one history all positions have the same length, and they rise with each frame."""

# Only these are line ends in the format. str.splitlines() also splits at U+2028, which would let data forge an event.
_LINE_END = re.compile("\r\n|\r|\n")
DEFAULT_TYPE = "message"
"""The type of a block without an ``event:`` line, by the standard. Some clients, such as htmx 4, show only those."""

_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}\Z")
_FORBIDDEN_IN_TYPE = re.compile("[\r\n\0]")
_LONGEST_REASON = max(get_args(BatchReason), key=len)
_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps() would make an encoder for each call


def block(*, event: str, data: str, retry: int | None = None, id: str | None = None) -> bytes:
    """Return one block: event, retry, data, and the id last.

    With the id first, a connection that breaks inside the block would make some clients resume after an event that they
    never got. The type ``message`` is the default of the format, and is left out. `retry` is in milliseconds. Raises
    `InvalidEventError` if a value would break out of its field.
    """
    if _FORBIDDEN_IN_TYPE.search(event) or not event:
        raise InvalidEventError(f"the type {event!r} is empty or contains CR, LF or NUL", field="type")
    lines = [] if event == DEFAULT_TYPE else [f"event: {event}"]
    if retry is not None:
        if isinstance(retry, bool) or not isinstance(retry, int) or retry < 0:
            raise InvalidEventError(f"retry must be a whole number of milliseconds, not {retry!r}", field="retry")
        lines.append(f"retry: {retry}")
    # JSON has no line ends. To look for two characters takes a hundredth of the time of the regular expression.
    parts = _LINE_END.split(data) if "\n" in data or "\r" in data else (data,)
    lines.extend(f"data: {line}" for line in parts)
    if id is not None:
        lines.append(f"id: {_checked_id(id)}")
    return _utf8("\n".join(lines) + "\n\n")


def control_data(data: Mapping[str, Any]) -> str:
    """Return the JSON of a control block, for `control`."""
    return _encode(data)


def control(event: str, data: str, *, retry: int, id: str | None) -> bytes:
    """Return a control block: ``sse_open``, ``sse_gap``, ``sse_busy`` or ``sse_bye``. `retry` is in milliseconds.

    `data` is what `control_data` has returned. Of the checks of `block`, only that of the id is made: the rest cannot
    come from outside.
    """
    named = "" if id is None else f"id: {_checked_id(id)}\n"
    return f"event: {event}\nretry: {retry}\ndata: {data}\n{named}\n".encode()


def event_block(event: Event, id: str) -> bytes:
    """Return the block of one event, as it is without batching."""
    return block(event=event.type, data=event.body, id=id)


def batch_block(batch: Batch, id: str) -> bytes:
    """Return the block of a batch: one event as it is without batching, several as one ``<type>_batch`` event.

    Several texts are one event of their own type, joined.
    """
    events = batch.events
    if len(events) == 1:
        return event_block(events[0], id)
    if batch.join is not None:
        return block(event=batch.type, data=batch.join.join(event.body for event in events), id=id)
    values = [mixed_value(event) if batch.type == MIXED else event.body for event in events]
    name = batch.type + BATCH_SUFFIX
    return block(event=name, data=_envelope(name, values, batch.reason, batch.timestamp), id=id)


def mixed_value(event: Event) -> str:
    """Return the JSON of one event inside a ``mixed_batch``. A text has another field, so it differs from a string."""
    return f'{{"type":{json.dumps(event.type)},"{"text" if is_text(event.body) else "data"}":{event.json}}}'


@lru_cache(maxsize=4096)
def mixed_bytes(event_type: str) -> int:
    """Return the bytes that an event of this type takes in a ``mixed_batch``, without its own JSON."""
    return len(mixed_value(Event(event_type, "", "")))  # "text" has as many letters as "data"


@lru_cache(maxsize=4096)
def envelope_bytes(event_type: str, max_batch_size: int) -> int:
    """Return the most bytes that a batch's JSON can have, without its events and the commas between them."""
    empty = len(_envelope(event_type + BATCH_SUFFIX, [], _LONGEST_REASON, 10**13))
    return empty + len(str(max_batch_size)) - len("0")


@lru_cache(maxsize=4096)
def _event_bytes(event_type: str) -> int:
    """Return the bytes of the block of one event, without its data and its id."""
    return len(block(event=event_type, data="", id="x")) - 1


def _envelope(name: str, values: list[str], reason: BatchReason, timestamp: int) -> str:
    return (
        f'{{"type":{json.dumps(name)},"batchSize":{len(values)},"events":[{",".join(values)}],'
        f'"reason":"{reason}","timestamp":{timestamp}}}'
    )


def _checked_id(id: str) -> str:
    if not _ID.match(id):
        raise InvalidEventError(f"an id is 1 to 128 of A-Z a-z 0-9 . _ ~ -, not {id[:200]!r}", field="id")
    return id


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidEventError("a lone surrogate cannot be sent: it is not UTF-8", field="data") from error


HEARTBEAT = b":\n"
"""Sent to keep a quiet stream alive: a comment line, which clients ignore. No blank line follows, which some clients
report as an empty event."""

LAST_CHUNK = b"0\r\n\r\n"
"""The end of a chunked body."""


def chunk(data: bytes) -> bytes:
    """Return one chunk of HTTP/1.1 (RFC 9112, 7.1). For no bytes it is empty: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


GZIP_START = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
"""The first bytes of a stream that is compressed: the header of a gzip file (RFC 1952).

What follows is `deflated` or `stored`, in any order. There is no trailer: it would have the checksum of all that this
one client got. Clients take such a stream as complete up to where it ends.
"""

_LONGEST_STORED = 0xFFFF
_STORED_HEAD = struct.Struct("<BHH")


def deflated(data: bytes) -> bytes:
    """Return a part of a compressed stream that a client can read as soon as it has all of it (RFC 1951).

    It refers to nothing outside of itself, so the same part can be sent to any client, whatever that has got before.
    It is never longer than `stored` makes it. Releases the GIL, so it is not for the loop of the detached streams.
    """
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    made = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return min(made, stored(data), key=len) if data else b""


def stored(data: bytes) -> bytes:
    """Return a part of a compressed stream as `deflated` does, but without compression."""
    parts = [data[start : start + _LONGEST_STORED] for start in range(0, len(data), _LONGEST_STORED)]
    return b"".join(_STORED_HEAD.pack(0, len(part), len(part) ^ 0xFFFF) + part for part in parts)


def begins_compressed(body: bytes) -> bool:
    """Return whether a body begins as compressed streams of this library do. Other compressors store no first block."""
    return body.startswith(GZIP_START + b"\0")


# The memory of the Python objects of a frame, for each of its events and users, and of bytes. Without their text.
# Measured.
_FRAME_OBJECT_BYTES = 512
_EVENT_OBJECT_BYTES = 128
_USER_OBJECT_BYTES = 256
_BYTES_OBJECT_BYTES = 33
# Python stores all characters of a string with as many bytes as the widest of them needs, which is at most so many.
_WIDEST_CHARACTER_BYTES = 4


class Frame:
    """A batch with its position in the history, and its bytes in each variant that clients need.

    Each variant is made when it is first needed, and all clients share it. A harmless race: two threads that need one
    at the same moment may both make it, and the bytes are equal. Only `plain` and what `compress` makes are kept for as
    long as the frame: see `drop_variants`. Thread-safe.
    """

    # Can be referenced weakly: the queue of a slow client must not keep a frame alive that the history has dropped.
    __slots__ = (
        *("__weakref__", "_compressed", "_compressed_unbatched", "_plain", "_saved_bytes", "_variants"),
        *("batch", "held_bytes", "id", "position", "time"),
    )

    def __init__(self, batch: Batch, position: Position, id: str, time: int | None = None) -> None:
        self.batch = batch
        self.position = position
        self.id = id
        self.time = batch.timestamp if time is None else time
        self.held_bytes = 0
        """About the bytes of memory that it takes: `plain`, what `compress` makes, the data that they were made of, and
        their Python objects. 0 until `plain` was used. Other variants are not counted.
        """
        self._plain: bytes | None = None
        self._compressed: bytes | None = None
        self._compressed_unbatched: bytes | None = None
        # All other variants, by the arguments of `encoded`. None: they are no longer kept.
        self._variants: dict[tuple[bool, bool, bool], bytes] | None = {}
        self._saved_bytes: int | None = None

    @property
    def plain(self) -> bytes:
        """The block without chunks, for a server that adds its own framing."""
        if self._plain is None:
            made = batch_block(self.batch, self.id)
            events = self.batch.events
            # Once for the block, and about as much for the bodies of the events, which are ASCII unless they are texts.
            bodies = len(made) if made.isascii() else sum(_WIDEST_CHARACTER_BYTES * len(event.body) for event in events)
            objects = _EVENT_OBJECT_BYTES * len(events)
            audience = self.batch.audience
            if not isinstance(audience, str):
                objects += _USER_OBJECT_BYTES * len(audience)
                # Events that were enqueued in this process have a tuple of users each.
                objects += sum(audience_bytes(event.audience) for event in events if event.audience is not audience)
            self.held_bytes = len(made) + bodies + _FRAME_OBJECT_BYTES + objects
            self._plain = made
        return self._plain

    def compress(self, *, unbatched: bool = False) -> None:
        """Compress the frame, for streams that are compressed. Without this, they get it `stored`.

        `unbatched`: compress also the blocks for clients that asked for no batches. Called before the frame is
        delivered. A second call does nothing.
        """
        if self._compressed is not None:
            return
        self._compressed = deflated(self.plain)
        self.held_bytes += len(self._compressed) + _BYTES_OBJECT_BYTES
        if unbatched and len(self.batch.events) > 1:
            self._compressed_unbatched = deflated(self.unbatched)
            self.held_bytes += len(self._compressed_unbatched) + _BYTES_OBJECT_BYTES

    def drop_variants(self) -> None:
        """Drop all variants except `plain` and what `compress` has made, and keep no new ones.

        Each of them is made again when it is needed.

        The history calls it while other threads read the frame. A harmless race: a thread that is making a variant may
        still put it into the old dictionary, which is dropped as well.
        """
        self._variants = None

    @property
    def saved_bytes(self) -> int:
        """The bytes that batching has saved: how much longer the events would be in blocks of their own."""
        if self._saved_bytes is None:
            events = self.batch.events
            saved = 0
            if len(events) > 1:
                without = sum(_event_bytes(event.type) + body_bytes(event.body) + len(self.id) for event in events)
                saved = without - len(self.plain)
            self._saved_bytes = saved
        return self._saved_bytes

    @property
    def unbatched(self) -> bytes:
        """The events in blocks of their own, for a client that asked for no batches."""
        return self.encoded(batches=False, chunked=False)

    def encoded(self, *, batches: bool, chunked: bool, gzipped: bool = False) -> bytes:
        """Return the bytes for one kind of client.

        `batches`: the client takes ``_batch`` events. `chunked`: the bytes are to be one chunk of HTTP/1.1. `gzipped`:
        they are a part of a stream that is compressed.
        """
        batches = batches or len(self.batch.events) == 1  # one event looks the same in both
        if not chunked:
            if gzipped:
                kept = self._compressed if batches else self._compressed_unbatched
            else:
                kept = self.plain if batches else None
            if kept is not None:
                return kept
        variants = self._variants
        made = None if variants is None else variants.get((batches, chunked, gzipped))
        if made is None:
            if chunked:
                made = chunk(self.encoded(batches=batches, chunked=False, gzipped=gzipped))
            elif gzipped:
                made = stored(self.encoded(batches=batches, chunked=False))
            else:
                made = self.rest(0)
            if variants is not None:
                variants[batches, chunked, gzipped] = made
        return made

    def rest(self, part: int) -> bytes:
        """Return the events in blocks of their own, without the first `part` events.

        The id of the k-th block says that k events of this frame have arrived, so that nothing is lost if the
        connection breaks between two blocks. The last block has the frame's id.
        """
        events = self.batch.events
        ids = [f"{self.id}.{count}" for count in range(1, len(events))] + [self.id]
        return b"".join(event_block(event, id) for event, id in zip(events[part:], ids[part:], strict=True))
