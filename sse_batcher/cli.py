"""The command line: `python -m sse_batcher` serves a demo, one simulated hub with a batched and an unbatched stream.

The main thread accepts and looks for signals; each request has its own thread.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import re
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.serving import WSGIRequestHandler, make_server

from .demo import ACTIONS, SIDES, Demo
from .errors import SSEBatcherError
from .wsgi import stream

# A browser cannot be made to send this from a foreign page without asking us first (CORS), and we never agree.
MARK = ("X-Requested-With", "sse_batcher")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_TAB = re.compile(r"[0-9a-f]{32}\Z")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, `sys.argv` where `argv` is None. Returns the exit code.

    For a main thread that ends afterwards: it takes over SIGINT and SIGTERM for good.
    """
    options = _parser().parse_args(argv)
    return serve(options.host, options.port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sse_batcher",
        description="Show in a browser what batching saves: a simulated hub, and its events batched and not.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8000, help="the port, 0 for any free one (default: %(default)s, or a free one)"
    )
    return parser


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


# -- the server ------------------------------------------------------------------------------------------------------


def serve(host: str, port: int) -> int:
    """Serve the demo until SIGINT or SIGTERM. Returns the exit code: 1 where it cannot listen."""
    try:
        listener = _listen(host, port)
    except OSError as error:
        _say(f"cannot listen on {host}, port {port}: {error.strerror}", sys.stderr)
        return 1
    # No KeyboardInterrupt, which may come in the middle of anything; a second Ctrl-C changes nothing. SIGINT is named
    # because a shell starts background jobs with it ignored.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    with contextlib.closing(Demo()) as demo, listener:
        app = create_demo(demo)
        with make_server(host, port, app, True, request_handler=_Handler, fd=listener.fileno()) as server:
            _introduce(listener, port)
            # A signal may reach another thread and not wake this one, so this one looks.
            server.timeout = 0.1
            while not signals:
                server.handle_request()
    return 0


class _Handler(WSGIRequestHandler):
    """Keeps no access log, and gives up on a client that takes nothing for a second, so that it delays no ending."""

    timeout = 1.0

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def _listen(host: str, port: int) -> socket.socket:
    # By ourselves: werkzeug ends the process where the port is taken.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return socket.create_server((host, 0), family=family)


def _introduce(listener: socket.socket, wanted: int) -> None:
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if wanted not in (0, port):
        _say(f"port {wanted} is taken, so this is port {port}")
    if not address.is_loopback:
        _say("careful: everybody who can reach this address can press the buttons")
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    _say(f"http://{f'[{host}]' if address.version == 6 else host}:{port}/  (Ctrl-C ends it)")


def _say(line: str, file: Any = None) -> None:
    print(line, file=file, flush=True)


# -- the pages -------------------------------------------------------------------------------------------------------


def create_demo(demo: Demo) -> Flask:
    """The app: the page, its two streams, what they were sent, and what the buttons do."""
    app = Flask(__name__)

    @app.before_request
    def _only_our_page_changes_anything() -> None:
        if request.method not in {"GET", "HEAD", "OPTIONS"} and request.headers.get(MARK[0]) != MARK[1]:
            abort(403)

    @app.after_request
    def _add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(SSEBatcherError)
    def _closing(error: SSEBatcherError) -> tuple[str, int]:
        return str(error), 503

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("demo.html")

    @app.get(f"/<any({','.join(SIDES)}):side>")
    def events(side: str) -> Response:
        tab = _tab()
        status, headers, body = stream(demo.managers[side], request.environ, ["default"])
        return Response(demo.counts.count(tab, side, body), status=status, headers=headers)

    @app.get("/counts")
    def read_counts() -> dict[str, dict[str, int]]:
        return demo.counts.read(_tab())

    @app.delete("/counts")
    def clear_counts() -> tuple[str, int]:
        demo.counts.clear(_tab())
        return "", 204

    @app.post(f"/fire/<any({','.join(ACTIONS)}):action>")
    def fire(action: str) -> tuple[str, int]:
        demo.fire(action)
        return "", 204

    return app


def _tab() -> str:
    tab = request.args.get("tab", "")
    if not _TAB.match(tab):
        abort(400, "tab must be 32 hex digits")
    return tab
