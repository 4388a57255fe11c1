"""The demo's page in a real browser: keyboard, names for screen readers, and screens."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from sse_batcher.demo.scenarios import SCENARIOS

from .kit.demo_page import BURST, SIDES, TITLES, Open, Tab, page_fixtures

pytestmark = pytest.mark.external

browser, demo, url, open_tab, tab = page_fixtures()


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

    press("Tab")
    assert focused() == "What the words mean"
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


def test_everything_has_a_name_for_screen_readers(tab: Tab) -> None:
    page = tab.page
    tab.set(window=BURST)
    tab.button("restart").click()
    tab.expect_counts("batched", frames=3, events=30)
    for role in ("banner", "main", "contentinfo"):
        expect(page.get_by_role(role)).to_have_count(1)
    for name in ("Make something happen", "The code", "How it is batched", "Batched", "Not batched"):
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
        expect(page.get_by_role("region", name=name, exact=True)).to_be_visible()
    for title in TITLES:
        expect(page.get_by_role("button", name=f"{title} ")).to_be_visible()
    for side in ("batched stream", "stream without batching"):
        expect(page.get_by_role("list", name=f"What came on the {side}, newest first")).to_be_visible()
        cards = page.get_by_role("list", name=f"The ten servers, as the {side} reports them")
        expect(cards.get_by_role("listitem")).to_have_count(10)
        expect(cards.get_by_role("listitem").first).to_contain_text(re.compile(r"server-01 \d\d tools \d\d resources"))
    page.get_by_role("link", name="What the words mean").click()
    expect(page.locator("#about")).to_be_focused()
    for word in ("Event", "Batch", "Window", "Frame", "Replaced", "Delay"):
        expect(page.get_by_role("term").filter(has_text=re.compile(f"^{word}$"))).to_be_in_viewport()
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
    "phone": {"viewport": {"width": 375, "height": 812}, "is_mobile": True, "has_touch": True},
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
    assert tab.overflow() == 0
    if screen == "desktop":
        # All that happens. Only the words are below.
        for part in ("header", "#code", "button:not(.skip)", "input", "#chart", "#saving", ".sum dl", "ul > li", "ol"):
            for element in tab.page.locator(part).all():
                expect(element).to_be_in_viewport(ratio=0.99)
        for side in SIDES:
            assert (tab.page.locator(f"#{side} ol").bounding_box() or {"height": 0})["height"] > 150
    if screen == "phone":
        # The benefit is seen without scrolling: both sums stand side by side under the buttons.
        tab.page.evaluate("scrollTo(0, 0)")
        for part in ("#scenarios", "#saving", ".sum dl", ".drawn", ".tally"):
            for element in tab.page.locator(part).all():
                expect(element).to_be_in_viewport(ratio=0.99)
        sums, code, rows = (
            [box for element in tab.page.locator(part).all() if (box := element.bounding_box())]
            for part in (".sum", "#code", ".rows")
        )
        assert sums[0]["y"] == sums[1]["y"]
        assert sums[0]["x"] + sums[0]["width"] < sums[1]["x"]
        assert sums[0]["y"] + sums[0]["height"] < code[0]["y"] < rows[0]["y"] < rows[1]["y"]
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 128)"
        assert tab.page.evaluate(dark) == (scheme == "dark")
        tab.page.evaluate("Promise.all(document.getAnimations().map((animation) => animation.finished))")
        assert tab.page.evaluate(_POOR_CONTRAST) == []


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
