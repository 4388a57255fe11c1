"""A user with tabs on several workers of a real server, with Redis between them."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from .kit.redisserver import RedisServer, redis_fixture
from .kit.servers import HOST, Server, Stream, running
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.external

APP = """
import json
import os
from flask import Flask, request
from sse_batcher import SSE

app = Flask(__name__)
app.config.update(
    SSE_BACKEND=os.environ["BACKEND"],
    SSE_TRANSPORT=os.environ["TRANSPORT"],
    SSE_HEARTBEAT=1,
    SSE_BATCH_WINDOW=5,
)
sse = SSE(app)

@sse.authorize
def authorize(channels):
    return channels

@sse.identify
def identify():
    return json.loads(request.headers["X-User"])

@app.after_request
def tell_process(response):
    response.headers["X-Process"] = str(os.getpid())
    return response

@app.post("/enqueue")
def enqueue():
    for number, to in request.get_json():
        if to is None:
            sse.broadcast("end", number)
        else:
            sse.enqueue("t", number, **to)
    assert sse.manager.flush_all(15)  # so that the next request, of another worker, comes after it
    return "", 204

@app.post("/kick")
def kick():
    sse.kick(user=request.get_json())
    return "", 204
"""

redis = redis_fixture()


@pytest.fixture(params=["attached", "auto"])
def site(
    request: pytest.FixtureRequest, redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    (tmp_path / "user_app.py").write_text(textwrap.dedent(APP))
    monkeypatch.setenv("BACKEND", redis.url)
    monkeypatch.setenv("TRANSPORT", request.param)
    options = ("-k", "gthread", "--workers=2", "--threads=64", f"--bind={HOST}:{{port}}", "user_app:app")
    with running(("-m", "gunicorn", *options), tmp_path) as server, server.watched():
        yield server


def tabs(stack: ExitStack, site: Server, user: str, count: int) -> list[Stream]:
    """So many streams of a user, the last one on another worker than the others. The user is given as JSON.

    One worker may take all connections for a while, so streams that are not needed are closed: each holds a thread.
    """
    streams: dict[str, list[Stream]] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(streams) < 2 or max(map(len, streams.values())) < count - 1:
        assert time.monotonic() < deadline, "only one worker takes connections"
        with ExitStack() as unless_it_is_needed:
            stream = unless_it_is_needed.enter_context(Stream(site, {"X-User": user}))
            opening = stream.block()
            assert opening is not None
            assert opening.event == "sse_open"
            on_this_worker = streams.setdefault(stream.response.headers["X-Process"], [])
            if len(on_this_worker) < count - 1:
                on_this_worker.append(stream)
                stack.push(unless_it_is_needed.pop_all())
    fewer, more = sorted(streams.values(), key=len)
    return [*more, fewer[0]]


def numbers(stream: Stream) -> list[Any]:
    """The data of all events up to the end."""
    return [
        number
        for block in stream.until("end")[:-1]
        for number in (block.data["events"] if block.event == "t_batch" else [block.data])
    ]


def test_a_user_with_three_tabs_on_two_workers_gets_all_once(site: Server) -> None:
    with ExitStack() as stack:
        seven = tabs(stack, site, "7", 3)
        others = tabs(stack, site, '"7"', 2) + tabs(stack, site, '"ada"', 2)
        to = [{"user": 7}, {"user": [7, "bob"]}, {"channel": "default"}, {"user": 8}]
        expected, of_all = [], []
        for first in range(0, 160, 8):  # each time by another worker, perhaps
            site.request("POST", "/enqueue", [(first + number, to[number % 4]) for number in range(8)])
            expected += [first + number for number in (0, 4, 1, 5, 2, 6)]  # three windows
            of_all += [first + 2, first + 6]
        site.request("POST", "/enqueue", [(0, None)])
        assert [numbers(stream) for stream in seven] == [expected] * len(seven)
        assert [numbers(stream) for stream in others] == [of_all] * len(others)

        site.request("POST", "/kick", 7)
        assert [stream.until("sse_bye")[-1].data["reason"] for stream in seven] == ["kicked"] * len(seven)
        site.request("POST", "/enqueue", [(1, {"user": ["7", 7]}), (0, None)])
        assert [numbers(stream) for stream in others[:2]] == [[1], [1]]
        assert not site.faults()
