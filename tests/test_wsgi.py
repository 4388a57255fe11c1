"""Plain WSGI: `stream`, under the validator of the standard library, and whatever a client comes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from sse_batcher import BatchOptions, ClientOptions, SSEManager, stream, wsgi
from sse_batcher.transports.server import ServerInfo
from sse_batcher.wire import HEADERS

from .kit.sse_parser import EventStreamParser, ServerEvent, parse, take_events
from .kit.waiting import TIMEOUT

BATCHING = BatchOptions(batch_window=0)
OPENED = '{"heartbeat":15.0,"channels":["default"]}'


class Response:
    """One request to `stream` through the validator, which fails for whatever PEP 3333 forbids."""

    def __init__(self, manager: SSEManager, channels: Any = ("default",), **environ: str) -> None:
        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            status, headers, body = stream(manager, environ, channels)
            start_response(status, headers)
            return body

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., Any]:
            self.status, self.headers = status, headers
            return lambda data: None

        environ = {"QUERY_STRING": ""} | environ
        setup_testing_defaults(environ)
        self.body = validator(app)(environ, start_response)
        self.chunks = iter(self.body)

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.body.close()

    def take(self, count: int) -> list[ServerEvent]:
        return take_events(self.chunks, count)

    def rest(self) -> bytes:
        return b"".join(self.chunks)


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    with SSEManager(batching=BATCHING) as manager:
        yield manager


@pytest.fixture
def head(manager: SSEManager) -> str:
    """The id of the newest frame, after two of them."""
    with Response(manager) as response:
        response.take(1)
        manager.enqueue("log", 1)
        manager.enqueue("log", 2)
        return response.take(2)[-1].id


# -- requests ----------------------------------------------------------------------------------------------------------


def test_get_streams_with_exactly_the_headers_of_the_contract(manager: SSEManager) -> None:
    with Response(manager) as response:
        assert (response.status, response.headers) == ("200 OK", list(HEADERS))
        (opened,) = response.take(1)
        manager.enqueue("log", {"a": 1})
        (event,) = response.take(1)
    assert (opened.type, opened.json) == ("sse_open", {"heartbeat": 15.0, "channels": ["default"]})
    assert (event.type, event.json) == ("log", {"a": 1})


def test_the_headers_given_out_are_the_callers_own(manager: SSEManager) -> None:
    with Response(manager) as response:
        response.headers.append(("X-Mine", "1"))
    with Response(manager) as response:
        assert response.headers == list(HEADERS)


def test_head_has_the_headers_and_nothing_else(manager: SSEManager) -> None:
    with Response(manager, REQUEST_METHOD="HEAD") as response:
        assert (response.status, response.headers, response.rest()) == ("200 OK", list(HEADERS), b"")
    assert manager.get_stats().bytes == 0


def test_options_says_what_is_allowed_and_ends(manager: SSEManager) -> None:
    with Response(manager, REQUEST_METHOD="OPTIONS") as response:
        assert response.status == "200 OK"
        assert dict(response.headers)["Allow"] == "GET, HEAD, OPTIONS"
        assert response.rest() == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_another_method_is_405(manager: SSEManager, method: str) -> None:
    with Response(manager, REQUEST_METHOD=method) as response:
        assert response.status == "405 Method Not Allowed"
        assert dict(response.headers)["Allow"] == "GET, HEAD, OPTIONS"
        body = response.rest()
    assert b"GET, HEAD, OPTIONS" in body
    assert dict(response.headers)["Content-Length"] == str(len(body))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("channels", [[], ["*"], [""], ["a\nb"], ["\ud800"], [None], "default", ["x", "y" * 129]])
def test_channels_that_cannot_be_are_400(manager: SSEManager, channels: Any, method: str) -> None:
    with Response(manager, channels, REQUEST_METHOD=method) as response:
        assert response.status == "400 Bad Request"
        assert ("Content-Type", "text/plain; charset=utf-8") in response.headers
    assert manager.get_stats().clients == 0


def test_a_400_says_what_is_wrong(manager: SSEManager) -> None:
    with Response(manager, [str(number) for number in range(101)]) as response:
        body = response.rest()
    assert b"1 to 100 channels, not 101" in body
    assert dict(response.headers)["Content-Length"] == str(len(body))


def test_a_stream_has_the_channels_it_was_opened_for(manager: SSEManager) -> None:
    with Response(manager, iter(["a", "b"])) as response:
        next(response.chunks)
        for channel in ("b", "default", "a"):
            manager.enqueue("log", channel, channel=channel)
        manager.broadcast("log", "all")
        assert [event.json for event in response.take(3)] == ["b", "a", "all"]


def test_a_stream_that_is_not_iterated_is_no_client(manager: SSEManager) -> None:
    with Response(manager):
        assert manager.get_stats().clients == 0
    assert manager.get_stats().clients == 0


def test_a_stream_is_a_client_from_its_first_step_to_its_close(manager: SSEManager) -> None:
    with Response(manager) as response:
        response.take(1)
        assert manager.get_stats().clients == 1
    assert manager.get_stats().clients == 0


def test_closing_is_idempotent_and_ends_the_iteration(manager: SSEManager) -> None:
    _status, _headers, body = stream(manager, {"REQUEST_METHOD": "GET"})
    next(iter(body))
    for _ in range(2):
        body.close()  # type: ignore[attr-defined]
        assert list(body) == []
    assert manager.get_stats().clients == 0


@pytest.mark.parametrize(("http2", "first_type"), [("refuse", "sse_busy"), ("allow", "sse_gap")])
def test_http2_of_the_server_itself_is_served_only_if_allowed(
    http2: str, first_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ServerInfo("gunicorn gthread", None, None, lambda: False, http2=True)
    monkeypatch.setattr("sse_batcher.wsgi.inspect_server", lambda environ: host)
    environ = {"REQUEST_METHOD": "GET", "HTTP_LAST_EVENT_ID": "5f3a9c1e-42"}
    states: list[tuple[str, str]] = []
    with SSEManager(batching=BATCHING, clients=ClientOptions(http2=http2)) as manager:
        _, headers, body = stream(manager, environ, snapshot=lambda: states)
        blocks = iter(body)
        [first, *_] = parse(next(blocks), strict=True)
        assert (first.type, headers) == (first_type, list(HEADERS))
        if http2 == "refuse":
            assert (first.json, first.id) == ({"reason": "http2"}, "5f3a9c1e-42")
            assert list(blocks) == []
        else:
            blocks.close()  # type: ignore[attr-defined]


# -- cursors -----------------------------------------------------------------------------------------------------------


def first_block(manager: SSEManager, **environ: str) -> ServerEvent:
    with Response(manager, **environ) as response:
        return response.take(1)[0]


def test_a_new_client_stands_at_the_head(manager: SSEManager, head: str) -> None:
    assert first_block(manager)[::2] == ("sse_open", head)


def test_a_client_that_has_everything_is_resumed_at_its_own_id(manager: SSEManager, head: str) -> None:
    assert first_block(manager, HTTP_LAST_EVENT_ID=head) == ("sse_open", OPENED, head)


def test_a_client_that_missed_something_is_resumed_and_gets_it(manager: SSEManager, head: str) -> None:
    older = head.removesuffix("2") + "1"
    with Response(manager, HTTP_LAST_EVENT_ID=older) as response:
        opened, missed = response.take(2)
    assert opened[::2] == ("sse_open", older)
    assert missed.id == head


def test_a_cursor_of_another_life_is_a_gap_though_its_position_is_the_same(manager: SSEManager, head: str) -> None:
    position = head.partition("-")[2]
    assert first_block(manager, HTTP_LAST_EVENT_ID=f"00000000-{position}")[::2] == ("sse_gap", head)


@pytest.mark.parametrize("name", ["last_event_id", "lastEventId"])
def test_a_first_connect_has_its_cursor_in_the_query(manager: SSEManager, head: str, name: str) -> None:
    assert first_block(manager, QUERY_STRING=f"{name}={head}&channel=default").type == "sse_open"
    assert first_block(manager, QUERY_STRING=f"channel=default&{name}=00000000-1").type == "sse_gap"


def test_only_the_values_that_are_asked_for_are_decoded(
    manager: SSEManager, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def decode(text: str) -> str:
        decoded.append(text)
        return text.replace("%30", "0")

    monkeypatch.setattr(wsgi, "unquote_plus", decode)
    many = "&".join(["channel=%E4%B8%80"] * 1_000)
    assert first_block(manager, QUERY_STRING=f"{many}&last_event_id={head}&batch=%30&{many}").type == "sse_open"
    assert decoded == [head, "%30"]


def test_the_header_wins_over_the_query(manager: SSEManager, head: str) -> None:
    stale = "00000000-1"
    assert first_block(manager, HTTP_LAST_EVENT_ID=head, QUERY_STRING=f"lastEventId={stale}").type == "sse_open"
    assert first_block(manager, HTTP_LAST_EVENT_ID=stale, QUERY_STRING=f"lastEventId={head}").type == "sse_gap"


@pytest.mark.parametrize("query", ["", "last_event_id=", "lastEventId", "last_event_ids=1-1", "LASTEVENTID=1-1"])
def test_no_cursor_is_a_new_client(manager: SSEManager, head: str, query: str) -> None:
    assert first_block(manager, HTTP_LAST_EVENT_ID="", QUERY_STRING=query)[::2] == ("sse_open", head)


HOSTILE = [
    "5f3a9c1e",
    "5f3a9c1e-",
    "-1",
    "5f3a9c1e-1-1",
    "5f3a9c1e-00",
    "5f3a9c1e--1",
    "5f3a9c1e-1\n",
    "5f3a9c1e-1\r\nevent: forged",
    "5F3A9C1E-1",
    "5f3a9c1e-1.",
    "5f3a9c1e-1.0",
    "5f3a9c1e-1.5.5",
    "5f3a9c1e-1e3",
    "5f3a9c1e-0x1",
    "5f3a9c1e- 1",
    "5f3a9c1e-٣",
    "5f3a9c1e-" + "9" * 20,
    "5f3a9c1e-" + "9" * 5_000,
    "x" * 10_000,
    "\0",
    "a\0b",
    "é\udcff",
    "\ufeff",
    "<script>",
    "'; DROP TABLE events",
    "../../etc/passwd",
    "%s%n{0}",
    "event: forged\ndata: x\n\n",
]


@pytest.mark.parametrize("cursor", HOSTILE)
@pytest.mark.parametrize("where", ["header", "query"])
def test_a_hostile_cursor_is_a_gap_and_is_never_sent_back(
    manager: SSEManager, head: str, cursor: str, where: str
) -> None:
    raw = cursor.encode(errors="surrogateescape")
    if where == "header":
        # A server hands the bytes of a header over as Latin-1.
        environ = {"HTTP_LAST_EVENT_ID": raw.decode("latin-1")}
    else:
        environ = {"QUERY_STRING": "lastEventId=" + quote(raw)}
    with Response(manager, **environ) as response:
        sent = next(response.chunks)
    (event,) = EventStreamParser(strict=True).feed(sent)
    assert event == ("sse_gap", '{"heartbeat":15.0,"channels":["default"],"reason":"malformed"}', head)
    assert len(sent) < 200
    assert len(raw) < 3 or raw not in sent


@pytest.mark.parametrize(
    "query", ["%", "%zz", "%FF%FE", "%ED%A0%80", "%00", "%0A%0Adata:%20x", "+", "%C0%AE", "a;b", "=", "a=b=c", "%25"]
)
def test_a_hostile_query_is_a_gap(manager: SSEManager, head: str, query: str) -> None:
    assert first_block(manager, QUERY_STRING=f"last_event_id={query}")[::2] == ("sse_gap", head)


# -- retry -------------------------------------------------------------------------------------------------------------


def retry_of(manager: SSEManager) -> int:
    with Response(manager) as response:
        parser = EventStreamParser(strict=True)
        parser.feed(next(response.chunks))
    assert parser.retry is not None
    return parser.retry


def test_retry_is_drawn_for_each_connection_within_its_bounds(manager: SSEManager) -> None:
    drawn = [retry_of(manager) for _ in range(50)]
    assert all(1_000 <= retry <= 2_001 for retry in drawn)
    assert len(set(drawn)) > 5


def test_retry_is_spread_further_the_more_clients_there_are(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_batcher.streams.control.random.randint", lambda low, high: high)
    clients = [manager.subscribe() for _ in range(9)]
    assert retry_of(manager) == 2_010
    monkeypatch.setattr("sse_batcher.streams.control.random.randint", lambda low, high: low)
    assert retry_of(manager) == 1_000
    for client in clients:
        client.close()


def test_retry_is_as_set() -> None:
    with SSEManager(batching=BATCHING, clients=ClientOptions(retry_ms=77)) as manager:
        assert retry_of(manager) == 77
        manager.shutdown()
        assert retry_of(manager) == 77


# -- after the end -----------------------------------------------------------------------------------------------------


def after_shutdown(manager: SSEManager, **environ: str) -> tuple[ServerEvent, EventStreamParser]:
    """The one event that a stream has after the manager was shut down."""
    assert manager.shutdown(TIMEOUT)
    with Response(manager, **environ) as response:
        assert (response.status, response.headers) == ("200 OK", list(HEADERS))
        parser = EventStreamParser(strict=True)
        (event,) = parser.feed(response.rest())
        parser.close()
    assert manager.get_stats().clients == 0
    return event, parser


def test_after_the_end_a_client_gets_sse_busy_and_the_stream_ends(manager: SSEManager) -> None:
    event, parser = after_shutdown(manager)
    assert event == ("sse_busy", '{"reason":"draining"}', "")
    assert parser.retry is not None
    assert 1_000 <= parser.retry <= 2_000


@pytest.mark.parametrize("cursor", ["5f3a9c1e-42", "00000000-0", "ffffffff-" + "9" * 19])
def test_after_the_end_a_well_formed_cursor_is_repeated(manager: SSEManager, cursor: str) -> None:
    event, _parser = after_shutdown(manager, HTTP_LAST_EVENT_ID=cursor)
    assert event == ("sse_busy", '{"reason":"draining"}', cursor)


def test_after_the_end_the_managers_own_cursor_is_repeated(manager: SSEManager, head: str) -> None:
    event, _parser = after_shutdown(manager, QUERY_STRING=f"lastEventId={head}")
    assert event.id == head


@pytest.mark.parametrize("cursor", [cursor for cursor in HOSTILE if cursor != "00000000-0"])
def test_after_the_end_a_hostile_cursor_is_not_repeated(manager: SSEManager, cursor: str) -> None:
    environ = {"HTTP_LAST_EVENT_ID": cursor.encode(errors="surrogateescape").decode("latin-1")}
    event, _parser = after_shutdown(manager, **environ)
    assert event == ("sse_busy", '{"reason":"draining"}', "")


def test_a_stream_that_was_open_ends_with_a_farewell_where_it_stands(manager: SSEManager) -> None:
    with Response(manager) as response:
        (opened,) = response.take(1)
        manager.enqueue("log", 1)
        assert manager.shutdown(TIMEOUT)
        event, farewell = response.take(2)
        assert response.rest() == b""
    assert opened.id != event.id == farewell.id
    assert (farewell.type, farewell.json) == ("sse_bye", {"reason": "shutdown"})
