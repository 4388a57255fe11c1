"""One stream with every block that is ever sent, each with what a client has to make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sse_batcher import Batch, Event
from sse_batcher.encoding import encode_json
from sse_batcher.event import MIXED, check_text
from sse_batcher.wire import HEARTBEAT, batch_block, block, control, control_data

from .sse_parser import ServerEvent


class Part(NamedTuple):
    """Some bytes of a stream, and the event that they are, if any. Its id is the block's own, ``""`` for none."""

    bytes: bytes
    event: ServerEvent | None = None


def _control(name: str, id: str | None, **data: Any) -> Part:
    # Clients come back at once.
    return Part(control(name, control_data(data), retry=0, id=id), ServerEvent(name, encode_json(data), id or ""))


def _batch(batch_type: str, id: str, *events: tuple[str, Any]) -> Part:
    content = tuple(Event(name, "default", encode_json(data)) for name, data in events)
    batch = Batch("default", batch_type, content, "manual", 1)
    if len(events) == 1:
        return Part(batch_block(batch, id), ServerEvent(batch_type, encode_json(events[0][1]), id))
    name = f"{batch_type}_batch"
    values = [{"type": of_type, "data": data} if batch_type == MIXED else data for of_type, data in events]
    envelope = {"type": name, "batchSize": len(values), "events": values, "reason": "manual", "timestamp": 1}
    return Part(batch_block(batch, id), ServerEvent(name, encode_json(envelope), id))


def _texts(batch_type: str, id: str, *texts: str, join: str = "\n") -> Part:
    events = tuple(Event(batch_type, "default", check_text(text)) for text in texts)
    batch = Batch("default", batch_type, events, "manual", 1, join)
    return Part(batch_block(batch, id), ServerEvent(batch_type, join.join(event.body for event in events), id))


def _event(name: str, id: str, data: Any) -> Part:
    return _batch(name, id, (name, data))


# What has broken event streams: line ends of this standard and of others, NUL, a byte order mark, what needs two
# UTF-16 units or half of that, HTML, and what looks like a field.
NASTY = 'a\n\nid: x\r\n\r\0\u2028\x85\ufeff\u00e9\U0001f600\ud800<b>&\\"'

# Only `block` can send more than one line of data, or more than ASCII; JSON is one line of it.
TEXT = "h\u00e9 \u2028\x85\U0001f600\n  indented: yes\n\n\ufeff\0<b>\ndata: x\n"

# The same as a text: NUL and half a character are refused there.
NASTY_TEXT = NASTY.replace("\0", "").replace("\ud800", "e\u0301")

_BEAT = Part(HEARTBEAT)
_OPEN = _control("sse_open", "e-0", heartbeat=15.0)
_ITEM = _event("item", "e-1", {"n": 1})
_TEXT = Part(block(event="text", data=TEXT.replace("\n", "\r\n", 1), id="e-2"), ServerEvent("text", TEXT, "e-2"))

END = _event("end", "e-99", None)
"""What ends each of the streams that a client is to read: it leaves then."""

SHORT = (_OPEN, _BEAT, _ITEM, _TEXT)

PARTS = (
    *(_OPEN, _BEAT, _BEAT, _ITEM, _TEXT, _BEAT),
    _batch("item", "e-5", ("item", 2), ("item", {"server": "\u00e9"})),
    _batch(MIXED, "e-7", ("log", "x"), ("item", [])),
    Part(": caf\u00e9\n:\n: event: x\n".encode()),
    _control("sse_busy", None),
    _event("hub_state", "e-8", "ready"),
    _event("error", "e-9", {"message": "ours"}),
    _event("open", "e-10", NASTY),
    *(_event("message", "e-11", ""), _BEAT, _event("item", "e-12", None)),
    _batch("message", "e-13", ("message", 1), ("message", NASTY)),
    *(_texts("message", "e-14", "<b>\r\n", "\r", NASTY_TEXT, ""), _texts("message", "e-15", "")),
    *(_texts("text", "e-16", *NASTY_TEXT, join=""), _BEAT, _texts("item", "e-17", " ", "x: y", "data: z")),
    _control("sse_gap", "e-18", heartbeat=15.0, reason="overflow"),
    _control("sse_bye", "e-18", reason="shutdown"),
)

LARGE = (*PARTS, _event("log", "e-20", ["\u00e9\n" * 9_000, "x" * 1_000]))
"""The same and an event of 73 kB."""

TYPES = sorted({part.event.type for part in (*LARGE, END) if part.event})


def joined(parts: Sequence[Part]) -> bytes:
    return b"".join(part.bytes for part in parts)


def events(parts: Sequence[Part]) -> list[ServerEvent]:
    """What a client receives: a block without an id has that of the one before."""
    received: list[ServerEvent] = []
    for part in parts:
        if part.event:
            id = part.event.id or (received[-1].id if received else "")
            received.append(part.event._replace(id=id))
    return received


def pieces(parts: Sequence[Part], size: int) -> Iterator[bytes]:
    """All bytes, `size` at a time. What is large is cut less often, and at no round number."""
    for part in parts:
        step = size if len(part.bytes) < 10_000 else 997 + size
        yield from sliced(part.bytes, step)


def sliced(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]
