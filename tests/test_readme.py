"""The README says what is true: its program runs, and its tables are those of the code."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import flask
import pytest

from sse_batcher import SSE, BatchOptions, ClientOptions, HistoryOptions, SSEManager
from sse_batcher.browser import SCRIPT, TYPES
from sse_batcher.flask.config import KEYS

from .kit.browser import chromium
from .kit.repository import README, ROOT, blocks
from .kit.servers import GTHREAD, HOST, Server, Stream, faults_in, running
from .kit.services import program
from .kit.sse_parser import take_events


def test_its_first_two_commands_set_up_and_run_the_demo_and_the_tests() -> None:
    demo, tests = blocks("sh")[:2]
    assert demo.endswith("python -m sse_batcher\n")
    assert "pytest" in tests


def test_the_button_to_press_first_is_on_the_demos_page() -> None:
    named = re.findall(r'press "([^"]+)"', README)
    page = (ROOT / "sse_batcher" / "demo" / "static" / "demo.html").read_text()
    assert len(named) == 1
    assert set(named) <= set(re.findall(r"<button[^>]*>([^<]*?) *<", page))


@pytest.mark.parametrize("text", blocks("python"), ids=lambda text: text.splitlines()[0])
def test_its_programs_are_python(text: str) -> None:
    ast.parse(text)


AS_A_SCRIPT = """
import flask, os, runpy
run = flask.Flask.run
flask.Flask.run = lambda app, **options: run(app, port=int(os.environ["PORT"]), **options)
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    "command",
    [
        ("-c", AS_A_SCRIPT),
        ("-m", "flask", "run", f"--host={HOST}", "--port={port}"),
        (*GTHREAD[:-1], "app:app"),
    ],
    ids=["python app.py", "flask run", "gunicorn"],
)
def test_the_whole_program_runs_as_it_stands(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "app.py").write_text(blocks("python")[0])
    with running(command, tmp_path) as server, server.watched():
        assert 'from "/events/sse-batcher.js"' in server.request("GET", "/")
        with Stream(server) as stream:
            events = stream.until("tools_batch")[-1].data["events"]
        assert [event["server"] for event in events] == ["alpha", "beta", "gamma"]
        assert faults_in(server.output()) == []
        assert "replaced" not in server.output()  # a first program warns of nothing


@pytest.mark.external
def test_the_page_of_the_whole_program_shows_its_events(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(blocks("python")[0])
    with running((*GTHREAD[:-1], "app:app"), tmp_path) as server, chromium() as browser, browser.new_page() as page:
        page.goto(server.url, wait_until="load")
        page.wait_for_function("/^(alpha|beta|gamma): \\d tools$/m.test(log.textContent)")


def test_importing_the_whole_program_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flask.Flask, "run", lambda app, **options: pytest.fail("it serves when it is imported"))
    program: dict[str, Any] = {"__name__": "program"}
    exec(blocks("python")[0].replace("while True:", "for _ in range(0):"), program)
    program["sse"].manager.shutdown()


def test_data_looks_under_flask_as_is_said() -> None:
    (program,) = (block for block in blocks("python") if "class Provider" in block)
    data = {
        "at": datetime(2026, 1, 1, tzinfo=UTC),
        "on": date(2026, 1, 1),
        "id": UUID(int=1),
        "price": Decimal("1.50"),
    }

    def sent(app: flask.Flask) -> Any:
        with SSE(app).manager as manager:
            client = manager.subscribe()
            manager.enqueue("order", data)
            _, event = take_events(client, 2)
            return event.json

    by_default = {"at": "Thu, 01 Jan 2026 00:00:00 GMT", "on": "Thu, 01 Jan 2026 00:00:00 GMT"}
    both = {"id": "00000000-0000-0000-0000-000000000001", "price": "1.50"}
    assert by_default["at"] in README
    assert sent(flask.Flask("app")) == by_default | both
    app = flask.Flask("app")
    exec(program, {"app": app})
    assert sent(app) == {"at": "2026-01-01T00:00:00+00:00", "on": "2026-01-01"} | both


def test_the_plain_wsgi_program_streams() -> None:
    program: dict[str, Any] = {}
    exec(next(block for block in blocks("python") if "def app(environ" in block), program)
    statuses: list[str] = []

    def get(path: str) -> Any:
        return program["app"]({"PATH_INFO": path}, lambda status, headers: statuses.append(status))

    body = get("/events")
    assert next(iter(body)).startswith(b"event: sse_open\n")
    body.close()
    assert get("/events/sse-batcher.js") == [SCRIPT]
    assert statuses == ["200 OK", "200 OK"]
    program["manager"].shutdown()


def test_the_application_factory_makes_apps_again_and_again() -> None:
    program: dict[str, Any] = {"SSE": SSE, "Flask": flask.Flask, "__name__": "program"}
    exec(next(block for block in blocks("python") if "def create_app()" in block), program)
    apps = [program["create_app"]() for _ in range(3)]
    for app, channel in zip(apps, "abc", strict=True):
        app.config["CHANNELS"] = [channel]
        with app.test_client().get("/events?channel=a&channel=b&channel=c") as response:
            (opened,) = take_events(response.response, 1)
            assert opened.json == {"heartbeat": 15.0, "channels": [channel]}


