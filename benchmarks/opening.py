"""What opening a stream costs, and a storm of clients that come back. `python benchmarks/opening.py`.

`--only process,rate,storm` runs a part: what it takes within the process (``process``); new streams a second, beside a
plain page on a new connection (``rate``); and `--clients` that all come back after a restart of the server (``storm``),
with the memory backend and with a redis-server of its own. `--cores 1` has server and clients on one core. Things that
are compared take turns; each ratio is the median of those of the rounds. Linux only; needs cc and gunicorn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import logging
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flask import Flask
from many_kinds import kinds
from many_load import Load, LoadError, Pinging, Return, compile_load, pages
from many_server import HOST, Server
from peers.event import event

from sse_batcher import SSE, SSEManager

ROUNDS = 15
OPENINGS = 200  # a round, in the process
PAGES = 1_000  # a round, and as many streams
CLIENTS = 10_000
BURST = 30  # events
AWAY = 100  # events that come while the clients are away
PATIENCE = 180.0  # seconds within which all have to be back
WAYS = (  # each with `spread` and `killed` of `storm`
    ("at once", False, False),
    ("as they were told", True, False),
    ("as they were told, server killed", True, True),
)
PARTS = ("process", "rate", "storm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: names.split(","), default=PARTS, metavar="NAMES")
    parser.add_argument("--clients", type=int, default=CLIENTS, metavar="N", help="of the storm")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--cores", type=int, help="how many cores server and clients share; default: all")
    arguments = parser.parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # inherited: a descriptor a client
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), medians of {arguments.rounds}\n")
    if "process" in arguments.only:
        in_process(arguments.rounds)
    if {"rate", "storm"} & set(arguments.only):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            program = compile_load(folder)
            if "rate" in arguments.only:
                rate(folder, program, arguments.rounds)
            if "storm" in arguments.only:
                storms(folder, program, arguments.clients)


# -- in the process ----------------------------------------------------------------------------------------------------


def in_process(rounds: int) -> None:
    """Microseconds of CPU until a page is answered, or a stream has its first block; all threads of the process."""
    logging.disable(logging.CRITICAL)
    plain, attached, detached = make_app(None), make_app("attached"), make_app("auto")
    steps: dict[str, Callable[[], float]] = {
        "a plain page": lambda: answer(plain),
        "the same, in an app with an SSE": lambda: answer(attached),
        "a stream, attached": lambda: open_attached(attached),
        "a stream, detached": lambda: open_detached(detached),
    }
    took: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            gc.collect()
            value = step()
            if number > 1:  # the first ones are slower
                took[name].append(value)
    logging.disable(logging.NOTSET)
    page = took["a plain page"]
    print(f"{'in the process':44}{'µs of CPU':>12}{'more':>9}{'more / page':>13}")
    for name, values in took.items():
        more = [value - base for value, base in zip(values, page, strict=True)]
        ratio = statistics.median(value / base for value, base in zip(more, page, strict=True))
        print(f"{name:44}{statistics.median(values):12.1f}{statistics.median(more):9.1f}{ratio:13.2f}")
    print()


def make_app(transport: str | None) -> Flask:
    app = Flask("page", static_folder=None)
    if transport is not None:
        app.config["SSE_TRANSPORT"] = transport
        SSE(app)
    app.add_url_rule("/ok", view_func=lambda: "ok")
    return app


def environ(path: str, **more: Any) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "localhost",
        "REMOTE_ADDR": HOST,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": None,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **more,
    }


def ignore(*_: object) -> None:
    """A `start_response`."""


def answer(app: Flask) -> float:
    began = time.process_time()
    for _ in range(OPENINGS):
        body: Any = app(environ("/ok"), ignore)
        list(body)
        body.close()
    return (time.process_time() - began) / OPENINGS * 1e6


def open_attached(app: Flask) -> float:
    """Of streams that stay open meanwhile."""
    bodies: list[Any] = []
    began = time.process_time()
    for _ in range(OPENINGS):
        bodies.append(app(environ("/events"), ignore))
        next(iter(bodies[-1]))
    took = time.process_time() - began
    for body in bodies:
        body.close()
    return took / OPENINGS * 1e6


def open_detached(app: Flask) -> float:
    """The same, until their clients have the first block. What the server does is done before, as far as possible."""
    pairs = [socket_pair() for _ in range(OPENINGS)]
    heads: list[bytes] = []

    def start_response(status: str, headers: list[tuple[str, str]], _: object = None) -> None:
        if not heads:
            lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
            heads.append("\r\n".join([*lines, "Transfer-Encoding: chunked", "", ""]).encode())

    began = time.process_time()
    for served, _ in pairs:
        body: Any = app(environ("/events", **{"werkzeug.socket": served}), start_response)
        blocks = iter(body)
        first = next(blocks)
        served.sendall(heads[0] + b"%x\r\n%b\r\n" % (len(first), first))
        if next(blocks, None) is not None:
            raise SystemExit("a stream stays attached")
        body.close()
        served.close()
    for _, client in pairs:
        client.recv(1)
    took = time.process_time() - began
    for _, client in pairs:
        client.close()
    time.sleep(0.2)  # until the loop has seen that they are gone
    return took / OPENINGS * 1e6


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a TCP connection, as that of a client."""
    with socket.create_server((HOST, 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        served, _ = listener.accept()
    return served, client


# -- a second ----------------------------------------------------------------------------------------------------------


def rate(folder: Path, program: Path, rounds: int) -> None:
    """New streams a second, and plain pages on new connections; and the CPU that the server takes for each."""
    print(f"{'gunicorn, gthread, 8 threads':44}{'a second':>12}{'ratio':>9}{'µs of CPU':>13}{'ratio':>9}")
    names = ("page", "stream")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    with Server(kinds()["detached"], PAGES, folder) as server:
        for number in range(rounds + 1):
            for name in names:
                before = server.cpu()
                with contextlib.ExitStack() as stack:
                    if name == "page":
                        took = pages(program, server.port, "/ping", PAGES)
                    else:
                        took = stack.enter_context(Load(program, server.port, "/events")).connect(PAGES)
                    used = server.cpu() - before
                time.sleep(0.3)  # until the server has seen that they are gone
                if number:
                    seconds[name].append(took / PAGES)
                    cpu[name].append(used / PAGES)
    for name, title in (("page", "a plain page on a new connection"), ("stream", "a stream, detached")):
        rates = ratios(seconds["page"], seconds[name])
        print(
            f"{title:44}{1 / statistics.median(seconds[name]):12,.0f}{rates:9.2f}"
            f"{statistics.median(cpu[name]):13.0f}{ratios(cpu[name], cpu['page']):9.2f}"
        )
    print()


def ratios(of: Iterable[float], to: Iterable[float]) -> float:
    return statistics.median(one / other for one, other in zip(of, to, strict=True))


# -- a storm -----------------------------------------------------------------------------------------------------------


def storms(folder: Path, program: Path, clients: int) -> None:
    """All clients come back after a restart of the server: at once, and when they were told to."""
    title = f"{clients:,} clients come back after a restart"
    print(f"{title:48}{'back: p50 s':>12}{'last':>7}{'waited: p50':>13}{'last':>7}", end="")
    print(f"{'page: p50 ms':>14}{'p99':>8}{'most':>8}{'new: p50':>10}{'p99':>8}{'most':>8}  lost")
    with contextlib.ExitStack() as stack:
        backends: dict[str, str] = {"memory": "memory://"}
        if shutil.which("redis-server"):
            backends["Redis"] = stack.enter_context(redis_server(folder))
        for name, url in backends.items():
            for number, (way, spread, killed) in enumerate(WAYS):
                backend = url if name == "memory" else f"{url}?prefix=storm-{number}"
                print(f"{f'{name}, {way}':48}", end="", flush=True)
                try:
                    print(storm(folder, program, clients, backend, spread=spread, killed=killed))
                except LoadError as error:
                    print(f"  {error}")


def storm(folder: Path, program: Path, clients: int, backend: str, *, spread: bool, killed: bool) -> str:
    """Have all come back once. Returns what was seen, as a line.

    `spread`: each after the time that it was told, otherwise at once. `killed`: the server says no goodbye.
    """
    kind = kinds()["detached"]
    kind = dataclasses.replace(kind, environment={**kind.environment, "MANY_BACKEND": backend})
    with Server(kind, clients, folder) as server, Load(program, server.port, "/events") as load:
        load.note()
        load.connect(clients, timeout=60)
        for _ in range(2):  # so that there are two places from which they come back
            first = server.numbers(BURST)
            load.round(first, BURST, lambda first=first: server.publish(first, BURST), PATIENCE)
        server.stop(killed=killed)
        first = server.numbers(AWAY)
        if backend != "memory://":
            publish(backend, range(first, first + AWAY))
        server.start_again()
        pinging = [Pinging(program, server.port, fresh=fresh) for fresh in (False, True)]
        seen = load.return_all(first, first + AWAY, PATIENCE, spread=spread)
        kept, fresh = (each.end() for each in pinging)
    columns = [
        *(f"{value / 1e3:{width}.2f}" for value, width in ((seen.back_p50_ms, 12), (seen.back_last_ms, 7))),
        *(f"{value / 1e3:{width}.2f}" for value, width in ((seen.waited_p50_ms, 13), (seen.waited_last_ms, 7))),
        f"{kept.p50_ms:14.1f}{kept.p99_ms:8.0f}{kept.max_ms:8.0f}",
        f"{fresh.p50_ms:10.1f}{fresh.p99_ms:8.0f}{fresh.max_ms:8.0f}",
    ]
    return "".join(columns) + f"  {lost(seen, backend)}"


def lost(seen: Return, backend: str) -> str:
    """What the clients have missed, in words."""
    faults = {
        "clients did not come back": seen.clients - seen.back,
        "refused connections": seen.refused,
        "sse_busy": seen.busy,
    }
    if backend == "memory://":
        faults["without sse_gap"] = seen.clients - seen.gaps
    else:
        faults |= {"sse_gap": seen.gaps, "events missing": seen.missing, "out of order": seen.disordered}
    return ", ".join(f"{count:,} {what}" for what, count in faults.items() if count) or "nothing"


def publish(url: str, numbers: range) -> None:
    """Publish events from this process, as a job does while no web process runs."""
    with SSEManager(backend=url) as manager:
        for number in numbers:
            manager.enqueue("tick", event(number))
        manager.flush_all()


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        yield f"redis://{HOST}:{port}/0"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
