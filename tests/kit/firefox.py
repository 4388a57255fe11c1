"""Debian's Firefox, without a window, driven by npm's puppeteer-core over WebDriver BiDi."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .services import npm_install, program
from .waiting import TIMEOUT

_PUPPETEER = Path(__file__).parent / "puppeteer"


class Firefox:
    """A Firefox that runs. Used by one thread. It waits for each answer."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._pages = 0
        self.pid = int(self._line())

    def open(self, url: str) -> FirefoxPage:
        """Open another tab, before the others, which are hidden then. Returns when it is loaded."""
        self._pages += 1
        page = FirefoxPage(self, self._pages)
        page.goto(url)
        return page

    def ask(self, *question: object) -> Any:
        """What `firefox.mjs` answers to a line."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        value, error = json.loads(self._line())
        assert error is None, error
        return value

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "Firefox, or Node, has ended"
        return line


class FirefoxPage:
    """An open tab."""

    def __init__(self, browser: Firefox, number: int) -> None:
        self._browser = browser
        self._number = number

    def evaluate(self, expression: str) -> Any:
        """The value of this expression, or of the promise that it gives, as Playwright's pages do it."""
        return self._ask("evaluate", expression)

    def goto(self, url: str) -> None:
        self._ask("goto", url)

    def back(self) -> None:
        """Go back in the history, if possible to the page as it was. Returns before it is loaded."""
        self._ask("back")

    def bring_to_front(self) -> None:
        """Show it, which hides the tab that was shown."""
        self._ask("front")

    def set_offline(self, offline: bool) -> None:
        self._ask("offline", offline)

    def close(self) -> None:
        self._ask("close")

    def _ask(self, action: str, value: object = None) -> Any:
        return self._browser.ask(self._number, action, value)


@contextmanager
def firefox(folder: Path) -> Iterator[Firefox]:
    """A browser that has just started, with what npm installs for it in `folder`. Takes some seconds: share it."""
    path = program("firefox-esr", "firefox", package="Debian: firefox-esr")
    node = program("node", package="Debian: nodejs")
    for file in _PUPPETEER.iterdir():
        shutil.copy(file, folder)
    npm_install(folder)
    process = subprocess.Popen(
        [node, "firefox.mjs", path],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Firefox(process)
    finally:
        assert process.stdin
        assert process.stdout
        with suppress(BrokenPipeError):
            process.stdin.close()  # then it closes the browser, which it has started in a process group of its own
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # puppeteer kills the browser first
            process.wait(TIMEOUT)
        process.stdout.close()
