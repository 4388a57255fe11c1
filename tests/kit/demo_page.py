"""The demo's page in a tab of a browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect

from sse_batcher.cli import create_demo, serving
from sse_batcher.demo.scenarios import SCENARIOS
from sse_batcher.demo.simulation import Demo

from .browser import chromium

PAGE_TIMEOUT = 20_000
"""How long the page may take for something, in milliseconds."""
BURST = 600
"""A batch window, in milliseconds, in which a loaded machine, too, brings a burst to an end."""
SIDES = ("batched", "plain")
TITLES = [scenario.title for scenario in SCENARIOS.values()]


class Tab:
    """The demo in a tab of the browser, and what it should not have done."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self.server_may_fail = False  # the browser reports that, and no page can keep it from doing so
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", self._requested)
        page.on("requestfailed", self._failed)

    def _said(self, message: ConsoleMessage) -> None:
        if not (self.server_may_fail and message.text.startswith("Failed to load resource: ")):
            self.complaints.append(f"console: {message.text}")

    def _requested(self, request: Request) -> None:
        if not request.url.startswith(self.url):
            self.complaints.append(f"left its origin: {request.url}")

    def _failed(self, request: Request) -> None:
        # A stream that the page itself closes, for another setting, is reported as aborted.
        closed = "/events?" in request.url and request.failure == "net::ERR_ABORTED"
        if not (closed or self.server_may_fail):
            self.complaints.append(f"failed: {request.url}: {request.failure}")

    def expect_open(self) -> None:
        expect(self.page.locator(".state[data-state=open]")).to_have_count(2)

    def button(self, scenario: str) -> Locator:
        return self.page.locator(f"button[data-action={scenario}]")

    def rows(self, side: str, kind: str = "") -> Locator:
        """The rows of a side, newest first: `.batch`, `.event`, `.error` or `.note`."""
        return self.page.locator(f"#{side} ol > li{kind}")

    def count(self, side: str, name: str) -> Locator:
        return self.page.locator(f"#{side} [data-count={name}]")

    def counts(self, side: str) -> dict[str, int]:
        cells = self.page.locator(f"#{side} [data-count]").all()
        return {cell.get_attribute("data-count") or "": _number(cell.inner_text()) for cell in cells}

    def expect_counts(self, side: str, *, events: int, frames: int | None = None) -> None:
        expect(self.count(side, "events")).to_have_text(f"{events:,}")
        if frames is not None:
            expect(self.count(side, "frames")).to_have_text(f"{frames:,}")

    def cards(self, side: str) -> Locator:
        return self.page.locator(f"#{side} ul > li")

    def expect_drawn(self, side: str, times: int) -> None:
        """Wait until the page says so often that it drew the cards of a side."""
        expect(self.page.locator(f"#{side} .drawn strong")).to_have_text(f"drawn {times} time{'s' * (times != 1)}")

    def set(self, **sliders: int) -> None:
        """Move sliders, and wait until it has happened."""
        wanted = {slider: self.page.locator(f"#{slider}").input_value() for slider in ("window", "size")} | sliders
        query = "window={window}&size={size}".format(**wanted)
        with self.page.expect_request(lambda request: request.url.endswith(query)):
            for slider, value in sliders.items():
                self.page.locator(f"#{slider}").fill(str(value))
        self.expect_open()

    def expect_median(self, lowest: float, highest: float) -> None:
        expect(self.page.locator("#delay")).to_have_text(re.compile("median"))
        text = self.page.locator("#delay").inner_text()
        found = re.fullmatch(r"[\d,]+ events?: median ([\d,]+) ms, longest ([\d,]+) ms\.", text)
        assert found
        median, longest = map(_number, found.groups())
        assert lowest <= median <= highest
        assert median <= longest

    def expect_dots(self, drawn: bool) -> None:
        """Wait until the chart has pixels of the colour of its dots, or none."""
        assert self.page.evaluate(_DOTS, drawn), f"the chart has {'no' if drawn else 'still'} dots"

    def overflow(self) -> int:
        """How many pixels the page is too wide."""
        pixels: int = self.page.evaluate(
            "Math.max(...Array.from(document.querySelectorAll('body, ol, ul, ul > li, .sum, dd, pre, button'))"
            ".map((part) => part.scrollWidth - part.clientWidth), document.documentElement.scrollWidth - innerWidth)"
        )
        return pixels


_DOTS = """async (drawn) => {
    const canvas = document.getElementById("chart");
    const dots = () => {
        // A copy, since the browser logs a warning if a page reads a canvas often.
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.fillStyle = getComputedStyle(canvas).getPropertyValue("--batched");
        copy.fillRect(0, 0, 1, 1);
        const dot = copy.getImageData(0, 0, 1, 1).data.join();
        copy.clearRect(0, 0, 1, 1);
        copy.drawImage(canvas, 0, 0);
        const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
        for (let at = 0; at < data.length; at += 4) if (data.subarray(at, at + 4).join() === dot) return true;
        return false;
    };
    const end = performance.now() + PAGE_TIMEOUT;
    while (dots() !== drawn && performance.now() < end) await new Promise(requestAnimationFrame);
    return dots() === drawn;
}""".replace("PAGE_TIMEOUT", str(PAGE_TIMEOUT))


def _number(text: str) -> int:
    return int(text.replace(",", ""))


Open = Callable[..., Tab]


def page_fixtures() -> tuple[Any, ...]:
    """The fixtures `browser`, `demo`, `url`, `open_tab` and `tab` for a test module."""

    @pytest.fixture(scope="module")
    def browser() -> Iterator[Browser]:
        expect.set_options(timeout=PAGE_TIMEOUT)
        with chromium(light=True) as browser:
            yield browser
        expect.set_options(timeout=5_000)

    @pytest.fixture
    def demo() -> Iterator[Demo]:
        with closing(Demo()) as demo:
            yield demo

    @pytest.fixture
    def url(demo: Demo) -> Iterator[str]:
        with serving(create_demo(demo)) as (host, port):
            yield f"http://{host}:{port}/"
            demo.close()  # the streams first

    @pytest.fixture
    def open_tab(browser: Browser) -> Iterator[Open]:
        """Opens tabs. In every test, no tab may log to the console or send a request to another origin."""
        tabs: list[Tab] = []

        def open_tab(url: str, **options: Any) -> Tab:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
            context.set_default_timeout(PAGE_TIMEOUT)
            tab = Tab(context.new_page(), url)
            tabs.append(tab)
            tab.page.goto(url)
            tab.expect_open()
            return tab

        try:
            yield open_tab
        finally:
            for tab in tabs:
                tab.page.context.close()
        assert [complaint for tab in tabs for complaint in tab.complaints] == []

    @pytest.fixture
    def tab(open_tab: Open, url: str) -> Tab:
        return open_tab(url)

    return browser, demo, url, open_tab, tab
