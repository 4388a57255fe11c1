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


class Return(NamedTuple):
    """What clients saw that came back after the server had closed all of them. Times are from the first attempt."""

    clients: int
    back: int
    """Clients that got a stream."""
    complete: int
    """Clients that have all events that they had missed."""
    gaps: int
    busy: int
    refused: int
    """Connections that were refused, or ended before the first block."""
    back_p50_ms: float
    back_p99_ms: float
    back_last_ms: float
    waited_p50_ms: float
    """From the time when a client came back until its first block."""
    waited_p99_ms: float
    waited_last_ms: float
    missing: int
    disordered: int


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

    def note(self) -> None:
        """Have the clients note what they need to come back. Call this before `connect`."""
        self._ask("note")

    def return_all(self, first: int, end: int, timeout: float, *, spread: bool) -> Return:
        """Let all clients come back, which the server has closed, and wait until they have all events up to `end`.

        Each one names the newest event that it had, every other one the batch before. `first` is the first event that
        came while they were away. `spread`: each after the time that it was told; otherwise all at once.
        """
        self._ask(f"return {first} {end} {int(spread)} {timeout * 1_000:.0f}")
        return Return(**self._answer())

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
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.read()  # and then close its stdin, or it would end early
    if process.returncode:
        raise LoadError("no answer to /ping")
    return Ping(**json.loads(text))


class Pinging:
    """Asks for `/ping` again and again, from a process of its own, until `end`. `fresh`: over a new connection each."""

    def __init__(self, program: Path, port: int, *, fresh: bool, pause: float = 0.005, most: float = 600) -> None:
        command = [str(program), "ping", str(port), "/ping", str(most), str(int(pause * 1e6))]
        self._process = subprocess.Popen(
            [*command, "fresh"] if fresh else command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def end(self) -> Ping:
        """Return what was seen, as soon as the present request is answered."""
        text, _ = self._process.communicate()
        if self._process.returncode:
            raise LoadError("no answer to /ping")
        return Ping(**json.loads(text))


def pages(program: Path, port: int, path: str, count: int) -> float:
    """Seconds until so many pages were answered, each on a connection of its own, with as many at a time as streams."""
    command = [str(program), "pages", str(port), path, str(count), str(IN_FLIGHT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise LoadError(f"no answer to {path}")
    return float(json.loads(done.stdout)["seconds"])


class LoadError(Exception):
    """A server does not do what is measured."""
