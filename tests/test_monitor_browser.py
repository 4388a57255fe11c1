"""The monitor's page in real browsers: what it shows, how it is used, and what other pages cannot do to it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from playwright.sync_api import Browser, Locator, Page, expect

from sse_batcher.cli import serving

from .kit.browser import browser_fixture
from .kit.monitor import Site, site
from .kit.servers import HOST, running
from .kit.waiting import TIMEOUT, wait_until

__all__ = ["site"]

pytestmark = pytest.mark.external

browser = browser_fixture(light=True)

HOSTILE = [
    '<img src=x onerror="window.taken = 1">',
    "</script><script>window.taken = 1</script>",
    "</td></tr></table><button>Kick</button>",
    "line\u2028separator\u202eleft to right\u2066",
    "javascript:window.taken=1",
    "__proto__",
    "x" * 128,
]
SIZES = {
    "phone": {"width": 360, "height": 740},
    "tablet": {"width": 800, "height": 900},
    "desk": {"width": 1280, "height": 800},
}


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, site: Site) -> Iterator[Open]:
    """Opens the monitor. No page may log anything, except that the server was away."""
    pages: list[Page] = []
    complaints: list[str] = []

    def open_page(size: str = "desk", url: str | None = None, **options: Any) -> Page:
        page = browser.new_page(viewport=SIZES[size], **options)
        page.set_default_timeout(1000 * TIMEOUT)
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        pages.append(page)
        page.goto(url or site.url())
        if url is None:
            expect(page.locator("#state")).to_have_text("live")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


@pytest.fixture(autouse=True, scope="module")
def _patience() -> Iterator[None]:
    expect.set_options(timeout=1000 * TIMEOUT)
    yield
    expect.set_options(timeout=5_000)


def row(page: Page, text: str) -> Locator:
    return page.locator("#stream-rows tr", has_text=text)


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_it_shows_the_process_the_streams_and_the_frames(open_page: Open, site: Site) -> None:
    site.open("ada", "team-7", address="10.0.0.7")
    site.open(7)
    site.open("7")
    site.manager.enqueue("order", {"id": 7}, channel="team-7")
    site.manager.enqueue("note", "hello", user=["ada", 7])
    site.manager.flush_all()
    page = open_page()
    expect(page.locator("#process")).to_have_text(re.compile(r"^Process \d+ on .+, running for .+, sse_batcher .+\.$"))
    expect(page.locator("#news")).to_have_text("All is well.")
    cells = row(page, "ada").locator("td")
    expect(cells.nth(0)).to_have_text("ada")
    expect(cells.nth(1)).to_have_text("team-7")
    expect(cells.nth(2)).to_have_text(re.compile(r"^[\d.]+ (ms|s)$"))
    expect(cells.nth(5)).to_have_text("10.0.0.7")
    expect(page.locator("td.user").filter(has_text=re.compile("^7$"))).to_have_count(1)
    expect(page.locator("td.user").filter(has_text=re.compile('^"7"$'))).to_have_count(1)
    order = page.locator("#event-rows tr", has_text="order")
    expect(order.locator("td").nth(1)).to_have_text("team-7")
    order.locator("summary").click()
    expect(order.locator("pre")).to_have_text('{"id":7}')
    site.manager.enqueue("order", {"id": 8})
    expect(page.locator("#event-rows tr")).to_have_count(3)
    expect(order.last.locator("pre")).to_be_visible()  # it stays open
    expect(page.locator("#channel-rows > div").first).to_have_text(re.compile("^default2$"))
    rate = page.locator("[data-tile=events]")

    def counts_more() -> bool:
        site.manager.enqueue("order", {"id": 9})
        page.wait_for_timeout(20)
        return rate.inner_text() not in {"0", "–"}

    wait_until(counts_more, "events for each second")


def test_a_search_asks_the_server(open_page: Open, site: Site) -> None:
    for number in range(60):
        site.open(f"user-{number}")
    page = open_page()
    expect(page.locator("#found")).to_have_text("60 streams, 50 of them listed, the newest first.")
    expect(page.locator("#stream-rows tr:visible")).to_have_count(15)
    more = page.get_by_role("button", name="Show all 50")
    more.click()
    expect(page.locator("#stream-rows tr:visible")).to_have_count(50)
    page.locator("#search").fill("user-0")
    expect(page.locator("#stream-rows td.user")).to_have_text(["user-0"])
    expect(page.locator("#found")).to_have_text("1 stream found.")
    page.locator("#search").fill("nobody")
    expect(page.locator("#no-streams")).to_be_visible()


def test_no_two_users_look_the_same(open_page: Open) -> None:
    users = [
        7,
        "7",
        '"7"',
        "ada",
        " ada",
        "ada ",
        "\u202e",
        r"\u202e",
        r"\\u202e",
        "\u3164",
        "a\u00a0b",
        "a b",
        "",
        "-7",
        "ä",
    ]
    shown = open_page().evaluate(
        "users => import('/events/monitor/format.js').then(({user}) => users.map(user))",
        [json.dumps(user) for user in users],
    )
    assert len(set(shown)) == len(users)
    assert [text for text in shown if re.search("[\u202e\u3164\u00a0]", text)] == []
    assert [shown[users.index(user)] for user in ("ada", "a b", "ä", "7")] == ["ada", "a b", "ä", '"7"']


def test_hostile_names_show_as_text(open_page: Open, site: Site) -> None:
    page = open_page()
    elements = page.evaluate("document.querySelectorAll('img, script, iframe, a, object').length")
    for text in HOSTILE:
        name = text.replace("\u2028", "").replace("\u202e", "").replace("\u2066", "")[:128]
        site.open(text, name, address=text)
        site.manager.enqueue(name, {"text": text}, channel=name)
        site.manager.enqueue(name, text, user=text)
    site.manager.flush_all()
    expect(page.locator("#stream-rows tr")).to_have_count(len(HOSTILE))
    expect(page.locator("#event-rows tr")).to_have_count(2 * len(HOSTILE))
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    shown = page.locator("main").text_content() or ""
    for text in HOSTILE[:3]:
        assert shown.count(text) >= 6
        assert json.dumps(text)[1:-1] in shown
    assert r"line\u2028separator\u202eleft to right\u2066" in shown
    assert not re.search("[\u2028\u202e\u2066]", shown)
    for text in HOSTILE:
        page.locator("#stream-rows button", has_text=text.split("\u2028")[0]).first.click()
        expect(page.locator("#kick-user")).to_contain_text(text.split("\u2028")[0])
        page.keyboard.press("Escape")
    assert page.evaluate("document.querySelectorAll('img, script, iframe, a, object').length") == elements
    assert page.evaluate("[window.taken, {}.taken]") == [None, None]
    assert page.title().startswith("Monitor: ")
    assert overflow(page) == 0


def overflow(page: Page) -> int:
    """How many pixels the page, or a part of it, is too wide."""
    pixels: int = page.evaluate(
        "Math.max(document.documentElement.scrollWidth - innerWidth,"
        "...[...document.querySelectorAll('body, main, section, table, td, dl, dialog')]"
        ".map((part) => part.scrollWidth - part.clientWidth))"
    )
    return pixels


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits(open_page: Open, site: Site, size: str, scheme: Any) -> None:
    for number in range(20):
        site.open(f"{'w' * 60}@{number}.example", "a" * 128, "team-7", address="f" * 64)
    site.manager.enqueue("t" * 128, {"id": "x" * 900}, channel="c" * 128)
    site.manager.flush_all()
    page = open_page(size, color_scheme=scheme, reduced_motion="reduce")
    expect(page.locator("#stream-rows tr")).to_have_count(20)
    page.locator("#event-rows summary").click()
    assert overflow(page) == 0
    page.locator("#stream-rows button").first.click()
    expect(page.locator("#kick-user")).to_be_visible()
    assert overflow(page) == 0
    assert page.evaluate("document.getAnimations().length") == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(244, 246, 248)" if scheme == "light" else "rgb(15, 21, 27)"
    )


# -- how it is used ----------------------------------------------------------------------------------------------------


def test_a_kick_asks_first_and_says_what_it_does(open_page: Open, site: Site) -> None:
    for user in ("ada", "ada", "bob"):
        site.open(user)
    page = open_page()
    row(page, "ada").first.get_by_role("button").click()
    dialog = page.get_by_role("dialog", name="Kick this user?")
    expect(dialog).to_contain_text("This ends the 2 streams of this user in this process, and refuses tokens that were")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    assert site.kicks == []
    row(page, "ada").first.get_by_role("button").click()
    dialog.get_by_role("button", name="Kick").click()
    expect(page.locator("#said")).to_have_text("ada was kicked: 2 streams ended.")
    assert site.kicks == [200]


def test_the_keyboard_is_enough(open_page: Open, site: Site) -> None:
    ada = site.open("ada")
    page = open_page()
    expect(row(page, "ada")).to_be_visible()

    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.textContent || document.activeElement.id")
            if focused == name:
                break
        assert focused == name
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"

    tab_to("Pause")
    tab_to("search")
    tab_to("Kick ada")
    for _ in range(2):
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        assert page.evaluate("document.activeElement.id") == "kick-cancel"
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        assert page.evaluate("document.activeElement.textContent") == "Kick ada"
    page.evaluate("document.getElementById('kick').dispatchEvent(new Event('close'))")  # of the first time, but late
    assert page.evaluate("document.activeElement.textContent") == "Kick ada"
    before = site.data
    site.open("bob")  # comes first, so that the row moves
    expect(row(page, "bob")).to_be_visible()
    assert site.data > before
    assert page.evaluate("document.activeElement.textContent") == "Kick ada"
    site.manager.kick(user="ada")
    ada.close()
    expect(row(page, "ada")).to_have_count(0)
    assert page.evaluate("document.activeElement.textContent") == "Kick bob"  # the row in its place
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("This ends the one stream of this user")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("bob was kicked: 1 stream ended.")


def test_a_screen_reader_hears_the_state_once(open_page: Open, site: Site) -> None:
    site.open("ada")
    page = open_page("phone")  # where the rows are cards, the table is one nevertheless
    table = page.get_by_role("table", name="Streams")
    names = ["User", "Channels", "Behind", "Transport", "Open for", "Address", "Kick"]
    expect(table.get_by_role("columnheader")).to_have_text(names)
    expect(table.get_by_role("row")).to_have_count(2)
    page.evaluate(
        "(() => { const look = new MutationObserver((all) => { window.said += all.length; });"
        "for (const each of document.querySelectorAll('[role=status], [role=alert]'))"
        " look.observe(each, {childList: true, characterData: true, subtree: true}); })()"
    )

    def hears() -> Any:
        """What is said while data come."""
        expect(page.locator("#state")).to_have_text("live")
        page.evaluate("window.said = 0")
        asked = site.data
        wait_until(lambda: (page.wait_for_timeout(20), site.data > asked + 5)[1], "more data")
        return page.evaluate("window.said")

    # Once is enough: if the machine stands still, the page says so.
    assert any(hears() == 0 for _ in range(3))


def test_the_page_says_that_its_data_are_old_and_recovers(open_page: Open, site: Site) -> None:
    site.open("ada")
    page = open_page()
    expect(row(page, "ada")).to_be_visible()
    for answer, words in [
        (lambda route: route.abort(), "the server does not answer"),
        (
            lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"),
            "the server answers with the status 502",
        ),
        (lambda route: route.fulfill(status=403), "you may not see this"),
        (lambda route: route.fulfill(status=302, headers={"Location": "/login"}), "you are not logged in any more"),
        (lambda route: route.fulfill(content_type="application/json", body="{"), "was cut off"),
    ]:
        page.route("**/monitor/data*", answer)
        expect(page.locator("#news")).to_contain_text(words)
        expect(page.locator("#state")).to_have_text(re.compile("^no news, .* old$"))
        expect(page.locator("main")).to_have_class("stale")
        page.unroute("**/monitor/data*")
        page.evaluate("dispatchEvent(new Event('online'))")  # or it would wait a little
        expect(page.locator("#state")).to_have_text("live")
        expect(page.locator("#news")).to_have_text("All is well.")


def test_a_page_that_is_hidden_or_paused_asks_nothing(open_page: Open, site: Site) -> None:
    page = open_page()

    def asks_nothing() -> bool:
        """Whether it does not, at least from the second time on: a request that has begun may still be on its way."""
        for _ in range(4):
            asked = site.data
            page.wait_for_timeout(400)
            if site.data == asked:
                return True
        return False

    pause = page.get_by_role("button", name="Pause")
    pause.click()
    expect(pause).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#state")).to_have_text("paused")
    assert asks_nothing()
    asked = site.data
    pause.click()
    wait_until(lambda: (page.wait_for_timeout(20), site.data > asked + 2)[1], "it goes on")
    page.evaluate(
        "Object.defineProperty(document, 'visibilityState', {configurable: true, value: 'hidden'});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    assert asks_nothing()


def test_who_may_not_kick_sees_no_button(open_page: Open, site: Site) -> None:
    site.may_kick = False
    site.open("ada")
    page = open_page()
    expect(row(page, "ada")).to_be_visible()
    expect(page.locator("#stream-rows button")).to_be_hidden()


# -- several processes -------------------------------------------------------------------------------------------------

WORKERS = """
from flask import Flask
from sse_batcher import SSE
from sse_batcher.monitor import overview

