"""Streams that are compressed: what a client decompresses is the stream that others get, wherever it is cut."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from flask import Flask
from flask_compress import Compress
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from sse_batcher import SSE, BatchOptions, ClientOptions, HistoryOptions, SSEManager, Text, wire
from sse_batcher.event import Audience, Batch, Event
from sse_batcher.manager_state import process_of
from sse_batcher.streams.client import QueueClient
from sse_batcher.streams.history import ResumePoint, Slice
from sse_batcher.testing import open_stream
from sse_batcher.transports.server import ServerInfo
from sse_batcher.wire import GZIP_HEADERS, GZIP_START, HEADERS, HEARTBEAT, Frame, deflated, stored
from sse_batcher.wsgi import accepts_gzip, stream

from .kit import site as kit
from .kit import takeover
from .kit.delivery import Delivery, Numbers
from .kit.site import Site
from .kit.sse_parser import ServerEvent, parse
from .kit.takeover import CHUNKED, head, take_over
from .kit.waiting import TIMEOUT

exchange = takeover.exchange
make_site = kit.make_site

VARY = ("Vary", "Accept-Encoding")
OPTIONS: dict[str, Any] = {"compress": ["a", "b"], "retry_ms": 500, "heartbeat": 0.001}


def inflate(data: bytes) -> bytes:
    """What a client can read that has got so much of a stream."""
    return zlib.decompressobj(wbits=31).decompress(data)


# -- parts of a compressed stream --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.binary(max_size=300), st.booleans())))
def test_parts_of_both_kinds_follow_each_other_and_each_can_be_read_at_once(
    parts: Sequence[tuple[bytes, bool]],
) -> None:
    decompress = zlib.decompressobj(wbits=31).decompress
    assert decompress(GZIP_START) == b""
    for data, compressed in parts:
        part = deflated(data) if compressed else stored(data)
        assert decompress(part) == data
        assert deflated(data) == deflated(data)
        assert len(deflated(data)) <= len(stored(data))


def test_other_compressors_are_not_taken_for_ours() -> None:
    blocks = b"event: sse_open\ndata: 1\n\n"
    assert wire.begins_compressed(GZIP_START + stored(blocks))
    assert not any(wire.begins_compressed(gzip.compress(blocks, level, mtime=0)) for level in range(1, 10))
    assert not wire.begins_compressed(blocks)


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 200_000])
def test_what_is_stored_may_be_long(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert inflate(GZIP_START + stored(data)) == inflate(GZIP_START + deflated(data)) == data


def test_a_part_refers_to_nothing_that_a_client_got_before() -> None:
    """It would be much shorter."""
    part = deflated(b"event: x\ndata: the same again\n\n" * 2)
    assert inflate(GZIP_START + part) == inflate(GZIP_START + part + part)[: len(inflate(GZIP_START + part))]
    assert inflate(GZIP_START + part * 3) == inflate(GZIP_START + part) * 3


# -- frames ------------------------------------------------------------------------------------------------------------


def frame_of(size: int = 3, audience: Audience = "a", position: int = 1) -> Frame:
    events = tuple(Event("t", audience, f'"some words, number {number}"') for number in range(size))
    return Frame(Batch(audience, "t", events, "manual", 0), position, f"x-{position}")  # type: ignore[arg-type]


def test_a_frame_is_compressed_once_for_each_form_that_clients_need(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []

    def count(data: bytes) -> bytes:
        made.append(data)
        return deflated(data)

    monkeypatch.setattr(wire, "deflated", count)
    frame = frame_of()
    frame.compress(unbatched=True)
    forms = [(batches, chunked) for batches in (True, False) for chunked in (True, False)]
    first = [frame.encoded(batches=batches, chunked=chunked, gzipped=True) for batches, chunked in forms]
    again = [frame.encoded(batches=batches, chunked=chunked, gzipped=True) for batches, chunked in forms]
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert made == [frame.plain, frame.unbatched]
    assert inflate(GZIP_START + first[1]) == frame.plain
    assert inflate(GZIP_START + first[3]) == frame.unbatched
    assert [first[0], first[2]] == [wire.chunk(first[1]), wire.chunk(first[3])]


def test_a_frame_keeps_what_it_was_compressed_to_and_counts_it_as_its_memory() -> None:
    frame, other = frame_of(), frame_of()
    assert frame.plain == other.plain
    frame.compress(unbatched=True)
    parts = [frame.encoded(batches=batches, chunked=False, gzipped=True) for batches in (True, False)]
    for _ in range(2):
        assert frame.held_bytes - other.held_bytes == sum(len(part) + 33 for part in parts)
        frame.compress(unbatched=True)
    frame.drop_variants()
    again = [frame.encoded(batches=batches, chunked=False, gzipped=True) for batches in (True, False)]
    assert [one is other for one, other in zip(parts, again, strict=True)] == [True, True]


def test_blocks_without_batches_are_compressed_from_the_first_client_on_that_wants_them() -> None:
    delivery = Delivery(**OPTIONS)
    frames = [frame_of(9, "a", position) for position in range(1, 3)]
    delivery.hub.deliver(frames[0])
    client = delivery.connect("a", batches=False, gzipped=True, cursor="x-0")
    delivery.hub.deliver(frames[1])
    opened, *blocks = [next(client) for _ in range(3)]
    assert inflate(opened + b"".join(blocks)).endswith(frames[0].unbatched + frames[1].unbatched)
    assert blocks[0] == stored(frames[0].unbatched)
    assert len(blocks[1]) < 0.5 * len(blocks[0])


def test_a_frame_that_was_not_compressed_is_stored() -> None:
    frame = frame_of()
    assert frame.encoded(batches=True, chunked=False, gzipped=True) == stored(frame.plain)
    assert frame.encoded(batches=False, chunked=True, gzipped=True) == wire.chunk(stored(frame.unbatched))


def test_only_frames_of_named_channels_are_compressed() -> None:
    delivery = Delivery(compress=["a", "*"])
    forms = {}
    for audience in ("a", "*", "b", (7,)):
        frame = frame_of(9, audience)
        delivery.hub.deliver(frame)
        forms[audience] = frame.encoded(batches=True, chunked=False, gzipped=True)
        assert inflate(GZIP_START + forms[audience]) == frame.plain
    assert [len(forms[audience]) < 250 for audience in ("a", "*", "b", (7,))] == [True, True, False, False]


# -- the stream is the same --------------------------------------------------------------------------------------------

DO = st.one_of(
    st.tuples(st.just("deliver"), st.sampled_from(["a", "b", "*", "z"]), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("deliver"), st.sampled_from(["a", "b", "*"]), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("lose"), st.sampled_from(["a", "*"])),
    st.tuples(st.just("return"), st.integers(0, 60), st.integers(0, 3)),
    st.tuples(st.just("take")),
)
HISTORY = HistoryOptions(history_frames=8)


class Twins:
    """Two clients of one hub that do the same. One of them has a compressed stream."""

    def __init__(self, batches: bool, poll: bool) -> None:
        self.delivery = Delivery(HISTORY, queue_frames=3, **OPTIONS)
        self.kind = {"batches": batches, "poll": poll}
        self.clients: list[QueueClient] = []
        self.connect(None)

    def connect(self, cursor: str | None) -> None:
        for client in self.clients:
            client.close()
        channels = ("a", "b")
        self.clients = [
            self.delivery.connect(*channels, cursor=cursor, gzipped=gzipped, **self.kind) for gzipped in (False, True)
        ]
        self.decompress = zlib.decompressobj(wbits=31).decompress

    def take(self) -> None:
        """Take all that there is. Both must get the same blocks."""
        while True:
            plain, compressed = (next(client, b"") for client in self.clients)
            assert self.decompress(compressed) == plain
            if plain in (b"", HEARTBEAT):
                return

    def do(self, name: str, *details: Any) -> None:
        if name == "take":
            self.take()
        elif name == "return":
            self.connect(f"x-{details[0]}" + (f".{details[1]}" if details[1] else ""))
        elif name == "lose":
            self.delivery.lose(*details)
        else:
            audience, size, texts = details
            self.delivery.position = number = self.delivery.position + 1
            bodies = [Text(f"row {number}\n<b>") if texts else f'["event", {number}, {part}]' for part in range(size)]
            events = tuple(Event("t", audience, body) for body in bodies)
            batch = Batch(audience, "t", events, "manual", 0, "--" if texts else None)
            self.delivery.hub.deliver(Frame(batch, number, f"x-{number}"))  # type: ignore[arg-type]


@given(st.lists(DO, max_size=25), st.booleans(), st.booleans())
@given_settings(max_examples=150, deadline=None)
def test_a_compressed_stream_is_the_plain_one(things: Sequence[tuple[Any, ...]], batches: bool, poll: bool) -> None:
    twins = Twins(batches, poll)
    for thing in things:
        twins.do(*thing)
    twins.take()
    twins.delivery.hub.close("shutdown")
    twins.take()


def detached(site: Site, cursor: str | None = None, *, gzipped: bool, chunked: bool = False, **kind: Any) -> Any:
    """The client's end of a stream of `a` and `b`."""
    client = site.delivery.connect("a", "b", cursor=cursor, gzipped=gzipped, **kind)
    first = next(client)
    return site.hand_over(client, wire.chunk(first) if chunked else first, chunked=chunked)


