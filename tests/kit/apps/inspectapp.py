"""The app that shows what `inspect_server` finds, and writes a file as soon as its server stops."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flask import Flask, Response, request

from sse_batcher.transports.server import inspect_server

LONGEST = 15.0
"""How long a response waits for the server's end, in seconds."""

app = Flask(__name__)


@app.get("/")
def look() -> Response:
    return Response(_look(request.environ), mimetype="text/plain")


def _look(environ: dict[str, Any]) -> Iterator[str]:
    server = inspect_server(environ)
    peer = None
    if server.fd is not None:
        with socket.socket(fileno=os.dup(server.fd)) as connection:
            peer = connection.getpeername()
    yield json.dumps([server.name, server.threads, peer, server.is_stopping()]) + "\n"
    deadline = time.monotonic() + LONGEST
    while not server.is_stopping() and time.monotonic() < deadline:
        time.sleep(0.02)
    if server.is_stopping():
        file = Path("stopped.tmp")
        file.write_text(str(time.monotonic()))
        file.rename("stopped")
