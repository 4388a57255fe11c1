"""A server that is measured: how it is started, what it takes, and how it is told to publish."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from peers.event import publish

HERE = Path(__file__).parent
HOST = "127.0.0.1"
START = 15.0  # seconds


@dataclass(frozen=True)
class Kind:
    """What is measured. {port}, {threads}, {folder}, {here} and `words` are replaced in `command` and `environment`."""

    title: str
    command: str
    words: dict[str, str | None]
    """Programs and modules that it needs. None is one that is not installed."""
    environment: dict[str, str] = field(default_factory=dict)
    path: str = "/events"
    """Of the stream. Where it ends with =, each client adds its number."""
    threads: int | None = 8
    """What it is started with; None: eight more than it has clients."""
    window: float = 0
    """Milliseconds that it holds a burst back on purpose."""
    most: int = 10_000
    """Clients."""
    flood: int = 50_000
    """Events to 100 clients, of which deliveries a second are measured."""
    ours: bool = False
    name: str = ""
    """What `--only` calls it."""
    burst: Callable[[int, range], None] | None = None
    """Publishes events with these numbers to that port from our process, where the server itself runs no app."""

    @property
    def installed(self) -> bool:
        return None not in self.words.values()


class ServerError(Exception):
    """It does not start, or does not answer."""


class Server:
    """One that runs, with all its processes, until the end of `with`."""

    def __init__(self, kind: Kind, clients: int, folder: Path) -> None:
        self.kind = kind
        self.port = _free_port()
        self.number = 1_000_000  # of the next event
        threads = clients + 8 if kind.threads is None else kind.threads
        words = {"port": self.port, "threads": threads, "folder": folder, "here": HERE, **kind.words}
        environment = {name: value.format(**words) for name, value in kind.environment.items()}
        self._log = folder / f"server-{self.port}.log"
        self._folder = folder
        self._command = [word.format(**words) for word in kind.command.split()]
        self._environment = {**os.environ, **_environment(folder), **environment}
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # with its workers it is one group, which is measured and killed as one
            )

    def stop(self, *, killed: bool = False) -> None:
        """Let it end as after a SIGTERM, or kill all of its processes. `start_again` starts it on the same port."""
        if killed:
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.terminate()
        self._process.wait(timeout=START * 4)

    def start_again(self) -> None:
        self._process = self._started()
        self.__enter__()

    def __enter__(self) -> Server:
        deadline = time.monotonic() + START
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self.request("GET", "/ping")
            except OSError:
                time.sleep(0.05)
            else:
                return self
        self.__exit__()
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
        reasons = [line for line in lines if "Error: " in line] or lines
        raise ServerError(f"does not start: {reasons[-1]}")

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def request(self, method: str, path: str, timeout: float = 120) -> bytes:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status >= 400:
            raise ServerError(f"{method} {path}: {response.status}")
        return body

    def get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.request("GET", path))
        return answer

    def post(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.request("POST", path))
        return answer

    def publish(self, first: int, size: int, *, bursts: int = 1, every: float = 0, sort: str = "") -> float:
        """Bursts of `size` events from number `first` on. Returns the microseconds one took to publish.

        `sort`: one that only ours has, see `many_app`.
        """
        query = {"first": str(first), "n": str(size), "bursts": str(bursts), "every": str(every)}
        if self.kind.burst is not None:
            burst, port = self.kind.burst, self.port
            return publish(query, lambda numbers: burst(port, numbers))["took_us"]
        if sort:
            query["sort"] = sort
        answer = self.post("/publish?" + urlencode(query))
        return float(answer["took_us"])

    def numbers(self, count: int) -> int:
        """The first of so many event numbers that were not used yet."""
        first, self.number = self.number, self.number + count
        return first

    def cpu(self) -> float:
        """Microseconds of CPU that its processes have taken so far, all threads, user and system."""
        # ~pid << 3 | 2 is the kernel's name for that clock; /proc has the same in steps of 10 ms.
        return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in self.pids()) / 1e3

    def rss(self) -> int:
        """Bytes in memory, of all processes."""
        return sum(int(_status(pid, "VmRSS").split()[0]) for pid in self.pids()) * 1024

    def threads(self) -> int:
        return sum(int(_status(pid, "Threads")) for pid in self.pids())

    def pids(self) -> list[int]:
        """Of all its processes."""
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
        return [pid for pid in pids if _group(pid) == self._process.pid]


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _status(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/status") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith(name + ":"))


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as found:
        return int(found.getsockname()[1])


def _environment(folder: Path) -> dict[str, str]:
    spec = importlib.util.find_spec("sse_batcher")
    assert spec is not None
    assert spec.origin is not None
    return {
        "PYTHONPATH": os.pathsep.join([str(Path(spec.origin).parents[1]), str(HERE)]),
        "XDG_RUNTIME_DIR": str(folder),  # where newer gunicorns put their control socket; else in the home directory
    }