def received(connection: Any, *, gzipped: bool, chunked: bool) -> bytes:
    data: bytes = connection.recv(10_000_000)
    body = b""
    while chunked and data:
        size, _, data = data.partition(b"\r\n")
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
    body = body or data
    return inflate(body) if gzipped else body


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("batches", [True, False])
def test_a_detached_stream_is_the_plain_one(make_site: Callable[..., Site], batches: bool, chunked: bool) -> None:
    site = make_site(**OPTIONS | {"heartbeat": 1.0})
    site.hub.deliver(frame_of(3, "a", 1))
    site.delivery.position = 1
    both = [
        detached(site, cursor, gzipped=gzipped, chunked=chunked, batches=batches)
        for cursor in (None, "x-0", "x-1.2")
        for gzipped in (False, True)
    ]
    for position, audience in enumerate(("a", "b", "*", "z", "a"), 2):
        site.delivery.position = position
        site.hub.deliver(frame_of(position % 3 + 1, audience, position))
        site.loop.run()
    site.wait(1.2)
    site.delivery.lose("b")
    site.loop.run()
    site.hub.close("shutdown")
    site.loop.run()
    bodies = [received(each, gzipped=number % 2 == 1, chunked=chunked) for number, each in enumerate(both)]
    assert bodies[0::2] == bodies[1::2]
    assert all(HEARTBEAT in body and b"sse_gap" in body and b"sse_bye" in body for body in bodies)
    assert len(set(bodies[0::2])) == 3


