"""The demo: `python -m sse_batcher`, asked over real HTTP as a browser would."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask.testing import FlaskClient

import sse_batcher
from sse_batcher.cli import create_demo, main
from sse_batcher.demo import SERVERS, Counts, Demo

PACKAGE = Path(sse_batcher.__file__).parent
MARK = {"X-Requested-With": "sse_batcher"}
TAB = "0123456789abcdef" * 2
LISTS = ["tool_list_changed", "resource_list_changed", "prompt_list_changed"]


class Running:
    """A demo in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "sse_batcher", *options]
        self.process = subprocess.Popen(
            command, cwd=PACKAGE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.said = ""
        url = None
        while url is None:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            self.said += line
            url = re.search(r"http://\S+", line)
        self.url = url.group()
        self.address = urlsplit(self.url).netloc

    def ask(self, method: str, path: str, headers: dict[str, str] = MARK) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.address, timeout=10)
        connection.request(method, path, headers=headers)
        return connection.getresponse()

    def status(self, method: str, path: str) -> int:
        with closing(self.ask(method, path)) as answer:
            return answer.status

    def press(self, button: str) -> int:
        return self.status("POST", f"/fire/{button}")

    def counts(self, tab: str = TAB) -> Any:
        with closing(self.ask("GET", f"/counts?tab={tab}")) as answer:
            return json.load(answer)

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal, and return the exit code and what was written to stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=10)
        return self.process.returncode, errors


@contextmanager
def running(*options: str) -> Iterator[Running]:
    demo = Running(*options)
    try:
        yield demo
    finally:
        demo.process.kill()
        demo.process.communicate()


@pytest.fixture
def demo() -> Iterator[Running]:
    with running("--port", "0") as demo:
        yield demo


@pytest.fixture
def model() -> Iterator[Demo]:
    with closing(Demo()) as model:
        yield model


class Stream:
    """One side's stream. Counts what the server says it counts: frames that carry events, and their bytes."""

    def __init__(self, demo: Running, side: str, tab: str = TAB) -> None:
        self.answer = demo.ask("GET", f"/{side}?tab={tab}", {})
        assert self.answer.status == 200
        self.counted = {"frames": 0, "bytes": 0}
        assert self.read() == ("sse_open", {"heartbeat": 5.0})

    def read(self) -> tuple[str, Any] | None:
        """The next block's type and data, None at the end."""
        block = b""
        deadline = time.monotonic() + 20
        while not block.endswith(b"\n\n"):
            line = self.answer.readline()
            assert time.monotonic() < deadline, "nothing but heartbeats"
            if not line:
                return None
            block += b"" if line.startswith(b":") else line
        fields = dict(line.split(": ", 1) for line in block.decode().splitlines() if line)
        if not fields["event"].startswith("sse_"):
            self.counted["frames"] += 1
            self.counted["bytes"] += len(block)
        return fields["event"], json.loads(fields["data"])

    def read_many(self, count: int) -> list[tuple[str, Any]]:
        blocks = [self.read() for _ in range(count)]
        return [block for block in blocks if block is not None]

    def close(self) -> None:
        self.answer.close()


@contextmanager
def both_streams(demo: Running) -> Iterator[tuple[Stream, Stream]]:
    with closing(Stream(demo, "batched")) as batched, closing(Stream(demo, "plain")) as plain:
        yield batched, plain


# -- the buttons -----------------------------------------------------------------------------------------------------


def test_restart_shows_three_batches_of_ten_beside_thirty_events(demo: Running) -> None:
    with both_streams(demo) as (batched, plain):
        assert demo.press("restart") == 204
        batches = batched.read_many(3)
        events = plain.read_many(30)
        assert [name for name, _ in batches] == [f"{name}_batch" for name in LISTS]
        for _, batch in batches:
            assert batch["batchSize"] == 10
            assert [data["server"] for data in batch["events"]] == list(SERVERS)
        assert [(name, data["server"]) for name, data in events] == [
            (name, server) for server in SERVERS for name in LISTS
        ]
        # And no more than that: the next thing on each stream is what happens next.
        demo.press("error")
        assert batched.read()[0] == plain.read()[0] == "error"


def test_both_sides_carry_the_same_data(demo: Running) -> None:
    with both_streams(demo) as (batched, plain):
        demo.press("restart")
        batches = {name: batch["events"] for name, batch in batched.read_many(3)}
        events = plain.read_many(30)
        for name in LISTS:
            assert batches[f"{name}_batch"] == [data for event, data in events if event == name]


