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
def chromium() -> Iterator[Browser]:
    """A browser that has just started. It takes about a second: share it among tests. Skips if there is none.

    Playwright's objects belong to the thread that made them. A page with an open stream is never idle on the network:
    wait for ``load``.
    """
    path = program("chromium", "chromium-browser", "google-chrome", package="Debian: chromium")
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


def browser_fixture() -> Any:
    """A fixture: one browser for all tests of a module, as in ``browser = browser_fixture()``."""

    @pytest.fixture(scope="module", name="browser")
    def fixture() -> Iterator[Browser]:
        with chromium() as browser:
            yield browser

    return fixture
