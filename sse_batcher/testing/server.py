"""A real server for a test, with threads: for browsers, and for clients that need a URL.

`live_server` runs in the test's thread, and its server in threads of its own.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import UsageError
from ..manager import SSEManager
from ..manager import managers as all_managers
from ..manager_state import existing_process_of
from ..runtime.worker import Deadline
from .stage import current_stage

HOST = "127.0.0.1"
END_SECONDS = 5.0
"""How long the end may take, in seconds."""


@contextmanager
def live_server(app: Callable[..., Any]) -> Iterator[str]:
    """Serve a WSGI app on a free port of this machine, in real time, and return its URL, without a slash at its end.

    At the end of the block, open streams end with ``sse_bye``, as when a server is restarted, and all connections are
    closed. The managers go on. These are those of a Flask app; of another app, all of this process. Raises `UsageError`
    if time stands still in this test, because of `record`, `open_stream` or their fixtures, and for what is no app.

    >>> with live_server(app) as url:
    ...     browser.get(url + "/board")
    """
    from werkzeug.serving import WSGIRequestHandler, make_server  # noqa: PLC0415  # only such tests need it

    _check_use(app)
    connections: set[socket.socket] = set()
    answering: set[socket.socket] = set()  # those that serve a request
    threads: set[threading.Thread] = set()

    class Handler(WSGIRequestHandler):
        """Notes its connection and its thread, and logs no requests."""

        def setup(self) -> None:
            connections.add(self.request)
            threads.add(threading.current_thread())
            super().setup()

        def run_wsgi(self) -> None:
            answering.add(self.request)
            try:
                super().run_wsgi()
            finally:
                answering.discard(self.request)

        def finish(self) -> None:
            super().finish()
            connections.discard(self.request)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    server = make_server(HOST, 0, app, threaded=True, request_handler=Handler)
    accepting = threading.Thread(target=server.serve_forever, args=(0.01,), name="live_server", daemon=True)
    accepting.start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        managers = _managers_of(app)
        deadline = Deadline(END_SECONDS)
        # Before the server ends: the watcher would see that it does, and end the streams later than the block.
        # Only those: the others must not begin, in real time, because of a server that has nothing to do with them.
        used = [process for process in map(existing_process_of, managers) if process is not None]
        ended = [process for process in used if not process.is_closed]
        for process in ended:
            process.end_streams()
        for process in ended:
            process.hub.wait_until_left(deadline.left())
        server.shutdown()
        accepting.join(deadline.left())
        _shut_down(connections - answering)
        for thread in list(threads):
            thread.join(deadline.left())
        _shut_down(connections)  # of requests that take too long
        server.server_close()
        for process in ended:
            process.hub.reopen(0)


def _check_use(app: object) -> None:
    if not callable(app):
        raise UsageError(
            f"live_server() takes a Flask app, or another WSGI app, not {type(app).__name__}: for an SSE or a test "
            f"client, give its app"
        )
    if current_stage() is not None:
        raise UsageError(
            "a live server needs real time, which stands still in record(), open_stream() and the fixtures sse_events, "
            "sse_clock and sse_stream: leave them out of this test"
        )


def _shut_down(connections: set[socket.socket]) -> None:
    for connection in list(connections):
        with suppress(OSError):  # closed meanwhile
            connection.shutdown(socket.SHUT_RDWR)


def _managers_of(app: object) -> list[SSEManager]:
    """Return the managers of a Flask app with our extension; otherwise all."""
    extensions = getattr(app, "extensions", None)
    part = extensions.get("sse_batcher.part") if isinstance(extensions, dict) else None
    return all_managers() if part is None else [part.manager]
