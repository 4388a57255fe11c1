"""Taking a connection over: what a server writes meanwhile, and that nothing is lost, crossed or left open."""

from __future__ import annotations

import gc
import os
import re
import resource
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sse_batcher.transports.detached import takeover
from sse_batcher.transports.detached.takeover import MAX_PRELUDE_BYTES, Taken, TakeOver, wait_for_event
from sse_batcher.transports.server import MIN_DUPLICATE_FD
from sse_batcher.wire import LAST_CHUNK, chunk

from .kit.exchange import Exchange, descriptors
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux's /proc shows what is open")

PRELUDE = b"event: sse_open\ndata: {}\nid: x.123456789\n\n"  # its length has a letter in hexadecimal
SSE = b"Content-Type: text/event-stream; charset=utf-8"
CHUNKED = b"Transfer-Encoding: chunked"

Wait = Callable[[int, int, float], bool]


def head(*fields: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((status, b"Server: x", *fields, b"", b""))


GOOD = {
    "plain": head(SSE, b"Connection: close") + PRELUDE,
    "chunked": head(SSE, CHUNKED) + chunk(PRELUDE),
    "kept": head(b"connection:Keep-Alive", SSE, CHUNKED, b"Keep-Alive: timeout=5") + chunk(PRELUDE),
    "HTTP/1.2": head(SSE, CHUNKED, status=b"HTTP/1.2 200 OK") + chunk(PRELUDE),
    "HTTP/2.0": head(SSE, status=b"HTTP/2.0 200 OK") + PRELUDE,
    "HTTP/1.0": head(SSE, status=b"HTTP/1.0 200 OK") + PRELUDE,
    "no reason": head(SSE, status=b"HTTP/1.1 200") + PRELUDE,
    "upper-case": head(SSE.upper().replace(b"TEXT/EVENT-STREAM", b"Text/Event-Stream"), CHUNKED.upper())
    + b"%X\r\n%b\r\n" % (len(PRELUDE), PRELUDE),
    "zeros": head(SSE, CHUNKED) + b"%06x\r\n%b\r\n" % (len(PRELUDE), PRELUDE),
    "no space": head(SSE.replace(b" ", b""), CHUNKED.replace(b" ", b"")) + chunk(PRELUDE),
    "identity": head(SSE, CHUNKED, b"Content-Encoding: identity") + chunk(PRELUDE),
    "middleware": head(b"Set-Cookie: a=1", b"Set-Cookie: b=text/html", b"X-Empty:", SSE, CHUNKED) + chunk(PRELUDE),
}


def closing(response: bytes) -> bytes:
    """The same, but the connection ends with it: so it is said, whatever the server has said."""
    text, end, body = response.partition(b"\r\n\r\n")
    text = re.sub(rb"(?i)\r\n(connection|keep-alive):[^\r]*", b"", text)
    return text + b"\r\nConnection: close" + end + body


BAD = {
    "404": head(SSE, CHUNKED, status=b"HTTP/1.1 404 Not Found") + chunk(PRELUDE),
    "206": head(SSE, CHUNKED, status=b"HTTP/1.1 206 Partial Content") + chunk(PRELUDE),
    "2000": head(SSE, CHUNKED, status=b"HTTP/1.1 2000 OK") + chunk(PRELUDE),
    "FOO/1.1": head(SSE, status=b"FOO/1.1 200 OK") + PRELUDE,
    "length": head(SSE, b"content-length: %d" % len(PRELUDE)) + PRELUDE,
    "gzip": head(SSE, CHUNKED, b"Content-Encoding: gzip") + chunk(PRELUDE),
    "identity and gzip": head(SSE, CHUNKED, b"Content-Encoding: identity, gzip") + chunk(PRELUDE),
    "another coding": head(SSE, b"Transfer-Encoding: gzip, chunked") + chunk(PRELUDE),
    "html": head(b"Content-Type: text/html", CHUNKED) + chunk(PRELUDE),
    "no type": head(CHUNKED) + chunk(PRELUDE),
    "changed": head(SSE) + PRELUDE.replace(b"{}", b"[]"),
    "changed, chunked": head(SSE, CHUNKED) + chunk(PRELUDE.replace(b"{}", b"[]")),
    "more": head(SSE) + PRELUDE + b"\n",
    "more in the chunk": head(SSE, CHUNKED) + chunk(PRELUDE + b"\n"),
    "more after the chunk": head(SSE, CHUNKED) + chunk(PRELUDE) + b"0",
    "two chunks": head(SSE, CHUNKED) + chunk(PRELUDE[:9]) + chunk(PRELUDE[9:]),
    "wrong size": head(SSE, CHUNKED) + b"%x\r\n%b\r\n" % (len(PRELUDE) + 2, PRELUDE),
    "an end": head(SSE, CHUNKED) + chunk(PRELUDE) + LAST_CHUNK,
    "no chunk": head(SSE, CHUNKED) + PRELUDE,
    "an extension": head(SSE, CHUNKED) + b"%x;a=b\r\n%b\r\n" % (len(PRELUDE), PRELUDE),
    "no end of the head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000,
    "no HTTP": b"\r\n\r\n" + PRELUDE,
}

every_good = pytest.mark.parametrize("response", GOOD.values(), ids=GOOD)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    gc.collect()  # what tests before this one have left
    before = descriptors()
    yield
    assert descriptors() == before


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise OSError(24, "Too many open files")


def take_over(exchange: Exchange, timeout: float = 2.0, wait: Wait = wait_for_event) -> TakeOver:
    return TakeOver(exchange.fd, lambda: exchange.unsent, timeout=timeout, wait=wait)


def never(*_: Any) -> NoReturn:
    """A wait that must not happen."""
    raise AssertionError("it waits")


class Waits:
    """Waits for a server, and notes each time how long that might take. `do` is called before each wait."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do = do
        self.all: list[float] = []

    def __call__(self, fd: int, event: int, timeout: float) -> bool:
        assert event == select.POLLIN
        self.all.append(timeout)
        self.do()
        return wait_for_event(fd, event, timeout)


class Tap(socket.socket):
    """The end of a socket pair from which we read what the server writes."""

    before_read: Callable[[], Any] | None = None
    """Called once, before the next read."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self.before_read is not None:
            before_read, self.before_read = self.before_read, None
            before_read()
        return super().recv(size, flags)


@pytest.fixture
def taps(monkeypatch: pytest.MonkeyPatch) -> list[Tap]:
    """The taps of all take-overs of this test."""
    taps: list[Tap] = []
    pair = socket.socketpair

    def socketpair() -> tuple[Tap, socket.socket]:
        ours, theirs = pair()
        taps.append(Tap(fileno=ours.detach()))
        return taps[-1], theirs

    monkeypatch.setattr(takeover.socket, "socketpair", socketpair)
    return taps


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    exchange = Exchange()
    yield exchange
    exchange.close()


# -- taken -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unsent", [0, 1])  # a server may count a moment later what it has written
@every_good
def test_a_response_as_it_should_be_is_taken(exchange: Exchange, response: bytes, unsent: int) -> None:
    begun = take_over(exchange, wait=never)
    exchange.write(response)
    exchange.unsent = unsent
    assert exchange.hears_nothing()
    taken = begun.finish(PRELUDE)
    begun.drop()
    assert taken is not None
    assert (taken.unsent, taken.chunked) == (closing(response), b"chunked" in response.lower())
    assert exchange.hears_nothing()
    os.write(taken.fd, b"ours")
    assert exchange.heard(4) == b"ours"
    os.close(taken.fd)


def test_the_server_finds_a_client_that_has_hung_up(exchange: Exchange) -> None:
    taken = take(exchange, GOOD["chunked"])
    assert os.read(exchange.fd, 1) == b""
    with pytest.raises(BrokenPipeError):
        os.write(exchange.fd, LAST_CHUNK)
    os.close(exchange.fd)
    os.write(taken.fd, b"ours")
    assert exchange.heard(4) == b"ours"
    os.close(taken.fd)
    assert exchange.heard(1) == b""


def take(exchange: Exchange, response: bytes) -> Taken:
    begun = take_over(exchange)
    exchange.write(response)
    taken = begun.finish(PRELUDE)
    assert taken is not None
    return taken


def test_the_connection_gets_a_high_number_and_is_not_inherited(exchange: Exchange) -> None:
    taken = take(exchange, GOOD["plain"])
    assert taken.fd >= MIN_DUPLICATE_FD == 1024
    assert not os.get_inheritable(taken.fd)
    assert not os.get_inheritable(exchange.fd)
    os.close(taken.fd)


def test_where_high_numbers_are_forbidden_it_gets_a_low_one(exchange: Exchange) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_DUPLICATE_FD, limits[1]))
    try:
        taken = take(exchange, GOOD["plain"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert taken.fd < MIN_DUPLICATE_FD
    assert not os.get_inheritable(taken.fd)
    os.close(taken.fd)


@pytest.mark.parametrize("chunked", [True, False])
def test_the_longest_prelude_fits_into_a_buffer_that_is_not_read_yet(exchange: Exchange, chunked: bool) -> None:
    prelude = b"x" * MAX_PRELUDE_BYTES
    os.set_blocking(exchange.fd, False)  # else this would hang
    begun = take_over(exchange)
    exchange.write(head(SSE, *[CHUNKED] * chunked, b"X-Long: " + b"x" * 32_768))
    exchange.write(chunk(prelude) if chunked else prelude)
    taken = begun.finish(prelude)
    assert taken is not None
    assert len(taken.unsent) > MAX_PRELUDE_BYTES + 32_768
    os.close(taken.fd)


@pytest.mark.parametrize("timeout", [0.0, 5.0])
def test_a_default_timeout_of_the_app_is_none_of_ours(exchange: Exchange, timeout: float, taps: list[Tap]) -> None:
    socket.setdefaulttimeout(timeout)
    try:
        begun = take_over(exchange)
        assert os.get_blocking(exchange.fd)
        assert taps[0].gettimeout() == 0
        exchange.write(GOOD["plain"])
        taken = begun.finish(PRELUDE)
    finally:
        socket.setdefaulttimeout(None)
    assert taken is not None
    assert os.get_blocking(taken.fd)
    os.close(taken.fd)


# -- undone ------------------------------------------------------------------------------------------------------------

PARTS = {
    "nothing": b"",
    "a part of the head": GOOD["chunked"][:20],
    "a part of the body": GOOD["chunked"][:-9],
    "all": GOOD["chunked"],
    "another response": BAD["404"],
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("written", PARTS.values(), ids=PARTS)
def test_what_was_written_reaches_the_client_and_the_server_goes_on(
    exchange: Exchange, written: bytes, blocking: bool
) -> None:
    os.set_blocking(exchange.fd, blocking)
    begun = take_over(exchange)
    assert os.get_blocking(exchange.fd) is blocking
    exchange.write(written)
    assert exchange.hears_nothing()
    begun.undo()
    assert os.get_blocking(exchange.fd) is blocking
    os.set_blocking(exchange.fd, True)
    assert exchange.goes_on(written)
    begun.undo()  # once more
    assert exchange.goes_on(b"")


@pytest.mark.parametrize("blocking", [True, False])
def test_after_undo_all_arrives_even_if_it_does_not_fit_at_once(exchange: Exchange, blocking: bool) -> None:
    os.set_blocking(exchange.fd, blocking)
    small_buffers(exchange)
    written = GOOD["plain"] + os.urandom(150_000)
    begun = take_over(exchange)
    exchange.write(written)
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: heard.append(exchange.heard(len(written) + 4)))
    reader.start()
    begun.undo()
    os.set_blocking(exchange.fd, True)
    exchange.write(b"more")
    reader.join()
    assert heard == [written + b"more"]


def small_buffers(exchange: Exchange) -> None:
    for fd, option in [(exchange.fd, socket.SO_SNDBUF), (exchange.client.fileno(), socket.SO_RCVBUF)]:
        with socket.socket(fileno=os.dup(fd)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, option, 16_384)


def test_a_client_that_takes_nothing_gets_nothing_after_the_gap(exchange: Exchange) -> None:
    small_buffers(exchange)
    begun = take_over(exchange, timeout=0.01)
    written = os.urandom(150_000)
    exchange.write(written)
    begun.undo()
    os.set_blocking(exchange.fd, False)
    with pytest.raises(BrokenPipeError):
        os.write(exchange.fd, b"more")
    heard = exchange.heard(200_000)
    assert 0 < len(heard) < len(written)
    assert written.startswith(heard)


@pytest.mark.parametrize("response", BAD.values(), ids=BAD)
def test_another_response_is_given_back_without_waiting(exchange: Exchange, response: bytes) -> None:
    begun = take_over(exchange, wait=never)
    exchange.write(response)
    assert begun.finish(PRELUDE) is None
    assert exchange.goes_on(response)


def test_where_the_system_refuses_to_show_what_was_written_it_is_undone(exchange: Exchange, taps: list[Tap]) -> None:
    begun = take_over(exchange)
    exchange.write(GOOD["plain"])
    taps[0].before_read = refuse
    assert begun.finish(PRELUDE) is None
    assert exchange.goes_on(GOOD["plain"])


# -- slow servers ------------------------------------------------------------------------------------------------------


@every_good
def test_a_response_that_comes_in_two_pieces_is_taken_wherever_it_is_cut(exchange: Exchange, response: bytes) -> None:
    rest = b""
    waits = Waits(lambda: exchange.write(rest))
    for cut in range(len(response)):
        begun = take_over(exchange, wait=waits)
        rest = response[cut:]
        exchange.unsent = len(rest)
        exchange.write(response[:cut])
        taken = begun.finish(PRELUDE)
        assert taken is not None, cut
        assert taken.unsent == closing(response)
        os.dup2(taken.fd, exchange.fd)  # for the next round
        os.close(taken.fd)
    assert len(waits.all) == len(response)
    assert exchange.hears_nothing()


@every_good
def test_finish_does_not_wait_for_a_server_that_has_nothing_left_to_write(exchange: Exchange, response: bytes) -> None:
    for cut in range(len(response)):
        begun = take_over(exchange, wait=never)
        exchange.write(response[:cut])
        assert begun.finish(PRELUDE) is None
        exchange.write(response[cut:])
        assert exchange.heard(len(response)) == response, cut


def test_a_server_that_writes_byte_by_byte_from_another_thread_is_waited_for(exchange: Exchange) -> None:
    response = GOOD["chunked"]

    def write() -> None:
        for at in range(len(response)):
            exchange.write(response[at : at + 1])
            exchange.unsent -= 1

    exchange.unsent = len(response)
    begun = take_over(exchange)
    server = threading.Thread(target=write)
    server.start()
    taken = begun.finish(PRELUDE)
    server.join()
    assert taken is not None
    assert taken.unsent == closing(response)
    os.close(taken.fd)


def test_all_waits_together_take_no_longer_than_the_timeout(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0

    def pass_time() -> None:
        nonlocal now
        now += 0.5
        exchange.write(b"x")
        exchange.unsent = now < 102

    exchange.unsent = 1
    waits = Waits(pass_time)
    monkeypatch.setattr(takeover.time, "monotonic", lambda: now)
    begun = take_over(exchange, wait=waits)
    assert begun.finish(PRELUDE) is None
    assert len(waits.all) == 4
    monkeypatch.undo()
    assert exchange.goes_on(b"xxxx")


def test_undo_keeps_the_order_of_what_another_thread_of_the_server_writes(exchange: Exchange) -> None:
    """Such as what did not fit into the buffer."""

    def write() -> None:
        exchange.write(b"and the rest")
        exchange.unsent = 0

    exchange.unsent = 1
    begun = take_over(exchange, wait=Waits(write))
    exchange.write(b"the beginning ")
    begun.undo()
    assert exchange.goes_on(b"the beginning and the rest")


@pytest.mark.parametrize("written", [b"", GOOD["chunked"][:-1]], ids=["nothing", "not all"])
def test_a_server_that_does_not_write_what_it_has_is_given_up(exchange: Exchange, written: bytes) -> None:
    exchange.unsent = 1
    begun = take_over(exchange, timeout=0.01)
    exchange.write(written)
    assert begun.finish(PRELUDE) is None
    if written:
        assert exchange.heard(1) == b""  # what it writes later would come before this
    else:
        assert exchange.goes_on(b"")


@pytest.mark.parametrize("size", [300_000, 5_000_000])
def test_a_server_can_write_a_head_larger_than_the_buffer_if_the_loop_reads_it(exchange: Exchange, size: int) -> None:
    response = head(SSE, b"X-Long: " + bytes(size)) + PRELUDE
    begun = take_over(exchange)
    server = threading.Thread(target=write_all, args=(exchange, response))
    server.start()
    while server.is_alive():
        assert begun.relieve()
    taken = begun.finish(PRELUDE)
    assert not begun.relieve()
    assert taken is not None
    assert taken.unsent == closing(response)
    os.close(taken.fd)


def write_all(exchange: Exchange, text: bytes) -> None:
    while text:
        text = text[os.write(exchange.fd, text) :]


def test_a_server_that_writes_without_end_finds_that_the_client_has_hung_up(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "MAX_HEAD_BYTES", 10_000)
    begun = take_over(exchange)
    exchange.write(bytes(10_000))
    assert begun.relieve()
    exchange.write(b"x")
    assert begun.relieve()
    with pytest.raises(BrokenPipeError):
        exchange.write(b"x")
    begun.undo()
    assert exchange.heard(10_001) == bytes(10_000) + b"x"


def test_a_head_without_end_is_not_waited_for(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "MAX_HEAD_BYTES", 10_000)
    monkeypatch.setattr(TakeOver, "undo", lambda self: None)
    exchange.unsent = 1
    waits = Waits(lambda: exchange.write(bytes(1_000)))
    begun = take_over(exchange, wait=waits)
    assert begun.finish(PRELUDE) is None
    assert len(waits.all) == 11
    monkeypatch.undo()
    exchange.unsent = 0
    begun.undo()


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


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_server_that_closes_the_connection_is_not_waited_for(exchange: Exchange, when: str) -> None:
    waits = Waits(lambda: os.close(exchange.fd))
    exchange.unsent = 1
    begun = take_over(exchange, wait=waits)
    exchange.write(GOOD["plain"][:30])
    if when == "before":
        os.close(exchange.fd)
    assert begun.finish(PRELUDE) is None
    assert len(waits.all) == (when == "meanwhile")
    assert exchange.heard(1) == b""


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