def test_five_servers_are_one_batch_beside_five_events(demo: Running) -> None:
    with both_streams(demo) as (batched, plain):
        assert demo.press("five") == 204
        name, batch = batched.read()
        assert name == "tool_list_changed_batch"
        assert [("tool_list_changed", data) for data in batch["events"]] == plain.read_many(5)


def test_one_server_is_the_same_event_on_both_sides(demo: Running) -> None:
    with both_streams(demo) as (batched, plain):
        assert demo.press("one") == 204
        name, data = batched.read()
        assert name in LISTS
        assert data["server"] in SERVERS
        assert plain.read() == (name, data)


def test_an_error_comes_after_what_waited_on_both_sides(demo: Running) -> None:
    with both_streams(demo) as (batched, plain):
        demo.press("five")
        assert demo.press("error") == 204
        assert [name for name, _ in batched.read_many(2)] == ["tool_list_changed_batch", "error"]
        assert [name for name, _ in plain.read_many(6)] == ["tool_list_changed"] * 5 + ["error"]


def test_an_unknown_button_is_404(demo: Running) -> None:
    assert demo.press("nonsense") == 404


# -- the counts ------------------------------------------------------------------------------------------------------


def test_the_server_counts_the_frames_and_bytes_that_the_client_saw(demo: Running) -> None:
    with both_streams(demo) as (batched, plain):
        demo.press("restart")
        batched.read_many(3)
        plain.read_many(30)
        counts = demo.counts()
        assert counts == {"batched": batched.counted, "plain": plain.counted}
        assert (counts["batched"]["frames"], counts["plain"]["frames"]) == (3, 30)
        assert counts["batched"]["bytes"] < counts["plain"]["bytes"]


def test_each_tab_has_its_own_counts_and_clears_its_own(demo: Running) -> None:
    other = TAB[::-1]
    with closing(Stream(demo, "plain")) as mine, closing(Stream(demo, "plain", other)) as others:
        demo.press("one")
        mine.read()
        others.read()
        assert demo.status("DELETE", f"/counts?tab={TAB}") == 204
        assert demo.counts() == {"plain": {"frames": 0, "bytes": 0}}
        assert demo.counts(other) == {"plain": others.counted}


def test_a_closed_tab_is_forgotten(demo: Running) -> None:
    with both_streams(demo):
        assert set(demo.counts()) == {"batched", "plain"}
    deadline = time.monotonic() + 20
    while demo.counts():
        demo.press("error")  # a server notices at the next write, or the one after it
        assert time.monotonic() < deadline


OPEN, HEARTBEAT, ONE = b"event: sse_open\n\n", b":\n", b"event: one\n\n"


def test_of_a_side_opened_twice_the_newest_open_stream_is_counted() -> None:
    counts = Counts()
    old = counts.count(TAB, "plain", iter([OPEN, ONE]))
    new = counts.count(TAB, "plain", iter([OPEN]))
    assert [next(old), next(new)] == [OPEN, OPEN]
    new.close()
    assert next(old) == ONE
    assert counts.read(TAB) == {"plain": {"frames": 1, "bytes": len(ONE)}}
    newest = counts.count(TAB, "plain", iter([OPEN]))
    next(newest)
    assert counts.read(TAB) == {"plain": {"frames": 0, "bytes": 0}}


def test_what_the_stream_itself_says_is_not_counted() -> None:
    counts = Counts()
    stream = counts.count(TAB, "plain", iter([OPEN, HEARTBEAT, ONE]))
    assert [next(stream), next(stream)] == [OPEN, HEARTBEAT]
    assert counts.read(TAB) == {"plain": {"frames": 0, "bytes": 0}}
    assert next(stream) == ONE
    assert counts.read(TAB) == {"plain": {"frames": 1, "bytes": len(ONE)}}


def test_a_stream_that_is_closed_leaves_its_manager(model: Demo) -> None:
    manager = model.managers["plain"]
    stream = model.counts.count(TAB, "plain", manager.subscribe())
    next(stream)
    assert manager.get_stats().clients == 1
    stream.close()
    assert manager.get_stats().clients == 0


def test_closing_waits_until_the_farewell_is_written() -> None:
    model = Demo()
    stream = model.counts.count(TAB, "plain", model.managers["plain"].subscribe())
    next(stream)
    closed = threading.Event()

    def close() -> None:
        model.close()
        closed.set()

    closing = threading.Thread(target=close)
    closing.start()
    assert b"sse_bye" in next(stream)
    assert not closed.wait(0.2)  # while we write it
    stream.close()
    assert closed.wait(10)
    closing.join()