ORDERS = """
import os
from flask import Flask, abort, render_template_string
from sse_batcher import SSE

app = Flask(__name__)
app.config.update(SSE_URL_PREFIX="/other", SSE_BATCH_WINDOW=0.5)
sse = SSE(app)

def may_see_order(number):
    return number == 7

@app.post("/change")
def change():
    for state in ("paid", "<b>sent</b>"):
        sse.enqueue("order", {"state": state}, channel="order-7")
    return "", 204
"""


@pytest.fixture
def orders(tmp_path: Path) -> Iterator[Server]:
    """The program with views of its own."""
    (block,) = (block for block in blocks("python") if "sse.response([" in block)
    (tmp_path / "app.py").write_text(ORDERS + block)
    with running((*GTHREAD[:-1], "app:app"), tmp_path) as server, server.watched():
        yield server


def test_the_view_of_ones_own_decides_which_requests_get_the_stream(orders: Server) -> None:
    assert 'new BatchedEventSource("/orders/7/events")' in orders.request("GET", "/orders/7")
    for path, status in [("/orders/7/events", 200), ("/orders/8/events", 403), ("/events", 404)]:
        connection = orders.connect()
        connection.request("GET", path)
        with connection.getresponse() as response:
            assert response.status == status
            if status == 200:
                assert response.readline() == b"event: sse_open\n"
        connection.close()


@pytest.mark.external
def test_the_page_of_ones_own_view_shows_the_events(orders: Server) -> None:
    with chromium() as browser, browser.new_page() as page:
        with page.expect_response(re.compile("/orders/7/events")):
            page.goto(f"{orders.url}/orders/7")
        orders.request("POST", "/change")
        page.wait_for_function("document.querySelectorAll('li').length === 2")
        assert page.locator("li").all_text_contents() == ["paid", "<b>sent</b>"]


def test_every_option_is_there_with_its_key_and_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`\w+` )?\|.*?\| (.*?) \|[^|]*\|$", README, flags=re.M))
    for options in (BatchOptions, ClientOptions, HistoryOptions):
        for option in fields(options):
            default = getattr(options(), option.name)
            said = rows[option.name].strip("`").replace(",", "" if isinstance(default, int) else ",")
            if isinstance(default, frozenset):
                assert set(eval(said)) == default
            elif option.name == "per_type":
                assert said == "{}"
            else:
                assert eval(said) == default, option.name
    assert set(re.findall(r"^\| .*?`(SSE_\w+)` \|", README, flags=re.M)) == set(KEYS)


def test_every_url_is_there_with_its_endpoint() -> None:
    app = flask.Flask("app", static_folder=None)
    with SSE(app).manager:
        rules = {rule.endpoint: rule.rule for rule in app.url_map.iter_rules() if not rule.rule.endswith("/")}
    listed = re.findall(r"^\| `(/[^`]*)` \| `(sse_batcher\.\w+)` \|", README, flags=re.M)
    assert {endpoint: path for path, endpoint in listed} == rules


def test_every_option_of_the_browsers_module_is_there() -> None:
    interface = TYPES.partition("export interface Options {")[2].partition("\n}")[0]
    section = README.partition("\n## In the browser\n")[2].partition("\n### ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, flags=re.M)) == set(
        re.findall(r"^  (\w+)\?:", interface, flags=re.M)
    )
    (states,) = re.findall(r"^export type State = (.*);$", TYPES, flags=re.M)
    assert all(f"`{state}`" in section for state in re.findall(r'"(\w+)"', states))


@pytest.mark.external
def test_its_scripts_are_javascript(tmp_path: Path) -> None:
    inline = re.findall(r"<script[^>]*>([^<].*?)</script>", "".join(blocks("html")), flags=re.DOTALL)
    assert len(inline) >= 2
    for number, script in enumerate(blocks("js") + inline):
        (tmp_path / f"{number}.mjs").write_text(script)
    check = "for (const file of process.argv.slice(1)) execFileSync(process.execPath, ['--check', file])"
    command = [
        program("node", package="Debian: nodejs"),
        "-e",
        'const {execFileSync} = require("child_process");' + check,
    ]
    done = subprocess.run([*command, *tmp_path.glob("*.mjs")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_batch_format_is_what_is_sent() -> None:
    (shown,) = [block for block in blocks("") if "tools_batch" in block]
    with SSEManager() as manager:
        client = manager.subscribe()
        for server in "ab":
            manager.enqueue("tools", {"server": server})
        next(client)
        sent = next(client).decode()
    varying = r'"reason":"\w+","timestamp":\d+|id: \S+'
    assert re.sub(varying, "", sent) == re.sub(varying, "", shown)
