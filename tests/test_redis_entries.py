"""Entries of the stream in Redis: what goes in comes out, and what others wrote is not taken for ours."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher.backends.redis.entries import Entry, Kick, Unreadable, read_fields, to_fields
from sse_batcher.event import Batch, Event

NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=8).filter(
    lambda name: not name.startswith("sse_") and not name.endswith("_batch") and name not in {"mixed", "*"}
)
DATA = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5).map(json.dumps)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    channel = draw(st.just("*") | NAMES)
    mixed = draw(st.booleans())
    types = draw(st.lists(NAMES, min_size=1, max_size=5))
    types = types if mixed else [types[0]] * len(types)
    events = tuple(Event(event_type, channel, draw(DATA)) for event_type in types)
    return Batch(channel, "mixed" if mixed else types[0], events, "manual", draw(st.integers(0, 10**13)))


@given(batches(), st.integers(1, 10**12))
def test_a_batch_comes_out_as_it_went_in(batch: Batch, number: int) -> None:
    entry = Entry("0123456789abcdef", number, batch)
    assert read_fields(to_fields(entry)) == entry


@pytest.mark.parametrize("kick", [Kick("ada", None), Kick(7, "x"), Kick(None, "x")])
def test_a_kick_comes_out_as_it_went_in(kick: Kick) -> None:
    entry = Entry("0123456789abcdef", 0, kick)
    assert read_fields(to_fields(entry)) == entry


GOOD = to_fields(
    Entry("0123456789abcdef", 3, Batch("a", "t", (Event("t", "a", "1"), Event("t", "a", "2")), "manual", 5))
)
MIXED = GOOD | {b"t": b"mixed", b"types": b"t\nu"}
KICK = to_fields(Entry("0123456789abcdef", 0, Kick("ada", None)))


def without(name: bytes) -> dict[bytes, bytes]:
    return {other: value for other, value in GOOD.items() if other != name}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"hello": b"world"},
        without(b"p"),
        without(b"n"),
        GOOD | {b"p": b"x" * 16},
        GOOD | {b"p": b"\xff" * 16},
        GOOD | {b"n": b"-1"},
        GOOD | {b"n": b"9" * 30},
        GOOD | {b"n": b"0", b"v": b"3"},
        KICK | {b"kick": b"null"},
        KICK | {b"kick": b"[" * 100_000},
        KICK | {b"kick": b'{"user": null, "channel": null}'},
        KICK | {b"kick": b'{"user": ["a"], "channel": null}'},
        KICK | {b"kick": b'{"user": true, "channel": null}'},  # would be that of the user 1
        KICK | {b"kick": b'{"user": "", "channel": null}'},
        KICK | {b"kick": b'{"user": "ada", "channel": 7}'},
    ],
)
def test_an_entry_of_others_is_not_taken_for_one_of_ours(fields: dict[bytes, bytes]) -> None:
    assert read_fields(fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        *[without(name) for name in (b"v", b"c", b"t", b"e", b"r", b"ts")],
        GOOD | {b"v": b"3"},
        GOOD | {b"v": b"\xff"},
        GOOD | {b"more": b"\xff"},
        GOOD | {b"c": b""},
        GOOD | {b"c": b"a\nb"},
        GOOD | {b"c": b"\xff"},
        GOOD | {b"t": b"sse_bye"},
        GOOD | {b"t": b"x_batch"},
        GOOD | {b"t": b"t\ndata: forged"},
        GOOD | {b"e": b""},
        GOOD | {b"e": b"1\n"},
        GOOD | {b"e": b"[1,\r2]"},
        GOOD | {b"e": b"NaN"},
        GOOD | {b"e": '"ü"'.encode()},
        GOOD | {b"e": b"[" * 100_000},
        GOOD | {b"e": b"[" * 100_000 + b"1,]" + b"]" * 99_999},
        GOOD | {b"r": b'manual","x":"'},
        GOOD | {b"ts": b"now"},
        MIXED | {b"types": b"t"},
        MIXED | {b"types": b"t\nsse_gap"},
    ],
)
def test_a_batch_that_cannot_be_read_is_known_by_number_and_channel(fields: dict[bytes, bytes]) -> None:
    entry = read_fields(fields)
    assert entry is not None
    assert entry[:2] == ("0123456789abcdef", 3)
    assert isinstance(entry.content, Unreadable)
    assert entry.content.audience == ("a" if fields.get(b"c") == b"a" else "*")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,  # no version of Python reads this
        '{"a":' * 20_000 + '"\\u2028"' + "}" * 20_000,
        "1" * 10_000,
        "1e400",
    ],
)
def test_what_another_python_has_encoded_is_readable_here(text: str) -> None:
    content = read_fields(GOOD | {b"e": text.encode()})
    assert content is not None
    assert isinstance(content.content, Batch)
    assert content.content.events[0].json == text
