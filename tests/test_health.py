"""The answers to health checks: live, ready, and the one for monitoring."""

from __future__ import annotations

import gc
import json
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from flask import Flask

from sse_batcher import SSE, EventBatcher, SSEManager, UsageError, health
from sse_batcher.backends.memory import MemoryBackend
from sse_batcher.manager_state import process_of
from sse_batcher.transports.detached.loop import Loop, loop
from sse_batcher.transports.health import STALLED_SECONDS
from sse_batcher.transports.server import ServerInfo
from sse_batcher.transports.watcher import Watch, Watcher, watcher

from .kit import locks
from .kit.leaving import serving_app
from .kit.redisserver import redis_server
from .kit.servers import GTHREAD, HOST, Server, gunicorn, running, with_threads
from .kit.threads import in_thread
from .kit.waiting import TIMEOUT, wait_until
from .kit.watched import IdleWorker, Watched

Answer = tuple[int, Any]
OK = (200, {"status": "ok", "backend_answered": 0.0})
LIVES = (200, {"status": "ok"})


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    with SSEManager() as manager:
        yield manager


@pytest.fixture(autouse=True)
def without_streams_of_other_tests() -> Iterator[None]:
    kept = loop.swap(None), watcher.swap(None)
    yield
    loop.swap(kept[0])
    watcher.swap(kept[1])


