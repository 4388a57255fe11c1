"""The demo: `python -m sse_batcher`, asked over real HTTP as a browser would."""

from __future__ import annotations

import gc
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask.testing import FlaskClient

import sse_batcher
from sse_batcher.browser import SCRIPT
from sse_batcher.cli import create_demo, main
from sse_batcher.demo.scenarios import LISTS, SCENARIOS, SERVERS, Happening
from sse_batcher.demo.simulation import CLOSING_SECONDS, Demo, Setting
from sse_batcher.errors import ClosedError

from .kit.demo_page import BURST
from .kit.waiting import TIMEOUT

PACKAGE = Path(sse_batcher.__file__).parent
MARK = {"X-Requested-With": "sse_batcher"}
BATCHED, PLAIN = Setting(BURST, 50), Setting(BURST, 1)


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
        connection = http.client.HTTPConnection(self.address, timeout=TIMEOUT)
        connection.request(method, path, headers=headers)
        return connection.getresponse()

    def status(self, method: str, path: str) -> int:
        with closing(self.ask(method, path)) as answer:
            return answer.status

    def press(self, button: str) -> int:
        return self.status("POST", f"/play/{button}")

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal, and return the exit code and what was written to stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=TIMEOUT)
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
    """A stream with one setting."""

    def __init__(self, demo: Running, setting: Setting) -> None:
        self.answer = demo.ask("GET", f"/events?window={setting.window}&size={setting.size}", {})
        assert self.answer.status == 200
        assert self.read() == ("sse_open", {"heartbeat": 15.0, "channels": ["default"]})

    def read(self) -> tuple[str, Any] | None:
        """The next block's type and data, None at the end."""
        fields: dict[str, str] = {}
        deadline = time.monotonic() + 20
        while line := self.answer.readline().decode():
            assert time.monotonic() < deadline, "nothing but heartbeats"
            if line == "\n" and fields:
                return fields["event"], json.loads(fields["data"])
            name, _, value = line.rstrip("\n").partition(": ")
            fields[name] = value
            fields.pop(":", None)
        return None

    def read_many(self, count: int) -> list[tuple[str, Any]]:
        blocks = [self.read() for _ in range(count)]
        return [block for block in blocks if block is not None]

    def close(self) -> None:
        self.answer.close()


@contextmanager
def both_streams(demo: Running) -> Iterator[tuple[Stream, Stream]]:
    with closing(Stream(demo, BATCHED)) as batched, closing(Stream(demo, PLAIN)) as plain:
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


# -- the settings ----------------------------------------------------------------------------------------------------


def test_each_stream_has_the_batching_that_it_asked_for(demo: Running) -> None:
    with closing(Stream(demo, Setting(1_000, 4))) as four, closing(Stream(demo, Setting(BURST, 200))) as many:
        demo.press("restart")
        assert [batch["batchSize"] for _, batch in four.read_many(6)] == [4] * 6
        assert [(batch["batchSize"], batch["reason"]) for _, batch in many.read_many(3)] == [(10, "time_window")] * 3


def test_an_event_has_the_same_number_on_all_streams(demo: Running) -> None:
    with both_streams(demo) as (batched, plain):
        demo.press("five")
        demo.press("five")
        numbers = [data["n"] for _, data in plain.read_many(10)]
        assert len(set(numbers)) == 10
        kept = [data["n"] for _, batch in batched.read_many(1) for data in batch["events"]]
        assert kept
        assert set(kept) <= set(numbers)


def test_a_replacement_in_the_demo_is_no_warning(model: Demo, caplog: pytest.LogCaptureFixture) -> None:
    manager = model.manager(BATCHED)
    model.send([Happening(0.0, LISTS[0], {"server": "a"}), Happening(0.0, LISTS[0], {"server": "a"})])
    assert manager.flush_all(TIMEOUT)
    assert manager.get_stats().replaced == 1
    assert manager.shutdown(TIMEOUT)
    assert caplog.records == []


def test_a_setting_in_use_has_one_manager_and_an_unused_one_has_none(model: Demo) -> None:
    manager = model.manager(BATCHED)
    assert model.manager(BATCHED) is manager
    assert model.manager(PLAIN) is not manager
    left = weakref.ref(manager)
    del manager
    gc.collect()
    assert left() is None


@pytest.mark.parametrize(
    "query",
    ["", "window=100", "size=50", "window=0&size=50", "window=1001&size=50", "window=100&size=0", "window=100&size=201"]
    + [f"size=5&window={text}" for text in ("-1", "1.5", "1e2", "+5", "%20", "%C2%B2", "%D9%A1", "9" * 5000)],
)
def test_a_setting_that_cannot_be_is_400(client: FlaskClient, query: str) -> None:
    assert client.get(f"/events?{query}").status_code == 400


# -- the end ---------------------------------------------------------------------------------------------------------


