"""Windows of texts: what is joined into one event, in which order, and how large it may be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher import Batch, BatchOptions, ConfigurationError, InvalidEventError, Text
from sse_batcher.batching.window import NOW, Windows
from sse_batcher.event import Event, text_bytes
from sse_batcher.wire import batch_block

from .kit.batching import SteppedBatcher
from .kit.sse_parser import parse


def summary(batches: list[Batch]) -> list[tuple[str, list[Any], str, str | None]]:
    """The type, data, reason and join of each batch."""
    return [(batch.type, [event.data for event in batch.events], batch.reason, batch.join) for batch in batches]


def arrived(batches: list[Batch]) -> list[tuple[str, str]]:
    """The type and data of each batch, as a client gets it."""
    return [(event.type, event.data) for batch in batches for event in parse(batch_block(batch, "e-1"), strict=True)]


def sent_with(*data: Any, event_type: str = "row", **options: Any) -> list[Batch]:
    """The batches that these events of one type become, all of them enqueued at once."""
    batcher = SteppedBatcher(**options)
    for each in data:
        batcher.enqueue(event_type, each)
    batcher.advance(10)
    return batcher.batches


# -- texts and JSON ----------------------------------------------------------------------------------------------------


def test_the_texts_of_a_window_are_one_event_of_the_same_type() -> None:
    batches = sent_with(Text("<p>1</p>"), Text("<p>2</p>"), Text("<p>3</p>"))
    assert summary(batches) == [("row", ["<p>1</p>", "<p>2</p>", "<p>3</p>"], "time_window", "\n")]
    assert arrived(batches) == [("row", "<p>1</p>\n<p>2</p>\n<p>3</p>")]


def test_one_text_is_sent_as_it_is() -> None:
    assert arrived(sent_with(Text("<p>1</p>"))) == [("row", "<p>1</p>")]


@pytest.mark.parametrize("text_first", [True, False])
def test_an_event_of_the_other_kind_closes_the_window_at_once(text_first: bool) -> None:
    batcher = SteppedBatcher()
    one, other = (Text("a"), 1) if text_first else (1, Text("a"))
    batcher.enqueue("row", one)
    batcher.enqueue("row", one)
    batcher.step()
    assert batcher.batches == []
    batcher.advance(0.05)
    batcher.enqueue("row", other)
    batcher.step()
    assert [(batch.reason, len(batch.events)) for batch in batcher.batches] == [("kind", 2)]
    batcher.advance(0.099)
    assert len(batcher.batches) == 1
    batcher.advance(0.001)  # the window of the other kind has its own time
    assert [batch.reason for batch in batcher.batches] == ["kind", "time_window"]


def test_the_order_holds_between_texts_and_json_of_one_type() -> None:
    batches = sent_with(Text("a"), Text("b"), 1, Text("c"), 2, 3, Text("d"))
    assert [data for _, data, _, _ in summary(batches)] == [["a", "b"], [1], ["c"], [2, 3], ["d"]]
    assert [batch.reason for batch in batches] == [*["kind"] * 4, "time_window"]
    assert [batch.join for batch in batches] == ["\n", None, "\n", None, "\n"]


def test_the_thread_is_woken_for_an_event_of_the_other_kind_alone() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("row", Text("a"))
    batcher.step()
    for data, wakes in [(Text("b"), 0), (1, 1)]:
        woken = batcher.worker.wakes
        batcher.enqueue("row", data)
        assert batcher.worker.wakes - woken == wakes


def test_a_json_string_is_no_text() -> None:
    batches = sent_with("a", Text("a"))
    assert summary(batches) == [("row", ["a"], "kind", None), ("row", ["a"], "time_window", "\n")]
    assert arrived(batches) == [("row", '"a"'), ("row", "a")]


def test_texts_of_other_types_and_channels_close_no_window() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("row", 1)
    batcher.enqueue("note", Text("a"))
    batcher.enqueue("row", Text("b"), channel="other")
    batcher.enqueue("row", 2)
    batcher.advance(1)
    assert [len(batch.events) for batch in batcher.batches] == [2, 1, 1]
    assert "kind" not in {batch.reason for batch in batcher.batches}


def test_without_windows_each_text_is_a_batch() -> None:
    for options in ({"batch_window": 0}, {"max_batch_size": 1}):
        batches = sent_with(Text("a"), 1, Text("b"), **options)
        assert summary(batches) == [("row", [data], "size_limit", None) for data in ("a", 1, "b")]
        assert arrived(batches) == [("row", "a"), ("row", "1"), ("row", "b")]


def test_a_window_of_texts_is_full_at_the_same_number_of_events() -> None:
    batches = sent_with(*map(Text, "abcde"), max_batch_size=2)
    assert arrived(batches) == [("row", "a\nb"), ("row", "c\nd"), ("row", "e")]
    assert [batch.reason for batch in batches] == ["size_limit", "size_limit", "time_window"]


# -- leading, critical, mixed ------------------------------------------------------------------------------------------


def test_a_leading_text_goes_out_at_once_and_the_next_ones_are_joined() -> None:
    batches = sent_with(*map(Text, "abc"), leading=True)
    assert summary(batches) == [("row", ["a"], "leading", None), ("row", ["b", "c"], "time_window", "\n")]


def test_with_leading_an_event_of_the_other_kind_begins_no_pause() -> None:
    batches = sent_with(Text("a"), 1, 2, Text("b"), Text("c"), 3, leading=True)
    assert [(batch.reason, len(batch.events)) for batch in batches] == [
        ("leading", 1),  # then a window is open, whose first event may be of either kind
        ("kind", 2),
        ("kind", 2),
        ("time_window", 1),
    ]


def test_critical_texts_come_right_after_what_waits() -> None:
    batcher = SteppedBatcher(critical_types={"alarm"})
    for event_type, data in [("row", Text("a")), ("row", Text("b")), ("alarm", Text("<b>fire</b>")), ("row", 1)]:
        batcher.enqueue(event_type, data)
    batcher.step()
    assert arrived(batcher.batches) == [("row", "a\nb"), ("alarm", "<b>fire</b>")]
    assert [batch.reason for batch in batcher.batches] == ["critical", "critical"]
    batcher.enqueue("alarm", Text("again"))
    batcher.step()
    assert arrived(batcher.batches)[2:] == [("row", "1"), ("alarm", "again")]


def test_a_critical_event_for_a_user_closes_the_windows_of_this_user_and_of_all_clients() -> None:
    options = BatchOptions(critical_types={"alarm"})
    windows = Windows(options)
    for audience in ((7,), ("ada",), (7, "ada"), (8, "ada"), "default", "*"):
        windows.add(Event("row", audience, Text("a")), options.rules("row"), None, 0.0)
    windows.add(Event("alarm", ("bob", 7), Text("!")), options.rules("alarm"), None, 0.0)
    assert [closed.audience for closed in windows.closed] == [(7,), (7, "ada"), "*", ("bob", 7)]
    windows.closed.clear()
    windows.add(Event("alarm", "*", Text("!")), options.rules("alarm"), None, 0.0)
    assert [closed.audience for closed in windows.closed] == [("ada",), (8, "ada"), "default", "*"]


def test_users_in_one_window_are_those_of_each_event() -> None:
    options = BatchOptions()
    windows = Windows(options)
    for audience, text in [((7,), "a"), ((8,), "b"), ((7,), "c"), ((7, 8), "d")]:
        windows.add(Event("row", audience, Text(text)), options.rules("row"), None, 0.0)
    windows.close_due(0.1)
    assert [(closed.audience, [event.body for event in closed.events]) for closed in windows.closed] == [
        ((7,), ["a", "c"]),
        ((8,), ["b"]),
        ((7, 8), ["d"]),
    ]


def test_mixed_windows_take_texts_and_json_together() -> None:
    batcher = SteppedBatcher(mixed=True)
    for event_type, data in [("row", Text("<b>\n")), ("row", "<b>\n"), ("log", {"text": 1}), ("row", Text("é"))]:
        batcher.enqueue(event_type, data)
    batcher.advance(1)
    (batch,) = batcher.batches
    assert (batch.type, batch.reason, batch.join) == ("mixed", "time_window", None)
    (event,) = parse(batch_block(batch, "e-1"), strict=True)
    assert event.type == "mixed_batch"
    assert event.json["events"] == [
        {"type": "row", "text": "<b>\n"},
        {"type": "row", "data": "<b>\n"},
        {"type": "log", "data": {"text": 1}},
        {"type": "row", "text": "é"},
    ]


def test_one_text_of_a_mixed_window_is_sent_as_it_is() -> None:
    assert arrived(sent_with(Text("<b>\n"), mixed=True)) == [("row", "<b>\n")]


# -- join --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        ("", "abc"),
        (" ", "a b c"),
        ("\n", "a\nb\nc"),
        ("\r", "a\nb\nc"),
        ("\r\n", "a\nb\nc"),
        ("\n\r", "a\n\nb\n\nc"),
        ("<hr>\r\n", "a<hr>\nb<hr>\nc"),
        ("\u2028", "a\u2028b\u2028c"),
        ("😀", "a😀b😀c"),
    ],
)
def test_join_comes_between_the_texts(join: str, expected: str) -> None:
    assert arrived(sent_with(*map(Text, "abc"), join=join)) == [("row", expected)]
    of_type = {"join": "other", "per_type": {"row": {"join": join}, "log": {"join": "|"}}}
    assert arrived(sent_with(*map(Text, "abc"), **of_type)) == [("row", expected)]
    assert arrived(sent_with(*map(Text, "abc"), event_type="log", **of_type)) == [("log", "a|b|c")]
    assert arrived(sent_with(*map(Text, "abc"), event_type="note", **of_type)) == [("note", "aotherbotherc")]


@pytest.mark.parametrize("join", [None, 1, b"\n", ["\n"], "\0", "a\0", "\ud800", "a\udfffb"])
def test_a_join_that_cannot_be_sent_is_refused_at_the_start(join: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^join\b") as caught:
        BatchOptions(join=join)
    assert caught.value.option == "join"
    with pytest.raises(ConfigurationError, match=r"^per_type\['token'\]: join") as caught:
        BatchOptions(per_type={"token": {"join": join}})
    assert caught.value.option == "per_type"


def test_a_join_that_ends_in_cr_is_no_crlf_together_with_a_text() -> None:
    assert arrived(sent_with(Text("a"), Text("\nb"), join="\r")) == [("row", "a\n\nb")]


def test_empty_texts_are_joined_as_all_others() -> None:
    assert arrived(sent_with(Text(""), Text(""), Text("a"), Text(""))) == [("row", "\n\na\n")]
    assert arrived(sent_with(Text(""), Text(""), join="")) == [("row", "")]


def test_tokens_of_a_model_become_words_again() -> None:
    tokens = ["Gr", "üße", ",", " ", "Welt", "\n", "\n", "👩\u200d", "👧", "\u0301"]
    batches = sent_with(*map(Text, tokens), per_type={"token": {"join": ""}}, event_type="token")
    assert arrived(batches) == [("token", "Grüße, Welt\n\n👩\u200d👧\u0301")]


# -- sizes -------------------------------------------------------------------------------------------------------------

MOST = 200
PIECES = ["a", "é", "€", "😀", "\n", "x" * 10]


def data_size(batch: Batch) -> int:
    """The bytes of the data on the wire, by its lines: each but the first counts its line end and its ``data: ``."""
    (event,) = parse(batch_block(batch, "e-1"), strict=True)
    lines = event.data.split("\n")
    return sum(len(line.encode()) for line in lines) + (len(lines) - 1) * len("\ndata: ")


@given(
    texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), min_size=1, max_size=12),
    join=st.sampled_from(["", "\n", ", ", "é\n\n"]),
    excess=st.sampled_from([0, 1]),
)
def test_a_window_of_texts_is_full_at_exactly_its_bytes(texts: list[str], join: str, excess: int) -> None:
    # One more text fills what the others have left, to the byte.
    texts = ["first", *texts]
    used = sum(map(text_bytes, texts)) + len(texts) * text_bytes(join)
    options = {"max_frame_bytes": used + 1_000, "max_batch_size": 100, "join": join}
    batches = sent_with(*map(Text, texts), Text("x" * (1_000 + excess)), **options)
    assert [len(batch.events) for batch in batches] == [len(texts) + 1] if not excess else [len(texts), 1]
    assert [batch.reason for batch in batches] == ["size_limit"] * excess + ["time_window"]
    if not excess:
        assert data_size(batches[0]) == used + 1_000


@pytest.mark.parametrize("piece", PIECES)
def test_the_largest_text_is_counted_in_bytes_of_the_wire(piece: str) -> None:
    count = MOST // text_bytes(piece)
    (batch,) = sent_with(Text(piece * count), max_frame_bytes=MOST)
    assert data_size(batch) == count * text_bytes(piece) <= MOST
    batcher = SteppedBatcher(max_frame_bytes=count * text_bytes(piece) - 1)
    message = f"^the data has {count * text_bytes(piece)} bytes of text on the wire, more than max_frame_bytes="
    with pytest.raises(InvalidEventError, match=message) as caught:
        batcher.enqueue("row", Text(piece * count))
    assert caught.value.field == "data"
    assert (batcher.get_stats().refused, batcher.get_stats().enqueued) == (1, 0)


def test_line_ends_are_refused_by_what_they_would_take_and_not_by_their_number() -> None:
    batcher = SteppedBatcher()
    for end in ("\n", "\r", "\r\n"):
        with pytest.raises(InvalidEventError, match=r"1835008 bytes of text on the wire, more than .*=262144\. Let"):
            batcher.enqueue("row", Text(end * 262_144))
    most = 262_144 // len("\ndata: ")
    batcher.enqueue("row", Text("\n" * most))
    batcher.advance(1)
    assert data_size(batcher.batches[0]) == most * len("\ndata: ") > 262_144 - len("\ndata: ")


def test_pending_texts_count_as_the_bytes_that_they_take_on_the_wire() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("row", 1)
    object_bytes = batcher.get_stats().pending_bytes - len("1")
    for text in ("a", "é", "😀\n", "\n" * 10):
        before = batcher.get_stats().pending_bytes
        batcher.enqueue("row", Text(text), key="all of them")
        assert batcher.get_stats().pending_bytes - before == text_bytes(text) + object_bytes
    batcher.step()
    assert batcher.get_stats().pending_bytes == text_bytes("\n" * 10) + object_bytes  # the last one has replaced them
    batcher.advance(1)
    assert batcher.get_stats().pending_bytes == 0


def test_the_thread_is_needed_at_once_when_a_window_of_texts_may_be_full() -> None:
    options = BatchOptions(max_frame_bytes=100, batch_window=1)
    windows, rules = Windows(options), options.rules("row")
    event = Event("row", "default", Text("x" * 40))
    windows.add(event, rules, None, 0.0)
    assert windows.due(event, rules, 1, 60, 0.5) == 1.0
    assert windows.due(event, rules, 1, 61, 0.5) == NOW
