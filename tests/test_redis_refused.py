"""Redis refuses some of what is asked, or all of it: health and log say so, and no thread waits for long."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, render_template_string

from sse_batcher import SSE, BackendError, InvalidEventError, SSEManager
from sse_batcher.backends.redis.backend import RedisBackend
from sse_batcher.backends.redis.connections import Link
from sse_batcher.manager_state import process_of
from sse_batcher.streams.hub import Hub

from .kit.receiver import RecordingReceiver
from .kit.redisserver import RedisServer, cursor_of, redis_fixture, redis_server
from .kit.repository import ROOT
from .kit.servers import HOST
from .kit.sse_parser import parse
from .kit.threads import in_thread, start_in_thread
from .kit.viewers import FORGETFUL, STREAM, Make, Viewer, add, flat, managers, send, wait_until_read
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external

GUIDE = (ROOT / "docs" / "guides" / "redis.md").read_text()
[ACL] = re.findall(r"^ACL SETUSER (.*)$", GUIDE, re.MULTILINE)
RIGHTS = re.findall(r"\+(\S+)", ACL)
PAGE = "{{ sse_cursor() }}"
NOWHERE = "redis://127.0.0.1:1/0"


server = redis_fixture()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr("sse_batcher.process_state.STUCK_SECONDS", 0.5)
    with managers(monkeypatch) as make:
        yield make


def log_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [
        (record.levelno, record.getMessage())
        for record in caplog.records
        if record.name == "sse_batcher.backends.redis"
    ]


# -- one state for each that asks --------------------------------------------------------------------------------------


def test_what_one_user_of_redis_is_refused_says_nothing_of_another(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one, other = Link(lambda: None, "Reading from"), Link(lambda: None, "Publishing to")
    for _ in range(3):
        one.expect_answer()
        one.note_failure(OSError("no connection."))
        other.expect_answer()
        other.note_answer()
    assert one.silent_for > 0
    assert other.silent_for == 0
    one.note_answer()
    assert one.silent_for == 0
    assert log_lines(caplog) == [
        (logging.ERROR, "Reading from Redis fails: no connection. It is tried again, and not logged until it works."),
        (logging.INFO, "Reading from Redis works again"),
    ]


def allow(server: RedisServer, rights: str) -> str:
    """A user with the rights of the guide, and then these. The URL with its name."""
    server.client.execute_command("ACL", "SETUSER", *ACL.split(), *rights.split())
    return server.url.replace("//", "//app:password@")


@external
def test_the_rights_in_the_guide_suffice(server: RedisServer, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (make(allow(server, ""), history=FORGETFUL) for _ in range(2))
    start = cursor_of(one)
    with Viewer(one) as viewer:
        send(one, *range(10))
        assert viewer.numbers(9) == [*range(10)]
        wait_until_read(two)
        with Viewer(two, cursor=start) as other:  # older entries
            assert other.numbers(9) == [*range(10)]
        two.kick(user="ada")
        server.client.delete("sse_batcher:epoch")  # a new epoch, which both see
        viewer.until_type("sse_gap")
        assert not [line for line in log_lines(caplog) if line[0] >= logging.ERROR]
        server.client.xadd(STREAM, {"hello": "world"}, id=f"{2**64 - 1}-{2**64 - 1}")
        send(one, 10)  # the stream begins again
        viewer.until_type("sse_gap")
    assert not [line for line in log_lines(caplog) if line[0] >= logging.ERROR]
    denied = server.client.execute_command("ACL", "LOG")
    assert not [entry for entry in denied if b"client" not in str(entry).encode()], denied


def calls(server: RedisServer, command: str) -> int:
    """How many calls of this command the server has answered."""
    return int(server.client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


@external
@pytest.mark.parametrize("right", [right for right in RIGHTS if not right.startswith("z")])  # kicks: test_signing_redis
def test_a_right_that_is_missing_shows_in_health_and_once_in_the_log(
    server: RedisServer, make: Make, caplog: pytest.LogCaptureFixture, right: str
) -> None:
    caplog.set_level(logging.INFO)
    if right == "xadd":
        cursor_of(make(server.url))  # or the reader would need it, too
    if right == "del":
        server.client.xadd(STREAM, {"hello": "world"}, id=f"{2**64 - 1}-{2**64 - 1}")
        server.client.set("sse_batcher:epoch", "12345678")
    manager = make(allow(server, f"-{right}"))
    publishing_is_refused = right in {"xadd", "del"}
    name = "Publishing to" if publishing_is_refused else "Reading from"
    process_of(manager).place()  # the reader begins
    send(manager, 1)
    wait_until(lambda: manager.unhealthy_reason() == "backend", "health says that it is the backend")
    if publishing_is_refused:
        reads = calls(server, "xread")
        wait_until(lambda: calls(server, "xread") > reads + 1, "the reader has another answer")
    else:
        send(manager, 2)
        wait_until(lambda: any(entry.get(b"e") == b"2" for _, entry in server.client.xrange(STREAM)), "it is published")
    assert manager.unhealthy_reason() == "backend"
    assert manager.get_stats().backend_silent > 0.5
    [line] = [text for level, text in log_lines(caplog) if level >= logging.ERROR]
    assert line.startswith(f"{name} Redis fails: ")
    assert 'The documentation lists the rights that its user needs, under "Give its user few rights".' in line
    assert "## Give its user few rights" in GUIDE
    caplog.clear()
    allow(server, f"+{right}")
    wait_until(lambda: manager.unhealthy_reason() is None and "works again" in caplog.text, "it is well again")
    assert [text for _, text in log_lines(caplog) if "works again" in text] == [f"{name} Redis works again"]


@external
def test_a_replica_that_takes_no_events_is_an_illness_though_it_can_be_read(
    server: RedisServer, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server(tmp_path / "replica") as replica:
        cursor_of(make(server.url))
        replica.follow(server)
        manager = make(replica.url)
        with Viewer(manager) as viewer:
            send(manager, 1)
            wait_until(lambda: manager.unhealthy_reason() == "backend", "health says that it is the backend")
            send(make(server.url), 2)
            assert viewer.numbers(2) == [2]
            assert manager.unhealthy_reason() == "backend"
    [line] = [text for level, text in log_lines(caplog) if "Publishing" in text]
    assert "connect to the master" in line


@contextmanager
def cluster(folder: Path) -> Iterator[list[RedisServer]]:
    """Two nodes: the second has the slot of the epoch alone, if the prefix is not set."""
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(redis_server(folder / name, options={"--cluster-enabled": "yes"})) for name in "ab"
        ]
        slot = nodes[0].client.execute_command("CLUSTER", "KEYSLOT", "sse_batcher:epoch")
        nodes[0].client.execute_command("CLUSTER", "ADDSLOTS", *(each for each in range(16_384) if each != slot))
        nodes[1].client.execute_command("CLUSTER", "ADDSLOTS", slot)
        nodes[0].client.execute_command("CLUSTER", "MEET", HOST, nodes[1].port)
        for node in nodes:
            wait_until(
                lambda node=node: b"cluster_state:ok" in node.client.execute_command("CLUSTER", "INFO"),  # type: ignore[misc]
                "the cluster works",
            )
        yield nodes


@external
def test_in_a_cluster_a_prefix_in_braces_is_what_it_takes(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(tmp_path) as [node, _]:
        without = make(node.url)
        process_of(without).place()
        send(without, 1)
        assert without.flush_all(TIMEOUT)  # this key is here
        wait_until(lambda: without.unhealthy_reason() == "backend", "health says that it is the backend")
        with monkeypatch.context() as patch:
            patch.setattr("sse_batcher.backends.redis.backend.OPEN_SECONDS", 0.1)
            with pytest.raises(BackendError):
                without.subscribe()
        [line] = [text for level, text in log_lines(caplog) if level >= logging.ERROR]
        assert "?prefix={sse}" in line
        caplog.clear()
        within = make(f"{node.url}?prefix={{sse}}")
        with Viewer(within) as viewer:
            send(within, 1)
            assert viewer.numbers(1) == [1]
            node.client.delete("{sse}:epoch")
            viewer.until_type("sse_gap")
            node.client.xadd("{sse}:stream", {"hello": "world"}, id=f"{2**64 - 1}-{2**64 - 1}")
            send(within, 2)
            viewer.until_type("sse_gap")
            send(within, 3)
            assert viewer.numbers(3)[-1] == 3
        assert not [text for level, text in log_lines(caplog) if level >= logging.ERROR]


@external
def test_redis_that_is_busy_with_a_script_is_waited_for(server: RedisServer, make: Make) -> None:
    import redis

    server.config("lua-time-limit", 50)
    manager = make(server.url)
    with Viewer(manager) as viewer:
        script = threading.Thread(target=endless_script, args=(server,))
        script.start()
        wait_until(lambda: is_busy(server), "it is busy")
        send(manager, *range(20))
        assert not manager.flush_all(0.2)
        with redis.Redis(host=HOST, port=server.port) as client:
            client.script_kill()
        script.join(TIMEOUT)
        assert viewer.numbers(19) == [*range(20)]
    assert manager.get_stats().gaps == 0


def endless_script(server: RedisServer) -> None:
    import redis

    with redis.Redis(host=HOST, port=server.port) as client, pytest.raises(redis.ResponseError):
        client.eval("while true do end", 0)


def is_busy(server: RedisServer) -> bool:
    import redis

    try:
        server.client.ping()
    except redis.RedisError as error:
        return "BUSY" in str(error) or "busy" in str(error)
    return False


@external
def test_keys_that_redis_evicts_are_a_gap(server: RedisServer, make: Make) -> None:
    """With a policy that the guide warns of."""
    manager = make(server.url)
    server.config("maxmemory-policy", "allkeys-lru")
    with Viewer(manager) as viewer:
        for number in range(3):
            send(manager, number)
            assert viewer.numbers(number)[-1] == number
            server.config("maxmemory", 1)
            wait_until(lambda: not server.client.dbsize(), "all is evicted")
            server.config("maxmemory", 0)
            viewer.until_type("sse_gap")


# -- which clients wait ------------------------------------------------------------------------------------------------


@external
def test_a_cursor_of_the_future_waits_for_nothing(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPEN_SECONDS", "CATCH_UP_SECONDS"):
        monkeypatch.setattr(f"sse_batcher.backends.redis.backend.{name}", 20.0)
    manager = make(server.url)
    epoch = cursor_of(manager).partition("-")[0]
    began = time.monotonic()
    for ahead in [1, 500, 2_000, 10**7] * 5:
        cursor = f"{epoch}-{int(time.time() * 1000) + ahead}-0"
        client = manager.subscribe(last_event_id=cursor)
        assert flat(parse(next(client))) == ["malformed"]
        client.close()
        assert time.monotonic() - began < 10  # not even once as long as it may wait


@external
def test_a_cursor_that_is_ahead_while_redis_is_silent_comes_back_later(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_batcher.backends.redis.connections.SILENT_SECONDS", 0.5)
    monkeypatch.setattr("sse_batcher.backends.redis.connections.CALL_TIMEOUT_SECONDS", 20.0)
    one, two = make(server.url), make(server.url)
    with Viewer(one) as viewer, Viewer(two):
        send(one, 1)
        viewer.numbers(1)
        cursor = viewer.events[-1].id
        ahead = re.sub(r"-(\d+)-", lambda match: f"-{int(match[1]) + 5}-", cursor)
        server.signal(signal.SIGSTOP)
        wait_until(lambda: two.get_stats().backend_silent > 0.5, "Redis is silent")
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(BackendError):
                two.subscribe(last_event_id=ahead)
            assert time.monotonic() - began < 10  # and not after the time-out of a call
        server.signal(signal.SIGCONT)


@external
def test_a_client_that_is_ahead_of_a_reader_that_is_late_is_sent_away_with_its_cursor(
    server: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No false gap: the entry is there, and the reader will come to it."""
    monkeypatch.setattr("sse_batcher.backends.redis.backend.CATCH_UP_SECONDS", 0.01)
    manager = make(server.url)
    cursor_of(manager)
    stuck, go_on = threading.Event(), threading.Event()
    hub = process_of(manager).hub
    deliver = hub.deliver

    def slow(frame: Any) -> None:
        stuck.set()
        assert go_on.wait(TIMEOUT)
        deliver(frame)

    monkeypatch.setattr(hub, "deliver", slow)
    id = add(server, 1)
    assert stuck.wait(TIMEOUT)
    epoch = manager.cursor().partition("-")[0]
    with pytest.raises(BackendError, match="has not read as far"):
        manager.subscribe(last_event_id=f"{epoch}-{id}")
    go_on.set()


