"""The three browser engines behind one interface: Chromium, Firefox and WebKit, all from Debian.

Used by one thread, which waits for each answer. A start takes a second or two, and Firefox's some more for npm: share
an engine among the tests of a module.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page
from playwright.sync_api import Error as PlaywrightError

from .browser import chromium
from .firefox import Firefox, FirefoxPage, firefox
from .waiting import wait_until
from .webkit import WebKit, WebKitPage, webkit

ENGINES = ("chromium", "firefox", "webkit")

# For what a driver cannot do: the page sees the same as if it had happened.
_SEEMS_HIDDEN = """(() => {
  Object.defineProperty(document, "visibilityState", {configurable: true, value: %s});
  Object.defineProperty(document, "hidden", {configurable: true, value: %s});
  document.dispatchEvent(new Event("visibilitychange", {bubbles: true}));
})()"""
_SEEMS_OFFLINE = """(() => {
  Object.defineProperty(navigator, "onLine", {configurable: true, value: %s});
  dispatchEvent(new Event("%s"));
})()"""
_SPIN = "(() => { const end = Date.now() + 300; while (Date.now() < end); })()"


class Tab(ABC):
    """An open page."""

    @abstractmethod
    def evaluate(self, expression: str) -> Any:
        """Return the value of this expression, or of the promise that it gives. Fails with its error."""

    @abstractmethod
    def goto(self, url: str) -> None:
        """Go to another page. Returns when it is loaded."""

    @abstractmethod
    def back(self) -> None:
        """Go back. If the page is in the back/forward cache, it is the same page, with all its objects."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def kill(self) -> None:
        """End the page's process at once. Other tabs of the same site may share it, and end with it.

        Not in WebKit, whose driver ends with the process of any page: see `Engine.can_kill`.
        """

    @abstractmethod
    def hide(self) -> None:
        """Hide it, as another tab before it does. `show` shows it again."""

    @abstractmethod
    def show(self) -> None: ...

    @abstractmethod
    def set_offline(self, offline: bool) -> None:
        """Tell the page that the network is gone, or is back. What is open stays open."""


class Engine(ABC):
    """A browser that runs."""

    name: str
    can_kill = True

    @abstractmethod
    def open(self, url: str) -> Tab:
        """Open a page that is visible. Returns when it is loaded. All tabs share cookies, storage and workers.

        Chromium and WebKit show several pages side by side. In Firefox, a new tab hides those before it.
        """

    def kill_workers(self) -> int:
        """End all shared workers at once. Returns how many.

        Only in Chromium. In WebKit a shared worker ends, and is started again, if the tab that made it closes.
        """
        return 0


class _ChromiumTab(Tab):
    def __init__(self, page: Page) -> None:
        self._page = page

    def evaluate(self, expression: str) -> Any:
        return self._page.evaluate(expression)

    def goto(self, url: str) -> None:
        self._page.goto(url, wait_until="load")

    def back(self) -> None:
        self._page.go_back(wait_until="commit")

    def close(self) -> None:
        self._page.close()

    def kill(self) -> None:
        with suppress(PlaywrightError):
            self._page.goto("chrome://crash")
        with suppress(PlaywrightError):
            self._page.evaluate("new Promise(() => {})")  # fails as soon as it is dead

    def hide(self) -> None:  # here a page without a window is always visible
        self._page.evaluate(_SEEMS_HIDDEN % ("'hidden'", "true"))

    def show(self) -> None:
        self._page.evaluate(_SEEMS_HIDDEN % ("'visible'", "false"))

    def set_offline(self, offline: bool) -> None:
        self._page.context.set_offline(offline)


class Chromium(Engine):
    """By Playwright. Also has `browser` and `context`, for what only this one can do."""

    name = "chromium"

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.context: BrowserContext = browser.new_context()

    def open(self, url: str) -> Tab:
        tab = _ChromiumTab(self.context.new_page())
        tab.goto(url)
        return tab

    def kill_workers(self) -> int:
        session = self.browser.new_browser_cdp_session()
        workers = [
            target["targetId"]
            for target in session.send("Target.getTargets")["targetInfos"]
            if target["type"] == "shared_worker"
        ]
        for worker in workers:
            session.send("Target.closeTarget", {"targetId": worker})
        session.detach()
        return len(workers)


