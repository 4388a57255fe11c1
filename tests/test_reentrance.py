"""Calls that come in the middle of our own lines: from the garbage collector, signal handlers, forks, and the end.

Each of these has hung or lost events in a released library. What can take the process down runs in one of its own.
"""

from __future__ import annotations

import os

import pytest

from sse_batcher.runtime.process import open_objects

from .kit import locks
from .kit.batching import LONG, OwnBatcher
from .kit.process import AsProcess
from .kit.scripts import run
from .kit.threads import in_thread

# -- the garbage collector ---------------------------------------------------------------------------------------------

FROM_DEL = """
    alive = set()
    class Garbage:
        def __init__(self, n):
            self.n, self.me = n, self          # a cycle: only the collector ends it
            alive.add(n)
        def __del__(self):
            batcher.enqueue("del", self.n)
            alive.discard(self.n)
    def collect():
        gc.set_threshold(700)
        while alive:                           # gc.collect() does nothing while another thread is at it
            gc.collect()
"""


def test_a_del_that_enqueues_in_the_middle_of_enqueue_loses_nothing() -> None:
    run(
        FROM_DEL
        + """
    batcher = EventBatcher(sink, BatchOptions(batch_window=0.001, max_batch_size=3))
    gc.set_threshold(1)
    for n in range(4_000):
        Garbage(n)
        batcher.enqueue("plain", n)
    collect()
    assert batcher.close(30)
    assert sorted(got) == sorted([*range(4_000)] * 2), len(got)
    """
    )


def test_a_del_that_enqueues_while_the_first_thread_is_started_does_not_hang() -> None:
    run(
        FROM_DEL
        + """
    for n in range(300):
        gc.set_threshold(0)
        batcher = EventBatcher(sink, BatchOptions(batch_window=0.001))
        for k in range(20):
            Garbage(k)
        gc.set_threshold(1)
        batcher.enqueue("plain", "cold")
        collect()
        assert batcher.close(30)
    assert got.count("cold") == 300
    assert len(got) == 300 * 21, len(got)
    """
    )


def test_a_del_that_enqueues_on_the_threads_own_way_to_sleep_is_delivered() -> None:
    # The garbage is made by the sink, on the thread, which then runs the collector on its way to park.
    run(
        """
    class Garbage:
        def __init__(self, n):
            self.n, self.me = n, self
        def __del__(self):
            batcher.enqueue("del", self.n)
    def littering(batch):
        sink(batch)
        if batch.type == "plain":
            for event in batch.events:
                Garbage(event.data)
    batcher = EventBatcher(littering, BatchOptions(max_batch_size=1))
    gc.collect()
    gc.freeze()    # what is there by now is no garbage: no collection has to look through it again
    gc.set_threshold(1)
    deadline = time.monotonic() + 40
    for n in range(1_000):
        batcher.enqueue("plain", n)
        while got.count(n) < 2 and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.0005)    # without the GIL, a thread that collects without pause lets no other one go on
    assert time.monotonic() < deadline, got
    gc.set_threshold(700)
    assert batcher.close(30)
    """
    )


# -- signals -----------------------------------------------------------------------------------------------------------


def test_a_signal_handler_that_enqueues_five_thousand_times_a_second_loses_nothing() -> None:
    out = run(
        """
    batcher = EventBatcher(sink, BatchOptions(batch_window=0.001, max_batch_size=7))
    handled = 0
    def handler(*_):
        global handled
        batcher.enqueue("signal", -1)
        handled += 1
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    end, n = time.monotonic() + 1.5, 0
    while time.monotonic() < end or handled <= 100:
        batcher.enqueue("plain", n)
        n += 1
        if n % 50 == 0:
            batcher.flush_all(30)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert batcher.close(30)
    assert [x for x in got if x >= 0] == list(range(n))
    assert got.count(-1) == handled
    print(handled)
    """
    )
    assert int(out) > 100


