"""Pages in three engines: a site that is away behind nginx, which answers 502 meanwhile, and ten tabs of a browser.

The engines live side by side, so that a time that has to pass is spent once.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sse_batcher import SSEManager

from .kit import nginx
from .kit.engines import ENGINES, Engine, Tab, started
from .kit.redisserver import redis_server
from .kit.repository import EXAMPLES
from .kit.servers import HOST, UNIX, Server, running
from .kit.services import program
from .kit.waiting import TIMEOUT, wait_until

pytestmark = [pytest.mark.external, pytest.mark.timeout(120)]

BACK_AFTER = 45.0
"""Seconds within which a page has come back: it waits up to 30 s between two attempts."""

SITE = """
import os
from flask import Flask, render_template_string
from sse_batcher import SSE

app = Flask(__name__)
app.config["SSE_BACKEND"] = os.environ["BACKEND"]
sse = SSE(app)
sse.allow_stats(lambda: True)

@app.get("/")
def page():
    return render_template_string(os.environ["PAGE"])
"""

SHARING = """<!doctype html><link rel="icon" href="data:,"><script>
  if (location.search === "?alone") delete window.SharedWorker;
</script><script type="module">
  import { BatchedEventSource } from "{{ sse_script_url() }}";
  window.got = [];
  window.events = new BatchedEventSource("/events", { share: "user-7" });
  events.on("tools", (data) => got.push(data.n));
</script>"""


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(started(name, tmp_path_factory.mktemp(name))) for name in ENGINES}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Server]:
    """nginx, before an app that comes and goes."""
    path = program("nginx", package="Debian: nginx-light")
    arguments = nginx.arguments_of(path, nginx.KEEPING, host=HOST, upstream="unix:app.sock")
    with running(arguments, tmp_path) as site:
        yield site


def serving(module: str, folder: Path, **environment: str) -> AbstractContextManager[Server]:
    return running((*UNIX[:-1], f"{module}:app"), folder, **environment)


@contextmanager
def opened(engines: dict[str, Engine], site: Server) -> Iterator[dict[str, Tab]]:
    """A page of each engine. Its URL ends with the name of the engine."""
    tabs = {name: engine.open(f"{site.url}/?{name}") for name, engine in engines.items()}
    yield tabs
    for tab in tabs.values():
        tab.close()


def each_says(tabs: dict[str, Tab], expression: str, expected: Any) -> bool:
    return [tab.evaluate(expression) for tab in tabs.values()] == [expected] * len(tabs)


def until(tabs: dict[str, Tab], expression: str, what: str, timeout: float = TIMEOUT) -> None:
    """Wait until this is true in all pages."""
    for name, tab in tabs.items():
        wait_until(lambda tab=tab: tab.evaluate(expression), f"{name}: {what}", timeout)  # type: ignore[misc]


@contextmanager
def outage(site: Server, seconds: float) -> Iterator[None]:
    """The app has just stopped. Begin when each page has met a 502, and end so many seconds after the stop."""
    began = time.monotonic()
    stopped_at = len(site.output())

    def has_met(name: str) -> bool:
        """nginx complains of each request that it cannot pass on, and says from which page it came."""
        lines = site.output()[stopped_at:].splitlines()
        return any("GET /events" in line and line.endswith(f'/?{name}"') for line in lines)

    for name in ENGINES:
        wait_until(lambda name=name: has_met(name), f"{name} meets a 502")  # type: ignore[misc]
    yield
    remaining = began + seconds - time.monotonic()
    assert remaining > 0, "the pages have tried again too late"
    time.sleep(remaining)


def test_hello_goes_on_after_ten_seconds_of_502(site: Server, engines: dict[str, Engine], tmp_path: Path) -> None:
    # Another visitor; again and again, since the stream may not be open yet.
    shows_more = "fetch('/').then(() => visits.children.length > %s)"
    with ExitStack() as stack:
        with serving("hello", tmp_path, PYTHONPATH=str(EXAMPLES)) as app:
            tabs = stack.enter_context(opened(engines, site))
            until(tabs, shows_more % 0, "it shows visits")
            app.stop(signal.SIGTERM)
        with outage(site, 10.0):
            before = max(tab.evaluate("visits.children.length") for tab in tabs.values())
        with serving("hello", tmp_path, PYTHONPATH=str(EXAMPLES)):
            until(tabs, shows_more % before, "it shows visits again", BACK_AFTER)


NOTING = """<!doctype html><link rel="icon" href="data:,"><script>
  const shown = [];
  const plain = new EventSource("/events");
