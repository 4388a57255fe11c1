"""Exceptions that come from outside in the middle of a call: of signal handlers, and of a stack that is exhausted.

Whatever is raised wherever: what was accepted is delivered once, counts are right, and no lock stays held.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from sse_batcher import BatchOptions, Client, EventBatcher, SSEManager
from sse_batcher.streams.revalidation import Revalidator
from sse_batcher.transports.server import ServerInfo
from sse_batcher.transports.watcher import Watch, Watcher

from .kit.interrupts import interrupt, sweep
from .kit.repository import ROOT
from .kit.scripts import run
from .kit.threads import in_thread
from .kit.waiting import TIMEOUT
from .kit.watched import IdleWorker

# CPython reports what is raised in a callback of weakref, and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def no_garbage() -> Iterator[None]:
    """Switch the garbage collector off. CPython would only report an exception in a callback that it runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watched:
    """A batcher, what was accepted by it, and what came out of it."""

    def __init__(self) -> None:
        self.delivered: list[int] = []
        self.accepted: list[int] = []
        self.numbers = count()
        self.batcher = EventBatcher(self.sink, BatchOptions(batch_window=10, max_batch_size=3))

    def sink(self, batch: Any) -> None:
        self.delivered += [event.data for event in batch.events]

    def enqueue(self) -> None:
        number = next(self.numbers)
        self.batcher.enqueue("log", number)
        self.accepted.append(number)

    def check(self) -> None:
        """Check that another thread is served, and that each event is in its place."""
        in_thread(self.enqueue)
        assert in_thread(lambda: self.batcher.flush_all(TIMEOUT))
        stats = in_thread(self.batcher.get_stats)
        assert set(self.accepted) <= set(self.delivered)
        assert len(set(self.delivered)) == len(self.delivered)
        assert self.delivered == sorted(self.delivered)
        assert stats.enqueued == len(self.delivered)
        assert (stats.pending_events, stats.pending_bytes) == (0, 0)


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    assert watched.batcher.close(TIMEOUT)


CALLS: dict[str, Callable[[Watched], Any]] = {
    "enqueue": Watched.enqueue,
    "flush_all": lambda watched: watched.batcher.flush_all(TIMEOUT),
    "get_stats": lambda watched: watched.batcher.get_stats(),
}


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "busy"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_batcher_survives_an_exception_anywhere(watched: Watched, call: Callable[[Watched], Any], idle: bool) -> None:
    def attempt(place: int) -> bool:
        if not idle:
            watched.enqueue()
        interrupted = interrupt(lambda: call(watched), place)
        watched.check()
        return interrupted

    sweep(attempt)


def test_the_first_event_may_be_interrupted_anywhere() -> None:
    def attempt(place: int) -> bool:
        watched = Watched()
        interrupted = interrupt(watched.enqueue, place)
        watched.check()
        assert watched.batcher.close(TIMEOUT)
        return interrupted

    sweep(attempt)


def test_close_may_be_interrupted_anywhere_and_called_again() -> None:
    def attempt(place: int) -> bool:
        watched = Watched()
        watched.enqueue()
        interrupted = interrupt(lambda: watched.batcher.close(TIMEOUT), place)
        assert in_thread(lambda: watched.batcher.close(TIMEOUT))
        assert watched.delivered == watched.accepted
        return interrupted

    sweep(attempt)


def _take_first(manager: SSEManager) -> None:
    client = manager.subscribe()
    next(client)
    client.close()


MANAGERS_CALLS: dict[str, Callable[[SSEManager], Any]] = {
    "subscribe, next, close": _take_first,
    "get_stats": SSEManager.get_stats,
    "kick": lambda manager: manager.kick(user="u"),
    "broadcast": lambda manager: manager.broadcast("log", 1),
}


@pytest.mark.parametrize("call", MANAGERS_CALLS.values(), ids=MANAGERS_CALLS.keys())
def test_a_manager_survives_an_exception_anywhere(call: Callable[[SSEManager], Any]) -> None:
    with SSEManager(batching=BatchOptions(batch_window=0.001)) as manager:
        manager.subscribe(user="u")

        def attempt(place: int) -> bool:
            interrupted = interrupt(lambda: call(manager), place)
            client = in_thread(manager.subscribe)
            assert next(client).startswith(b"event: sse_open")
            in_thread(lambda: manager.enqueue("job", 1))
            blocks = (block for block in client if b"event: job" in block)
            assert in_thread(lambda: next(blocks))
            client.close()
            return interrupted

        sweep(attempt)


@pytest.mark.parametrize("when", ["is opened", "leaves"])
def test_a_client_that_is_interrupted_is_forgotten(when: str) -> None:
    with SSEManager() as manager:

        def attempt(place: int) -> bool:
            clients: list[Client] = []  # empty if the caller did not get the client

            def subscribe() -> None:
                clients.append(manager.subscribe(user="u"))

            if when == "leaves":
                subscribe()
            interrupted = interrupt(subscribe if when == "is opened" else clients[0].close, place)
            for client in clients:
                client.close()
            stats = in_thread(manager.get_stats)
            assert (stats.clients, stats.clients_by_channel) == (0, {})
            return interrupted

        sweep(attempt)


class Later:
    """Stands in for the app thread: keeps what is to run later."""

    def __init__(self) -> None:
        self.tasks: list[Callable[[], None]] = []

    def post_later(self, seconds: float, task: Callable[[], None]) -> None:
        self.tasks.append(task)


class Everybody:
    """A hub in which each user has a stream until it is dismissed."""

    def __init__(self) -> None:
        self.dismissed: list[Any] = []

    def has_user(self, user: Any) -> bool:
        return user not in self.dismissed

    def dismiss(self, reason: str, user: Any) -> None:
        self.dismissed.append(user)


