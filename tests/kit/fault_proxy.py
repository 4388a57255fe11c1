"""A TCP proxy that mistreats what it forwards, for each connection in its own way.

Two threads for each connection, one for each direction; only what goes to the client is mistreated.
"""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass

HOST = "127.0.0.1"
BUFFER = 4096
"""Bytes that a socket may hold: a client that stalls is soon felt by the server."""


@dataclass(frozen=True)
class Faults:
    """What happens on the way to a client. Bytes are counted from the first one of the answer.

    `latency`: seconds before each piece. `slices`: the most bytes in a piece. `bandwidth`: bytes in a second.
    `cut_after`: the connection ends after so many bytes; with `reset` by an RST. `hold_after`: half-open, nothing
    comes any more and nothing ends.
    """

    latency: float = 0.0
    slices: int = BUFFER
    bandwidth: float | None = None
    cut_after: int | None = None
    reset: bool = False
    hold_after: int | None = None


class FaultProxy:
    """A proxy on a free port, for as long as it is a context. `connect` gives a client its connection."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self._ended = threading.Event()
        self._lock = threading.Lock()  # guards the two below
        self._faults: dict[int, Faults] = {}  # by the client's port
        self._pumps: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, name="fault proxy")

    def __enter__(self) -> FaultProxy:
        self._acceptor.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Clients have to be gone, and the server's streams end by themselves or with their clients."""
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for pump in self._pumps:
            pump.join()

    def connect(self, faults: Faults, timeout: float) -> socket.socket:
        """A connection through the proxy."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        client.settimeout(timeout)
        client.bind((HOST, 0))
        with self._lock:
            self._faults[client.getsockname()[1]] = faults
        with suppress(ConnectionResetError):  # so soon: whatever is done with the connection fails in the same way
            client.connect(self._listener.getsockname())
        return client

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, (_, port) = self._listener.accept()
            except OSError:
                return
            server = socket.socket()
            for each in (client, server):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.connect(self._target)
            with self._lock:
                faults = self._faults.pop(port)
                self._pumps = [pump for pump in self._pumps if pump.is_alive()]
                pump = threading.Thread(target=self._serve, args=(client, server, faults), name="fault proxy")
                self._pumps.append(pump)
                pump.start()

    def _serve(self, client: socket.socket, server: socket.socket, faults: Faults) -> None:
        gone = threading.Event()  # the client, or the whole proxy
        requests = threading.Thread(target=self._requests, args=(client, server, gone), name="fault proxy")
        requests.start()
        with suppress(OSError):
            self._answer(client, server, faults, gone)
        if faults.reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for each in (client, server):
            with suppress(OSError):
                if not (faults.reset and each is client):  # this would send a FIN first
                    each.shutdown(socket.SHUT_RDWR)
        if faults.reset:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)  # wakes the other thread
        requests.join()
        client.close()
        server.close()

    def _answer(self, client: socket.socket, server: socket.socket, faults: Faults, gone: threading.Event) -> None:
        sent = 0
        ends = [limit for limit in (faults.cut_after, faults.hold_after) if limit is not None]
        end = min(ends) if ends else None
        while end is None or sent < end:
            piece = server.recv(faults.slices if end is None else min(faults.slices, end - sent))
            if not piece:
                return
            pause = faults.latency + (len(piece) / faults.bandwidth if faults.bandwidth else 0)
            if pause and gone.wait(pause):
                return
            client.sendall(piece)
            sent += len(piece)
        if faults.hold_after == end:
            gone.wait()

    @staticmethod
    def _requests(client: socket.socket, server: socket.socket, gone: threading.Event) -> None:
        with suppress(OSError):
            while piece := client.recv(BUFFER):
                server.sendall(piece)
        gone.set()
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # where the client is gone, the server is not to wait
