"""A server that sends given bytes in given pieces, each one for itself, and a relay whose connections can be broken."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from sse_batcher.wire import HEADERS

from .servers import HOST
from .waiting import TIMEOUT


class Answer(NamedTuple):
    """A response. Not `chunked`: HTTP/1.0, and the body goes up to the end of the connection.

    A chunked one that is not `complete` ends as if the server had died.
    """

    pieces: Iterable[bytes]
    chunked: bool = True
    complete: bool = True


class Slicer(ThreadingHTTPServer):
    """Answers each GET by what `answer` makes of its path and of how many times it was asked for before, None for 204.

    A piece is sent when the client has taken the one before it out of its socket. ``/stats`` is a page, as it is in
    `serverapp`.
    """

    daemon_threads = False
    request_queue_size = 256

    def __init__(self, answer: Callable[[str, int], Answer | None]) -> None:
        super().__init__((HOST, 0), _Handler)
        self.url = f"http://{HOST}:{self.server_port}"
        self.answer = answer
        self.last_event_ids: dict[str, list[str | None]] = {}
        """What each request for a path had as its ``Last-Event-ID``."""
        self.faults: list[BaseException | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.faults.append(sys.exc_info()[1])


class _Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    timeout = TIMEOUT
    server: Slicer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/stats":
            self.wfile.write(
                b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<!doctype html><link rel=icon href=data:,>"
            )
            return
        earlier = self.server.last_event_ids.setdefault(self.path, [])
        answer = self.server.answer(self.path, len(earlier))
        earlier.append(self.headers["Last-Event-ID"])
        with suppress(ConnectionError):  # the client has left
            if answer is None:
                self.wfile.write(b"HTTP/1.0 204 No Content\r\n\r\n")
            else:
                self._send(answer)

    def _send(self, answer: Answer) -> None:
        headers = (*HEADERS, ("Connection", "close"), *([("Transfer-Encoding", "chunked")] * answer.chunked))
        lines = [f"HTTP/1.{answer.chunked:d} 200 OK", *(f"{name}: {value}" for name, value in headers), "\r\n"]
        with _OtherEnd(self.connection) as client:
            self._send_piece("\r\n".join(lines).encode(), client)
            for piece in answer.pieces:
                self._send_piece(b"%x\r\n%b\r\n" % (len(piece), piece) if answer.chunked else piece, client)
            if answer.chunked and answer.complete:
                self._send_piece(b"0\r\n\r\n", client)

    def _send_piece(self, data: bytes, client: _OtherEnd) -> None:
        self.wfile.write(data)
        deadline = time.monotonic() + TIMEOUT
        while not client.has_read():
            assert time.monotonic() < deadline, "the client does not read"
            # Waits a moment. A client that says something, or nothing more, has left.
            if select.select([self.connection], [], [], 0.000_2)[0]:
                raise ConnectionAbortedError


class _OtherEnd:
    """The socket at the other end of a connection, which is on this machine too. Linux is asked: see sock_diag(7)."""

    def __init__(self, connection: socket.socket) -> None:
        here, there = connection.getsockname(), connection.getpeername()
        question = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 2**32 - 1)
        question += struct.pack("!HH", there[1], here[1])
        question += socket.inet_aton(there[0]) + bytes(12) + socket.inet_aton(here[0]) + bytes(12)
        question += struct.pack("=IQ", 0, 2**64 - 1)  # any interface, any cookie
        header = struct.pack("=IHHII", 16 + len(question), 20, 1, 0, 0)  # SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST
        self._connection = connection
        self._question = header + question
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
        self._netlink.settimeout(TIMEOUT)

    def __enter__(self) -> _OtherEnd:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._netlink.close()

    def has_read(self) -> bool:
        """Whether its program has taken everything out of it. Raises `ConnectionAbortedError` if it is closed."""
        (unacknowledged,) = struct.unpack("i", fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4)))
        return unacknowledged == 0 and self._waiting() == 0

    def _waiting(self) -> int:
        self._netlink.send(self._question)
        reply = self._netlink.recv(4096)
        if struct.unpack_from("=H", reply, 4)[0] == 2:  # NLMSG_ERROR
            code = -struct.unpack_from("=i", reply, 16)[0]
            if code == errno.ENOENT:
                raise ConnectionAbortedError
            raise OSError(code, f"sock_diag: {os.strerror(code)}")
        bytes_waiting: int = struct.unpack_from("=I", reply, 72)[0]  # idiag_rqueue
        return bytes_waiting


@contextmanager
def slicing(answer: Callable[[str, int], Answer | None]) -> Iterator[Slicer]:
    """Run a `Slicer`."""
    with Slicer(answer) as slicer:
        thread = threading.Thread(target=slicer.serve_forever, args=(0.02,), name="slicer")
        thread.start()
        try:
            yield slicer
        finally:
            slicer.shutdown()
            thread.join()
    assert not slicer.faults, slicer.faults


class Relay:
    """Passes on to this port what it gets, until its connections are broken."""

    def __init__(self, port: int) -> None:
        self._target = (HOST, port)
        self._listener = socket.create_server((HOST, 0))
        self.url = f"http://{HOST}:{self._listener.getsockname()[1]}"
        self._whole = threading.Lock()  # held while no connection is let through
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._accepts = threading.Thread(target=self._accept, name="relay")
        self._accepts.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepts.join()
        self._listener.close()
        with self.broken():
            for thread in self._threads:
                thread.join()
        for end in self._sockets:
            end.close()

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Break all connections, and let none through meanwhile."""
        with self._whole:
            for end in self._sockets:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            yield

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with self._whole:
                    server = socket.create_connection(self._target)
                    self._sockets += [client, server]
                    for source, sink in ((client, server), (server, client)):
                        thread = threading.Thread(target=_pass_on, args=(source, sink), name="relay")
                        thread.start()
                        self._threads.append(thread)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
