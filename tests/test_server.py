"""What servers tell of themselves: fakes of each shape, and shapes that we do not know; then the servers themselves."""

from __future__ import annotations

import gc
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from werkzeug.serving import make_server

import sse_batcher
from sse_batcher.transports.server import ServerInfo, inspect_server

from .kit.servers import GTHREAD, HOST, SERVERS, THREADS, gunicorn, running
from .kit.waiting import TIMEOUT, wait_until

ROOT = Path(sse_batcher.__file__).parents[1]

external = pytest.mark.external


# -- fakes -------------------------------------------------------------------------------------------------------------


class Connection:
    """A server's socket."""

    def __init__(self, fd: int = 7) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd


class Hostile:
    """A thing that looks like nothing we know, and objects to being looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __bool__(self) -> bool:
        raise RuntimeError("bool")


class Channel:
    """A connection of waitress."""

    def __init__(self, threads: int = 4) -> None:
        dispatcher = SimpleNamespace(threads=set(range(threads)), stop_count=0)
        self.server = SimpleNamespace(task_dispatcher=dispatcher)
        self.adj = SimpleNamespace(threads=threads)
        self.socket = Connection()
        self.total_outbufs_len = 0

    def check_client_disconnected(self) -> bool:
        return False


def fake(module: str, **attributes: Any) -> Any:
    """An object of a class of this module."""
    return type("Fake", (), {"__module__": module, **attributes})()


def worker(kind: str, **attributes: Any) -> Any:
    """A worker of gunicorn, with a method that handles its signals."""
    attributes = {"alive": True, "cfg": SimpleNamespace(threads=5, worker_connections=50), **attributes}
    return fake(f"gunicorn.workers.{kind}", handle=lambda self, *_: None, **attributes)


def thread_of_cheroot(**server: Any) -> Any:
    server = {"ready": True, "interrupt": None, "requests": SimpleNamespace(min=6, max=float("inf")), **server}
    conn = SimpleNamespace(socket=Connection())
    return fake("cheroot.workers.threadpool", server=SimpleNamespace(**server), conn=conn)


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have a worker handle these signals."""

    def handle(worker: Any, *names: str) -> None:
        handlers = {getattr(signal, name): worker.handle for name in names or ["SIGTERM"]}
        monkeypatch.setattr(signal, "getsignal", handlers.get)

    return handle


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Have the driver be this thread."""
    return lambda thread: monkeypatch.setattr(threading, "current_thread", lambda: thread)


# -- unknown -----------------------------------------------------------------------------------------------------------


def told(info: ServerInfo) -> tuple[str, int | None, int | None, bool]:
    return info.name, info.fd, info.threads, info.is_stopping()


def test_of_an_unknown_server_nothing_is_known() -> None:
    assert told(inspect_server({})) == ("", None, None, False)


def test_the_server_of_the_standard_library_is_known_by_its_name() -> None:
    assert told(inspect_server({"SERVER_SOFTWARE": "WSGIServer/0.2 CPython/3.14.0"})) == ("wsgiref", None, None, False)
    assert told(inspect_server({"SERVER_SOFTWARE": "gunicorn/27.0"})) == ("", None, None, False)


class MainThread:
    """The main thread of Python 3.13 and later; of those before if it has `_is_stopped`."""

    def __init__(self, old: bool) -> None:
        if old:
            self._is_stopped = False
        self.old = old
        self.alive = True

    def is_alive(self) -> bool:
        assert not self.old, "this takes the lock that the main thread is about to release"
        return self.alive

    def end(self) -> None:
        self.alive = False
        if self.old:
            self._is_stopped = True


@pytest.fixture(params=[True, False], ids=["3.12", "3.13"])
def main_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MainThread:
    main = MainThread(request.param)
    monkeypatch.setattr(threading, "main_thread", lambda: main)
    return main


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="unknown"),
        pytest.param({"werkzeug.socket": Connection()}, id="werkzeug"),
        pytest.param({"gunicorn.socket": Connection()}, id="gunicorn"),
        pytest.param({"waitress.client_disconnected": Channel().check_client_disconnected}, id="waitress"),
    ],
)
def test_a_process_stops_whose_main_thread_ends(main_thread: MainThread, environ: dict[str, Any]) -> None:
    info = inspect_server(environ)
    assert not info.is_stopping()
    main_thread.end()
    assert info.is_stopping()


def test_a_process_stops_whose_python_begins_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    info = inspect_server({})
    assert not info.is_stopping()
    monkeypatch.setattr(threading, "_SHUTTING_DOWN", True)
    assert info.is_stopping()


@pytest.mark.parametrize("embedder", ["uwsgi.version", "mod_wsgi.version"])
def test_the_main_thread_means_nothing_where_python_is_a_guest(main_thread: MainThread, embedder: str) -> None:
    info = inspect_server({embedder: "2.0"})
    main_thread.end()
    assert not info.is_stopping()


def test_a_main_thread_that_ended_before_the_stream_is_no_sign_of_stopping(main_thread: MainThread) -> None:
    main_thread.end()
    assert not inspect_server({}).is_stopping()


SCRIPT = """
import threading
from sse_batcher.transports.server import inspect_server

