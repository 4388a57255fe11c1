"""The demo's page in a real browser: what it counts and draws, how it is worked, and who can read it."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect

import sse_batcher
from sse_batcher.cli import create_demo, serving
from sse_batcher.demo.scenarios import SCENARIOS, TYPES, Happening
from sse_batcher.demo.simulation import Demo

from .kit.browser import chromium

pytestmark = pytest.mark.external

PAGE_TIMEOUT = 20_000  # milliseconds
BURST = 600  # and a window in which a loaded machine, too, brings a burst to an end
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


_DOTS = """async (drawn) => {
    const canvas = document.getElementById("chart");
    const dots = () => {
        // A copy, since the browser complains of who reads a canvas often.
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PAGE_TIMEOUT)
    with chromium() as browser:
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


Open = Callable[..., Tab]


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Open]:
    """Opens tabs. Whatever a test is about: no tab of it may complain in the console or ask anybody else."""
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


# -- the buttons and the counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "batched", "plain"),
    [("restart", 3, 30), ("five", 1, 5), ("one", 1, 1), ("sparse", 6, 6), ("error", 1, 1)],
)
def test_a_button_shows_its_events_on_both_sides(tab: Tab, scenario: str, batched: int, plain: int) -> None:
    if scenario in {"restart", "five"}:
        tab.set(window=BURST)
    tab.button(scenario).click()
    tab.expect_counts("batched", frames=batched, events=plain)
    tab.expect_counts("plain", frames=plain, events=plain)
    expect(tab.rows("plain", ":not(.note)")).to_have_count(plain)
    expect(tab.rows("batched", ":not(.note)")).to_have_count(batched)
    expect(tab.rows("batched", ".batch")).to_have_count(batched if plain > batched else 0)
    expect(tab.count("batched", "replaced")).to_have_text("0")
    saved = f"({batched} instead of {plain})" if plain > batched else "Nothing saved"
    expect(tab.page.get_by_role("status").first).to_contain_text(saved)


def test_rapid_changes_are_fewer_since_newer_ones_replace_older(tab: Tab) -> None:
    tab.button("config").click()
    tab.expect_counts("plain", frames=30, events=30)
    status = tab.page.get_by_role("status").first
    expect(status).to_contain_text(re.compile(r"instead of 30\).* gave way to newer ones"))
    batched = tab.counts("batched")
    assert 0 < batched["replaced"] == 30 - batched["events"]
    expect(status).to_contain_text(f"{batched['replaced']} event")


def test_under_a_steady_stream_the_page_stays_usable_and_calm(tab: Tab) -> None:
    tab.page.evaluate("""() => {
        window.spoken = 0;
        window.began = performance.now();
        const count = () => (window.spoken += 1);
        new MutationObserver(count).observe(document.getElementById("saving"), { childList: true });
    }""")
    tab.button("steady").click()
    expect(tab.button("steady")).to_have_attribute("aria-busy", "true")
    batch = tab.rows("batched", ".batch").first
    batch.locator("summary").first.click()
    opened = tab.rows("batched", ":has(> [open])")
    expect(opened.locator("tbody tr").first).to_be_visible()

    # It plays on, and another button does not wait for it.
    tab.button("error").click()
    expect(tab.rows("plain", ".error")).to_have_count(1)
    tab.expect_counts("plain", frames=401, events=401)
    tab.expect_counts("batched", events=401)
    assert tab.counts("batched")["frames"] < 100
    expect(tab.button("steady")).not_to_have_attribute("aria-busy", "true")
    expect(opened).to_be_attached()
    spoken, seconds = tab.page.evaluate("[window.spoken, (performance.now() - window.began) / 1000]")
    assert spoken <= seconds + 2  # at most once a second
    expect(tab.rows("plain")).to_have_count(200)


