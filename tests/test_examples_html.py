"""The examples with HTML: what pages of htmx 2, htmx 4, Turbo and Datastar show in a real browser, and what they miss.

The libraries are the real files of their packages. The pages have no script of their own but the two lines by which
htmx 2 and Turbo read the stream with our module, so a script of the tests notes what each library gets.
"""

from __future__ import annotations

import html
import re
import runpy
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit
from urllib.request import ProxyHandler, build_opener

import pytest
from playwright.sync_api import Browser, Page, Request, Response, Route

from sse_batcher import BatchOptions, SSEManager, Text

from .kit import nginx
from .kit.browser import browser_fixture
from .kit.cdn import cdn
from .kit.ports import free_port
from .kit.redisserver import redis_server
from .kit.repository import EXAMPLES
from .kit.servers import HOST, Server, running
from .kit.services import program
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.external

HOSTILE = "<img src=x onerror=alert(1)>"
ONE_BATCH = BatchOptions(batch_window=10)  # of what is enqueued before a flush
BATCH_WINDOW = "0.5"  # seconds: what a test does in a moment is in one window, also on a busy machine

# Each library has an event of its own for a text that it gets, except Turbo, which has one for each <turbo-stream>.
NOTES = """
  const note = (text) => received.push(text);
  document.addEventListener("htmx:sseMessage", (event) => note(event.detail.data));
  document.addEventListener("htmx:sse:after:message", ({detail: {message}}) => message.event || note(message.data));
  document.addEventListener("datastar-fetch", ({detail: {argsRaw}}) => argsRaw.elements && note(argsRaw.elements));
  const sources = new WeakSet();
  const {addEventListener} = EventTarget.prototype;
  EventTarget.prototype.addEventListener = function (type, ...values) {
    addEventListener.call(this, type, ...values);
    if (type !== "message" || !this?.url || sources.has(this)) return;
    sources.add(this);  // an EventSource, or one of ours
    addEventListener.call(this, type, (event) => window.Turbo && note(event.data));
  };
  window.names = () => [...document.querySelectorAll("li")].map((item) => item.textContent).join("|");
  const look = () => {
    if (frames.at(-1) !== names()) frames.push(names());
    requestAnimationFrame(look);
  };
  window.forget = () => {
    window.received = [];  // the texts that come from now on
    window.frames = [names()];  // what is seen from now on, without repetitions
  };
  forget();
  look();
"""


class Example(NamedTuple):
    """What the tests have to know of an example."""

    name: str
    event_type: str = "message"
    with_module: bool = False
    """Whether its stream is read by `BatchedEventSource`. Otherwise the browser does not get the module."""

    @property
    def module_script(self) -> str:
        """The lines of its page that use the module."""
        use = {
            "htmx2": "htmx.createEventSource = (url) => new BatchedEventSource(url);",
            "turbo": "window.EventSource = BatchedEventSource; // before Turbo opens the stream",
        }
        first = '  import { BatchedEventSource } from "{{ sse_script_url() }}";\n'
        return f'<script type="module">\n{first}  {use[self.name]}\n</script>\n' if self.with_module else ""


HTMX2, TURBO = Example("htmx2", with_module=True), Example("turbo", with_module=True)
HTMX2_ALONE, TURBO_ALONE = Example("htmx2"), Example("turbo")
HTMX4, DATASTAR = Example("htmx4"), Example("datastar", event_type="datastar-patch-elements")
ALL = [HTMX2, HTMX4, TURBO, DATASTAR]
ALSO_ALONE = [*ALL, HTMX2_ALONE, TURBO_ALONE]


browser = browser_fixture(light=True)


@pytest.fixture(scope="module")
def cdn_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with cdn(tmp_path_factory.mktemp("cdn")) as url:
        yield url


