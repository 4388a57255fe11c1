"""What reads or compresses the response of a stream: it is kept away, or the log says what holds streams back."""

from __future__ import annotations

import json
import re
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask, Response, request, session
from flask_compress import Compress

from sse_batcher import SSE, SSEManager, stream
from sse_batcher.transports.attached import EXTRA_WRITE_SECONDS, LATE_WRITE_SECONDS, BufferingCheck
from sse_batcher.transports.server import ServerInfo
from sse_batcher.transports.watcher import Watch

from .kit.clock import Clock
from .kit.servers import HOST, SERVERS, Server, Stream, running
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT, wait_until
from .kit.watched import Watched

EVERYTHING = {"Accept-Encoding": "gzip, deflate, br, zstd"}

Hook = Callable[[Response], Any]


class Site:
    """An app with an after_request function."""

    def __init__(self, hook: Hook) -> None:
        self.app = Flask("site", static_folder=None)
        self.app.secret_key = "secret"
        self.sse = SSE(self.app)

        @self.app.after_request
        def after_request(response: Response) -> Response:
            hook(response)
            return response

    def get(self) -> Any:
        return self.app.test_client().get("/events", headers=EVERYTHING)


@pytest.fixture
def make() -> Iterator[Callable[[Hook], Site]]:
    sites = []

    def make_one(hook: Hook) -> Site:
        sites.append(Site(hook))
        return sites[-1]

    yield make_one
    for site in sites:
        assert site.sse.manager.shutdown(TIMEOUT)


def is_open(response: Any) -> bool:
    """Whether it is a stream whose first block comes at once."""
    with response:
        [first] = parse(next(iter(response.response)), strict=True)
        return first.type == "sse_open"


# -- functions after a request -----------------------------------------------------------------------------------------


def read_as_for_compression(response: Response) -> None:
    response.direct_passthrough = False
    response.get_data()


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(lambda response: response.get_data(), id="get_data"),
        pytest.param(lambda response: len(response.data), id="data"),
        pytest.param(lambda response: response.add_etag(), id="add_etag"),
        pytest.param(read_as_for_compression, id="get_data though passed on"),
    ],
)
def test_a_function_that_reads_a_stream_fails_with_the_reason(
    make: Callable[[Hook], Site], caplog: pytest.LogCaptureFixture, hook: Hook
) -> None:
    site = make(lambda response: request.endpoint == "sse_batcher.stream" and response.is_streamed and hook(response))
    assert site.get().status_code == 500
    (record,) = caplog.records
    assert record.exc_info is not None
    assert str(record.exc_info[1]).startswith("this response streams events and has no end, so its body cannot be read")
    assert site.sse.manager.get_stats().clients == 0


def set_cookie(response: Response) -> None:
    session["user"] = 1
    response.headers["X-Frame-Options"] = "DENY"
    response.set_cookie("a", "b")


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(set_cookie, id="headers and session"),
        pytest.param(lambda response: response.calculate_content_length(), id="calculate_content_length"),
        pytest.param(lambda response: response.content_length, id="content_length"),
        pytest.param(lambda response: response.direct_passthrough or response.get_data(), id="as for files"),
        pytest.param(lambda response: response.is_streamed or response.get_data(), id="as for streams"),
        pytest.param(lambda response: vars(response).update(response=iter(response.response)), id="wraps the body"),
    ],
)
def test_a_function_that_leaves_the_body_alone_does_no_harm(make: Callable[[Hook], Site], hook: Hook) -> None:
    assert is_open(make(hook).get())


def test_functions_for_the_end_of_a_response_are_called(make: Callable[[Hook], Site]) -> None:
    ended: list[int] = []
    site = make(lambda response: response.call_on_close(lambda: ended.append(1)))
    with site.get() as response:
        next(iter(response.response))
        assert ended == []
    assert ended == [1]
    assert site.sse.manager.get_stats().clients == 0


def test_the_response_is_of_the_apps_own_class(make: Callable[[Hook], Site]) -> None:
    class Own(Response):
        pass

    seen: list[bool] = []
    site = make(lambda response: seen.append(isinstance(response, Own)))
    site.app.response_class = Own
    assert is_open(site.get())
    assert seen == [True]


def test_the_answers_that_end_can_be_read(make: Callable[[Hook], Site]) -> None:
    site = make(lambda response: response.add_etag())
    client = site.app.test_client()
    assert client.options("/events").headers["ETag"]
    assert client.get("/events?channel=").status_code == 400


