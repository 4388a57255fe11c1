"""The demo's page in a real browser: what it counts and draws, and how it compares the two sides."""

from __future__ import annotations

import http.client
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask
from playwright.sync_api import Browser, Page, expect

from sse_batcher.cli import serving
from sse_batcher.demo.scenarios import SERVERS, TYPES, Happening
from sse_batcher.demo.simulation import Demo

from .kit.demo_page import BURST, SIDES, Open, Tab, page_fixtures

pytestmark = pytest.mark.external

browser, demo, url, open_tab, tab = page_fixtures()


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
    tab.expect_drawn("batched", batched)
    tab.expect_drawn("plain", plain)
    expect(tab.count("batched", "replaced")).to_have_text("0")
    saved = f"({batched} instead of {plain})" if plain > batched else "Nothing saved"
    expect(tab.page.get_by_role("status").first).to_contain_text(saved)


def test_rapid_changes_replace_older_ones(tab: Tab) -> None:
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


def test_new_rows_do_not_move_the_row_that_is_being_read(tab: Tab) -> None:
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


def test_the_meter_counts_bytes_wherever_a_chunk_ends(tab: Tab) -> None:
    blocks = [
        ":\nevent: sse_open\ndata: {}\nid: e-1\n\n",
        "event: log\ndata: {}\nid: e-2\n\n",
        ':\n:\nevent: log_batch\ndata: {"events":["\u00e9\U0001f600"],"reason":"manual","timestamp":1}\nid: e-3\n\n',
        "data: 1\nid: e-4\n\n",
        "event: log\ndata: {}\nid: e-5\n",  # cut
    ]
    passed, counted = tab.page.evaluate(_METERED, "".join(blocks))
    assert passed == list("".join(blocks).encode())
    assert counted == [
        None,
        ["log", len(blocks[1]), ""],
        ["log_batch", len(blocks[2].encode()) - len(":\n:\n"), "manual"],
        ["message", len(blocks[3]), ""],
        None,
        None,  # taken before
    ]


_METERED = """async (text) => {
    const { Meter, takeBlock } = await import("/static/meter.js");
    const { readable, writable } = new TransformStream(new Meter());
    const writer = writable.getWriter();
    for (const byte of new TextEncoder().encode(text)) writer.write(Uint8Array.of(byte));
    writer.close();
    const passed = Array.from(new Uint8Array(await new Response(readable).arrayBuffer()));
    return [passed, ["e-1", "e-2", "e-3", "e-4", "e-5", "e-2"].map((id) => {
        const { name, bytes, reason } = takeBlock(id) ?? {};
        return name && [name, bytes, reason];
    })];
}"""


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
    for side in SIDES:
        tab.expect_drawn(side, 0)
        for card in tab.cards(side).all():
            expect(card).to_contain_text("– tools – resources – prompts")
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


# -- the cards -------------------------------------------------------------------------------------------------------


def test_a_restart_draws_the_ten_cards_3_or_30_times(tab: Tab) -> None:
    tab.set(window=BURST)
    tab.page.evaluate(_COUNT_DRAWINGS)
    tab.button("restart").click()
    for side, times in (("batched", 3), ("plain", 30)):
        tab.expect_drawn(side, times)
        # It is true: each value of each card was written so often.
        assert tab.page.evaluate("(side) => Array.from(window.written[side].values())", side) == [times] * 40
        names = [card.locator("b").text_content() for card in tab.cards(side).all()]
        assert names == list(SERVERS)
        # A mark for each, and thirty fill the width.
        assert tab.page.evaluate(_MARKED, side) == pytest.approx(times / 30, abs=0.01)
        expect(tab.page.locator(f"#{side} ul")).to_have_attribute("data-flash", re.compile("a|b"))
    batched, plain = (tab.cards(side).all_text_contents() for side in SIDES)
    assert batched == plain
    for text in plain:
        assert re.fullmatch(r"server-\d\d \d\d tools \d\d resources \d\d prompts – seconds of timeout ", text)
    tab.button("restart").click()
    tab.expect_drawn("batched", 6)
    tab.expect_drawn("plain", 60)
    assert [tab.page.evaluate(_MARKED, side) for side in SIDES] == pytest.approx([0.1, 1], abs=0.01)


