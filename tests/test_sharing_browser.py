"""One stream for all tabs of a real browser, while tabs come, go, crash and freeze, and the worker is killed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page
from playwright.sync_api import Error as PlaywrightError

from .kit.browser import browser_fixture
from .kit.engines import Engine, started
from .kit.engines import Tab as EngineTab
from .kit.shared_site import SharedSite, shared_site
from .kit.waiting import wait_until

pytestmark = pytest.mark.external

EVENTS = 2_000
SECONDS = 8.0
TABS = 10
FEW_EVENTS = 800
FEW_SECONDS = 5.0
FEW_TABS = 5


class Tab:
    """An open page."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.is_frozen = False
        self.is_crashed = False
        self.page = context.new_page()
        self.page.on("crash", self._crashed)
        self._session = context.new_cdp_session(self.page)
        self.page.goto(url, wait_until="load")

    def _crashed(self, page: Page) -> None:
        self.is_crashed = True

    def crash(self) -> None:
        """Kill its process. Other tabs, and the worker, may have lived there, too."""
        with suppress(PlaywrightError):
            self.page.goto("chrome://crash")
        self.page.close()

    def freeze(self, frozen: bool) -> None:
        self.is_frozen = frozen
        self._session.send("Page.setWebLifecycleState", {"state": "frozen" if frozen else "active"})

    def got(self) -> list[Any]:
        return list(self.page.evaluate("window.got ?? []"))

    def state(self) -> str:
        return str(self.page.evaluate("window.source?.state ?? ''"))


def kill_workers(browser: Browser) -> int:
    """End all shared workers at once. Returns how many."""
    session = browser.new_browser_cdp_session()
    targets = session.send("Target.getTargets")["targetInfos"]
    workers = [target["targetId"] for target in targets if target["type"] == "shared_worker"]
    for worker in workers:
        session.send("Target.closeTarget", {"targetId": worker})
    session.detach()
    return len(workers)


