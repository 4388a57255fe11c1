"""Debian's WebKitGTK, in the window of an invisible display, driven by Selenium."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.webkitgtk.service import Service

from .services import missing, program
from .waiting import TIMEOUT

_PACKAGE = "Debian: webkit2gtk-driver"

# The value of an expression, or of the promise that it gives, with its error beside it.
_EVALUATE = """const done = arguments[0];
Promise.resolve().then(() => (%s)).then(
  (value) => done([value ?? null, null]),
  (error) => done([null, String(error)]),
);"""


class WebKit:
    """A WebKit that runs. Used by one thread. It waits for each answer. Its first window stays open and empty."""

    def __init__(self, driver: webdriver.WebKitGTK) -> None:
        self.driver = driver
        self.home = driver.current_window_handle

    def open(self, url: str) -> WebKitPage:
        """Open a page in a window of its own, so that it is visible beside others. Returns when it is loaded."""
        self.driver.switch_to.window(self.home)  # the current one may be closed
        self.driver.switch_to.new_window("window")
        page = WebKitPage(self, self.driver.current_window_handle)
        page.goto(url)
        return page


class WebKitPage:
    """A page in its window."""

    def __init__(self, browser: WebKit, handle: str) -> None:
        self._browser = browser
        self._handle = handle

    def evaluate(self, expression: str) -> Any:
        """The value of this expression, or of the promise that it gives, as Playwright's pages do it."""
        value, error = self._driver().execute_async_script(_EVALUATE % expression)
        assert error is None, error
        return value

    def goto(self, url: str) -> None:
        self._driver().get(url)

    def back(self) -> None:
        """Go back in the history, if possible to the page as it was."""
        self._driver().back()

    def minimize(self) -> None:
        self._driver().minimize_window()

    def restore(self) -> None:
        self._driver().set_window_rect(0, 0, 800, 600)

    def close(self) -> None:
        self._driver().close()

    def _driver(self) -> webdriver.WebKitGTK:
        self._browser.driver.switch_to.window(self._handle)
        return self._browser.driver


@contextmanager
def webkit() -> Iterator[WebKit]:
    """A browser that has just started. It takes about a second: share it. Skips if there is none."""
    path = program("WebKitWebDriver", package=_PACKAGE)
    browsers = sorted(Path("/usr/lib").glob("*/webkit2gtk-*/MiniBrowser"))
    if not browsers:
        missing(f"needs MiniBrowser ({_PACKAGE})")
    options = webdriver.WebKitGTKOptions()
    options.binary_location = str(browsers[-1])
    options.add_argument("--automation")
    with _display() as display:
        service = Service(path, env={**os.environ, "DISPLAY": display})
        with warnings.catch_warnings():  # of what this class does with others of Selenium
            warnings.simplefilter("ignore", DeprecationWarning)
            driver = webdriver.WebKitGTK(options=options, service=service)
        try:
            driver.set_script_timeout(10 * TIMEOUT)
            yield WebKit(driver)
        finally:
            driver.quit()


@contextmanager
def _display() -> Iterator[str]:
    """An invisible display; its name. Xvfb chooses a free number."""
    path = program("Xvfb", package="Debian: xvfb")
    reading, writing = os.pipe()
    command = [path, "-displayfd", str(writing), "-screen", "0", "1024x768x24", "-nolisten", "tcp"]
    process = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL)
    os.close(writing)
    try:
        with open(reading, encoding="ascii") as number:
            yield f":{number.readline().strip()}"
    finally:
        process.terminate()
        process.wait(TIMEOUT)
