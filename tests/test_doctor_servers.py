"""`doctor` against real servers without a proxy: it finds the fault that each set-up has, and nothing else."""

from __future__ import annotations

import json
import pprint
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sse_batcher.doctor.client import Target
from sse_batcher.doctor.command import Report, examine_url

from .kit.doctor import SETUPS, SetUp
from .kit.servers import Server, Stream, gunicorn, running, waitress
from .kit.services import certificate, moved_by
from .kit.waiting import tried

pytestmark = [pytest.mark.external, pytest.mark.timeout(90)]

GTHREAD = ("-k", "gthread", "--threads=100")


def of_faulty_apps(command: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(argument.replace("serverapp", "faultyapps") for argument in command)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(of_faulty_apps(gunicorn(*GTHREAD)), tmp_path_factory.mktemp("site")) as server:
        yield server


def visit_for(code: str | None, level: str, visit: Callable[[], Report]) -> Report:
    """The report that has this finding and no other. The doctor takes a machine that stands still for a fault."""
    return tried(visit, lambda report: codes(report) == ([(code, level)] if code else []))


def codes(report: Report) -> list[tuple[str, str]]:
    return [(finding.code, finding.level) for finding in report.findings]


@pytest.fixture(scope="module")
def reports(site: Server) -> Iterator[Mapping[str, Future[Report]]]:
    """What is found in each set-up. Several are examined at the same time, since the doctor mostly waits."""
    with ThreadPoolExecutor(8) as pool:
        yield {
            name: pool.submit(visit_for, setup.code, setup.level, partial(examine_url, target_of(site, setup)))
            for name, setup in SETUPS.items()
        }


def target_of(site: Server, setup: SetUp) -> Target:
    return Target(f"{site.url}/{setup.app}/{setup.path}", origin=setup.origin, seconds=setup.seconds)


def check(report: Report, code: str | None, level: str = "fault", names: tuple[str, ...] = ()) -> None:
    """The code is found and nothing else, and the words name these settings."""
    assert codes(report) == ([(code, level)] if code else []), pprint.pformat(report)
    for finding in report.findings:
        for name in names:
            assert name in f"{finding.what} {finding.do}"


@pytest.mark.parametrize("name", SETUPS)
def test_the_fault_of_an_app_is_found(name: str, reports: Mapping[str, Future[Report]]) -> None:
    setup: SetUp = SETUPS[name]
    check(reports[name].result(), setup.code, setup.level, setup.names)


# -- servers of their own ----------------------------------------------------------------------------------------------


def examine(server: Server, *, tls: bool = False, **options: Any) -> Report:
    url = server.url.replace("http:", "https:") if tls else server.url
    return examine_url(Target(f"{url}/events", is_insecure=tls, **options))


def sync(folder: Path) -> Report:
    with running(gunicorn(), folder, TRANSPORT="attached") as server:
        return examine(server)


def all_threads_taken(folder: Path) -> Report:
    command = gunicorn("-k", "gthread", "--threads=3")
    with running(command, folder, TRANSPORT="attached") as server, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Stream(server)).until("sse_open")
        return examine(server, seconds=1.0)


def fewer_threads_than_tabs(folder: Path) -> Report:
    with running(gunicorn("-k", "gthread", "--threads=2"), folder, TRANSPORT="attached") as server:
        return examine(server, seconds=1.0)


def max_requests(folder: Path) -> Report:
    with running(gunicorn(*GTHREAD, "--max-requests=12"), folder) as server:
        return examine(server)


def clock_an_hour_behind(folder: Path) -> Report:
    clock = folder / "clock"
    clock.write_text("-1h")
    with running(waitress(), folder, **moved_by(clock)) as server:  # gunicorn cannot sleep with it
        return examine(server)


def http2(folder: Path, policy: str) -> Report:
    certificate(folder, "127.0.0.1")
    tls = ("--certfile=tls.pem", "--keyfile=tls.pem", "--http-protocols=h2,h1")
    command = tuple(part.replace("serverapp", "leavingapp") for part in gunicorn(*GTHREAD, *tls))
    long = (("X-Long", "x" * 300),)  # its length takes two bytes
    with running(command, folder, CONFIG=json.dumps({"SSE_HTTP2": policy, "SSE_HEARTBEAT": 0.3})) as server:
        return examine(server, tls=True, headers=long)


SERVERS: dict[str, tuple[Callable[[Path], Report], str, tuple[str, ...]]] = {
    "gunicorn sync": (sync, "one_thread", ("sync", "SSE_TRANSPORT", "--worker-class gthread")),
    "all threads taken": (all_threads_taken, "threads", ("SSE_TRANSPORT", "--worker-class gthread", "--threads")),
    "fewer threads than tabs": (fewer_threads_than_tabs, "threads", ("SSE_TRANSPORT", "--threads")),
    "max_requests": (max_requests, "ends_early", ("--max-requests", "sse_bye")),
    "a clock that is off": (clock_an_hour_behind, "clock", ("60 minutes behind", "timedatectl")),
    "HTTP/2 refused": (partial(http2, policy="refuse"), "http2", ("--http-protocols", "nginx", "sse_busy")),
    "HTTP/2 allowed": (partial(http2, policy="allow"), "http2", ("--http-protocols", "nginx", "blocks its browser")),
}


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Future[Report]]]:
    """What is found at each of these servers. A few run at the same time."""
    with ThreadPoolExecutor(4) as pool:
        yield {
            name: pool.submit(visit_for, code, "fault", partial(visit, tmp_path_factory.mktemp("server")))
            for name, (visit, code, _) in SERVERS.items()
        }


@pytest.mark.parametrize("name", SERVERS)
def test_the_fault_of_a_server_is_found(name: str, visits: Mapping[str, Future[Report]]) -> None:
    _, code, names = SERVERS[name]
    check(visits[name].result(), code, names=names)


# -- the command -------------------------------------------------------------------------------------------------------


PROGRESS = {"opening the stream", "asking beside the open stream", "coming back"}


def run(said: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it until it says this: it may take a machine that stands still for a fault."""
    command = [sys.executable, "-W", "error", "-m", "sse_batcher", "doctor", *arguments]
    return tried(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=60, check=False),
        lambda done: said in done.stdout,
    )


def test_the_command_prints_words_and_json_and_its_exit_status_counts_faults_only(site: Server) -> None:
    commands = [
        ("Nothing is wrong.", "healthy/events"),
        ("FAULT redirected:", "login/events"),
        ('"redirected"', "login/events", "--json"),
        ("headers:", "without_headers/events"),
    ]
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda each: run(each[0], f"{site.url}/{each[1]}", "--seconds=2", *each[2:]), commands)
    healthy, broken, machine, warned = runs
    assert [done.returncode for done in (healthy, broken, machine, warned)] == [0, 1, 1, 0]
    assert {line for done in (healthy, broken, machine, warned) for line in done.stderr.splitlines()} <= PROGRESS
    assert healthy.stdout.startswith(f"{site.url}/healthy/events, answered by gunicorn, HTTP/1.1\n")
    assert healthy.stdout.endswith("\nNothing is wrong.\n")
    assert "FAULT redirected: The answer is 302 Found to /login/login" in broken.stdout
    assert "  What to do: Let the function answer 401" in broken.stdout
    report = json.loads(machine.stdout)
    assert (report["url"], report["ok"]) == (f"{site.url}/login/events", False)
    assert [sorted(finding) for finding in report["findings"]] == [["code", "do", "level", "what"]]
    assert report["facts"]["answer"]["status"] == 302
