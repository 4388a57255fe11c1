"""The wire format, read by a parser that was written from the standard alone."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sse_batcher import Batch, BatchOptions, Event, InvalidEventError, Text
from sse_batcher.batching.window import Closed, Windows
from sse_batcher.encoding import encode_json
from sse_batcher.event import Audience, Users, check_channel, check_type
from sse_batcher.wire import (
    HEARTBEAT,
    Frame,
    batch_block,
    block,
    chunk,
    control,
    control_data,
    envelope_bytes,
    mixed_bytes,
)

from .kit.sse_parser import EventStreamParser, GrammarError, ServerEvent, parse

REASONS = ("time_window", "size_limit", "leading", "critical", "manual", "shutdown")
# Characters that other software takes for a line end, and others that have broken event streams.
NASTY = ["\n", "\r", "\r\n", "\0", "\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\ufeff", ":", " ", "\n\n", "\r\r"]

nasty_text = st.lists(st.sampled_from([*NASTY, "data: x", "id: 1", "é", "😀", "a"])).map("".join)
texts = st.text() | nasty_text
types = texts.map(lambda text: re.sub("[\r\n\0]", "", text)).filter(bool)
ids = st.text("ABCxyz019._~-", min_size=1, max_size=128)
retries = st.none() | st.integers(0, 10**9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def lines_of(text: str) -> str:
    """The text as it arrives: every line end becomes LF."""
    return re.sub("\r\n|\r|\n", "\n", text)


def batch_from(closed: Closed) -> Batch:
    """The batch of a window, with the largest timestamp."""
    return Batch(closed.audience, closed.type, closed.events, closed.reason, 10**13 - 1, closed.join)


def data_bytes(sent: bytes) -> int:
    """The bytes that the data of a block takes on the wire: each line has its ``data: ``, the first is not counted."""
    lines = [line for line in sent.split(b"\n") if line.startswith(b"data: ")]
    return sum(len(line) for line in lines) + len(lines) - 1 - len(b"data: ")


def batch_of(*values: Any, event_type: str = "log", batch_type: str | None = None, reason: str = "manual") -> Batch:
    events = tuple(Event(event_type, "default", encode_json(value)) for value in values)
    return Batch("default", batch_type or event_type, events, reason, 1767225600000)


# -- the parser, by the standard's own examples ------------------------------------------------------------------------

EXAMPLES = [
    ("data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10", "")]),
    (
        ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n",
        [("message", "first event", "1"), ("message", "second event", "")],
    ),
    ("data\n\ndata\ndata\n\ndata:", [("message", "", ""), ("message", "\n", "")]),
    ("data:test\n\ndata: test\n\n", [("message", "test", ""), ("message", "test", "")]),
    ("event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n", [("add", "73857293", ""), ("remove", "2153", "")]),
    ("\ufeffdata: after a byte order mark\n\n", [("message", "after a byte order mark", "")]),
    ("data: x\n\n\ufeffdata: no mark here\n\n", [("message", "x", "")]),
    ("id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n", [("message", "a", "1"), ("message", "b", "1")]),
    ("event: no data\nid: 7\n\ndata: x\n\n", [("message", "x", "7")]),
    ("data: x\nfoo: y\n:z\n\n", [("message", "x", "")]),
]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("step", [None, 1, 2, 3])
@pytest.mark.parametrize(("text", "events"), EXAMPLES)
def test_the_parser_reads_the_examples_of_the_standard(text: str, events: list, step: int | None, end: str) -> None:
    assert parse(text.replace("\n", end).encode(), step=step) == events


def test_the_parser_takes_a_retry_of_digits_only() -> None:
    parser = EventStreamParser()
    parser.feed(b"retry: 1500\nretry: 9x\nretry:\nretry: -1\nretry: \xd9\xa1\n")
    assert parser.retry == 1500


def test_the_parser_does_not_wait_for_the_lf_of_a_crlf() -> None:
    assert EventStreamParser().feed(b"data: x\r\n\r") == [("message", "x", "")]


def test_the_parser_replaces_what_is_not_utf8() -> None:
    assert parse(b"data: a\xff\xc3\n\n") == [("message", "a\ufffd\ufffd", "")]


@pytest.mark.parametrize(
    "stream",
    [
        b"foo: x\n\n",
        b"foo\n\n",
        b"data: x",
        b"data: x\n",
        b"data: x\n\n\n",
        b"event: x\n\n",
        b"retry: x\ndata: x\n\n",
        b"id: \0\ndata: x\n\n",
        b"data: \xff\n\n",
    ],
)
def test_the_strict_parser_refuses_what_no_server_should_send(stream: bytes) -> None:
    with pytest.raises((GrammarError, UnicodeDecodeError)):
        parse(stream, strict=True)


# -- blocks ------------------------------------------------------------------------------------------------------------


@given(types, texts, retries, st.none() | ids, st.sampled_from([1, 2, 7, None]))
@example("a:b", "\r\n\n\r", 0, "-", 1)
@example(" x", " y", 0, "~", 1)
@example("\ufeff", "\ufeff", None, None, 1)
def test_what_goes_in_comes_out(event: str, data: str, retry: int | None, id: str | None, step: int | None) -> None:
    sent = block(event=event, data=data, retry=retry, id=id)
    assert parse(sent * 2, strict=True, step=step) == [ServerEvent(event, lines_of(data), id or "")] * 2
    parser = EventStreamParser(strict=True)
    parser.feed(sent)
    assert parser.retry == retry


def test_every_character_there_is_survives_in_the_data() -> None:
    everything = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF)
    (event,) = parse(block(event="all", data=everything), strict=True)
    assert event.data == lines_of(everything)


def test_a_block_has_event_then_retry_then_data_then_id_last() -> None:
    assert block(event="log", data="1\n2", retry=5, id="e-1") == b"event: log\nretry: 5\ndata: 1\ndata: 2\nid: e-1\n\n"


def test_a_block_without_retry_and_id_has_neither_line() -> None:
    assert block(event="log", data="") == b"event: log\ndata: \n\n"


@pytest.mark.parametrize("step", [1, None])
def test_a_heartbeat_disturbs_no_block_and_is_none(step: int | None) -> None:
    plain = block(event="log", data="1", id="e-1")
    head, tail = plain.split(b"\n", 1)
    inside = head + b"\n" + HEARTBEAT + tail
    assert parse(HEARTBEAT + inside + HEARTBEAT, strict=True, step=step) == parse(plain)


def test_a_heartbeat_is_one_colon_and_a_line_feed() -> None:
    assert HEARTBEAT == b":\n"


@pytest.mark.parametrize("event", ["sse_open", "sse_gap", "sse_busy", "sse_bye"])
def test_a_control_block_is_event_retry_data_id(event: str) -> None:
    sent = control(event, control_data({"heartbeat": 15.0, "reason": "x"}), retry=1234, id="5f3a9c1e-42")
    assert sent.decode() == (
        f'event: {event}\nretry: 1234\ndata: {{"heartbeat":15.0,"reason":"x"}}\nid: 5f3a9c1e-42\n\n'
    )


def test_a_control_block_without_a_position_has_no_id_line() -> None:
    assert control("sse_busy", control_data({}), retry=1, id=None) == b"event: sse_busy\nretry: 1\ndata: {}\n\n"


# -- injection ---------------------------------------------------------------------------------------------------------

ATTACKS = [f"x{end}data: forged{end}{end}" for end in NASTY]
LINE_ENDS = ["\n", "\r", "\r\n", "\0"]


@pytest.mark.parametrize("end", LINE_ENDS)
def test_a_type_with_a_line_end_or_nul_is_refused_by_the_encoder_itself(end: str) -> None:
    with pytest.raises(InvalidEventError, match="CR, LF or NUL") as caught:
        block(event=f"x{end}data: forged", data="")
    assert caught.value.field == "type"


def test_an_empty_type_is_refused() -> None:
    with pytest.raises(InvalidEventError, match="empty"):
        block(event="", data="")


@pytest.mark.parametrize("end", LINE_ENDS)
def test_a_name_with_a_line_end_or_nul_gets_as_far_as_no_encoder(end: str) -> None:
    for check in (check_type, check_channel):
        with pytest.raises(InvalidEventError, match="control characters"):
            check(f"x{end}data: forged")


@pytest.mark.parametrize("name", ["x\u2028data: forged", "x\u2029y"])
def test_a_separator_that_only_unicode_knows_is_part_of_the_type(name: str) -> None:
    assert parse(block(event=check_type(name), data="1"), strict=True) == [(name, "1", "")]


@pytest.mark.parametrize("attack", ATTACKS)
def test_data_forges_nothing(attack: str) -> None:
    assert parse(block(event="log", data=attack), strict=True) == [("log", lines_of(attack), "")]
    assert parse(block(event="log", data=encode_json(attack)), strict=True)[0].json == attack


@pytest.mark.parametrize("id", [*ATTACKS, *NASTY, "", "a\n", "é", "x" * 129, "1" * 10_000])
def test_an_id_outside_its_grammar_is_refused(id: str) -> None:
    with pytest.raises(InvalidEventError, match="id is 1 to 128") as caught:
        block(event="log", data="", id=id)
    assert caught.value.field == "id"
    assert repr(id[:200]) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("retry", ["1", "1\ndata: forged", -1, 1.5, True, float("nan")])
def test_a_retry_that_is_no_whole_number_is_refused(retry: Any) -> None:
    with pytest.raises(InvalidEventError, match="whole number of milliseconds") as caught:
        block(event="log", data="", retry=retry)
    assert caught.value.field == "retry"


def test_a_lone_surrogate_is_refused_in_every_field() -> None:
    for wrong in ({"event": "\ud800", "data": ""}, {"event": "x", "data": "\udfff"}):
        with pytest.raises(InvalidEventError, match=r"a lone surrogate cannot be sent: it is not UTF-8$") as caught:
            block(**wrong)
        assert caught.value.field == "data"


# -- batches -----------------------------------------------------------------------------------------------------------


def test_one_event_is_sent_as_if_there_were_no_batching() -> None:
    assert batch_block(batch_of({"server": "a"}), "e-1") == b'event: log\ndata: {"server":"a"}\nid: e-1\n\n'


def test_one_event_of_a_mixed_window_is_sent_as_if_there_were_no_batching() -> None:
    assert batch_block(batch_of(1, batch_type="mixed"), "e-1") == b"event: log\ndata: 1\nid: e-1\n\n"


def test_several_events_are_one_block_with_the_envelope_of_the_contract() -> None:
    assert batch_block(batch_of({"server": "a"}, {"server": "b"}, reason="time_window"), "5f3a9c1e-42") == (
        b"event: log_batch\n"
        b'data: {"type":"log_batch","batchSize":2,"events":[{"server":"a"},{"server":"b"}],"reason":"time_window",'
        b'"timestamp":1767225600000}\n'
        b"id: 5f3a9c1e-42\n\n"
    )


@given(types, st.lists(json_values, min_size=2, max_size=5), st.sampled_from(REASONS), st.sampled_from([1, None]))
def test_an_envelope_has_exactly_its_five_keys_in_order(
    event_type: str, values: list, reason: str, step: int | None
) -> None:
    sent = batch_block(batch_of(*values, event_type=event_type, reason=reason), "e-1")
    (event,) = parse(sent, strict=True, step=step)
    assert event.type == event_type + "_batch"
    assert list(event.json) == ["type", "batchSize", "events", "reason", "timestamp"]
    assert event.json == {
        "type": event_type + "_batch",
        "batchSize": len(values),
        "events": values,
        "reason": reason,
        "timestamp": 1767225600000,
    }
    assert event.data.isascii()


@given(st.lists(st.tuples(types, json_values), min_size=2, max_size=5))
def test_a_mixed_batch_has_type_and_data_of_each_event_in_order(pairs: list) -> None:
    events = tuple(Event(name, "default", encode_json(value)) for name, value in pairs)
    (event,) = parse(batch_block(Batch("default", "mixed", events, "manual", 1), "e-1"), strict=True)
    assert event.type == event.json["type"] == "mixed_batch"
    assert [list(item) for item in event.json["events"]] == [["type", "data"]] * len(pairs)
    assert [(item["type"], item["data"]) for item in event.json["events"]] == pairs


@given(json_values)
def test_a_batch_holds_the_very_text_that_a_plain_event_would_carry(value: Any) -> None:
    plain = parse(batch_block(batch_of(value), "e-1"), strict=True)[0].data
    batched = parse(batch_block(batch_of(value, value), "e-1"), strict=True)[0].data
    assert f'"events":[{plain},{plain}],' in batched


# -- sizes -------------------------------------------------------------------------------------------------------------


@given(
    types,
    st.lists(json_values, min_size=2, max_size=12),
    st.sampled_from(REASONS),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_sizes_are_never_counted_too_low_and_hardly_too_high(
    event_type: str, values: list, reason: str, mixed: bool, extra: int
) -> None:
    batch = batch_of(*values, event_type=event_type, batch_type="mixed" if mixed else None, reason=reason)
    limit = len(values) + extra
    counted = envelope_bytes(batch.type, limit) + sum(len(event.json) + 1 for event in batch.events)
    if mixed:
        counted += mixed_bytes(event_type) * len(values)
    actual = len(parse(batch_block(batch, "e-1"))[0].data.encode())
    assert 0 <= counted - actual <= 20


# Up to 62 bytes of data, as text or as JSON.
JSON_BODIES = st.integers(0, 60).map(lambda size: json.dumps("x" * size))
TEXT_BODIES = st.lists(st.sampled_from(["a", "é", "\u2028", "😀", "\n", "xxxxxxxxx"]), max_size=6).map(
    lambda pieces: Text("".join(pieces))
)


def calls_with(bodies: st.SearchStrategy[str]) -> st.SearchStrategy[list]:
    # A size of at least 8 makes 24 the usual one. Windows that close because of their size need so many.
    keys = st.sampled_from([None, None, None, "k"])
    return st.lists(st.tuples(st.sampled_from("aab"), bodies, keys), min_size=8, max_size=40)


@given(
    calls=calls_with(TEXT_BODIES) | calls_with(JSON_BODIES) | calls_with(TEXT_BODIES | JSON_BODIES),
    audience=st.sampled_from(["default", "*", (7, "ada")]),
    max_frame_bytes=st.sampled_from([64, 80, 150, 400]),
    max_batch_size=st.sampled_from([2, 12, 1_000]),
    join=st.sampled_from(["\n", "", "é\n\n"]),
    mixed=st.booleans(),
    leading=st.booleans(),
)
def test_no_frame_is_larger_than_it_may_be(calls: list, audience: Audience, **rules: Any) -> None:
    options = BatchOptions(critical_types=(), **rules)
    windows = Windows(options)
    for number, (name, body, key) in enumerate(calls):
        windows.add(Event(name, audience, body), options.rules(name), key, number * 0.001)
    windows.close_all("time_window", 10.0)
    for closed in windows.closed:
        sent = batch_block(batch_from(closed), "e-1")
        assert data_bytes(sent) <= options.max_frame_bytes


@pytest.mark.parametrize("count", [2, 9, 10, 99, 100, 1_000, 10_000])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_digits_of_a_full_batch_are_counted(count: int, mixed: bool) -> None:
    batch = batch_of(*[0] * count, batch_type="mixed" if mixed else None, reason="time_window")
    per_event = len("0,") + (mixed_bytes("log") if mixed else 0)
    actual = len(parse(batch_block(batch, "e-1"))[0].data)
    assert 0 <= envelope_bytes(batch.type, count) + per_event * count - actual <= 5


@pytest.mark.parametrize("mixed", [True, False])
def test_a_window_of_many_small_events_closes_before_its_frame_is_too_large(mixed: bool) -> None:
    for max_frame_bytes in range(150, 350):
        options = BatchOptions(max_frame_bytes=max_frame_bytes, max_batch_size=1_000, mixed=mixed)
        windows = Windows(options)
        for _ in range(200):
            windows.add(Event("log", "default", "0"), options.rules("log"), None, 0.0)
        batches = [batch_from(closed) for closed in windows.closed]
        sizes = [len(parse(batch_block(batch, "e-1"))[0].data) for batch in batches]
        # No smaller than one event and what the envelope may grow by, either.
        assert max_frame_bytes - 40 <= min(sizes) <= max(sizes) <= max_frame_bytes


def test_a_frame_is_encoded_once_for_all_clients() -> None:
    frame = Frame(batch_of(1, 2), 7, "e-7")
    assert frame.plain == batch_block(frame.batch, "e-7")
    assert frame.plain is frame.plain


@pytest.mark.parametrize("values", [(1,), (1, 2, 3)])
def test_a_variant_is_shared_until_it_is_dropped(values: tuple[int, ...]) -> None:
    frame = Frame(batch_of(*values), 7, "e-7")
    plain, unbatched = batch_block(frame.batch, "e-7"), frame.rest(0)
    expected = {
        (True, False): plain,
        (True, True): chunk(plain),
        (False, False): unbatched,
        (False, True): chunk(unbatched),
    }

    def made() -> dict[tuple[bool, bool], bytes]:
        return {which: frame.encoded(batches=which[0], chunked=which[1]) for which in expected}

    first = made()
    assert first == expected
    assert all(again is first[which] for which, again in made().items())
    frame.drop_variants()
    assert made() == expected
    assert frame.unbatched == unbatched
    assert frame.encoded(batches=True, chunked=False) is frame.plain
    assert frame.encoded(batches=True, chunked=True) is not frame.encoded(batches=True, chunked=True)


def test_one_event_has_the_same_bytes_with_and_without_batches() -> None:
    frame = Frame(batch_of(1), (7,), "e-7")
    assert frame.unbatched is frame.plain
    assert frame.encoded(batches=False, chunked=True) is frame.encoded(batches=True, chunked=True)


def test_blocks_of_single_events_are_made_once_for_both_framings(monkeypatch: pytest.MonkeyPatch) -> None:
    frame, made, rest = Frame(batch_of(1, 2), (7,), "e-7"), [], Frame.rest
    monkeypatch.setattr(Frame, "rest", lambda self, part: made.append(part) or rest(self, part))
    assert frame.encoded(batches=False, chunked=True) == chunk(frame.unbatched)
    assert made == [0]


def test_a_frame_has_the_time_of_its_batch_unless_it_is_given_one() -> None:
    assert [Frame(batch_of(1), (7,), "e-7", time).time for time in (None, 5, 0)] == [1767225600000, 5, 0]


def test_what_batching_has_saved_is_counted_to_the_byte() -> None:
    lone, batched = Frame(batch_of("x"), (7,), "e-7"), Frame(batch_of(*["x" * 100] * 9), (7,), "e-7")
    assert lone.saved_bytes == 0
    alone = b"".join(block(event=event.type, data=event.json, id="e-7") for event in batched.batch.events)
    assert batched.saved_bytes == len(alone) - len(batched.plain)


def test_a_batch_of_two_events_saves_or_costs_bytes() -> None:
    frame = Frame(batch_of(1, 2), (7,), "e-7")
    assert frame.saved_bytes == len(frame.unbatched) - len("e-7.1") + len("e-7") - len(frame.plain)


def test_what_batching_has_saved_is_computed_once_for_all_clients() -> None:
    frame = Frame(batch_of(*range(100)), (7,), "e-7")
    assert frame.saved_bytes > 256  # of such a number, each computation makes a new object
    assert frame.saved_bytes is frame.saved_bytes


def test_a_frame_counts_its_text_twice_and_its_objects_once_it_is_encoded() -> None:
    frames = [Frame(batch_of(*range(count)), (7,), "e-7") for count in (1, 101)]
    assert [frame.held_bytes for frame in frames] == [0, 0]
    objects = []
    for frame in frames:
        text = len(frame.plain)
        objects.append(frame.held_bytes - 2 * text)
    assert 0 < objects[0] < 1_000  # those of a frame with one event
    large = Frame(batch_of("x" * 100_000), (7,), "e-7")
    assert large.held_bytes == 0 < len(large.plain)
    assert large.held_bytes - 2 * len(large.plain) == objects[0]
    assert 100 * 50 < objects[1] - objects[0] < 100 * 200  # 100 more events


@pytest.mark.parametrize("count", [10, 1_000])
def test_the_users_of_each_event_are_counted(count: int) -> None:
    def held(users: list[Users]) -> int:
        frame = Frame(Batch(users[0], "t", tuple(Event("t", each, "1") for each in users), "manual", 0), (1,), "x-1")
        _ = frame.plain
        return frame.held_bytes

    users = tuple(f"user-{number}" for number in range(count))
    copies = [tuple(f"user-{number}" for number in range(count)) for _ in range(5)]
    assert held(copies) - held([users] * 5) == 4 * count * 100
