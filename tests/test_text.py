"""Text on its way to a client: what is refused, what goes over the wire, and what arrives."""

from __future__ import annotations

import copy
import enum
import http.client
import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup
from werkzeug.local import LocalProxy

from sse_batcher import SSE, Batch, BatchOptions, Event, EventBatcher, InvalidEventError, SSEManager, Text
from sse_batcher.encoding import encode_json
from sse_batcher.event import check_text
from sse_batcher.wire import Frame, batch_block, block, event_block

from .kit.flask_apps import MakeApp, apps_fixture
from .kit.sse_parser import EventStreamParser, ServerEvent, parse, take_events
from .kit.waiting import TIMEOUT

make_app = apps_fixture()

# What breaks streams of text: line ends of the format and of others, fields, a byte order mark, and characters that
# are several: letters with marks, families, flags.
NASTY = "a\r\n\r\n\n\rid: 7\nevent: x\n: y\u2028\x85\v\ufeffe\u0301\u0308👩\u200d👩\u200d👧🇨🇭\U0010ffff<b>&\\\"' \t"
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
LISTS = st.lists(TEXTS, min_size=1, max_size=5)


def as_it_arrives(text: str) -> str:
    return re.sub("\r\n|\r|\n", "\n", text)


def batch_of(*texts: str, event_type: str = "row", join: str | None = "\n") -> Batch:
    """A batch as a window makes it."""
    events = tuple(Event(event_type, "default", check_text(text)) for text in texts)
    return Batch("default", event_type, events, "manual", 1, None if join is None else check_text(join))


def frame_of(*texts: str, **more: Any) -> Frame:
    return Frame(batch_of(*texts, **more), (7,), "e-7")


# -- what goes in comes out --------------------------------------------------------------------------------------------


@given(LISTS, st.sampled_from(["", "\n", "é\r\n", "\r"]), st.sampled_from(["row", "message"]), st.integers(1, 9))
@example([NASTY, NASTY], "", "message", 1)
@example([" ", "  x", ":"], "\n", "row", 1)
def test_texts_arrive_as_they_are_but_for_their_line_ends(
    texts: list[str], join: str, event_type: str, step: int
) -> None:
    frame = frame_of(*texts, event_type=event_type, join=join)
    expected = [as_it_arrives(text) for text in texts]
    assert parse(frame.plain, strict=True, step=step) == [
        ServerEvent(event_type, as_it_arrives(join).join(expected), "e-7")
    ]
    ids = [*(f"e-7.{count}" for count in range(1, len(texts))), "e-7"]
    alone = [ServerEvent(event_type, text, id) for text, id in zip(expected, ids, strict=True)]
    assert parse(frame.unbatched, strict=True, step=step) == alone
    for part in range(len(texts)):
        assert parse(frame.rest(part), strict=True, step=step) == alone[part:]


@given(LISTS)
def test_the_texts_of_a_mixed_batch_arrive_as_they_are(texts: list[str]) -> None:
    batch = Batch("default", "mixed", batch_of(*texts, "and one more").events, "manual", 1)
    (event,) = parse(batch_block(batch, "e-1"), strict=True)
    assert [item["text"] for item in event.json["events"]] == [as_it_arrives(each) for each in [*texts, "and one more"]]
    assert event.data.isascii()


def test_every_character_but_nul_and_surrogates_survives_as_text() -> None:
    everything = "".join(chr(code) for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF)
    (event,) = parse(frame_of(everything).plain, strict=True)
    assert event.data == as_it_arrives(everything)


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("texts", [["😀"], [NASTY, "", NASTY], ["a", "b"]], ids=["one", "several", "ASCII"])
def test_a_chunk_has_as_many_bytes_as_it_says(texts: list[str], batches: bool) -> None:
    frame = frame_of(*texts)
    whole = frame.encoded(batches=batches, chunked=True) + b"0\r\n\r\n"
    response = http.client.HTTPResponse(_Socket(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + whole))  # type: ignore[arg-type]
    response.begin()
    assert response.read() == frame.encoded(batches=batches, chunked=False)


class _Socket:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


