"""The README is short, and says what is true: its commands and its program run."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import flask
import pytest

from .kit.browser import chromium
from .kit.documents import blocks
from .kit.repository import README, ROOT
from .kit.servers import GTHREAD, HOST, Stream, faults_in, running


def test_its_first_two_commands_set_up_and_run_the_demo_and_the_tests() -> None:
    demo, tests = blocks(README, "sh")[:2]
    assert demo.endswith("python -m sse_batcher\n")
    assert "pytest" in tests


def test_the_button_to_press_first_is_on_the_demos_page() -> None:
    named = re.findall(r'press "([^"]+)"', README)
    page = (ROOT / "sse_batcher" / "demo" / "static" / "demo.html").read_text()
    assert len(named) == 1
    assert set(named) <= set(re.findall(r"<button[^>]*>([^<]*?) *<", page))


@pytest.mark.parametrize("text", blocks(README, "python"), ids=lambda text: text.splitlines()[0])
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
    (tmp_path / "app.py").write_text(blocks(README, "python")[0])
    with running(command, tmp_path) as server, server.watched():
        assert 'from "/events/sse-batcher.js"' in server.request("GET", "/")
        with Stream(server) as stream:
            while len(events := stream.until("tools_batch")[-1].data["events"]) < 3:
                pass  # a busy machine can need more than one window for the three
        assert [event["server"] for event in events] == ["alpha", "beta", "gamma"]
        assert faults_in(server.output()) == []
        assert "replaced" not in server.output()  # a first program warns of nothing


@pytest.mark.external
def test_the_page_of_the_whole_program_shows_its_events(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(blocks(README, "python")[0])
    with running((*GTHREAD[:-1], "app:app"), tmp_path) as server, chromium() as browser, browser.new_page() as page:
        page.goto(server.url, wait_until="load")
        page.wait_for_function("/^(alpha|beta|gamma): \\d tools$/m.test(log.textContent)")


def test_importing_the_whole_program_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flask.Flask, "run", lambda app, **options: pytest.fail("it serves when it is imported"))
    program: dict[str, Any] = {"__name__": "program"}
    exec(blocks(README, "python")[0].replace("while True:", "for _ in range(0):"), program)
    program["sse"].manager.shutdown()


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150