# -- compressors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["gzip", "deflate", "br", "zstd"])
def test_flask_compress_leaves_streams_alone_even_if_it_is_set_up_for_them(algorithm: str) -> None:
    app = Flask(__name__)
    app.config.update(
        COMPRESS_MIMETYPES=["text/event-stream"],
        COMPRESS_ALGORITHM=algorithm,
        COMPRESS_STREAMS=True,
        COMPRESS_MIN_SIZE=1,
    )
    sse = SSE(app)
    Compress(app)
    with sse.manager:
        response = app.test_client().get("/events", headers={"Accept-Encoding": algorithm})
        assert response.headers["Content-Encoding"] == "identity"
        assert is_open(response)


def test_djangos_gzip_middleware_leaves_streams_alone() -> None:
    from django.conf import settings
    from django.http import HttpRequest, StreamingHttpResponse
    from django.middleware.gzip import GZipMiddleware

    if not settings.configured:
        settings.configure()
    with SSEManager() as manager:

        def view(request: HttpRequest) -> StreamingHttpResponse:
            _, headers, body = stream(manager, {"REQUEST_METHOD": "GET"})
            return StreamingHttpResponse(body, headers=dict(headers))

        asked = HttpRequest()
        asked.META["HTTP_ACCEPT_ENCODING"] = "gzip"
        response = GZipMiddleware(view)(asked)
        assert next(iter(response)).startswith(b"event: sse_open\n")
        response.close()


# -- what passes -------------------------------------------------------------------------------------------------------


class Connection:
    """A connection to which the server has written so many bytes."""

    def __init__(self, *, later: bool = False) -> None:
        self.bytes: int | None = 1000  # an earlier response
        self.all_taken = True
        self.server = SimpleNamespace(writes_later=later)

    def written(self) -> tuple[int, bool] | None:
        return None if self.bytes is None else (self.bytes, self.all_taken)


Asked = Callable[[Connection], BufferingCheck]


@pytest.fixture
def begin(clock: Clock) -> Asked:
    """The first step has been taken."""

    def begin_check(connection: Connection) -> BufferingCheck:
        check = BufferingCheck(connection, clock)  # type: ignore[arg-type]
        assert check.is_passed_on() is None
        return check

    return begin_check


def test_blocks_pass_once_two_have_left(begin: Asked) -> None:
    connection = Connection()
    steps = begin(connection)
    connection.bytes = 1300
    assert steps.is_passed_on() is None
    connection.bytes = 1350
    assert steps.is_passed_on() is True


def test_a_server_that_asks_again_before_it_writes_is_held_back(begin: Asked) -> None:
    assert begin(Connection()).is_passed_on() is False


def test_a_compressor_that_sends_no_more_than_its_head_holds_back(begin: Asked) -> None:
    connection = Connection()
    steps = begin(connection)
    connection.bytes = 1310
    assert steps.is_passed_on() is None
    assert steps.is_passed_on() is False


def test_a_server_that_writes_in_another_thread_has_time(begin: Asked, clock: Clock) -> None:
    connection = Connection(later=True)
    steps = begin(connection)
    for _ in range(20):  # blocks that were waiting
        assert steps.is_passed_on() is None
    clock.now += LATE_WRITE_SECONDS - 0.1
    connection.bytes = 1300
    assert steps.is_passed_on() is None
    clock.now += LATE_WRITE_SECONDS - 0.1
    assert steps.is_passed_on() is None
    clock.now += 0.1
    connection.all_taken = False  # an earlier response is in the way, and its client does not read
    assert steps.is_passed_on() is None
    connection.all_taken = True
    assert steps.is_passed_on() is None
    clock.now += EXTRA_WRITE_SECONDS
    assert steps.is_passed_on() is False


def test_a_process_that_stood_still_has_time_to_write_what_it_has(begin: Asked, clock: Clock) -> None:
    connection = Connection(later=True)
    steps = begin(connection)
    clock.now += 10 * LATE_WRITE_SECONDS
    for _ in range(20):  # the thread of the stream has its turn, and the one that writes has not
        assert steps.is_passed_on() is None
    connection.bytes = 1300
    assert steps.is_passed_on() is None
    clock.now += LATE_WRITE_SECONDS
    assert steps.is_passed_on() is None  # each block has this time
    connection.bytes = 1350
    assert steps.is_passed_on() is True


