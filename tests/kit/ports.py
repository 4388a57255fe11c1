"""Ports for servers in tests. Two test runs at the same time never pick the same one.

A port that the system chooses is free only until it is released, and then any program may get it before the server
binds it. So each process of pytest has a block of ports below those that the system chooses. It holds the block by
listening on the block's first port, until the process ends.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from contextlib import suppress

HOST = "127.0.0.1"
_FIRST, _END, _BLOCK = 20_000, 32_700, 254  # Linux chooses from 32,768 on

_lock = threading.Lock()  # guards the block and the place in it
_holder: tuple[int, socket.socket] | None = None  # the process that has the block, and its first port
_ports = itertools.cycle(range(1))


def free_port() -> int:
    """Return a port of the loopback interface that no other program listens on. It is not given out again soon."""
    with _lock:
        if _holder is None or _holder[0] != os.getpid():  # a forked process needs a block of its own
            _take_a_block_locked()
        for port in itertools.islice(_ports, _BLOCK):
            with suppress(OSError), socket.create_server((HOST, port)):
                return port
    raise AssertionError("all ports of this process are in use")


def _take_a_block_locked() -> None:
    global _holder, _ports
    for first in range(_FIRST, _END - _BLOCK, _BLOCK):
        with suppress(OSError):
            _holder = os.getpid(), socket.create_server((HOST, first))
            _ports = itertools.cycle(range(first + 1, first + _BLOCK))
            return
    raise AssertionError(f"all ports from {_FIRST} to {_END} are in use")