def test_who_reads_a_row_does_not_lose_the_place(tab: Tab) -> None:
    tab.set(window=BURST)
    tab.button("restart").click()
    tab.rows("batched", ".batch").first.locator("summary").click()
    opened = tab.rows("batched", ":has(> [open])")
    expect(opened.locator("tbody tr")).to_have_count(10)
    place = opened.bounding_box()
    with tab.page.expect_response(lambda response: "/play/" in response.url):
        tab.page.evaluate("fetch('/play/restart', { method: 'POST', headers: { 'X-Requested-With': 'sse_batcher' } })")
    expect(tab.rows("batched", ".batch")).to_have_count(6)
    now = opened.bounding_box()
    assert place is not None
    assert now is not None
    assert abs(now["y"] - place["y"]) < 2
    # Nor does a row move away below a pointer that is pressed.
    tab.page.mouse.move(now["x"] + 100, now["y"] + 10)
    tab.page.mouse.down()
    tab.button("one").focus()
    tab.page.keyboard.press("Enter")  # a wish to see what comes
    expect(tab.count("batched", "events")).to_have_text("61")
    expect(tab.rows("batched", ".event")).to_have_count(0)
    tab.page.mouse.move(0, 0)
    tab.page.mouse.up()
    expect(tab.rows("batched", ".event")).to_be_in_viewport()


def test_the_bytes_are_those_of_the_body(tab: Tab, url: str) -> None:
    tab.set(window=BURST)
    with closing(_Raw(url, f"window={BURST}&size=50")) as batched, closing(_Raw(url, "window=1&size=1")) as plain:
        tab.button("restart").click()
        tab.expect_counts("batched", frames=3, events=30)
        tab.button("error").click()
        tab.expect_counts("batched", frames=4, events=31)
        tab.expect_counts("plain", frames=31, events=31)
        for side, raw in zip(SIDES, (batched, plain), strict=True):
            blocks = [raw.block() for _ in range(tab.counts(side)["frames"])]
            assert tab.counts(side)["bytes"] == sum(map(len, blocks))
            # And no block more than these.
            assert blocks[-1].startswith(b"event: error\n")