class Tab:
    """A tab of the browser, in which a page of an example is shown."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[Request] = []
        """Those for the stream."""
        page.add_init_script(NOTES)
        page.on("dialog", lambda dialog: (self.complaints.append("a script ran"), dialog.dismiss()))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("request", lambda request: is_stream(request) and self.requests.append(request))

    def open(self, url: str) -> None:
        """Show the example, and wait until its stream has begun with the snapshot."""
        self.page.goto(url, wait_until="load")
        self.wait_until_received(4)
        self.page.evaluate("forget()")

    def hide(self, hidden: bool) -> None:
        """Tell the page that its tab is in the background, or in front again."""
        self.page.evaluate(
            """(hidden) => {
              Object.defineProperty(document, "hidden", {configurable: true, get: () => hidden});
              document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )

    def cursors(self) -> list[str | None]:
        """The cursor of each request for the stream, from its URL or its header."""
        queries = [parse_qs(urlsplit(request.url).query) for request in self.requests]
        headers = [request.all_headers() for request in self.requests]
        return [
            query.get("last_event_id", [header.get("last-event-id")])[0]
            for query, header in zip(queries, headers, strict=True)
        ]

    def received(self) -> list[list[str]]:
        """The names in each text that has come."""
        texts: list[str] = self.page.evaluate("received")
        return [re.findall("<li[^>]*>(.*?)</li>", html.unescape(text), re.DOTALL) for text in texts]

    def wait_until_received(self, seats: int) -> None:
        """Wait for the texts of so many seats."""
        self._wait("(seats) => received.join().split('<li').length > seats", seats)

    def wait_until_shown(self, *names: str) -> None:
        self._wait("(wanted) => names() === wanted", "|".join(names))

    def frames(self) -> list[list[str]]:
        """What was seen, one after the other."""
        lists: list[str] = self.page.evaluate("frames")
        return [names.split("|") for names in lists]

    def _wait(self, condition: str, value: Any) -> None:
        self.page.wait_for_function(condition, arg=value, timeout=1000 * TIMEOUT)


def is_stream(request: Request) -> bool:
    return urlsplit(request.url).path == "/events"


@pytest.fixture
def tab(browser: Browser, example: Example) -> Iterator[Tab]:
    with browser.new_page() as page:
        if not example.with_module:
            page.route("**/sse-batcher.js*", lambda route: route.abort())
        yield Tab(page)


@pytest.fixture
def server(example: Example, tmp_path: Path, cdn_url: str) -> Iterator[Server]:
    """The example, run as its docstring says."""
    arguments = (str(EXAMPLES / f"{example.name}.py"),)
    with running(arguments, tmp_path, FLASK_CDN=cdn_url, FLASK_SSE_BATCH_WINDOW=BATCH_WINDOW) as server:
        with server.watched():
            yield server


def post(server: Server, path: str, **form: Any) -> None:
    """Send a form, as another visitor does."""
    opener = build_opener(ProxyHandler({}))
    with opener.open(server.url + path, urlencode(form).encode(), timeout=TIMEOUT) as response:
        assert response.status in {200, 204}


def name_of(example: Example) -> str:
    return f"{example.name}-with-module" if example.with_module else example.name


def each(*examples: Example) -> Any:
    """Run a test once for each of these examples, which `server` and `site` then run."""
    return pytest.mark.parametrize("example", examples, ids=name_of)


def load(example: Example) -> dict[str, Any]:
    """The example as a module that is imported, not run."""
    return runpy.run_path(str(EXAMPLES / f"{example.name}.py"))


# -- what pages show ---------------------------------------------------------------------------------------------------

HOSTILE_NAMES = [
    HOSTILE,
    "\"'><script>alert(1)</script>",
    "</li></template></turbo-stream><img src=x onerror=alert(1)>",
    "a\nmode remove\nselector body",  # arguments of Datastar
    "a\r\n\r\ndata: <img src=x onerror=alert(1)>\n\nevent: b",
]
BEFORE = ["Ada", "Grace", HOSTILE, "Alan"]


@each(*ALL)
def test_a_lone_text_changes_the_page(server: Server, tab: Tab) -> None:
    tab.open(server.url)
    post(server, "/seats", seat=2, name="Barbara")
    tab.wait_until_shown("Ada", "Barbara", HOSTILE, "Alan")
    tab.wait_until_received(1)
    assert tab.received() == [["Barbara"]]
    assert tab.complaints == []


@each(*ALL)
def test_the_texts_of_a_window_are_one_swap(server: Server, tab: Tab) -> None:
    tab.open(server.url)
    after = BEFORE
    for _ in range(3):  # a machine that stands still in the middle makes two windows of one
        before, after = after, [after[-1], *after[:-1]]
        post(server, "/rotation")
        tab.wait_until_shown(*after)
        tab.wait_until_received(4)
        received, frames = tab.received(), tab.frames()
        if received == [after]:
            break
        tab.page.evaluate("forget()")
    assert received == [after]
    assert frames == [before, after], "a part of the changes could be seen"
    assert tab.complaints == []


