"""``?poll=1`` of a Flask app: what asks for a poll, what refuses one, and what is said of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from sse_batcher import SSE, Text, signals
from sse_batcher.options import TRANSPORTS

from .kit import flask_apps
from .kit.flask_apps import MakeApp, get
from .kit.polls import retry_of, to_end, types
from .kit.sse_parser import ServerEvent, parse
from .kit.waiting import TIMEOUT, wait_until

make_app = flask_apps.apps_fixture()


def ask(app: Any, query: str = "poll=1", cursor: str = "") -> list[ServerEvent]:
    """The answer to a poll, which has to end."""
    headers = {"Last-Event-ID": cursor} if cursor else {}
    with get(app, f"/events?{query}", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        return parse(b"".join(to_end(response.response)), strict=True)


def flushed(sse: SSE, *events: Any) -> None:
    for event in events:
        sse.enqueue("log", event)
    assert sse.manager.flush_all(TIMEOUT)


@pytest.fixture(params=TRANSPORTS)
def quick(make_app: MakeApp, request: pytest.FixtureRequest) -> tuple[Any, SSE]:
    """An app whose polls wait for a moment only."""
    return make_app(SSE_POLL_WAIT=0.05, SSE_HEARTBEAT=0.5, SSE_DEDUP_KEY=None, SSE_TRANSPORT=request.param)


def test_the_query_asks_for_a_poll(quick: tuple[Any, SSE]) -> None:
    app, sse = quick
    (opened,) = ask(app)
    flushed(sse, 1, 2)
    _, batch = ask(app, cursor=opened.id)
    assert batch.json["events"] == [1, 2]
    for query in ("poll=1&last_event_id=" + opened.id, "batch=1&poll=1&lastEventId=" + opened.id):
        assert ask(app, query)[1:] == [batch]
    assert [event.json for event in ask(app, "poll=1&batch=0", opened.id)[1:]] == [1, 2]
    assert types(ask(app, cursor=batch.id)) == ["sse_open"]  # after `poll_wait`


@pytest.mark.parametrize("query", ["", "poll=0", "poll=", "poll=true", "xpoll=1"])
def test_other_queries_ask_for_a_stream(quick: tuple[Any, SSE], query: str) -> None:
    app, sse = quick
    with get(app, f"/events?{query}") as response:
        blocks = iter(response.response)
        assert next(blocks).startswith(b"event: sse_open\n")
        assert sse.manager.get_stats().clients == 1
        flushed(sse, 1)
        assert b"event: log\n" in next(blocks)
        assert sse.manager.get_stats().clients == 1


def test_a_view_of_the_apps_own_answers_polls(quick: tuple[Any, SSE]) -> None:
    app, sse = quick
    with app.test_request_context("/mine?poll=1"):
        (opened,) = parse(b"".join(sse.response(["a"], user=7).response), strict=True)
    assert opened.json["channels"] == ["a"]


def test_a_poll_at_the_limit_is_refused_and_comes_back_later(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_HEARTBEAT=0.5, SSE_MAX_CLIENTS=1, SSE_POLL_WAIT=0.05)
    cursor = ask(app)[0].id
    with get(app) as response:
        next(iter(response.response))
        for sent in ("", cursor):
            with get(app, "/events?poll=1", headers={"Last-Event-ID": sent}) as refused:
                block = b"".join(refused.response)
            (busy,) = parse(block, strict=True)
            assert (busy.type, busy.json, busy.id) == ("sse_busy", {"reason": "limit"}, sent)
            assert 10_000 <= retry_of(block) <= 30_000
    flushed(sse, 1)
    assert types(ask(app, cursor=cursor)) == ["sse_open", "log"]


def test_a_poll_that_waits_counts_for_the_limit(make_app: MakeApp) -> None:
    app, _ = make_app(SSE_HEARTBEAT=0.5, SSE_MAX_CLIENTS=1)
    cursor = ask(app)[0].id
    with get(app, "/events?poll=1", headers={"Last-Event-ID": cursor}) as response:
        next(iter(response.response))
        (busy,) = ask(app)
        assert busy.json == {"reason": "limit"}
    assert types(ask(app)) == ["sse_open"]


def test_a_process_that_is_ending_refuses_polls(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_HEARTBEAT=0.5)
    cursor = ask(app)[0].id
    with get(app, "/events?poll=1", headers={"Last-Event-ID": cursor}) as response:
        blocks = iter(response.response)
        next(blocks)
        sse.manager.shutdown(0)
        assert next(blocks, None) is None
    (busy,) = ask(app, cursor=cursor)
    assert (busy.type, busy.json, busy.id) == ("sse_busy", {"reason": "draining"}, cursor)


def test_a_kick_ends_the_polls_of_a_user(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_HEARTBEAT=0.5)
    sse.identify(lambda: 7)
    cursor = ask(app)[0].id
    with get(app, "/events?poll=1", headers={"Last-Event-ID": cursor}) as response:
        blocks = iter(response.response)
        next(blocks)
        assert sse.kick(user=7) == 1
        assert next(blocks, None) is None


def test_a_new_poll_brings_the_state_and_one_that_goes_on_does_not(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_BATCHING=False, SSE_HEARTBEAT=0.5)
    sse.identify(lambda: 7)
    sse.snapshot(lambda channel: ("message", Text(f"<b>{channel}</b>")))
    sse.user_snapshot(lambda user: ("mine", user))
    for query, first in (("poll=1", "sse_open"), ("poll=1&last_event_id=old", "sse_gap")):
        events = ask(app, query)
        assert types(events) == [first, "message", "mine"]
        assert (events[1].data, events[2].json) == ("<b>default</b>", 7)
    sse.enqueue("log", 1, user=7)
    assert sse.manager.flush_all(TIMEOUT)
    assert types(ask(app, cursor=events[-1].id)) == ["sse_open", "log"]


def test_a_state_that_fails_refuses_the_poll(make_app: MakeApp) -> None:
    app, sse = make_app()
    sse.snapshot("default")(lambda: 1 / 0)
    (busy,) = ask(app)
    assert (busy.type, busy.json) == ("sse_busy", {"reason": "snapshot"})


def test_polls_are_not_reported(quick: tuple[Any, SSE], caplog: pytest.LogCaptureFixture) -> None:
    app, sse = quick
    told: list[str] = []

    def connected(sender: object, client: Any) -> None:
        told.append("connected")

    def disconnected(sender: object, reason: str, **values: object) -> None:
        told.append(reason)

    with (
        caplog.at_level(logging.DEBUG, logger="sse_batcher"),
        signals.client_connected.connected_to(connected, sender=sse.manager),
        signals.client_disconnected.connected_to(disconnected, sender=sse.manager),
    ):
        (opened,) = ask(app)
        flushed(sse, 1)
        ask(app, cursor=opened.id)
        ask(app, cursor=ask(app)[0].id)  # after `poll_wait`
        lines = [record.message for record in caplog.records if "stream" in record.message]
        with get(app) as response:  # by which it is seen that a stream is reported
            next(iter(response.response))
        wait_until(lambda: "left" in told, "the stream was reported")
    assert told == ["connected", "left"]
    assert [line for line in lines if "detached" not in line and "attached" not in line] == []
    assert [record.message for record in caplog.records if "ended after" in record.message]
    assert sse.manager.get_stats().clients == 0