def test_a_user_is_asked_about_once_though_the_watch_was_interrupted() -> None:
    def attempt(place: int) -> bool:
        later, hub, asked = Later(), Everybody(), list[Any]()
        revalidator = Revalidator(lambda user: bool(asked.append(user)), 1, hub, later)  # type: ignore[arg-type]
        interrupted = interrupt(lambda: revalidator.watch("u"), place)
        revalidator.watch("u")  # for the next stream
        for task in later.tasks:
            task()
        assert (asked, hub.dismissed) == (["u"], ["u"])
        return interrupted

    sweep(attempt, at_least=1)


def test_a_watch_that_is_removed_under_interrupts_leaves_nothing() -> None:
    class Stream:
        def close(self) -> None: ...
        def drain(self) -> None: ...

    class Epoll:
        """A real one, which knows what is registered."""

        def __init__(self) -> None:
            self.real = select.epoll()
            self.registered: list[int] = []

        def register(self, fd: int, events: int) -> None:
            self.real.register(fd, events)
            self.registered.append(fd)

        def unregister(self, fd: int) -> None:
            self.real.unregister(fd)
            self.registered.remove(fd)

    epoll = Epoll()
    watcher, stream = Watcher(make_worker=IdleWorker, make_epoll=lambda: epoll), Stream()
    (bell,) = epoll.registered
    for place in count():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            watches = [Watch(stream, ServerInfo("", ours.fileno(), None, lambda: False), 30)]
            watcher.add(watches[0])
            interrupted = interrupt(lambda: watcher.remove(watches[0]), place)  # noqa: B023
            watcher.remove(watches[0])
            assert (watches[0].fileno(), len(watcher), epoll.registered) == (-1, 0, [bell])
            reference = weakref.ref(watches.pop())
            assert reference() is None  # nothing keeps it alive
        if not interrupted:
            break
    assert place > 3
    epoll.real.close()
    os.close(bell)


def test_an_exhausted_stack_harms_only_the_call_that_meets_it(watched: Watched) -> None:
    limit, enqueue = sys.getrecursionlimit(), watched.enqueue

    def at_depth(depth: int) -> None:
        """Call with so many frames allowed."""
        try:
            sys.setrecursionlimit(depth)
            enqueue()
        except RecursionError:  # also of a limit that is below the stack already
            pass
        finally:
            sys.setrecursionlimit(limit)

    for room in range(5, 60):
        for _ in range(4):  # the first event of a window, those that join it, and the one that fills it
            at_depth(_depth() + room)
            watched.check()


def _depth() -> int:
    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return depth


def test_a_handler_that_raises_at_random_costs_at_most_its_own_event() -> None:
    out = run(
        """
    class Boom(Exception): pass
    def handler(*_): raise Boom
    signal.signal(signal.SIGALRM, handler)
    random.seed(11)
    batcher = EventBatcher(sink, BatchOptions(batch_window=0.001, max_batch_size=7))
    accepted, others, done = [], [], threading.Event()
    batcher.enqueue("plain", 0)
    accepted.append(0)
    # Now there is a thread. CPython says so on stderr if it is interrupted while it starts one.
    assert batcher.flush_all(15)
    def other():
        n = 1_000_000_000
        while not done.is_set():
            batcher.enqueue("plain", n)
            others.append(n)
            n += 1
            batcher.get_stats()
            time.sleep(0.0005)
    thread = threading.Thread(target=other)
    thread.start()
    booms, n, end = 0, 0, time.monotonic() + 3
    def publish():
        global n
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.0006))
        while True:
            n += 1
            batcher.enqueue("plain", n)
            accepted.append(n)
            if n % 50 == 0:
                batcher.flush_all(5)
    while time.monotonic() < end or booms <= 100:
        try:
            publish()
        except Boom:
            booms += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    done.set()
    thread.join(15)
    assert not thread.is_alive()
    assert batcher.flush_all(15)
    mine = [data for data in got if data < 1_000_000_000]
    assert set(accepted) <= set(mine) and len(mine) - len(accepted) <= 2 * booms
    assert mine == sorted(set(mine))
    assert [data for data in got if data >= 1_000_000_000] == others
    stats = batcher.get_stats()
    assert (stats.enqueued, stats.pending_events) == (len(got), 0)
    assert batcher.close(15)
    print(booms)
    """
    )
    assert int(out) > 100


PUBLISHER = """
import sys
from sse_batcher import BatchOptions, EventBatcher
batcher = EventBatcher(
    lambda batch: print(*(event.data for event in batch.events), flush=True), BatchOptions(batch_window=0.05)
)
n = 0
def publish():  # not inside the try: CPython 3.11 and 3.12 may raise out of it where a loop goes back
    global n
    print("ready", flush=True)
    while True:
        batcher.enqueue("log", n)
        n += 1
        if n % 5_000 == 0:
            batcher.flush_all()
try:
    publish()
except KeyboardInterrupt:
    print("accepted", n, file=sys.stderr)
"""


@pytest.mark.parametrize("delay", range(8))
def test_a_publishing_script_that_gets_ctrl_c_delivers_what_was_accepted(delay: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        first = "".join(process.stdout.readline() for _ in range(delay))
        process.send_signal(signal.SIGINT)
        rest, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0, err
    accepted = int(err.split()[-1])
    delivered = [int(number) for number in (first + rest).split()]
    assert delivered == list(range(len(delivered)))
    assert accepted <= len(delivered) <= accepted + 1