overview.MIN_SECONDS = 0.2
app = Flask("site")
app.config.update(SECRET_KEY="secret", SSE_BACKEND="memory://")
sse = SSE(app)
sse.allow_monitor(lambda: True)
"""


def test_a_page_shows_one_of_several_processes(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    # Each process of this kind takes one request at a time, so that the other one has its turn.
    command = ("-m", "gunicorn", "-k", "sync", f"--bind={HOST}:{{port}}", "--workers=2", "workers:app")
    with running(command, tmp_path) as server, server.watched(), closing(browser.new_page()) as page:
        page.goto(f"{server.url}/events/monitor")
        choice = page.locator("#choice")
        expect(choice).to_be_visible()
        expect(choice.locator("option")).to_have_count(2)
        expect(page.locator("#process")).to_contain_text("One of 2 that have answered this page.")
        pids = [text.rpartition(" ")[2] for text in choice.locator("option").all_inner_texts()]
        for pid in pids:
            choice.select_option(label=choice.locator("option", has_text=pid).inner_text())
            for _ in range(4):  # the same one, again and again
                expect(page.locator("#process")).to_contain_text(f"Process {pid} on ")
                page.wait_for_timeout(250)


# -- other pages -------------------------------------------------------------------------------------------------------

ATTACKS = """
const [url, body] = [%s, %s];
const text = JSON.stringify(body);
const json = {"Content-Type": "application/json"};
const results = [];
async function attempt(name, options) {
  try {
    const response = await fetch(url + "/kick", {method: "POST", credentials: "include", ...options});
    results.push([name, response.type === "opaque" ? "opaque" : response.status]);
  } catch { results.push([name, "refused"]); }
}
function submit(enctype, method = "post") {
  const form = document.createElement("form");
  Object.assign(form, {action: url + "/kick", method, enctype, target: "sink"});
  // As text/plain, this is JSON: the name, "=", and the value.
  const [name, value] = [text.slice(0, -1) + ',"x":"', '"}'];
  const field = Object.assign(document.createElement("input"), {name, value});
  form.append(field);
  document.body.append(form);
  return new Promise((done) => {
    document.querySelector("iframe").onload = done;
    form.submit();
    setTimeout(done, 5000);
  });
}
window.attacked = (async () => {
  await attempt("no-cors, text", {mode: "no-cors", body: text});
  await attempt("no-cors, blob", {mode: "no-cors", body: new Blob([text], {type: "text/plain"})});
  await attempt("no-cors, json", {mode: "no-cors", body: text, headers: json});
  await attempt("cors, text", {body: text});
  await attempt("cors, json", {body: text, headers: json});
  await attempt("cors, no credentials", {body: text, headers: json, credentials: "omit"});
  await attempt("no referrer", {body: text, mode: "no-cors", referrerPolicy: "no-referrer"});
  try { results.push(["beacon", navigator.sendBeacon(url + "/kick", new Blob([text], {type: "application/json"}))]); }
  catch { results.push(["beacon", "refused"]); }
  navigator.sendBeacon(url + "/kick", text);
  for (const type of ["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"]) await submit(type);
  await submit("text/plain", "get");
  try { results.push(["read", (await (await fetch(url + "/data", {credentials: "include"})).text()).length]); }
  catch { results.push(["read", "refused"]); }
  return results;
})();
"""


@contextmanager
def attacker(script: str) -> Iterator[int]:
    """A site of another origin, with a page that runs this. Its port."""
    app = Flask("attacker")

    @app.get("/")
    def page() -> str:
        return f"<!doctype html><title>x</title><body><iframe name=sink></iframe><script>{script}</script>"

    @app.get("/frame")
    def frame() -> str:
        return f"<!doctype html><title>x</title><body><iframe name=framed src={json.loads(script)}></iframe>"

    with serving(app) as (_, port):
        yield port


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["same-site", "cross-site"])
def test_no_other_page_kicks_or_reads(browser: Browser, site: Site, host: str) -> None:
    site.open("ada")
    shown = site.app.test_client().get("/events/monitor/data").json
    assert shown is not None
    # Everything is right, even the token, except where it comes from.
    body = {"user": '"ada"', "process": shown["process"]["id"], "token": shown["kick"]["token"]}
    kicked = threading.Event()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(site.manager), "kick", lambda self, **_: kicked.set())
        with (
            attacker(ATTACKS % (json.dumps(site.url()), json.dumps(body))) as port,
            closing(browser.new_page()) as page,
        ):
            page.goto(f"http://{host}:{port}/")
            results = dict(page.evaluate("window.attacked"))
            wait_until(lambda: (page.wait_for_timeout(20), len(site.kicks) >= 8)[1], "most attacks reach the server")
    assert not kicked.is_set()
    assert set(site.kicks) <= {403, 404, 405, 415}
    assert 403 in site.kicks
    assert results["read"] == "refused"
    assert {value for name, value in results.items() if name.startswith("cors")} == {"refused"}


def test_the_page_itself_kicks_with_the_same_request(browser: Browser, site: Site) -> None:
    """So that the test above refuses for its reason."""
    site.open("ada")
    with closing(browser.new_page()) as page:
        page.goto(site.url())
        status = page.evaluate(
            "fetch('monitor/data').then((answer) => answer.json()).then(({process, kick}) => fetch('monitor/kick', "
            "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify("
            "{user: '\"ada\"', process: process.id, token: kick.token})})).then((answer) => answer.status)"
        )
    assert status == 200
    assert site.kicks == [200]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["same-site", "cross-site"])
def test_no_page_frames_the_monitor(browser: Browser, site: Site, host: str) -> None:
    with attacker(json.dumps(site.url())) as port, closing(browser.new_page()) as page:
        page.goto(f"http://{host}:{port}/frame")

        def is_refused() -> bool:
            page.wait_for_timeout(20)
            frame = page.frame("framed")
            return frame is not None and frame.url.startswith("chrome-error:")

        wait_until(is_refused, "it is not shown")
    assert site.data == 0
