"""`open_stream`: what a client gets, by the time of the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from flask import Flask

from sse_batcher import (
    SSE,
    BatchOptions,
    ClientOptions,
    HistoryOptions,
    InvalidEventError,
    SSEManager,
    Text,
    UsageError,
    signals,
    stream,
)
from sse_batcher.testing import Stream, StreamRefusedError, open_stream, record

from .kit.board import Board, make_board
from .kit.waiting import TIMEOUT

TEAM = "/events?channel=team-7"


def send(board: Board, *numbers: int) -> None:
    for number in numbers:
        board.sse.enqueue("order", {"n": number}, channel="team-7")


def test_events_arrive_when_the_window_closes() -> None:
    board = make_board()
    with open_stream(board.client, TEAM) as opened:
        opened.clear()
        send(board, 1)
        opened.clock.advance(0.05)
        send(board, 2)
        assert opened.events() == []
        opened.clock.advance(0.05)
        assert opened.events() == [("order", {"n": 1}), ("order", {"n": 2})]
        send(board, 3)
        opened.clock.advance(0.1)
        assert opened.events()[2:] == [("order", {"n": 3})]
        assert [len(frame.events) for frame in opened.frames()] == [2, 1]
        assert [frame.type for frame in opened.frames()] == ["order_batch", "order"]
        assert opened.frames()[0].data["reason"] == "time_window"


def test_many_steps_are_one_long_step() -> None:
    manager = SSEManager()
    for steps in (1, 3, 7, 10, 1_000):
        with open_stream(manager) as opened:
            manager.enqueue("a", 1)
            for _ in range(steps):
                opened.clock.advance(0.1 / steps)
            assert opened.events() == [("a", 1)], steps


def test_the_apps_functions_decide() -> None:
    board = make_board()
    with open_stream(board.client, "/events?channel=team-7&channel=team-8") as opened:
        assert opened.opened_with == "sse_open"
        assert opened.channels == ["team-7"]
        assert opened.events() == [("state", {"orders": 3}), ("greeting", "<b>ada</b>")]
        assert isinstance(opened.events()[1][1], Text)
        board.sse.enqueue("hint", 1, user="ada")
        board.sse.enqueue("hint", 2, user="bob")
        opened.clock.advance(0.1)
        assert opened.events()[2:] == [("hint", 1)]
        assert board.sse.kick(user="ada") == 1
        assert opened.bye == "kicked"
        assert not opened.is_open


@pytest.mark.parametrize(
    ("url", "status", "body"),
    [
        ("/events?channel=team-8", 403, "Forbidden"),
        ("/events?channel=*", 400, "cannot be named"),
        ("/nothing", 404, "Not Found"),
        ("/orders", 405, "Method Not Allowed"),
    ],
)
def test_a_refused_stream_says_why(url: str, status: int, body: str) -> None:
    board = make_board()
    with pytest.raises(StreamRefusedError, match=f"the app answered with {status}") as caught:
        with open_stream(board.client, url):
            pass
    assert caught.value.status == status
    assert body in caught.value.body


def test_the_client_without_a_login_is_refused() -> None:
    board = make_board()
    with pytest.raises(StreamRefusedError, match="log in first"), open_stream(board.app, "/events"):
        pass


def test_a_refused_return_is_an_error() -> None:
    board = make_board()
    with open_stream(board.client, TEAM) as opened:
        with board.client.session_transaction() as cookies:
            cookies["team"] = 8
        board.sse.kick(user="ada")
        with pytest.raises(StreamRefusedError):
            opened.reconnect()
        assert not opened.is_open


# -- texts, batches, blocks --------------------------------------------------------------------------------------------


def test_texts_and_json_are_told_apart() -> None:
    manager = SSEManager()
    with open_stream(manager) as opened, open_stream(manager, query="batch=0") as single:
        manager.enqueue("row", Text("7"))
        manager.enqueue("row", Text("true"))
        manager.enqueue("row", 7)
        manager.enqueue("row", "7")
        opened.clock.advance(0.1)
        assert opened.events() == [("row", "7\ntrue"), ("row", 7), ("row", "7")]
        assert [type(data) for _, data in opened.events()] == [Text, int, str]
        assert single.events() == [("row", "7"), ("row", "true"), ("row", 7), ("row", "7")]
        assert [type(data) for _, data in single.events()] == [Text, Text, int, str]


def test_mixed_batches_are_unpacked() -> None:
    manager = SSEManager(batching=BatchOptions(mixed=True))
    with open_stream(manager) as opened, open_stream(manager, query="batch=0") as single:
        manager.enqueue("a", {"x": 1})
        manager.enqueue("b", Text("2"))
        manager.enqueue("c", 3)
        opened.clock.advance(0.1)
        for each in (opened, single):
            assert each.events() == [("a", {"x": 1}), ("b", "2"), ("c", 3)]
            assert [type(data) for _, data in each.events()] == [dict, Text, int]
        assert [frame.type for frame in opened.frames()] == ["sse_open", "mixed_batch"]


def test_a_state_is_no_text_because_the_newest_event_was_one() -> None:
    manager = SSEManager()
    with open_stream(manager) as first:
        manager.enqueue("row", Text("<b>"))
        first.clock.advance(0.1)
        with open_stream(manager, snapshot=lambda: [("state", [1])]) as second:
            assert second.events() == [("state", [1])]
            manager.enqueue("row", Text("7"))
            first.clock.advance(0.1)
            assert isinstance(second.events()[-1][1], Text)


# -- connections -------------------------------------------------------------------------------------------------------


def test_a_client_that_comes_back_gets_what_it_has_missed() -> None:
    board = make_board()
    with open_stream(board.client, TEAM) as opened:
        send(board, 1)
        opened.clock.advance(0.1)
        opened.drop()
        send(board, 2)
        opened.clock.advance(0.1)
        assert opened.events()[2:] == [("order", {"n": 1})]
        opened.reconnect()
        assert opened.opened_with == "sse_open"
        assert opened.events()[2:] == [("order", {"n": 1}), ("order", {"n": 2})]  # and no second snapshot
        assert opened.gaps == []


def test_a_connection_that_breaks_in_a_block_loses_nothing() -> None:
    manager = SSEManager()
    with open_stream(manager, query="batch=0") as opened:
        opened.stall()
        for number in range(3):
            manager.enqueue("a", number)
        opened.clock.advance(0.1)
        opened.drop()
        assert opened.events() == [("a", 0)]  # the first half of the block has one of three
        opened.reconnect()
        assert opened.events() == [("a", 0), ("a", 1), ("a", 2)]


def test_a_lost_history_is_a_gap() -> None:
    board = make_board()
    with record() as sent, open_stream(board.client, TEAM) as opened:
        sent.lose_history()
        send(board, 1)
        opened.clock.advance(0.1)
        assert opened.events()[2:] == [("order", {"n": 1})]  # a stream that is open stays open
        opened.drop()
        sent.lose_history()
        opened.clear()
        opened.reconnect()
        assert (opened.opened_with, opened.gaps) == ("sse_gap", ["epoch"])
        assert [event_type for event_type, _ in opened.events()] == ["state", "greeting"]


def test_the_history_of_one_manager_is_lost() -> None:
    one, other = SSEManager(), SSEManager()
    with record(one) as sent, open_stream(one) as lost, open_stream(other) as kept:
        sent.lose_history()
        for opened in (lost, kept):
            opened.reconnect()
        assert (lost.gaps, kept.gaps) == (["epoch"], [])


def test_a_history_gets_too_old() -> None:
    manager = SSEManager(history=HistoryOptions(history_age=60))
    with open_stream(manager) as opened:
        opened.drop()
        manager.enqueue("a", 1)
        opened.clock.advance(61)
        opened.reconnect()
        assert opened.gaps == ["too_old"]


def test_a_slow_client_catches_up_or_gets_a_gap() -> None:
    manager = SSEManager(clients=ClientOptions(queue_frames=2), history=HistoryOptions(history_frames=5))
    with open_stream(manager) as slow, open_stream(manager) as fast:
        for count in (4, 8):
            slow.stall()
            for number in range(count):
                manager.enqueue("a", number)
                slow.clock.advance(0.1)
            slow.resume()
            if count == 4:
                assert slow.events() == fast.events()
        assert (slow.gaps, fast.gaps) == (["overflow"], [])
        assert len(fast.events()) == 12


def test_a_fast_client_takes_a_burst() -> None:
    """It is read during the burst, as a browser reads: no queue overflows, though the test looks only at its end."""
    manager = SSEManager(clients=ClientOptions(queue_frames=2), history=HistoryOptions(history_frames=5))
    with open_stream(manager) as opened:
        for number in range(1_000):
            manager.enqueue("a", number)
        opened.clock.advance(0.1)
        assert [data for _, data in opened.events()] == list(range(1_000))
        assert opened.gaps == []


def test_a_stream_above_the_limit_is_busy() -> None:
    board = make_board(SSE_MAX_CLIENTS=1)
    with open_stream(board.client, TEAM) as first, open_stream(board.client, TEAM) as second:
        assert (second.opened_with, second.busy, second.is_open) == ("sse_busy", "limit", False)
        assert 10_000 <= (second.retry or 0) <= 30_000
        assert first.busy is None
        first.close()
        second.reconnect()
        assert second.is_open


@pytest.mark.parametrize("name", ["events", "gaps", "bye", "channels"])
@pytest.mark.parametrize("asks", ["busy", "opened_with", "is_open"])
def test_a_refused_stream_is_not_taken_for_a_quiet_one(name: str, asks: str) -> None:
    board = make_board(SSE_MAX_CLIENTS=1)

    def read(opened: Stream) -> Any:
        value = getattr(opened, name)
        return value() if callable(value) else value

    with open_stream(board.client, TEAM) as first, open_stream(board.client, TEAM) as second:
        read(first)  # of an open stream, all can be read
        for _ in range(2):
            with pytest.raises(UsageError, match="refused with sse_busy, for the reason 'limit'"):
                read(second)
            assert getattr(second, asks) in ("limit", "sse_busy", False)
            assert not read(second)
            second.reconnect()  # refused again, which the test does not know


def test_a_stream_that_is_refused_when_it_returns_is_not_taken_for_a_quiet_one() -> None:
    board = make_board(SSE_MAX_CLIENTS=1)
    with open_stream(board.client, TEAM) as first:
        first.drop()
        with open_stream(board.client, TEAM):
            first.reconnect()
            with pytest.raises(UsageError, match="refused"):
                first.events()
            assert first.busy == "limit"
            assert first.events()[0] == ("state", {"orders": 3})  # what arrived before


def test_leases_polls_and_heartbeats_go_by_the_clock() -> None:
    manager = SSEManager(clients=ClientOptions(max_stream_age=100))
    with open_stream(manager) as opened, open_stream(manager, query="poll=1", last_event_id=manager.cursor()) as poll:
        opened.clock.advance(24)
        assert (poll.is_open, poll.frames()[1:]) == (True, [])
        opened.clock.advance(2)
        assert not poll.is_open
        poll.reconnect()
        manager.enqueue("a", 1)
        opened.clock.advance(0.1)
        assert (poll.is_open, poll.events()) == (False, [("a", 1)])
        opened.clock.advance(90)
        assert opened.bye == "lease"


def test_users_are_asked_about_by_the_clock() -> None:
    asked = []

    def revalidate(user: str) -> bool:
        asked.append(user)
        return len(asked) < 3

    manager = SSEManager(revalidate=revalidate, clients=ClientOptions(revalidate_every=10))
    with open_stream(manager, user="ada", channels=["a"]) as opened:
        opened.clock.advance(25)
        assert asked == ["ada", "ada"]
        opened.clock.advance(10)
        assert opened.bye == "revoked"


def test_streams_end_with_the_manager() -> None:
    manager = SSEManager()
    with open_stream(manager) as opened:
        manager.enqueue("a", 1)
        assert manager.shutdown()
        assert opened.events() == [("a", 1)]
        assert opened.bye == "shutdown"
        opened.reconnect()
        assert opened.busy == "draining"


def test_signals_say_who_came_and_left() -> None:
    manager, seen = SSEManager(), []
    with (
        signals.client_connected.connected_to(lambda sender, client: seen.append(client.channels)),
        signals.client_disconnected.connected_to(lambda sender, client, reason, **rest: seen.append(reason)),
    ):
        with open_stream(manager, channels=["a"]):
            assert seen == [("a",)]
        assert seen == [("a",), "left"]


def test_a_stream_ends_when_its_time_is_over_though_the_test_does_not_look() -> None:
    manager, seen = SSEManager(), []
    with open_stream(manager) as opened:
        with signals.client_disconnected.connected_to(lambda sender, client, reason, **rest: seen.append(reason)):
            opened.clock.advance(1_800)
            assert seen == ["lease"]


def test_another_thread_may_send() -> None:
    manager = SSEManager()
    with open_stream(manager) as opened:
        threads = [
            threading.Thread(target=lambda: [manager.enqueue("a", number) for number in range(200)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        opened.clock.advance(0.1)
        assert len(opened.events()) == 800
        assert opened.gaps == []


def test_a_shutdown_waits_for_no_thread_that_has_read_a_stream() -> None:
    manager = SSEManager(batching=BatchOptions(critical_types={"news"}))
    with open_stream(manager) as opened:
        thread = threading.Thread(target=lambda: manager.enqueue("news", 1))
        thread.start()
        thread.join()
        before = time.monotonic()
        assert manager.shutdown(2 * TIMEOUT)
        assert time.monotonic() - before < TIMEOUT
        assert opened.events() == [("news", 1)]


def test_a_stream_goes_with_its_block() -> None:
    manager = SSEManager()
    with record():
        with open_stream(manager) as opened:
            assert manager.get_stats().clients == 1
        assert manager.get_stats().clients == 0
        with pytest.raises(UsageError, match="the connection is not there any more"):
            opened.drop()


@pytest.mark.parametrize("source", [SSEManager(), make_board().client])
def test_a_stream_that_is_over_cannot_come_back(source: Any) -> None:
    with open_stream(source) as opened:
        pass
    with pytest.raises(UsageError, match="this stream is over: its open_stream"):
        opened.reconnect()
    with pytest.raises(UsageError, match="this clock is over"):
        opened.clock.advance(1)
    assert [frame.type for frame in opened.frames()][:1] == ["sse_open"]  # what has arrived stays


def test_a_stream_that_is_over_stays_so_while_the_time_is_held() -> None:
    with record() as sent:
        with open_stream(SSEManager()) as opened:
            pass
        sent.clock.advance(1)
        with pytest.raises(UsageError, match="this stream is over"):
            opened.reconnect()


def test_a_snapshot_that_fails_can_be_seen() -> None:
    app = Flask("app")
    SSE(app).snapshot("default")(lambda: {}["missing"])
    with open_stream(app) as opened:
        assert opened.busy == "snapshot"
        assert repr(opened) == "<Stream: closed, busy: snapshot, 1 blocks have arrived>"


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_plain_wsgi_app_has_streams() -> None:
    manager = SSEManager()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, headers, body = stream(manager, environ, [environ["PATH_INFO"].strip("/")])
        start_response(status, headers)
        return body

    with open_stream(app, "/a") as opened:
        manager.enqueue("x", 1, channel="a")
        opened.clock.advance(0.1)
        assert (opened.channels, opened.events()) == (["a"], [("x", 1)])


def test_a_view_of_the_apps_own_has_streams() -> None:
    app = Flask("app")
    app.config["SSE_URL_PREFIX"] = None
    sse = SSE(app)
    app.get("/mine")(lambda: sse.response(["a"]))
    with open_stream(app, "/mine") as opened:
        sse.enqueue("x", 1, channel="a")
        opened.clock.advance(0.1)
        assert opened.events() == [("x", 1)]


def test_detached_streams_are_tested_in_the_same_way() -> None:
    board = make_board()
    threads = threading.active_count()
    with open_stream(board.client, TEAM) as opened:
        send(board, 1)
        opened.clock.advance(0.1)
        assert opened.events()[2:] == [("order", {"n": 1})]
        assert threading.active_count() == threads


def test_a_middleware_that_passes_blocks_on_changes_nothing() -> None:
    board = make_board()
    inner = board.app.wsgi_app

    def passing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        yield from inner(environ, start_response)

    board.app.wsgi_app = passing  # type: ignore[method-assign]
    with open_stream(board.client, TEAM) as opened:
        send(board, 1)
        opened.clock.advance(0.1)
        opened.clock.advance(100)
        assert opened.events()[2:] == [("order", {"n": 1})]
        assert opened.is_open


def test_the_response_is_closed_as_a_server_does_it() -> None:
    class Body:
        closed = 0

        def __iter__(self) -> Iterator[bytes]:
            yield b"event: a\ndata: 1\nid: 1\n\n"

        def close(self) -> None:
            self.closed += 1

    answers = {"/stream": ("text/event-stream", stream_body := Body()), "/page": ("text/html", page_body := Body())}

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Body:
        media_type, body = answers[environ["PATH_INFO"]]
        start_response("200 OK", [("Content-Type", media_type)])
        return body

    with open_stream(app, "/stream") as opened:
        assert opened.events() == [("a", 1)]
        assert not opened.is_open
    with pytest.raises(StreamRefusedError, match="the app answered with 200 and no stream"), open_stream(app, "/page"):
        pass
    assert (stream_body.closed, page_body.closed) == (1, 1)


# -- what would wait forever -------------------------------------------------------------------------------------------


def test_reading_a_response_fails_at_once() -> None:
    board = make_board()
    with record(), pytest.raises(UsageError, match=r"would wait forever.*Use open_stream\(\)"):
        _ = board.client.get(TEAM).data


def test_iterating_a_client_fails_at_once() -> None:
    manager = SSEManager()
    with record(), pytest.raises(UsageError, match="would wait forever"):
        for _ in manager.subscribe():
            pass


def test_a_middleware_that_collects_the_response_fails_at_once() -> None:
    manager = SSEManager()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, headers, body = stream(manager, environ)
        start_response(status, headers)
        return [b"".join(body)]

    with pytest.raises(UsageError, match="something between the stream and the test reads on"):
        with open_stream(app, "/"):
            pass


def test_an_error_of_the_app_reaches_the_test() -> None:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        yield b"event: a\ndata: 1\n\n"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), open_stream(app, "/"):
        pass


@pytest.mark.parametrize(
    ("source", "options", "text"),
    [
        (7, {}, "takes a test client, a WSGI app or an SSEManager, not int"),
        (SSE(), {}, r"for an SSE, give app.test_client\(\) or sse.manager"),
        (SSEManager(), {"url": "/x"}, "a manager has no URLs"),
        (SSEManager(), {"headers": {}}, "a manager has no URLs"),
        (Flask("app"), {"channels": ["a"]}, "say them in the URL"),
        (Flask("app"), {"user": 7}, "say them in the URL"),
    ],
)
def test_wrong_sources_are_explained(source: Any, options: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text), open_stream(source, **options):
        pass


def test_invalid_names_of_a_manager_are_refused_as_in_production() -> None:
    manager = SSEManager()
    with pytest.raises(StreamRefusedError, match="cannot be named"), open_stream(manager, channels=["*"]):
        pass
    with pytest.raises(StreamRefusedError, match="not one string"), open_stream(manager, channels="a"):
        pass
    with pytest.raises(InvalidEventError), open_stream(manager, user=1.5):  # type: ignore[arg-type]
        pass


def test_an_answer_without_a_block_has_no_opening() -> None:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return []

    with open_stream(app, "/") as opened, pytest.raises(UsageError, match="no stream of sse_batcher"):
        _ = opened.opened_with


def test_a_stream_shows_its_state() -> None:
    with open_stream(SSEManager()) as opened:
        assert repr(opened) == "<Stream: open, 1 blocks have arrived>"
        opened.stall()
        assert repr(opened) == "<Stream: stalled, 1 blocks have arrived>"
    assert isinstance(opened, Stream)
    assert repr(opened) == "<Stream: closed, 1 blocks have arrived>"