browser = browser_fixture()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """The windows of one user: tabs of it share cookies, caches and workers."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def site() -> Iterator[SharedSite]:
    with shared_site() as site:
        yield site


def expect_state(tabs: Iterable[Tab], state: str) -> None:
    wait_until(lambda: all(tab.state() == state for tab in tabs), f"each tab is {state}")


def test_ten_tabs_hold_one_stream(site: SharedSite, context: BrowserContext) -> None:
    tabs = [Tab(context, site.url) for _ in range(TABS)]
    expect_state(tabs, "open")
    site.publish(100, 0.5).join()
    wait_until(lambda: all(len(tab.got()) == 100 for tab in tabs), "each tab has all")
    assert [tab.got() for tab in tabs] == [list(range(1, 101))] * TABS
    site.wait_for_streams(1)
    assert site.most == 1


def test_without_shared_worker_each_tab_reads_for_itself(site: SharedSite, context: BrowserContext) -> None:
    tabs = [Tab(context, f"{site.url}/?alone=1") for _ in range(3)]
    expect_state(tabs, "open")
    site.wait_for_streams(3)
    site.publish(100, 0.5).join()
    wait_until(lambda: all(len(tab.got()) == 100 for tab in tabs), "each tab has all")
    assert [tab.got() for tab in tabs] == [list(range(1, 101))] * 3


def test_two_users_never_see_events_of_each_other(site: SharedSite, context: BrowserContext) -> None:
    tabs = {}
    for user in ("1", "2"):
        context.add_cookies([{"name": "user", "value": user, "url": site.url}])
        tabs[user] = [Tab(context, f"{site.url}/?share=u{user}") for _ in range(2)]
        expect_state(tabs[user], "open")
    site.wait_for_streams(2)
    for number in range(50):
        for user in tabs:
            site.sse.enqueue("private", f"{user}: {number}", user=user)
    all_tabs = [tab for of_user in tabs.values() for tab in of_user]
    wait_until(lambda: all(len(tab.got()) >= 50 for tab in all_tabs), "each tab has its events")
    for user, of_user in tabs.items():
        assert [tab.got() for tab in of_user] == [[f"{user}: {number}" for number in range(50)]] * 2


class Chaos:
    """Tabs of one browser, and what happens to them, from a seed."""

    def __init__(self, site: SharedSite, browser: Browser, context: BrowserContext, seed: int) -> None:
        self.tabs: list[Tab] = []
        self.done: Counter[str] = Counter()
        """How often each action was done."""
        self._site = site
        self._browser = browser
        self._context = context
        self._random = random.Random(seed)

    def step(self) -> None:
        """Do one action at random."""
        actions = {self.open: 5, self.freeze: 3, self.close: 2, self.crash: 1}
        (action,) = self._random.choices([*actions], [*actions.values()])
        if len(self.tabs) < 3:
            action = self.open
        if action == self.open and len(self.tabs) == TABS:
            action = self.freeze
        self.do(action)

    def do(self, action: Callable[[], None]) -> None:
        action()
        self.done[action.__name__] += 1
        for tab in [tab for tab in self.tabs if tab.is_crashed]:  # in the process of another one
            self.tabs.remove(tab)
            tab.page.close()

    def open(self) -> None:
        self.tabs.append(Tab(self._context, self._site.url + self._random.choice(["/", "/?cursor=1"])))

    def freeze(self) -> None:
        """Freeze a tab, or let it run again."""
        tab = self._random.choice(self.tabs)
        tab.freeze(not tab.is_frozen)

    def close(self) -> None:
        self._taken().page.close()

    def crash(self) -> None:
        self._taken().crash()

    def kill(self) -> None:
        assert kill_workers(self._browser) == 1

    def end(self) -> None:
        """Let all tabs run again."""
        for tab in self.tabs:
            if tab.is_frozen:
                tab.freeze(False)

    def _taken(self) -> Tab:
        return self.tabs.pop(self._random.randrange(len(self.tabs)))


def test_each_tab_gets_each_event_once_while_tabs_and_the_worker_die(
    site: SharedSite, browser: Browser, context: BrowserContext
) -> None:
    chaos = Chaos(site, browser, context, seed=7)
    for _ in range(TABS):
        chaos.open()
    expect_state(chaos.tabs, "open")
    for tab in chaos.tabs:
        tab.page.evaluate("window.first = 1")
    publishing = site.publish(EVENTS, SECONDS)
    while publishing.is_alive():
        if site.published > EVENTS / 3 and not chaos.done["kill"]:
            chaos.do(chaos.kill)
        chaos.step()
    chaos.end()
    expect_state(chaos.tabs, "open")  # so the newest tab, too, has begun
    site.publish().join()
    wait_until(lambda: all(tab.got()[-1:] == [EVENTS + 1] for tab in chaos.tabs), "each tab has the last event")
    for tab in chaos.tabs:
        got = tab.got()
        assert got == list(range(got[0], EVENTS + 2))
        assert got[0] <= (tab.page.evaluate("window.first") or EVENTS + 1)
    assert min(chaos.done[action] for action in ("open", "freeze", "close", "crash", "kill")) > 0
    assert site.most <= 2
    site.wait_for_streams(1)


# -- Firefox and WebKit ------------------------------------------------------------------------------------------------


class Few:
    """Some tabs of another browser, and what its driver can do to them, from a seed."""

    def __init__(self, engine: Engine, site: SharedSite, seed: int) -> None:
        self.tabs: list[EngineTab] = []
        self.site = site
        self._engine = engine
        self._random = random.Random(seed)
        self._may_kill = engine.can_kill

    def open(self) -> None:
        self.tabs.append(self._engine.open(self.site.url + self._random.choice(["/", "/?cursor=1"])))

    def step(self) -> None:
        if len(self.tabs) < 3 or (len(self.tabs) < FEW_TABS and self._random.random() < 0.5):
            self.open()
        elif self._random.random() < 0.5:
            tab = self._random.choice(self.tabs)
            tab.hide()
            tab.show()
        else:
            tab = self.tabs.pop(self._random.randrange(2))  # the oldest ones have made the worker
            tab.close()

    def kill_after(self, event: int) -> None:
        """Once, after this event: kill the process of a tab, if the driver can. Other tabs may end with it."""
        if self._may_kill and self.site.published > event:
            self._may_kill = False
            self.tabs.pop(0).kill()
            self.tabs = [tab for tab in self.tabs if self._is_alive(tab)]

    def all(self, expression: str) -> list[Any]:
        return [tab.evaluate(expression) for tab in self.tabs]

    def _is_alive(self, tab: EngineTab) -> bool:
        try:
            return bool(tab.evaluate("true"))
        except Exception:  # each driver has its own
            return False


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(started(name, tmp_path_factory.mktemp(name))) for name in ("firefox", "webkit")]


def test_tabs_of_firefox_and_webkit_get_each_event_once(engines: list[Engine]) -> None:
    with ExitStack() as stack:
        browsers = [Few(engine, stack.enter_context(shared_site()), seed=5) for engine in engines]
        for few in browsers:
            for _ in range(3):
                few.open()
        wait_until(lambda: all(few.all("source.state") == ["open"] * 3 for few in browsers), "each tab is open")
        for few in browsers:
            few.site.wait_for_streams(1)
        for few in browsers:
            few.all("window.first = 1")
        publishing = [few.site.publish(FEW_EVENTS, FEW_SECONDS) for few in browsers]
        while any(thread.is_alive() for thread in publishing):
            for few in browsers:
                few.step()
                few.kill_after(FEW_EVENTS // 3)
        wait_until(lambda: all({*few.all("source.state")} == {"open"} for few in browsers), "each tab is open")
        last = FEW_EVENTS + 1
        for few in browsers:
            few.site.publish().join()
        wait_until(lambda: all({*few.all("got.at(-1)")} == {last} for few in browsers), "each tab has the last event")
        for few in browsers:
            for got, first in few.all("[got, window.first]"):
                assert got == list(range(got[0], last + 1))
                assert got[0] <= (first or last)
            assert few.site.most <= 2
