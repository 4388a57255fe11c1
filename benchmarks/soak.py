"""Whether anything grows in a server whose streams come and go all the time. `python benchmarks/soak.py --seconds 180`.

A real server, in a process of its own, serves the app below. Streams are opened at a steady rate on the main thread,
live for a moment and end in one of four ways, while a second thread has events enqueued in bursts and looks at the
server once a second. Ends with status 1 if something grew, streams failed, or the server logged an error. Linux only.
"""

from __future__ import annotations

import argparse
import heapq
import http.client
import itertools
import json
import logging
import os
import random
import re
import selectors
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from flask import Flask

from sse_batcher import SSE

HOST = "127.0.0.1"
LIFE = (0.1, 2.0)  # seconds
BURSTS = 5  # a second
EVENTS = 60  # in a burst, of about 300 bytes each
FLOOD = 4  # further ones of 200 KB, for stalled streams alone: these fill the server's buffers, so that its send blocks
PATIENCE = 15.0  # seconds for what has to come in the end
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with which close() resets the connection
KINDS = ("fin", "reset", "half-read", "stalled")
SEEN = ("rss_kib", "descriptors", "threads", "clients")

# -- the server --------------------------------------------------------------------------------------------------------

COMMANDS = {
    "gunicorn": "-m gunicorn -k gthread --workers=1 --threads={threads} --bind={bind} soak:app",
    "werkzeug": "-m flask --app=soak run --host={host} --port={port} --no-reload",
    "waitress": "-m waitress --listen={bind} --threads={threads} soak:app",
    "cheroot": "-m cheroot --bind={bind} --threads={threads} soak:app",
}


def create_app() -> Flask:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    app = Flask(__name__)
    # A small history, which is full before the first quarter is over. And short times, so that each way to notice a
    # client that left has its turn.
    app.config.update(
        SSE_TRANSPORT=os.environ.get("TRANSPORT", "auto"),
        SSE_HEARTBEAT=0.5,
        SSE_SEND_TIMEOUT=1.0,
        SSE_BATCH_WINDOW=0.02,
        SSE_HISTORY_FRAMES=50,
    )
    sse = SSE(app)
    sse.authorize(lambda channels: channels)
    numbers = itertools.count()

    @app.post("/burst")
    def burst() -> tuple[str, int]:
        for _ in range(EVENTS):
            sse.enqueue("tick", {"number": next(numbers), "text": "x" * 280})
        for _ in range(FLOOD):
            sse.enqueue("flood", "x" * 200_000, channel="flood")
        return "", 204

    @app.get("/look")
    def look() -> dict[str, Any]:
        stats = sse.manager.get_stats()
        return {
            "rss_kib": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "clients": stats.clients,
            "gaps": stats.gaps,
            "replays": stats.replays,
            "overflows": stats.overflows,
        }

    return app


app = create_app()


def start(name: str, port: int, threads: int, folder: str, transport: str) -> subprocess.Popen[bytes]:
    command = COMMANDS[name].format(host=HOST, port=port, bind=f"{HOST}:{port}", threads=threads)
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": f"{here}:{here.parent}",
        "XDG_RUNTIME_DIR": folder,
        "TRANSPORT": transport,
    }
    # glibc keeps what was freed, in a heap for each few threads, up to that heap's peak: for minutes that looks like a
    # leak. With these it gives back what is large.
    environment |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    environment["MALLOC_ARENA_MAX"] = "1"
    with open(f"{folder}/log", "wb") as log:
        return subprocess.Popen([sys.executable, *command.split()], cwd=folder, env=environment, stdout=log, stderr=log)


def ask(port: int, method: str, path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers={"Connection": "close"})
        return json.loads(connection.getresponse().read() or "{}")  # type: ignore[no-any-return]
    finally:
        connection.close()


# -- the load ----------------------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, kind: str, life: float) -> None:
        self.kind = kind
        self.life = life
        self.asked = self.failed = False
        self.head = b""
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if kind == "stalled":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # full at once, then the server's is


class Load:
    """Opens streams and ends them, all on the calling thread."""

    def __init__(self, port: int) -> None:
        self.counts: Counter[str] = Counter()
        self._port = port
        self._oldest = self._newest = ""  # cursors that were seen; the first one is too old soon
        self._selector = selectors.DefaultSelector()

    def run(self, rate: float, seconds: float, life: tuple[float, float] = LIFE) -> None:
        opens = time.monotonic()
        stop = opens + seconds
        ends: list[tuple[float, int, Stream]] = []
        while opens < stop or ends:
            now = time.monotonic()
            while opens <= min(now, stop):
                stream = self._open(random.uniform(*life))
                heapq.heappush(ends, (opens + stream.life, self.counts["connects"], stream))
                opens += 1 / rate
            while ends and ends[0][0] <= now:
                self._end(heapq.heappop(ends)[2])
            following = min(opens if opens < stop else stop + PATIENCE, ends[0][0] if ends else opens)
            for key, _ in self._selector.select(max(0.0, following - time.monotonic())):
                self._go_on(key.data)

    def _open(self, life: float) -> Stream:
        stream = Stream(random.choice(KINDS), life)
        self.counts["connects"] += 1
        stream.socket.connect_ex((HOST, self._port))  # an error shows with the first send
        self._selector.register(stream.socket, selectors.EVENT_WRITE, stream)
        return stream

    def _go_on(self, stream: Stream) -> None:
        try:
            if not stream.asked:
                cursor = random.choice(["", self._oldest, *[self._newest] * 8])
                query = "?channel=flood" if stream.kind == "stalled" else ""
                returns = f"Last-Event-ID: {cursor}\r\n" if cursor else ""
                stream.socket.send(f"GET /events{query} HTTP/1.1\r\nHost: {HOST}\r\n{returns}\r\n".encode())
                stream.asked = True
                if stream.kind == "stalled":
                    self._selector.unregister(stream.socket)
                else:
                    self._selector.modify(stream.socket, selectors.EVENT_READ, stream)
                return
            data = stream.socket.recv(500 if stream.kind == "half-read" else 262_144)
            stream.head = stream.head or data
            for cursor in re.findall(r"\nid: (\S+)\r?\n", data.decode(errors="replace"))[-1:]:
                self._oldest, self._newest = self._oldest or cursor, cursor
            stream.failed = not data or b" 200 " not in stream.head[:15]
        except OSError:
            stream.failed = True
        if stream.failed or stream.kind == "half-read":
            self._selector.unregister(stream.socket)

    def _end(self, stream: Stream) -> None:
        unanswered = stream.kind != "stalled" and not stream.head and stream.life >= 1
        self.counts["failures"] += stream.failed or unanswered
        if stream.socket in self._selector.get_map():
            self._selector.unregister(stream.socket)
        if stream.kind in {"reset", "stalled"}:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        stream.socket.close()


