"""The pages on browsers and HTML: what they show runs in a real browser, and their tables are those of the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from .kit.browser import chromium
from .kit.cdn import cdn
from .kit.repository import ROOT
from .kit.servers import GTHREAD, Server, running
from .kit.waiting import TIMEOUT

external = pytest.mark.external

CDN = "https://cdn.jsdelivr.net"
HOSTILE = "\"'><img src=x onerror=alert(1)></li></template></turbo-stream><script>alert(2)</script>"


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


def section(text: str, title: str) -> str:
    """What stands below this heading."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert isinstance(found, str)
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def files(text: str) -> dict[str, str]:
    """The blocks that are files, by the path that their first line names."""
    found = {}
    for block in blocks(text, r"\w+"):
        named = re.match(r"(?:#|//|<!--|{#) ([\w./-]+\.\w+)(?: -->| -#})?\n", block)
        if named:
            found[named[1]] = block
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@contextmanager
def visitor(browser: Browser) -> Iterator[BrowserContext]:
    """A browser's profile, whose pages have nothing to complain of."""
    complaints: list[str] = []

    def watch(page: Page) -> None:
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a script ran"), dialog.dismiss()))

    with browser.new_context() as context:
        context.on("page", watch)
        yield context
        assert complaints == []


def opened(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.goto(url, wait_until="load")
    return page


def until_items(page: Page, *texts: str) -> None:
    """Wait until the list has these items."""
    items = "(wanted) => JSON.stringify([...document.querySelectorAll('li')].map((li) => li.textContent)) === wanted"
    page.wait_for_function(items, arg=_json(texts), timeout=1000 * TIMEOUT)


def _json(texts: tuple[str, ...]) -> str:
    import json

    return json.dumps(texts, separators=(",", ":"), ensure_ascii=False)


def post(server: Server, path: str, **form: Any) -> None:
    """Send a form, as another visitor does."""
    opener = build_opener(ProxyHandler({}))
    with opener.open(server.url + path, urlencode(form).encode(), timeout=TIMEOUT) as response:
        assert response.status == 204


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)


# -- HTML --------------------------------------------------------------------------------------------------------------

HTML = text_of("guides/html.md")
LIBRARIES = ["Plain JavaScript", "htmx 2", "htmx 4", "Turbo", "Datastar"]


@pytest.fixture(scope="module")
def cdn_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with cdn(tmp_path_factory.mktemp("cdn")) as url:
        yield url


def board(library: str, cdn_url: str) -> dict[str, str]:
    """The files of the app with a page of this library."""
    of_library = section(HTML, library)
    found = files(section(HTML, "The server")) | files(of_library)
    found["app.py"] += "".join(blocks(of_library, "python"))
    found["templates/page.html"] = '<link rel="icon" href="data:,">' + found["templates/page.html"].replace(CDN, cdn_url)
    return found


@external
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_page_of_html_shows_the_state_and_each_change(
    browser: Browser, cdn_url: str, tmp_path: Path, library: str
) -> None:
    write(tmp_path, board(library, cdn_url))
    with running((*GTHREAD[:-1], "app:app"), tmp_path) as server, server.watched(), visitor(browser) as context:
        page = opened(context, server.url)
        until_items(page, "Ada: 3", "Grace: 5")
        post(server, "/goals", name="Ada")
        until_items(page, "Ada: 4", "Grace: 5")
        page.fill("[name=name]", HOSTILE)
        page.click("button")
        until_items(page, f"{HOSTILE}: 1", "Ada: 4", "Grace: 5")
        assert page.locator("li img, li script").count() == 0
        assert "Traceback" not in server.output()


@external
def test_single_rows_replace_the_old_ones_or_are_appended(browser: Browser, tmp_path: Path) -> None:
    found = files(section(HTML, "Single rows"))
    found["templates/list.html"] = '<link rel="icon" href="data:,">' + found["templates/list.html"]
    write(tmp_path, found)
    with running((*GTHREAD[:-1], "rows:app"), tmp_path) as server, server.watched(), visitor(browser) as context:
        page = opened(context, server.url)
        until_items(page, "Ada", "Grace")
        post(server, "/rows/3", name="Alan")
        post(server, "/rows/1", name=HOSTILE)
        until_items(page, HOSTILE, "Grace", "Alan")
        post(server, "/rows/3", name="Edsger")
        until_items(page, HOSTILE, "Grace", "Edsger")
        assert page.locator("li img, li script").count() == 0