@each(*ALL)
def test_a_hostile_name_is_text(server: Server, tab: Tab) -> None:
    tab.open(server.url)
    assert tab.page.locator("#seat-3").text_content() == HOSTILE  # as the page and the snapshot have it
    for name in HOSTILE_NAMES:
        post(server, "/seats", seat=1, name=name)
        tab.wait_until_shown(name.replace("\r\n", "\n"), *BEFORE[1:])  # the format cannot carry CR
        assert tab.page.locator("li img, li script").count() == 0
    assert tab.complaints == []


@each(*ALL)
def test_the_forms_of_the_page_work(server: Server, tab: Tab) -> None:
    tab.open(server.url)
    tab.page.fill("[name=seat]", "4")
    tab.page.fill("[name=name]", "Barbara")
    tab.page.click("text=Change")
    tab.wait_until_shown(*BEFORE[:3], "Barbara")
    tab.page.click("text=Everybody moves")
    tab.wait_until_shown("Barbara", *BEFORE[:3])
    assert tab.complaints == []


@each(*ALL)
def test_the_page_has_no_script_of_its_own(example: Example) -> None:
    page = load(example)["PAGE"]
    assert example.module_script in page
    page = page.replace(example.module_script, "")
    assert "<script" in page
    assert not re.search(r"<script(?![^>]* src=)|\bon\w+=|hx-on|javascript:|\|safe", page)


# -- what pages miss while the server is away --------------------------------------------------------------------------


class Site:
    """An example with Redis under gunicorn, which comes and goes, and a publisher of its texts that stays."""

    def __init__(self, example: Example, folder: Path, port: int, publisher: SSEManager, **environment: str) -> None:
        self._module = load(example)
        self._example = example
        self._folder = folder
        self._port = port
        self._environment = {"PYTHONPATH": str(EXAMPLES), **environment}
        self.publisher = publisher
        self.url = f"http://{HOST}:{port}"

    def serving(self) -> AbstractContextManager[Server]:
        """Run it, at the same port each time, and at the socket where nginx expects its server."""
        command = ("-m", "gunicorn", "-k", "gthread", "--threads=8", f"{self._example.name}:app")
        # The last of them is where `running` sees that the server listens.
        places = ("unix:app.sock", f"{HOST}:{self._port}", f"{HOST}:{{port}}")
        return running((*command, *(f"--bind={place}" for place in places)), self._folder, **self._environment)

    def change(self, old: str, new: str) -> None:
        """Run the example with this changed, too."""
        changed = self._folder / f"{self._example.name}.py"
        text = (changed if changed.exists() else EXAMPLES / changed.name).read_text()
        assert old in text
        changed.write_text(text.replace(old, new))
        self._environment["PYTHONPATH"] = str(self._folder)

    @contextmanager
    def behind_nginx(self) -> Iterator[None]:
        """Have an nginx at `url`, which answers 502 as long as there is no server."""
        path = program("nginx", package="Debian: nginx-light")
        arguments = nginx.arguments_of(path, nginx.KEEPING, host=HOST, upstream="unix:app.sock")
        with running(arguments, self._folder) as server:
            self.url = server.url
            yield

    def send(self, *changes: tuple[int, str]) -> None:
        """Send these seats, each as a text of its own, and return when Redis has them."""
        for number, name in changes:
            self._module["seats"][number] = name
            with self._module["app"].app_context():
                text = self._module["as_text"]([number])
            assert isinstance(text, Text)
            self.publisher.enqueue(self._example.event_type, text)
            assert self.publisher.flush_all(TIMEOUT)


@pytest.fixture
def site(example: Example, tmp_path: Path, cdn_url: str) -> Iterator[Site]:
    with redis_server(tmp_path) as redis, SSEManager(batching=ONE_BATCH, backend=redis.url) as publisher:
        yield Site(example, tmp_path, free_port(), publisher, FLASK_SSE_BACKEND=redis.url, FLASK_CDN=cdn_url)


MISSED = [(1, "first"), (2, "second"), (1, "third"), (4, "fourth")]
ONE_BY_ONE = [[name] for _, name in MISSED]
AFTER = ["third", "second", HOSTILE, "fourth"]
RESUMING = [HTMX4, DATASTAR]
"""Libraries that make the requests for the stream themselves. The others leave them to an `EventSource`, or to us."""


@each(*ALSO_ALONE)
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=lambda ending: ending.name)
def test_nothing_is_lost_while_the_server_is_away(site: Site, tab: Tab, ending: signal.Signals) -> None:
    with site.serving() as server:
        tab.open(site.url)
        end(server, ending)
    site.send(*MISSED)
    with site.serving():
        tab.wait_until_shown(*AFTER)
        assert tab.received() == ONE_BY_ONE