# -- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_within_two_seconds_and_says_goodbye(demo: Running, number: int) -> None:
    with both_streams(demo) as (batched, plain):
        demo.press("five")
        plain.read_many(5)
        started = time.monotonic()
        code, errors = demo.end(number)
        assert time.monotonic() - started < 2
        assert (code, errors) == (0, "")
        assert batched.read()[0] == "tool_list_changed_batch"  # what waited is sent first
        for side in (batched, plain):
            assert side.read() == ("sse_bye", {"reason": "shutdown"})
            assert side.read() is None


def test_where_the_port_is_taken_it_takes_another_and_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running("--port", str(port)) as demo:
            assert f"port {port} is taken" in demo.said
            assert not demo.address.endswith(f":{port}")
            assert demo.status("GET", "/") == 200


def test_on_loopback_it_prints_the_url_alone(demo: Running) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/  \(Ctrl-C ends it\)\n", demo.said)


def test_beyond_loopback_it_cautions() -> None:
    with running("--host", "0.0.0.0", "--port", "0") as demo:
        assert demo.said.startswith("careful: everybody")
        assert demo.url.startswith("http://127.0.0.1:")


def test_an_address_that_is_not_ours_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", "192.0.2.1", "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("cannot listen on 192.0.2.1, port 0: ")


@pytest.mark.parametrize("port", ["65536", "-1", "http", ""])
def test_a_port_that_cannot_be_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([f"--port={port}"])
    assert stopped.value.code == 2
    assert "a port is a number from 0 to 65535" in capsys.readouterr().err


# -- what strangers may not do ---------------------------------------------------------------------------------------


@pytest.fixture
def client(model: Demo) -> FlaskClient:
    return create_demo(model).test_client()


@pytest.mark.parametrize("headers", [{}, {"X-Requested-With": "XMLHttpRequest"}])
def test_a_foreign_page_cannot_press_a_button(client: FlaskClient, model: Demo, headers: dict[str, str]) -> None:
    assert client.post("/fire/restart", headers=headers).status_code == 403
    assert client.delete(f"/counts?tab={TAB}", headers=headers).status_code == 403
    assert [manager.get_stats().enqueued for manager in model.managers.values()] == [0, 0]
    assert client.post("/fire/restart", headers=MARK).status_code == 204
    assert [manager.get_stats().enqueued for manager in model.managers.values()] == [30, 30]


@pytest.mark.parametrize("tab", ["", "x", TAB[:-1], TAB + "0", TAB + "\n", "g" * 32, "../../../../etc/passwd"])
def test_a_tab_is_32_hex_digits(client: FlaskClient, tab: str) -> None:
    for path in ("/counts", "/batched", "/plain"):
        assert client.get(path, query_string={"tab": tab}).status_code == 400
    assert client.delete("/counts", query_string={"tab": tab}, headers=MARK).status_code == 400


def test_head_on_a_stream_ends(client: FlaskClient, model: Demo) -> None:
    assert client.head(f"/plain?tab={TAB}").status_code == 200
    assert model.counts.read(TAB) == {}


def test_what_is_pressed_while_it_ends_is_answered_with_503(client: FlaskClient, model: Demo) -> None:
    model.close()
    assert client.post("/fire/one", headers=MARK).status_code == 503


@pytest.mark.parametrize("path", ["/", "/static/demo.js", "/counts", "/nowhere"])
def test_every_answer_has_the_content_security_policy(client: FlaskClient, path: str) -> None:
    with client.get(path) as answer:
        headers = answer.headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    for own in ("script-src", "style-src", "connect-src", "img-src"):
        assert policy.pop(own) == "'self'"
    assert policy == {"base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


class _Page(HTMLParser):
    """Gathers what a page loads, and what it has inline."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.inline: list[str] = []
        self.buttons: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [value for name in ("src", "href") if (value := given.get(name))]
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)
        if tag == "button" and (action := given.get("data-action")):
            self.buttons.append(action)


def test_the_page_has_nothing_inline_and_loads_only_what_is_there(client: FlaskClient) -> None:
    with client.get("/") as answer:
        page = _Page(answer.text)
    assert page.inline == []
    assert page.buttons == ["restart", "five", "one", "error"]
    assert set(page.loads) == {"/static/demo.js", "/static/demo.css", "/static/demo.svg"}
    for path in page.loads:
        with client.get(path) as answer:
            assert answer.status_code == 200


def test_the_script_makes_no_html_of_text() -> None:
    script = (PACKAGE / "static" / "demo.js").read_text()
    assert "textContent" in script
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert unsafe not in script
