"""Streams over HTTP, from outside: what is sent, what is understood of the answer, and when it gives up."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher import SSE, parser
from sse_batcher.parser import Block, Comment
from sse_batcher.remote.message import (
    MAX_STEP_BYTES,
    RemoteError,
    ResponseReader,
    make_request,
    parse_header,
)
from sse_batcher.remote.stream import RemoteStream, connect
from sse_batcher.testing import live_server

from .kit.scripted_server import HEAD, holding, resetting, scripted_server, sending
from .kit.servers import SERVERS, serving
from .kit.waiting import TIMEOUT

CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def items_of(stream: RemoteStream) -> list[Block | Comment]:
    """All that comes until the end."""
    items = []
    while (piece := stream.read(TIMEOUT)) is not None:
        items += piece.items
    return items


def types_until(stream: RemoteStream, last: str) -> list[str]:
    """The types of the blocks up to one of this type."""
    types: list[str] = []
    while last not in types:
        piece = stream.read(TIMEOUT)
        assert piece is not None
        types += [item.type for item in piece.items if isinstance(item, Block)]
    return types


# -- the request -------------------------------------------------------------------------------------------------------


def lines_of(url: str, **options: object) -> list[str]:
    return make_request(url, **options).head.decode("latin-1").split("\r\n")  # type: ignore[arg-type]


def test_a_request_asks_for_a_stream_that_nothing_changes() -> None:
    request = make_request("http://example.com:8000/events?channel=a&channel=b#part")
    assert (request.host, request.port, request.tls) == ("example.com", 8000, False)
    assert lines_of(request.url) == [
        "GET /events?channel=a&channel=b HTTP/1.1",
        "Host: example.com:8000",
        "Accept: text/event-stream",
        "Accept-Encoding: identity",
        "Cache-Control: no-cache",
        "User-Agent: sse_batcher",
        "",
        "",
    ]


def test_headers_replace_the_usual_ones_whatever_their_case() -> None:
    lines = lines_of(
        "https://x", headers=[("host", "y"), ("Cookie", "a=1"), ("Cookie", "b=2")], token="t", cursor="c-1"
    )
    assert lines[0] == "GET / HTTP/1.1"
    assert "host: y" in lines
    assert "Host: x" not in lines
    assert lines[lines.index("Authorization: Bearer t") :][:2] == ["Authorization: Bearer t", "Last-Event-ID: c-1"]
    assert lines[-4:-2] == ["Cookie: a=1", "Cookie: b=2"]


def test_letters_that_a_url_cannot_have_are_escaped() -> None:
    request = make_request("http://b\u00fccher.example/caf\u00e9 x?channel=\u00e9 %20")
    assert request.host == "xn--bcher-kva.example"
    assert request.head.startswith(b"GET /caf%C3%A9%20x?channel=%C3%A9%20%20 HTTP/1.1\r\n")
    assert lines_of("http://[::1]:99/")[1] == "Host: [::1]:99"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "events",
        "ftp://x/",
        "http://",
        "http://x:port/",
        "http://a:b@x/",
        "http://x:99999/",
        "http://[::1/",
        "http://x/\udce9",
    ],
)
def test_a_url_that_cannot_be_asked_is_refused_in_words(url: str) -> None:
    with pytest.raises(RemoteError, match="URL") as caught:
        make_request(url)
    assert caught.value.stage == "arguments"


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "\u00fc..b"])
def test_a_host_that_no_name_can_be_is_refused_in_words(host: str) -> None:
    with pytest.raises(RemoteError, match="is not the name of a host"):
        make_request(f"http://{host}/")


@pytest.mark.parametrize("header", [("a b", "c"), ("", "c"), ("A", "b\r\nC: d"), ("A", "b\0"), ("A", "\u20ac")])
def test_a_header_cannot_break_out_of_its_line(header: tuple[str, str]) -> None:
    with pytest.raises(RemoteError, match="not valid"):
        make_request("http://x", headers=[header])
    with pytest.raises(RemoteError, match="not valid"):
        make_request("http://x", cursor="a\nb")


def test_a_header_is_written_with_a_colon() -> None:
    assert parse_header("Cookie: a=b: c ") == ("Cookie", "a=b: c")
    for line in ["Cookie", ": x", "a b: c"]:
        with pytest.raises(RemoteError, match="Name: value"):
            parse_header(line)


def test_an_error_about_a_url_does_not_show_its_token() -> None:
    for url in ("ftp://a/?token=secret", "http://[::1/?token=secret"):
        with pytest.raises(RemoteError, match=r"token=\.\.\.") as caught:
            make_request(url)
        assert "secret" not in str(caught.value)


# -- the answer --------------------------------------------------------------------------------------------------------


def test_an_answer_is_understood_in_pieces_of_any_size() -> None:
    body = b"data: 1\n\n" * 3
    informational = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    answers = {
        b"Transfer-Encoding: chunked\r\n\r\n9;name=value\r\n%b\r\n12\r\n%b\r\n0\r\nTrailer: x\r\n\r\n"
        % (body[:9], body[9:]): True,
        b"Content-Length: 27\r\n\r\n%b" % body: True,
        b"\r\n%b" % body: False,
    }
    for answer, has_end in answers.items():
        whole = informational + HEAD + answer
        for step in range(1, len(whole) + 1):
            reader = ResponseReader()
            assert b"".join(reader.feed(whole[at : at + step]) for at in range(0, len(whole), step)) == body
            assert reader.is_complete is has_end
            reader.close()
            assert reader.is_complete
            assert reader.head is not None
            assert reader.head[:3] == ("HTTP/1.1", 200, "OK")


@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_answer_raises_anything_but_its_own_error(data: bytes, step: int) -> None:
    for begin in (b"", CHUNKED, HEAD + b"Content-Encoding: gzip\r\n\r\n", b"HTTP/1.1 200 OK\r\n"):
        whole = begin + data
        reader = ResponseReader()
        with suppress(RemoteError):
            for at in range(0, len(whole), step):
                reader.feed(whole[at : at + step])


def test_an_answer_to_head_has_no_body() -> None:
    reader = ResponseReader("HEAD")
    reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
    assert reader.is_complete


def test_a_compressed_body_comes_in_steps_however_short_it_was() -> None:
    size = 3 * MAX_STEP_BYTES + 7
    reader = ResponseReader()
    body = gzip.compress(b":\n" * (size // 2) + b"\n")
    pieces = [reader.feed(HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))]
    while reader.has_more:
        pieces.append(reader.feed(b""))
    assert [len(piece) for piece in pieces] == [MAX_STEP_BYTES] * 3 + [7]
    assert reader.is_complete


@pytest.mark.parametrize("kept", [0, 1])
def test_the_last_step_is_not_forgotten(kept: int) -> None:
    coder = zlib.compressobj(wbits=31)
    flushed = coder.compress(b"x" * (MAX_STEP_BYTES + kept)) + coder.flush(zlib.Z_SYNC_FLUSH)
    reader = ResponseReader()
    body = reader.feed(HEAD + b"Content-Encoding: gzip\r\n\r\n" + flushed)
    while reader.has_more:
        body += reader.feed(b"")
    assert len(body) == MAX_STEP_BYTES + kept


def test_what_follows_a_compressed_body_is_not_kept() -> None:
    reader = ResponseReader()
    assert reader.feed(HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"data: 1\n\n")) == b"data: 1\n\n"
    more = b"x" * 1_000_000
    tracemalloc.start()
    try:
        assert b"".join(reader.feed(more) for _ in range(10)) == b""
        assert tracemalloc.get_traced_memory()[0] < len(more)
    finally:
        tracemalloc.stop()


# -- over a connection -------------------------------------------------------------------------------------------------


def test_each_piece_has_its_blocks_and_its_time() -> None:
    go = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + b"3\r\n:\nd\r\n")
        assert go.wait(TIMEOUT)
        connection.sendall(b"6\r\nata: 1\r\n2\r\n\n\n\r\n0\r\n\r\n")

    with scripted_server(script) as server, connect(make_request(server.url)) as stream:
        assert stream.is_stream
        assert stream.began < stream.answered
        first = stream.read(TIMEOUT)
        assert first is not None
        assert (first.body, first.items) == (b":\nd", [Comment("")])
        before = time.monotonic()
        assert stream.read(0.05) is None
        assert stream.end is None
        go.set()
        second = stream.read(TIMEOUT)
        assert second is not None
        assert second.at > before + 0.05
        assert items_of(stream) == [] or second.items == [Block("message", "1", "", False)]
        assert stream.end == "complete"


@pytest.mark.parametrize(
    ("head", "end"),
    [(CHUNKED, "closed"), (HEAD + b"Content-Length: 99\r\n\r\n", "closed"), (HEAD + b"\r\n", "complete")],
)
def test_the_end_says_whether_the_answer_was_complete(head: bytes, end: str) -> None:
    with scripted_server(sending(head, b"")) as server, connect(make_request(server.url)) as stream:
        assert items_of(stream) == []
        assert stream.end == end
        assert stream.read(TIMEOUT) is None


def test_a_broken_connection_is_an_end() -> None:
    go = threading.Event()
    with scripted_server(resetting(CHUNKED, go)) as server, connect(make_request(server.url)) as stream:
        go.set()
        assert items_of(stream) == []
        assert stream.end == "reset"


def test_a_body_that_something_compresses_is_read() -> None:
    head = HEAD + b"Content-Encoding: gzip\r\n\r\n"
    with scripted_server(sending(head, gzip.compress(b"data: 1\n\n"))) as server:
        with connect(make_request(server.url, headers=[("Accept-Encoding", "gzip")])) as stream:
            assert items_of(stream) == [Block("message", "1", "", False)]
        assert b"\r\nAccept-Encoding: gzip\r\n" in server.heads[0]
        assert b"identity" not in server.heads[0]


def test_a_compressed_stream_is_read_in_steps_until_its_end() -> None:
    head = HEAD + b"Content-Encoding: gzip\r\n\r\n"
    comments = b":\n" * MAX_STEP_BYTES
    with scripted_server(sending(head, gzip.compress(comments + b"data: 1\n\n"))) as server:
        with connect(make_request(server.url)) as stream:
            pieces = list(iter(lambda: stream.read(TIMEOUT), None))
    assert max(len(piece.body) for piece in pieces) == MAX_STEP_BYTES
    assert pieces[-1].items[-1] == Block("message", "1", "", False)
    assert stream.end == "complete"


def test_a_compressed_body_that_must_not_be_is_an_error() -> None:
    head = HEAD + b"Content-Encoding: gzip\r\n\r\n"
    with scripted_server(sending(head, gzip.compress(b"data: 1\n\n"))) as server:
        with connect(make_request(server.url, takes_codings=False)) as stream:
            with pytest.raises(RemoteError, match=r"is compressed \(gzip\), although"):
                stream.read(TIMEOUT)
    with scripted_server(sending(HEAD + b"Content-Encoding: Identity\r\n\r\ndata: 1\n\n")) as server:
        with connect(make_request(server.url, takes_codings=False)) as stream:
            assert items_of(stream) == [Block("message", "1", "", False)]


def test_a_line_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "MAX_BLOCK_BYTES", 1_000)
    with scripted_server(sending(HEAD + b"\r\n" + b"x" * 1_001)) as server, connect(make_request(server.url)) as stream:
        with pytest.raises(RemoteError, match="a block of more than"):
            items_of(stream)


def test_an_answer_that_is_no_stream_can_be_read_too() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: /login\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 3\r\n\r\nyes"
    with scripted_server(sending(answer)) as server, connect(make_request(server.url)) as stream:
        assert not stream.is_stream
        assert (stream.head.status, stream.head.headers["location"]) == (302, "/login")
        assert stream.head.headers.get_all("set-cookie") == ["a", "b"]
        assert stream.read_rest(TIMEOUT, limit=2) == b"ye"


# -- no answer ---------------------------------------------------------------------------------------------------------


def failure(url: str, timeout: float = TIMEOUT) -> tuple[str, str]:
    with pytest.raises(RemoteError) as caught:
        connect(make_request(url), timeout)
    return caught.value.stage, str(caught.value)


def test_a_server_that_is_not_there() -> None:
    stage, text = failure("http://127.0.0.1:1/")
    assert stage == "connect"
    assert text == "cannot connect to 127.0.0.1, port 1: Connection refused"


def test_a_host_without_an_address() -> None:
    stage, text = failure("http://no-such-host.invalid/")
    assert stage == "name"
    assert "no-such-host.invalid was not found" in text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "closed the connection without an answer"),
        (b"SSH-2.0-x\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 20\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 101 + b"\r\n", "headers"),
    ],
)
def test_an_answer_that_is_none(answer: bytes, words: str) -> None:
    with scripted_server(sending(answer)) as server:
        stage, text = failure(server.url)
    assert stage == "answer"
    assert words in text


def test_a_server_that_does_not_answer_in_time() -> None:
    with scripted_server(holding(b"HTTP/1.1 200")) as server:
        stage, text = failure(server.url, 0.2)
    assert stage == "answer"
    assert text.endswith("accepted the connection, and did not answer within 0.2 s")


def flooding(begin: bytes, more: bytes) -> Callable[[socket.socket], None]:
    """Return a script that never stops sending, until the client closes the connection."""

    def send(connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(begin)
            while True:
                connection.sendall(more)

    return send


def test_a_server_that_never_stops_sending_does_not_answer_in_time_either() -> None:
    with scripted_server(flooding(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100)) as server:
        stage, text = failure(server.url, 0.2)
    assert stage == "answer"
    assert text.endswith("accepted the connection, and did not answer within 0.2 s")


def test_a_body_of_nothing_ends_at_the_deadline_or_at_its_limit() -> None:
    begin = gzip.compress(b"")[:10]
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + begin
    empty = b"\x00\x00\x00\xff\xff" * 1_000  # a stored block without bytes
    for timeout, limit in [(0.2, 10**12), (1e9, 10)]:
        with scripted_server(flooding(head, empty)) as server, connect(make_request(server.url)) as stream:
            assert stream.read_rest(timeout, limit) == b""


def test_a_server_without_tls() -> None:
    with live_server(Flask(__name__)) as url:
        stage, text = failure(url.replace("http", "https"))
    assert stage == "tls"
    assert "does not speak TLS" in text


# -- real servers ------------------------------------------------------------------------------------------------------


def test_a_real_stream_goes_on_after_its_cursor() -> None:
    app = Flask(__name__)
    sse = SSE(app)
    sse.authorize(lambda channels: channels)
    with live_server(app) as url:
        with connect(make_request(f"{url}/events")) as stream:
            assert types_until(stream, "sse_open") == ["sse_open"]
            cursor = stream.parser.last_id
        sse.enqueue("order", 1)
        sse.manager.flush_all()
        with connect(make_request(f"{url}/events", cursor=cursor)) as stream:
            assert types_until(stream, "order") == ["sse_open", "order"]
    assert sse.manager.shutdown(TIMEOUT)


@pytest.mark.external
def test_a_real_stream_over_tls(tmp_path: Path) -> None:
    kind = SERVERS["gunicorn"]
    kind = kind._replace(command=(*kind.command, "--certfile=tls.pem", "--keyfile=tls.pem"), tls=True)
    with serving(kind, tmp_path) as server:
        url = f"https://127.0.0.1:{server.port}/events"
        stage, text = failure(url)
        assert stage == "tls"
        assert "is not trusted" in text
        context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        with connect(make_request(url), context=context) as stream:
            assert types_until(stream, "sse_open") == ["sse_open"]
