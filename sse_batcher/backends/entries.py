"""Entries of a Redis stream: what one says, and the fields that say it.

Pure. An entry comes from outside, and may be anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import NamedTuple

from ..errors import SSEBatcherError
from ..event import BROADCAST, MIXED, Batch, Event, check_channel, check_type

Position = tuple[int, int, int]
"""The generation (how many epochs this process has met before), and the two numbers of the entry's id."""

START: Position = (0, 0, 0)
VERSION = b"1"

_PUBLISHER = re.compile(r"[0-9a-f]{16}", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_REASONS = frozenset({"time_window", "size_limit", "leading", "critical", "manual", "shutdown"})


class Kick(NamedTuple):
    """A control entry: end the streams of this user, or of this channel."""

    user: Hashable
    channel: str | None


class Entry(NamedTuple):
    """What one entry says; None: that an epoch begins. `number` counts the batches of a `publisher`, from 1; else 0.

    A kick that failed may be in the stream or not: with a number, it would look like a batch that is missing.
    """

    publisher: str
    number: int
    content: Batch | Kick | None


def to_fields(entry: Entry) -> dict[bytes, bytes]:
    """The fields of an entry. Events are lines, since their JSON has none."""
    fields = {"v": VERSION.decode(), "p": entry.publisher, "n": str(entry.number)}
    content = entry.content
    if isinstance(content, Kick):
        fields["kick"] = json.dumps({"user": content.user, "channel": content.channel})
    elif content is None:
        fields["begin"] = ""
    else:
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
    """What an entry says, None where it is none of ours: it comes from outside, and may be anything."""
    try:
        if fields.get(b"v") != VERSION:
            return None
        text = {name.decode(): value.decode() for name, value in fields.items()}
        if not (_PUBLISHER.fullmatch(text["p"]) and _NUMBER.fullmatch(text["n"])):
            return None
        return Entry(text["p"], int(text["n"]), _read_content(text))
    except (KeyError, TypeError, ValueError, RecursionError, SSEBatcherError):
        return None


def is_for(fields: dict[bytes, bytes], channels: set[bytes]) -> bool:
    """Whether it is a batch of one of these channels, as far as can be said without reading it."""
    return fields.get(b"c") in channels


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
    if text["r"] not in _REASONS or not _NUMBER.fullmatch(text["ts"]):
        raise ValueError(text["r"])
    for event_type in set(types):
        check_type(event_type)
    for data in texts:
        _check_json(data)
    events = tuple(Event(event_type, channel, data) for event_type, data in zip(types, texts, strict=True))
    return Batch(channel, batch_type, events, text["r"], int(text["ts"]))


def _check_json(text: str) -> None:
    """Refuse what is no JSON on one line of ASCII. A carriage return would begin a line of its own on the wire."""
    if not text.isascii() or "\r" in text:
        raise ValueError(text)
    json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def numbers(id: bytes | str) -> tuple[int, int]:
    milliseconds, _, sequence = (id.decode() if isinstance(id, bytes) else id).partition("-")
    return int(milliseconds), int(sequence or 0)


def id_of(position: Position) -> str:
    return f"{position[1]}-{position[2]}"


def before(numbers: tuple[int, int]) -> tuple[int, int]:
    """The largest id below this one."""
    milliseconds, sequence = numbers
    if sequence:
        return milliseconds, sequence - 1
    return (milliseconds - 1, 2**64 - 1) if milliseconds else (0, 0)