</script><script type="module">
  import { BatchedEventSource } from "{{ sse_script_url() }}";
  window.events = new BatchedEventSource("/events");
  events.on("tools", (tools) => shown.push(tools.n));
  events.on("sse_gap", () => shown.push("gap"));
</script>"""


def test_a_page_loses_nothing_with_redis(site: Server, engines: dict[str, Engine], tmp_path: Path) -> None:
    (tmp_path / "site_with_redis.py").write_text(SITE)
    with redis_server(tmp_path) as redis, SSEManager(backend=redis.url) as publisher, ExitStack() as stack:
        environment = {"BACKEND": redis.url, "PAGE": NOTING, "PYTHONPATH": str(tmp_path)}

        def publish(*numbers: int) -> None:
            for number in numbers:
                publisher.enqueue("tools", {"n": number})
            assert publisher.flush_all(TIMEOUT)

        def until_shown(*numbers: int, timeout: float = TIMEOUT) -> None:
            until(tabs, f"shown.length >= {len(numbers)}", "it shows them", timeout)
            assert each_says(tabs, "shown", list(numbers))

        with serving("site_with_redis", tmp_path, **environment):
            tabs = stack.enter_context(opened(engines, site))
            until(tabs, "events.state === 'open' && plain.readyState === EventSource.OPEN", "its streams are open")
            publish(0)
            until_shown(0)
            # The end of this block kills the server: no stream gets a goodbye.
        with outage(site, 8.0):
            publish(1, 2)
            publish(3)
        until(tabs, "plain.readyState === EventSource.CLOSED", "a plain EventSource gives up")
        with serving("site_with_redis", tmp_path, **environment):
            publish(4)
            until_shown(0, 1, 2, 3, 4, timeout=BACK_AFTER)


@pytest.fixture
def sharing(site: Server, tmp_path: Path) -> Iterator[Server]:
    """The same site, whose pages share."""
    (tmp_path / "sharing.py").write_text(
        SITE + 'app.get("/send/<int:n>")(lambda n: str(sse.enqueue("tools", {"n": n})))'
    )
    with serving("sharing", tmp_path, BACKEND="memory://", PAGE=SHARING, PYTHONPATH=str(tmp_path)):
        yield site


def streams(site: Server) -> int:
    stats: dict[str, Any] = json.loads(site.request("GET", "/events/stats"))
    count: int = stats["clients"]
    return count


@pytest.mark.parametrize("name", ENGINES)
def test_ten_tabs_hold_one_connection(sharing: Server, engines: dict[str, Engine], name: str) -> None:
    tabs = {f"tab {number}": engines[name].open(sharing.url) for number in range(10)}
    until(tabs, "events.state === 'open'", "it is open")
    wait_until(lambda: streams(sharing) == 1, "there is one stream")
    for number in range(3):
        sharing.request("GET", f"/send/{number}")
        until(tabs, f"got.length > {number}", "it has the event")
    assert each_says(tabs, "got", [0, 1, 2])
    assert streams(sharing) == 1
    for tab in tabs.values():
        tab.close()
    wait_until(lambda: streams(sharing) == 0, "the stream ends with the last tab")


@pytest.mark.parametrize("name", ENGINES)
def test_without_a_shared_worker_each_tab_has_a_stream(sharing: Server, engines: dict[str, Engine], name: str) -> None:
    tabs = {f"tab {number}": engines[name].open(f"{sharing.url}/?alone") for number in range(3)}
    until(tabs, "events.state === 'open'", "it is open")
    assert streams(sharing) == 3
    sharing.request("GET", "/send/7")
    until(tabs, "got.length", "it has the event")
    assert each_says(tabs, "got", [7])
    for tab in tabs.values():
        tab.close()
    wait_until(lambda: streams(sharing) == 0, "all have left")
