"""The pages on browsers and HTML: what they show runs in a real browser, and their tables are those of the code."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit
from urllib.request import ProxyHandler, build_opener

import flask
import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, Request, Route

from sse_batcher import SSE, Text
from sse_batcher.browser import SOURCE, TYPES
from sse_batcher.testing import live_server, open_stream

from .kit.browser import browser_fixture
from .kit.cdn import cdn
from .kit.clients import PYTHON_CLIENTS, Node
from .kit.documents import blocks, files, text_of
from .kit.repository import ROOT
from .kit.servers import GTHREAD, Server, running
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external

ICON = '<link rel="icon" href="data:,">'  # without it, the browser asks for a file
CDN = "https://cdn.jsdelivr.net"
HOSTILE = "\"'><img src=x onerror=alert(1)></li></template></turbo-stream><script>alert(2)</script>"


def section(text: str, title: str) -> str:
    """What stands below this heading."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert isinstance(found, str)
    return found


browser = browser_fixture()


@contextmanager
def visitor(browser: Browser) -> Iterator[BrowserContext]:
    """A browser's profile, whose pages have nothing to complain of."""
    complaints: list[str] = []

    def close(dialog: Dialog) -> None:
        complaints.append(f"a script ran: {dialog.message}")
        dialog.dismiss()

    def watch(page: Page) -> None:
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", close)

    with browser.new_context() as context:
        context.on("page", watch)
        yield context
        assert complaints == []