def test_closing_waits_until_the_farewell_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sse_batcher.demo.simulation.CLOSING_SECONDS", TIMEOUT)
    model = Demo()
    manager = model.manager(PLAIN)
    stream = manager.subscribe()
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
    assert closed.wait(TIMEOUT)
    closing.join()


def test_what_is_still_playing_ends_with_the_demo(model: Demo) -> None:
    asked = threading.Event()
    stopped = threading.Event()

    def endless() -> Iterator[Happening]:
        yield Happening(0.0, "log", {})
        asked.set()
        yield Happening(3_600.0, "log", {})

    def play() -> None:
        with pytest.raises(ClosedError):
            model.send(endless())
        stopped.set()

    playing = threading.Thread(target=play)
    playing.start()
    assert asked.wait(TIMEOUT)
    model.close()
    assert stopped.wait(TIMEOUT)
    playing.join()


def test_a_stream_asked_for_while_it_ends_gets_sse_busy(client: FlaskClient, model: Demo) -> None:
    model.close()
    assert "sse_busy" in client.get("/events?window=100&size=50").text


# -- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_says_goodbye(number: int) -> None:
    def end_takes() -> float:
        with running("--port", "0") as demo, both_streams(demo) as (batched, plain):
            demo.press("five")
            plain.read_many(5)
            started = time.monotonic()
            code, errors = demo.end(number)
            took = time.monotonic() - started
            assert (code, errors) == (0, "")
            assert batched.read()[0] == "tool_list_changed_batch"  # what waited is sent first
            for side in (batched, plain):
                assert side.read() == ("sse_bye", {"reason": "shutdown"})
                assert side.read() is None
        return took

    # For as long it would wait for streams that do not end. The machine may stand still in some of the tries.
    assert any(end_takes() < CLOSING_SECONDS for _ in range(4))


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
        assert demo.said.startswith("careful: anyone")
        assert demo.url.startswith("http://127.0.0.1:")


def test_an_address_that_is_not_ours_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", "192.0.2.1", "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("Error: cannot listen on 192.0.2.1, port 0: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_url_that_cannot_be_written_is_an_error_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = run_with(full.fileno())
    assert (done.returncode, done.stderr) == (1, "Error: the output cannot be written: No space left on device\n")


def test_without_a_reader_of_its_output_it_ends_in_silence() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_with(writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def run_with(stdout: int) -> subprocess.CompletedProcess[str]:
    """Run the demo until it ends by itself."""
    command = [sys.executable, "-W", "error", "-m", "sse_batcher", "--port", "0"]
    cwd = PACKAGE.parent
    return subprocess.run(command, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=20, check=False)


@pytest.mark.parametrize("port", ["65536", "-1", "http", ""])
def test_a_port_that_cannot_be_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--port={port}"]) == 2
    assert "Invalid value for '--port'" in capsys.readouterr().err


# -- what strangers may not do ---------------------------------------------------------------------------------------


@pytest.fixture
def client(model: Demo) -> FlaskClient:
    return create_demo(model).test_client()


@pytest.mark.parametrize("headers", [{}, {"X-Requested-With": "XMLHttpRequest"}])
def test_a_foreign_page_cannot_press_a_button(client: FlaskClient, model: Demo, headers: dict[str, str]) -> None:
    manager = model.manager(PLAIN)
    assert client.post("/play/restart", headers=headers).status_code == 403
    assert manager.get_stats().enqueued == 0
    assert client.post("/play/restart", headers=MARK).status_code == 204
    assert manager.get_stats().enqueued == 30


def test_head_on_a_stream_ends(client: FlaskClient) -> None:
    assert client.head("/events?window=100&size=50").status_code == 200


def test_the_module_for_browsers_is_below_the_stream(client: FlaskClient) -> None:
    answer = client.get("/events/sse-batcher.js")
    assert (answer.status_code, answer.content_type) == (200, "text/javascript; charset=utf-8")
    assert answer.data == SCRIPT


def test_what_is_pressed_while_it_ends_is_answered_with_503(client: FlaskClient, model: Demo) -> None:
    model.close()
    assert client.post("/play/one", headers=MARK).status_code == 503


@pytest.mark.parametrize("path", ["/", "/static/demo.js", "/events", "/events/sse-batcher.js", "/nowhere"])
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
        if tag != "a":
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
    assert page.buttons == list(SCENARIOS)
    own = {"/static/demo.js", "/static/demo.css", "/static/demo.svg", "/events/sse-batcher.js"}
    assert own == set(page.loads)
    for path in page.loads:
        with client.get(path) as answer:
            assert answer.status_code == 200


def test_the_script_makes_no_html_of_text() -> None:
    script = "".join(path.read_text() for path in (PACKAGE / "demo" / "static").glob("*.js"))
    assert "textContent" in script
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert unsafe not in script