class Watch(threading.Thread):
    """Has events enqueued, and looks at the server, for so many seconds."""

    def __init__(self, port: int, seconds: float) -> None:
        super().__init__(daemon=True)
        self.looks: list[dict[str, Any]] = []
        self.failures = 0
        self._port = port
        self._turns = int(seconds * BURSTS)

    def run(self) -> None:
        began = time.monotonic()
        for turn in range(1, self._turns + 1):
            time.sleep(max(0.0, began + turn / BURSTS - time.monotonic()))
            try:
                ask(self._port, "POST", "/burst")
                if turn % BURSTS == 0:
                    self.looks.append(ask(self._port, "GET", "/look"))
            except (OSError, http.client.HTTPException, ValueError):
                self.failures += 1


def at_rest(port: int, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is there once all streams have ended, or has not gone by then; at most what was there before."""
    deadline = time.monotonic() + PATIENCE
    last: dict[str, Any] = {}
    while time.monotonic() < deadline:
        look = ask(port, "GET", "/look")
        settled = look["clients"] == 0 and all(look[name] == last.get(name) for name in ("descriptors", "threads"))
        if settled and (before is None or not grown(before, look)):
            return look
        last = look
        time.sleep(0.5)
    return last


def grown(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in ("descriptors", "threads") if after[name] > before[name]]


# -- the verdict -------------------------------------------------------------------------------------------------------


def soak(server: str, transport: str, seconds: float, rate: float) -> int:
    threads = 8
    if transport == "attached":
        threads = int(rate * LIFE[1]) + 20  # more than streams can be open, so that no request waits for one
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        process = start(server, port, threads, folder, transport)
        try:
            while process.poll() is None and socket.socket().connect_ex((HOST, port)):
                time.sleep(0.1)
            warm_up(port, int(rate * LIFE[1]))
            before = at_rest(port)
            load, watch = Load(port), Watch(port, seconds)
            watch.start()
            load.run(rate, seconds)
            watch.join()
            after = at_rest(port, before)
        finally:
            process.terminate()
            process.wait(PATIENCE)
        log = Path(folder, "log").read_text(errors="replace")
    errors = [line for line in log.splitlines() if re.search(r"\b(ERROR|CRITICAL)\b|Traceback", line)]
    quarter = max(1, len(watch.looks) // 4)
    first, last = (
        {name: statistics.median(look[name] for look in looks) for name in SEEN}
        for looks in (watch.looks[:quarter], watch.looks[-quarter:])
    )
    print(f"{server}, {transport}, {seconds:g} s, {rate:g} streams a second\n")
    print(f"{'':14}{'first quarter':>15}{'last quarter':>15}{'at rest before':>16}{'and after':>11}")
    for name in SEEN:
        print(f"{name:14}{first[name]:15,.0f}{last[name]:15,.0f}{before[name]:16,}{after[name]:11,}")
    failures = load.counts["failures"] + watch.failures
    print(f"\n{load.counts['connects']:,} connects, {failures:,} failures; told by the server: ", end="")
    print(", ".join(f"{after[name] - before[name]:,} {name}" for name in ("replays", "gaps", "overflows")), end="")
    print(f"; {len(errors)} errors in the log")
    print("\n".join(log.splitlines()[-40:] if errors else []))
    bad = grown(before, after)
    # Both: under load, servers hold buffers for streams that stall; at rest, these are gone, and a leak is not.
    bad += (
        ["RSS"] if all(new["rss_kib"] > old["rss_kib"] * 1.05 for old, new in ((first, last), (before, after))) else []
    )
    bad += ["clients are left"] if after["clients"] else []
    bad += ["failures"] if failures else []
    bad += ["errors in the log"] if errors else []
    print(f"BAD: {', '.join(bad)}" if bad else "good: nothing grew")
    return bool(bad)


def warm_up(port: int, streams: int) -> None:
    """Open as many streams as there will be, and fill the history, before anything is measured."""
    watch = Watch(port, 4)
    watch.start()
    Load(port).run(rate=streams * 0.6 + 12, seconds=4, life=(2, 2))
    watch.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--rate", type=float, default=50, help="streams opened in a second")
    parser.add_argument("--server", choices=COMMANDS, default="gunicorn")
    parser.add_argument("--transport", choices=("auto", "attached"), default="auto")
    options = parser.parse_args()
    return soak(options.server, options.transport, options.seconds, options.rate)


if __name__ == "__main__":
    sys.exit(main())
