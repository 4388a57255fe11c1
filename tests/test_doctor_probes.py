"""`doctor`'s probes, with servers that answer as the test says, and an app in this process."""

from __future__ import annotations

import _thread
import json
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from flask import Flask

from sse_batcher import SSE
from sse_batcher.doctor.client import Client, Target, plain_object
from sse_batcher.doctor.diagnoses import diagnose
from sse_batcher.doctor.facts import Facts, FirstBlock
from sse_batcher.doctor.http2 import try_http2
from sse_batcher.doctor.listener import MAX_TIMES, Listener
from sse_batcher.doctor.probes import examine
from sse_batcher.doctor.rendering import json_text
from sse_batcher.doctor.together import call_together
from sse_batcher.parser import Block, Comment
from sse_batcher.remote.message import RemoteError, make_request
from sse_batcher.remote.stream import RemoteStream
from sse_batcher.testing import live_server

from .kit.scripted_server import HEAD, holding, scripted_server, sending
from .kit.waiting import TIMEOUT, tried

TOKEN = "sse1.secret.token"
BYE = b'event: sse_bye\ndata: {"reason":"lease"}\n\n'


def redirect(place: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_redirect_to_the_same_host_is_followed_with_the_token() -> None:
    with scripted_server(sending(redirect("/other")), sending(HEAD + b"\r\n")) as server:
        facts = examine(Target(server.url, token=TOKEN))
    assert facts.leads_to is not None
    assert facts.leads_to.is_stream
    assert server.heads[1].startswith(b"GET /other ")
    assert all(TOKEN.encode() in head for head in server.heads)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_no_other_host_or_port_gets_the_token(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = f"http://{host}:{other.getsockname()[1]}/events"
        with scripted_server(sending(redirect(place))) as server:
            facts = examine(Target(server.url, token=TOKEN, seconds=0.5))
        assert facts.leads_to is None
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()


def test_a_redirect_to_what_is_not_a_url_is_a_finding() -> None:
    with scripted_server(sending(redirect("http://[::1"))) as server:
        assert [finding.code for finding in diagnose(examine(Target(server.url)))] == ["redirected"]


def test_a_token_in_the_url_is_a_token() -> None:
    assert Target("http://a/events?token=secret").has_token
    assert not Target("http://a/events").has_token


def test_a_token_in_a_redirect_is_sent_and_not_shown() -> None:
    place = "/other?token=sse1.secret"
    with scripted_server(sending(redirect(place)), sending(HEAD + b"\r\n")) as server:
        facts = examine(Target(f"{server.url}?token=sse1.secret"))
    assert server.heads[1].startswith(f"GET {place} ".encode())
    report = json_text(facts.url, diagnose(facts), facts.as_dict())
    assert "/other?token=..." in report
    assert "secret" not in report


def test_cookies_are_not_among_the_facts() -> None:
    answer = b"HTTP/1.1 429 Too Many Requests\r\nSet-Cookie: session=secret\r\nX-A: 1\r\nX-A: 2\r\n\r\n"
    with scripted_server(sending(answer)) as server:
        facts = examine(Target(server.url))
    assert facts.answer is not None
    assert facts.answer.headers == {"x-a": "1, 2"}


def test_arguments_that_are_not_valid_raise() -> None:
    with pytest.raises(RemoteError, match="not a URL"):
        examine(Target("shop.example.com/events"))


# -- listening ---------------------------------------------------------------------------------------------------------


def listen(server_url: str, *, seconds: float = TIMEOUT, rest: tuple[Block, ...] = ()) -> Listener:
    stream = Client(Target(server_url), TIMEOUT).open()
    listener = Listener(stream, 1.0, seconds, list(rest))
    listener.start()
    assert listener.wait(TIMEOUT)
    stream.close()
    return listener


def test_heartbeats_and_events_are_counted_and_the_end_has_its_reason() -> None:
    with scripted_server(sending(HEAD + b"\r\n:\n:\ndata: 1\n\n" + BYE)) as server:
        seen = listen(server.url).result()
    assert (seen.heartbeats, seen.together, seen.events) == (2, 2, 1)
    assert (seen.bye, seen.end) == ("lease", "complete")


def test_what_came_together_with_the_first_block_counts() -> None:
    with scripted_server(holding(HEAD + b"\r\n")) as server:
        block = Block("sse_bye", '{"reason":"buffered"}', "", False)
        seen = listen(server.url, seconds=0.3, rest=(block,)).result()
    assert (seen.bye, seen.end) == ("buffered", None)
    assert 0.3 <= seen.silence <= seen.seconds


def test_an_answer_that_breaks_off_in_the_middle_of_http_is_invalid() -> None:
    go = threading.Event()

    def break_off(connection: socket.socket) -> None:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        assert go.wait(TIMEOUT)
        connection.sendall(b"2\r\n:\n\r\nnonsense\r\n")

    with scripted_server(break_off) as server, Client(Target(server.url), TIMEOUT).open() as stream:
        listener = Listener(stream, None, TIMEOUT, [])
        listener.start()
        go.set()
        assert listener.wait(TIMEOUT)
        assert listener.result().end == "invalid"


def test_listening_can_be_stopped() -> None:
    with scripted_server(holding(HEAD + b"\r\n")) as server:
        stream = Client(Target(server.url), TIMEOUT).open()
        listener = Listener(stream, None, TIMEOUT, [])
        listener.start()
        assert 0 < listener.left() <= TIMEOUT
        listener.stop()
        assert listener.result().seconds < TIMEOUT
        stream.close()


def test_a_connection_that_breaks_is_tried_once_more_for_a_health_check() -> None:
    answer = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"status":"ok"}'
    with scripted_server(sending(), sending(answer)) as server:
        check = Client(Target(server.url), TIMEOUT).health("/health")
    assert check is not None
    assert (check.status, check.word) == (200, "ok")
    with scripted_server(sending(), sending()) as server:
        assert Client(Target(server.url), TIMEOUT).health("/health") is None


def test_a_health_check_that_is_not_answered_in_time_is_tried_once() -> None:
    release = threading.Event()

    def wait(connection: socket.socket) -> None:
        assert release.wait(TIMEOUT)

    with scripted_server(wait) as server:
        assert Client(Target(server.url), 0.2).health("/health") is None
        release.set()


@pytest.mark.parametrize("number", ["1e999", "NaN", f"1{'0' * 400}", f"1{'0' * 5_000}"])
def test_numbers_of_any_size_are_no_error(number: str) -> None:
    first = FirstBlock(type="sse_open", data=plain_object(f'{{"heartbeat": {number}}}'))
    facts = Facts(url="", first=first)
    assert facts.heartbeat in {None, 3_600.0}
    assert json.loads(json_text(facts.url, [], facts.as_dict()), parse_constant=pytest.fail)


@pytest.mark.parametrize("depth", [2, 400, 900, 100_000])
def test_what_is_nested_is_left_out(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    data = plain_object(f'{{"channels": ["a", "b"], "reason": "x", "nested": {nested}}}')
    assert data in ({"channels": ["a", "b"], "reason": "x"}, {})


@pytest.mark.parametrize("date", ["1 Jan 1 0:0:0 999999999999999999", "Mon, 99 Zzz 99999999 99:99:99 +999999", ""])
def test_a_date_that_is_none_is_no_error(date: str) -> None:
    with scripted_server(sending(f"HTTP/1.1 429 Later\r\nDate: {date}\r\n\r\n".encode())) as server:
        assert examine(Target(server.url)).clock_offset is None


def test_a_goodbye_that_cannot_be_read_is_one_without_a_reason() -> None:
    bye = b"event: sse_bye\ndata: " + b"[" * 100_000 + b"\n\n"
    with scripted_server(sending(HEAD + b"\r\n", bye)) as server:
        seen = listen(server.url).result()
    assert (seen.bye, seen.end) == ("", "complete")
    assert seen.seconds >= 0


def test_an_error_of_the_listener_does_not_lose_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stream: RemoteStream, timeout: float) -> None:
        raise LookupError

    errors: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    monkeypatch.setattr(RemoteStream, "read", fail)
    with scripted_server(sending(HEAD + b"\r\n")) as server:
        assert listen(server.url).result().seconds >= 0
    assert len(errors) == 1


def test_any_number_of_comments_can_be_counted() -> None:
    rest = [Comment("")] * 300_000
    with scripted_server(holding(HEAD + b"\r\n")) as server, Client(Target(server.url), TIMEOUT).open() as stream:
        listener = Listener(stream, 1.0, 0.1, rest)
        listener.start()
        assert listener.wait(TIMEOUT)
        seen = listener.result()
    assert (seen.heartbeats, seen.together) == (300_000, MAX_TIMES)


# -- requests at the same time -----------------------------------------------------------------------------------------


def test_calls_at_the_same_time_return_in_their_order() -> None:
    second_runs = threading.Event()

    def first() -> bool:
        return second_runs.wait(TIMEOUT)

    def second() -> str:
        second_runs.set()
        return "second"

    assert call_together([first, second], 2) == [True, "second"]
    assert call_together([lambda number=number: number for number in range(9)], 2) == [*range(9)]
    with pytest.raises(LookupError):
        call_together([second, lambda: {}["a"]], 1)


def test_ctrl_c_does_not_wait_for_calls_and_begins_no_more() -> None:
    release, more = threading.Event(), threading.Event()

    def interrupt() -> None:
        _thread.interrupt_main()
        release.wait()

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        call_together([interrupt, more.set], 1)
    [left] = set(threading.enumerate()) - before
    assert left.daemon  # so the interpreter does not wait for it
    release.set()
    left.join(TIMEOUT)
    assert not more.is_set()


# -- HTTP/2 ------------------------------------------------------------------------------------------------------------


class ClearSocket(socket.socket):
    def selected_alpn_protocol(self) -> str:
        return "h2"


class ClearContext(ssl.SSLContext):
    """One that does not encrypt, so that a scripted server can speak HTTP/2."""

    def wrap_socket(self, sock: socket.socket, *args: Any, **kwargs: Any) -> Any:
        return ClearSocket(fileno=sock.detach())


def frame(kind: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + stream.to_bytes(4, "big") + payload


def flooding(piece: bytes) -> Callable[[socket.socket], None]:
    def flood(connection: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection.sendall(piece)

    return flood


DATA, HEADERS, PING = 0, 1, 6


@pytest.mark.parametrize(
    "piece",
    [
        frame(DATA, 5, b"") * 5_000,
        frame(DATA, 1, b"x" * 16_000) * 4,
        frame(PING, 0, b"12345678") * 5_000,
        b"\xff" * 50_000,
    ],
    ids=["other stream", "body", "pings", "long frame"],
)
def test_frames_without_an_end_do_not_hold_the_look_at_http2(piece: bytes) -> None:
    with scripted_server(flooding(piece)) as server:
        request = make_request(server.url.replace("http:", "https:"))
        assert try_http2(request, request, 0.2, ClearContext(ssl.PROTOCOL_TLS_CLIENT)) is None


def test_a_stream_and_a_short_request_over_http2() -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(frame(DATA, 1, b"data: 1\n") + frame(DATA, 1, b"\n") + frame(HEADERS, 3, b""))
        while connection.recv(65_536):
            pass

    with scripted_server(answer) as server:
        request = make_request(server.url.replace("http:", "https:"))
        assert try_http2(request, request, TIMEOUT, ClearContext(ssl.PROTOCOL_TLS_CLIENT)) == "works"


def test_the_request_over_http2_is_that_over_http1() -> None:
    sent = bytearray()

    def answer(connection: socket.socket) -> None:
        sent.extend(server.heads[0])  # the request may have come together with the beginning of the connection
        while b"c=d" not in sent and (data := connection.recv(65_536)):
            sent.extend(data)

    with scripted_server(answer) as server:
        request = make_request(
            f"{server.url.replace('http:', 'https:')}/\u00e9?sig=%FFab",
            headers=[("Host", "xn--bcher-kva.example"), ("Cookie", "a=b"), ("Cookie", "c=d"), ("Connection", "close")],
        )
        assert try_http2(request, request, TIMEOUT, ClearContext(ssl.PROTOCOL_TLS_CLIENT)) is None
    assert request.head.startswith(f"GET {request.target} HTTP/1.1\r\n".encode())
    for name, value in [
        (":path", request.target),
        (":authority", "xn--bcher-kva.example"),
        ("cookie", "a=b"),
        ("cookie", "c=d"),
        ("accept-encoding", "identity"),
    ]:
        assert f"\0{chr(len(name))}{name}{chr(len(value))}{value}".encode() in sent
    assert request.target.endswith("/%C3%A9?sig=%FFab")
    assert b"host" not in sent.replace(b"localhost", b"")
    assert b"connection" not in sent


# -- all of it ---------------------------------------------------------------------------------------------------------


def test_an_app_is_examined_without_any_other_program() -> None:
    app = Flask("app", static_folder=None)
    app.config.update(SSE_HEARTBEAT=0.2)
    lines: list[str] = []
    with SSE(app).manager, live_server(app) as url:

        def examined() -> Facts:
            lines.clear()
            return examine(Target(f"{url}/events", seconds=0.7), lines.append, 0.2)

        # The doctor waits little for each answer, and the machine may stand still.
        facts = tried(examined, lambda facts: not diagnose(facts) and facts.resumed is not None)
    assert facts.listened is not None
    assert facts.listened.heartbeats >= 2
    assert facts.resumed is not None
    assert (facts.resumed.type, facts.by_header, facts.by_query) == ("sse_open", "sse_gap", "sse_gap")
    assert (len(set(facts.histories)), facts.streams_beside, facts.answers_beside) == (1, 3, True)
    assert lines[:2] == ["opening the stream", "asking beside the open stream"]
    assert lines[-1] == "coming back"
    assert any(line.startswith("listening for heartbeats, ") for line in lines)


def test_a_stream_that_the_library_compresses_is_recognised() -> None:
    app = Flask("app", static_folder=None)
    app.config.update(SSE_HEARTBEAT=0.2, SSE_COMPRESS=["default"])
    with SSE(app).manager, live_server(app) as url:
        facts = tried(  # as above
            lambda: examine(Target(f"{url}/events", seconds=0.5)), lambda facts: facts.coded_block is True
        )
    assert (facts.coding, facts.coded_block, facts.coded_by_library) == ("gzip", True, True)
    assert facts.plain is not None
    assert facts.plain.header("content-encoding") == "identity"
    assert "compressed" not in {finding.code for finding in diagnose(facts)}
