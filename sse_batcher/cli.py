"""The command line: `python -m sse_batcher` serves a demo, and with `--report` measures what batching saves.

In the demo, the main thread accepts and looks for signals; each request has its own thread.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.serving import WSGIRequestHandler, make_server

from .demo import report
from .demo.scenarios import SCENARIOS
from .demo.simulation import Demo, Setting
from .errors import ClosedError
from .wsgi import script, stream

# A browser does not send this from a foreign page without asking this server first (CORS), which never agrees.
MARK = ("X-Requested-With", "sse_batcher")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, `sys.argv` if `argv` is None. Returns the exit code.

    For a main thread that ends afterwards: the demo takes over SIGINT and SIGTERM for good.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.json and not options.report:
        parser.error("--json is a form of the report: add --report")
    if options.report:
        return _report(report.as_json if options.json else report.as_table)
    return serve(options.host, options.port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sse_batcher",
        description="Show what batching saves, in a browser: a simulated hub, and its events batched and not.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8000, help="the port, 0 for any free one (default: %(default)s, or a free one)"
    )
    parser.add_argument(
        "--report", action="store_true", help="measure it instead, without a browser, and print a table (a minute)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


# -- the server ------------------------------------------------------------------------------------------------------


def serve(host: str, port: int) -> int:
    """Serve the demo until SIGINT or SIGTERM. Returns the exit code: 1 if it cannot listen."""
    try:
        listener = _listen(host, port)
    except OSError as error:
        _say(f"cannot listen on {host}, port {port}: {error.strerror}", sys.stderr)
        return 1
    # No KeyboardInterrupt, which may be raised anywhere; a second Ctrl-C changes nothing. SIGINT is handled explicitly,
    # because a shell starts background jobs with it ignored.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    with contextlib.closing(Demo()) as demo, listener:
        app = create_demo(demo)
        with make_server(host, port, app, True, request_handler=_Handler, fd=listener.fileno()) as server:
            _introduce(listener, port)
            # A signal may reach another thread and not wake this one, so this one checks again and again.
            server.timeout = 0.1
            while not signals:
                server.handle_request()
    return 0


class _Handler(WSGIRequestHandler):
    """Writes no access log, and drops a client that takes nothing for a second, so that it does not delay the end.

    It sends a frame and what HTTP puts around it in one piece and without delay, as servers for production do.
    """

    timeout = 1.0
    wbufsize = -1
    disable_nagle_algorithm = True

    def finish(self) -> None:
        # Closing flushes. If the client is gone, the stream has already raised this error.
        for file in (self.wfile, self.rfile):
            with contextlib.suppress(OSError):
                file.close()

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(app: report.WSGIApp) -> Iterator[tuple[str, int]]:
    """Serve an app on a thread, for the report."""
    with make_server("127.0.0.1", 0, app, True, request_handler=_Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="sse_batcher server")
        thread.start()
        try:
            yield "127.0.0.1", server.port
        finally:
            server.shutdown()
            thread.join()


def _report(render: Callable[[Iterable[report.Row]], str]) -> int:
    """Measure, and print the results on stdout and the progress on stderr."""
    begin, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")

    def progress(line: str) -> None:
        sys.stderr.write(f"{begin}{line}{end}")
        sys.stderr.flush()

    try:
        text = render(report.measure(serving, progress=progress))
    except report.MeasuringError as error:
        progress(f"nothing was measured: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    progress("")
    _say(text)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    # Not by werkzeug, which ends the process if the port is taken.
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
        _say("careful: anyone who can reach this address can press the buttons")
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    _say(f"http://{f'[{host}]' if address.version == 6 else host}:{port}/  (Ctrl-C ends it)")


def _say(line: str, file: Any = None) -> None:
    print(line, file=file, flush=True)


# -- the pages -------------------------------------------------------------------------------------------------------


def create_demo(demo: Demo) -> Flask:
    """The app: the page, its streams, and what the buttons do."""
    app = Flask(__name__, static_folder="demo/static")

    @app.before_request
    def _only_our_page_changes_anything() -> None:
        if request.method not in {"GET", "HEAD", "OPTIONS"} and request.headers.get(MARK[0]) != MARK[1]:
            abort(403)

    @app.after_request
    def _add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(ClosedError)
    def _closing(error: ClosedError) -> tuple[str, int]:
        return str(error), 503

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("demo.html")

    @app.get("/events")
    def events() -> Response:
        setting = Setting(_argument("window", range(1, 1_001)), _argument("size", range(1, 201)))
        status, headers, body = stream(demo.manager(setting), request.environ)
        return Response(body, status=status, headers=headers)

    @app.get("/events/sse-batcher.js")
    def module() -> Response:
        status, headers, body = script(request.environ)
        return Response(body, status=status, headers=headers)

    @app.post(f"/play/<any({','.join(SCENARIOS)}):name>")
    def play(name: str) -> tuple[str, int]:
        demo.play(SCENARIOS[name])
        return "", 204

    return app


def _argument(name: str, allowed: range) -> int:
    text = request.args.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) in allowed):
        abort(400, f"{name} must be a whole number from {allowed.start} to {allowed.stop - 1}")
    return int(text)
