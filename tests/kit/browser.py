"""The browser that people use: Debian's Chromium, without a window, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from .services import program

# Whatever would call home, or wait for a device that a server has not.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


@contextmanager
def chromium(*, light: bool = False) -> Iterator[Browser]:
    """A browser that has just started. It takes about a second: share it among tests. Skips if there is none.

    `light`: if it can be had, the same without windows, in which a page takes a fifth of the time. But it lacks what
    belongs to windows, such as the back/forward cache.

    Playwright's objects belong to the thread that made them. A page with an open stream is never idle on the network:
    wait for ``load``.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    path = program(*(("chromium-headless-shell",) if light else ()), *names, package="Debian: chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=_ARGUMENTS,
            ignore_default_args=["--disable-back-forward-cache"],  # people's browsers have it
        )
        try:
            yield browser
        finally:
            browser.close()


def browser_fixture(*, light: bool = False) -> Any:
    """A fixture: one browser for all tests of a module, as in ``browser = browser_fixture()``. `light`: see above."""

    @pytest.fixture(scope="module", name="browser")
    def fixture() -> Iterator[Browser]:
        with chromium(light=light) as browser:
            yield browser

    return fixture
