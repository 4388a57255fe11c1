"""The demo's page in a real browser: hostile events, and a server that goes and comes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from playwright.sync_api import expect

import sse_batcher
from sse_batcher.demo.scenarios import Happening
from sse_batcher.demo.simulation import Demo

from .kit.demo_page import SIDES, Open, Tab, page_fixtures
from .kit.ports import free_port

pytestmark = pytest.mark.external

browser, demo, url, open_tab, tab = page_fixtures()


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
    assert tab.overflow() == 0


# -- the server goes and comes ---------------------------------------------------------------------------------------


class Process:
    """A demo in a process of its own, which can be ended."""

    def __init__(self, port: int) -> None:
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


def test_the_page_shows_that_the_server_is_away_and_recovers_when_it_is_back(open_tab: Open) -> None:
    with closing(Process(free_port())) as first:
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
