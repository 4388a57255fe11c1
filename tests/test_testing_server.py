"""`live_server`: a real server for browsers and clients."""

from __future__ import annotations

import gc
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask, render_template_string

from sse_batcher import SSE, SSEManager, UsageError, stream
from sse_batcher.manager_state import existing_process_of
from sse_batcher.testing import live_server, record

from .kit.browser import chromium
from .kit.sse_parser import ServerEvent, parse
from .kit.waiting import wait_until

BOARD = """<p id=it>
<script type="module">
import { BatchedEventSource } from "{{ sse_script_url() }}";
const events = new BatchedEventSource("/events");
events.on("sse_open", () => { it.textContent = "open"; });
events.on("order", ({ id }) => { it.textContent = `order ${id}`; });
</script>
"""

QUICK_SECONDS = 30.0
"""Much more than the end of a server takes, and less than its time limit here."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may take long to end, so that it is seen whether it has."""
    monkeypatch.setattr("sse_batcher.testing.server.END_SECONDS", 2 * QUICK_SECONDS)


def make_app(**config: Any) -> tuple[Flask, SSE]:
    app = Flask("app")
    app.config.update(config)
    sse = SSE(app)
    app.get("/")(lambda: "a page")
    return app, sse


class Page:
    """Reads a stream in a thread, to its end."""

    def __init__(self, url: str) -> None:
        self._response = urllib.request.urlopen(url, timeout=10)
        self._received = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with self._response:
            self._received = self._response.read()

    def received(self) -> list[ServerEvent]:
        """Wait for the end of the stream, and return its events."""
        self._thread.join(10)
        assert not self._thread.is_alive()
        return parse(self._received, strict=True)


@pytest.mark.parametrize("transport", ["attached", "auto"])
def test_streams_end_in_good_order_with_the_server(transport: str) -> None:
    app, sse = make_app(SSE_TRANSPORT=transport)
    with live_server(app) as url:
        pages = [Page(f"{url}/events") for _ in range(3)]
        sse.enqueue("order", 7)
        before = time.monotonic()
    assert time.monotonic() - before < QUICK_SECONDS
    for page in pages:
        events = page.received()
        assert [event.type for event in events] == ["sse_open", "order", "sse_bye"]
        assert events[-1].json == {"reason": "shutdown"}
    assert not [thread.name for thread in threading.enumerate() if "live_server" in thread.name]
    assert sse.manager.shutdown()


@pytest.mark.parametrize("transport", ["attached", "auto"])
def test_an_app_that_was_served_is_collected_with_its_threads(transport: str) -> None:
    app, sse = make_app(SSE_TRANSPORT=transport, SSE_HEARTBEAT=0.1)
    with live_server(app) as url, urllib.request.urlopen(f"{url}/events", timeout=10) as response:
        while response.readline() != b":\n":  # a heartbeat: the stream was checked
            pass
    kept = weakref.ref(sse.manager)
    del app, sse, response

    def is_collected() -> bool:
        gc.collect()
        return kept() is None and not [t.name for t in threading.enumerate() if t.name.startswith("sse_batcher")]

    wait_until(is_collected, "nothing keeps them")


def test_the_next_server_has_streams_again() -> None:
    app, sse = make_app()
    for _ in range(3):
        with live_server(app) as url:
            page = Page(f"{url}/events")
        assert [event.type for event in page.received()] == ["sse_open", "sse_bye"]
    sse.manager.shutdown()


@pytest.mark.external
def test_a_browser_gets_events() -> None:
    app, sse = make_app()
    app.get("/board", endpoint="board")(lambda: render_template_string(BOARD))
    with chromium() as browser, live_server(app) as url:
        page = browser.new_page()
        page.goto(f"{url}/board", wait_until="load")
        page.wait_for_selector("text=open")
        sse.enqueue("order", {"id": 7})
        page.wait_for_selector("text=order 7")
    sse.manager.shutdown()


def test_pages_are_served_in_threads_beside_streams() -> None:
    app, sse = make_app()
    with live_server(app) as url:
        page = Page(f"{url}/events")
        with urllib.request.urlopen(url, timeout=10) as response:
            assert response.read() == b"a page"
        assert not url.endswith("/")
    page.received()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)
    sse.manager.shutdown()


def test_a_connection_without_a_request_delays_nothing() -> None:
    """Browsers open such connections, to have them ready."""
    app, sse = make_app()
    with live_server(app) as url:
        connection = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port))
        with urllib.request.urlopen(url, timeout=10):
            pass  # the server has accepted the other one by now
        before = time.monotonic()
    assert time.monotonic() - before < QUICK_SECONDS
    assert connection.recv(1) == b""
    connection.close()
    sse.manager.shutdown()


def test_the_requests_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    app, sse = make_app()
    with caplog.at_level(logging.INFO, "werkzeug"), live_server(app) as url, urllib.request.urlopen(url, timeout=10):
        pass
    assert caplog.records == []
    sse.manager.shutdown()


def test_a_manager_that_nothing_uses_does_not_begin() -> None:
    manager = SSEManager()
    with live_server(lambda environ, start_response: []):
        pass
    assert existing_process_of(manager) is None


def test_a_plain_wsgi_app_is_served() -> None:
    manager = SSEManager()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, headers, body = stream(manager, environ)
        start_response(status, headers)
        return body

    with live_server(app) as url:
        page = Page(url)
        manager.enqueue("order", 7)
    assert [event.type for event in page.received()] == ["sse_open", "order", "sse_bye"]
    manager.shutdown()


def test_the_server_ends_after_an_error_too() -> None:
    app, sse = make_app()
    pages = []
    with pytest.raises(ZeroDivisionError), live_server(app) as url:
        pages.append(Page(f"{url}/events")) or 1 / 0
    assert pages[0].received()[-1].type == "sse_bye"
    sse.manager.shutdown()


def test_a_live_server_needs_real_time() -> None:
    app, _ = make_app()
    with record(), pytest.raises(UsageError, match="leave them out of this test"), live_server(app):
        pass


@pytest.mark.parametrize("app", ["x", None, SSE(), SSEManager()])
def test_what_is_no_app_is_not_served(app: Any) -> None:
    with pytest.raises(UsageError, match=f"or another WSGI app, not {type(app).__name__}"), live_server(app):
        pass


def test_a_stream_of_a_live_server_is_busy_while_events_are_recorded() -> None:
    app, sse = make_app()
    with live_server(app) as url:
        with record() as sent:
            sse.enqueue("order", 7)
            busy = Page(f"{url}/events").received()
        sent.assert_sent("order", 7)
        assert [(event.type, event.json) for event in busy] == [("sse_busy", {"reason": "draining"})]
        page = Page(f"{url}/events")
    assert [event.type for event in page.received()] == ["sse_open", "sse_bye"]
    sse.manager.shutdown()