class _Raw:
    """A stream as it is on the wire, less heartbeats."""

    def __init__(self, url: str, query: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        self.connection.request("GET", f"/events?{query}")
        self.answer = self.connection.getresponse()
        assert self.block().startswith(b"event: sse_open\n")

    def block(self) -> bytes:
        block = b""
        while not block.endswith(b"\n\n"):
            line = self.answer.readline()
            assert line, "the stream has ended"
            block += b"" if line.startswith(b":") else line
        return block

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


def test_clear_empties_the_page_and_counts_from_zero(tab: Tab) -> None:
    tab.set(window=BURST)
    tab.button("restart").click()
    tab.expect_counts("batched", frames=3, events=30)
    expect(tab.page.locator("#delay")).to_contain_text("median")
    tab.expect_dots(True)
    tab.page.get_by_role("button", name="Clear").click()
    for side in SIDES:
        tab.expect_counts(side, frames=0, events=0)
        expect(tab.rows(side)).to_have_count(0)
        expect(tab.count(side, "bytes")).to_have_text("0")
    expect(tab.page.locator("#delay")).to_have_text("No event yet.")
    expect(tab.page.get_by_role("status").first).to_contain_text("Press a button")
    tab.expect_dots(False)
    tab.button("five").click()
    tab.expect_counts("batched", frames=1, events=5)
    tab.expect_counts("plain", frames=5, events=5)


def test_a_button_that_fails_says_so(tab: Tab) -> None:
    tab.server_may_fail = True
    tab.page.route("**/play/*", lambda route: route.fulfill(status=503))
    tab.button("five").click()
    expect(tab.page.get_by_role("status").first).to_have_text("This was not played: the server answers 503.")
    tab.page.unroute("**/play/*")
    tab.button("five").click()
    expect(tab.page.get_by_role("status").first).to_contain_text("instead of 5)")


# -- the sliders and the chart ---------------------------------------------------------------------------------------


def test_the_window_acts_at_once_and_is_what_the_delay_is(tab: Tab) -> None:
    tab.button("five").click()
    tab.expect_counts("batched", events=5)
    tab.expect_median(0, 3_000)
    tab.set(window=1000)
    for side in SIDES:
        expect(tab.rows(side).first).to_contain_text("Counted from here: 1,000 ms, at most 50 events")
        tab.expect_counts(side, frames=0, events=0)
    window = tab.page.get_by_role("slider", name="Batch window")
    expect(window).to_have_attribute("aria-valuetext", "1000 milliseconds")
    expect(tab.page.locator("#window-shown")).to_have_text("1,000 ms")

    tab.button("five").click()
    tab.expect_counts("batched", frames=1, events=5)
    tab.expect_median(700, 10_000)
    expect(tab.page.get_by_role("img")).to_have_accessible_name(re.compile(r"20 seconds\. 5 events: median"))
    tab.expect_dots(True)

    tab.page.get_by_role("button", name="Reset").click()
    expect(tab.rows("plain").first).to_contain_text("Counted from here: 100 ms, at most 50 events")
    expect(window).to_have_value("100")


def test_the_size_acts_at_once_and_one_is_no_batching(tab: Tab) -> None:
    tab.set(window=BURST, size=5)
    tab.button("restart").click()
    tab.expect_counts("batched", frames=6, events=30)
    expect(tab.rows("batched", ".batch").first).to_contain_text("size_limit")
    tab.set(size=1)
    expect(tab.rows("batched").first).to_contain_text("Counted from here: no batching")
    expect(tab.page.get_by_role("slider", name="Batch size")).to_have_attribute(
        "aria-valuetext", "1 event, no batching"
    )
    tab.button("restart").click()
    tab.expect_counts("batched", frames=30, events=30)
    expect(tab.rows("batched", ".batch")).to_have_count(6)  # those of before


def test_a_slider_acts_while_a_stream_is_playing_and_the_sides_still_compare(tab: Tab, demo: Demo) -> None:
    moved = threading.Event()

    def lines() -> Iterator[Happening]:
        for number in itertools.count():
            yield Happening(number * 0.005, "log", {"message": f"line {number}"})
            if moved.is_set() and number % 50 == 0:
                break
        yield Happening(0.0, "error", {"message": "the last"})

    playing = threading.Thread(target=demo.send, args=[lines()])
    playing.start()
    try:
        expect(tab.rows("batched", ".batch").first).to_be_visible()
        tab.page.locator("#window").focus()
        with tab.page.expect_request("**/events?window=200&size=50"):
            for _ in range(10):
                tab.page.keyboard.press("ArrowRight")
        tab.expect_open()
    finally:
        moved.set()
        playing.join()
    for side in SIDES:
        expect(tab.rows(side).first).to_contain_text("the last")
    # What was sent before the new stream was open may still come on the plain one. It is compared with nothing.
    batched, plain = (tab.counts(side)["events"] for side in SIDES)
    assert 1 < batched <= plain
    expect(tab.page.locator("#delay")).to_contain_text(f"{batched:,} events: median")
    expect(tab.page.get_by_role("status").first).to_contain_text(f"instead of {batched:,})")


def test_the_chart_moves_while_there_is_something_and_stands_still_for_who_wants_that(url: str, open_tab: Open) -> None:
    for motion, moves in (("no-preference", True), ("reduce", False)):
        tab = open_tab(url, reduced_motion=motion)
        tab.button("five").click()
        tab.expect_counts("batched", events=5)
        expect(tab.page.locator("#delay")).to_contain_text("median")
        tab.expect_dots(True)
        assert tab.page.evaluate(_SETTLES, moves)
        if moves:
            continue
        tab.page.evaluate("""() => {
            window.drawn = 0;
            window.since = performance.now();
            const { clearRect } = CanvasRenderingContext2D.prototype;
            CanvasRenderingContext2D.prototype.clearRect = function (...area) {
                window.drawn += 1;
                clearRect.apply(this, area);
            };
        }""")
        tab.button("steady").click()
        expect(tab.rows("batched", ".batch").first).to_contain_text("log_batch")
        assert tab.page.evaluate("document.getAnimations().length") == 0
        tab.expect_counts("batched", events=405)
        assert tab.page.evaluate("window.drawn <= 2 + (performance.now() - window.since) / 1000")


# Two pictures of the chart, a while apart, again and again: whether in the end they differ, or not, as expected.
_SETTLES = """async (moves) => {
    const canvas = document.getElementById("chart");
    for (let turn = 0; turn < 40; turn += 1) {
        const before = canvas.toDataURL();
        await new Promise((resolve) => setTimeout(resolve, 250));
        if ((canvas.toDataURL() !== before) === moves) return true;
    }
    return false;
}"""


# -- what compares them ----------------------------------------------------------------------------------------------


def test_the_page_knows_the_types_of_the_hub(tab: Tab) -> None:
    assert tab.page.evaluate("import('/static/stream.js').then((module) => module.TYPES)") == list(TYPES)


def compare(tab: Tab, steps: str) -> Any:
    """Run steps on a comparison: `plain(n, server)` and `batched([n, server], ...)`, one more millisecond each."""
    return tab.page.evaluate(f"""async () => {{
        const {{ Comparison }} = await import("/static/comparison.js");
        const comparison = new Comparison();
        let now = 0;
        const data = (n, server) => (server === undefined ? {{ n }} : {{ n, server }});
        const frame = (events) => ({{ type: "t", events, bytes: 10 * events.length, at: (now += 1) }});
        const plain = (n, server) => comparison.addPlain(frame([data(n, server)]));
        const batched = (...events) => comparison.addBatched(frame(events.map((event) => data(...event))));
        {steps}
        return {{ ...comparison, waiting: comparison.waiting.size }};
    }}""")


def test_an_event_counts_as_replaced_once_a_newer_one_of_its_server_has_come(tab: Tab) -> None:
    got = compare(
        tab, 'comparison.start(); plain(1, "a"); plain(2, "b"); plain(3, "a"); plain(4, "a"); batched([3, "a"]);'
    )
    assert (got["replaced"], got["waiting"]) == (1, 2)
    assert got["settled"] == {"frames": 2, "bytes": 20}
    assert got["delays"] == [2]
    # An event without a server replaces nothing. And the two streams may bring things in any order.
    got = compare(tab, "comparison.start(); plain(1); plain(2); batched([2]); batched([1]);")
    assert (got["replaced"], got["waiting"], got["delays"]) == (0, 0, [1, 3])
    got = compare(tab, 'comparison.start(); batched([2, "a"]); plain(1, "a"); plain(2, "a");')
    assert (got["replaced"], got["waiting"], got["delays"]) == (1, 0, [0])


def test_what_came_before_the_count_began_is_on_neither_side(tab: Tab) -> None:
    got = compare(tab, "plain(1); comparison.start(); plain(2); batched([1]); batched([1], [2]);")
    assert got["plain"] == {"frames": 1, "bytes": 10, "events": 1}
    assert got["batched"] == {"frames": 1, "bytes": 20, "events": 1}
    got = compare(tab, "comparison.start(); plain(1); comparison.stop(); plain(2); batched([1], [2]);")
    assert (got["plain"]["events"], got["batched"]["events"]) == (1, 0)
    # A new server numbers from one again.
    got = compare(tab, "plain(7); comparison.renumber(); comparison.start(); plain(1); batched([1]);")
    assert (got["plain"]["events"], got["batched"]["events"]) == (1, 1)
    got = compare(tab, "comparison.start(); plain(1); plain(2); comparison.forget(2);")
    assert (got["plain"]["events"], got["waiting"], got["replaced"]) == (2, 1, 0)


# -- what strangers send ---------------------------------------------------------------------------------------------

HOSTILE = [
    '<img src=x onerror="window.taken = 1">',
    "</script><script>window.taken = 1</script>",
    "</summary></details><button data-action=restart>Clear</button>",
    "line\u2028separator\u0000and\u202eleft to right\u2066",
    "javascript:window.taken=1",
    "x" * 5_000,
]


def test_a_hostile_payload_shows_as_text(tab: Tab, demo: Demo) -> None:
    elements = tab.page.evaluate("document.querySelectorAll('img, script, button, iframe').length")
    for text in HOSTILE:
        demo.send(
            [
                Happening(0.0, "log", {"level": text, "message": text, text: text}),
                Happening(0.0, "log", {"message": {"toString": text}, "server": [text]}),
                Happening(0.0, "config_changed", {"server": text, "timeout_s": text, "__proto__": {"taken": text}}),
                Happening(0.0, "tool_list_changed", {"server": text, "count": {"valueOf": text}, "added": text}),
                Happening(0.0, "error", {"server": text, "constructor": text}),
                Happening(0.0, "unheard of", {"message": text}),
                Happening(0.0, "constructor", {"message": text}),
            ]
        )
    expect(tab.rows("plain", ":not(.note)")).to_have_count(5 * len(HOSTILE))
    expect(tab.rows("batched", ".error")).to_have_count(len(HOSTILE))
    for side in SIDES:
        # All at once, as one click each.
        tab.page.locator(f"#{side}").evaluate(
            "(side) => { for (const row of side.querySelectorAll('li summary')) row.click(); }"
        )
        expect(tab.page.locator(f"#{side} ol > li > details:not(:has(> .facts))")).to_have_count(0)
        tab.page.locator(f"#{side}").evaluate(
            "(side) => { for (const inner of side.querySelectorAll('details details')) inner.open = true; }"
        )
        expect(tab.page.locator(f"#{side} details details:not(:has(pre))")).to_have_count(0)
        shown = tab.page.locator(f"#{side} ol").text_content() or ""
        for text in HOSTILE[:3]:
            assert text in shown
            assert json.dumps(text) in shown
        assert r"line\u2028separator" in shown
        assert r"\u202eleft to right\u2066" in shown
        assert not re.search("[\u0000\u2028\u202e\u2066]", shown)
        assert HOSTILE[-1] in shown
        assert '"__proto__"' in shown
    assert tab.page.evaluate("document.querySelectorAll('img, script, button, iframe').length") == elements
    assert tab.page.evaluate("[window.taken, {}.taken, document.title.includes('<')]") == [None, None, False]
    assert _overflow(tab) == 0


# -- the server goes and comes ---------------------------------------------------------------------------------------


class Process:
    """A demo in a process of its own, which can be ended."""

    def __init__(self, port: int = 0) -> None:
        # Where a copy of the package is tested, the same copy.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sse_batcher", "--port", str(port)],
            cwd=Path(sse_batcher.__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.match(r"(http://127\.0\.0\.1:(\d+)/)  ", self.process.stdout.readline())
        assert found
        self.url, self.port = found[1], int(found[2])

    def close(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_a_server_that_goes_is_told_of_and_the_page_recovers_when_it_is_back(open_tab: Open) -> None:
    with closing(Process()) as first:
        tab = open_tab(first.url)
        tab.server_may_fail = True
        tab.button("five").click()
        tab.expect_counts("batched", events=5)
        first.close(signal.SIGTERM)
    status = tab.page.get_by_role("status").first
    for side in SIDES:
        expect(tab.page.locator(f"#{side} .state")).to_have_text("ended (shutdown), trying again")
    expect(status).to_contain_text("The connection is lost")
    with closing(Process(first.port)) as second:
        assert second.url == first.url
        tab.expect_open()
        expect(status).to_contain_text("Press a button")
        expect(tab.rows("batched").first).to_contain_text("something was missed before (")
        tab.button("five").click()
        tab.expect_counts("batched", events=5)
        tab.expect_counts("plain", frames=5, events=5)
        second.close(signal.SIGKILL)
        for side in SIDES:
            expect(tab.page.locator(f"#{side} .state")).to_have_text("connection lost, trying again")
        tab.button("five").click()
        expect(status).to_contain_text("The connection is lost")


def test_an_answer_that_is_no_stream_is_asked_again(tab: Tab) -> None:
    tab.server_may_fail = True
    tab.page.route("**/events?*", lambda route: route.fulfill(status=500))
    tab.page.locator("#window").fill("300")
    expect(tab.page.locator("#batched .state")).to_have_text("connection lost, trying again")
    tab.page.unroute("**/events?*")
    tab.expect_open()
    expect(tab.rows("plain").first).to_contain_text("Counted from here: 300 ms")


# -- how it is worked and read ---------------------------------------------------------------------------------------


def test_everything_can_be_done_from_the_keyboard(tab: Tab) -> None:
    press = tab.page.keyboard.press

    def focused() -> str:
        name: str = tab.page.evaluate(
            """() => {
                const style = getComputedStyle(document.activeElement);
                if (style.outlineStyle === "none" || parseFloat(style.outlineWidth) < 2) return "nothing to be seen";
                return document.activeElement.id || document.activeElement.textContent.trim();
            }"""
        )
        return name

    names = []
    for _ in range(12):
        press("Tab")
        names.append(focused())
    assert [name.split("  ")[0] for name in names[:7]] == [
        tab.button(scenario).inner_text().replace("\n", " ") for scenario in SCENARIOS
    ]
    assert names[7:] == ["clear", "reset", "window", "size", "Skip these rows"]

    tab.set(window=BURST)
    tab.button("restart").focus()
    press("Enter")
    tab.expect_counts("batched", frames=3, events=30)
    press("Space")
    tab.expect_counts("batched", frames=6, events=60)
    tab.page.locator("#size").focus()
    press("Tab")
    press("Tab")
    assert focused().startswith("prompt_list_changed_batch10 events")
    press("Enter")
    table = tab.rows("batched", ".batch").first.get_by_role("table")
    expect(table.get_by_role("row")).to_have_count(11)
    for number, row in enumerate(table.get_by_role("row").all()[1:], 1):
        expect(row.get_by_role("cell").nth(0)).to_have_text(f"server-{number:02}")
        expect(row.get_by_role("cell").nth(1)).to_have_text(
            re.compile(r"\d\d now; added prompt_\d+, prompt_\d+; removed prompt_\d+")
        )
        expect(row.get_by_role("cell").nth(2)).to_have_text(re.compile(r"\d+ ms"))
    press("Tab")
    press("Space")
    expect(tab.rows("batched", ".batch").first.locator("pre")).to_contain_text('"server": "server-10"')
    press("Shift+Tab")
    press("Enter")
    expect(table).to_be_hidden()

    press("Shift+Tab")  # back to the button that skips the rows
    press("Enter")
    press("Tab")
    assert focused() == "Skip these rows"
    assert tab.page.evaluate("document.activeElement.closest('section').id") == "plain"
    press("Tab")
    press("Enter")
    expect(tab.rows("plain", ".event").first.locator("pre")).to_contain_text('"server": "server-10"')


def test_everything_has_a_name_for_who_does_not_see_it(tab: Tab) -> None:
    page = tab.page
    tab.set(window=BURST)
    tab.button("restart").click()
    tab.expect_counts("batched", frames=3, events=30)
    for role in ("banner", "main", "contentinfo"):
        expect(page.get_by_role(role)).to_have_count(1)
    for name in ("Make something happen", "How it is batched", "Batched", "Not batched"):
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
        expect(page.get_by_role("region", name=name, exact=True)).to_be_visible()
    for title in TITLES:
        expect(page.get_by_role("button", name=f"{title} ")).to_be_visible()
    for side in ("batched stream", "stream without batching"):
        expect(page.get_by_role("list", name=f"What came on the {side}, newest first")).to_be_visible()
    expect(page.get_by_role("status").first).to_have_id("saving")
    # No control and no picture without a name, whatever it is.
    snapshot = page.locator("body").aria_snapshot()
    assert re.findall(r"^\s*- (?:button|slider|link|img|region|textbox)(?:$|:| \[)", snapshot, re.MULTILINE) == []
    assert len(re.findall(r"- button ", snapshot)) == len(SCENARIOS) + 4
    assert page.locator("html").get_attribute("lang") == "en"
    # Only the sentence is read out by itself.
    assert page.evaluate(
        "Array.from(document.querySelectorAll('[role=status], [aria-live], output'), (e) => [e.id, e.ariaLive])"
    ) == [["saving", None], ["window-shown", "off"], ["size-shown", "off"]]


SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "narrow": {"viewport": {"width": 320, "height": 640}},
    "zoomed": {"viewport": {"width": 640, "height": 400}},
}


@pytest.mark.parametrize("screen", SCREENS)
def test_it_fits_the_screen_and_can_be_read_light_and_dark(open_tab: Open, url: str, screen: str) -> None:
    tab = open_tab(url, **SCREENS[screen])
    tab.button("restart").click()
    tab.button("error").click()
    expect(tab.rows("plain", ".error")).to_be_visible()
    expect(tab.page.get_by_role("status").first).to_contain_text("instead of")
    for row in (tab.rows("batched", ".batch"), tab.rows("plain", ".event")):
        row.first.locator("summary").click()
    expect(tab.page.get_by_role("table")).to_be_visible()
    assert _overflow(tab) == 0
    if screen == "desktop":
        height = tab.page.evaluate("document.documentElement.scrollHeight")
        assert height <= 800
        for part in ("h1", "button:not(.skip)", "input", "#chart", "#saving", "ol", "dl", "footer"):
            for element in tab.page.locator(part).all():
                expect(element).to_be_in_viewport(ratio=0.99)
        for side in SIDES:
            assert (tab.page.locator(f"#{side} ol").bounding_box() or {"height": 0})["height"] > 150
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 128)"
        assert tab.page.evaluate(dark) == (scheme == "dark")
        tab.page.evaluate("Promise.all(document.getAnimations().map((animation) => animation.finished))")
        assert tab.page.evaluate(_POOR_CONTRAST) == []


def _overflow(tab: Tab) -> int:
    """How many pixels the page is too wide."""
    pixels: int = tab.page.evaluate(
        "Math.max(...['body', 'ol', 'dd', 'button'].flatMap((name) => Array.from(document.querySelectorAll(name)))"
        ".map((part) => part.scrollWidth - part.clientWidth), document.documentElement.scrollWidth - innerWidth)"
    )
    return pixels


# All text, by the formula of WCAG 2.2, against the first ground below it that is not transparent: level AA is 4.5.
_POOR_CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return canvas.getImageData(0, 0, 1, 1).data;
    };
    const over = (top, below) => [0, 1, 2].map((at) => (top[at] * top[3] + below[at] * (255 - top[3])) / 255);
    const ground = (element) => {
        const own = rgb(getComputedStyle(element).backgroundColor);
        return own[3] === 255 ? own : over(own, ground(element.parentElement));
    };
    const luminance = (color) => {
        const [red, green, blue] = Array.from(color, (part) => part / 255).map((part) =>
            part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const poor = [];
    for (const element of document.querySelectorAll("body *")) {
        const texts = Array.from(element.childNodes).filter((node) => node.nodeType === 3 && node.data.trim());
        if (!texts.length || !element.checkVisibility()) continue;
        const colors = [rgb(getComputedStyle(element).color), ground(element)];
        const [low, high] = colors.map(luminance).sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) poor.push(`${ratio.toFixed(2)}: ${element.textContent.slice(0, 40)}`);
    }
    return poor;
}"""
