"""An HTTP proxy that mistreats the streams that it passes on, as some proxies, firewalls and virus scanners do.

Everything else passes unchanged. A thread for each connection.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from .ports import HOST, free_port
from .waiting import TIMEOUT

_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "server", "date"}
"""Headers that are not passed on: those of each connection, and those that the proxy writes itself."""


class Meddling(NamedTuple):
    """What happens to a stream."""

    version: str = "HTTP/1.1"
    """The version of HTTP of each answer."""
    drops_comments: bool = False
    holds: int = 0
    """The proxy passes nothing on before it has so many bytes."""
    cuts_after: float = float("inf")
    """The proxy ends each stream after so many seconds."""
    delays_first: float = 0.0
    """The first request waits for so many seconds."""


@contextmanager
def meddling_proxy(port: int, meddling: Meddling) -> Iterator[str]:
    """Run the proxy in front of the server at this port. Yields the proxy's URL."""

    class Handler(_Handler):
        protocol_version = meddling.version

    Handler.upstream, Handler.meddling, Handler.delays = port, meddling, [meddling.delays_first]
    with _Server((HOST, free_port()), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="meddling proxy")
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    block_on_close = False  # a stream ends at the next block after its client has left, or with the server behind it

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: the client or the server has gone."""


class _Handler(BaseHTTPRequestHandler):
    upstream: int
    meddling: Meddling
    delays: list[float]  # what is left of them
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.delays:
            threading.Event().wait(self.delays.pop())
        length = int(self.headers.get("Content-Length", 0))
        connection = http.client.HTTPConnection(HOST, self.upstream, timeout=TIMEOUT)
        try:
            connection.request(self.command, self.path, self.rfile.read(length), dict(self.headers.items()))
            self._answer(connection.getresponse())
        finally:
            connection.close()

    do_HEAD = do_OPTIONS = do_POST = do_GET

    def _answer(self, response: http.client.HTTPResponse) -> None:
        is_stream = response.headers.get_content_type() == "text/event-stream"
        self.send_response(response.status, response.reason)
        for name, value in response.headers.items():
            if name.lower() not in _OF_A_CONNECTION:
                self.send_header(name, value)
        if not is_stream:
            self.end_headers()
            self.wfile.write(response.read())
            return
        is_chunked = self.meddling.version == "HTTP/1.1"
        self.send_header(*(("Transfer-Encoding", "chunked") if is_chunked else ("Connection", "close")))
        self.end_headers()
        self.close_connection = True
        for piece in self._pieces(response):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """What is passed on of a stream, piece by piece."""
        end = time.monotonic() + self.meddling.cuts_after
        held = b""
        for block in _blocks(response):
            if self.meddling.drops_comments and block.startswith(b":"):
                continue
            held += block
            if len(held) > self.meddling.holds:
                yield held
                held = b""
            if time.monotonic() >= end:
                return
        if held:
            yield held

    def log_message(self, *args: Any) -> None:
        """Nothing."""


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The blocks of a stream, and the comments between them, as soon as each is complete."""
    block = b""
    with suppress(http.client.IncompleteRead):
        while line := response.readline():
            block += line
            if line == b"\n" or block.startswith(b":"):
                yield block
                block = b""
