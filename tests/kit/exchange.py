"""A connection over TCP of which the test has both ends, and the descriptors of this process."""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress

from .waiting import TIMEOUT


def descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself
            found.append(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
    return sorted(found)


class Exchange:
    """A connection over TCP: the server's end, by its number, and the client's."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname(), timeout=TIMEOUT)
            server, _ = listener.accept()
        server.settimeout(None)
        self.fd = server.detach()
        self.inode = os.fstat(self.fd).st_ino
        self.unsent = 0
        """How many bytes another thread of the server has still to write."""

    def close(self) -> None:
        self.client.close()
        with suppress(OSError):
            os.close(self.fd)

    def write(self, text: bytes) -> None:
        """As the server does, which knows the number and nothing else."""
        assert os.write(self.fd, text) == len(text)

    def heard(self, size: int) -> bytes:
        """Return the next so many bytes that the client gets, or fewer if the connection ends."""
        heard = b""
        while len(heard) < size and (more := self.client.recv(size - len(heard))):
            heard += more
        return heard

    def hears_nothing(self) -> bool:
        return not select.select([self.client], [], [], 0)[0]

    def is_restored(self) -> bool:
        return os.fstat(self.fd).st_ino == self.inode

    def goes_on(self, written: bytes) -> bool:
        """Whether the client has got exactly this, and the server can go on, in both directions."""
        self.write(b"and more")
        self.client.sendall(b"hello")
        heard = self.heard(len(written) + 8)
        return self.is_restored() and heard == written + b"and more" and os.read(self.fd, 5) == b"hello"
