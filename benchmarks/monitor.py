"""What an open monitor costs the server: `python benchmarks/monitor.py --clients 10000 --seconds 60`.

gunicorn (gthread, one worker, detached streams) serves the app below, to which this program opens so many streams, each
with a user and a channel of its own beside a shared one. It measures the CPU time of the server without a monitor, with
one that asks as the page does, and without one again. The difference is the monitor's. No events are sent meanwhile,
only heartbeats, since sending to so many clients takes far more than what is measured. Linux only. Needs gunicorn, and
`ulimit -n` above the number of streams.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flask import Flask, request

from sse_batcher import SSE

HOST = "127.0.0.1"
COMMAND = "-m gunicorn -k gthread --workers=1 --threads=8 --backlog=1024 --bind={host}:{port} monitor:create_app()"
TICK = os.sysconf("SC_CLK_TCK")


def create_app() -> Flask:
    app = Flask(__name__)
    sse = SSE(app)
    sse.authorize(lambda channels: channels)
    sse.identify(lambda: request.args.get("user", None, int))
    sse.allow_monitor(lambda: True)
    for number in range(100):
        sse.enqueue("tick", {"number": number})  # what the monitor lists as the newest
    return app


def ask(port: int, path: str) -> tuple[bytes, float]:
    """Return the body of an answer, and the seconds until it was there."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    began = time.perf_counter()
    connection.request("GET", path)
    with connection.getresponse() as response:
        body = response.read()
        assert response.status == 200, f"{path}: {response.status}"
    connection.close()
    return body, time.perf_counter() - began


def opened(port: int, number: int) -> socket.socket:
    """Open a stream, and return its connection, on which the first block has come."""
    connection = socket.create_connection((HOST, port), timeout=60)
    query = f"channel=default&channel=own-{number}&user={number}"
    connection.sendall(f"GET /events?{query} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    received = b""
    while b"sse_open" not in received:
        part = connection.recv(4096)
        assert part, f"stream {number} was refused: {received!r}"
        received += part
    connection.setblocking(False)
    return connection


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that the children of this process have used."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = stat.read_text().rpartition(")")[2].split()
        if int(fields[1]) == pid:
            total += int(fields[11]) + int(fields[12])
    return total / TICK


def watch(port: int, pid: int, seconds: float, *, with_monitor: bool) -> dict[str, float]:
    """Ask as the page does, or not. Return the share of a core that the server has used, and what was seen."""
    begin, cpu = time.monotonic(), cpu_seconds(pid)
    next_question = begin
    answers, longest, size = 0, 0.0, 0
    while (now := time.monotonic()) < begin + seconds:
        if with_monitor and now >= next_question:
            body, took = ask(port, "/events/monitor/data")
            answers, longest, size = answers + 1, max(longest, took), len(body)
            next_question = time.monotonic() + json.loads(body)["next"]
        time.sleep(0.05)
    share = (cpu_seconds(pid) - cpu) / (time.monotonic() - begin)
    return {"share": share, "answers": answers, "longest": longest, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the three measurements")
    asked = parser.parse_args()
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    root = Path(__file__).parents[1]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
    with tempfile.TemporaryDirectory() as folder:
        environ["XDG_RUNTIME_DIR"] = folder
        command = [sys.executable, *COMMAND.format(host=HOST, port=port).split()]
        server = subprocess.Popen(command, env=environ, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            time.sleep(2)
            streams = [opened(port, number) for number in range(asked.clients)]
            time.sleep(2)
            rows = [watch(port, server.pid, asked.seconds, with_monitor=shown) for shown in (False, True, False)]
            del streams
        finally:
            server.terminate()
            server.wait()
    before, during, after = rows
    print(f"{asked.clients:,} streams; share of a core that the server uses:")
    print(f"  without a monitor  {before['share']:.2%}, and again {after['share']:.2%}")
    print(f"  with one open      {during['share']:.2%}")
    print(f"  the monitor        {during['share'] - (before['share'] + after['share']) / 2:.2%}")
    print(f"  {during['answers']} answers of {during['bytes']:,} bytes, the longest took {during['longest']:.3f} s")


if __name__ == "__main__":
    main()
