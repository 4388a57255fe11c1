"""One object for each process, and what happens at the end of a process. For the end of jobs see `test_jobs`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import weakref

import pytest

from sse_batcher.runtime.process import EXIT_SECONDS, OpenObjects, PerProcess

from .kit.clock import Clock
from .kit.process import AsProcess
from .kit.scripts import run


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


def opened(clock: Clock, *things: Thing) -> OpenObjects:
    objects = OpenObjects(clock)
    for thing in things:
        objects.add(thing)
    return objects


class Thing:
    """An object that takes so many seconds to close."""

    def __init__(self, clock: Clock, takes: float = 0.0, answer: bool | Exception = True) -> None:
        self._clock = clock
        self._takes = takes
        self._answer = answer
        self.timeouts: list[float | None] = []

    def close(self, timeout: float | None) -> bool:
        self.timeouts.append(timeout)
        self._clock.now += self._takes
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def test_all_that_is_open_shares_one_time_limit(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    things = [Thing(clock, 3, False), Thing(clock, 3), Thing(clock)]
    opened(clock, *things).close_all()
    assert [thing.timeouts for thing in things] == [[EXIT_SECONDS], [EXIT_SECONDS - 3], [0.0]]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "events that were not delivered are lost" in record.getMessage()


def test_a_second_end_finds_nothing_open(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    thing = Thing(clock)
    objects = opened(clock, thing, thing)
    objects.close_all()
    objects.close_all()
    assert len(thing.timeouts) == 1
    assert not caplog.records


def test_what_cannot_be_closed_does_not_keep_others_open(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    things = [Thing(clock, answer=RuntimeError("no")), Thing(clock)]
    opened(clock, *things).close_all()
    assert [len(thing.timeouts) for thing in things] == [1, 1]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_what_is_collected_is_not_closed_and_not_kept(clock: Clock) -> None:
    thing = Thing(clock)
    objects, dropped, timeouts = opened(clock, thing), weakref.ref(thing), thing.timeouts
    del thing
    assert dropped() is None
    objects.close_all()
    assert timeouts == []


OPEN = """
    class Thing:
        def close(self, timeout):
            print("closed by the", "parent" if os.getpid() == parent else "child", flush=True)
            closed.set()
            return True

    from sse_batcher.runtime.process import close_at_exit
    closed = threading.Event()
    parent, used, unused = os.getpid(), Thing(), Thing()
    for thing in (used, unused):
        close_at_exit(thing)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_does_not_close_what_it_has_not_used() -> None:
    out = run(
        f"""{OPEN}
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
    else:
        close_at_exit(used)
    """
    )
    assert out == "closed by the child\nclosed by the parent\nclosed by the parent\n"


def test_a_job_that_can_start_no_thread_closes_at_once() -> None:
    # The job has a thread that goes on. From Python 3.13 on, that has ended before we are called.
    out = run(
        f"""{OPEN}
    import multiprocessing
    def job():
        close_at_exit(used)
        threading.Thread(target=closed.wait, args=[1]).start()
        def refuse(thread):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = refuse
    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    child.join()
    assert child.exitcode == 0
    """
    )
    assert out == "closed by the child\nclosed by the parent\nclosed by the parent\n"


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
        # Its finalizers have no public list.
        print(list(util._finalizer_registry) if util else [], "multiprocessing" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{expected}\n"
