"""Taking a connection over when one side has gone, or descriptors are short: nothing is crossed or left open."""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sse_batcher.transports.detached import takeover
from sse_batcher.transports.detached.takeover import TakeOver

from .kit import takeover as kit
from .kit.exchange import Exchange, descriptors
from .kit.takeover import BAD, GOOD, PRELUDE, Tap, Waits, refuse, take_over
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux's /proc shows what is open")

# The fixtures of this module.
no_descriptor_is_left = kit.no_descriptor_is_left
exchange = kit.exchange
taps = kit.taps

# -- clients that leave ------------------------------------------------------------------------------------------------


def close(client: socket.socket) -> None:
    client.close()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def shutdown(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)


every_way = pytest.mark.parametrize("leave", [close, reset, shutdown])

every_moment = pytest.mark.parametrize("moment", range(3), ids=["before", "between", "after"])


def leaving(exchange: Exchange, leave: Callable[[socket.socket], None], moment: int) -> TakeOver:
    """A take-over whose response is written, and whose client leaves at this moment."""
    if moment == 0:
        leave(exchange.client)
    begun = take_over(exchange)
    if moment == 1:
        leave(exchange.client)
    exchange.write(GOOD["chunked"])
    if moment == 2:
        leave(exchange.client)
    return begun


@every_moment
@every_way
def test_the_connection_of_a_client_that_has_left_is_taken_all_the_same(
    exchange: Exchange, leave: Callable[[socket.socket], None], moment: int
) -> None:
    taken = leaving(exchange, leave, moment).finish(PRELUDE)
    assert taken is not None  # the loop sees that it has left
    os.close(taken.fd)


@every_moment
@every_way
def test_undone_the_server_sees_that_the_client_has_left(
    exchange: Exchange, leave: Callable[[socket.socket], None], moment: int
) -> None:
    leaving(exchange, leave, moment).undo()
    assert exchange.is_restored()
    if leave is shutdown:
        assert exchange.heard(len(GOOD["chunked"])) == GOOD["chunked"]
        assert os.read(exchange.fd, 1) == b""
    else:
        with suppress(BrokenPipeError, ConnectionResetError):
            os.write(exchange.fd, b"more")  # the answer to this may be what tells of it
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            os.write(exchange.fd, b"more")


@every_way
def test_a_client_that_leaves_while_the_server_is_waited_for_is_no_error(
    exchange: Exchange, leave: Callable[[socket.socket], None]
) -> None:
    def go() -> None:
        leave(exchange.client)
        exchange.write(GOOD["plain"])

    exchange.unsent = 1
    taken = take_over(exchange, wait=Waits(go)).finish(PRELUDE)
    assert taken is not None
    os.close(taken.fd)


# -- servers that close ------------------------------------------------------------------------------------------------


@pytest.fixture
def other() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


UNDO: dict[str, Callable[[TakeOver], Any]] = {
    "undo": lambda begun: begun.undo(),
    "finish": lambda begun: begun.finish(PRELUDE),
    "drop": lambda begun: begun.drop(),
}

every_undo = pytest.mark.parametrize("undo", UNDO.values(), ids=UNDO)


@every_undo
def test_a_descriptor_that_was_reused_is_not_touched(
    exchange: Exchange, other: tuple[socket.socket, socket.socket], undo: Callable[[TakeOver], Any]
) -> None:
    begun = take_over(exchange)
    exchange.write(BAD["404"])
    os.dup2(other[0].fileno(), exchange.fd)  # as if it was closed and given away at once
    undo(begun)
    assert os.path.sameopenfile(exchange.fd, other[0].fileno())
    assert not select.select([other[1]], [], [], 0)[0]
    assert exchange.heard(1) == b""


@every_undo
def test_a_descriptor_that_the_server_closed_stays_closed(exchange: Exchange, undo: Callable[[TakeOver], Any]) -> None:
    begun = take_over(exchange)
    os.close(exchange.fd)
    undo(begun)
    with pytest.raises(OSError):
        os.fstat(exchange.fd)
    assert exchange.heard(1) == b""


def test_a_file_with_the_same_inode_on_another_device_is_not_our_socket(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = take_over(exchange)
    diverted = os.fstat(exchange.fd)
    with (tmp_path / "file").open("wb") as file:
        os.dup2(file.fileno(), exchange.fd)
        fields = list(os.fstat(exchange.fd))
        fields[1] = diverted.st_ino
        same_inode = os.stat_result(fields)
        assert (same_inode.st_ino, same_inode.st_dev) != (diverted.st_ino, diverted.st_dev)
        with monkeypatch.context() as patched:
            patched.setattr(takeover.os, "fstat", lambda _: same_inode)
            begun.undo()
        assert os.path.sameopenfile(exchange.fd, file.fileno())


# -- no descriptors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (takeover, "duplicate"),
        (takeover.socket, "socketpair"),
        (takeover.os, "set_blocking"),
        (takeover.os, "fstat"),
        (takeover.os, "dup2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_the_system_refuses_a_step_nothing_has_changed(
    exchange: Exchange, module: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(module, function, refuse)
        with pytest.raises(OSError, match="Too many"):
            take_over(exchange)
    assert descriptors() == before
    assert exchange.goes_on(b"")


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Let this process open so many more descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    filled = [os.dup(0) for _ in range(64)]  # no gaps below
    highest = filled[-1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in filled:
            os.close(fd)


@pytest.mark.parametrize("count", range(3))
def test_without_descriptors_nothing_has_changed(exchange: Exchange, count: int) -> None:
    with room_for(count), pytest.raises(OSError, match="Too many"):
        take_over(exchange)
    assert exchange.goes_on(b"")


def test_three_descriptors_are_enough_and_none_is_needed_to_undo(exchange: Exchange) -> None:
    with room_for(3):
        begun = take_over(exchange)
    with room_for(0):
        exchange.write(PRELUDE)
        begun.undo()
    assert exchange.goes_on(PRELUDE)


def test_what_is_not_open_cannot_be_taken() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        TakeOver(999_999, lambda: 0)


# -- dropped -----------------------------------------------------------------------------------------------------------


def test_one_that_is_dropped_is_undone(exchange: Exchange) -> None:
    begun = take_over(exchange)
    exchange.write(PRELUDE)
    begun.drop()
    assert exchange.goes_on(PRELUDE)
    begun.drop()
    assert exchange.goes_on(b"")


def test_a_take_over_collected_in_another_thread_leaves_the_servers_descriptor_alone(exchange: Exchange) -> None:
    begun = take_over(exchange)
    exchange.write(PRELUDE)
    for _ in range(2):
        collector = threading.Thread(target=begun.drop)
        collector.start()
        collector.join()
    begun.undo()
    assert not exchange.is_restored()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        os.write(exchange.fd, b"more")
    assert exchange.heard(1) == b""


def test_one_that_is_dropped_in_a_forked_child_is_the_parents(exchange: Exchange) -> None:
    begun = take_over(exchange)
    exchange.write(PRELUDE)
    child = os.fork()
    if not child:
        try:
            begun.drop()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    assert exchange.hears_nothing()
    begun.undo()
    assert exchange.goes_on(PRELUDE)


def test_one_that_is_dropped_while_it_is_read_from_is_closed(exchange: Exchange, taps: list[Tap]) -> None:
    """The garbage collector may come in anywhere, on the thread that reads, too."""
    begun = take_over(exchange)
    exchange.write(b"x")
    taps[0].before_read = begun.drop
    reader = threading.Thread(target=begun.relieve)
    reader.start()
    reader.join(TIMEOUT)
    assert not reader.is_alive()
    assert exchange.heard(1) == b""
