"""HTTP/2 that gunicorn itself speaks: it serves the requests of a connection one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from .kit.servers import HOST, THREADS, Server, Stream, gunicorn, running
from .kit.services import certificate
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.external

TLS = ("--certfile=tls.pem", "--keyfile=tls.pem", "--http-protocols=h2,h1")
CLEARTEXT = ("--http-protocols=h2,h1", "--http2-cleartext=both")  # as some clouds' proxies speak with it
COMMANDS = {
    "gthread": gunicorn("-k", "gthread", f"--threads={THREADS}", *TLS),
    "gthread, cleartext": gunicorn("-k", "gthread", f"--threads={THREADS}", *CLEARTEXT),
    "gevent": gunicorn("-k", "gevent", *TLS),
}


@contextmanager
def serving(command: tuple[str, ...], folder: Path, **config: Any) -> Iterator[Server]:
    certificate(folder, HOST)
    command = tuple(argument.replace("serverapp", "leavingapp") for argument in command)
    with running(command, folder, CONFIG=json.dumps(config)) as server, server.watched():
        server.tls = "--certfile=tls.pem" in command
        yield server


@contextmanager
def browser(server: Server) -> Iterator[httpx.Client]:
    """One that speaks HTTP/2, over one connection, as browsers do."""
    url = f"{'https' if server.tls else 'http'}://{HOST}:{server.port}"
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(http1=False, http2=True, verify=False, limits=limits, timeout=TIMEOUT, base_url=url) as client:
        yield client


@pytest.mark.parametrize("transport", ["attached", "auto"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_stream_over_http2_is_refused_softly_and_the_log_says_why(
    command: tuple[str, ...], transport: str, tmp_path: Path
) -> None:
    with serving(command, tmp_path, SSE_TRANSPORT=transport) as server, browser(server) as client:
        cursor = ""
        for _ in range(3):
            response = client.get("/events", headers={"Last-Event-ID": cursor})
            assert (response.http_version, response.status_code) == ("HTTP/2", 200)
            [busy] = parse(response.content, strict=True)
            assert (busy.type, busy.json, busy.id) == ("sse_busy", {"reason": "http2"}, cursor)
            assert 10_000 <= int(response.text.partition("retry: ")[2].partition("\n")[0]) <= 30_000
            assert client.get("/stats").json()["clients"] == 0  # over the same connection
            cursor = "5f3a9c1e-42"
        with Stream(server) as stream:  # over HTTP/1.1
            stream.until("sse_open")
            assert client.get("/stats").json()["clients"] == 1
        said = "[WARNING] sse_batcher.transports: streams are refused that come over HTTP/2 to gunicorn"
        assert server.output().count(said) == 1


@pytest.mark.parametrize("transport", ["attached", "auto"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_stream_over_http2_that_is_allowed_keeps_its_browser_waiting(
    command: tuple[str, ...], transport: str, tmp_path: Path
) -> None:
    config = {"SSE_HTTP2": "allow", "SSE_TRANSPORT": transport}
    with serving(command, tmp_path, **config) as server, browser(server) as client:
        with client.stream("GET", "/events") as response:
            blocks = response.iter_text()
            assert next(blocks).startswith("event: sse_open\n")
            assert server.stats()["clients_by_transport"] == {"attached": 1, "detached": 0}
            server.enqueue(("hub_state", 1))
            assert next(blocks).startswith("event: hub_state\n")
            with pytest.raises(httpx.ReadTimeout):
                client.get("/stats", timeout=1)
