"""The monitor with a real Redis: how many processes there are, its state, and kicks for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from sse_batcher import SSE, SSEManager
from sse_batcher.backends.redis.backend import RedisBackend
from sse_batcher.backends.redis.connections import connector
from sse_batcher.backends.redis.presence import GONE_SECONDS, NOTE_SECONDS, Presence
from sse_batcher.backends.redis.state import State
from sse_batcher.monitor.overview import Monitor

from .kit.documents import text_of
from .kit.receiver import RecordingReceiver
from .kit.redisserver import RedisServer, cursor_of, redis_fixture
from .kit.viewers import Make, Viewer, managers_fixture
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

server = redis_fixture()
make = managers_fixture()


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sse_batcher.backends.redis.presence.NOTE_SECONDS", 0.1)
    monkeypatch.setattr("sse_batcher.backends.redis.presence.GONE_SECONDS", 1.0)
    monkeypatch.setattr("sse_batcher.monitor.overview.SHARED_SECONDS", 0.0)
    monkeypatch.setattr("sse_batcher.monitor.overview.REST", 0)


def backend_of(manager: SSEManager) -> dict[str, Any]:
    shown: dict[str, Any] = Monitor(manager).look()["backend"]
    return shown


def test_redis_knows_how_many_processes_there_are(server: RedisServer, make: Make) -> None:
    first, second = make(server.url), make(server.url)
    for manager in (first, second):
        cursor_of(manager)
    expected = {"is_shared": True, "is_known": True, "unhealthy": None, "unread": 0, "processes": 2}
    wait_until(lambda: backend_of(first) == expected, "it sees both")  # again, if the machine stood still for a note
    second.shutdown()
    wait_until(lambda: backend_of(first)["processes"] == 1, "one has gone")


def test_without_the_right_the_number_is_not_known_and_all_else_works(server: RedisServer, make: Make) -> None:
    [rights] = re.findall(r"^ACL SETUSER (.*)$", text_of("guides/redis"), flags=re.MULTILINE)
    assert "+zcard" in rights
    server.client.execute_command("ACL", "SETUSER", *rights.replace("+zcard", "").split())
    manager = make(server.url.replace("//", "//app:password@"))
    with Viewer(manager) as viewer:
        manager.enqueue("n", 1)
        viewer.until_type("n")
        assert server.client.zcard("sse_batcher:processes") == 1
        assert backend_of(manager)["processes"] is None
        assert backend_of(manager)["unhealthy"] is None


def test_batches_that_have_not_come_back_are_counted(server: RedisServer) -> None:
    state = State()
    backend = RedisBackend(*connector(server.url), 100, state=state)
    state.added = 3
    assert backend.unread == 0  # it reads nothing yet
    receiver = RecordingReceiver()
    backend.connect(receiver)
    backend.open(None)
    assert backend.close(TIMEOUT)
    state.added = state.settled + 3
    assert backend.unread == 3


def test_a_kick_in_the_monitor_reaches_all_processes(server: RedisServer, make: Make) -> None:
    other = make(server.url)
    app = Flask("site")
    app.config.update(SECRET_KEY="secret", SSE_BACKEND=server.url)
    sse = SSE(app)
    sse.allow_monitor(lambda: True)
    sse.allow_kick(lambda: True)
    cursor_of(other)
    stream = other.subscribe(user="ada")
    next(stream)
    client = app.test_client()
    data: Any = client.get("/events/monitor/data").json
    body = {"user": '"ada"', "process": "another", "token": data["kick"]["token"]}
    answer = client.post("/events/monitor/kick", json=body, headers={"Sec-Fetch-Site": "same-origin"})
    assert answer.json == {"ended": 0, "everywhere": True, "error": None}
    assert b'"reason":"kicked"' in b"".join(stream)
    assert sse.manager.shutdown()


class Commands:
    """A client of Redis that notes what is asked, and answers with the last of these."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Any, ...]] = []

    def pipeline(self, *, transaction: bool) -> Commands:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.asked.append((name, *arguments))

    def execute(self) -> list[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [1, 0, answer]


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sse_batcher.backends.redis.presence.NOTE_SECONDS", NOTE_SECONDS)
    monkeypatch.setattr("sse_batcher.backends.redis.presence.GONE_SECONDS", GONE_SECONDS)
    return


@pytest.mark.usefixtures("seldom")
def test_a_note_is_made_every_ten_seconds_whatever_redis_answers() -> None:
    import redis

    presence, client = (
        Presence("x:processes", "me"),
        Commands(3, redis.ResponseError("OOM"), 4, redis.ConnectionError()),
    )
    counts = []
    for now in (0.0, 9.9, 10.0, 19.0, 20.0):
        presence.note(client, now, 1_000_000.5 + 1_000 * now)
        counts.append(presence.count)
    assert counts == [3, 3, None, None, 4]
    assert client.asked[:4] == [
        ("zadd", "x:processes", {"me": 1_000_000}),
        ("zremrangebyscore", "x:processes", "-inf", "(970000"),
        ("zremrangebyscore", "x:processes", "(1030000", "+inf"),
        ("zcard", "x:processes"),
    ]
    assert len(client.asked) == 12
    with pytest.raises(redis.ConnectionError):  # which the reader handles
        presence.note(client, 30.0, 0)