def ask(manager: SSEManager, check: Any = None, method: str = "GET") -> tuple[str, dict[str, str], bytes]:
    """Ask through the validator of the standard library. Returns the status, the headers and the body."""
    got: list[Any] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        status, headers, body = health(manager, environ, check)
        start_response(status, headers)
        return body

    environ: dict[str, Any] = {"REQUEST_METHOD": method, "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    body = validator(app)(environ, lambda *answer: got.extend(answer) or len)  # type: ignore[func-returns-value]
    text = b"".join(body)
    body.close()
    return got[0], dict(got[1]), text


def answer_of(manager: SSEManager, check: Any = None) -> Answer:
    status, _, body = ask(manager, check)
    return int(status.split()[0]), json.loads(body)


# -- all three ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["live", "ready", None])
def test_flask_and_wsgi_answer_alike_and_caches_keep_nothing(check: str | None) -> None:
    app = Flask(__name__)
    with SSE(app).manager as manager:
        client, path = app.test_client(), "/events/health" + (f"/{check}" if check else "")
        with app.app_context():
            status, headers, body = ask(manager, check)
        for response in (client.get(path), client.head(path)):
            assert response.status == status == "200 OK"
            found = dict(response.headers)
            assert {name: found[name] for name in headers} == headers
        assert client.get(path).data == body
        assert client.head(path).data == b""
        assert headers == {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
        }
        assert client.post(path).status_code == 405


@pytest.mark.parametrize("check", ["live", "ready", None])
def test_head_has_no_body_and_other_methods_are_refused(manager: SSEManager, check: str | None) -> None:
    status, headers, _ = ask(manager, check)
    assert ask(manager, check, "HEAD") == (status, headers, b"")
    assert ask(manager, check, "POST")[0] == "405 Method Not Allowed"


def test_another_question_is_an_error(manager: SSEManager) -> None:
    with pytest.raises(UsageError, match="check is"):
        health(manager, {}, "alive")  # type: ignore[arg-type]


def test_a_check_starts_no_thread_and_takes_no_lock() -> None:
    with locks.recorded() as made, SSEManager() as manager:
        process_of(manager).stats()  # makes the engine of its batcher
        before = threading.active_count()
        with made.held(at_least=3):
            for check, expected in [("live", LIVES), ("ready", OK), (None, OK)]:
                assert in_thread(answer_of, manager, check) == expected
        assert threading.active_count() == before


def test_a_backend_that_does_not_answer_is_for_monitoring_only(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventBatcher, "publishing_for", 5.1)
    assert answer_of(manager, "live") == LIVES
    assert answer_of(manager, "ready") == (200, {"status": "degraded", "backend_answered": 0.0})
    assert answer_of(manager) == (503, {"status": "backend", "backend_answered": 0.0})


def test_a_process_that_ends_is_alive_but_not_ready(manager: SSEManager) -> None:
    manager.shutdown()
    assert answer_of(manager, "live") == LIVES
    for check in ("ready", None):
        assert answer_of(manager, check) == (503, {"status": "draining", "backend_answered": 0.0})


def test_a_server_that_is_stopping_is_not_ready_even_without_streams(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_batcher.wsgi.inspect_server", lambda _: ServerInfo("a server", None, 4, lambda: True))
    assert answer_of(manager, "ready") == (503, {"status": "draining", "backend_answered": 0.0})


# -- live --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_and_cannot_be_started_is_what_live_reports(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = manager.subscribe()
    manager.enqueue("before", 1)
    assert manager.flush_all(TIMEOUT)

    def die(*_: object) -> None:
        raise SystemExit

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken:
        broken.setattr(MemoryBackend, "publish", die)
        broken.setattr(threading.Thread, "start", refuse)
        manager.enqueue("lost", 1)
        wait_until(lambda: answer_of(manager, "live")[0] == 503, "live says so")
        assert answer_of(manager, "live") == (503, {"status": "thread", "thread": "sse_batcher"})
        assert answer_of(manager, "ready") == OK
    assert answer_of(manager, "live") == LIVES  # it was started again
    manager.enqueue("after", 2)
    assert manager.flush_all(TIMEOUT)
    assert b"after" in b"".join(next(client) for _ in range(3))


def test_in_memory_a_delivery_that_hangs_is_reported(manager: SSEManager, monkeypatch: pytest.MonkeyPatch) -> None:
    with SSEManager(backend="redis://127.0.0.1:1/0") as other:
        for seconds, expected in [
            (STALLED_SECONDS - 1, LIVES),
            (STALLED_SECONDS + 1, (503, {"status": "thread", "thread": "sse_batcher"})),
        ]:
            with monkeypatch.context() as patched:
                patched.setattr(EventBatcher, "publishing_for", seconds)
                assert answer_of(manager, "live") == expected
                assert answer_of(other, "live") == LIVES  # it waits for Redis


class Task:
    """What a loop runs: something happens in the middle of the turn."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self._happens = happens

    def serve(self) -> Iterator[None]:
        self._happens()
        return iter(())


def test_a_loop_that_hangs_is_reported(manager: SSEManager) -> None:
    now, answers = [1_000.0], []
    hanging = Loop(lambda: now[0], make_worker=IdleWorker)
    loop.swap(hanging)

    def hang() -> None:
        for seconds in (0.0, STALLED_SECONDS, 1.0):
            now[0] += seconds
            answers.append(answer_of(manager, "live"))

    hanging.post(Task(hang))  # type: ignore[arg-type]
    hanging.work()
    assert answers == [LIVES, LIVES, (503, {"status": "thread", "thread": "sse_batcher-loop"})]
    hanging.work()  # there is nothing left to do
    now[0] += 10 * STALLED_SECONDS
    assert answer_of(manager, "live") == LIVES
    hanging.post(Task(lambda: answers.append(answer_of(manager, "live"))))  # type: ignore[arg-type]
    hanging.work()
    assert answers[-1] == LIVES, "the time without streams counts"
    hanging.let_go()


def watched(watching: Watcher, threads: int | None) -> tuple[Watch, Watched]:
    stream = Watched()
    watch = Watch(stream, ServerInfo("a server", None, threads, lambda: False), send_timeout=30)
    watching.add(watch)
    return watch, stream


def test_a_watcher_that_hangs_is_reported(manager: SSEManager, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Watcher(make_worker=IdleWorker)
    watcher.swap(hanging)
    watch, _stream = watched(hanging, None)
    assert answer_of(manager, "live") == LIVES, "the time without streams counts"
    monkeypatch.setattr("sse_batcher.transports.health.STALLED_SECONDS", 0.05)
    wait_until(
        lambda: answer_of(manager, "live") == (503, {"status": "thread", "thread": "sse_batcher-watcher"}), "it is seen"
    )
    hanging.remove(watch)
    hanging.work()
    assert answer_of(manager, "live") == LIVES


# -- ready: the server's threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "full"), [(2, 2), (3, 2), (8, 7), (None, None), (1, None)])
def test_ready_is_over_when_streams_leave_one_thread(
    manager: SSEManager, threads: int | None, full: int | None
) -> None:
    watching = Watcher(make_worker=IdleWorker)
    watcher.swap(watching)
    all_streams, reported = [], None
    for number in range(1, 9 if threads != 1 else 2):
        all_streams.append(watched(watching, threads))
        if answer_of(manager, "ready") != OK:
            reported = number
            break
    assert reported == full
    if full:
        assert answer_of(manager, "ready") == (503, {"status": "threads", "backend_answered": 0.0})
        assert answer_of(manager) == OK
        watching.remove(all_streams.pop()[0])
        assert answer_of(manager, "ready") == OK
    for watch, _ in all_streams:
        watching.remove(watch)


class Stopping:
    """Says whether a server is stopping, and so may keep the server and its app alive."""

    def __call__(self) -> bool:
        return False


def test_the_number_of_threads_is_known_without_keeping_the_server_alive() -> None:
    watching, stopping, stream = Watcher(make_worker=IdleWorker), Stopping(), Watched()
    reference = weakref.ref(stopping)
    watch = Watch(stream, ServerInfo("a server", None, 4, stopping), send_timeout=30)
    watching.add(watch)
    watching.remove(watch)
    del watch, stopping
    gc.collect()
    assert reference() is None


# -- under a real server -----------------------------------------------------------------------------------------------


def asked(server: Server, question: str = "") -> Answer:
    connection = server.connect()
    try:
        connection.request("GET", f"/events/health{question}")
        response = connection.getresponse()
        return response.status, json.loads(response.read())["status"]
    finally:
        connection.close()


@pytest.mark.external
def test_without_redis_the_process_stays_in_the_load_balancer(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as redis, serving_app(GTHREAD, tmp_path, backend=redis.url) as server:
        well = [(200, "ok")] * 3

        def all_three() -> list[Answer]:
            return [asked(server, question) for question in ("/live", "/ready", "")]

        with socket.create_connection((HOST, server.port), timeout=TIMEOUT) as connection:
            connection.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")  # so that the process reads
            assert b"200 OK" in connection.recv(100)
            assert all_three() == well
            redis.kill()
            wait_until(lambda: asked(server) == (503, "backend"), "monitoring sees that Redis is away")
            assert all_three() == [(200, "ok"), (200, "degraded"), (503, "backend")]
            redis.start()
            wait_until(lambda: all_three() == well, "it is well again")


@pytest.mark.external
def test_streams_that_leave_one_thread_send_new_requests_elsewhere(tmp_path: Path) -> None:
    command = with_threads(GTHREAD, 4)
    with serving_app(command, tmp_path, transport="attached") as server, ExitStack() as opened:
        for number in range(1, 4):
            connection = opened.enter_context(socket.create_connection((HOST, server.port), timeout=TIMEOUT))
            connection.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in connection.recv(100)
            expected = (503, "threads") if number == 3 else (200, "ok")
            wait_until(lambda expected=expected: asked(server, "/ready") == expected, f"so it is with {number}")  # type: ignore[misc]
            assert (asked(server), asked(server, "/live")) == ((200, "ok"), (200, "ok"))
        connection.close()
        wait_until(lambda: asked(server, "/ready") == (200, "ok"), "it is ready again")


HELD_APP = """
import signal, time
from pathlib import Path
from flask import Flask
from sse_batcher import SSE

app = Flask(__name__)
sse = SSE(app)

@app.get("/held")
def held():
    Path("began").touch()
    worker = signal.getsignal(signal.SIGTERM).__self__
    while worker.alive:  # until gunicorn has told it to stop
        time.sleep(0.01)
    return "ok"
"""


@pytest.mark.external
def test_while_gunicorn_drains_it_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "heldapp.py").write_text(HELD_APP)
    command = gunicorn("-k", "gthread", "--threads=1", "--graceful-timeout=20")
    command = tuple(argument.replace("serverapp", "heldapp") for argument in command)
    with running(command, tmp_path, PYTHONPATH=str(tmp_path)) as server, server.watched():
        assert asked(server, "/ready") == (200, "ok")
        holding, waiting = server.connect(), server.connect()
        with closing(holding), closing(waiting):
            holding.request("GET", "/held")
            wait_until((tmp_path / "began").exists, "the only thread is taken")
            waiting.request("GET", "/events/health/ready")  # is served after that
            wait_until(lambda: has_been_read(server.port), "the worker has taken the second connection")
            server.process.send_signal(signal.SIGTERM)
            assert holding.getresponse().read() == b"ok"
            response = waiting.getresponse()
            assert (response.status, json.loads(response.read())["status"]) == (503, "draining")


def has_been_read(port: int) -> bool:
    """Whether the server has accepted all connections to its port, so that none waits in the kernel's queue."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (queue,) = {row[4].split(":")[1] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"}
    return int(queue, 16) == 0