class _PageTab(Tab):
    """A tab of one of our own drivers."""

    _page: FirefoxPage | WebKitPage

    def evaluate(self, expression: str) -> Any:
        return self._page.evaluate(expression)

    def goto(self, url: str) -> None:
        self._page.goto(url)

    def back(self) -> None:
        self._page.back()

    def close(self) -> None:
        self._page.close()


class _FirefoxTab(_PageTab):
    _page: FirefoxPage

    def __init__(self, engine: _Firefox, page: FirefoxPage) -> None:
        self._engine = engine
        self._page = page

    def kill(self) -> None:
        _kill_busiest(self._engine.firefox.pid, lambda: self.evaluate(_SPIN))

    def hide(self) -> None:
        self._engine.blank().bring_to_front()

    def show(self) -> None:
        self._page.bring_to_front()

    def set_offline(self, offline: bool) -> None:
        self._page.set_offline(offline)


class _Firefox(Engine):
    name = "firefox"

    def __init__(self, firefox: Firefox) -> None:
        self.firefox = firefox
        self._blank: FirefoxPage | None = None

    def open(self, url: str) -> Tab:
        return _FirefoxTab(self, self.firefox.open(url))

    def blank(self) -> FirefoxPage:
        """Return an empty tab, to show instead of another one."""
        if self._blank is None:
            self._blank = self.firefox.open("about:blank")
        return self._blank


class _WebKitTab(_PageTab):
    _page: WebKitPage

    def __init__(self, page: WebKitPage) -> None:
        self._page = page

    def kill(self) -> None:
        raise NotImplementedError

    def hide(self) -> None:
        self._page.minimize()

    def show(self) -> None:
        self._page.restore()

    def set_offline(self, offline: bool) -> None:  # its driver knows no such thing
        value, event = ("false", "offline") if offline else ("true", "online")
        self.evaluate(_SEEMS_OFFLINE % (value, event))


class _WebKit(Engine):
    name = "webkit"
    can_kill = False

    def __init__(self, webkit: WebKit) -> None:
        self._webkit = webkit

    def open(self, url: str) -> Tab:
        return _WebKitTab(self._webkit.open(url))


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    """The engines that the chosen tests of a module need: those with the name of an engine in their parameters."""
    tests = [item.name for item in request.session.items if item.path == request.path]
    names = [name for name in ENGINES if any(f"[{name}" in test for test in tests)]
    with ExitStack() as stack:
        yield {name: stack.enter_context(started(name, tmp_path_factory.mktemp(name))) for name in names}


@contextmanager
def started(name: str, folder: Path) -> Iterator[Engine]:
    """One of `ENGINES`, just started. Firefox gets what npm installs for it in `folder`. Skips if there is none."""
    if name == "chromium":
        with chromium() as browser:
            yield Chromium(browser)
    elif name == "firefox":
        with firefox(folder) as fox:
            yield _Firefox(fox)
    else:
        with webkit() as kit:
            yield _WebKit(kit)


def _kill_busiest(ancestor: int, spin: Callable[[], object]) -> None:
    """Kill the descendant of this process that computes the most while `spin` runs. Return when it is gone."""
    before = _times(ancestor)
    spin()
    spent = {pid: time - before.get(pid, 0) for pid, time in _times(ancestor).items()}
    pid = max(spent, key=lambda pid: spent[pid])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in _times(ancestor), "the process of the page is gone")


def _times(ancestor: int) -> dict[int, int]:
    """The CPU time in user mode of each descendant of this process that is no zombie."""
    parents, times = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                pid = int(file.parent.name)
                parents[pid], times[pid] = int(fields[1]), int(fields[11])

    def descends(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == ancestor:
                return True
        return False

    return {pid: time for pid, time in times.items() if descends(pid)}