@pytest.mark.parametrize("gzipped", [True, False])
def test_clients_whose_bytes_are_the_same_are_one_group(make_site: Callable[..., Site], gzipped: bool) -> None:
    site = make_site(**OPTIONS)
    _connections = [detached(site, gzipped=each) for each in (gzipped, not gzipped, gzipped)]
    site.loop.run()
    (feed,) = site.loop.feeds.values()
    assert sorted(len(group.in_step) for group in feed.channels["a"]) == [1, 2]


def test_a_rest_that_a_full_socket_has_left_over_is_sent_as_it_is(make_site: Callable[..., Site]) -> None:
    site = make_site(**OPTIONS)
    client = site.delivery.connect("a", "b", gzipped=True)
    connection = site.hand_over(client, next(client), small=True)
    site.loop.run()
    words = [f'"{zlib.crc32(bytes([number % 256]) * number):x}"' for number in range(6000)]  # hardly shorter in gzip
    events = tuple(Event("t", "a", word) for word in words)
    for position in range(1, 4):
        site.hub.deliver(Frame(Batch("a", "t", events, "manual", 0), position, f"x-{position}"))  # type: ignore[arg-type]
        site.loop.run()
    decompress = zlib.decompressobj(wbits=31).decompress
    text = b""
    while text.count(b"\n\n") < 4:
        text += decompress(connection.recv(1000))
        site.loop.run()
    assert [event.id for event in parse(text)] == ["x-0", "x-1", "x-2", "x-3"]
    assert site.hub.count()["overflows"] > 0