# -- cut at each byte --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "batch=0"])
def test_a_connection_that_is_cut_at_any_byte_loses_no_text(batches: bool) -> None:
    windows = [[NASTY], ["é\u0301😀", "👩\u200d👧", "\r\n🇨🇭\n"], ["end"]]
    with SSEManager(batching=BatchOptions(batch_window=10)) as manager:
        client = manager.subscribe(batches=batches)
        for texts in windows:
            for text in texts:
                manager.enqueue("message", Text(text))
            assert manager.flush_all(TIMEOUT)
        expected = [as_it_arrives(text) for texts in windows for text in texts]
        if batches:
            expected = ["\n".join(map(as_it_arrives, texts)) for texts in windows]
        stream = b"".join(bytes_until_end(client, "end"))
        assert texts_of(parse(stream, strict=True)) == expected
        for cut in range(len(stream)):
            parser = EventStreamParser()
            before = parser.feed(stream[:cut])
            if not before:
                continue  # the browser has no cursor yet
            again = manager.subscribe(batches=batches, last_event_id=before[-1].id)
            opened, *after = parse(b"".join(bytes_until_end(again, "end", texts_of(before))), strict=True)
            again.close()
            assert opened.type == "sse_open", cut
            assert texts_of(before) + texts_of(after) == expected, cut
        client.close()


def texts_of(events: list[ServerEvent]) -> list[str]:
    return [event.data for event in events if event.type == "message"]


def bytes_until_end(client: Iterator[bytes], last: str, before: list[str] | None = None) -> Iterator[bytes]:
    """What the client gets up to this text; only the first block if the text came before."""
    yield next(client)
    while last not in (before or [])[-1:]:
        data = next(client)
        yield data
        if texts_of(parse(data))[-1:] == [last]:
            return


# -- the type message --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [{"n": 1}, Text("<b>1</b>")], ids=["JSON", "text"])
def test_an_event_of_the_type_message_has_no_event_line(data: Any) -> None:
    body = data if isinstance(data, Text) else encode_json(data)
    event = Event("message", "default", body)
    expected = f"data: {body}\nid: e-1\n\n".encode()
    assert event_block(event, "e-1") == expected
    assert batch_block(Batch("default", "message", (event,), "manual", 1), "e-1") == expected
    assert batch_block(Batch("default", "mixed", (event,), "manual", 1), "e-1") == expected
    assert parse(expected, strict=True) == [("message", body, "e-1")]


def test_a_batch_of_messages_has_an_event_line_if_it_is_json() -> None:
    events = (Event("message", "default", "1"), Event("message", "default", "2"))
    batch = Batch("default", "message", events, "manual", 1)
    assert batch_block(batch, "e-1").startswith(b'event: message_batch\ndata: {"type":"message_batch","batchSize":2,')
    assert Frame(batch, (1,), "e-1").unbatched == b"data: 1\nid: e-1.1\n\ndata: 2\nid: e-1\n\n"
    assert frame_of("a", "b", event_type="message").plain == b"data: a\ndata: b\nid: e-7\n\n"


@pytest.mark.parametrize("event_type", ["Message", "message ", "messages"])
def test_a_type_that_only_looks_like_message_has_its_line(event_type: str) -> None:
    assert block(event=event_type, data="1") == f"event: {event_type}\ndata: 1\n\n".encode()


# -- what is refused ---------------------------------------------------------------------------------------------------