@each(HTMX2)
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=lambda ending: ending.name)
def test_a_plain_onmessage_loses_nothing_either(site: Site, tab: Tab, ending: signal.Signals) -> None:
    with site.serving() as server:
        tab.page.goto(f"{site.url}/events/health", wait_until="load")  # a page of the same origin, without the example
        tab.page.evaluate("() => { new EventSource('/events').onmessage = (event) => received.push(event.data); }")
        tab.wait_until_received(4)
        tab.page.evaluate("forget()")
        end(server, ending)
    site.send(*MISSED)
    with site.serving():
        tab.wait_until_received(4)
        assert tab.received() == ONE_BY_ONE


def end(server: Server, ending: signal.Signals) -> None:
    """End the server in good order, with a last block for each stream, or kill it."""
    if ending == signal.SIGTERM:
        server.stop(ending)
    else:
        server.kill()
        server.process.wait(TIMEOUT)


@contextmanager
def outage(site: Site, tab: Tab, begin: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Wait until the page has met a 502, send what it misses, and start the server, which has stopped behind nginx.

    `begin` makes the page meet it, if it would not by itself.
    """

    def is_refused(response: Response) -> bool:
        return is_stream(response.request) and response.status == 502

    with tab.page.expect_response(is_refused, timeout=1000 * TIMEOUT):
        begin()
    site.send(*MISSED)
    with site.serving():
        yield


@each(*ALL)
def test_nothing_is_lost_behind_a_proxy_that_answers_502(site: Site, tab: Tab) -> None:
    with site.behind_nginx():
        with site.serving() as server:
            tab.open(site.url)
            server.stop(signal.SIGTERM)
        with outage(site, tab):
            tab.wait_until_shown(*AFTER)
            assert tab.received() == ONE_BY_ONE


@each(TURBO)
def test_a_source_that_is_handed_to_turbo_loses_nothing(site: Site, tab: Tab) -> None:
    site.change(
        "window.EventSource = BatchedEventSource; // before Turbo opens the stream",
        'await import("{{ config.CDN }}/npm/@hotwired/turbo@8/dist/turbo.es2017-esm.js");\n'
        '  Turbo.connectStreamSource(new BatchedEventSource("/events"));',
    )
    site.change('<turbo-stream-source src="/events"></turbo-stream-source>', "")
    with site.behind_nginx():
        with site.serving() as server:
            tab.open(site.url)
            server.stop(signal.SIGTERM)
        with outage(site, tab):
            tab.wait_until_shown(*AFTER)
            assert tab.received() == ONE_BY_ONE


@each(HTMX2, TURBO)
def test_nothing_is_lost_if_the_first_request_gets_a_502(site: Site, tab: Tab, example: Example) -> None:
    site.change('"/events"', '"/events?last_event_id={{ sse_cursor() }}"')
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    def release() -> None:
        for route in held:
            route.continue_()
        tab.page.unroute("**/events?*")

    tab.page.route("**/events?*", hold)
    with site.behind_nginx():
        with site.serving() as server:
            tab.page.goto(site.url, wait_until="load")
            while 'last_event_id=unknown"' in tab.page.content():  # this process has not heard from Redis yet
                held.clear()
                tab.page.reload(wait_until="load")
            server.stop(signal.SIGTERM)
        tab.page.evaluate("forget()")
        with outage(site, tab, begin=release):
            tab.wait_until_shown(*AFTER)
            assert tab.received() == ONE_BY_ONE


@each(HTMX2_ALONE)
def test_htmx_2_comes_back_after_a_502_without_its_cursor(site: Site, tab: Tab) -> None:
    with site.behind_nginx():
        with site.serving() as server:
            tab.open(site.url)
            site.send((2, "before"))
            tab.wait_until_received(1)
            server.stop(signal.SIGTERM)
        with outage(site, tab):
            tab.wait_until_received(5)
            site.send((1, "after"))
            tab.wait_until_received(6)
            # What was sent meanwhile is missing. There is only a snapshot, and the new process knows no changes.
            assert tab.received() == [["before"], BEFORE, ["after"]]
    assert tab.cursors()[-1] is None


@each(HTMX2_ALONE)
def test_htmx_2_gets_all_since_the_page_was_made_if_its_url_has_the_cursor(site: Site, tab: Tab) -> None:
    with site.behind_nginx():
        site.change('"/events"', '"/events?last_event_id={{ sse_cursor() }}"')
        with site.serving() as server:
            tab.page.goto(site.url, wait_until="load")
            while tab.page.locator("[sse-connect$=unknown]").count():  # this process has not heard from Redis yet
                tab.page.reload(wait_until="load")
            site.send((2, "before"))
            tab.wait_until_received(1)
            server.stop(signal.SIGTERM)
        with outage(site, tab):
            tab.wait_until_shown(*AFTER)
            tab.wait_until_received(6)
            assert tab.received() == [["before"], ["before"], *ONE_BY_ONE]  # the first one again


@each(TURBO_ALONE)
def test_turbo_does_not_come_back_after_a_502(site: Site, tab: Tab) -> None:
    with site.behind_nginx():
        with site.serving() as server:
            tab.open(site.url)
            server.stop(signal.SIGTERM)
        with outage(site, tab):
            state = "document.querySelector('turbo-stream-source').streamSource.readyState"
            assert tab.page.evaluate(state) == tab.page.evaluate("EventSource.CLOSED")
            assert tab.received() == []


@each(DATASTAR)
def test_datastar_does_not_come_back_after_an_orderly_end_by_default(site: Site, tab: Tab) -> None:
    site.change("retry: 'always', ", "")
    with site.serving() as server:
        tab.open(site.url)
        tab.page.evaluate(
            """() => document.addEventListener("datastar-fetch", ({detail}) => {
              if (detail.type === "finished") window.finished = true;
            })"""
        )
        server.stop(signal.SIGTERM)
        tab.page.wait_for_function("window.finished", timeout=1000 * TIMEOUT)


# -- code that was written for an EventSource --------------------------------------------------------------------------

PROGRAMS = """async ([url, cdn, withModule]) => {
  const {BatchedEventSource} = await import("/events/sse-batcher.js");
  const {default: ReconnectingEventSource} =
    await import(`${cdn}/npm/reconnecting-eventsource@1/build/esm/reconnecting-eventsource.js`);
  window.expected = 5;  // programs that get all
  window.opened = 0;  // sources
  window.refused = new Set();  // of those
  window.EventSource = class extends (withModule ? BatchedEventSource : EventSource) {
    constructor(...values) {
      super(...values);
      let isOpened = false;
      this.addEventListener("sse_open", () => {
        if (!isOpened) opened += 1;
        isOpened = true;
      });
      this.addEventListener("error", ({status}) => {
        if (isOpened && (this.readyState === EventSource.CLOSED || status === 502)) refused.add(this);
      });
    }
  };
  window.numbers = {};
  const note = (name) => (event) => (numbers[name] ??= []).push(JSON.parse(event.data).number);
  const programs = {
    "a listener": () => {
      new EventSource(url).addEventListener("order", note("a listener"));
    },
    "readyState in onerror": function open() {
      const source = new EventSource(url);
      source.addEventListener("order", note("readyState in onerror"));
      source.onerror = () => source.readyState === EventSource.CLOSED && setTimeout(open, 200);
    },
    // After two events, another source goes on behind the second one.
    "lastEventId": () => {
      const read = (source, limit) => {
        let count = 0;
        source.addEventListener("order", (event) => {
          note("lastEventId")(event);
          if (++count !== limit) return;
          source.close();
          const separator = url.includes("?") ? "&" : "?";
          read(new EventSource(`${url}${separator}last_event_id=${event.lastEventId}`));
        });
      };
      read(new EventSource(url), 2);
    },
    "reconnecting-eventsource": () => {
      const source = new ReconnectingEventSource(url, {eventSourceClass: EventSource, max_retry_time: 200});
      source.addEventListener("order", note("reconnecting-eventsource"));
    },
    "VueUse": () => {
      const {data} = VueUse.useEventSource(url, ["order"], {autoReconnect: {delay: 200}});
      Vue.watch(data, (text) => note("VueUse")({data: text}), {flush: "sync"});
    },
  };
  for (const program of Object.values(programs)) program();
}"""


@each(HTMX2, HTMX2_ALONE)
def test_programs_for_an_eventsource_lose_nothing_with_the_module(
    site: Site, tab: Tab, example: Example, cdn_url: str
) -> None:
    page = tab.page
    page.unroute("**/sse-batcher.js*")

    def send(*numbers: int) -> None:
        """In one batch, if there are several."""
        for number in numbers:
            site.publisher.enqueue("order", {"number": number})
        assert site.publisher.flush_all(TIMEOUT)

    def wait_until_all_have(number: int) -> dict[str, list[int]]:
        everywhere = "(number) => Object.values(numbers).filter((list) => list.includes(number)).length >= expected"
        page.wait_for_function(everywhere, arg=number, timeout=1000 * TIMEOUT)
        numbers: dict[str, list[int]] = page.evaluate("numbers")
        return numbers

    with site.behind_nginx():
        with site.serving() as server:
            page.goto(f"{site.url}/events/health", wait_until="load")  # of the same origin, without the example
            for path in ("vue@3/dist/vue.global.prod.js", "@vueuse/shared@14/dist/index.iife.min.js"):
                page.add_script_tag(url=f"{cdn_url}/npm/{path}")
            page.add_script_tag(url=f"{cdn_url}/npm/@vueuse/core@14/dist/index.iife.min.js")
            # Without the module, programs have to do without batches.
            url = "/events" if example.with_module else "/events?batch=0"
            page.evaluate(PROGRAMS, [url, cdn_url, example.with_module])
            page.wait_for_function("opened === 5", timeout=1000 * TIMEOUT)
            send(1, 2, 3)
            wait_until_all_have(3)
            server.stop(signal.SIGTERM)
        with outage(site, tab, begin=lambda: page.wait_for_function("refused.size === 5", timeout=1000 * TIMEOUT)):
            send(4, 5, 6)
            if not example.with_module:
                page.evaluate("expected = 3")  # the others make no further source
                page.wait_for_function("opened === 9", timeout=1000 * TIMEOUT)
            send(7)
            numbers = wait_until_all_have(7)
    alone = {
        "a listener": [1, 2, 3],
        "lastEventId": [1, 2, 3],
        "readyState in onerror": [1, 2, 3, 7],
        "VueUse": [1, 2, 3, 7],
        "reconnecting-eventsource": [*range(1, 8)],  # it sends the cursor itself
    }
    assert numbers == ({name: [*range(1, 8)] for name in alone} if example.with_module else alone)


# -- hidden tabs, and a first connection that fails --------------------------------------------------------------------


@each(*RESUMING)
def test_a_hidden_tab_has_no_stream_and_misses_nothing(server: Server, tab: Tab) -> None:
    tab.open(server.url)
    with tab.page.expect_event("requestfailed", lambda request: "/events" in request.url):
        tab.hide(True)
    post(server, "/seats", seat=1, name="first")
    tab.hide(False)
    tab.wait_until_shown("first", *BEFORE[1:])
    tab.wait_until_received(1)
    assert tab.received() == [["first"]]
    opened, returned = tab.cursors()
    assert opened is None
    assert returned


@each(*ALSO_ALONE)
def test_only_some_try_again_after_a_first_connection_that_failed(server: Server, tab: Tab, example: Example) -> None:
    tab.page.clock.install()
    tab.page.route("**/events*", lambda route: route.fulfill(status=502, body="Bad Gateway"), times=1)
    with tab.page.expect_response(lambda response: response.status == 502):
        tab.page.goto(server.url, wait_until="load")
    if not example.with_module:  # that needs only one or two seconds
        tab.page.clock.run_for(120_000)  # milliseconds
    if example not in (HTMX4, TURBO_ALONE):
        tab.wait_until_received(4)
        assert len(tab.requests) == 2
    else:
        assert len(tab.requests) == 1


# -- more than elements ------------------------------------------------------------------------------------------------


def append_two(site: Site) -> None:
    """Send two texts in one window, each with arguments of its own beside its elements."""
    for name in ("fifth", "sixth"):
        text = Text(f"selector ol\nmode append\nelements <li>{name}</li>")
        site.publisher.enqueue(DATASTAR.event_type, text)
    assert site.publisher.flush_all(TIMEOUT)


@each(DATASTAR)
def test_datastar_refuses_a_batch_of_texts_with_a_mode(site: Site, tab: Tab) -> None:
    with site.serving():
        tab.open(site.url)
        append_two(site)
        tab.wait_until_received(2)
    assert tab.received() == [["fifth", "sixth"]]
    assert tab.frames() == [BEFORE]
    assert "PatchElementsInvalidMode" in tab.complaints[0]


@each(DATASTAR)
def test_datastar_takes_texts_with_a_mode_from_a_stream_without_batches(site: Site, tab: Tab) -> None:
    site.change("'/events'", "'/events?batch=0'")
    with site.serving():
        tab.open(site.url)
        append_two(site)
        tab.wait_until_shown(*BEFORE, "fifth", "sixth")
    assert tab.received() == [["fifth"], ["sixth"]]
