"""One object for each process, and what happens at the end of a process. For the end of jobs see `test_jobs`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from sse_batcher.runtime import process
from sse_batcher.runtime.process import EXIT_SECONDS, PerProcess, close_at_exit

from .kit.clock import Clock
from .kit.process import AsProcess


def count_asking(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    asked: list[None] = []
    getpid = os.getpid
    monkeypatch.setattr(os, "getpid", lambda: asked.append(None) or getpid())
    return asked


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wipes a page in a forked child")
def test_the_system_is_asked_for_the_process_id_once(monkeypatch: pytest.MonkeyPatch) -> None:
    things = PerProcess(object)
    mine = things.get()
    asked = count_asking(monkeypatch)
    assert all(things.get() is mine for _ in range(10))
    assert asked == []


def test_where_the_kernel_does_not_tell_of_a_fork_the_system_is_asked_each_time(
    monkeypatch: pytest.MonkeyPatch, as_process: AsProcess
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    things = PerProcess(object)
    with as_process(-1), monkeypatch.context() as patch:
        asked = count_asking(patch)
        mine = things.get()
        assert all(things.get() is mine for _ in range(10))
        assert len(asked) == 11
        patch.setattr(os, "getpid", lambda: -2)
        assert things.get() is not mine


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_and_its_child_have_things_of_their_own() -> None:
    things = PerProcess(os.getpid)
    assert things.get() == os.getpid()
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    ok = things.get() == os.getpid()
    grandchild = os.fork()
    if not grandchild:
        os._exit(things.get() != os.getpid())
    os._exit(not ok or os.waitpid(grandchild, 0)[1] != 0)


def test_a_child_sees_what_it_inherited(as_process: AsProcess) -> None:
    things = PerProcess(object)
    assert things.inherited() is None
    parents = things.get()
    assert things.inherited() is None
    with as_process(-1):
        assert things.inherited() is parents
        things.get()
        assert things.inherited() is None


# -- the end of a process ----------------------------------------------------------------------------------------------


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of a process in which nothing is open."""
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(process, "_open", PerProcess(process._Open))
    return clock


class Thing:
    def __init__(self, clock: Clock, takes: float = 0.0, answer: bool | Exception = True) -> None:
        self._clock = clock
        self._takes = takes
        self._answer = answer
        self.timeouts: list[float | None] = []
        close_at_exit(self)

    def close(self, timeout: float | None) -> bool:
        self.timeouts.append(timeout)
        self._clock.now += self._takes
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def test_all_that_is_open_shares_one_time_limit(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    things = [Thing(clock, 3, False), Thing(clock, 3), Thing(clock)]
    process._close_all()
    assert [thing.timeouts for thing in things] == [[EXIT_SECONDS], [EXIT_SECONDS - 3], [0.0]]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "events that were not delivered are lost" in record.getMessage()


def test_a_second_end_finds_nothing_open(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    thing = Thing(clock)
    process._close_all()
    process._close_all()
    assert len(thing.timeouts) == 1
    assert not caplog.records


def test_what_cannot_be_closed_does_not_keep_others_open(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    things = [Thing(clock, answer=RuntimeError("no")), Thing(clock)]
    process._close_all()
    assert [len(thing.timeouts) for thing in things] == [1, 1]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_child_does_not_close_what_it_has_not_used(clock: Clock, as_process: AsProcess) -> None:
    parents = Thing(clock)
    with as_process(-1):
        process._close_all()
        assert parents.timeouts == []
        close_at_exit(parents)
        process._close_all()
    assert len(parents.timeouts) == 1


def test_a_job_that_can_start_no_thread_closes_at_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("multiprocessing.process.parent_process", object)
    monkeypatch.setattr(process, "_other_threads", lambda: [threading.current_thread()])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    thing = Thing(clock)
    process._end_job()
    assert len(thing.timeouts) == 1


@pytest.mark.parametrize(
    ("before", "expected"),
    [("", "[] False"), ("import multiprocessing.util", "[] True")],
    ids=["without multiprocessing", "with it"],
)
def test_a_plain_process_registers_no_finalizer(before: str, expected: str) -> None:
    program = f"""if True:
        import sys
        {before}
        from sse_batcher import SSEManager
        manager = SSEManager()
        manager.enqueue("log", 1)
        assert manager.shutdown()
        util = sys.modules.get("multiprocessing.util")
        print(list(util._finalizer_registry) if util else [], "multiprocessing" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{expected}\n"
