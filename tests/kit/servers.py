"""Real servers for tests: each a subprocess on a free port of the loopback interface, and a bare client for them.

`running` starts one and ends it, whatever happens in between. `SERVERS` says how the servers that people run are
started, and how they differ; `serving` runs one of them, with nginx before it where it says so.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import sse_batcher

from . import nginx
from .ports import HOST, free_port
from .services import certificate, pip_install, program
from .waiting import TIMEOUT

APPS = Path(__file__).parent / "apps"
"""The folder that servers import apps from."""

THREADS = 16
"""The number of threads of each server that takes such an option. A stream takes one."""


class Kind(NamedTuple):
    """A server: how it is started, and how it differs from the others."""

    command: tuple[str, ...]
    """The arguments for Python by which it serves `serverapp`."""
    transport: str = "attached"
    tls: bool = False
    """Whether it speaks that, with the certificate and key in ``tls.pem``."""
    nginx: str = ""
    """The directives of the location of an nginx before it, if there is one."""
    upstream: str = ""
    """Where that finds it, if not at its port."""
    requirement: str = ""
    """What pip has to get, with spaces between, if it is not what is installed."""
    external: bool = True
    """Whether its tests run on one Python only, in CI."""
    streams: int = THREADS - 1
    """How many streams it must be able to serve beside other requests."""
    forgotten: int = 0
    """How many heartbeats are made for a client that has left, at most: none where the watcher sees its connection."""
    chunked: tuple[str, ...] = ("1.1",)
    """The versions of HTTP in which a stream comes in chunks. Else it comes as it is, until the connection closes."""
    after_head: str = "kept"
    """What becomes of the connection after HEAD: ``kept``, ``closed`` as the head says, or ``cut`` without a word."""


def gunicorn(*options: str) -> tuple[str, ...]:
    return (
        "-m",
        "gunicorn",
        "--workers=1",
        f"--bind={HOST}:{{port}}",
        *options,
        "serverapp:app",
    )


def uwsgi(*options: str, threads: int = THREADS) -> tuple[str, ...]:
    run = "import pyuwsgi; pyuwsgi.run()"
    return ("-c", run, "--master", "--die-on-term", f"--threads={threads}", "--module=serverapp:app", *options)


def waitress(*options: str) -> tuple[str, ...]:
    return ("-m", "waitress", f"--listen={HOST}:{{port}}", f"--threads={THREADS}", *options, "serverapp:app")


def cheroot(*options: str) -> tuple[str, ...]:
    return ("-m", "cheroot", f"--bind={HOST}:{{port}}", f"--threads={THREADS}", *options, "serverapp:app")


def with_threads(command: tuple[str, ...], threads: int) -> tuple[str, ...]:
    return tuple(argument.replace(f"--threads={THREADS}", f"--threads={threads}") for argument in command)


def detached(kind: Kind) -> Kind:
    """The same with few threads, of which streams need none."""
    return kind._replace(command=with_threads(kind.command, 4), transport="auto", external=True, streams=50)


GTHREAD = gunicorn("-k", "gthread", f"--threads={THREADS}")
UWSGI = uwsgi(f"--http-socket={HOST}:{{port}}")

SERVERS = {
    "werkzeug": Kind(
        ("-m", "flask", "--app=serverapp", "run", f"--host={HOST}", "--port={port}", "--no-reload"),
        external=False,
        chunked=("1.0", "1.1"),  # it looks at its own version, not at that of the request
        after_head="closed",
    ),
    "gunicorn": Kind(GTHREAD, external=False),
    "waitress": Kind(waitress(), external=False, after_head="closed"),
    "gunicorn-23": Kind(GTHREAD, requirement="gunicorn==23.*"),
    # There is no epoll under gevent. The first write finds nothing wrong and is answered by a reset; the second fails.
    "gunicorn-gevent": Kind(gunicorn("-k", "gevent"), streams=200, forgotten=2),
    "cheroot": Kind(cheroot(), after_head="closed"),
    "uwsgi": Kind(UWSGI, chunked=(), after_head="cut"),
    "uwsgi-http": Kind(uwsgi(f"--http={HOST}:{{port}}", "--lazy-apps"), chunked=(), after_head="cut"),
    "nginx": Kind(GTHREAD, nginx=nginx.PASS),
    "nginx-http11": Kind(GTHREAD, nginx=nginx.KEEPING),
    "nginx-uwsgi": Kind(uwsgi(f"--socket={HOST}:{{port}}"), nginx=nginx.UWSGI_PASS),
}
"""The servers that people run."""

ALSO_DETACHED = (
    "werkzeug",
    "gunicorn",
    "waitress",
    "cheroot",
    "uwsgi",
    "uwsgi-http",
    "nginx",
    "nginx-http11",
    "nginx-uwsgi",
)
UNIX = gunicorn("-k", "gthread", f"--threads={THREADS}", "--bind=unix:app.sock")
SERVERS |= {f"{name}-detached": detached(SERVERS[name]) for name in ALSO_DETACHED} | {
    "gunicorn-sync-detached": detached(Kind(gunicorn(), after_head="closed")),
    "nginx-unix-detached": detached(Kind(UNIX, nginx=nginx.KEEPING, upstream="unix:app.sock")),
}

COMMANDS = {name: kind.command for name, kind in SERVERS.items() if not kind.external}
"""The arguments for Python by which each of the three that every CI run tests serves `serverapp`."""


OURS = re.compile(r"\[INFO\] sse_batcher\..*\n")
CTRL_C = re.compile(r"Traceback \(most recent call last\):\n(  .*\n)+KeyboardInterrupt\n")
"""How cheroot ends at SIGINT. Python writes it piece by piece, so that lines of ours may stand anywhere within."""

WRITE_ERRORS = {"OSError: write error", "IOError: write error"}
"""What uWSGI says of a client that has left while something was written to it; it has no other way to say so. Its lines
with SIGPIPE, "Broken pipe" and "Connection reset by peer" mean the same."""


def faults_in(output: str) -> list[str]:
    """Return the lines that report an error."""
    lines = OURS.findall(output) + CTRL_C.sub("", OURS.sub("", output)).splitlines()
    faults = [line for line in lines if re.search("error|traceback|exception|critical", line, re.IGNORECASE)]
    return [line for line in faults if line not in WRITE_ERRORS]


class Block(NamedTuple):
    """What one block of a stream says. `data` is parsed."""

    event: str
    data: Any
    id: str | None = None


class Server:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self.tls = False
        self.behind: Server | None = None
        """The server that this one is a proxy of."""
        self._log = log

    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def faults(self) -> list[str]:
        """Return the lines of its log, and of the server's behind it, that report an error."""
        faults = faults_in(self.output())
        return faults if self.behind is None else faults + self.behind.faults()

    def show_output(self) -> None:
        """Print it, for pytest to show with a failure."""
        sys.stdout.write(self.output())

    def kill(self) -> None:
        """End it and its workers at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @contextmanager
    def watched(self, lasting: float = 0.0) -> Iterator[Server]:
        """For the time of one test: kill it if that takes too long, so that a client does not wait forever.

        `lasting` is what the test takes by intention, in seconds.
        """
        timer = threading.Timer(lasting + 3 * TIMEOUT, self.kill)
        timer.start()
        try:
            yield self
        finally:
            timer.cancel()
            timer.join()
            self.show_output()

    def connect(self) -> http.client.HTTPConnection:
        if not self.tls:
            return http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the certificate is signed by itself
        return http.client.HTTPSConnection(HOST, self.port, timeout=TIMEOUT, context=context)

    def request(self, method: str, path: str, body: Any = None) -> str:
        """The body of the answer, which has to be a good one."""
        connection = self.connect()
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status < 400, f"{method} {path}: {response.status} {response.reason}"
            return response.read().decode()
        finally:
            connection.close()

    def enqueue(self, *events: tuple[str, Any]) -> None:
        """Have the app enqueue these events, one right after the other."""
        self.request("POST", "/enqueue", events)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = json.loads(self.request("GET", "/stats"))
        return stats

    def stop(self, signal_number: int) -> int:
        """Ask it to end, and return its exit code. Fails if it takes longer than `TIMEOUT`."""
        # An interrupt that meets the main thread while it hands a request to a thread cuts that request off, or makes
        # gunicorn wait for itself. Once a further one is answered, it is done with those before, and a moment later
        # with that one.
        self.request("HEAD", "/events")
        threading.Event().wait(0.3)
        self.process.send_signal(signal_number)
        return self.process.wait(TIMEOUT)


class Stream:
    """An open stream, read with nothing but the standard library. No read takes longer than `TIMEOUT`."""

    def __init__(self, server: Server, headers: Mapping[str, str] | None = None) -> None:
        self._connection = server.connect()
        self._connection.request("GET", "/events", headers=headers or {})
        self.response = self._connection.getresponse()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.response.close()
        self._connection.close()

    def line(self) -> str:
        """The next line as it came, ``""`` at the end."""
        return self.response.readline().decode()

    def block(self) -> Block | None:
        """The next block, None at the end. Heartbeats are passed over."""
        fields: dict[str, str] = {}
        deadline = time.monotonic() + TIMEOUT
        while line := self.line():
            if line == "\n" and fields:
                return Block(fields.get("event", "message"), _data_of(fields["data"]), fields.get("id"))
            name, _, value = line.rstrip("\n").partition(": ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
            fields.pop(":", None)
            assert time.monotonic() < deadline, "nothing but heartbeats"
        return None

    def until(self, event: str) -> list[Block]:
        """The blocks up to the next one of this type, which is the last of them."""
        blocks = []
        deadline = time.monotonic() + TIMEOUT
        while (block := self.block()) is not None:
            blocks.append(block)
            if block.event == event:
                return blocks
            assert time.monotonic() < deadline, f"no {event!r} among {blocks}"
        raise AssertionError(f"the stream ended before {event!r}, after {blocks}")

    def to_end(self) -> list[Block]:
        """The blocks until the server ends the stream, in good order or not."""
        blocks = []
        with suppress(http.client.IncompleteRead, ConnectionError):
            while (block := self.block()) is not None:
                blocks.append(block)
        return blocks


def _data_of(text: str) -> Any:
    """What the JSON says, or the text if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def serving(kind: Kind, folder: Path, **environment: str) -> Iterator[Server]:
    """Run one of `SERVERS`. With an nginx before it, that is what is yielded."""
    if kind.requirement:
        packages = folder / "packages"
        pip_install(kind.requirement, packages)
        environment["PYTHONPATH"] = str(packages)
    environment["TRANSPORT"] = kind.transport
    if kind.tls:
        certificate(folder, HOST)
    with running(kind.command, folder, **environment) as server:
        server.tls = kind.tls
        if not kind.nginx:
            yield server
            return
        path = program("nginx", package="Debian: nginx-light")
        arguments = nginx.arguments_of(path, kind.nginx, host=HOST, upstream=kind.upstream or f"{HOST}:{server.port}")
        with running(arguments, folder) as before:
            before.behind = server
            yield before


