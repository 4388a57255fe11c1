"""The README says what is true: its program runs, and its tables are those of the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import flask
import pytest

from sse_batcher import BatchOptions, ClientOptions, HistoryOptions, SSEManager
from sse_batcher.extension import KEYS

from .sse_parser import take

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [text for mark, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S) if mark == language]


def test_its_first_two_commands_set_up_and_run_the_demo_and_the_tests() -> None:
    demo, tests = blocks("sh")[:2]
    assert demo.endswith("python -m sse_batcher\n")
    assert "pytest" in tests


def test_the_whole_program_pushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flask.Flask, "run", lambda app, **options: None)
    program: dict[str, Any] = {"__name__": "program"}
    exec(blocks("python")[0].replace("while True:", "for _ in range(1):"), program)
    with program["app"].test_client() as visitor:
        assert b'new EventSource("/events")' in visitor.get("/").data
        response = visitor.get("/events")
        program["work"].__globals__["time"].sleep = lambda seconds: None
        program["work"]()
        first, batch = take(response.response, 2)
        assert (first.type, batch.type) == ("sse_open", "tools_batch")
        assert {tools["server"] for tools in batch.json["events"]} == {"alpha", "beta", "gamma"}
        response.close()
    program["sse"].manager.shutdown()


def test_the_plain_wsgi_program_streams() -> None:
    program: dict[str, Any] = {}
    exec(next(block for block in blocks("python") if "def app(environ" in block), program)
    status: list[str] = []
    body = program["app"]({"REQUEST_METHOD": "GET"}, lambda code, headers: status.append(code))
    assert status == ["200 OK"]
    assert next(iter(body)).startswith(b"event: sse_open\n")
    body.close()
    program["manager"].shutdown()


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
