"""Entries of a Redis stream: their meaning, their fields, and the forms of answers that hold them.

Pure. Other programs can write to the stream, so an entry may have any content.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, cast

from ...errors import SSEBatcherError
from ...event import BROADCAST, MIXED, Batch, Event, check_channel, check_json, check_type
from ...reasons import BatchReason
from ...wire import Position

START: Position = (0, 0, 0, 0)
"""A position is the generation (how many epochs this process saw before), the two numbers of the entry's id, and 0.

With 1 at the end it is the place right after that entry and before any other, as `after` makes it. An id would not be
enough, since there may be no id between two entries.
"""
ENTRY_VERSION = b"1"

RawEntry = tuple[bytes, dict[bytes, bytes]]
"""The id of an entry, and its fields."""

_PUBLISHER = re.compile(r"[0-9a-f]{16}", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_REASON = re.compile(r"[a-z_]{1,32}", re.ASCII)  # a later version may have more of them


class Kick(NamedTuple):
    """A control entry: end the streams of this user, or of this channel."""

    user: str | int | None
    channel: str | None


class Unreadable(NamedTuple):
    """A batch of this channel that cannot be read, and why: it has a later version, or is damaged."""

    channel: str
    reason: str


class Entry(NamedTuple):
    """The meaning of an entry. A `content` of None says that an epoch begins.

    `number` counts the batches of a `publisher` from 1, and is 0 for other entries. A kick has no number: one that
    failed may not be in the stream, and would look like a missing batch.
    """

    publisher: str
    number: int
    content: Batch | Kick | Unreadable | None


def to_fields(entry: Entry) -> dict[bytes, bytes]:
    """Return the fields of an entry with a batch, a kick, or None. Each event is a line: its JSON has no line ends."""
    fields = {"v": ENTRY_VERSION.decode(), "p": entry.publisher, "n": str(entry.number)}
    content = entry.content
    if isinstance(content, Kick):
        fields["kick"] = json.dumps({"user": content.user, "channel": content.channel})
    elif content is None:
        fields["begin"] = ""
    elif isinstance(content, Batch):
        fields |= {
            "c": content.channel,
            "t": content.type,
            "e": "\n".join(event.json for event in content.events),
            "r": content.reason,
            "ts": str(content.timestamp),
        }
        if content.type == MIXED:
            fields["types"] = "\n".join(event.type for event in content.events)
    return {name.encode(): value.encode() for name, value in fields.items()}


def read_fields(fields: dict[bytes, bytes]) -> Entry | None:
    """Return the meaning of an entry, or None if sse_batcher did not write it.

    Publisher, number and channel have the same meaning in every version. So an entry that has the first two and cannot
    be read otherwise is a batch that its clients will not get.
    """
    try:
        publisher, number = fields[b"p"].decode(), fields[b"n"].decode()
    except (KeyError, ValueError):
        return None
    if not (_PUBLISHER.fullmatch(publisher) and _NUMBER.fullmatch(number)):
        return None
    try:
        if fields[b"v"] != ENTRY_VERSION:
            raise ValueError(f"version {fields[b'v'][:20]!r} is not known here")
        content = _read_content({name.decode(): value.decode() for name, value in fields.items()})
    except (KeyError, TypeError, ValueError, RecursionError, SSEBatcherError) as error:
        if number == "0":
            return None  # not a batch
        return Entry(publisher, int(number), Unreadable(channel_of(fields), repr(error)[:200]))
    return Entry(publisher, int(number), content)


def channel_of(fields: dict[bytes, bytes]) -> str:
    """Return the channel of a batch without reading all of it. ``*`` if it has no channel that can be read."""
    try:
        channel = fields[b"c"].decode()
        return channel if channel == BROADCAST else check_channel(channel)
    except (KeyError, ValueError):
        return BROADCAST


def _read_content(text: dict[str, str]) -> Batch | Kick | None:
    if "begin" in text:
        return None
    return _read_kick(text["kick"]) if "kick" in text else _read_batch(text)


def _read_kick(text: str) -> Kick:
    said = json.loads(text)
    user, channel = said["user"], said["channel"]
    if not isinstance(user, (str, int, type(None))) or (user is None and channel is None):
        raise ValueError(text)
    return Kick(user, None if channel is None else check_channel(channel))


def _read_batch(text: dict[str, str]) -> Batch:
    channel, batch_type, texts = text["c"], text["t"], text["e"].split("\n")
    if channel != BROADCAST:
        check_channel(channel)
    types = text["types"].split("\n") if batch_type == MIXED else [check_type(batch_type)] * len(texts)
    if not _REASON.fullmatch(text["r"]) or not _NUMBER.fullmatch(text["ts"]):
        raise ValueError("a bad reason or timestamp")
    for event_type in set(types):
        check_type(event_type)
    for data in texts:
        check_json(data)
    events = tuple(Event(event_type, channel, data) for event_type, data in zip(types, texts, strict=True))
    return Batch(channel, batch_type, events, cast(BatchReason, text["r"]), int(text["ts"]))


def numbers(id: bytes | str) -> tuple[int, int]:
    """Return the two numbers of an entry's id: milliseconds, and a sequence number."""
    milliseconds, _, sequence = (id.decode() if isinstance(id, bytes) else id).partition("-")
    return int(milliseconds), int(sequence or 0)


def id_of(position: Position) -> str:
    """Return the id of the entry at this position, or right before it."""
    return f"{position[1]}-{position[2]}"


def after(position: Position) -> Position:
    """Return the place right after this entry."""
    return (*position[:3], 1)


def before(numbers: tuple[int, int]) -> tuple[int, int]:
    """Return the largest id below this one."""
    milliseconds, sequence = numbers
    if sequence:
        return milliseconds, sequence - 1
    return (milliseconds - 1, 2**64 - 1) if milliseconds else (0, 0)


def new_entries(news: Any) -> list[RawEntry]:
    """Return the entries that XREAD of one stream found.

    The answer has several forms, which depend on the versions of redis-py and of the protocol. Raises `TypeError` or
    `ValueError` if it has none of them.
    """
    if not news:
        return []
    if isinstance(news, dict):
        (entries,) = news.values()
        return raw_entries(
            [entry for group in entries for entry in group] if entries and isinstance(entries[0], list) else entries
        )
    return raw_entries(news[0][1])


def raw_entries(found: Any) -> list[RawEntry]:
    """Return the entries that XRANGE found. Raises `TypeError` or `ValueError` if they are not entries."""
    entries = [(id, fields) for id, fields in found]
    if not all(isinstance(id, bytes) and isinstance(fields, dict) for id, fields in entries):
        raise TypeError("entries are expected")
    return entries


def value_of(found: Any) -> bytes:
    """Return the value of a key, empty if the key does not exist. Raises `TypeError` if it is not a value."""
    if not isinstance(found, (bytes, type(None))):
        raise TypeError("the value of a key is expected")
    return found or b""
