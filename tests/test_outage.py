"""A site that stops for five seconds behind nginx, which answers 502 meanwhile: what a page in a real browser does."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Response

from sse_batcher import SSEManager

from .kit import nginx
from .kit.browser import chromium
from .kit.redisserver import redis_server
from .kit.repository import EXAMPLES, blocks
from .kit.servers import HOST, UNIX, Server, running
from .kit.services import program
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.external

OUTAGE = 5.0  # seconds
PAGE_TIMEOUT = 1000 * TIMEOUT  # milliseconds

SITE = """
import os
from flask import Flask
from sse_batcher import SSE

app = Flask(__name__)
app.config["SSE_BACKEND"] = os.environ["BACKEND"]
sse = SSE(app)

@app.get("/")
def page():
    return os.environ["PAGE"]
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Server]:
    """nginx, before an app that comes and goes."""
    path = program("nginx", package="Debian: nginx-light")
    arguments = nginx.arguments_of(path, nginx.KEEPING, host=HOST, upstream="unix:app.sock")
    with running(arguments, tmp_path) as site, site.watched():
        yield site


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_page() as page:
        # The random delays are 1, 2, 4 and 8 s, so that the next try comes soon enough after the outage.
        page.add_init_script("Math.random = () => 0.5")
        yield page


def serving(module: str, folder: Path, **environment: str) -> AbstractContextManager[Server]:
    return running((*UNIX[:-1], f"{module}:app"), folder, **environment)


@contextmanager
def outage(page: Page) -> Iterator[None]:
    """The server has just stopped. Begin when the page has met a 502, and end `OUTAGE` seconds after the stop."""
    began = time.monotonic()

    def is_refused(response: Response) -> bool:
        return "/events" in response.url and response.status == 502

    with page.expect_response(is_refused, timeout=PAGE_TIMEOUT):
        pass
    yield
    page.wait_for_timeout(max(0.0, 1000 * (began + OUTAGE - time.monotonic())))


def test_hello_goes_on_after_an_outage(site: Server, page: Page, tmp_path: Path) -> None:
    visited = """(before) => {
      fetch("/");  // another visitor; again and again, since the stream may not be open yet
      return visits.children.length > before;
    }"""
    with serving("hello", tmp_path, PYTHONPATH=str(EXAMPLES)) as app:
        page.goto(site.url, wait_until="load")
        page.wait_for_function(visited, arg=0, polling=200)
        app.stop(signal.SIGTERM)
    with outage(page):
        before = page.locator("#visits li").count()
    with serving("hello", tmp_path, PYTHONPATH=str(EXAMPLES)):
        page.wait_for_function(visited, arg=before, polling=200, timeout=PAGE_TIMEOUT)


def test_the_readmes_page_loses_nothing_with_redis(site: Server, page: Page, tmp_path: Path) -> None:
    (script,) = (block for block in blocks("js") if "setTimeout(connect" in block)
    (tmp_path / "site_with_redis.py").write_text(SITE)
    html = f"""<!doctype html><script>
      const shown = [], render = (tools) => shown.push(tools.n), reloadState = () => shown.push("gap");
      {script}
      const plain = new EventSource("/events");
    </script>"""
    with redis_server(tmp_path) as redis, SSEManager(backend=redis.url) as publisher:
        environment = {"BACKEND": redis.url, "PAGE": html, "PYTHONPATH": str(tmp_path)}

        def publish(*numbers: int) -> None:
            for number in numbers:
                publisher.enqueue("tools", {"n": number})
            assert publisher.flush_all(TIMEOUT)

        def wait_until_shown(*numbers: int) -> None:
            page.wait_for_function(
                "(wanted) => shown.length === wanted.length", arg=list(numbers), timeout=PAGE_TIMEOUT
            )
            assert page.evaluate("shown") == list(numbers)  # and no "gap" among them

        with serving("site_with_redis", tmp_path, **environment):
            with page.expect_response("**/events?*"):
                page.goto(site.url, wait_until="load")
            page.wait_for_function("last !== ''")
            publish(0)
            wait_until_shown(0)
            # The end of this block kills the server: no stream gets a goodbye.
        with outage(page):
            publish(1, 2)
            publish(3)
        page.wait_for_function("plain.readyState === EventSource.CLOSED")  # which is why these lines are there
        with serving("site_with_redis", tmp_path, **environment):
            publish(4)
            wait_until_shown(0, 1, 2, 3, 4)
