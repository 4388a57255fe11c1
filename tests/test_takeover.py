"""Taking a connection over: what a server writes meanwhile, whether it fits, and how long it is waited for."""

from __future__ import annotations

import os
import resource
import socket
import threading
from pathlib import Path

import pytest

from sse_batcher.transports.detached import takeover
from sse_batcher.transports.detached.takeover import MAX_PRELUDE_BYTES, Taken, TakeOver
from sse_batcher.transports.sockets import MIN_DUPLICATE_FD
from sse_batcher.wire import LAST_CHUNK, chunk

from .kit import takeover as kit
from .kit.exchange import Exchange
from .kit.takeover import (
    BAD,
    CHUNKED,
    GOOD,
    PRELUDE,
    SSE,
    Tap,
    Waits,
    closing,
    every_good,
    head,
    never,
    refuse,
    take_over,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux's /proc shows what is open")

# The fixtures of this module.
no_descriptor_is_left = kit.no_descriptor_is_left
exchange = kit.exchange
taps = kit.taps

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
    begun = take_over(exchange, timeout=2.0, wait=waits)
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