def test_two_clients_at_most_wait_long_for_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    import fakeredis

    monkeypatch.setattr("sse_batcher.backends.redis.backend.OPEN_SECONDS", 60.0)
    works = threading.Event()

    def connect() -> Any:
        if not works.is_set():
            raise OSError("no connection")
        return fakeredis.FakeRedis()

    backend = RedisBackend(connect, "sse_batcher", 10)
    receiver = RecordingReceiver()
    backend.connect(receiver)
    sent_away: list[BackendError] = []

    def open_stream() -> bool:
        try:
            backend.open(None)
        except BackendError as error:
            sent_away.append(error)
            return False
        return True

    results = [start_in_thread(open_stream) for _ in range(8)]
    wait_until(lambda: len(sent_away) == 6, "all but two of them are sent away")
    works.set()
    assert [result() for result in results].count(True) == 2
    assert backend.close(TIMEOUT)


def test_a_page_does_not_wait_for_redis_and_its_stream_begins_with_a_gap(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPEN_SECONDS", "SHORT_SECONDS"):
        monkeypatch.setattr(f"sse_batcher.backends.redis.backend.{name}", 1_000.0)  # more than the test may take
    app = Flask("site", static_folder=None)
    app.config["SSE_BACKEND"] = NOWHERE
    sse = SSE(app)
    app.add_url_rule("/", "page", lambda: render_template_string(PAGE))
    with app.app_context():
        manager = sse.manager
    assert [app.test_client().get("/").text for _ in range(3)] == ["unknown"] * 3
    assert sse.cursor() == "unknown"
    assert manager.shutdown(TIMEOUT)
    with SSEManager() as other:
        client = other.subscribe(last_event_id="unknown")
        assert flat(parse(next(client))) == ["malformed"]
        client.close()


@external
def test_the_page_after_the_first_one_knows_its_place(server: RedisServer) -> None:
    app = Flask("site", static_folder=None)
    app.config["SSE_BACKEND"] = server.url
    sse = SSE(app)
    app.add_url_rule("/", "page", lambda: render_template_string(PAGE))
    client = app.test_client()
    wait_until(lambda: client.get("/").text != "unknown", "the reader that the first page has begun knows it")
    assert client.get("/").text == sse.cursor()
    with app.app_context():
        assert sse.manager.shutdown(TIMEOUT)


def test_a_request_does_not_need_the_lock_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.RLock()
    monkeypatch.setattr("sse_batcher.process_state.Hub", partial(Hub, lock=lock))
    app = Flask("site", static_folder=None)
    sse = SSE(app)
    app.add_url_rule("/", "page", lambda: "ok")
    with app.app_context():
        manager = sse.manager
    with lock:
        assert in_thread(lambda: app.test_client().get("/").text) == "ok"
    assert manager.shutdown(TIMEOUT)


@external
def test_a_kick_that_no_process_would_understand_is_refused(server: RedisServer, make: Make) -> None:
    with pytest.raises(InvalidEventError):
        make(server.url).kick(channel="a\nb")


# -- fakeredis ---------------------------------------------------------------------------------------------------------


def test_fakeredis_does_for_tests_of_an_app(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    import fakeredis

    place = fakeredis.FakeServer()
    one, two = (make(fakeredis.FakeRedis(server=place)) for _ in range(2))
    with Viewer(one) as viewer, Viewer(two) as other:
        send(one, 1)
        assert viewer.numbers(1) == other.numbers(1) == [1]
        two.kick(channel="default")
        viewer.until_type("sse_bye")
    assert one.shutdown(TIMEOUT)
    assert two.shutdown(TIMEOUT)
    assert not [line for line in log_lines(caplog) if line[0] >= logging.WARNING]
