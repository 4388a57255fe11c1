"""A server of `apps.leavingapp`, and clients that look inside it, read byte by byte and leave."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .servers import (
    Server,
    running,
)
from .waiting import wait_until


@contextmanager
def serving_app(command: tuple[str, ...], folder: Path, *, lasting: float = 0.0, **config: Any) -> Iterator[Server]:
    """Run a server with `leavingapp`. `config` is the app's, without its prefix.

    `lasting` says for how many seconds the test keeps it busy, beside what any test takes.
    """
    command = tuple(argument.replace("serverapp", "leavingapp") for argument in command)
    settings = {f"SSE_{name.upper()}": value for name, value in config.items()}
    with running(command, folder, CONFIG=json.dumps(settings)) as server, server.watched(lasting):
        yield server


def process_of(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(server.request("GET", "/process"))
    return found


def wait_for_clients(server: Server, number: int) -> None:
    wait_until(lambda: server.stats()["clients"] == number, f"{number} clients are there")


def wait_for_transports(server: Server, attached: int, detached: int) -> None:
    """The first block comes before a connection has changed hands."""
    wanted = {"attached": attached, "detached": detached}
    wait_until(lambda: server.stats()["clients_by_transport"] == wanted, f"clients are {wanted}")


def reset(connection: socket.socket) -> None:
    """Close it without a good-bye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_until(connection: socket.socket, mark: bytes) -> None:
    """Byte by byte, so that what follows is not read."""
    text = b""
    while not text.endswith(mark):
        byte = connection.recv(1)
        assert byte, f"ended before {mark!r}: {text!r}"
        text += byte


ENDING = {"sse_batcher-watcher", "sse_batcher-loop"}
