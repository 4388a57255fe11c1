"""Extensions that many Flask apps have, beside streams, on real servers that have few threads.

A stream leaves its thread although an extension works on its response. If a middleware does not allow that, the stream
stays attached, and all works as well.
"""

from __future__ import annotations

import gzip
import http.client
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from .kit.servers import SERVERS, Server, running, with_threads
from .kit.sse_parser import EventStreamParser
from .kit.waiting import wait_until

pytestmark = pytest.mark.external

THREADS = 4
STREAMS = 6
EXTENSIONS = (
    *("login", "server_session", "cors", "talisman", "compress", "limiter", "debug_toolbar", "sentry"),
    "opentelemetry",
)


@pytest.fixture(scope="module", params=["gunicorn", "waitress"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(request.param, tmp_path_factory, *EXTENSIONS) as server:
        yield server


def serving(name: str, folders: pytest.TempPathFactory, *apps: str) -> Any:
    command = with_threads(SERVERS[name].command, THREADS)
    command = tuple(argument.replace("serverapp", "extensionapps") for argument in command)
    return running(command, folders.mktemp("server"), APPS=" ".join(apps))


class Visitor:
    """Asks one of the apps, with its cookies."""

    def __init__(self, server: Server, app: str) -> None:
        self._server, self._app = server, app
        self.headers = {"Origin": "https://example.com", "Accept-Encoding": "gzip", "Connection": "close"}

    def ask(self, path: str, method: str = "GET") -> http.client.HTTPResponse:
        connection = self._server.connect()
        connection.request(method, f"/{self._app}/{path}", headers=self.headers)
        response = connection.getresponse()
        if cookies := response.headers.get_all("Set-Cookie"):
            self.headers["Cookie"] = "; ".join(cookie.partition(";")[0] for cookie in cookies)
        return response

    def read(self, path: str, method: str = "GET") -> bytes:
        with self.ask(path, method) as response:
            assert response.status < 400, path
            return response.read()

    def counts(self) -> Mapping[str, Any]:
        stats = json.loads(unpacked(self.read("stats")))
        return {name: stats[name] for name in ("clients_by_transport", "undone")}


def unpacked(body: bytes) -> bytes:
    return gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body


def types(stream: http.client.HTTPResponse, parser: EventStreamParser) -> list[str]:
    """Read until there is an event."""
    while not (found := [event.type for event in parser.feed(stream.read1(65_536))]):
        pass
    return found


CHANGED: dict[str, tuple[str, str]] = {
    "cors": ("Access-Control-Allow-Origin", "https://example.com"),
    "talisman": ("X-Frame-Options", "SAMEORIGIN"),
    "compress": ("Content-Encoding", "identity"),
    "limiter": ("X-RateLimit-Limit", "6"),
}
"""The header that an extension adds to a stream, or must not change."""
SEEN = {"login": "ada", "server_session": "6", "sentry": "[1-9].*", "opentelemetry": "6"}
"""What an extension has seen in the end."""


@pytest.mark.parametrize("name", EXTENSIONS)
def test_streams_leave_their_threads_though_an_extension_works_on_them(server: Server, name: str) -> None:
    visitor = Visitor(server, name)
    if name in {"login", "server_session"}:
        if name == "login":
            assert visitor.ask("events").status == 403
        visitor.read("enter", "POST")
    with server.watched(), ExitStack() as stack:
        streams = [(stack.enter_context(visitor.ask("events")), EventStreamParser()) for _ in range(STREAMS)]
        for stream, parser in streams:
            assert (stream.status, stream.headers["Content-Encoding"]) == (200, "identity")
            header, value = CHANGED.get(name, ("Content-Type", "text/event-stream; charset=utf-8"))
            assert stream.headers[header] == value
            assert types(stream, parser) == ["sse_open"]
        detached = {"clients_by_transport": {"attached": 0, "detached": STREAMS}, "undone": 0}
        wait_until(lambda: visitor.counts() == detached, "all are detached")
        visitor.read("enqueue", "POST")
        for stream, parser in streams:
            assert types(stream, parser) == ["item"]
        page = visitor.ask("page")
        assert (page.headers["Content-Encoding"] == "gzip") == (name == "compress")
        assert (b"flDebug" in page.read()) == (name == "debug_toolbar")
    wait_until(lambda: not visitor.counts()["clients_by_transport"]["detached"], "all have left")
    if name == "limiter":
        assert visitor.ask("events").status == 429
    if name in SEEN:
        assert re.fullmatch(SEEN[name], visitor.read("seen").decode())
    assert server.faults() == []
    assert server.output().count("streams are detached from the threads of this") == 1
    assert "attached, and hold" not in server.output()


@pytest.mark.parametrize("name", ["gunicorn", "waitress"])
def test_streams_that_a_middleware_changes_stay_attached_and_leave_threads_to_pages(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with serving(name, tmp_path_factory, "chatty") as server, server.watched(), ExitStack() as stack:
        visitor = Visitor(server, "chatty")
        kept = [(stack.enter_context(visitor.ask("events")), EventStreamParser()) for _ in range(THREADS // 2)]
        for stream, parser in kept:
            assert types(stream, parser) == ["sse_open"]
        visitor.read("enqueue", "POST")
        for stream, parser in kept:  # a stream that goes on after its first block holds its thread by then
            assert types(stream, parser) == ["item"]
        for _ in range(STREAMS - len(kept)):  # read to the end: gunicorn waits until the client closes
            with visitor.ask("events") as stream:
                events = EventStreamParser().feed(stream.read())
                assert [event.type for event in events] == ["sse_open", "sse_bye"]
                assert events[-1].json == {"reason": "threads"}
        attached = {"clients_by_transport": {"attached": len(kept), "detached": 0}, "undone": STREAMS}
        assert visitor.counts() == attached
        visitor.read("enqueue", "POST")
        for stream, parser in kept:
            assert types(stream, parser) == ["item"]
        warnings = re.findall(r"\[WARNING\] sse_batcher.transports: (.*?): ", server.output())
        assert warnings == ["streams stay attached"]
        assert server.faults() == []
