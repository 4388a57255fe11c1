"""The limit of file descriptors: streams are refused before the server has none left."""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sse_batcher import SSEManager, stream
from sse_batcher.runtime.process import PerProcess
from sse_batcher.transports.descriptors import (
    MAX_RECOUNT_SECONDS,
    RECOUNT_FACTOR,
    Descriptors,
    descriptor_limit,
    descriptors_in_use,
    reserved,
)
from sse_batcher.transports.server import ServerInfo
from sse_batcher.transports.sockets import end_connection

from .kit.clock import Clock
from .kit.servers import Stream, gunicorn, running
from .kit.sse_parser import parse
from .kit.waiting import wait_until


class System:
    """What the system says of this process, and how long it takes."""

    def __init__(self) -> None:
        self.limit: int | None = 1000
        self.used: int | None = 0
        self.seconds = 0.01
        self.clock = Clock()

    def descriptors(self) -> Descriptors:
        return Descriptors(self.clock, limit=lambda: self.limit, used=self._count, reserve=lambda limit: 100)

    def _count(self) -> int | None:
        self.clock.now += self.seconds
        return self.used

    def wait(self) -> None:
        """Until they may be counted again."""
        self.clock.now += RECOUNT_FACTOR * self.seconds


@pytest.fixture
def system() -> System:
    return System()


def taken(found: Descriptors) -> int:
    """How many streams may be opened now."""
    count = 0
    while count < 10_000 and found.take():
        count += 1
    return count


def test_streams_take_two_each_and_leave_the_reserve(system: System) -> None:
    found = system.descriptors()
    system.used = 701
    assert taken(found) == 99


def test_what_others_take_and_give_back_counts_too(system: System) -> None:
    found = system.descriptors()
    system.used = 880
    assert taken(found) == 10
    system.used = 700
    assert taken(found) == 0
    system.wait()
    assert taken(found) == 100
    system.used = 950  # more than the reserve leaves
    system.wait()
    assert taken(found) == 0


def test_a_count_that_was_held_up_does_not_keep_streams_out_for_long(system: System) -> None:
    found = system.descriptors()
    system.seconds = 1.0  # for example, its thread has waited for the GIL
    assert taken(found) == 450
    system.clock.now += MAX_RECOUNT_SECONDS  # all of them have ended meanwhile
    assert taken(found) == 450


def test_descriptors_are_counted_at_each_stream_if_counting_takes_no_time(system: System) -> None:
    found = system.descriptors()
    system.seconds = 0
    for system.used, room in [(898, True), (899, False), (0, True), (1000, False)]:
        assert found.take() is room


def test_a_limit_that_is_raised_counts(system: System) -> None:
    found = system.descriptors()
    system.used = 900
    assert not found.take()
    system.limit = 1004
    system.wait()
    assert taken(found) == 2


def test_the_log_says_once_what_to_raise(system: System, caplog: pytest.LogCaptureFixture) -> None:
    found = system.descriptors()
    system.used = 1000
    assert not any(found.take() for _ in range(5))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for word in ("1000 file descriptors", "ulimit -n", "LimitNOFILE", "SSE_MAX_CLIENTS"):
        assert word in record.getMessage()


@pytest.mark.parametrize("unknown", ["limit", "used"])
def test_there_is_no_limit_if_the_system_does_not_tell(system: System, unknown: str) -> None:
    setattr(system, unknown, None)
    assert taken(system.descriptors()) == 10_000


@pytest.mark.parametrize(("limit", "left"), [(64, 16), (256, 64), (1024, 256), (20_000, 1024), (1_048_576, 1024)])
def test_a_quarter_is_left_to_others_and_at_most_what_gunicorn_accepts_at_once(limit: int, left: int) -> None:
    assert reserved(limit) == left


def test_the_number_in_use_is_that_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull), open(os.devnull):
        many = descriptors_in_use()
    few = descriptors_in_use()
    assert many is not None
    assert many - 2 == few
    monkeypatch.setattr(os, "stat", lambda path: os.stat_result([0] * 10))  # an older Linux
    assert abs(few - (descriptors_in_use() or 0)) <= 1  # the list has the descriptor by which it is read


def test_it_is_unknown_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "stat", fail)
    assert descriptors_in_use() is None


def test_the_limit_is_the_soft_one(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert descriptor_limit() == soft
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert descriptor_limit() is None


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_without_room_gets_busy(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.used = 1000
    monkeypatch.setattr("sse_batcher.transports.attached.descriptors", PerProcess(system.descriptors))
    with SSEManager() as manager:
        _, _, body = stream(manager, {"REQUEST_METHOD": "GET", "HTTP_LAST_EVENT_ID": "5f3a9c1e-42"})
        [busy] = parse(b"".join(body), strict=True)
        assert manager.get_stats().bytes == 0
    assert (busy.type, busy.json, busy.id) == ("sse_busy", {"reason": "limit"}, "5f3a9c1e-42")


@pytest.mark.parametrize("name", ["gunicorn gthread", "waitress"])
def test_gunicorn_sees_that_a_refused_connection_brings_no_further_request(name: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        end_connection(ServerInfo(name, ours.fileno(), None, lambda: False))
        if name == "waitress":  # which might look before it has sent all
            with pytest.raises(BlockingIOError):
                ours.recv(1)
        else:
            assert ours.recv(1) == b""
        ours.sendall(b"the response")
        assert theirs.recv(100) == b"the response"
        assert not ours.getblocking()


LIMIT = 256
LIMITED = f"""
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
runpy.run_module("gunicorn", run_name="__main__", alter_sys=True)
"""


@pytest.mark.external
@pytest.mark.parametrize(("transport", "threads", "each"), [("attached", LIMIT, 2), ("auto", 4, 1)])
def test_gunicorn_survives_more_streams_than_it_has_descriptors(
    transport: str, threads: int, each: int, tmp_path: Path
) -> None:
    _, _, *options = (argument.replace("serverapp", "leavingapp") for argument in gunicorn(f"--threads={threads}"))
    config = json.dumps({"SSE_TRANSPORT": transport})
    with running(("-c", LIMITED, "-k", "gthread", *options), tmp_path, CONFIG=config) as server, ExitStack() as stack:
        stack.enter_context(server.watched())
        streams: dict[str, list[Stream]] = {"sse_open": [], "sse_busy": []}
        opened = streams["sse_open"]
        room = (LIMIT - reserved(LIMIT)) // each

        def try_more() -> bool:
            for _ in range(400):
                stream = stack.enter_context(Stream(server))
                block = stream.block()
                assert block is not None
                streams[block.event].append(stream)
                assert block.event == "sse_open" or block.data == {"reason": "limit"}
            return len(opened) > 0.6 * room  # not before the descriptors are counted again

        wait_until(try_more, "most of the room is used")
        assert len(opened) <= room
        assert server.stats()["clients"] == len(opened)
        worker = server.request("POST", "/enqueue", [("item", 1)])
        assert all(stream.response.headers["X-Pid"] == worker for stream in opened + streams["sse_busy"])
        for stream in opened:
            assert [block.data for block in stream.until("item")] == [1]
        for stream in opened:
            stream.__exit__()
        wait_until(lambda: _opens(server), "there is room again")
        assert server.output().count("[WARNING] sse_batcher.descriptors: further streams are refused") == 1
        assert server.faults() == []


def _opens(server: Any) -> bool:
    with Stream(server) as stream:
        block = stream.block()
        return block is not None and block.event == "sse_open"