@pytest.mark.parametrize("batches", [True, False])
def test_a_stream_that_is_cut_anywhere_goes_on_without_loss_or_double(batches: bool) -> None:
    delivery = Delivery(**OPTIONS)
    client = delivery.connect("a", batches=batches, gzipped=True)
    for position in range(1, 5):
        delivery.hub.deliver(frame_of(position % 3 + 1, "a" if position % 2 else "*", position))
    delivery.position = 4
    whole = b"".join(next(client) for _ in range(5))
    expected = values(parse(inflate(whole)))
    assert len(expected) == 8
    for cut in range(len(GZIP_START), len(whole) + 1):
        before = parse(inflate(whole[:cut]))
        again = delivery.connect("a", cursor=before[-1].id if before else "x-0", batches=batches, gzipped=True)
        after = b""
        while (block := next(again)) != stored(HEARTBEAT):
            after += block
        again.close()
        opened, *rest = parse(inflate(after))
        assert opened.type == "sse_open"
        assert values(before) + values(rest) == expected


def values(events: Sequence[ServerEvent]) -> list[tuple[str, Any]]:
    """Each event, with the frame that it is of."""
    found: list[tuple[str, Any]] = []
    for event in events:
        if not event.type.startswith("sse_"):
            for value in event.json["events"] if event.type.endswith("_batch") else [event.json]:
                found.append((event.id.partition(".")[0], value))
    return found


def test_what_only_the_backend_still_has_is_compressed() -> None:
    class Archive(Numbers):
        def replay(self, channels: Any, cursor: ResumePoint, user: Any) -> Any:
            positions: Any = range(cursor.position + 1, 5)  # type: ignore[operator]
            return Slice([frame_of(9, "a", position) for position in positions], 4)  # type: ignore[arg-type]

    delivery = Delivery(HistoryOptions(history_frames=1), cursors=Archive(), **OPTIONS)
    for position in range(1, 5):
        delivery.hub.deliver(frame_of(9, "a", position))
    client = delivery.connect("a", cursor="x-0", gzipped=True)
    blocks = [next(client) for _ in range(5)]
    assert [event.id for event in parse(inflate(b"".join(blocks)))] == ["x-0", "x-1", "x-2", "x-3", "x-4"]
    assert all(len(block) < 250 for block in blocks)


# -- who gets it -------------------------------------------------------------------------------------------------------

ACCEPTED = [
    *("gzip", "GZIP", "x-gzip", "X-GZip", "gzip, deflate, br, zstd", "br;q=1.0, gzip;q=0.8, *;q=0.1", "gzip;q=0.001"),
    *("gzip;q=1", "gzip;q=1.000", "gzip ; Q=0.5", "gzip; q = 1", "deflate,gzip", "identity, gzip", " gzip ", ",,gzip,"),
    *("gzip, identity;q=0", "gzip;q=0.5, identity;q=0.5", "*;q=0, gzip", "gzip;q=1.0,*;q=0"),
]
REFUSED = [
    *("", "*", "*;q=1", "identity", "deflate, br", "gzip;q=0", "gzip;q=0.0", "gzip;q=0.000", "x-gzip;q=0", "nogzip"),
    *("gzipped", "gzip;q=", "gzip;q=x", "gzip;q=2", "gzip;q=-1", "gzip;q=1.5", "gzip;q=0.1234", "gzip;q=.5", "gzip;x"),
    *("gzip;q=1;q=0", "gzip gzip", "gzip;q=0.5, identity", "gzip;q=0, *", ";", ";q=1", "\xff", "gzip;q=\u0661"),
]


@pytest.mark.parametrize("header", ACCEPTED)
def test_a_client_that_names_gzip_gets_it(header: str) -> None:
    assert accepts_gzip(header)


