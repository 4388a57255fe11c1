"""The guides for operators say what is true: their programs run as a user would run them, with a real Redis."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sse_batcher import ClientOptions, SSEManager
from sse_batcher.backends.redis.connections import connector

from .kit.redisserver import RedisServer, redis_fixture
from .kit.repository import ROOT
from .kit.servers import HOST, Server, Stream, running, uwsgi
from .kit.waiting import TIMEOUT, wait_until

DOCS = ROOT / "docs"
GUIDES = DOCS / "guides"
REDIS = "redis://localhost:6379/0"
"""The address in the guides."""

external = pytest.mark.external

redis = redis_fixture()


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page that are marked as this language, also those in lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(text) for _, text in found]


def write_programs(page: str, folder: Path, url: str = REDIS) -> None:
    """Write each block that is a file into this folder, with the URL of a real Redis."""
    for text in blocks(page, "python"):
        name = re.match(r"# ([\w.]+\.py)\n", text)
        if name:
            (folder / name[1]).write_text(text.replace(REDIS, url))


@contextmanager
def python(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python in this folder until the end of the block."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def run(folder: Path, *arguments: str) -> None:
    with python(folder, *arguments) as process:
        assert process.wait(TIMEOUT) == 0


# -- Redis -------------------------------------------------------------------------------------------------------------


def gunicorn_of(page: str) -> tuple[str, ...]:
    """The arguments for Python of the command on this page that starts gunicorn, on a free port."""
    [command] = [line for text in blocks(page, "sh") for line in text.splitlines() if line.startswith("gunicorn ")]
    return ("-m", *command.split(), f"--bind={HOST}:{{port}}")


@pytest.fixture
def site(redis: RedisServer, tmp_path: Path) -> Iterator[Server]:
    """The app of the guide, as it says: two processes of gunicorn, with a user of Redis that has few rights."""
    [rights] = re.findall(r"^ACL SETUSER (.*)$", text_of("guides/redis"), flags=re.MULTILINE)
    redis.client.execute_command("ACL", "SETUSER", *rights.split())
    write_programs("guides/redis", tmp_path, redis.url.replace("//", "//app:password@"))
    with running(gunicorn_of("guides/redis"), tmp_path) as server:
        yield server


def workers(site: Server) -> list[int]:
    """The process ids of both workers of gunicorn."""

    def found() -> list[int]:
        return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", site.output())]

    wait_until(lambda: len(found()) == 2, "both workers start")
    return found()


def stream_of(site: Server, worker: int) -> Stream:
    """A stream of this worker: the other one is stopped meanwhile. By chance, one of them may get all connections."""
    others = [pid for pid in workers(site) if pid != worker]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        stream = Stream(site)
        stream.until("sse_open")
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)
    return stream


def readers(redis: RedisServer) -> int:
    """How many processes read the stream."""
    return sum(client["cmd"] == "xread" for client in redis.client.client_list())


@external
def test_events_reach_the_streams_of_all_processes(redis: RedisServer, site: Server, tmp_path: Path) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(stream_of(site, worker)) for worker in workers(site)]
        wait_until(lambda: readers(redis) == 2, "both read")
        site.request("POST", "/orders", {"id": 6})
        run(tmp_path, "-m", "flask", "--app", "app", "sse", "publish", "order", '{"id": 7}')
        run(tmp_path, "report.py")
        for stream in streams:
            got = stream.until("report")
            assert [block.data for block in got if block.event == "order"] == [{"id": 6}, {"id": 7}]
    assert "Redis fails" not in site.output()
    assert not [entry for entry in redis.client.acl_log() if entry["username"] == "app"]
    assert sorted(redis.client.keys("sse_batcher:*")) == [b"sse_batcher:epoch", b"sse_batcher:stream"]
    assert redis.client.memory_usage("sse_batcher:stream") > 0


@external
def test_what_a_task_of_celery_enqueues_is_delivered(redis: RedisServer, tmp_path: Path) -> None:
    write_programs("guides/redis", tmp_path, redis.url)
    (tmp_path / "tasks.py").write_text(
        (tmp_path / "tasks.py").read_text().replace("redis://localhost:6379/1", redis.url.replace("/0", "/1"))
    )
    quick = ("--concurrency=1", "--without-mingle", "--without-gossip", "--without-heartbeat")
    with (
        SSEManager(backend=redis.url, clients=ClientOptions(heartbeat=0.5)) as manager,
        closing(manager.subscribe(user="ada")) as client,
        python(tmp_path, "-m", "celery", "-A", "tasks", "worker", *quick),
    ):
        run(tmp_path, "-c", "import tasks; tasks.export.delay(7, 'ada')")
        deadline = time.monotonic() + TIMEOUT
        while b"event: export\n" not in (block := next(client)):
            assert time.monotonic() < deadline, "nothing but heartbeats"
        assert b'"order":7' in block


def test_each_url_in_the_table_is_one() -> None:
    urls = re.findall(r"`(\S*(?:redis\S*|unix)://?[^`\s]*)`", text_of("guides/redis"))
    assert len(urls) >= 6
    for url in urls:
        connect, prefix = connector(url)
        connect()
        assert prefix == (url.partition("prefix=")[2] or "sse_batcher")


# -- scaling -----------------------------------------------------------------------------------------------------------


class StreamAt(Stream):
    """A stream with another path."""

    def __init__(self, server: Server, path: str) -> None:
        self._connection = server.connect()
        self._connection.request("GET", path)
        self.response = self._connection.getresponse()


@external
def test_channels_are_divided_among_streams_of_redis(redis: RedisServer, tmp_path: Path) -> None:
    write_programs("guides/scaling", tmp_path, redis.url)
    command = ("-m", "gunicorn", "-k", "gthread", "--threads=16", f"--bind={HOST}:{{port}}", "shards:app")
    teams = ["red", "blue", "green", "gold"]
    with running(command, tmp_path) as server, ExitStack() as stack:
        streams = {team: stack.enter_context(StreamAt(server, f"/teams/{team}/events")) for team in teams}
        for team, stream in streams.items():
            stream.until("sse_open")
            server.request("POST", f"/teams/{team}/orders", {"team": team})
        for team, stream in streams.items():
            assert stream.until("order")[-1].data == {"team": team}
        used = {key.decode().partition(":")[0] for key in redis.client.keys("*:stream")}
        assert len(used) > 1
        assert used <= {f"shop-{n}" for n in range(4)}


@external
def test_the_command_for_detached_streams_detaches_them(tmp_path: Path) -> None:
    program = next(text for text in blocks("guides/scaling", "python") if "SSE_TRANSPORT" in text)
    (tmp_path / "app.py").write_text(LOGS + program)
    with running(gunicorn_of("guides/scaling"), tmp_path) as server, ExitStack() as stack:
        for _ in range(20):  # more than there are threads
            stack.enter_context(Stream(server)).until("sse_open")
        [shown] = blocks("guides/scaling", "text")
        logged = next(line for line in server.output().splitlines() if "streams are detached" in line)
        assert re.sub(r"\d+ file", "N file", logged) == re.sub(r"\d+ file", "N file", shown.strip())


LOGS = """
import logging
logging.basicConfig(format="%(message)s")
logging.getLogger("sse_batcher").setLevel(logging.INFO)
"""


# -- forks -------------------------------------------------------------------------------------------------------------

BOARD = """
import os, threading, time
from flask import Flask
from sse_batcher import SSE

app = Flask(__name__)
app.config["SSE_BATCHING"] = False
sse = SSE(app)

def start_watching():
    threading.Thread(target=watch, daemon=True).start()

def watch():
    while True:
        sse.enqueue("tick", os.getpid())
        time.sleep(0.05)
"""


@external
@pytest.mark.parametrize("name", ["gunicorn", "uwsgi"])
def test_a_thread_that_is_started_after_the_fork_reaches_streams(name: str, tmp_path: Path) -> None:
    of_gunicorn, of_uwsgi = (text for text in blocks("guides/apps", "python") if "start_watching" in text)
    (tmp_path / "board.py").write_text(BOARD)
    (tmp_path / "gunicorn.conf.py").write_text(of_gunicorn)
    (tmp_path / "site_app.py").write_text(f"from board import app\n{of_uwsgi}")
    command = {
        "gunicorn": ("-m", "gunicorn", "--preload", "-k", "gthread", "--threads=8", f"--bind={HOST}:{{port}}", "board:app"),
        "uwsgi": uwsgi(f"--http-socket={HOST}:{{port}}", "--module=site_app:app", threads=8),
    }[name]
    with running(command, tmp_path) as server, Stream(server) as stream:
        assert stream.until("tick")[-1].data != server.process.pid
