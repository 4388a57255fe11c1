"""Sending to sockets without waiting: the C library's `send`, and what stands in for it."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sse_batcher
from sse_batcher.transports.detached import sending

from .kit.waiting import TIMEOUT

ROOT = Path(sse_batcher.__file__).parents[1]

Pair = tuple[socket.socket, socket.socket]


def load() -> ModuleType:
    """Load the module once more, under the present conditions."""
    spec = importlib.util.spec_from_file_location("sending_anew", sending.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_it_is(_: pytest.MonkeyPatch) -> None:
    pass


def without_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctypes", None)


def without_the_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "PyDLL", lambda *_, **__: object())


def without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "PyDLL", refuse)


def without_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "MSG_DONTWAIT")
    monkeypatch.delattr(socket, "MSG_NOSIGNAL")


def without_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python documents this function, with its underscore. There is no other way to ask.
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)


LINUX_FALLBACKS = [without_ctypes, without_the_symbol, without_a_library, without_the_lock]
FALLBACKS = [*LINUX_FALLBACKS, without_the_flags]

HAS_THE_LOCK = getattr(sys, "_is_gil_enabled", lambda: True)()
needs_the_lock = pytest.mark.skipif(not HAS_THE_LOCK, reason="without the GIL, a fallback is the way to send")


def name_of(case: Callable[..., object]) -> str:
    return case.__name__.replace("_", " ")


@pytest.fixture(params=[as_it_is, *FALLBACKS], ids=name_of)
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    with monkeypatch.context() as patched:
        request.param(patched)
        loaded = load()
    assert (loaded.send.__module__ == "sending_anew") == (request.param is not as_it_is or not HAS_THE_LOCK)
    return loaded


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The server's end of a connection over TCP, which does not block, and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname(), timeout=TIMEOUT)
        ours, _ = listener.accept()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def send(module: ModuleType, fd: int, data: bytes) -> int | None:
    taken: int | None = module.send_to(fd, data)
    return taken


# -- what is taken -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"x", b"a\0b\0", b"", bytes(range(256))], ids=["one", "zeros", "none", "all"])
def test_what_the_socket_takes_arrives(module: ModuleType, pair: Pair, data: bytes) -> None:
    ours, theirs = pair
    assert send(module, ours.fileno(), data) == len(data)
    ours.close()
    assert theirs.recv(1000) == data


def test_a_full_socket_takes_a_part_and_then_nothing(module: ModuleType, pair: Pair) -> None:
    ours, theirs = pair
    data = os.urandom(8_000_000)
    taken = send(module, ours.fileno(), data)
    assert taken is not None
    assert 0 < taken < len(data)
    while more := send(module, ours.fileno(), data[taken:]):  # the kernel may be moving some to the other side
        taken += more
    assert more == 0
    ours.close()
    heard = b""
    while part := theirs.recv(1_000_000):
        heard += part
    assert heard == data[:taken]


@pytest.mark.parametrize("module", [as_it_is, *LINUX_FALLBACKS], indirect=True, ids=name_of)
@pytest.mark.parametrize("default", [None, TIMEOUT], ids=["no default timeout", "a default timeout"])
def test_a_full_socket_that_blocks_makes_no_way_wait(module: ModuleType, pair: Pair, default: float | None) -> None:
    assert module.FLAGS & socket.MSG_DONTWAIT  # or this would hang, with the lock
    ours, theirs = pair
    ours.setblocking(True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(default)
    try:
        taken, began = 0, time.monotonic()
        while some := send(module, ours.fileno(), bytes(1_000_000)):
            taken += some
        assert time.monotonic() - began < TIMEOUT / 2
    finally:
        socket.setdefaulttimeout(before)
    assert os.get_blocking(ours.fileno())
    ours.close()
    while part := theirs.recv(1_000_000):
        taken -= len(part)
    assert taken == 0


@needs_the_lock
@pytest.mark.parametrize("size", [1, 5])
def test_no_more_than_the_size_is_sent(size: int, pair: Pair) -> None:
    data = b"12345"
    assert sending.send(pair[0].fileno(), data, sending.sized(size), sending.FLAGS) == size
    pair[0].close()
    assert pair[1].recv(10) == data[:size]


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_has_taken_all_is_known_if_the_system_tells_it_cheaply(module: ModuleType, pair: Pair, family: str) -> None:
    ours, theirs = pair if family == "tcp" else socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        knows = module.send.__module__ != "sending_anew"
        while send(module, ours.fileno(), bytes(100_000)):
            pass
        assert not module.has_taken_all(ours.fileno())
        theirs.settimeout(TIMEOUT)
        ours.shutdown(socket.SHUT_WR)
        while theirs.recv(1_000_000):
            pass
        deadline = time.monotonic() + TIMEOUT
        while module.has_taken_all(ours.fileno()) != knows and time.monotonic() < deadline:
            pass
        assert module.has_taken_all(ours.fileno()) == knows
    assert not module.has_taken_all(999_999)


# -- connections that are gone -----------------------------------------------------------------------------------------


def test_a_connection_that_was_reset_is_gone_and_no_signal_comes(module: ModuleType, pair: Pair) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    assert send(module, ours.fileno(), b"x") is None  # ECONNRESET
    assert send(module, ours.fileno(), b"x") is None  # EPIPE


def test_a_pipe_whose_reader_has_left_is_gone(module: ModuleType) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert send(module, ours.fileno(), b"x") is None


def test_a_number_that_is_not_open_is_gone(module: ModuleType) -> None:
    assert send(module, 999_999, b"x") is None


def test_a_broken_pipe_kills_no_process() -> None:
    """Python ignores it; a program that embeds Python may not."""
    script = """
