"""The guides for operators say what is true: their programs run as a user would run them, with a real Redis."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from pathlib import Path

import pytest

from sse_batcher import ClientOptions, SSEManager
from sse_batcher.backends.redis.connections import connector
from sse_batcher.stats import ManagerStats

from .kit.documents import blocks, files, text_of
from .kit.ports import free_port
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


def write_programs(page: str, folder: Path, url: str = REDIS) -> None:
    """Write each block that is a file into this folder, with the URL of a real Redis."""
    for name, text in files(text_of(page)).items():
        (folder / name).write_text(text.replace(REDIS, url))


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
    [command] = [
        line for text in blocks(text_of(page), "sh") for line in text.splitlines() if line.startswith("gunicorn ")
    ]
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
    assert sorted(redis.client.keys("sse_batcher:*")) == [
        *(b"sse_batcher:epoch", b"sse_batcher:processes", b"sse_batcher:stream"),
    ]
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
    program = next(text for text in blocks(text_of("guides/scaling"), "python") if "SSE_MAX_CLIENTS" in text)
    (tmp_path / "app.py").write_text(LOGS + program)
    with running(gunicorn_of("guides/scaling"), tmp_path) as server, ExitStack() as stack:
        for _ in range(20):  # more than there are threads
            stack.enter_context(Stream(server)).until("sse_open")
        [shown] = blocks(text_of("guides/scaling"), "text")
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
    of_gunicorn, of_uwsgi = (text for text in blocks(text_of("guides/apps"), "python") if "start_watching" in text)
    (tmp_path / "board.py").write_text(BOARD)
    (tmp_path / "gunicorn.conf.py").write_text(of_gunicorn)
    (tmp_path / "site_app.py").write_text(f"from board import app\n{of_uwsgi}")
    command = {
        "gunicorn": (
            "-m",
            "gunicorn",
            "--preload",
            "-k",
            "gthread",
            "--threads=8",
            f"--bind={HOST}:{{port}}",
            "board:app",
        ),
        "uwsgi": uwsgi(f"--http-socket={HOST}:{{port}}", "--module=site_app:app", threads=8),
    }[name]
    with running(command, tmp_path) as server, Stream(server) as stream:
        assert stream.until("tick")[-1].data != server.process.pid


# -- monitoring --------------------------------------------------------------------------------------------------------


@external
def test_each_worker_has_a_port_for_its_metrics(tmp_path: Path) -> None:
    write_programs("guides/monitoring", tmp_path)
    settings = files(text_of("guides/monitoring"))["gunicorn.conf.py"]
    ports = free_port(), free_port()
    (tmp_path / "gunicorn.conf.py").write_text(settings.replace("range(9101, 9200)", str(ports)))
    command = ("-m", "gunicorn", "-k", "gthread", "--workers=2", "--threads=8", f"--bind={HOST}:{{port}}", "app:app")

    def clients(port: int) -> float:
        with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=TIMEOUT) as answer:
            return sum(
                float(value) for value in re.findall(r"^sse_batcher_clients\{.*?} (\S+)", answer.read().decode(), re.M)
            )

    with running(command, tmp_path) as server, ExitStack() as stack:
        for worker in workers(server):
            stack.enter_context(stream_of(server, worker))
        wait_until(lambda: [clients(port) for port in ports] == [1, 1], "each worker counts its own stream")


def test_the_counters_to_watch_exist() -> None:
    table = text_of("guides/monitoring").partition("## When to act")[2].partition("## Prometheus")[0]
    counters = set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE))
    assert len(counters) >= 12
    assert counters <= {field.name for field in fields(ManagerStats)}


def test_each_line_at_level_info_is_in_the_table() -> None:
    """The first words of each message in the code that are not values are in a row with its logger."""
    page = text_of("guides/monitoring").partition("The lines at level INFO")[2]
    rows = re.findall(r"^\| `(sse_batcher[\w.]*)` \| (.*?) \|", page, flags=re.MULTILINE)
    found = [(path, text) for path in sorted((ROOT / "sse_batcher").rglob("*.py")) for text in info_messages(path)]
    assert len(found) >= len(rows) - 1
    for path, text in found:
        loggers = re.findall(r'getLogger\("(.*?)"\)', path.read_text())
        beginning = next(filter(None, map(str.strip, re.split(r"%[-.\w]+|[{:;]", text))))
        assert any(beginning in shown and (name in loggers or not loggers) for name, shown in rows), text


def info_messages(path: Path) -> list[str]:
    """The messages that a module logs at level INFO."""
    found = []
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            given = [ast.unparse(argument) for argument in call.args]
            if call.func.attr == "info" and "_log" in ast.unparse(call.func):
                found.append(call.args[0])
            elif call.func.attr in {"log", "log_once"} and given and "logging.INFO" in given[0]:
                found.append(call.args[1])
    return [
        text.value if isinstance(text, ast.Constant) else ast.unparse(text)[2:]
        for text in found
        if not isinstance(text, ast.Name)
    ]


# -- what detached streams cost ----------------------------------------------------------------------------------------


def test_the_table_of_detached_streams_is_that_of_the_benchmark() -> None:
    measured = (ROOT / "benchmarks" / "README.md").read_text().partition("| 10,000 clients |")[2].partition("\n\n")[0]
    rows = [[cell.strip().replace(",", "") for cell in row.split("|")[1:-1]] for row in measured.splitlines()[1:]]
    by_memory = {name: (float(memory), float(cpu), float(last)) for name, memory, _, _, cpu, _, _, last, *_ in rows}
    table = text_of("explanation/detached").partition("## What it costs")[2]
    shown = re.findall(r"^\| .*? \| ([\d.]*)[ KB]*\| ([\d.]+) (m?s).*? \| ([\d.]+) µs \|$", table, flags=re.MULTILINE)
    assert len(shown) == 8
    for memory, last, unit, cpu in shown:
        milliseconds = float(last) * (1000 if unit == "s" else 1)
        assert any(
            abs(milliseconds - of_last) <= 60
            and abs(float(cpu) - of_cpu) < 0.5
            and (not memory or abs(float(memory) - of_memory) < 0.5)
            for of_memory, of_cpu, of_last in by_memory.values()
        ), (memory, last, cpu)