def test_a_signal_handler_that_closes_in_the_middle_of_anything_loses_nothing_that_was_accepted() -> None:
    run(
        """
    random.seed(7)
    closed = False
    def handler(*_):
        global closed
        batcher.close(30)
        closed = True
    signal.signal(signal.SIGALRM, handler)
    for _ in range(5_000):
        batcher, closed, accepted = EventBatcher(sink, BatchOptions(max_batch_size=2)), False, 0
        got.clear()
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, 0.0004))
        try:
            while True:
                batcher.enqueue("plain", accepted)
                accepted += 1
        except ClosedError:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert batcher.close(30)
        # The one being accepted when the signal came may be in, though its call was never seen to return.
        assert got == list(range(len(got))), got
        assert accepted <= len(got) <= accepted + 1, (accepted, len(got))
    """
    )


# -- forks -------------------------------------------------------------------------------------------------------------

FORKS = {
    "os.fork": "os.fork()",
    # First it waits until no thread wants the GIL. In the middle of that, glibc's condition variables do not survive a
    # fork, and only Python's hooks mend them.
    "fork without Python's hooks, as uWSGI does": "threading.Event().wait(0.2) or ctypes.PyDLL(None).fork()",
}


@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS.keys())
def test_a_child_delivers_its_own_events_and_none_of_its_parents(fork: str) -> None:
    run(
        f"""
    from tests.kit import locks
    held, forked = threading.Event(), threading.Event()
    with locks.recorded() as made:
        batcher = EventBatcher(sink, BatchOptions(batch_window=10))
        manager = SSEManager(batching=BatchOptions(batch_window=10))
        client = manager.subscribe()
        for publish in (batcher.enqueue, manager.enqueue):
            publish("log", "parent's")
    def hold():
        with made.held(at_least=5):
            held.set()
            forked.wait()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    pid = {fork}
    if pid == 0:
        got.clear()
        batcher.enqueue("log", "child's")
        ok = batcher.flush_all(30) and got == ["child's"] and batcher.get_stats().enqueued == 1
        mine = manager.subscribe()
        manager.enqueue("log", "child's")
        ok = ok and manager.flush_all(30) and manager.get_stats().clients == 1
        next(mine)
        ok = ok and b"child's" in next(mine)
        client.close()      # the parent's: must not wait for its lock
        os._exit(0 if ok else 1)
    forked.set()
    assert os.waitpid(pid, 0)[1] == 0
    holder.join()
    assert batcher.close(30) and manager.shutdown(30)
    assert got == ["parent's"]
    """
    )


def test_a_child_that_exits_ends_its_streams() -> None:
    out = run(
        """
    manager = SSEManager()
    opened = threading.Event()
    def read():
        for block in manager.subscribe():
            opened.set()
            if b"sse_bye" in block:
                os.write(1, b"bye")
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
    else:
        threading.Thread(target=read, daemon=True).start()
        opened.wait()
    """
    )
    assert out == "bye"


@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS.keys())
@pytest.mark.parametrize(
    ("in_parent", "in_child", "expected"),
    [
        ("client = manager.subscribe()", "send(); send()", 1),
        ("client = manager.subscribe()", "manager.kick(user='ada')", 1),
        ("manager.subscribe().close(); send()", "send()", 0),  # as in a server that has not begun to serve
        ("client = manager.subscribe()", "own = manager.subscribe(); send()", 0),
        ("client = manager.subscribe()", "manager.get_stats(); manager.flush_all(30)", 0),
    ],
    ids=["events", "a kick", "a parent without streams", "a child with streams", "no event"],
)
def test_a_child_warns_once_of_streams_of_its_parent(in_parent: str, in_child: str, expected: int, fork: str) -> None:
    out = run(
        f"""
    import logging, sys
    logging.basicConfig(stream=sys.stdout)
    manager = SSEManager()
    def send():
        manager.enqueue("error", 1)
        assert manager.flush_all(30)
    {in_parent}
    pid = {fork}
    if pid == 0:
        {in_child}
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    send()
    """
    )
    assert out.count("this process was forked from a process with open streams") == expected
    assert out.count("WARNING:") == expected