_COUNT_DRAWINGS = """() => {
    window.written = { batched: new Map(), plain: new Map() };
    for (const [side, written] of Object.entries(window.written)) {
        const count = ({ target }) => written.set(target, (written.get(target) ?? 0) + 1);
        const options = { characterData: true, subtree: true };
        new MutationObserver((all) => all.forEach(count)).observe(document.querySelector(`#${side} ul`), options);
    }
}"""
_MARKED = """(side) => {
    const tally = document.querySelector(`#${side} .tally`);
    return parseFloat(getComputedStyle(tally, "::before").width) / tally.clientWidth;
}"""


def test_the_cards_flash_as_they_are_drawn_and_then_rest(tab: Tab) -> None:
    animated = """(side) => {
        const cards = document.querySelectorAll(`#${side} ul > li`);
        return Promise.all(Array.from(cards, async (card) => {
            const [animation] = card.getAnimations();
            animation?.finish();
            await animation?.finished;
            return animation?.animationName ?? "";
        }));
    }"""
    # Not over before the test has looked.
    tab.page.evaluate("document.styleSheets[0].insertRule('li { animation-duration: 60s !important; }')")
    for flash in "ab":  # another name, so that it starts again
        tab.button("one").click()
        expect(tab.page.locator("#plain ul")).to_have_attribute("data-flash", flash)
        assert tab.page.evaluate(animated, "plain") == [f"flash-{flash}"] * 10
    assert tab.page.evaluate("document.querySelector('#plain ul > li').getAnimations().length") == 0


def test_a_card_shows_an_error_until_its_server_reports_again(tab: Tab, demo: Demo) -> None:
    demo.send([Happening(0.0, "error", {"server": SERVERS[1]}), Happening(0.0, "log", {"message": "a line"})])
    for side in SIDES:
        tab.expect_counts(side, events=2)
        tab.expect_drawn(side, 1)  # a line of a log is on no card
        expect(tab.page.locator(f"#{side} ul > li.failed")).to_have_text(re.compile(SERVERS[1]))
    demo.send(
        [
            Happening(0.0, "config_changed", {"server": SERVERS[1], "timeout_s": 42}),
            Happening(0.0, "config_changed", {"server": "unheard of", "timeout_s": 43}),
        ]
    )
    for side, times in zip(SIDES, (2, 3), strict=True):
        tab.expect_drawn(side, times)
        expect(tab.page.locator(f"#{side} ul > li.failed")).to_have_count(0)
        expect(tab.cards(side)).to_have_count(10)
        expect(tab.cards(side).nth(1)).to_contain_text("42 seconds of timeout")


def test_the_code_on_the_page_is_a_whole_program(tab: Tab, open_page: Callable[[Flask], Page]) -> None:
    code = {name: tab.page.locator(f"#{name}").text_content() for name in ("python", "javascript", "once")}
    app = Flask(__name__)
    first, second, third = (code["python"] or "").splitlines()
    names = {"app": app}
    exec(f"{first}\n{second}", names)

    @app.get("/")
    def page() -> str:
        draw = "const draw = (data) => document.body.append(JSON.stringify(data));"
        return f"<body><script type=module>{code['once']}\n{draw}\n{code['javascript']}\n" + (
            "events.on('sse_open', () => document.body.append('open '));</script>"
        )

    opened = open_page(app)
    expect(opened.locator("body")).to_contain_text("open")
    exec(third, names)
    expect(opened.locator("body")).to_contain_text('{"count":12}')


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[Flask], Page]]:
    """Opens the page of an app."""
    with ExitStack() as stack:

        def open_page(app: Flask) -> Page:
            host, port = stack.enter_context(serving(app))
            context = stack.enter_context(browser.new_context())
            page = context.new_page()
            page.goto(f"http://{host}:{port}/")
            return page

        yield open_page


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


def test_the_chart_moves_only_with_events_and_without_reduced_motion(url: str, open_tab: Open) -> None:
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
    assert tab.page.evaluate("import('/static/side.js').then((module) => module.TYPES)") == list(TYPES)


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