def test_nothing_is_said_of_what_is_not_known(begin: Asked) -> None:
    connection = Connection()
    steps = begin(connection)
    connection.bytes = None
    assert steps.is_passed_on() is True


def test_what_was_written_counts_whether_it_was_sent_or_not() -> None:
    with socket.create_server((HOST, 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours, theirs:
        watch = Watch(Watched(), ServerInfo("", ours.fileno(), None, lambda: False), 30)
        assert watch.written() is None  # no request: maybe nothing is counted
        theirs.sendall(b"GET")
        assert ours.recv(3) == b"GET"
        assert watch.written() == (0, True)
        ours.sendall(b"12345")
        wait_until(lambda: watch.written() == (5, True), "its kernel has said that it was taken")
        ours.setblocking(False)
        sent = 5
        try:
            while True:
                sent += ours.send(bytes(100_000))  # more than the client takes
        except BlockingIOError:
            pass
        assert watch.written() == (sent, False)
        watch.close()
        assert watch.written() is None


def test_of_other_sockets_than_tcp_nothing_is_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch = Watch(Watched(), ServerInfo("", ours.fileno(), None, lambda: False), 30)
        assert watch.written() is None
        watch.close()
    assert Watch(Watched(), ServerInfo("", None, None, lambda: False), 30).written() is None


# -- middleware under real servers -------------------------------------------------------------------------------------

MIDDLEWARE = """
import gzip, io
from leavingapp import app, sse

def joins(body):
    yield b"".join(body)

def measures(body):
    blocks = list(body)
    assert sum(map(len, blocks))
    yield from blocks

def compresses(body):
    file = io.BytesIO()
    with gzip.GzipFile(mode="wb", fileobj=file) as packer:
        for block in body:
            packer.write(block)
            yield file.getvalue()  # its head, and then nothing for long
            file.seek(0), file.truncate()
    yield file.getvalue()

class Around:
    def __init__(self, body):
        self.body, self.read = body, READ(body)
    def __iter__(self):
        return self.read
    def close(self):
        self.body.close()

def middleware(environ, start_response, around=app.wsgi_app):
    body = around(environ, start_response)
    return Around(body) if environ["PATH_INFO"] == "/events" else body

app.wsgi_app = middleware
"""
NAMES = ("werkzeug", "gunicorn", "waitress", "cheroot", "uwsgi", "gunicorn-gevent")
CASES = [(name, "joins") for name in NAMES] + [("gunicorn", "measures"), ("gunicorn", "compresses")]


def read(server: Server, cursor: str = "") -> list[Any]:
    """All blocks of a stream that ends."""
    with Stream(server, {"Last-Event-ID": cursor}) as stream:
        body = stream.response.read()
    return list(parse(zlib.decompress(body, wbits=31) if body.startswith(b"\x1f") else body, strict=True))


def deliver(server: Server, data: Any) -> None:
    before = server.stats()["batches"]
    server.enqueue(("item", data))
    wait_until(lambda: server.stats()["batches"] > before, "it is delivered")


@pytest.mark.external
@pytest.mark.parametrize("transport", ["attached", "auto"])
@pytest.mark.parametrize(("name", "middleware"), CASES)
def test_a_stream_that_is_held_back_ends_with_what_there_is_and_the_log_says_why(
    name: str, middleware: str, transport: str, tmp_path: Path
) -> None:
    (tmp_path / "bufferedapp.py").write_text(MIDDLEWARE.replace("READ", middleware))
    command = tuple(argument.replace("serverapp", "bufferedapp") for argument in SERVERS[name].command)
    config = json.dumps({"SSE_TRANSPORT": transport, "SSE_HEARTBEAT": 0.5, "SSE_BATCHING": False})
    with running(command, tmp_path, CONFIG=config, PYTHONPATH=str(tmp_path)) as server, server.watched():
        first, bye = read(server)
        assert (first.type, bye.type, bye.json) == ("sse_open", "sse_bye", {"reason": "buffered"})
        for number in range(2):
            deliver(server, number)
            first, item, bye = read(server, bye.id)
            assert (first.type, item.json, bye.json) == ("sse_open", number, {"reason": "buffered"})
        assert server.stats()["clients"] == 0
        said = re.findall(r"\[ERROR\] (\S+): streams are held back", server.output())
        assert said == ["sse_batcher.watcher"]
        assert len(server.faults()) == 1
