"""docs/tutorial.md: a reader that does what a step says sees what the step says.

The tests apply the instructions of the page to a folder, and run the commands of the page there.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect

from .kit.browser import chromium
from .kit.pytest_runs import run_pytest
from .kit.repository import ROOT
from .kit.servers import HOST, Server, Stream, running
from .kit.waiting import TIMEOUT, wait_until

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
STEPS = {int(number): text for number, text in re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", TUTORIAL, flags=re.M | re.S)}
FILE_LANGUAGES = {"python", "html", "js", "css"}

# The forms in which the page says what to do with the block of code that follows.
CREATE = r"Create `(?P<file>[^`]+)`(?: again)?:"
APPEND = r"Add at the end of `(?P<file>[^`]+)`:"
IN_FILE = (
    r"[Ii]n `(?P<file>[^`]+)`, (?P<act>replace|add below) the "
    r"(?P<what>imports|function|lines of|line)(?: `(?P<text>[^`]+)`)?(?: with)?:"
)

COLOR = "(element) => element.getAnimations().forEach((one) => one.finish()) ?? getComputedStyle(element).background"

expect.set_options(timeout=1_000 * TIMEOUT)


# -- what the page says to do ------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """One instruction of the page, and the block of code below it."""

    words: str
    block: str

    def apply(self, files: dict[str, str]) -> None:
        if found := re.search(CREATE + "$", self.words):
            files[found["file"]] = re.sub(r"\A# \w+\.py\n", "", self.block)
        elif found := re.search(APPEND + "$", self.words):
            files[found["file"]] += "\n" + self.block
        else:
            found = re.search(IN_FILE + "$", self.words)
            assert found, f"not an instruction: {self.words!r}"
            lines = files[found["file"]].splitlines(keepends=True)
            first, last = self._place(lines, found["what"], found["text"])
            if found["act"] == "add below":
                first = last
            lines[first:last] = [self.block]
            files[found["file"]] = "".join(lines)

    @staticmethod
    def _place(lines: list[str], what: str, text: str | None) -> tuple[int, int]:
        """Return the first line that is meant, and the line after the last one."""
        if what == "imports":
            places = [number for number, line in enumerate(lines) if line.startswith(("import ", "from "))]
            return places[0], places[-1] + 1
        assert text is not None
        if what == "line":
            (place,) = [number for number, line in enumerate(lines) if line.strip() == text]
            return place, place + 1
        (place,) = [number for number, line in enumerate(lines) if text.rstrip(")") in line]
        first = max((number + 1 for number in range(place) if not lines[number].strip()), default=0)
        last = next((number for number in range(place, len(lines)) if not lines[number].strip()), len(lines))
        return first, last


def edits_of(step: int) -> list[Edit]:
    """The instructions of a step. Each block in a language of a file must have one."""
    text = STEPS[step].replace("<!-- skip: next -->\n", "")
    blocks = re.findall(r"((?:[^\n]+\n)+)\n+```(\w+)\n(.*?)^```$", text, flags=re.M | re.S)
    return [Edit(" ".join(words.split()), block) for words, language, block in blocks if language in FILE_LANGUAGES]


def files_after(step: int, edits: int | None = None) -> dict[str, str]:
    """Return the files of a reader that has done a step, or only its first few edits."""
    files: dict[str, str] = {}
    for earlier in range(1, step + 1):
        for edit in edits_of(earlier)[: edits if earlier == step else None]:
            edit.apply(files)
    return files


def save(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def says(step: int, text: str) -> str:
    """Return a text that the step promises. Fails if the page no longer says it."""
    seen = "".join(re.findall(r"\*\*You should see\*\*.*?\n\n", STEPS[step] + "\n\n", flags=re.S))
    assert f"`{text}`" in seen, f"step {step} does not say {text!r}"
    return text


def command_of(step: int, name: str) -> list[str]:
    """Return the arguments for Python of the command in a step that begins with this name."""
    (line,) = re.findall(rf"^({name} .*)$", STEPS[step], flags=re.M)
    return ["-m", *shlex.split(line)]


FLASK = [*command_of(1, "flask run"), "--port={port}"]


# -- the reader's server and browser -----------------------------------------------------------------------------------


@contextmanager
def done(step: int, folder: Path, edits: int | None = None) -> Iterator[Server]:
    """Serve the app of a reader that has done a step, by the command of the page."""
    save(folder, files_after(step, edits))
    with serving(folder) as server:
        yield server


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with running(FLASK, folder) as server:
        wait_until(lambda: starts(server) == 1, "it has started")
        yield server


def starts(server: Server) -> int:
    return server.output().count("Debugger is active!")


def go_on(server: Server, folder: Path, files: dict[str, str]) -> None:
    """Save the files of a reader that goes on while the server runs. If `app.py` has changed, it starts again."""
    before = starts(server)
    changed = files["app.py"] != (folder / "app.py").read_text()
    save(folder, files)
    if changed:
        wait_until(lambda: starts(server) > before, "it has started again")


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Windows:
    """The windows of a reader. No page may complain, except of a connection that the test has broken."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._stack = ExitStack()
        self.complaints: list[str] = []

    def private(self) -> BrowserContext:
        """A browser window with cookies of its own."""
        return self._stack.enter_context(self._browser.new_context())

    def open(self, server: Server, context: BrowserContext | None = None) -> Page:
        page = (context or self.private()).new_page()
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        visit(page, server)
        return page

    def close(self) -> None:
        self._stack.close()

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "net::ERR" not in message.text:
            self.complaints.append(message.text)


