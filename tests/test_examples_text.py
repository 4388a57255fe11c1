"""The examples with text and with users, in a real browser: chat, live table and notes."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from sse_batcher import SSEManager, Text

from .kit.browser import browser_fixture
from .kit.made_up_streams import MadeUpStreams
from .kit.repository import EXAMPLES
from .kit.servers import Server, running
from .kit.sse_parser import parse
from .kit.waiting import wait_until

external = pytest.mark.external

HOSTILE = "</script><img src=x onerror=\"document.title = 'owned'\"> \N{OWL} & e\N{COMBINING ACUTE ACCENT}  {{ 7 * 7 }}"


browser = browser_fixture(light=True)


@contextmanager
def example(name: str, folder: Path) -> Iterator[Server]:
    with running_example(EXAMPLES / name, folder) as server:
        yield server


@contextmanager
def running_example(program: Path, folder: Path) -> Iterator[Server]:
    with running((str(program),), folder) as server, server.watched():
        yield server
        assert "Traceback" not in server.output()


class Visitor:
    """A browser's profile with cookies of its own, and what its pages complain of."""

    def __init__(self, context: BrowserContext, server: Server) -> None:
        self.complaints: list[str] = []
        self.context = context
        self._server = server

    def open(self) -> Page:
        """Another tab."""
        page = self.context.new_page()
        # The browser writes down each answer with an error status, and a 403 is how a page notices that its user left.
        page.on("console", lambda message: "403" in message.text or self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(self._server.url, wait_until="load")
        return page


@contextmanager
def visitor(browser: Browser, server: Server) -> Iterator[Visitor]:
    with browser.new_context() as context:
        visitor = Visitor(context, server)
        yield visitor
        assert visitor.complaints == []
        assert [page.title() for page in context.pages if page.title() == "owned"] == []
        assert [page.locator("img, b, i").count() for page in context.pages] == [0] * len(context.pages)


def until(page: Page, holds: Callable[[], bool], what: str) -> None:
    """Wait, and let the page go on meanwhile."""

    def ask() -> bool:
        page.wait_for_timeout(20)
        return holds()

    wait_until(ask, what)


# -- chat --------------------------------------------------------------------------------------------------------------


def chat() -> dict[str, Any]:
    """The example as a module, with a model that does not wait."""
    names = runpy.run_path(str(EXAMPLES / "chat.py"))
    names["fake_model"].__globals__["time"] = SimpleNamespace(sleep=lambda seconds: None)
    return names


class Model:
    """A copy of the example in a folder, whose model waits before each fifty tokens until it may go on.

    Otherwise an answer could be finished before a browser that stands still has done what it does in the middle.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.program = folder / "chat.py"
        text = (EXAMPLES / "chat.py").read_text()
        text, counts = re.subn(r"for token in (re\.findall\(.*\)):", r"for count, token in enumerate(\1):", text)
        wait = "while not os.path.exists(f'go-{count // 50}'):\n            time.sleep(0.01)"
        text, waits = re.subn(r"( +)yield token\n", rf"\1{wait}\n\g<0>", text)
        assert (counts, waits) == (1, 1)
        self.program.write_text(text)

    def go_on(self, *parts: int) -> None:
        """Let the answers have these parts, of fifty tokens each."""
        for part in parts:
            (self._folder / f"go-{part}").touch()

    def hold(self) -> None:
        """Let the next answer wait before its first token."""
        for file in self._folder.glob("go-*"):
            file.unlink()


ALL_PARTS = range(5)
"""Those of each answer in these tests, and perhaps one more."""


def answer_to(question: str) -> str:
    return "".join(chat()["fake_model"](question))


def last(page: Page) -> str:
    """The text of the last answer, as far as it has come."""
    text: str = page.evaluate("[...document.querySelectorAll('.answer')].at(-1)?.textContent ?? ''")
    return text


def ask(page: Page, question: str) -> None:
    page.fill("[name=question]", question)
    with page.expect_response("**/ask"):
        page.click("button")


@external
def test_an_answer_goes_on_after_a_reload_in_its_middle(browser: Browser, tmp_path: Path) -> None:
    whole, model = answer_to(HOSTILE), Model(tmp_path)
    with (
        running_example(model.program, tmp_path) as server,
        visitor(browser, server) as ann,
        visitor(browser, server) as other,
    ):
        page, elsewhere = ann.open(), other.open()
        # Each text that the page shows, so that not even for an instant anything is lost or there twice.
        page.add_init_script(
            """window.seen = [];
            addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
              seen.push([...document.querySelectorAll(".answer")].at(-1)?.textContent ?? "");
            }).observe(document, {subtree: true, childList: true, characterData: true}));"""
        )
        page.reload(wait_until="load")
        ask(page, HOSTILE)
        before = ""
        for part, shown in ((0, 50), (2, len(whole) // 2)):
            model.go_on(part)
            until(page, lambda shown=shown: len(last(page)) > shown, "the answer comes")  # type: ignore[misc]
            before = last(page)
            model.go_on(part + 1)
            page.reload(wait_until="load")
            until(page, lambda before=before: len(last(page)) > len(before), "it goes on")  # type: ignore[misc]
            assert whole.startswith(last(page))
            assert last(page) != whole, "it was finished already"
        second_tab = ann.open()
        model.go_on(*ALL_PARTS)
        until(page, lambda: last(page) == whole, "it is finished")
        until(second_tab, lambda: last(second_tab) == whole, "it is finished in another tab")
        seen = page.evaluate("seen")
        assert [text for text in seen if not whole.startswith(text)] == []
        assert len(set(seen)) > 10  # not all at once
        page.reload(wait_until="load")
        assert page.locator(".answer").all_text_contents() == [whole]
        assert page.locator(".question").all_text_contents() == [HOSTILE]
        ask(second_tab, "again")
        for tab in (page, second_tab):
            until(tab, lambda tab=tab: last(tab) == answer_to("again"), "the next answer")  # type: ignore[misc]
            assert tab.locator(".answer").count() == 2
        assert elsewhere.locator("p").count() == 0


def test_a_chat_keeps_its_order_however_fast_the_model_is() -> None:
    names = chat()
    manager: SSEManager = names["sse"].manager
    client = manager.subscribe(user="ann")
    names["answer"](names["Chat"](), "ann", 1, HOSTILE)
    manager.shutdown()
    events = [event for event in parse(b"".join(client)) if not event.type.startswith("sse_")]
    types = [event.type for event in events]
    assert types == ["question", *["token"] * (len(types) - 2), "turn"]
    assert "".join(event.data for event in events[1:-1]) == answer_to(HOSTILE) == events[-1].json["answer"]


def listen_beside_the_page(page: Page) -> None:
    """Read a stream of this visitor: the page then has all `tokens`, and says when a turn is `done`."""
    page.evaluate(
        """() => new Promise((resolve) => {
          const source = new EventSource("/events");
          Object.assign(window, {tokens: [], done: false});
          source.addEventListener("token", (event) => tokens.push(event.data));
          source.addEventListener("turn", () => { window.done = true; });
          source.onopen = resolve;
        })"""
    )


@external
def test_tokens_are_joined_without_anything_between_them(browser: Browser, tmp_path: Path) -> None:
    with example("chat.py", tmp_path) as server, visitor(browser, server) as ann:
        page = ann.open()
        listen_beside_the_page(page)
        ask(page, "How many?")
        page.wait_for_function("done", timeout=15_000)
        tokens = page.evaluate("tokens")
    assert "".join(tokens) == answer_to("How many?")
    assert len(tokens) < len(re.findall(r"\w{1,4}\s*|\W\s*", "".join(tokens))) / 2


@external
def test_a_page_that_has_missed_tokens_shows_the_answer_once_it_is_finished(browser: Browser, tmp_path: Path) -> None:
    model = Model(tmp_path)
    with running_example(model.program, tmp_path) as server, visitor(browser, server) as ann:
        page = ann.open()
        model.go_on(*ALL_PARTS)
        ask(page, "first")
        until(page, lambda: last(page) == answer_to("first"), "the first answer")
        model.hold()
        ask(page, "second")
        model.go_on(0)
        until(page, lambda: len(last(page)) > 50, "the second answer comes")
        # As after a long sleep, when its cursor is too old: it gets the state, and nothing is appended any more.
        page.route(
            re.compile("/events\\?"), lambda route: route.continue_(url=f"{server.url}/events?last_event_id=too-old")
        )
        page.evaluate("document.querySelector('.answer').textContent = '?'")
        ann.context.set_offline(True)
        ann.context.set_offline(False)
        until(page, lambda: page.locator(".answer").first.text_content() == answer_to("first"), "the state came")
        shown = last(page)
        listen_beside_the_page(page)
        model.go_on(1)
        page.wait_for_function("tokens.length >= 2")
        assert last(page) == shown
        model.go_on(*ALL_PARTS)
        until(page, lambda: last(page) == answer_to("second"), "the second answer")


@external
def test_a_page_whose_view_has_shown_an_answer_shows_it_once(browser: Browser, tmp_path: Path) -> None:
    with example("chat.py", tmp_path) as server, visitor(browser, server) as ann:
        page = ann.open()
        listen_beside_the_page(page)
        ask(page, "first")
        page.wait_for_function("done", timeout=15_000)
        streams = MadeUpStreams(page)
        page.reload(wait_until="load")
        # As if the answer had been written between the note of the cursor and the view.
        streams.answer(
            ("sse_open", {"heartbeat": 15}),
            ("question", {"number": 1, "question": "first"}),
            ("token", Text("You ")),
            ("question", {"number": 2, "question": "second"}),
        )
        page.wait_for_selector(".question >> nth=1")
        assert page.locator(".question").all_text_contents() == ["first", "second"]
        assert page.locator(".answer").all_text_contents() == [answer_to("first"), ""]


# -- live table --------------------------------------------------------------------------------------------------------


@external
def test_thirty_changes_are_one_swap(browser: Browser, tmp_path: Path) -> None:
    with example("live_table.py", tmp_path) as server, browser.new_page() as page:
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.add_init_script(
            """window.seen = [];  // after each swap: the goals
            addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
              seen.push(Number(document.querySelector("caption").textContent.replace("Goals: ", "")));
            }).observe(document.getElementById("swaps"), {childList: true, characterData: true}));"""
        )
        page.goto(server.url, wait_until="load")

        def two_swaps_of_thirty() -> bool:
            """Whether they came one after the other. A machine that stands still in the middle of one makes it two."""
            seen = page.evaluate("seen")
            return any(later == goals + 60 for goals, later in zip(seen, seen[2:], strict=False))

        until(page, two_swaps_of_thirty, "two swaps of thirty goals each")
        names = page.locator("th").all_text_contents()
        assert sorted(names) == sorted(runpy.run_path(str(EXAMPLES / "live_table.py"))["goals"])
        assert any("<img" in name for name in names)
        counts, caption = page.evaluate(
            "[[...document.querySelectorAll('td')].map((cell) => Number(cell.textContent)), seen.at(-1)]"
        )
        assert sum(counts) == caption
        assert int(page.locator("#swaps").text_content() or "") >= 3
        assert page.locator("#table").locator("img, b, script").count() == 0
        assert (page.title(), complaints) == ("Live table", [])


# -- notes -------------------------------------------------------------------------------------------------------------


def log_in(visitor: Visitor, user: str) -> Page:
    page = visitor.open()
    page.select_option("[name=user]", user)
    page.click("text=Log in")
    page.wait_for_selector("#list", state="attached")
    return page


def write(page: Page, to: str, text: str) -> None:
    page.select_option("[name=to]", to)
    page.fill("[name=text]", text)
    with page.expect_response("**/notes"):
        page.click("text=Send")


def shown(page: Page) -> list[str]:
    return page.locator("#list li").all_text_contents()


@external
def test_a_tab_of_a_user_who_has_logged_out_gets_no_note_of_the_next_one(browser: Browser, tmp_path: Path) -> None:
    with (
        example("notes.py", tmp_path) as server,
        visitor(browser, server) as shared_computer,
        visitor(browser, server) as cleo,
    ):
        forgotten = log_in(shared_computer, "1")
        seen: list[str] = []
        forgotten.expose_function("see", lambda text: seen.append(text))  # noqa: PLW0108  # Playwright takes no builtin
        forgotten.evaluate(
            """() => new MutationObserver(([{addedNodes: [item]}]) => see(item.textContent))
              .observe(list, {childList: true})"""
        )
        other = shared_computer.open()
        other.click("text=Log out")
        bob = log_in(shared_computer, "2")
        cleos = log_in(cleo, "3")
        write(cleos, "2", "for Bob alone")
        until(bob, lambda: len(shown(bob)) == 1, "Bob has got it")
        until(forgotten, lambda: forgotten.locator("h1").text_content() == bob.locator("h1").text_content(), "reloaded")
        assert seen == []


@external
def test_a_note_reaches_all_tabs_of_one_user_and_no_other_user(browser: Browser, tmp_path: Path) -> None:
    names = runpy.run_path(str(EXAMPLES / "notes.py"))["NAMES"]
    with (
        example("notes.py", tmp_path) as server,
        visitor(browser, server) as ann,
        visitor(browser, server) as bob,
        visitor(browser, server) as bob_at_work,
    ):
        anns, bobs = log_in(ann, "1"), [log_in(bob, "2"), bob.open(), log_in(bob_at_work, "2")]
        write(anns, "2", HOSTILE)
        expected = [f"Ann: {HOSTILE}"]
        for page in bobs:
            until(page, lambda page=page: shown(page) == expected, "Bob has got it")  # type: ignore[misc]
        assert shown(anns) == []
        write(bobs[0], "1", "thanks")
        until(anns, lambda: shown(anns) == [f"{names[2]}: thanks"], "Ann has got the answer, and nothing else")
        assert [shown(page) for page in bobs] == [expected] * 3
        bobs[1].reload(wait_until="load")
        until(bobs[1], lambda: shown(bobs[1]) == expected, "it is still there")
        assert bobs[1].locator("h1").text_content() == names[2]

        bobs[0].click("text=Log out")
        bobs[0].wait_for_selector("text=Who are you?")
        write(anns, "2", "Are you still there?")
        expected.insert(0, "Ann: Are you still there?")
        until(bobs[2], lambda: shown(bobs[2]) == expected, "Bob is still logged in at work")
        until(bobs[1], lambda: bobs[1].locator("h1").text_content() == "Who are you?", "Bob's other tab has noticed it")
