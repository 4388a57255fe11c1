"""Entries of the stream in Redis with texts and for users, and which of them cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sse_batcher.backends.redis.entries import Entry, Kick, Unreadable, audience_of, read_fields, to_fields
from sse_batcher.event import EVERY_USER, Audience, Batch, Event, check_text, check_users
from sse_batcher.wire import batch_block

PUBLISHER = "0123456789abcdef"
NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=8).filter(
    lambda name: not name.startswith("sse_") and not name.endswith("_batch") and name not in {"mixed", "*"}
)
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")).map(check_text)
DATA = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5).map(json.dumps)
USERS = st.integers(-(10**20), 10**20) | st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
AUDIENCES = st.just("*") | NAMES | st.sets(USERS, min_size=1, max_size=4).map(check_users)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """What a window may become."""
    audience: Audience = draw(AUDIENCES)
    mixed, text = draw(st.booleans()), draw(st.booleans())
    types = draw(st.lists(NAMES, min_size=1, max_size=5))
    types = types if mixed else [types[0]] * len(types)
    bodies = TEXTS | DATA if mixed else TEXTS if text else DATA
    events = tuple(Event(event_type, audience, draw(bodies)) for event_type in types)
    joined = text and not mixed and (len(events) > 1 or draw(st.booleans()))
    join = draw(TEXTS) if joined else None
    return Batch(audience, "mixed" if mixed else types[0], events, "kind", draw(st.integers(0, 10**13)), join)


def batch_of(*bodies: str, audience: Audience = "a", event_type: str = "t", join: str | None = None) -> Batch:
    events = tuple(Event(event_type if event_type != "mixed" else "t", audience, body) for body in bodies)
    return Batch(audience, event_type, events, "manual", 5, join)


def fields_of(batch: Batch) -> dict[bytes, bytes]:
    return to_fields(Entry(PUBLISHER, 3, batch))


# -- what goes in comes out --------------------------------------------------------------------------------------------


@given(batches(), st.integers(1, 10**12))
@example(batch_of(check_text('\u2028\x85\ufeff😀\n\\"\x1b'), check_text(""), join="\u2028\n"), 1)
@example(batch_of(check_text("1"), "1", event_type="mixed", audience=(7, "7")), 1)
def test_a_batch_comes_out_as_it_went_in(batch: Batch, number: int) -> None:
    fields = to_fields(Entry(PUBLISHER, number, batch))
    entry = read_fields(fields)
    assert entry == Entry(PUBLISHER, number, batch)
    assert isinstance(entry.content, Batch)
    kinds = [event.is_text for event in batch.events]
    assert [event.is_text for event in entry.content.events] == kinds  # a Text equals a str
    assert [type(user) for user in entry.content.users] == [type(user) for user in batch.users]
    assert batch_block(entry.content, "e-1") == batch_block(batch, "e-1")
    assert audience_of(fields) == batch.audience
    assert len(fields[b"e"].split(b"\n")) == len(batch.events)
    assert fields[b"v"] == (b"2" if batch.users or any(kinds) else b"1")


def test_an_entry_of_texts_has_the_fields_of_the_contract() -> None:
    batch = batch_of(check_text("<b>é\n</b>"), check_text('"'), audience=(7, "ada"), join="")
    assert fields_of(batch) == {
        b"v": b"2",
        b"p": b"0123456789abcdef",
        b"n": b"3",
        b"u": b'[7, "ada"]',
        b"t": b"t",
        b"e": '"<b>é\\n</b>"\n"\\""'.encode(),
        b"k": b"tt",
        b"j": b"",
        b"r": b"manual",
        b"ts": b"5",
    }


# What the version before texts and users has written, byte for byte.
OLD = [
    (
        batch_of('{"a":"\\u00e9"}'),
        [(b"c", b"a"), (b"t", b"t"), (b"e", b'{"a":"\\u00e9"}'), (b"r", b"manual"), (b"ts", b"5")],
    ),
    (
        batch_of("1", '"x"', "null", audience="*"),
        [(b"c", b"*"), (b"t", b"t"), (b"e", b'1\n"x"\nnull'), (b"r", b"manual"), (b"ts", b"5")],
    ),
    (
        batch_of("1", "2", event_type="mixed", audience="équipe"),
        [
            *[(b"c", "équipe".encode()), (b"t", b"mixed"), (b"e", b"1\n2"), (b"r", b"manual"), (b"ts", b"5")],
            (b"types", b"t\nt"),
        ],
    ),
    (Kick("ada", None), [(b"kick", b'{"user": "ada", "channel": null}')]),
    (Kick(7, "a"), [(b"kick", b'{"user": 7, "channel": "a"}')]),
    (None, [(b"begin", b"")]),
]


@pytest.mark.parametrize(("content", "expected"), OLD)
def test_an_entry_that_older_versions_know_is_as_they_write_it(content: Any, expected: list[Any]) -> None:
    entry = Entry(PUBLISHER, 3, content)
    fields = dict([(b"v", b"1"), (b"p", b"0123456789abcdef"), (b"n", b"3"), *expected])
    assert to_fields(entry) == fields
    assert read_fields(fields) == entry


@pytest.mark.parametrize("version", [b"1", b"2"])
def test_what_an_entry_does_not_say_is_json(version: bytes) -> None:
    fields = fields_of(batch_of("1", "2")) | {b"v": version}
    assert not {b"k", b"j", b"u"} & fields.keys()
    assert read_fields(fields) == Entry(PUBLISHER, 3, batch_of("1", "2"))


# -- what cannot be read -----------------------------------------------------------------------------------------------

TEXT = fields_of(batch_of(check_text("a"), check_text("b"), join="\n"))
LONE = fields_of(batch_of(check_text("a")))
MIXED = fields_of(batch_of(check_text("a"), "1", event_type="mixed"))
USERS_ENTRY = fields_of(batch_of("1", audience=(7, "ada")))


def without(fields: dict[bytes, bytes], name: bytes) -> dict[bytes, bytes]:
    return {other: value for other, value in fields.items() if other != name}


MALFORMED = {
    "a kind too few": TEXT | {b"k": b"t"},
    "a kind too many": TEXT | {b"k": b"ttt"},
    "no kind": TEXT | {b"k": b""},
    "an unknown kind": LONE | {b"k": b"x"},
    "a kind of two bytes": LONE | {b"k": "é".encode()},
    "kinds that are not UTF-8": LONE | {b"k": b"\xff"},
    "text and JSON": TEXT | {b"k": b"tj"},
    "text and JSON without a join": without(TEXT, b"j") | {b"k": b"jt"},
    "JSON with a join": TEXT | {b"k": b"jj"},
    "texts without a join": without(TEXT, b"j"),
    "one JSON with a join": without(LONE, b"k") | {b"j": b"", b"e": b"1"},
    "a text that is a number": LONE | {b"e": b"1"},
    "a text that is an array": LONE | {b"e": b'["a"]'},
    "a text that is null": LONE | {b"e": b"null"},
    "a text that is no JSON": LONE | {b"e": b"a"},
    "a text with NUL": LONE | {b"e": b'"\\u0000"'},
    "a text with half a character": LONE | {b"e": b'"\\ud83d"'},
    "a text of another text": LONE | {b"e": b'"a" "b"'},
    "a join with NUL": TEXT | {b"j": b"\0"},
    "a join that is not UTF-8": TEXT | {b"j": b"\xff"},
    "mixed: a join": MIXED | {b"j": b""},
    "mixed: only texts and a join": MIXED | {b"j": b"", b"k": b"tt", b"e": b'"a"\n"b"'},
    "mixed: a kind too few": MIXED | {b"k": b"t"},
    "mixed: a text that is a number": MIXED | {b"k": b"jt"},
    "an unknown version": TEXT | {b"v": b"3"},
    "no version": without(TEXT, b"v"),
}


@pytest.mark.parametrize("users", [None, b"[7]", b'["ada", 7]', b"[]", b"null"])
@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
def test_what_cannot_be_read_is_known_by_its_number_and_whom_it_was_for(
    fields: dict[bytes, bytes], users: bytes | None
) -> None:
    if users is not None:
        fields = without(fields, b"c") | {b"u": users}
    entry = read_fields(fields)
    assert entry is not None
    assert entry[:2] == (PUBLISHER, 3)
    assert isinstance(entry.content, Unreadable)
    assert entry.content.audience == ("a" if users is None else EVERY_USER)
    assert 0 < len(entry.content.reason) <= 200


@pytest.mark.parametrize(
    "users",
    [
        b"",
        b"7",
        b'"ada"',
        b"null",
        b'{"7": 1}',
        b"[]",
        b"[null]",
        b"[true]",
        b"[7.0]",
        b'[["ada"]]',
        b'[""]',
        b"[7, {}]",
        b'["' + b"x" * 257 + b'"]',
        b"[1" + b"0" * 256 + b"]",
        b"[1" + b"0" * 5_000 + b"]",
        json.dumps([*range(1_001)]).encode(),
        b"[" * 100_000,
        b"[7",
        b"\xff",
    ],
    ids=lambda users: repr(users[:20]),
)
def test_users_that_are_malformed_are_all_users(users: bytes) -> None:
    for fields in (USERS_ENTRY | {b"u": users}, USERS_ENTRY | {b"u": users, b"v": b"3", b"c": b"a"}):
        entry = read_fields(fields)
        assert entry is not None
        assert isinstance(entry.content, Unreadable)
        assert entry.content.audience == audience_of(fields) == EVERY_USER


def test_the_archive_knows_the_users_of_what_cannot_be_read() -> None:
    assert audience_of(USERS_ENTRY | {b"v": b"3", b"e": b"?"}) == (7, "ada")
    assert audience_of(USERS_ENTRY | {b"u": b'["ada", 7, "ada"]'}) == (7, "ada")


@pytest.mark.parametrize("number", [b"0", b"3"])
def test_an_entry_for_users_without_a_number_is_of_others(number: bytes) -> None:
    entry = read_fields(USERS_ENTRY | {b"n": number, b"k": b"?"})
    assert (entry is None) == (number == b"0")
