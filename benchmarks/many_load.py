"""The load generator, `load.c`: compiled, started, and asked."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("load.c")
IN_FLIGHT = 64  # connections that have not got their first block yet


class Round(NamedTuple):
    """What all clients of one load generator saw of one burst, or of several. Times are from the first `enqueue`."""

    clients: int
    complete: int
    open: int
    """Clients that the server has not closed."""
    closed: int
    """Clients that it closed before they had all."""
    events: int
    bytes: int
    missing: int
    disordered: int
    first_ms: float
    p50_ms: float
    p99_ms: float
    last_ms: float
    ended_ms: float
    """Until the server had closed the last one; -1 if it has closed none."""
    load_cpu_ms: float


class Retries(NamedTuple):
    """What the first blocks of all clients ask for: milliseconds, and how many come back in the busiest second."""

    least_ms: int
    p50_ms: int
    most_ms: int
    busiest: int


class Ping(NamedTuple):
    asked: int
    connects: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def compile_load(folder: Path) -> Path:
    """The program, in `folder`."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("the load generator needs a C compiler: cc is not installed")
    program = folder / "load"
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", str(program), str(SOURCE)], check=True)
    return program


class Load:
    """Clients of one server, which stay open until `close`."""

    def __init__(self, program: Path, port: int, path: str) -> None:
        self._process = subprocess.Popen(
            [str(program), "streams", str(port), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.retries: Retries | None = None
        """Of all clients, since the last `connect`."""

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    def connect(self, clients: int, timeout: float = 10) -> float:
        """Open so many more, and return the seconds until all had their first block.

        An error if none has got it for `timeout`.
        """
        answer = self._ask(f"connect {clients} {IN_FLIGHT} {timeout * 1_000:.0f}")
        if answer["open"] < clients or answer["closed"]:
            raise LoadError(f"{answer['open']} of {clients} streams are open after {answer['seconds']:.0f} s")
        self.retries = Retries(**answer["retry"])
        return float(answer["seconds"])

    def round(
        self, first: int, count: int, publish: Callable[[], None], timeout: float, *, ending: bool = False
    ) -> Round:
        """Have the events from number `first` on published, and wait until all clients have all, or for `timeout`.

        `ending`: until the server has closed all of them, too.
        """
        self._ask(f"{'ending' if ending else 'round'} {first} {count} {timeout * 1_000:.0f}")
        publish()
        return Round(**self._answer())

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LoadError("the load generator has ended") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LoadError("the load generator has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def ping(program: Path, port: int, seconds: float, pause: float = 0.005) -> Ping:
    """How long `/ping` takes over one keep-alive connection, asked from a process of its own."""
    command = [str(program), "ping", str(port), "/ping", str(seconds), str(int(pause * 1e6))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise LoadError("no answer to /ping")
    return Ping(**json.loads(done.stdout))


class LoadError(Exception):
    """A server does not do what is measured."""