@pytest.fixture
def windows(chrome: Browser) -> Iterator[Windows]:
    windows = Windows(chrome)
    yield windows
    windows.close()
    assert windows.complaints == []


def visit(page: Page, server: Server) -> None:
    """Go to the board, until its stream is open. Events before that come late, or not at all (step 4)."""
    with page.expect_response(lambda response: "/events?" in response.url or response.url.endswith("/events")):
        page.goto(server.url, wait_until="load")


def table(page: Page, number: int, state: str) -> None:
    """Wait until the page shows this state of a table."""
    expect(page.locator(f"#table-{number}")).to_have_attribute("data-state", state)


# -- the page itself ---------------------------------------------------------------------------------------------------


def test_it_has_ten_steps_which_each_end_with_something_to_see() -> None:
    assert list(STEPS) == list(range(1, 11))
    assert [step for step, text in STEPS.items() if "**You should see**" not in text] == []


def test_each_step_leaves_a_program_that_python_can_read() -> None:
    for step in STEPS:
        for edits in range(1, len(edits_of(step)) + 1):
            compile(files_after(step, edits)["app.py"], "app.py", "exec")


# -- the steps ---------------------------------------------------------------------------------------------------------


def test_step_1_a_post_is_an_event_in_the_stream(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```text\n(.*?)```", STEPS[1], flags=re.S)
    (path,) = re.findall(r"curl -X POST http://127.0.0.1:5000(\S+)", STEPS[1])
    with done(1, tmp_path) as server, Stream(server) as stream:
        assert "event: sse_open\n" in list(iter(stream.line, "\n"))
        server.request("POST", path)
        seen = list(iter(stream.line, "\n"))
    differs = re.compile(r"^id: \S+-1$", flags=re.M)
    assert len(differs.findall(shown)) == 1
    assert differs.sub("id: ...", "".join(seen)) == differs.sub("id: ...", shown)


@pytest.mark.external
def test_step_2_a_click_shows_in_two_windows(tmp_path: Path, windows: Windows) -> None:
    with done(2, tmp_path) as server:
        first, second = windows.open(server), windows.open(server)
        table(second, 3, says(2, "free"))
        for state in ("ordered", "cooking", "ready", "free"):
            first.click("#table-3")
            table(first, 3, says(2, state))
            table(second, 3, state)
        assert first.locator("#table-3").evaluate(COLOR) == second.locator("#table-3").evaluate(COLOR)


def in_one_window(files: dict[str, str]) -> dict[str, str]:
    """The same app, in which all of a rush hour is in one window, also if a busy machine takes long for it."""
    changed = files["app.py"]
    for line, lines in {
        "sse = SSE(app)\n": 'app.config["SSE_BATCH_WINDOW"] = 10\nsse = SSE(app)\n',
        "            advance(number)\n": "            advance(number)\n    sse.manager.flush_all()\n",
    }.items():
        assert line in changed
        changed = changed.replace(line, lines)
    return {**files, "app.py": changed}


@pytest.mark.external
def test_step_3_a_burst_is_one_message_and_with_keys_a_shorter_one(tmp_path: Path, windows: Windows) -> None:
    def last(page: Page) -> str:
        return page.locator("p", has=page.locator("#last")).inner_text().removeprefix("Rush hour").strip()

    save(tmp_path, in_one_window(files_after(3, edits=3)))
    with serving(tmp_path) as server, Stream(server) as stream:
        page = windows.open(server)
        page.click("text=Rush hour")
        expect(page.locator("#last")).to_have_text("30")
        assert last(page) == says(3, "Changes in the last message: 30")
        table(page, 6, "ordered")
        assert [block.event for block in stream.until("table_batch")] == ["sse_open", "table_batch"]
        says(3, "event: table_batch")
        go_on(server, tmp_path, in_one_window(files_after(3)))
        visit(page, server)
        page.click("text=Rush hour")
        expect(page.locator("#last")).to_have_text("6")
        assert last(page) == says(3, "Changes in the last message: 6")
        table(page, 1, "ordered")


@pytest.mark.external
def test_step_4_what_happens_while_the_page_is_made_is_not_lost(tmp_path: Path, windows: Windows) -> None:
    # Instead of five seconds, the view waits until the table has changed, and the event has been sent.
    wait, longer = "    threading.Event().wait(5)", "    here = tables[1]\n    print('the page is made', flush=True)\n"
    longer += "    while tables[1] == here:\n        threading.Event().wait(0.3)\n"

    def change_meanwhile(server: Server, page: Page) -> None:
        views = server.output().count("the page is made")

        def change() -> None:
            wait_until(lambda: server.output().count("the page is made") > views, "the page is made")
            server.request("POST", "/tables/1")

        thread = threading.Thread(target=change)
        thread.start()
        visit(page, server)
        thread.join()

    files = files_after(4, edits=1)
    assert wait in files["app.py"]
    save(tmp_path, {**files, "app.py": files["app.py"].replace(wait, longer)})
    with serving(tmp_path) as server:
        page = windows.private().new_page()
        change_meanwhile(server, page)
        server.request("POST", "/tables/2")
        table(page, 2, "ordered")
        table(page, 1, "free")
        save(tmp_path, {"templates/board.html": files_after(4, edits=2)["templates/board.html"]})
        change_meanwhile(server, page)
        table(page, 1, "cooking")
    assert files_after(4)["app.py"] == files_after(3)["app.py"]


@pytest.mark.external
def test_step_5_a_new_server_gives_the_page_its_state(tmp_path: Path, windows: Windows) -> None:
    with done(5, tmp_path) as server:
        page = windows.open(server)
        expect(page.locator("#badge")).to_have_text(says(5, "open"))
        page.click("#table-1")
        table(page, 1, "ordered")
        page.evaluate("window.old = true")
        interrupt(server)
        expect(page.locator("#badge")).to_have_text(says(5, "waiting"))
        with again(server, tmp_path):
            page.wait_for_function("!window.old")
            expect(page.locator("#badge")).to_have_text("open")
            table(page, 1, says(5, "free"))


def test_step_5_a_client_that_comes_back_with_its_id_gets_what_it_missed(tmp_path: Path) -> None:
    (path,) = re.findall(r'curl -N "http://127.0.0.1:5000(\S+)ID"', STEPS[5])
    with done(5, tmp_path) as server:
        with Stream(server) as stream:
            server.request("POST", "/tables/1")
            last_id = stream.until("table")[-1].id
        server.request("POST", "/tables/2")
        with closing(server.connect()) as connection:
            connection.request("GET", f"{path}{last_id}")
            response = connection.getresponse()
            blocks = ["".join(iter(lambda: response.readline().decode(), "\n")) for _ in range(2)]
            response.close()
    assert says(5, "event: sse_open") in blocks[0]
    assert says(5, 'data: {"number":2,"state":"ordered"}') in blocks[1]


def interrupt(server: Server) -> None:
    """Do what Ctrl-C does in a terminal: all processes get a SIGINT."""
    os.killpg(server.process.pid, signal.SIGINT)
    server.process.wait(TIMEOUT)


@contextmanager
def again(server: Server, folder: Path) -> Iterator[None]:
    """Start the server again, at the port that it had."""
    arguments = [argument.replace("{port}", str(server.port)) for argument in FLASK]
    with (folder / "again.log").open("wb") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.external
def test_step_6_a_row_arrives_as_html_and_a_name_in_it_as_text(tmp_path: Path, windows: Windows) -> None:
    with done(6, tmp_path) as server:
        page, other = windows.open(server), windows.open(server)
        order(page, "soup", "<b>Zoe</b>")
        for one in (page, other):
            expect(one.locator("#orders li")).to_have_text(says(6, "soup for <b>Zoe</b>"))
        assert other.locator("#orders b").count() == 0
        expect(page.locator("[name=guest]")).to_have_value("")
        order(other, "tea", "Bo")
        expect(page.locator("#orders li")).to_have_text(["tea for Bo", "soup for <b>Zoe</b>"])
        visit(other, server)
        expect(other.locator("#orders li")).to_have_text(["tea for Bo", "soup for <b>Zoe</b>"])
        other.click("#table-1")
        table(page, 1, "ordered")


def order(page: Page, dish: str, guest: str, team: str = "") -> None:
    page.fill("[name=dish]", dish)
    page.fill("[name=guest]", guest)
    if team:
        page.select_option("[name=team]", team)
    page.click("text='Order'")


def log_in(page: Page, user: str) -> None:
    with page.expect_response(re.compile(r"/events\?")):
        page.click(f"[value={user}]")
    expect(page.locator("#badge")).to_have_text("open")


@pytest.mark.external
def test_step_7_an_order_reaches_its_team_only(tmp_path: Path, windows: Windows) -> None:
    with done(7, tmp_path) as server:
        ada, bob = windows.open(server), windows.open(server)
        log_in(ada, "ada")
        log_in(bob, "bob")
        order(ada, "tea", "Zoe", "bar")
        expect(bob.locator("#orders li")).to_have_text(says(7, "tea for Zoe"))
        order(bob, "soup", "Bo", "kitchen")
        expect(ada.locator("#orders li")).to_have_text("soup for Bo")
        expect(bob.locator("#orders li")).to_have_text("tea for Zoe")
        ada.click("#table-1")
        table(bob, 1, "ordered")
        (path,) = re.findall(r"`curl -i \"http://127.0.0.1:5000(\S+)\"`", STEPS[7])
        with closing(server.connect()) as connection:
            connection.request("GET", path)
            assert str(connection.getresponse().status) == says(7, "403")


@pytest.mark.external
def test_step_8_a_note_reaches_all_windows_of_its_user_and_no_others(tmp_path: Path, windows: Windows) -> None:
    with done(8, tmp_path) as server:
        ada, bob = windows.open(server), windows.open(server)
        log_in(ada, "ada")
        log_in(bob, "bob")
        second = windows.open(server, ada.context)
        order(ada, "tea", "Zoe", "bar")
        bob.click("text=Done")
        for page in (ada, second):
            expect(page.locator("#note")).to_have_text(says(8, "tea for Zoe is ready"))
        expect(bob.locator("#orders li.done")).to_have_text("tea for Zoe")
        expect(bob.locator("#orders button")).to_have_count(0)
        assert bob.locator("#note").inner_text() == ""


def test_step_9_the_tests_pass_and_one_fails_without_the_key(tmp_path: Path) -> None:
    files = files_after(9)
    tests = files.pop("test_board.py")
    save(tmp_path, files)
    assert says(9, "3 passed") in run_pytest(tmp_path, tests)
    assert files["app.py"].count(", key=number") == 1
    (tmp_path / "app.py").write_text(files["app.py"].replace(", key=number", ""))
    failed = run_pytest(tmp_path, tests)
    assert says(9, "1 failed") in failed
    assert failed.count("('table', {'number': 1, 'state':") >= 3


def test_step_10_more_streams_than_threads_do_not_stop_the_site(tmp_path: Path) -> None:
    save(tmp_path, files_after(10))
    command = [*command_of(10, "gunicorn"), f"--bind={HOST}:{{port}}"]
    assert "--threads 4 " in STEPS[10]
    assert "for n in 1 2 3 4 5 6 7 8;" in STEPS[10]
    with running(command, tmp_path) as server, ExitStack() as stack:
        for _ in range(8):
            assert stack.enter_context(Stream(server)).until("sse_open")
        assert says(10, "<h1>Board") in server.request("GET", "/")
        assert server.stop(signal.SIGINT) == 0
