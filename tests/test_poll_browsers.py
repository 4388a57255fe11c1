"""``poll=1`` in real browsers: a plain `EventSource` behind a proxy that holds each response back until its end.

All that takes time happens once, side by side: both browsers, each with a page for each transport.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser

from .kit import nginx
from .kit.browser import chromium
from .kit.firefox import Firefox, firefox
from .kit.servers import GTHREAD, HOST, Kind, Server, detached, serving
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.external

EVENTS = 1_000
SECONDS = 20.0
BROWSERS = ("chromium", "firefox")
BEHIND = Kind(GTHREAD, nginx=nginx.HOLDING)
KINDS = {"attached": BEHIND, "detached": detached(BEHIND)}

# Each event is [number, when it was published, in ms since 1970], by the clock that the browser has, too.
BEGIN = """((last, seconds) => {
  window.got = {events: [], opens: 0, errors: 0, others: []};
  const source = new EventSource("/events?poll=1");
  window.all = new Promise((resolve) => {
    const take = (values) => {
      for (const [number, published] of values) {
        got.events.push([number, Date.now() - published]);
        if (number === last) resolve();
      }
    };
    source.addEventListener("n", (event) => take([JSON.parse(event.data)]));
    source.addEventListener("n_batch", (event) => take(JSON.parse(event.data).events));
    setTimeout(resolve, 1000 * seconds);
  });
  source.onerror = () => { got.errors += 1; };
  for (const type of ["sse_gap", "sse_busy", "sse_bye"]) {
    source.addEventListener(type, (event) => got.others.push([type, event.data]));
  }
  return new Promise((resolve) => { source.onopen = () => { got.opens += 1; resolve(); }; });
})"""


class Seen(NamedTuple):
    """What a page has seen."""

    events: list[tuple[int, float]]
    """The number of each event, and its delay in ms."""
    opens: int
    errors: int
    others: list[tuple[str, str]]
    """The control events but `sse_open`."""


class Held(NamedTuple):
    """What has come of a stream without ``poll=1``."""

    received: bytes
    seconds: float
    """How long it was open."""


class Measured(NamedTuple):
    """What one server, and the proxy before it, has led to."""

    pages: dict[str, Seen]
    control: Held
    stats: dict[str, Any]
    """Of the server behind the proxy, when the last event had come."""


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Firefox]]:
    with firefox(tmp_path_factory.mktemp("firefox")) as fox, chromium() as chrome:
        yield chrome, fox


@pytest.fixture(scope="module")
def measured(
    browsers: tuple[Browser, Firefox], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Measured]]:
    chrome, fox = browsers
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        pages: dict[tuple[str, str], Callable[[str], Any]] = {}
        controls: dict[str, tuple[socket.socket, float]] = {}
        for transport, kind in KINDS.items():
            folder = tmp_path_factory.mktemp(transport)
            server = stack.enter_context(serving(kind, folder, BATCH_WINDOW="0.02", HEARTBEAT="1"))
            stack.callback(server.show_output)
            servers[transport] = server
            control = stack.enter_context(socket.create_connection((HOST, server.port), timeout=TIMEOUT))
            control.sendall(f"GET /events HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            controls[transport] = control, time.monotonic()
            page = chrome.new_page()
            page.goto(f"{server.url}/stats", wait_until="load")
            pages["chromium", transport] = page.evaluate
            pages["firefox", transport] = fox.open(f"{server.url}/no-such-page").evaluate
        for evaluate in pages.values():
            evaluate(f"{BEGIN}({EVENTS - 1}, {SECONDS + TIMEOUT})")  # returns when the page has a cursor
        for server in servers.values():
            server.request("POST", "/publish", [EVENTS, SECONDS])
        found = {key: seen(evaluate("all.then(() => JSON.stringify(got))")) for key, evaluate in pages.items()}
        yield {
            name: Measured(
                {browser: found[browser, name] for browser in BROWSERS},
                Held(received(control), time.monotonic() - since),
                servers[name].stats(),
            )
            for name, (control, since) in controls.items()
        }
        assert [server.faults() for server in servers.values()] == [[]] * len(servers)


def seen(text: str) -> Seen:
    found = json.loads(text)
    return Seen([tuple(event) for event in found["events"]], found["opens"], found["errors"], found["others"])


def received(connection: socket.socket) -> bytes:
    connection.setblocking(False)
    try:
        return connection.recv(1)
    except BlockingIOError:
        return b""


def test_both_browsers_run(browsers: tuple[Browser, Firefox]) -> None:
    """Before what takes long, so that no test takes too long."""
    chrome, fox = browsers
    with chrome.new_page() as page:
        agents = [evaluate("navigator.userAgent") for evaluate in (page.evaluate, fox.open("about:blank").evaluate)]
    assert ["Chrome" in agents[0], "Firefox" in agents[1]] == [True, True]


@pytest.mark.parametrize("transport", KINDS)
def test_the_proxy_holds_a_stream_back_for_all_this_time(measured: dict[str, Measured], transport: str) -> None:
    received, seconds = measured[transport].control
    assert received == b""
    assert seconds >= SECONDS
    stats = measured[transport].stats
    assert stats["clients_by_transport"][transport] == stats["clients"] >= 1  # the control stream is open
    assert stats["bytes"] > 10_000


@pytest.mark.parametrize("browser", BROWSERS)
@pytest.mark.parametrize("transport", KINDS)
def test_a_plain_event_source_polls_all_events_in_order(
    measured: dict[str, Measured], transport: str, browser: str
) -> None:
    seen = measured[transport].pages[browser]
    assert [number for number, _ in seen.events] == list(range(EVENTS))
    assert seen.others == []


@pytest.mark.parametrize("browser", BROWSERS)
def test_half_of_the_events_arrive_within_a_second(measured: dict[str, Measured], browser: str) -> None:
    delays = [delay for each in measured.values() for _, delay in each.pages[browser].events]
    # Mostly within half of that. With the pause that browsers make by default, 3 to 5 seconds, it would be more.
    assert statistics.median(delays) < 1_000, f"longest: {max(delays):.0f} ms"
    assert min(delays) > -50  # the same clock


@pytest.mark.parametrize("browser", BROWSERS)
@pytest.mark.parametrize("transport", KINDS)
def test_each_poll_fires_open_and_error_in_the_page(
    measured: dict[str, Measured], transport: str, browser: str
) -> None:
    seen = measured[transport].pages[browser]
    assert seen.opens >= SECONDS / 2  # a poll takes half a second to a second here
    assert seen.opens - seen.errors in {0, 1}
