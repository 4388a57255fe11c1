"""A server of one connection that answers with bytes of the test's choice, for clients of HTTP."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .waiting import TIMEOUT

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


class Scripted(NamedTuple):
    url: str
    heads: list[bytes]
    """The requests that came."""


@contextmanager
def scripted_server(*scripts: Callable[[socket.socket], None]) -> Iterator[Scripted]:
    """Answer one connection after the other: each script gets its connection once the head of a request has come."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        server = Scripted(f"http://127.0.0.1:{listener.getsockname()[1]}/events", [])

        def serve() -> None:
            for script in scripts:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(TIMEOUT)
                    head = b""
                    while b"\r\n\r\n" not in head and (more := connection.recv(65_536)):
                        head += more
                    server.heads.append(head)
                    script(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server
        finally:
            thread.join(TIMEOUT)
        assert not thread.is_alive(), "the client has left out a connection, or has not closed one"


def sending(*pieces: bytes) -> Callable[[socket.socket], None]:
    """Return a script that sends these, one after the other, and closes the connection."""

    def send(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)

    return send


def resetting(piece: bytes, go: threading.Event) -> Callable[[socket.socket], None]:
    """Return a script that sends this, and breaks the connection once `go` is set."""

    def send(connection: socket.socket) -> None:
        connection.sendall(piece)
        assert go.wait(TIMEOUT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return send


def holding(piece: bytes) -> Callable[[socket.socket], None]:
    """Return a script that sends this, and then nothing until the client closes the connection."""

    def send(connection: socket.socket) -> None:
        connection.sendall(piece)
        connection.recv(1)

    return send