@contextmanager
def running(arguments: Sequence[str], folder: Path, **environment: str) -> Iterator[Server]:
    """Run Python with these arguments, in which ``{port}`` is replaced, until it listens; kill it at the end.

    Its environment has the port as ``PORT``, and it imports the `sse_batcher` that is tested. A ``PYTHONPATH`` given
    here comes first. Its output goes to a file in `folder`, and in the end to ours, which pytest shows with a failure.
    """
    server = _start(arguments, folder, environment)
    try:
        yield server
    finally:
        server.kill()
        server.process.wait()
        server.show_output()


def _start(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Server:
    failures = ""
    for _ in range(3):
        port = free_port()
        log = folder / f"server-{port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *(argument.replace("{port}", str(port)) for argument in arguments)],
                cwd=folder,
                env={**os.environ, **_environment(folder, environment), "PORT": str(port)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # with its workers it is one group, which is killed as one
            )
        server = Server(process, port, log)
        if _listens(server):
            return server
        status = process.poll()
        server.kill()  # the port was taken meanwhile, most likely: try another
        process.wait()
        failures += "it does not listen" if status is None else f"it has ended with status {status}"
        failures += f", port {port}:\n{server.output()}\n"
    raise AssertionError(f"the server does not start:\n{failures}")


def _environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    first = [more["PYTHONPATH"]] if "PYTHONPATH" in more else []
    return {
        **more,
        "PYTHONPATH": os.pathsep.join([*first, str(Path(sse_batcher.__file__).parents[1]), str(APPS)]),
        "PYTHONUNBUFFERED": "1",
        "XDG_RUNTIME_DIR": str(folder),  # where newer gunicorns put their control socket; else in the home directory
    }


def _listens(server: Server) -> bool:
    """Whether it takes connections, in the end. False if it has exited."""
    deadline = time.monotonic() + TIMEOUT
    while server.process.poll() is None and time.monotonic() < deadline:
        with suppress(ConnectionRefusedError), socket.create_connection((HOST, server.port), timeout=TIMEOUT):
            return True
        threading.Event().wait(0.05)
    return False
