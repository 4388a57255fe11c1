"""The browser's module in Chromium, Firefox and WebKit: what happens to a page as a whole, and what it leaves behind.

The driver hides the page, takes the network away, and goes to another page and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sse_batcher.browser

from .kit import engines as kit
from .kit.engines import ENGINES, Chromium, Engine, Tab
from .kit.scripted import ScriptedServer
from .kit.waiting import wait_until

pytestmark = [pytest.mark.external, pytest.mark.timeout(300)]

engines = kit.engines
every_engine = pytest.mark.parametrize("engine", ENGINES)

CASES = Path(__file__).parent / "kit" / "cases"
BATCH = 50
OPENING = 'event: sse_open\nretry: 10\ndata: {"heartbeat":15}\n\n'


def block(number: int) -> str:
    return f"event: n\ndata: {number}\nid: c-{number}\n\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "sse-batcher.js").write_bytes(sse_batcher.browser.SCRIPT)
    (folder / "other.html").write_text("<!doctype html><title>Another page</title>")
    with ScriptedServer(CASES, folder) as server:
        yield server


class Site:
    """A page in an engine, and the stream that it has opened. Events are numbered, and the server keeps all of them."""

    def __init__(self, engine: Engine, server: ScriptedServer, name: str) -> None:
        self.server = server
        self.name = name
        self._numbers = 0
        self._history: list[tuple[str, str]] = [("b", "")]
        self._script()
        self.tab: Tab = engine.open(f"{server.url}/page.html?url=/stream/{name}&cursor=b")
        self.wait("window.page?.source.state === 'open'")

    def _script(self) -> None:
        self.server.script(self.name, [{"body": [OPENING], "history": self._history, "end": "hold"}])

    def publish(self, *, here: bool = True) -> None:
        """Publish the next number: on the open stream, or else only for those that come later."""
        self._history.append((f"c-{self._numbers}", block(self._numbers)))
        self._script()
        if here:
            self.server.say(self.name, block(self._numbers))
        self._numbers += 1

    def wait(self, expression: str) -> None:
        wait_until(lambda: bool(self.tab.evaluate(expression)), expression)

    def wait_until_all_are_seen(self) -> None:
        self.wait(f"page.seen.length >= {self._numbers}")
        assert self.tab.evaluate("page.seen") == list(range(self._numbers))

    def wait_until_it_has_left(self) -> None:
        wait_until(lambda: all(each.left is not None for each in self.requests()), "the stream is closed")

    def requests(self) -> list[Any]:
        return self.server.requests(self.name)


@pytest.fixture
def site(
    engines: dict[str, Engine], engine: str, server: ScriptedServer, request: pytest.FixtureRequest
) -> Iterator[Site]:
    """Its options can be given as the parameter of this fixture."""
    name = f"{engine}-{request.function.__name__}"
    site = Site(engines[engine], server, name, **getattr(request, "param", {}))
    yield site
    site.tab.close()


@every_engine
def test_a_hidden_tab_gets_events_at_once(site: Site) -> None:
    site.tab.hide()
    assert site.tab.evaluate("document.visibilityState") == "hidden"
    site.publish()
    site.wait_until_all_are_seen()
    site.tab.show()
    site.publish()
    site.wait_until_all_are_seen()
    assert len(site.requests()) == 1


@every_engine
def test_a_page_that_is_online_again_comes_back_at_once(site: Site) -> None:
    site.publish()
    site.wait_until_all_are_seen()
    site.wait("performance.now() > 2000")  # a stream that has just begun is not begun again
    site.tab.set_offline(True)
    assert site.tab.evaluate("navigator.onLine") is False
    site.publish(here=False)
    site.tab.set_offline(False)
    site.wait_until_all_are_seen()


@every_engine
def test_a_page_goes_on_when_the_user_comes_back(site: Site, engine: str) -> None:
    site.publish()
    site.wait_until_all_are_seen()
    site.tab.evaluate("page.mark = 7")
    site.tab.goto(f"{site.server.url}/other.html")
    site.wait_until_it_has_left()
    site.publish(here=False)
    site.tab.back()
    site.wait("window.page?.source.state === 'open'")
    # Firefox keeps no page in the back/forward cache that has an open request: it loads the page again.
    restored = [None, False] if engine == "firefox" else [7, True]
    assert site.tab.evaluate("[page.mark, page.restored.at(-1)]") == restored
    site.wait_until_all_are_seen()
    # Firefox ends all requests of a page when it begins to leave it. If that takes long, the stream comes back once.
    assert len(site.requests()) in ({2, 3} if engine == "firefox" else {2})


@every_engine
def test_a_tab_that_closes_ends_its_stream(engines: dict[str, Engine], engine: str, server: ScriptedServer) -> None:
    site = Site(engines[engine], server, f"{engine}-closes")
    site.tab.close()
    site.wait_until_it_has_left()
    assert len(site.requests()) == 1


def batches(start: int, count: int) -> str:
    """Events with the number 1, in batches."""
    events = ",".join(["1"] * BATCH)
    batch = f'{{"type":"counted_batch","batchSize":{BATCH},"events":[{events}],"reason":"size_limit","timestamp":1}}'
    return "".join(f"event: counted_batch\ndata: {batch}\nid: d-{start + k}\n\n" for k in range(0, count, BATCH))


def count(site: Site, count: int) -> None:
    before = site.tab.evaluate("page.count")
    for start in range(0, count, 10_000):
        site.server.say(site.name, batches(before + start, 10_000))
    site.wait(f"page.count === {before + count}")
    assert site.tab.evaluate("page.sum") == before + count


@every_engine
def test_a_hundred_thousand_events_arrive_and_leave_nothing(
    site: Site, engines: dict[str, Engine], engine: str
) -> None:
    chromium = engines[engine]
    if not isinstance(chromium, Chromium):  # only here the heap can be asked for its size
        count(site, 100_000)
        return
    session = chromium.context.new_cdp_session(chromium.context.pages[-1])

    def heap() -> float:
        session.send("HeapProfiler.enable")
        session.send("HeapProfiler.collectGarbage")
        return float(session.send("Runtime.getHeapUsage")["usedSize"])

    count(site, 20_000)
    before = heap()
    count(site, 80_000)
    grown = heap() - before
    assert grown < 500_000, f"80,000 events have left {grown:.0f} bytes"