@pytest.mark.parametrize("header", REFUSED)
def test_a_client_that_does_not_ask_for_gzip_gets_none(header: str) -> None:
    assert not accepts_gzip(header)


class Answer(NamedTuple):
    headers: list[tuple[str, str]]
    body: Iterator[bytes]
    close: Callable[[], None]

    @property
    def is_compressed(self) -> bool:
        return ("Content-Encoding", "gzip") in self.headers


def ask(manager: SSEManager, *channels: str, user: Any = None, snapshot: Any = None, **environ: str) -> Answer:
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "", "HTTP_ACCEPT_ENCODING": "gzip"} | environ
    status, headers, body = stream(manager, environ, channels, user=user, snapshot=snapshot)
    assert status == "200 OK"
    return Answer(headers, iter(body), getattr(body, "close", lambda: None))


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    clients = ClientOptions(compress=["a", "b"], max_clients=2)
    with SSEManager(batching=BatchOptions(batch_window=0), clients=clients) as manager:
        yield manager


def test_a_stream_says_that_it_is_compressed(manager: SSEManager) -> None:
    answer = ask(manager, "a")
    assert answer.headers == [*GZIP_HEADERS, VARY]
    assert dict(GZIP_HEADERS) == dict(HEADERS) | {"Content-Encoding": "gzip"}
    first = next(answer.body)
    assert first.startswith(GZIP_START)
    (opened,) = parse(inflate(first))
    assert opened.type == "sse_open"
    answer.close()


def test_one_for_a_client_without_gzip_says_that_others_get_another(manager: SSEManager) -> None:
    answer = ask(manager, "a", HTTP_ACCEPT_ENCODING="*")
    assert answer.headers == [*HEADERS, VARY]
    (opened,) = parse(next(answer.body))
    assert opened.type == "sse_open"
    answer.close()


def test_without_the_header_a_client_gets_none(manager: SSEManager) -> None:
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": ""}
    assert stream(manager, environ, ["a"])[1] == [*HEADERS, VARY]


@pytest.mark.parametrize(
    ("channels", "user"), [(("c",), None), (("a", "c"), None), (("a",), 7), (("a", "b"), "7"), ((), 7)]
)
def test_a_stream_with_others_channels_or_a_user_is_not_compressed(
    manager: SSEManager, channels: tuple[str, ...], user: Any
) -> None:
    answer = ask(manager, *channels, user=user)
    assert answer.headers == list(HEADERS)
    assert next(answer.body).startswith(b"event: sse_open\n")
    answer.close()


def test_nothing_is_compressed_unless_channels_are_named() -> None:
    with SSEManager() as manager:
        answer = ask(manager, "default")
        assert answer.headers == list(HEADERS)
        answer.close()


@pytest.mark.parametrize("accepts", ["gzip", "identity"])
def test_head_has_the_headers_of_get(manager: SSEManager, accepts: str) -> None:
    head, get = (ask(manager, "a", REQUEST_METHOD=method, HTTP_ACCEPT_ENCODING=accepts) for method in ("HEAD", "GET"))
    assert head.headers == get.headers
    assert list(head.body) == []


def test_a_snapshot_is_compressed(manager: SSEManager) -> None:
    state = [("row", f"some words, number {number}") for number in range(50)]
    answer = ask(manager, "a", snapshot=lambda: state)
    first = next(answer.body)
    opened, *rows = parse(inflate(first))
    assert [(row.type, row.json) for row in rows] == state
    assert len(first) < 1_000
    assert (opened.id, rows[-1].id != "") == ("", True)
    answer.close()


def test_a_busy_block_is_compressed(manager: SSEManager) -> None:
    answers = [ask(manager, "a") for _ in range(3)]
    *_, (busy,) = [parse(inflate(next(answer.body))) for answer in answers]
    assert (busy.type, busy.json) == ("sse_busy", {"reason": "limit"})
    assert list(answers[-1].body) == []
    for answer in answers:
        answer.close()


