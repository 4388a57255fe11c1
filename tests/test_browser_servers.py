"""The browser's module in Chromium, Firefox and WebKit, with real servers: outages, proxies, other origins.

All that takes time happens once, side by side: in each engine, a page for each of the sites.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest

from sse_batcher import SSEManager

from .kit import engines as kit
from .kit import nginx
from .kit.engines import ENGINES, Engine, Tab
from .kit.redisserver import redis_server
from .kit.servers import GTHREAD, HOST, Kind, Server, detached, running, serving
from .kit.services import program
from .kit.slicer import Relay
from .kit.waiting import wait_until

pytestmark = [pytest.mark.external, pytest.mark.timeout(300)]

engines = kit.engines

OUTAGE = 5.0
"""Seconds for which the first site is gone."""
SLOW = 7.0
"""Seconds for which the third site does not answer: longer than the module waits before it suspects a proxy."""
RETRY_AFTER = 3.0
"""Seconds, of the site that has too many requests."""
GUNICORN = ("-m", "gunicorn", "--workers=1", "-k", "gthread", "--threads=16")
TCP = (*GUNICORN, f"--bind={HOST}:{{port}}", "pageapp:app")
UNIX = (*GUNICORN, f"--bind={HOST}:{{port}}", "--bind=unix:app.sock", "pageapp:app")


class Seen(NamedTuple):
    """What pages have seen by now, by engine."""

    events: dict[str, list[Any]]
    states: dict[str, list[str]]
    errors: dict[str, list[int]]


class Pages:
    """The same page in each engine."""

    def __init__(self, engines: dict[str, Engine], site: Server, **query: str) -> None:
        self._url = f"{site.url}/page.html?{urlencode(query)}"
        self._tabs = {name: self._open(engine) for name, engine in engines.items()}
        wait_until(lambda: all(self.all("window.page !== undefined").values()), "each page has its script")

    def _open(self, engine: Engine) -> Tab:
        return engine.open(self._url)

    def all(self, expression: str) -> dict[str, Any]:
        """The value of an expression in each engine."""
        return {name: tab.evaluate(expression) for name, tab in self._tabs.items()}

    def wait(self, expression: str) -> None:
        """Wait until it is true in each engine. Those in which it is not show what they have seen."""
        wait_until(lambda: all(self.all(expression).values()), f"{expression} {self.seen}", timeout=25.0)

    @property
    def seen(self) -> Seen:
        return Seen(*(self.all(f"page.{name}") for name in ("seen", "states", "errors")))


class Outcome(NamedTuple):
    """What came of each of the sites."""

    outage: Seen
    held: Seen
    slow: Seen
    known: Seen
    stranger: Seen
    foreign: Seen
    limited: dict[str, list[float]]
    """When the stream was asked for, in seconds, by engine. The first answer is 429, with ``Retry-After: 3``."""


def limited_by(engines: dict[str, Engine], named: Server, other: Server) -> dict[str, list[float]]:
    """When pages of another origin ask for a stream that is 429 at first."""
    pages = Pages(engines, named, url=f"{other.url}/events?channel=limited")
    pages.wait("window.page?.source.state === 'open'")
    pages.all("page.source.close()")
    asked = json.loads(other.request("GET", "/asked"))
    return {name: asked[agent] for name, agent in pages.all("navigator.userAgent").items()}


def other_origins(engines: dict[str, Engine], named: Server, unnamed: Server, other: Server) -> tuple[Seen, Seen, Seen]:
    """What pages of another origin see: with cookies, without cookies, and if the server does not name their origin."""
    private = f"{other.url}/events?channel=private"
    known = Pages(engines, named, url=private, credentials="1")
    known.all("document.cookie = 'pageapp=known'")  # of this host: its port does not count
    stranger = Pages(engines, named, url=private)
    foreign = Pages(engines, unnamed, url=f"{other.url}/events")
    known.wait("window.page?.source.state === 'open'")
    other.request("POST", "/publish?channel=private", [0, 1])
    known.wait("page.seen.length === 2")
    stranger.wait("page.errors.length")
    foreign.wait("page.errors.length")
    for pages in (known, stranger, foreign):
        pages.all("page.source.close()")
    return known.seen, stranger.seen, foreign.seen


@pytest.fixture(scope="module")
def outcome(engines: dict[str, Engine], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with ExitStack() as stack:

        def site(name: str, location: str) -> tuple[Server, Callable[..., Server]]:
            """Start the nginx of a site. Returns it, and what starts the app behind it."""
            folder = tmp_path_factory.mktemp(name)
            path = program("nginx", package="Debian: nginx-light")
            arguments = nginx.arguments_of(path, location, host=HOST, upstream="unix:app.sock")
            server = stack.enter_context(running(arguments, folder))
            return server, lambda **environment: stack.enter_context(running(UNIX, folder, **environment))

        redis = stack.enter_context(redis_server(tmp_path_factory.mktemp("redis")))
        publisher = stack.enter_context(SSEManager(backend=redis.url))
        gone, start_gone = site("gone", nginx.KEEPING)
        held, start_held = site("held", nginx.HOLDING)
        app = start_gone(BACKEND=redis.url)
        behind = start_held()
        other = stack.enter_context(running(TCP, tmp_path_factory.mktemp("other"), ORIGINS=gone.url))

        def publish(*numbers: int) -> None:
            for number in numbers:
                publisher.enqueue("n", number)
            assert publisher.flush_all(10)

        with_outage = Pages(engines, gone)
        with_outage.wait("window.page?.source.state === 'open'")
        publish(0)
        with_outage.wait("page.seen.length === 1")

        behind_proxy = Pages(engines, held, cursor=behind.request("GET", "/cursor"))
        behind.request("POST", "/publish", [0, 1, 2])

        origins = other_origins(engines, gone, held, other)
        limited = limited_by(engines, gone, other)
        os.killpg(other.process.pid, signal.SIGSTOP)
        slow = Pages(engines, gone, url=f"{other.url}/events")
        stopped = time.monotonic()
        app.kill()
        with_outage.wait("page.errors.includes(502)")
        publish(1, 2)
        publish(3)
        threading.Event().wait(max(0.0, stopped + OUTAGE - time.monotonic()))
        start_gone(BACKEND=redis.url)
        publish(4)
        behind_proxy.wait("page.seen.length >= 3")
        behind.request("POST", "/publish", [3])
        threading.Event().wait(max(0.0, stopped + SLOW - time.monotonic()))
        os.killpg(other.process.pid, signal.SIGCONT)
        slow.wait("window.page?.source.state === 'open'")
        other.request("POST", "/publish", [0, 1])
        slow.wait("page.seen.length >= 2")
        with_outage.wait("page.seen.length >= 5")
        behind_proxy.wait("page.seen.length >= 4")
        return Outcome(with_outage.seen, behind_proxy.seen, slow.seen, *origins, limited)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_lost_in_an_outage_behind_nginx(outcome: Outcome, engine: str) -> None:
    assert outcome.outage.events[engine] == [0, 1, 2, 3, 4]
    assert 502 in outcome.outage.errors[engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_page_polls_behind_a_proxy_that_holds_streams_back(outcome: Outcome, engine: str) -> None:
    assert outcome.held.events[engine] == [0, 1, 2, 3]
    assert outcome.held.states[engine] == ["polling"]
    assert outcome.held.errors[engine] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_is_only_slow_is_not_polled(outcome: Outcome, engine: str) -> None:
    assert outcome.slow.events[engine] == [0, 1]
    assert outcome.slow.states[engine] == ["open"]


@pytest.mark.parametrize("engine", ENGINES)
def test_another_origin_reads_the_stream_with_its_cookies(outcome: Outcome, engine: str) -> None:
    assert outcome.known.events[engine] == [0, 1]


@pytest.mark.parametrize("engine", ENGINES)
def test_another_origin_sends_no_cookies_unless_the_page_says_so(outcome: Outcome, engine: str) -> None:
    assert set(outcome.stranger.errors[engine]) == {403}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_origin_that_is_not_named_reads_nothing(outcome: Outcome, engine: str) -> None:
    assert set(outcome.foreign.errors[engine]) == {0}
    assert outcome.foreign.events[engine] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_another_origin_waits_as_long_as_retry_after_says(outcome: Outcome, engine: str) -> None:
    first, second = outcome.limited[engine]
    assert second - first >= RETRY_AFTER


# -- compressed streams ------------------------------------------------------------------------------------------------

GZIP = " gzip on; gzip_types text/event-stream; gzip_min_length 0; gzip_proxied any;"
SITES = {
    "attached": Kind(GTHREAD),
    "detached behind nginx": detached(Kind(GTHREAD, nginx=nginx.KEEPING + GZIP)),
}
"""Where the library compresses. nginx could do it, too, and must not."""
READ_COMPRESSED = """(async () => {
  const {BatchedEventSource} = await import("/events/sse-batcher.js");
  const types = ["sse_open", "sse_gap", "hub_state", "item_batch"];
  window.got = {};
  for (const [name, source] of [["own", new EventSource("/events")], ["module", new BatchedEventSource("/events")]]) {
    got[name] = [];
    for (const type of types.filter((type) => name === "own" || type !== "item_batch")) {
      source.addEventListener(type, (event) => got[name].push([type, JSON.parse(event.data)]));
    }
    if (name === "module") source.onBatch("item", (list) => got[name].push(["item_batch", {events: list}]));
  }
  const poll = await fetch("/events?poll=1");
  await poll.text();
  return poll.headers.get("Content-Encoding");
})()"""
"""Reads the stream as an `EventSource` and by the module. Gives the encoding of an answer."""


class Compressed(NamedTuple):
    """What came of compressed streams in one engine at one site."""

    encoding: str
    events: dict[str, list[list[Any]]]
    """By what reads them: ``own`` or ``module``."""


@pytest.fixture(scope="module")
def compressed(
    engines: dict[str, Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Compressed]]:
    found = {}
    with ExitStack() as stack:
        for site, kind in SITES.items():
            folder = tmp_path_factory.mktemp("compressed")
            server = stack.enter_context(serving(kind, folder, COMPRESS="default", HEARTBEAT="15", BATCH_WINDOW="0.5"))
            relay = stack.enter_context(Relay(server.port))
            tabs = {name: engine.open(f"{relay.url}/no-such-page") for name, engine in engines.items()}
            encodings = {name: tab.evaluate(READ_COMPRESSED) for name, tab in tabs.items()}

            def wait_for(count: int, tabs: dict[str, Tab] = tabs) -> None:
                expression = f"got.own.length >= {count} && got.module.length >= {count}"
                wait_until(lambda: all(tab.evaluate(expression) for tab in tabs.values()), f"all have {count}")

            wait_for(1)
            server.enqueue(("hub_state", 1))
            wait_for(2)
            server.enqueue(*[("item", {"number": number}) for number in range(10)])
            wait_for(3)
            with relay.broken():
                server.enqueue(("hub_state", "missed"))
            wait_for(5)
            for name, tab in tabs.items():
                found[name, site] = Compressed(encodings[name], tab.evaluate("got"))
                tab.close()
        yield found


@pytest.mark.parametrize("reader", ["own", "module"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_compressed_stream_is_read_at_once_and_goes_on_after_a_break(
    compressed: dict[tuple[str, str], Compressed], engine: str, reader: str
) -> None:
    for site in SITES:
        encoding, events = compressed[engine, site]
        opened, first, (type, batch), resumed, missed = events[reader]
        assert (encoding, opened[0], resumed[0]) == ("gzip", "sse_open", "sse_open")
        assert (first[1], type, len(batch["events"]), missed[1]) == (1, "item_batch", 10, "missed")