import signal, socket
from sse_batcher.transports.detached.sending import send_to
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
ours, theirs = socket.socketpair()
with ours:
    theirs.close()
    print(send_to(ours.fileno(), b"x"))
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS, errno.ENOMEM])
def test_what_passes_by_is_a_full_socket(module: ModuleType, number: int) -> None:
    ctypes.set_errno(number)  # there, a failed send of the C library leaves its error; the fallback returns it
    assert module.taken(-number) == 0


# -- the lock ----------------------------------------------------------------------------------------------------------


@needs_the_lock
def test_the_send_of_the_c_library_checks_no_types() -> None:
    function: Any = sending.send
    assert function.restype is ctypes.c_ssize_t
    assert function.argtypes is None  # they would cost as much again as the call


@needs_the_lock
def test_a_size_is_passed_in_all_its_bits() -> None:
    same = ctypes.PyDLL(None).labs  # takes one number of the same length
    same.restype = ctypes.c_long
    assert same(sending.sized(2**40)) == 2**40


@pytest.fixture
def nobody_is_asked_to_let_go() -> Iterator[None]:
    """A thread gets the lock only when the one that has it lets go of it by itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(interval)


@needs_the_lock
@pytest.mark.usefixtures("nobody_is_asked_to_let_go")
@pytest.mark.parametrize(("prepare", "turns"), [(as_it_is, 0), (without_ctypes, 1)], ids=["library", "fallback"])
def test_no_other_thread_gets_a_turn_between_two_sends(
    pair: Pair, prepare: Callable[[pytest.MonkeyPatch], None], turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        prepare(patched)
        module = load()
    ours, theirs = pair
    taken: list[bytes] = []
    begun = threading.Event()

    def read() -> None:
        begun.set()
        taken.append(theirs.recv(1))  # wants the lock back as soon as the first byte is there

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    fd = ours.fileno()
    sends, until = 0, time.monotonic() + TIMEOUT * turns
    # On a busy machine, the reader may need many sends to get its turn.
    while not taken and (sends < 10_000 or time.monotonic() < until):
        with suppress(BlockingIOError):  # nothing is read meanwhile
            module.send(fd, b"x", module.sized(1), module.FLAGS)
        sends += 1
    seen = len(taken)
    reader.join()
    assert seen == turns
