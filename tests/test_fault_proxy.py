"""The proxy mistreats as it says, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .kit.fault_proxy import HOST, FaultProxy, Faults
from .kit.waiting import TIMEOUT

ANSWER = bytes(range(100))


@contextmanager
def through(faults: Faults) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's socket, and the server's, which has got one byte and answered with a hundred."""
    with socket.create_server((HOST, 0)) as listener, FaultProxy(listener.getsockname()) as proxy:
        with proxy.connect(faults, TIMEOUT) as client:
            client.sendall(b"?")
            server, _ = listener.accept()
            with server:
                server.settimeout(TIMEOUT)
                assert server.recv(10) == b"?"
                server.sendall(ANSWER)
                yield client, server


def received(client: socket.socket, size: int = len(ANSWER)) -> list[bytes]:
    """The pieces of the answer, up to its end or so many bytes."""
    pieces: list[bytes] = []
    while sum(map(len, pieces)) < size and (piece := client.recv(4096)):
        pieces.append(piece)
    return pieces


def test_without_faults_all_arrives_and_an_end_is_passed_on() -> None:
    with through(Faults()) as (client, server):
        assert b"".join(received(client)) == ANSWER
        client.close()
        assert server.recv(10) == b""


@pytest.mark.parametrize(
    "faults", [Faults(latency=0.05), Faults(bandwidth=2000), Faults(slices=50, latency=0.025)], ids=str
)
def test_what_is_delayed_arrives_whole_and_later(faults: Faults) -> None:
    began = time.monotonic()
    with through(faults) as (client, _):
        assert b"".join(received(client)) == ANSWER
        assert time.monotonic() - began >= 0.05


def test_an_answer_comes_in_slices() -> None:
    def pieces_received() -> int:
        with through(Faults(slices=30, latency=0.02)) as (client, _):
            pieces = received(client)
        assert b"".join(pieces) == ANSWER
        return len(pieces)

    assert any(pieces_received() > 1 for _ in range(4))  # a client that comes late finds them all at once


@pytest.mark.parametrize("size", [1, 99])
def test_a_cut_comes_after_just_so_many_bytes(size: int) -> None:
    with through(Faults(cut_after=size)) as (client, _):
        assert b"".join(received(client)) == ANSWER[:size]
        assert client.recv(10) == b""


def test_a_reset_is_an_error_for_the_client() -> None:
    with through(Faults(cut_after=10, reset=True)) as (client, _), pytest.raises(ConnectionResetError):
        received(client)


def test_a_connection_that_is_half_open_neither_goes_on_nor_ends() -> None:
    with through(Faults(hold_after=10)) as (client, server):
        assert b"".join(received(client, 10)) == ANSWER[:10]
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(10)
        client.close()
        assert server.recv(10) == b""


def test_nothing_is_left_after_a_proxy() -> None:
    def resources() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = resources()
    for faults in (Faults(), Faults(cut_after=10), Faults(cut_after=10, reset=True), Faults(hold_after=10)):
        with through(faults):
            pass
        assert resources() == before