NUL = r"^the text contains NUL, which cannot be sent: remove it$"
SURROGATE = (
    r"^the text contains the lone surrogate '\\u%s', which is not UTF-8: remove it, or decode .* errors='replace'$"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\0", NUL),
        ("a" * 1_000 + "\0", NUL),
        ("é\0", NUL),
        ("\ud800", SURROGATE % "d800"),
        ("a\udfff\n", SURROGATE % "dfff"),
        ("\ude00\ud83d", SURROGATE % "de00"),
        (b"\xff".decode(errors="surrogateescape"), SURROGATE % "dcff"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_what_to_do(text: str, message: str) -> None:
    with SSEManager(batching=BatchOptions(batch_window=10)) as manager:
        calls: list[Callable[[], Any]] = [
            lambda: manager.enqueue("message", Text(text)),
            lambda: manager.enqueue("message", Text(text), user=7),
            lambda: manager.broadcast("message", Text(text), key=1),
            lambda: manager.snapshot(lambda: [("message", Text(text))]),
        ]
        for call in calls:
            with pytest.raises(InvalidEventError, match=message) as caught:
                call()
            assert caught.value.field == "data"
            str(caught.value).encode()  # can be logged
        assert (manager.get_stats().refused, manager.get_stats().enqueued) == (3, 0)
    with EventBatcher(print) as batcher, pytest.raises(InvalidEventError, match=message):
        batcher.enqueue("message", Text(text))


# -- what is a text ----------------------------------------------------------------------------------------------------


class Said(Text):
    """A text with a mind of its own."""

    def __str__(self) -> str:
        return "another\0text"

    def replace(self, *_: Any) -> str:  # type: ignore[override]
        return "\ud800"


class Row(Text, enum.Enum):
    EMPTY = "<tr>\r\n</tr>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (Said("a\r\nb"), "a\nb"),
        (Row.EMPTY, "<tr>\n</tr>"),
        (LocalProxy(lambda: Text("a\r")), "a\n"),
        (LocalProxy(lambda: Text("a")), "a"),
    ],
)
def test_a_text_of_a_subclass_or_behind_a_proxy_is_its_characters(text: Text, expected: str) -> None:
    taken = check_text(text)
    assert type(taken) is Text
    assert str.__str__(taken) == expected
    batches: list[Batch] = []
    with EventBatcher(batches.append) as batcher:
        batcher.enqueue("row", text)
    assert parse(batch_block(batches[0], "e-1"), strict=True) == [("row", expected, "e-1")]


def test_html_that_is_no_text_is_refused() -> None:
    markup = Markup("<b>{}</b>").format("<script>")
    batches: list[Batch] = []
    message = r"^the data is HTML \(Markup\): send it as Text\(html\), or as a JSON string with str\(html\)$"
    with EventBatcher(batches.append, BatchOptions(dedup_key=None)) as batcher:
        with pytest.raises(InvalidEventError, match=message) as caught:
            batcher.enqueue("row", markup)
        assert caught.value.field == "data"
        batcher.enqueue("row", Text(markup))
        batcher.enqueue("row", {"inside": markup})
        assert batcher.get_stats().refused == 1
    assert [batch.events[0].body for batch in batches] == [
        "<b>&lt;script&gt;</b>",
        '{"inside":"<b>&lt;script&gt;</b>"}',
    ]
    with SSEManager() as manager, pytest.raises(InvalidEventError, match=message):
        manager.snapshot(lambda: [("row", markup)])


@pytest.mark.parametrize("what", [None, 7, b"<b>", {"a": 1}, ["a"]])
def test_a_text_is_made_from_a_str(what: Any) -> None:
    with pytest.raises(
        InvalidEventError, match=rf"^a Text is made from a str, not from {type(what).__name__}$"
    ) as caught:
        Text(what)
    assert caught.value.field == "data"