def opened(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.goto(url, wait_until="load")
    return page


def is_stream(request: Request) -> bool:
    return urlsplit(request.url).path == "/events"


def until(page: Page, condition: str, value: Any = None) -> None:
    """Wait until this is true in the page."""
    page.wait_for_function(condition, arg=value, timeout=1000 * TIMEOUT)


def until_equal(page: Page, expression: str, value: Any) -> None:
    until(page, f"(wanted) => JSON.stringify({expression}) === JSON.stringify(wanted)", value)


def until_items(page: Page, *texts: str) -> None:
    """Wait until the list has these items."""
    until_equal(page, "[...document.querySelectorAll('li')].map((li) => li.textContent)", texts)


def post(server: Server, path: str, **form: Any) -> None:
    """Send a form, as another visitor does."""
    opener = build_opener(ProxyHandler({}))
    with opener.open(server.url + path, urlencode(form).encode(), timeout=TIMEOUT) as response:
        assert response.status == 204


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        icon = ICON if path.startswith("templates/") and "<!doctype" in text else ""
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(icon + text)


# -- HTML --------------------------------------------------------------------------------------------------------------

HTML = text_of("guides/html")
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
    found["templates/page.html"] = found["templates/page.html"].replace(CDN, cdn_url)
    return found


@external
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_page_of_html_shows_the_state_and_each_change(
    browser: Browser, cdn_url: str, tmp_path: Path, library: str
) -> None:
    write(tmp_path, board(library, cdn_url))
    with running((*GTHREAD[:-1], "app:app"), tmp_path) as server, server.watched(), visitor(browser) as context:
        with context.expect_event("request", is_stream) as request:
            page = opened(context, server.url)
        assert request.value.resource_type == "fetch"  # not the browser's EventSource, which gives up
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
    write(tmp_path, files(section(HTML, "Single rows")))
    with running((*GTHREAD[:-1], "rows:app"), tmp_path) as server, server.watched(), visitor(browser) as context:
        page = opened(context, server.url)
        until_items(page, "Ada", "Grace")
        post(server, "/rows/3", name="Alan")
        post(server, "/rows/1", name=HOSTILE)
        until_items(page, HOSTILE, "Grace", "Alan")
        post(server, "/rows/3", name="Edsger")
        until_items(page, HOSTILE, "Grace", "Edsger")
        assert page.locator("li img, li script").count() == 0


ROWS = files(section(HTML, "Single rows"))
HTMX_ROWS = section(HTML, "Single rows with htmx")
MORE_ROUTES = """
@app.get("/late/<int:number>")
def late(number):
    sse.cursor()                                 # so the row is in the page, and comes again
    app.test_client().post(f"/rows/{number}", data={"name": "late"})
    return page()

@app.post("/deletions")
def delete():
    for number in (2, 99):                       # 99 is in no page
        sse.enqueue("message", Text(f'<li id="row-{number}" hx-swap-oob="delete"></li>'), key=number)
    return "", 204

@app.post("/kick")
def kick():
    sse.kick(channel="default")
    return "", 204
"""
TURBO_ROWS = """{% for number, name in rows|dictsort %}
<turbo-stream action="append" target="list">
<template><li id="row-{{ number }}">{{ name }}</li></template></turbo-stream>
{% endfor %}"""


def app_of_rows(library: str, cdn_url: str) -> dict[str, str]:
    """The files of the app with single rows, with a page of this library and a window that a test can meet."""
    found = dict(ROWS)
    if library == "Turbo":
        page = files(section(HTML, library))["templates/page.html"].replace('id="board"', 'id="list"')
        found |= {"templates/list.html": page, "templates/rows.html": TURBO_ROWS}
    elif library != "Plain JavaScript":
        (own,) = re.findall(rf"^### {library}: .*?(?=^### |\Z)", HTMX_ROWS, flags=re.M | re.S)
        found |= files(own)
    found["templates/list.html"] = found["templates/list.html"].replace(CDN, cdn_url)
    window = 'app.config["SSE_BATCH_WINDOW"] = 0.5\nsse = SSE(app)'
    found["rows.py"] = found["rows.py"].replace("sse = SSE(app)", window) + MORE_ROUTES
    return found


@contextmanager
def serving_rows(library: str, cdn_url: str, folder: Path) -> Iterator[Server]:
    write(folder, app_of_rows(library, cdn_url))
    with running((*GTHREAD[:-1], "rows:app"), folder) as server, server.watched():
        yield server


@external
@pytest.mark.parametrize("library", ["Plain JavaScript", "htmx 2", "htmx 4", "Turbo"])
def test_a_row_that_is_made_and_changed_in_one_window_is_there_once(
    browser: Browser, cdn_url: str, tmp_path: Path, library: str
) -> None:
    with serving_rows(library, cdn_url, tmp_path) as server, visitor(browser) as context:
        with context.expect_event("response", lambda response: is_stream(response.request)):
            page = opened(context, server.url)
        if library == "Turbo":
            page.evaluate("() => { document.getElementById('list').innerHTML = '<li id=row-2>Grace</li>'; }")
        else:
            until_items(page, "Ada", "Grace")
        post(server, "/rows/12", name="Alan")
        post(server, "/rows/12", name="Edsger")
        before = [] if library == "Turbo" else ["Ada"]
        until_items(page, *before, "Grace", "Edsger")
        post(server, "/rows/12", name="Barbara")
        post(server, "/rows/2", name=HOSTILE)
        if library == "Turbo":
            until_items(page, "Barbara", HOSTILE)  # moved to the end, in the order of their keys
        else:
            until_items(page, "Ada", HOSTILE, "Barbara")
        post(server, "/rows/3", name="Kurt")
        added = {"htmx 4": [HOSTILE, "Kurt", "Barbara"], "Turbo": ["Barbara", HOSTILE, "Kurt"]}
        until_items(page, *before, *added.get(library, [HOSTILE, "Barbara", "Kurt"]))
        assert page.locator("li img, li script").count() == 0


@external
@pytest.mark.parametrize("library", ["htmx 2", "htmx 4"])
def test_a_row_that_comes_again_is_there_once_until_it_is_deleted(
    browser: Browser, cdn_url: str, tmp_path: Path, library: str
) -> None:
    with serving_rows(library, cdn_url, tmp_path) as server, visitor(browser) as context:
        page = opened(context, server.url + "/late/3")
        until_items(page, "Ada", "Grace", "late")
        post(server, "/rows/4", name="Alan")  # after the one that comes again
        until_items(page, "Ada", "Grace", "late", "Alan")
        post(server, "/deletions")
        until_items(page, "Ada", "late", "Alan")


@external
@pytest.mark.parametrize("library", ["htmx 2", "htmx 4"])
@pytest.mark.parametrize("reason", ["gap", "401", "401 later"])
def test_a_page_of_htmx_with_the_state_reloads(
    browser: Browser, cdn_url: str, tmp_path: Path, library: str, reason: str
) -> None:
    def disturb(route: Route) -> None:
        if reason == "gap":
            route.continue_(url=f"{server.url}/events?last_event_id=unknown")
        else:
            route.fulfill(status=401, body="<h1>Unauthorized</h1>")

    with serving_rows(library, cdn_url, tmp_path) as server, browser.new_page() as page:
        shown: list[Request] = []
        page.on("request", lambda request: request.is_navigation_request() and shown.append(request))
        page.add_init_script("Math.random = () => 0")
        if reason != "401 later":
            page.route("**/events?*", disturb, times=1)
        with page.expect_request(lambda request: request.is_navigation_request() and len(shown) == 2):
            with page.expect_response("**/events?*"):
                page.goto(server.url, wait_until="load")
            if reason == "401 later":
                page.route("**/events?*", disturb, times=1)
                post(server, "/kick")
        post(server, "/rows/3", name="Alan")
        until_items(page, "Ada", "Grace", "Alan")


@external
@pytest.mark.parametrize("status", [401, 502])
def test_the_text_of_an_error_is_not_shown_by_htmx_4(
    browser: Browser, cdn_url: str, tmp_path: Path, status: int
) -> None:
    write(tmp_path, board("htmx 4", cdn_url))
    with running((*GTHREAD[:-1], "app:app"), tmp_path) as server, server.watched(), browser.new_page() as page:
        page.add_init_script('document.addEventListener("htmx:finally:request", () => { window.isOver = true; })')
        page.route("**/events", lambda route: route.fulfill(status=status, body="<h1>Error</h1>"))
        page.goto(server.url, wait_until="load")
        until(page, "() => window.isOver")
        assert page.locator("h1").count() == 0


def test_changes_of_the_last_moment_are_in_the_page_and_come_again() -> None:
    app = flask.Flask("app")
    sse = SSE(app)
    with open_stream(app) as stream:
        sse.enqueue("row", Text("<li>"))  # its window is open; the page that is made now shows the row
        with app.test_request_context():
            cursor = sse.cursor()
        with open_stream(app, last_event_id=cursor) as later:
            stream.clock.advance(0.1)
            assert later.opened_with == "sse_open"
            assert later.events() == [("row", "<li>")]


# -- the page in a browser ---------------------------------------------------------------------------------------------

BROWSER = text_of("guides/browser")
CONFIG = """
import os
app.config["SSE_CORS_ORIGINS"] = [f"http://localhost:{os.environ['PORT']}"]
app.config["SSE_RETRY_MS"] = 10
app.config["TEMPLATES_AUTO_RELOAD"] = True
"""
WHOLE = """
from flask import Response, render_template, request
from app import app, sse

sse.allow_stats(lambda: True)
tokens = []

@sse.authorize
def allowed(channels):
    tokens.append(request.headers.get("Authorization"))
    return [name for name in channels if name in ("default", "team-7")]

@app.get("/made/<name>")
def made(name):
    text = render_template(name, user={"id": 7})
    response = Response(text, mimetype="text/javascript" if name.endswith(".js") else "text/html")
    response.headers["Content-Security-Policy"] = request.args.get("policy", "")
    return response

@app.post("/send/<channel>")
def send(channel):
    for order in request.get_json():
        sse.enqueue("order", order, channel=channel)
    return "", 204

@app.post("/kick")
def kick():
    return str(sse.kick(channel="default"))

@app.get("/tokens")
def sent():
    return tokens
"""
IMPORT = 'import { BatchedEventSource } from "{{ sse_script_url() }}";\n'
OPEN = IMPORT + 'const events = new BatchedEventSource("/events");\n'
HEAD = """<!doctype html><meta charset="utf-8">
<script nonce="abc">window.got = []; Math.random = () => 0;</script>
"""
FIRST, SECOND = {"id": 1, "state": "paid"}, {"id": 2, "state": "sent"}
STATE = [{"id": 1, "state": "new"}, {"id": 2, "state": "new"}]


def fragments(title: str) -> list[str]:
    """The programs of a section that are no files."""
    named = files(BROWSER).values()
    return [block for block in blocks(section(BROWSER, title), "js") if block not in named]


class Site:
    """The app of the page. It serves pages that tests make of the fragments."""

    def __init__(self, server: Server, folder: Path, browser: Browser) -> None:
        self.server = server
        self.browser = browser
        self.templates = folder / "templates"

    def make(self, name: str, *script: str, head: str = HEAD, tag: str = '<script type="module" nonce="abc">') -> str:
        """A page with these pieces as its script. Returns its URL."""
        text = f'{head}{ICON}<p id="badge"></p><p id="title"></p>{tag}{"".join(script)}</script>'
        (self.templates / f"{name}.html").write_text(text)
        return f"{self.server.url}/made/{name}.html"

    def send(self, *orders: dict[str, Any], channel: str = "default") -> None:
        self.server.request("POST", f"/send/{channel}", orders)

    def streams(self) -> int:
        count: int = json.loads(self.server.request("GET", "/events/stats"))["clients"]
        return count


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    found = files(BROWSER)
    pages = {f"templates/{name}": ICON + found[name] for name in ("first.html", "orders.html")}
    app = found["app.py"].replace("sse = SSE(app)\n", CONFIG + "sse = SSE(app)\n")
    write(folder, pages | {"app.py": app, "whole.py": WHOLE})
    with running((*GTHREAD[:-1], "whole:app"), folder) as server:
        yield Site(server, folder, browser)


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    wait_until(lambda: shared_site.streams() == 0, "the streams of the test before are closed")
    for number in (1, 2):
        shared_site.server.request("POST", f"/orders/{number}/new")
    with shared_site.server.watched():
        yield shared_site


@external
def test_the_page_in_five_lines_shows_orders(site: Site) -> None:
    script = re.findall(r"^<script.*?</script>", files(BROWSER)["first.html"], flags=re.M | re.S)
    assert [len(text.splitlines()) for text in script] == [5]
    with visitor(site.browser) as context:
        with context.expect_event("response", lambda response: is_stream(response.request)):
            page = opened(context, site.server.url)
        site.send(FIRST, SECOND)
        until_equal(page, "document.getElementById('log').textContent", "1: paid\n2: sent\n")


@external
def test_the_state_of_the_connection_is_shown(site: Site) -> None:
    (block,) = fragments("Show the state of the connection")
    note = 'events.addEventListener("statechange", () => got.push(badge.textContent));\n'
    url = site.make("state", OPEN, block, note)
    with site.browser.new_page() as page:
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.route("**/events", lambda route: route.fulfill(status=502, body="Bad Gateway"), times=1)
        page.goto(url, wait_until="load")
        until_equal(page, "got", ["waiting", "connecting", "open"])
        assert messages[-1].startswith("502 status 502")


def control(type: str, id: str, **data: Any) -> str:
    return f"event: {type}\nretry: 60000\ndata: {json.dumps(data)}\nid: {id}\n\n"


@external
def test_the_plain_page_reloads_after_a_gap_inside_the_stream_only(site: Site) -> None:
    opening = {"heartbeat": 15.0, "channels": ["default"]}
    at_the_beginning = control("sse_gap", "a-1", reason="epoch", **opening)
    inside = at_the_beginning + control("sse_gap", "a-2", reason="overflow", heartbeat=15.0)
    with visitor(site.browser) as context:
        page = context.new_page()
        answers = [inside, at_the_beginning]
        page.route("**/events", lambda route: route.fulfill(body=answers.pop(0), content_type="text/event-stream"))
        loads: list[str] = []
        page.on("load", lambda page: loads.append(page.url))
        with page.expect_event("load", lambda _: len(loads) == 2):
            page.goto(f"{site.server.url}/made/orders.html")
        until_equal(page, "document.getElementById('state').textContent", "Connection lost")  # the second answer ended
        assert len(loads) == 2


@external
def test_without_a_snapshot_the_state_is_loaded_again_after_a_gap(site: Site) -> None:
    (block,) = fragments("React to a gap")
    begin = 'const events = new BatchedEventSource("/events", { cursor: "nonsense" });\n'
    url = site.make("gap", IMPORT, begin, 'const reloadState = () => got.push("state");\n', block)
    with visitor(site.browser) as context:
        until_equal(opened(context, url), "got", ["state"])


@external
def test_the_cursor_closes_the_hole_between_the_page_and_its_stream(site: Site) -> None:
    (block,) = fragments("Begin where the state was read")
    listen = 'for (const type of ["orders", "order", "sse_gap"]) events.on(type, (data) => got.push([type, data]));\n'
    url = site.make("cursor", IMPORT, block, listen)
    with visitor(site.browser) as context:
        page = context.new_page()
        held: list[Route] = []

        def hold(route: Route) -> None:
            held.append(route)

        page.route("**/events?*", hold)
        page.goto(url, wait_until="load")
        wait_until(lambda: bool(page.evaluate("1") and held), "the page asks for its stream")
        site.send(FIRST)
        held[0].continue_()
        until_equal(page, "got", [["order", FIRST]])


@external
def test_a_burst_is_drawn_once(site: Site) -> None:
    (block,) = fragments("Draw once for many events")
    stubs = "const states = new Map(), draw = (states) => got.push([...states]);\n"
    ready = 'events.on("orders", (orders) => got.push(orders.length));\n'
    with visitor(site.browser) as context:
        page = opened(context, site.make("burst", OPEN, stubs, block, ready))
        until_equal(page, "got", [2])
        site.send(FIRST, SECOND)
        until_equal(page, "got", [2, [[1, "paid"], [2, "sent"]]])


@external
def test_a_page_gets_the_channels_that_are_granted(site: Site) -> None:
    (block,) = fragments("Read several channels")
    assert text_of("reference/browser-module").count(block.splitlines()[0]) == 1  # the same example
    block = block.replace('"team-7"]', '"team-7", "team-8"]')
    with visitor(site.browser) as context:
        page = opened(context, site.make("channels", IMPORT, block, 'events.on("order", (data) => got.push(data));\n'))
        until_equal(page, "document.getElementById('title').textContent", "default, team-7")
        site.send(FIRST, channel="team-7")
        until_equal(page, "got", [FIRST])


def until_two_tabs_have(site: Site, url: str, streams: int) -> None:
    """Open two tabs. Both get an event, and have this many streams together."""
    with site.browser.new_context() as context:
        pages = [opened(context, url) for _ in range(2)]
        for page in pages:
            until_equal(page, "got", [STATE])
        wait_until(lambda: site.streams() == streams, f"there are {streams} streams")
        site.send(FIRST)
        for page in pages:
            until_equal(page, "got", [STATE, FIRST])
        assert site.streams() == streams


NOTE_ORDERS = 'for (const type of ["orders", "order"]) events.on(type, (data) => got.push(data));\n'


@external
def test_two_tabs_share_a_stream(site: Site) -> None:
    (block,) = fragments("One connection for all tabs")
    assert block.count("{{ user.id }}") == 1
    until_two_tabs_have(site, site.make("share", IMPORT, block, NOTE_ORDERS), 1)


@external
def test_a_page_of_another_origin_sends_its_token(site: Site) -> None:
    (block,) = fragments("A page of another origin")
    block = block.replace("https://api.example.com", site.server.url)
    note = "events.on('orders', (data) => got.push(data));\nothers.on('orders', (data) => got.push(data));\n"
    url = site.make("origin", 'const token = async () => "secret";\n', block, note)
    with visitor(site.browser) as context:
        page = opened(context, url.replace("127.0.0.1", "localhost"))
        until_equal(page, "got", [STATE, STATE])
        assert page.evaluate("origin") not in site.server.url
        assert {*json.loads(site.server.request("GET", "/tokens"))[-2:]} == {"Bearer secret", None}


POLICY = section(BROWSER, "Content-Security-Policy").partition("```text\n")[2].partition("\n```")[0]
OF_SHARE = "; worker-src 'self'"
NONCE = "'nonce-abc'"


@external
@pytest.mark.parametrize(
    ("script", "policy", "streams"),
    [
        ("file", POLICY, 1),
        ("file", POLICY.replace(OF_SHARE, ""), 1),
        ("inline", POLICY.replace("script-src", f"script-src {NONCE}"), 1),
        ("inline", POLICY.replace("script-src 'self'", f"script-src {NONCE}").replace(OF_SHARE, ""), 2),
        ("file", f"{POLICY}; require-trusted-types-for 'script'", 2),
    ],
    ids=["as shown", "without worker-src", "with a nonce", "with a nonce alone", "with trusted types"],
)
def test_the_module_works_under_a_strict_policy(site: Site, script: str, policy: str, streams: int) -> None:
    assert OF_SHARE in POLICY
    program = fragments("One connection for all tabs")[0] + NOTE_ORDERS
    if script == "inline":
        url = site.make("policy", IMPORT, program)
    else:
        program = 'import { BatchedEventSource } from "/events/sse-batcher.js";\nwindow.got = [];\n' + program
        (site.templates / "policy.js").write_text(program)
        url = site.make("policy", head="<!doctype html>", tag='<script type="module" src="/made/policy.js">')
    policy = f"default-src 'none'; img-src data:; {policy}"
    until_two_tabs_have(site, f"{url}?{urlencode({'policy': policy})}", streams)


def program_of_a_plain_source(*lines: str) -> str:
    stubs = """const showAll = (orders) => got.push(["all", orders.length]);
        const show = (order) => got.push(["order", order.id]);
        const reloadState = () => got.push("gap");
    """
    return stubs + "".join(lines)


@external
def test_a_plain_eventsource_gets_each_event_by_itself(site: Site) -> None:
    block = fragments("Without the module")[0]
    with visitor(site.browser) as context:
        page = opened(context, site.make("plain", program_of_a_plain_source(block)))
        until_equal(page, "got", [["all", 2]])
        site.send(FIRST, SECOND)
        until_equal(page, "got", [["all", 2], ["order", 1], ["order", 2]])


@external
def test_a_page_without_the_module_can_unpack_batches(site: Site) -> None:
    first, block = fragments("Without the module")[:2]
    program = program_of_a_plain_source(first.replace("?batch=0", ""), block)
    with visitor(site.browser) as context:
        page = opened(context, site.make("batches", program))
        until_equal(page, "got", [["all", 2]])
        site.send(FIRST, SECOND)
        until_equal(page, "got", [["all", 2], ["order", 1], ["order", 2]])


@external
def test_a_plain_eventsource_is_opened_again_after_an_error_status(site: Site) -> None:
    block = fragments("Without the module")[2]
    with site.browser.new_page() as page:
        page.goto(site.make("again", program_of_a_plain_source(block)), wait_until="load")
        until_equal(page, "got", [["all", 2]])
        page.route("**/events?*", lambda route: route.fulfill(status=502, body="Bad Gateway"), times=1)
        with page.expect_response(lambda response: response.status == 502):
            assert site.server.request("POST", "/kick") == "1"
            site.send(FIRST)
        with page.expect_request(is_stream) as request:
            pass
        assert [*parse_qs(urlsplit(request.value.url).query)] == ["batch", "last_event_id"]
        until_equal(page, "got", [["all", 2], ["order", 1]])


def test_each_program_of_the_page_has_a_test() -> None:
    titles = re.findall(r"^## (.*)$", BROWSER, flags=re.M)
    counts = {title: len(fragments(title)) for title in titles if fragments(title)}
    assert counts == {
        "Show the state of the connection": 1,
        "React to a gap": 1,
        "Begin where the state was read": 1,
        "Draw once for many events": 1,
        "Read several channels": 1,
        "One connection for all tabs": 1,
        "A page of another origin": 1,
        "Without the module": 3,
    }


# -- the module --------------------------------------------------------------------------------------------------------

MODULE = text_of("reference/browser-module")


def rows(title: str) -> list[str]:
    """The first cell of each row of the table in this section."""
    cells = re.findall(r"^\| (`.*?) \|", section(MODULE, title), flags=re.M)
    return [name for cell in cells for name in re.findall(r"`(\w+)", cell)]


def declared(kind: str, name: str) -> list[str]:
    """The names of the members of an interface or class in the types."""
    types = re.sub(r"/\*.*?\*/", "", TYPES, flags=re.S)
    (body,) = re.findall(rf"^export {kind} {name}\b.*?{{$\n(.*?)^}}$", types, flags=re.M | re.S)
    return re.findall(r"^  (?:static )?(?:readonly |get |set )*(\w+)[?<(:]", body, flags=re.M)


def test_every_option_of_the_module_is_there_with_its_default() -> None:
    assert sorted(rows("Options")) == sorted(declared("interface", "Options"))
    defaults = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)`", section(MODULE, "Options"), flags=re.M))
    source = SOURCE.partition("constructor(url, options) {")[2].partition("\n  }\n")[0]
    for name, default in defaults.items():
        assert f"{name} = {default}" in source.replace("30_000", "30000"), name
    assert {"cursor", "poll", "withCredentials", "backoff"} == set(defaults)


def test_every_method_and_property_of_the_module_is_there() -> None:
    members = {*declared("class", "BatchedEventSource")} - {"constructor"}
    methods = {name for name in members if re.search(rf"^  {name}[<(]", TYPES, flags=re.M)}
    assert {*rows("Methods")} - {"type", "id"} == methods
    assert {*rows("Properties")} == members - methods
    assert {*declared("interface", "EventInfo")} == {"type", "id"}


def test_every_state_and_event_of_the_module_is_there() -> None:
    (states,) = re.findall(r"^export type State = (.*);$", TYPES, flags=re.M)
    assert rows("States") == re.findall(r'"(\w+)"', states)
    assert rows("Events of the connection") == re.findall(
        r'"(\w+)"', SOURCE.partition("OWN_EVENTS = ")[2].partition(";")[0]
    )
    stream = section(MODULE, "Events of the stream")
    known = TYPES.partition("export interface ControlEvents {")[2].partition("\n}\n")[0]
    assert rows("Events of the stream") == re.findall(r"^  (\w+): {", known, flags=re.M)
    for name in rows("Events of the stream"):
        (row,) = re.findall(rf"^\| `{name}` \|.*$", stream, flags=re.M)
        (declaration,) = re.findall(rf"^  {name}: ({{.*?}});?$", known, flags=re.M | re.S)
        members = re.findall(r'"?(\w+)"?', declaration.replace("number", "").replace("string", ""))
        assert set(members) == set(re.findall(r"`(\w+)`", row)[1:])


def test_the_numbers_of_the_module_are_those_of_its_source() -> None:
    for constant, said in [
        ("SWITCH_MS = 5000;", "has come for 5 s"),
        ("300_000) this.#tryOther(); // every five minutes", "again every five minutes"),
        ("quiet > 2000 * this.#heartbeat", "more than two heartbeats"),
        ("SLICE_MS = 20;", "after 20 ms"),
        ("SHARED_FRAMES = 256;", "newest 256 frames"),
        ("ANSWER_MS = 30_000;", "at most 30 s"),
    ]:
        assert SOURCE.count(constant) == 1
        assert MODULE.count(said) == 1


# -- clients -----------------------------------------------------------------------------------------------------------

CLIENTS = text_of("reference/clients")


def test_every_client_that_is_tested_is_there() -> None:
    tested = {"launchdarkly-eventsource" if name == "ld_eventsource" else name for name in PYTHON_CLIENTS}
    named = re.findall(r"^\| `([\w-]+)` \|[^|]{13,}\|$", CLIENTS, flags=re.M)
    assert set(named) == tested
    versions = {int(name.removeprefix("eventsource")) for name in Node.names if name != "node"}
    assert {
        int(number) for row in re.findall(r"npm's `eventsource` (.*?) \|", CLIENTS) for number in re.findall(r"\d", row)
    } == versions


def test_the_bytes_that_clients_wait_for_are_those_of_the_test() -> None:
    (tested,) = re.findall(r'\(\("name", "size"\), (\[.*?\])\)', (ROOT / "tests" / "test_clients.py").read_text())
    said = {
        name: int(size.replace(",", ""))
        for name, size in re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \|$", CLIENTS, flags=re.M)
    }
    assert said == {name.replace("ld_", "launchdarkly-"): size for name, size in ast.literal_eval(tested)}


class Enough(Exception):
    pass


def test_the_program_for_httpx_goes_on_where_it_was() -> None:
    program: dict[str, Any] = {}
    exec(files(CLIENTS)["listen.py"], program)
    app = flask.Flask("app")
    app.config["SSE_RETRY_MS"] = 10
    sse = SSE(app)
    sse.snapshot("default")(lambda: ("order", {"n": 1}))  # only for a client without a cursor
    got: list[Any] = []

    def handle(type: str, data: Any) -> None:
        got.append((type, data["n"]))
        if len(got) == 1:
            sse.kick(channel="default")
            for number in (2, 3):
                sse.enqueue("order", {"n": number})
            assert sse.manager.flush_all(TIMEOUT)
        if len(got) == 3 or got[1:] == [("order", 1)]:
            raise Enough

    with live_server(app) as url, pytest.raises(Enough):
        program["listen"](f"{url}/events?batch=0", handle, lambda: got.append("gap"))
    assert got == [("order", 1), ("order", 2), ("order", 3)]
