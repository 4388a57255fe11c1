"""The sample app for type checkers does what it says when it runs."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session

from sse_batcher.testing import record

from . import typed_app
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT


@pytest.fixture
def manager() -> typed_app.SSEManager:
    return typed_app.create_manager()


def test_the_flask_app_answers() -> None:
    app = typed_app.create_app()
    client = app.test_client()
    assert client.post("/press").status_code == 200
    assert client.post("/leave").text == "0"
    assert client.get("/events/health").status_code == 200
    assert 'from "/events/sse-batcher.js?v=' in client.get("/page").text
    assert client.head("/team/events").status_code == 200
    with client.get("/own/events") as response:
        opened, *states = parse(next(iter(response.response)))  # type: ignore[arg-type]
    assert opened.json["channels"] == []
    assert [(state.type, state.data) for state in states] == [("message", "Hello 7")]
    with app.app_context():
        assert typed_app.sse.manager.shutdown(TIMEOUT)


def test_a_stream_begins_with_the_state(manager: typed_app.SSEManager) -> None:
    with manager:
        assert [event.type for event in parse(b"".join(typed_app.read(manager)))] == [
            *("sse_open", "state", "state"),
            "log",
        ]


def test_events_of_a_session_are_sent_when_it_commits() -> None:
    with typed_app.create_manager() as manager, record(manager) as sent, Session(create_engine("sqlite://")) as session:
        typed_app.change(manager, session, scoped_session(lambda: session))  # type: ignore[arg-type]
        assert [each.data for each in sent] == [{"id": 7}, "7", 7] * 2


def test_health_and_metrics_are_those_of_the_manager(manager: typed_app.SSEManager) -> None:
    with manager:
        assert typed_app.counters(manager)["clients"] == 0
        assert b"sse_batcher_events_enqueued_total 0.0" in typed_app.metrics(manager)


def test_the_engine_alone_makes_one_batch_of_each_channel() -> None:
    batches, stats = typed_app.batched(["a", "b"])
    assert [[event.data for event in batch.events] for batch in batches] == [[{"line": "b"}], ["a", "b"]]
    assert stats.enqueued == 4


def test_errors_name_the_field_or_the_option(manager: typed_app.SSEManager) -> None:
    with manager:
        assert typed_app.publish(manager, {}) == ""
        assert typed_app.publish(manager, float("nan")).startswith("data: ")
    assert "was closed in this process" in typed_app.publish(manager, {})
    assert typed_app.configured(-1) == "batch_window"


def test_the_receivers_of_signals_are_called(manager: typed_app.SSEManager) -> None:
    seen: list[str] = []
    receivers = typed_app.listen(manager, seen)
    with manager:
        manager.subscribe().close()
        typed_app.publish(manager, {"line": 1})
        typed_app.publish(manager, float("nan"))
    assert len(receivers) == 4
    assert sorted(re.sub(r"after \d+ s", "after 0 s", line) for line in seen) == [
        "client 1 left after 0 s, 0 frames and 0 bytes",
        "client 1 of ('default',) connected",
        "log in default for None: InvalidEventError",
        "log, shutdown",
    ]