def test_a_text_is_a_str_that_can_be_copied_and_sent_elsewhere() -> None:
    text = Text("a\n")
    assert text == "a\n"
    assert json.dumps({"text": text}) == '{"text": "a\\n"}'
    for other in (copy.copy(text), copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert (type(other), other) == (Text, text)
    assert not vars(Text).get("__dict__")
    with pytest.raises(AttributeError):
        text.escaped = True  # type: ignore[attr-defined]


def test_a_text_passes_no_encoder() -> None:
    def refuse(data: Any) -> str:
        raise AssertionError(data)

    batches: list[Batch] = []
    with EventBatcher(batches.append, encode=refuse) as batcher:
        batcher.enqueue("row", Text("é"))
    assert [event.data for event in batches[0].events] == ["é"]


@given(TEXTS)
@example(NASTY)
def test_an_event_shows_its_text(text: str) -> None:
    event = Event("row", "team-7", check_text(text))
    assert event.is_text
    assert type(event.data) is Text
    assert event.data == event.body == as_it_arrives(text)
    assert json.loads(event.json) == as_it_arrives(text)
    assert event.json.isascii()
    assert (event.channel, event.users) == ("team-7", ())


@pytest.mark.parametrize(
    ("audience", "channel", "users"), [("*", "*", ()), ("a", "a", ()), ((7, "7"), None, (7, "7")), ((), None, ())]
)
def test_events_and_batches_name_a_channel_or_users(audience: Any, channel: Any, users: Any) -> None:
    event = Event("row", audience, '{"a":1}')
    batch = Batch(audience, "row", (event,), "manual", 1)
    for thing in (event, batch):
        assert (thing.audience, thing.channel, thing.users) == (audience, channel, users)
    assert (event.is_text, event.data, event.json) == (False, {"a": 1}, '{"a":1}')
    assert event.data is not event.data


# -- snapshots ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_may_have_texts() -> None:
    with SSEManager() as manager:
        state = [("row", Text("<tr>\r\n😀</tr>")), ("row", "<tr>"), ("message", Text(""))]
        snapshot = manager.snapshot(lambda: state)
        assert snapshot.blocks.decode() == (
            f'event: row\ndata: <tr>\ndata: 😀</tr>\n\nevent: row\ndata: "<tr>"\n\ndata: \nid: {snapshot.cursor}\n\n'
        )
        client = manager.subscribe(snapshot=snapshot)
        assert [event.data for event in take_events(client, 4)][1:] == ["<tr>\n😀</tr>", '"<tr>"', ""]


def test_the_functions_of_an_app_may_return_texts(make_app: MakeApp) -> None:
    app, sse = make_app()
    states = {
        "own": ("message", Text("<b>its own</b>")),
        "default": ("message", Text("<b>default</b>")),
        "user": ("note", Text("for\nada")),
    }
    sse.authorize(lambda channels: channels)
    sse.identify(lambda: "ada")
    sse.snapshot("own")(lambda: states["own"])
    sse.snapshot(lambda channel: states[channel])
    sse.user_snapshot(lambda user: states["user"])
    with app.test_client().get("/events?channel=own&channel=default") as response:
        _opened, *events = parse(next(iter(response.response)), strict=True)  # type: ignore[arg-type]
    assert [(event.type, event.data) for event in events] == list(states.values())
    assert isinstance(sse, SSE)


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_type", ["row", "message"])
@pytest.mark.parametrize("join", ["", "\n", "😀\n"])
@pytest.mark.parametrize("texts", [["a", "b"], ["é\n", "\n\n", "😀", ""], ["x" * 1_000] * 3])
def test_what_joining_texts_has_saved_is_counted_to_the_byte(texts: list[str], join: str, event_type: str) -> None:
    frame = frame_of(*texts, event_type=event_type, join=join)
    alone = sum(len(block(event=event_type, data=text, id="e-7")) for text in texts)
    assert frame.saved_bytes == alone - len(frame.plain)
    assert frame_of(texts[0]).saved_bytes == 0


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
def test_a_frame_counts_the_memory_of_its_texts(character: str) -> None:
    for count in (1, 1_000, 100_000):
        # One wide character makes all others of its text as wide.
        frame = frame_of(character * count, character * count + "x", "x" * count + character)
        plain = len(frame.plain)
        memory = sum(sys.getsizeof(event.body) for event in frame.batch.events)
        assert plain + memory <= frame.held_bytes <= plain + 4 * (3 * count + 2) + 1_500


def test_a_frame_of_ascii_text_counts_its_bytes_twice_as_one_of_json_does() -> None:
    text = frame_of("x" * 100)
    data = Frame(Batch("default", "row", (Event("row", "default", "x" * 100),), "manual", 1), (7,), "e-7")
    assert len(text.plain) == len(data.plain)
    assert text.held_bytes == data.held_bytes
    more = frame_of("x" * 1_100)
    assert len(more.plain) - len(text.plain) == 1_000
    assert more.held_bytes - text.held_bytes == 2 * 1_000