def serve():
    info = inspect_server({})
    print(info.is_stopping(), flush=True)
    begun.set()
    while not info.is_stopping():
        pause.wait(0.01)
    print("ended", flush=True)

begun, pause = threading.Event(), threading.Event()
{start}
begun.wait()
"""


@pytest.mark.parametrize(
    "start",
    [
        pytest.param("threading.Thread(target=serve).start()", id="thread"),
        pytest.param("from concurrent import futures; futures.ThreadPoolExecutor().submit(serve)", id="executor"),
    ],
)
def test_python_that_waits_for_its_threads_is_a_process_that_stops(start: str) -> None:
    command = [sys.executable, "-W", "error", "-c", SCRIPT.replace("{start}", start)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("False\nended\n", "")


SHAPES = {
    "gunicorn": "gunicorn.socket",
    "werkzeug": "werkzeug.socket",
    "waitress": "waitress.client_disconnected",
    "uwsgi": "uwsgi.version",
    "mod_wsgi": "mod_wsgi.version",
}

THINGS: dict[str, Callable[[], Any]] = {  # made later: pytest looks at what it is given
    "none": lambda: None,
    "object": object,
    "text": str,
    "number": int,
    "closed": lambda: Connection(-1),
    "other": lambda: fake("x", fileno=None, __self__=1),
    "hostile": Hostile,
}


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS)
@pytest.mark.parametrize("key", SHAPES.values(), ids=SHAPES)
def test_what_has_another_shape_is_unknown(
    key: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, current: Callable[[Any], None]
) -> None:
    thing = make()
    monkeypatch.setitem(sys.modules, "uwsgi", thing)
    monkeypatch.setattr(signal, "getsignal", lambda _: thing)
    current(thing)
    info = inspect_server({key: thing})
    assert told(info)[1:] == (None, None, False)
    assert info.name in {"", *SHAPES}


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS)
def test_a_server_that_takes_another_shape_is_not_stopping(
    make: Callable[[], Any], handle: Callable[..., None], current: Callable[[Any], None]
) -> None:
    thing, channel, its_worker, thread = make(), Channel(), worker("gthread"), thread_of_cheroot()
    handle(its_worker)
    infos = [
        inspect_server({"gunicorn.socket": Connection()}),
        inspect_server({"waitress.client_disconnected": channel.check_client_disconnected}),
    ]
    current(thread)
    infos.append(inspect_server({}))
    assert [info.name for info in infos] == ["gunicorn gthread", "waitress", "cheroot"]
    type(its_worker).alive = thread.server.ready = thread.server.interrupt = thing
    channel.server.task_dispatcher.threads = channel.server.task_dispatcher.stop_count = thing
    assert not any(info.is_stopping() for info in infos)


def test_what_tells_of_stopping_does_not_keep_the_request(
    handle: Callable[..., None], current: Callable[[Any], None]
) -> None:
    class Environ(dict[str, Any]):
        pass

    handle(worker("sync"))
    thread = thread_of_cheroot()
    channel = Channel()
    environs = [
        Environ({"gunicorn.socket": Connection()}),
        Environ({"werkzeug.socket": Connection()}),
        Environ({"waitress.client_disconnected": channel.check_client_disconnected}),
        Environ({"uwsgi.version": b"2"}),
        Environ(),
    ]
    references: list[weakref.ref[Any]] = [weakref.ref(environ) for environ in environs]
    connections = [environs[0]["gunicorn.socket"], environs[1]["werkzeug.socket"], channel, thread.conn.socket]
    references += [weakref.ref(connection) for connection in connections]
    infos = [inspect_server(environ) for environ in environs]
    current(thread)
    infos.append(inspect_server({}))
    del environs, channel, connections
    type(thread).conn = None  # as cheroot does after the request
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert not any(info.is_stopping() for info in infos)


# -- each --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "threads"),
    [
        ("sync", "gunicorn sync", 1),
        ("gthread", "gunicorn gthread", 5),
        ("ggevent", "gunicorn gevent", 50),
        ("geventlet", "gunicorn eventlet", 50),
        ("new", "gunicorn new", None),
    ],
)
def test_gunicorn_stops_with_its_worker(
    module: str, name: str, threads: int | None, handle: Callable[..., None]
) -> None:
    its_worker = worker(module)
    handle(its_worker)
    info = inspect_server({"gunicorn.socket": Connection()})
    assert told(info) == (name, 7, threads, False)
    type(its_worker).alive = False
    assert info.is_stopping()


def test_gunicorn_stops_with_the_process_that_started_its_worker(
    handle: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle(worker("gthread", ppid=os.getppid()))
    info = inspect_server({"gunicorn.socket": Connection()})
    assert not info.is_stopping()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert info.is_stopping()


def test_a_worker_of_ones_own_is_named_for_what_it_is_derived_from(handle: Callable[..., None]) -> None:
    class Mine(type(worker("gthread"))):  # type: ignore[misc]
        pass

    handle(Mine())
    assert told(inspect_server({"gunicorn.sock": Connection()})) == ("gunicorn gthread", 7, 5, False)


def test_gunicorn_is_found_by_another_signal_if_the_app_has_taken_one(handle: Callable[..., None]) -> None:
    handle(worker("sync"), "SIGQUIT", "SIGUSR1")
    assert inspect_server({"gunicorn.socket": Connection()}).name == "gunicorn sync"


def test_gunicorn_without_its_signals_still_shows_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    assert told(inspect_server({"gunicorn.socket": Connection()})) == ("gunicorn", 7, None, False)


def test_waitress_stops_when_all_of_its_threads_have_to_end() -> None:
    channel = Channel(threads=4)
    dispatcher = channel.server.task_dispatcher
    info = inspect_server({"waitress.client_disconnected": channel.check_client_disconnected})
    assert told(info) == ("waitress", 7, 4, False)
    dispatcher.stop_count = 1  # somebody wants one thread less
    assert not info.is_stopping()
    dispatcher.stop_count = 4
    assert info.is_stopping()
    dispatcher.threads, dispatcher.stop_count = {2}, 1  # the idle ones have ended
    assert info.is_stopping()
    dispatcher.threads, dispatcher.stop_count = set(), 0
    assert info.is_stopping()


@pytest.mark.parametrize("change", [{"ready": False}, {"interrupt": KeyboardInterrupt()}], ids=str)
def test_cheroot_stops_when_it_is_no_longer_ready_or_interrupted(
    change: dict[str, Any], current: Callable[[Any], None]
) -> None:
    thread = thread_of_cheroot()
    current(thread)
    info = inspect_server({})
    assert told(info) == ("cheroot", 7, 6, False)
    vars(thread.server).update(change)
    assert info.is_stopping()


def test_uwsgi_stops_when_one_of_its_threads_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    uwsgi = ModuleType("uwsgi")
    vars(uwsgi).update(connection_fd=lambda: 7, cores=3)
    monkeypatch.setitem(sys.modules, "uwsgi", uwsgi)
    ends = [threading.Event(), threading.Event(), threading.Event()]
    names = ["uWSGIWorker1Core1", "another", "uWSGIWorker1Core2"]
    threads = [threading.Thread(target=end.wait, name=name) for name, end in zip(names, ends, strict=True)]
    threads[0].start()
    try:
        info = inspect_server({"uwsgi.version": b"2.0.30"})
        assert told(info) == ("uwsgi", 7, 3, False)
        for thread in threads[1:]:  # it has just begun
            thread.start()
        assert not info.is_stopping()
        ends[1].set()
        gone(threads[1])
        assert not info.is_stopping()
        ends[2].set()
        gone(threads[2])
        assert info.is_stopping()
    finally:
        for end in ends:
            end.set()
        for thread in threads:
            thread.join()


def gone(thread: threading.Thread) -> None:
    wait_until(lambda: not os.path.exists(f"/proc/self/task/{thread.native_id}"), "the system has ended the thread")


def test_uwsgi_that_does_not_show_the_connection_is_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def connection_fd() -> int:
        raise SystemError("you can call uwsgi api function only from the main callable")

    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(connection_fd=connection_fd))
    assert told(inspect_server({"uwsgi.version": b"2.0.30"})) == ("uwsgi", None, None, False)


def test_werkzeug_stops_when_it_is_shut_down() -> None:
    found: list[ServerInfo] = []
    seen = threading.Event()
    shut_down = threading.Event()
    stopping: list[bool] = []

    def its_app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        found.append(inspect_server(environ))
        stopping.append(found[0].is_stopping())
        yield b"x"
        seen.set()
        assert shut_down.wait(TIMEOUT)
        stopping.append(found[0].is_stopping())

    server = make_server(HOST, 0, its_app, threaded=True)
    serving = threading.Thread(target=server.serve_forever, args=(0.01,))
    serving.start()
    with socket.create_connection((HOST, server.port), timeout=TIMEOUT) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert seen.wait(TIMEOUT)
        server.shutdown()
        serving.join()
        shut_down.set()
        while client.recv(1000):
            pass
    assert stopping == [False, True]
    assert (found[0].name, found[0].threads) == ("werkzeug", None)


def test_werkzeug_without_threads_serves_one_request_at_once() -> None:
    environ = {"werkzeug.socket": Connection(), "wsgi.multithread": False}
    assert inspect_server(environ).threads == 1
    assert inspect_server(environ | {"wsgi.multiprocess": True}).threads is None  # a process for each


# -- letting go --------------------------------------------------------------------------------------------------------

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


@pytest.fixture
def plain() -> Iterator[socket.socket]:
    with socket.socket() as connection:
        yield connection


def tls(connection: socket.socket) -> socket.socket:
    """The same connection, encrypted by Python."""
    return CONTEXT.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)


Find = Callable[..., ServerInfo]


@pytest.fixture(params=["gunicorn sync", "gunicorn gthread", "werkzeug", "waitress", "cheroot"])
def find(request: pytest.FixtureRequest, handle: Callable[..., None], current: Callable[[Any], None]) -> Find:
    """What is found of a server whose request has this connection."""

    def find(connection: Any, **more: Any) -> ServerInfo:
        if request.param.startswith("gunicorn"):
            handle(worker(request.param.split()[1]))
            environ = {"gunicorn.socket": connection}
        elif request.param == "werkzeug":
            environ = {"werkzeug.socket": connection}
        elif request.param == "waitress":
            channel = Channel()
            channel.socket = connection
            environ = {"waitress.client_disconnected": channel.check_client_disconnected}
        else:
            thread = thread_of_cheroot()
            thread.conn.socket = connection
            current(thread)
            environ = {}
        info = inspect_server({"SERVER_PROTOCOL": "HTTP/1.1"} | environ | more)
        assert info.name == request.param
        return info

    return find


def test_a_plain_connection_may_be_taken_over(find: Find, plain: socket.socket) -> None:
    info = find(plain)
    assert (info.lets_go, info.fd, info.obstacle) == (True, plain.fileno(), "")


def test_one_that_python_encrypts_may_not(find: Find, plain: socket.socket) -> None:
    with tls(plain) as encrypted:
        assert not find(encrypted).lets_go


def test_what_is_no_socket_of_python_may_not(find: Find) -> None:
    assert not find(Connection()).lets_go  # such as that of pyOpenSSL


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1", "HTTP/1.2", "HTTP/1.9"])
@pytest.mark.parametrize("length", ["", "0"])
def test_a_request_as_it_should_be_is_no_obstacle(find: Find, plain: socket.socket, protocol: str, length: str) -> None:
    assert find(plain, SERVER_PROTOCOL=protocol, CONTENT_LENGTH=length).obstacle == ""


@pytest.mark.parametrize("protocol", ["HTTP/2.0", "HTTP/0.9", "HTTP/1", "HTTP/1.10", "FOO/1.1", "HTTP/1.1\n", "", None])
def test_another_protocol_is_an_obstacle(find: Find, plain: socket.socket, protocol: Any) -> None:
    assert "version of HTTP" in find(plain, SERVER_PROTOCOL=protocol).obstacle


@pytest.mark.parametrize(
    "headers",
    [{"CONTENT_LENGTH": "5"}, {"CONTENT_LENGTH": "+0"}, {"HTTP_TRANSFER_ENCODING": "chunked"}],
    ids="-".join,
)
def test_a_body_is_an_obstacle(find: Find, plain: socket.socket, headers: dict[str, str]) -> None:
    assert find(plain, **headers).obstacle == "the request has a body"


@pytest.mark.parametrize(
    ("protocol", "detaches"),
    [("HTTP/1.1", True), ("HTTP/2.0", True), ("HTTP/3", True), ("HTTP/0.9", False), ("FOO/1.1", False)],
)
def test_uwsgi_gets_the_version_that_the_browser_speaks_to_nginx(
    protocol: str, detaches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(connection_fd=lambda: 7, cores=3, opt={}))
    info = inspect_server({"uwsgi.version": b"2.0.30", "SERVER_PROTOCOL": protocol})
    assert (info.obstacle == "") is detaches


def test_what_waitress_has_not_sent_yet_is_an_obstacle(plain: socket.socket) -> None:
    channel = Channel()
    channel.socket = plain
    environ = {"waitress.client_disconnected": channel.check_client_disconnected, "SERVER_PROTOCOL": "HTTP/1.1"}
    channel.total_outbufs_len = 7
    info = inspect_server(environ)
    assert info.obstacle == "an earlier response on the same connection is not sent yet"
    assert info.unsent() == 7
    channel.total_outbufs_len = 0
    assert (info.unsent(), inspect_server(environ).obstacle) == (0, "")
    del channel, environ
    assert info.unsent() == 0


def test_a_waitress_that_does_not_say_what_it_has_to_send_does_not_let_go(plain: socket.socket) -> None:
    channel = Channel()
    channel.socket = plain
    del channel.total_outbufs_len
    assert not inspect_server({"waitress.client_disconnected": channel.check_client_disconnected}).lets_go


@pytest.mark.parametrize(
    ("module", "lets_go"),
    [("sync", True), ("gthread", True), ("ggevent", False), ("geventlet", False), ("gtornado", False), ("new", False)],
)
def test_only_the_workers_of_gunicorn_that_have_threads_let_go(
    module: str, lets_go: bool, handle: Callable[..., None], plain: socket.socket
) -> None:
    handle(worker(module))
    assert inspect_server({"gunicorn.socket": plain}).lets_go is lets_go


def test_a_gunicorn_whose_worker_is_not_found_does_not_let_go(
    monkeypatch: pytest.MonkeyPatch, plain: socket.socket
) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    assert not inspect_server({"gunicorn.socket": plain}).lets_go


@pytest.mark.parametrize(("configured", "told"), [(0, None), (1000, 1000), ("1000", None)])
def test_the_most_requests_of_gunicorn_are_told(
    configured: Any, told: int | None, handle: Callable[..., None], plain: socket.socket
) -> None:
    handle(worker("gthread", cfg=SimpleNamespace(threads=5, max_requests=configured)))
    assert inspect_server({"gunicorn.socket": plain}).max_requests == told


def test_gunicorn_does_not_let_go_of_a_connection_of_http2(handle: Callable[..., None], plain: socket.socket) -> None:
    handle(worker("gthread"))
    environ = {"gunicorn.socket": plain, "SERVER_PROTOCOL": "HTTP/2.0", "HTTP_VERSION": "2"}
    info = inspect_server(environ)  # a client of HTTP/1 may have written that
    assert (info.http2, info.lets_go) == (False, True)
    info = inspect_server(environ | {"gunicorn.http2.priority_weight": 16})
    assert (info.http2, info.lets_go) == (True, False)


def test_werkzeug_that_makes_a_process_for_each_request_does_not_let_go(plain: socket.socket) -> None:
    environ = {"werkzeug.socket": plain, "wsgi.multithread": False, "wsgi.multiprocess": True}
    assert not inspect_server(environ).lets_go
    assert inspect_server(environ | {"wsgi.multiprocess": False}).lets_go


@pytest.mark.parametrize(
    ("options", "lets_go"),
    [
        ({}, True),
        ({"threads": b"4", "http-socket": b":80"}, True),
        ({"gevent": b"100"}, False),
        ({"async": b"10", "ugreen": True}, False),
        ({"asyncio": b"10", "greenlet": True}, False),
        ({"tornado": b"10", "greenlet": True}, False),
    ],
    ids=str,
)
def test_uwsgi_lets_go_unless_it_runs_without_threads(
    options: dict[str, Any], lets_go: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    uwsgi = SimpleNamespace(connection_fd=lambda: 7, cores=3, opt=options)
    monkeypatch.setitem(sys.modules, "uwsgi", uwsgi)
    info = inspect_server({"uwsgi.version": b"2.0.30"})
    assert (info.lets_go, info.unsent(), info.max_requests) == (lets_go, 0, None)


@pytest.mark.parametrize("environ", [{}, {"mod_wsgi.version": (5, 0)}], ids=["unknown", "mod_wsgi"])
def test_what_does_not_show_its_connection_does_not_let_go(environ: dict[str, Any]) -> None:
    assert not inspect_server(environ).lets_go


# -- real ones ---------------------------------------------------------------------------------------------------------

SYNC = gunicorn()


@external
@pytest.mark.parametrize(
    ("command", "signal_number", "name", "threads"),
    [
        pytest.param(SYNC, signal.SIGTERM, "gunicorn sync", 1, id="gunicorn sync"),
        pytest.param(GTHREAD, signal.SIGTERM, "gunicorn gthread", THREADS, id="gunicorn gthread"),
        pytest.param(GTHREAD, signal.SIGINT, "gunicorn gthread", THREADS, id="gunicorn gthread, interrupted"),
        pytest.param(GTHREAD, signal.SIGHUP, "gunicorn gthread", THREADS, id="gunicorn gthread, reloaded"),
        pytest.param(GTHREAD, signal.SIGKILL, "gunicorn gthread", THREADS, id="gunicorn gthread, its arbiter killed"),
        pytest.param(SERVERS["gunicorn-gevent"].command, signal.SIGTERM, "gunicorn gevent", 1000, id="gunicorn gevent"),
        pytest.param(SERVERS["waitress"].command, signal.SIGINT, "waitress", THREADS, id="waitress"),
        pytest.param(SERVERS["cheroot"].command, signal.SIGINT, "cheroot", THREADS, id="cheroot"),
        pytest.param(SERVERS["uwsgi"].command, signal.SIGHUP, "uwsgi", THREADS, id="uwsgi, reloaded"),
        pytest.param(SERVERS["uwsgi-http"].command, signal.SIGHUP, "uwsgi", THREADS, id="uwsgi http, reloaded"),
    ],
)
def test_a_server_shows_the_connection_and_soon_that_it_stops(
    command: tuple[str, ...], signal_number: int, name: str, threads: int, tmp_path: Path
) -> None:
    command = tuple(argument.replace("serverapp", "inspectapp") for argument in command)
    stopped = tmp_path / "stopped"

    def sees_it_after() -> float:
        with running(command, tmp_path) as server, server.watched():
            client = http.client.HTTPConnection(HOST, server.port, timeout=TIMEOUT)
            client.connect()
            client_name = client.sock.getsockname()
            client.request("GET", "/")
            answer = client.getresponse()
            found = json.loads(answer.readline())
            assert [found[0], found[1], found[3]] == [name, threads, False]
            routed = any(argument.startswith("--http=") for argument in command)  # by a process before the worker
            assert (tuple(found[2]) == client_name) != routed
            assert not stopped.exists()
            threading.Event().wait(0.2)  # uWSGI may still be starting its other threads
            start = time.monotonic()
            server.process.send_signal(signal_number)
            wait_until(stopped.exists, "it has seen that it has to stop")
            took = float(stopped.read_text()) - start
            stopped.unlink()
            answer.close()
            client.close()
        return took

    # Not after a time limit for requests. The machine may stand still in some of the tries.
    assert any(sees_it_after() < 5 for _ in range(4))