def test_threads_that_meet_in_a_fresh_child_share_one_engine() -> None:
    run(
        """
    batcher = EventBatcher(sink, BatchOptions(batch_window=0.05))
    pid = os.fork()
    if pid == 0:
        barrier = threading.Barrier(8)
        def first():
            barrier.wait()
            batcher.enqueue("log", 1)
        threads = [threading.Thread(target=first) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os._exit(0 if batcher.flush_all(30) and batcher.get_stats().enqueued == len(got) == 8 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    """
    )


def test_a_child_that_only_exits_says_nothing_and_delivers_nothing() -> None:
    out = run(
        """
    kept, gone = (EventBatcher(lambda batch: print("delivered by", os.getpid() == parent)) for _ in range(2))
    parent = os.getpid()
    kept.enqueue("log", 1)
    del gone
    gc.collect()
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
    # Both leave through the interpreter's end, with its exit hooks.
    """
    )
    assert out == "delivered by True\n"


# -- the end -----------------------------------------------------------------------------------------------------------


def test_what_is_pending_at_exit_is_delivered() -> None:
    out = run(
        """
    def main():
        batcher = EventBatcher(lambda batch: print(batch.events), BatchOptions(batch_window=10))
        batcher.enqueue("log", 1)
        batcher.enqueue("log", 2)
    main()    # the batcher itself is dropped here
    """
    )
    assert out.count("Event(") == 2


@pytest.mark.parametrize("where", ["atexit", "a thread after the main thread has ended"])
def test_events_that_come_when_no_thread_can_be_started_any_more_are_delivered(where: str) -> None:
    # Which of these a version allows differs (3.12.1 starts no thread in atexit, 3.13 does): it must not show.
    late = {
        "atexit": "atexit.register(late)",
        "a thread after the main thread has ended": "threading.Thread(target=wait_and_be_late).start()",
    }[where]
    script = f"""
    import atexit
    batcher = EventBatcher(lambda batch: print([event.data for event in batch.events]), BatchOptions(batch_window=10))
    def late():
        batcher.enqueue("log", "late")
        assert batcher.flush_all(30)
    def wait_and_be_late():
        threading.main_thread().join()
        late()
    {late}
    """
    assert run(script) == "['late']\n"


def test_an_exit_with_a_stuck_sink_does_not_hang() -> None:
    run(
        """
    import sse_batcher.runtime.process
    stuck = threading.Event()
    batcher = EventBatcher(lambda batch: stuck.wait())
    sse_batcher.runtime.process.EXIT_SECONDS = 0.1
    batcher.enqueue("error", 1)
    """,
        stderr="not everything was delivered and closed within 0.1 seconds at the end of this process: "
        "events that were not delivered are lost\n",
    )


def test_dropping_a_batcher_ends_its_thread_after_what_is_pending() -> None:
    run(
        """
    batcher = EventBatcher(sink, BatchOptions(batch_window=0.05))
    batcher.enqueue("log", 1)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "sse_batcher"]
    del batcher
    thread.join(30)
    assert not thread.is_alive()
    assert got == [1]
    """
    )


def test_the_process_id_is_looked_at_before_any_lock_is_taken(as_process: AsProcess) -> None:
    with locks.recorded() as made:
        batcher = OwnBatcher(lambda batch: None, LONG)
    batcher.enqueue("log", 1)
    with as_process(os.getpid() + 1), made.held(at_least=2):
        assert in_thread(batcher.get_stats).enqueued == 0
        assert batcher.engine not in in_thread(open_objects)  # which the child's exit closes
    assert batcher.engine.stats().pending_events == 1
    assert batcher.engine.close()
