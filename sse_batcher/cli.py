"""The command line: `python -m sse_batcher` serves a demo; its commands measure and watch.

In the demo, the main thread accepts and looks for signals; each request has its own thread.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import click
from flask import Flask, Response, abort, request
from werkzeug.serving import WSGIRequestHandler, make_server

from .commands.arguments import FiniteRange, is_argument, request_of, request_options, tail_options
from .commands.ending import INTERRUPTED, command
from .commands.tail import Printer, tail_url
from .commands.terminal import Terminal, output
from .demo import report
from .demo.scenarios import SCENARIOS
from .demo.simulation import Demo, Setting
from .doctor.command import doctor
from .errors import ClosedError
from .remote.message import Request
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
    try:
        status: int | None = _commands.main(argv, "python -m sse_batcher", standalone_mode=False)
    except click.ClickException as error:
        error.show(output(sys.stderr))
        return error.exit_code
    return status or 0


@click.group(invoke_without_command=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8000,
    show_default=True,
    help="The port, 0 for any free one. If it is taken, the demo takes a free one.",
)
@click.pass_context
@command
def _commands(context: click.Context, host: str, port: int) -> None:
    """Show what batching saves, in a browser: a simulated hub, and its events batched and not.

    With a command: look at a site from outside.
    """
    if context.invoked_subcommand is None:
        serve(host, port)
    elif is_argument("host") or is_argument("port"):
        raise click.UsageError("--host and --port are for the demo, which has no command")


@_commands.command("report")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command
def _report_command(as_json: bool) -> None:
    """Measure what batching saves, without a browser, and print a table. Takes a minute."""
    render = report.as_json if as_json else report.as_table
    terminal = Terminal()
    try:
        text = render(report.measure(serving, progress=terminal.progress))
    except report.MeasuringError as error:
        raise click.ClickException(f"nothing was measured: {error}") from None
    finally:
        terminal.end()
    terminal.write(text)


@_commands.command("tail")
@click.argument("url")
@tail_options
@request_options
@command
def _tail_command(
    url: str,
    channels: tuple[str, ...],
    types: tuple[str, ...],
    cursor: str,
    full: bool,
    as_json: bool,
    headers: tuple[str, ...],
    token: str | None,
) -> None:
    """Show the events of a stream as they come, like tail -f: one line each. Ctrl-C ends it.

    URL is that of the stream, such as http://localhost:8000/events.
    """
    terminal = Terminal()
    printer = Printer(terminal, as_json=as_json, full=full, types=types)
    tail_url(lambda after: request_of(url, headers, token, channels, after), cursor, printer, terminal)


_commands.add_command(doctor)


@_commands.command("load")
@click.argument("url")
@click.option("--clients", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Streams to open.")
@click.option("--rate", type=FiniteRange(0, 1_000_000, min_open=True), help="Open at most so many a second.")
@click.option(
    "--seconds",
    type=FiniteRange(0),
    default=10.0,
    show_default=True,
    help="How long to measure after the last stream was opened.",
)
@click.option("--channel", "channels", metavar="CHANNEL", multiple=True, help="A channel. Can be repeated.")
@request_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command
def _load_command(
    url: str,
    clients: int,
    rate: float | None,
    seconds: float,
    channels: tuple[str, ...],
    headers: tuple[str, ...],
    token: str | None,
    as_json: bool,
) -> None:
    """Open many streams of one site, and measure what they get. Only against a site of your own: it is an attack on any
    other.

    URL is that of the stream, such as http://localhost:8000/events. All clients ask for the same. None comes back after
    its stream has ended. Something has to send events meanwhile: this command sends none.

    "delay after the first" is the time from the moment at which the first client had a frame until each client had it
    (0 for the first one). It shows how the server spreads a frame over its clients, and not how long the frame took to
    the first one. It includes the time that this command takes to read, on the machine on which it runs.

    "since batch closed" is for batches, which have the server's time: it is as right as the two clocks agree.

    "lost frames" are those that another client got while this one was open. Ctrl-C prints what was measured so far.
    """
    context = click.get_current_context()
    context.exit(_load(request_of(url, headers, token, channels), clients, rate, seconds, as_json))


def _load(request: Request, clients: int, rate: float | None, seconds: float, as_json: bool) -> int:
    from .commands.load import Load, raise_limit  # noqa: PLC0415  # not on Windows, where the demo works
    from .commands.load_tally import as_table  # noqa: PLC0415

    terminal = Terminal()
    status = 0
    load = Load(request, clients, rate, seconds, terminal.progress, terminal.progress_seconds)
    with contextlib.closing(load):
        try:
            raise_limit(clients)
            load.run()
        except KeyboardInterrupt:
            status = INTERRUPTED
        result = load.result()
        terminal.end()
        for line in [json.dumps(result, indent=2)] if as_json else as_table(result):
            terminal.write(line)
    return status or int(not result["clients"]["opened"])


# -- the server ------------------------------------------------------------------------------------------------------


def serve(host: str, port: int) -> None:
    """Serve the demo until SIGINT or SIGTERM. Raises `click.ClickException` if it cannot listen."""
    try:
        listener = _listen(host, port)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    # No KeyboardInterrupt, which may be raised anywhere; a second Ctrl-C changes nothing. SIGINT is handled explicitly,
    # because a shell starts background jobs with it ignored.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    with contextlib.closing(Demo()) as demo, listener:
        app = create_demo(demo)
        with make_server(host, port, app, True, request_handler=Handler, fd=listener.fileno()) as server:
            _introduce(listener, port)
            # A signal may reach another thread and not wake this one, so this one checks again and again.
            server.timeout = 0.1
            while not signals:
                server.handle_request()


class Handler(WSGIRequestHandler):
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
    with make_server("127.0.0.1", 0, app, True, request_handler=Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="sse_batcher server")
        thread.start()
        try:
            yield "127.0.0.1", server.port
        finally:
            server.shutdown()
            thread.join()


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
    terminal = Terminal()
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if wanted not in (0, port):
        terminal.write(f"port {wanted} is taken, so this is port {port}")
    if not address.is_loopback:
        terminal.write("careful: anyone who can reach this address can press the buttons")
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    terminal.write(f"http://{f'[{host}]' if address.version == 6 else host}:{port}/  (Ctrl-C ends it)")


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
