"""Entries of a Redis stream: their meaning, their fields, and the forms of answers that hold them.

Pure. Other programs can write to the stream, so an entry may have any content.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, cast

from ...encoding import check_json
from ...errors import SSEBatcherError
from ...event import (
    BROADCAST,
    EVERY_USER,
    MIXED,
    Audience,
    Batch,
    Event,
    User,
    Users,
    check_channel,
    check_text,
    check_type,
    check_user,
    check_users,
)
from ...reasons import BatchReason
from ...wire import Position

START: Position = (0, 0, 0, 0)
"""A position is the generation (how many epochs this process saw before), the two numbers of the entry's id, and 0.

With 1 at the end it is the place right after that entry and before any other, as `after` makes it. An id would not be
enough, since there may be no id between two entries.
"""
VERSION_OF_JSON, VERSION_OF_TEXT_AND_USERS = b"1", b"2"
"""The version of an entry. Only entries with texts or for users have the newer one: processes that do not know it can
read all others."""

RawEntry = tuple[bytes, dict[bytes, bytes]]
"""The id of an entry, and its fields."""

_JSON, _TEXT = "j", "t"  # the kinds of events
_PUBLISHER = re.compile(r"[0-9a-f]{16}", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_REASON = re.compile(r"[a-z_]{1,32}", re.ASCII)  # a later version may have more of them


class Kick(NamedTuple):
    """A control entry: end the streams of this user, or of this channel."""

    user: User | None
    channel: str | None


class Unreadable(NamedTuple):
    """A batch that cannot be read: its audience, and the reason. It has a later version, or is damaged."""

    audience: Audience
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
    version, content = VERSION_OF_JSON, entry.content
    fields = {"p": entry.publisher, "n": str(entry.number)}
    if isinstance(content, Kick):
        fields["kick"] = json.dumps({"user": content.user, "channel": content.channel})
    elif content is None:
        fields["begin"] = ""
    elif isinstance(content, Batch):
        kinds = "".join(_TEXT if event.is_text else _JSON for event in content.events)
        fields |= {
            "t": content.type,
            "e": "\n".join(_to_line(event) for event in content.events),
            "r": content.reason,
            "ts": str(content.timestamp),
        }
        if content.channel is None:
            fields["u"] = json.dumps(content.users)
        else:
            fields["c"] = content.channel
        if content.type == MIXED:
            fields["types"] = "\n".join(event.type for event in content.events)
        if _TEXT in kinds:
            fields["k"] = kinds
        if content.join is not None:
            fields["j"] = content.join
        if _TEXT in kinds or content.channel is None:
            version = VERSION_OF_TEXT_AND_USERS
    return {b"v": version} | {name.encode(): value.encode() for name, value in fields.items()}


def read_fields(fields: dict[bytes, bytes]) -> Entry | None:
    """Return the meaning of an entry, or None if sse_batcher did not write it.

    Publisher, number and the channel or the users have the same meaning in every version. So an entry that has the
    first two and cannot be read otherwise is a batch that its clients will not get.
    """
    try:
        publisher, number = fields[b"p"].decode(), fields[b"n"].decode()
    except (KeyError, ValueError):
        return None
    if not (_PUBLISHER.fullmatch(publisher) and _NUMBER.fullmatch(number)):
        return None
    try:
        if fields[b"v"] not in {VERSION_OF_JSON, VERSION_OF_TEXT_AND_USERS}:
            raise ValueError(f"version {fields[b'v'][:20]!r} is not known here")
        content = _read_content({name.decode(): value.decode() for name, value in fields.items()})
    except (KeyError, TypeError, ValueError, RecursionError, SSEBatcherError) as error:
        if number == "0":
            return None  # not a batch
        audience = audience_of(fields)
        # All users instead of these: many entries may be for other users, and the list of what to report is bounded.
        unreadable = Unreadable(audience if isinstance(audience, str) else EVERY_USER, repr(error)[:200])
        return Entry(publisher, int(number), unreadable)
    return Entry(publisher, int(number), content)


def audience_of(fields: dict[bytes, bytes]) -> Audience:
    """Return the audience of a batch, without reading all of it.

    `EVERY_USER` if its users cannot be read, and ``*`` if it has neither users nor a channel that can be read.
    """
    try:
        if b"u" in fields:
            return _read_users(fields[b"u"].decode())
        channel = fields[b"c"].decode()
        return channel if channel == BROADCAST else check_channel(channel)
    except (KeyError, ValueError, RecursionError):
        return EVERY_USER if b"u" in fields else BROADCAST


def _read_content(text: dict[str, str]) -> Batch | Kick | None:
    if "begin" in text:
        return None
    return _read_kick(text["kick"]) if "kick" in text else _read_batch(text)


def _read_kick(text: str) -> Kick:
    said = json.loads(text)
    user, channel = said["user"], said["channel"]
    if user is None and channel is None:
        raise ValueError(text)
    return Kick(None if user is None else check_user(user), None if channel is None else check_channel(channel))


def _read_batch(text: dict[str, str]) -> Batch:
    batch_type, lines = text["t"], text["e"].split("\n")
    if "u" in text:
        audience: Audience = _read_users(text["u"])
    else:
        audience = text["c"] if text["c"] == BROADCAST else check_channel(text["c"])
    types = text["types"].split("\n") if batch_type == MIXED else [check_type(batch_type)] * len(lines)
    if not _REASON.fullmatch(text["r"]) or not _NUMBER.fullmatch(text["ts"]):
        raise ValueError("a bad reason or timestamp")
    for event_type in set(types):
        check_type(event_type)
    kinds = text.get("k", _JSON * len(lines))
    join = check_text(text["j"]) if "j" in text else None
    if batch_type == MIXED or (len(lines) == 1 and join is None):
        fits = join is None
    else:
        fits = set(kinds) == ({_JSON} if join is None else {_TEXT})
    if not fits:
        raise ValueError("texts without a join, or a join without texts")
    events = tuple(
        Event(event_type, audience, _read_line(line, kind))
        for event_type, line, kind in zip(types, lines, kinds, strict=True)
    )
    return Batch(audience, batch_type, events, cast(BatchReason, text["r"]), int(text["ts"]), join)


def _to_line(event: Event) -> str:
    """Return the data of an event as JSON on one line. That of a text takes fewer bytes than its `Event.json`."""
    return json.encoder.encode_basestring(event.body) if event.is_text else event.body


def _read_line(line: str, kind: str) -> str:
    """Return the body of an event."""
    if kind == _JSON:
        check_json(line)
        return line
    text = json.loads(line)
    if kind != _TEXT or not isinstance(text, str):
        raise ValueError("an event that is neither text nor JSON")
    return check_text(text)


def _read_users(text: str) -> Users:
    users = json.loads(text)
    if not isinstance(users, list):
        raise ValueError("users are a list")
    return check_users(users)


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


def microseconds_of(answer: Any) -> int:
    """Return the microseconds since 1970 that an answer to TIME says. Raises `TypeError` if it is not one."""
    match answer:
        case [int(seconds), int(microseconds)]:
            return seconds * 1_000_000 + microseconds
    raise TypeError("seconds and microseconds are expected")