def test_a_busy_block_before_the_stream_is_compressed(manager: SSEManager, monkeypatch: pytest.MonkeyPatch) -> None:
    info = ServerInfo("gunicorn", None, None, lambda: False, False, lambda: 0)._replace(http2=True)
    monkeypatch.setattr("sse_batcher.wsgi.inspect_server", lambda environ: info)
    answer = ask(manager, "a")
    (busy,) = parse(inflate(b"".join(answer.body)))
    assert (answer.is_compressed, busy.json) == (True, {"reason": "http2"})


def test_a_poll_is_compressed_to_its_end(manager: SSEManager) -> None:
    answer = ask(manager, "a", QUERY_STRING="poll=1")
    (opened,) = parse(inflate(b"".join(answer.body)))
    manager.enqueue("t", 1, channel="a")
    assert manager.flush_all(TIMEOUT)
    again = ask(manager, "a", QUERY_STRING="poll=1", HTTP_LAST_EVENT_ID=opened.id)
    assert [event.type for event in parse(inflate(b"".join(again.body)))] == ["sse_open", "t"]


def test_what_is_sent_is_counted_as_it_goes_out(manager: SSEManager) -> None:
    answer = ask(manager, "a")
    size = len(next(answer.body))
    manager.enqueue("t", "some words " * 50, channel="a")
    block = next(answer.body)
    assert len(block) < 100
    assert manager.get_stats().bytes == size + len(block)
    answer.close()
    assert process_of(manager).hub.count()["frames"] == 1


def test_a_channel_named_by_a_wrong_value_is_refused_by_its_key() -> None:
    assert ClientOptions(compress=["a", "*"]).compress == frozenset({"a", "*"})


@pytest.fixture
def app() -> Iterator[Flask]:
    app = Flask(__name__)
    app.config.update(SSE_COMPRESS=["default"], SSE_CORS_ORIGINS=["https://a.example"])
    app.extensions["sse"] = sse = SSE(app)
    yield app
    sse.manager.shutdown()


def test_a_stream_of_an_app_depends_on_the_origin_and_the_encoding(app: Flask) -> None:
    headers = {"Accept-Encoding": "gzip", "Origin": "https://a.example"}
    answer = app.test_client().get("/events", headers=headers)
    assert answer.headers["Content-Encoding"] == "gzip"
    answer.close()
    assert sorted(name.lower() for name in answer.vary) == ["accept-encoding", "origin"]


def test_flask_compress_leaves_a_compressed_stream_alone(app: Flask) -> None:
    app.config["COMPRESS_MIMETYPES"] = ["text/event-stream"]
    Compress(app)
    answer = app.test_client().get("/events", headers={"Accept-Encoding": "gzip, br"})
    first = next(iter(answer.response))
    answer.close()
    assert answer.headers["Content-Encoding"] == "gzip"
    assert [event.type for event in parse(inflate(first))] == ["sse_open"]


def test_the_testing_kit_reads_a_compressed_stream(app: Flask) -> None:
    with open_stream(app.test_client(), "/events", headers={"Accept-Encoding": "gzip"}) as opened:
        app.extensions["sse"].enqueue("t", {"n": 1})
        assert opened.events() == []
        opened.clock.advance(0.1)
        assert opened.events() == [("t", {"n": 1})]


# -- a connection that is taken over -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coding", "start", "is_taken"),
    [(b"gzip", GZIP_START, True), (b"identity", b"", True), (b"gzip", b"", False), (b"identity", GZIP_START, False)],
)
def test_a_connection_is_taken_over_only_if_the_head_has_the_encoding_of_the_stream(
    exchange: Any, coding: bytes, start: bytes, is_taken: bool
) -> None:
    begun = take_over(exchange)
    prelude = start + stored(b"event: x\ndata\n\n")
    exchange.write(head(takeover.SSE, CHUNKED, b"Content-Encoding: " + coding) + wire.chunk(prelude))
    taken = begun.finish(prelude)
    assert (taken is not None) == is_taken
    if taken is not None:
        os.close(taken.fd)
