"""The watcher: clients that left, clients that take nothing, servers that stop."""

from __future__ import annotations

import errno
import gc
import logging
import math
import os
import queue
import resource
import select
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from sse_batcher import ClientOptions, SSEManager, signals
from sse_batcher.runtime.process import PerProcess
from sse_batcher.streams.client import QueueClient
from sse_batcher.transports.attached import AttachedStream
from sse_batcher.transports.server import ServerInfo
from sse_batcher.transports.sockets import sign_of_life
from sse_batcher.transports.watcher import STOP_SAMPLE, Watch, Watcher

from .kit.detached import served
from .kit.process import AsProcess
from .kit.servers import HOST
from .kit.waiting import TIMEOUT
from .kit.watched import IdleWorker, Watched, Workers

Pair = tuple[socket.socket, socket.socket]


def server_info(
    fd: int | None = None, *, threads: int | None = None, stopping: Callable[[], bool] = lambda: False
) -> ServerInfo:
    return ServerInfo("a server", fd, threads, stopping)


class NotedWatcher(Watcher):
    """A watcher that knows what was added to it, without keeping that alive."""

    def __init__(self, **options: Any) -> None:
        self.workers = Workers()
        self.added: weakref.WeakSet[Watch] = weakref.WeakSet()
        super().__init__(**{"make_worker": self.workers} | options)

    def add(self, watch: Watch, limit: float = math.inf) -> bool:
        self.added.add(watch)
        return super().add(watch, limit)


@pytest.fixture
def make() -> Iterator[Callable[..., NotedWatcher]]:
    watchers: list[NotedWatcher] = []

    def make_one(**options: Any) -> NotedWatcher:
        watchers.append(NotedWatcher(**options))
        return watchers[-1]

    yield make_one
    for watcher in watchers:
        for watch in list(watcher.added):
            watcher.remove(watch)


@pytest.fixture
def watcher(make: Callable[..., NotedWatcher]) -> NotedWatcher:
    return make()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The server's end of a connection over TCP, and the client's."""
    with socket.create_server((HOST, 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        with ours, theirs:
            yield ours, theirs


def watch_over(watcher: Watcher, ours: socket.socket | None, **more: Any) -> tuple[Watched, Watch]:
    stream = Watched()
    watch = Watch(stream, server_info(None if ours is None else ours.fileno(), **more), send_timeout=30)
    watcher.add(watch)
    return stream, watch


# -- clients that left -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
def test_a_stream_whose_client_hangs_up_is_closed_at_once(watcher: Watcher, pair: Pair, how: str) -> None:
    ours, theirs = pair
    stream, _watch = watch_over(watcher, ours)
    if how == "reset":
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if how == "shutdown":
        theirs.shutdown(socket.SHUT_WR)
    else:
        theirs.close()
    assert stream.told.get(timeout=TIMEOUT) == "close"
    assert len(watcher) == 0


def test_a_client_that_left_before_it_was_watched_is_noticed_too(watcher: Watcher, pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    stream, _watch = watch_over(watcher, ours)
    assert stream.told.get(timeout=TIMEOUT) == "close"


def test_a_client_that_sends_something_more_is_not_taken_for_one_that_left(watcher: Watcher, pair: Pair) -> None:
    ours, theirs = pair
    stream, _watch = watch_over(watcher, ours)
    other, gone = socket.socketpair()
    with other:
        theirs.sendall(b"the next request, too early")
        marker, _ = watch_over(watcher, other)
        gone.close()
        assert marker.told.get(timeout=TIMEOUT) == "close"  # so the watcher has looked since
    assert stream.told.empty()


def test_an_event_of_a_descriptor_that_was_reused_ends_no_stream(make: Callable[..., NotedWatcher], pair: Pair) -> None:
    class Stale:
        """An epoll that reports this number once, though nothing has happened to what it stands for."""

        def __init__(self) -> None:
            self.real = select.epoll()
            self.reported: list[int] = []
            self.polled_again = threading.Event()

        def poll(self, timeout: float) -> list[tuple[int, int]]:
            if self.reported:
                self.polled_again.set()
                return list(self.real.poll(timeout))
            self.reported.append(watch.fileno())
            return [(watch.fileno(), select.EPOLLRDHUP)]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    epoll = Stale()
    watcher = make(make_epoll=lambda: epoll)
    stream = Watched()
    watch = Watch(stream, server_info(pair[0].fileno()), send_timeout=30)
    watcher.add(watch)
    assert epoll.polled_again.wait(TIMEOUT)
    assert epoll.reported == [watch.fileno()]
    assert stream.told.empty()
    assert len(watcher) == 1


def test_a_client_that_leaves_frees_the_thread_that_waits_for_the_next_frame(pair: Pair) -> None:
    ours, theirs = pair
    left: queue.SimpleQueue[str] = queue.SimpleQueue()

    def receive(sender: object, reason: str, **_: object) -> None:
        left.put(reason)

    with SSEManager(clients=ClientOptions(heartbeat=3600)) as manager:
        with signals.client_disconnected.connected_to(receive, sender=manager):
            body = AttachedStream(manager, served(server_info(ours.fileno())))
            next(body)
            driver = threading.Thread(target=lambda: list(body))
            driver.start()
            theirs.close()
            driver.join(TIMEOUT)
            assert not driver.is_alive()
            assert left.get(timeout=TIMEOUT) == "left"
        assert manager.get_stats().clients == 0


# -- clients that take nothing -----------------------------------------------------------------------------------------


def fill(ours: socket.socket) -> None:
    """Send until the client's side takes no more."""
    ours.settimeout(0)
    with suppress(BlockingIOError):
        while True:
            ours.send(bytes(65_536))
    ours.settimeout(None)


def is_shut(connection: socket.socket) -> bool:
    try:
        connection.send(b"x", socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except BrokenPipeError:
        return True
    return False


def test_a_connection_that_takes_nothing_for_send_timeout_is_shut_down(pair: Pair) -> None:
    ours, _ = pair
    watch = Watch(Watched(), server_info(ours.fileno()), send_timeout=30)
    fill(ours)
    watch.busy_since = 100.0
    for now in (100.0, 110.0, 129.9):
        watch.give_up_if_stalled(now)
        assert not is_shut(ours)
    watch.give_up_if_stalled(130.0)
    assert is_shut(ours)
    watch.close()


def test_a_client_that_reads_slowly_but_steadily_is_served(pair: Pair) -> None:
    ours, theirs = pair
    watch = Watch(Watched(), server_info(ours.fileno()), send_timeout=30)
    fill(ours)
    watch.busy_since = 100.0
    now = 100.0
    for _ in range(5):
        watch.give_up_if_stalled(now)
        now += 29
        acked = sign_of_life(ours, None)
        while sign_of_life(ours, None) == acked:  # until the kernel has heard of what was read
            theirs.recv(65_536)
        watch.give_up_if_stalled(now)
    assert not is_shut(ours)
    watch.close()


def test_a_client_that_takes_nothing_is_given_up_even_if_all_fits_into_buffers(pair: Pair) -> None:
    # A client that has stopped reading, or whose network has vanished, looks like this.
    ours, _ = pair
    watch = Watch(Watched(), server_info(ours.fileno()), send_timeout=30)
    fill(ours)
    for now, since in [(0.0, 0.0), (20.0, None), (29.9, 29.9)]:
        watch.busy_since = since
        watch.give_up_if_stalled(now)
    assert not is_shut(ours)
    watch.give_up_if_stalled(30.0)
    assert is_shut(ours)
    watch.close()


def test_a_client_that_has_taken_all_is_never_given_up(pair: Pair) -> None:
    ours, theirs = pair
    watch = Watch(Watched(), server_info(ours.fileno()), send_timeout=30)
    watch.busy_since = 0.0
    for now in range(0, 300, 25):
        ours.sendall(b"a heartbeat")
        assert theirs.recv(100)
        while sign_of_life(ours, None) is not None:  # until its kernel has said so
            pass
        watch.give_up_if_stalled(now)
    assert not is_shut(ours)
    watch.close()


def test_a_unix_socket_that_takes_nothing_is_shut_down_too() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch = Watch(Watched(), server_info(ours.fileno()), send_timeout=30)
        fill(ours)
        watch.busy_since = 0.0
        watch.give_up_if_stalled(0.0)
        watch.give_up_if_stalled(30.0)
        assert is_shut(ours)
        watch.close()


def test_a_stream_is_busy_from_a_block_until_the_next_step(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    watches: list[Watch] = []
    add = Watcher.add
    monkeypatch.setattr(
        Watcher, "add", lambda self, watch, limit=math.inf: (watches.append(watch), add(self, watch, limit))[1]
    )
    with SSEManager(clients=ClientOptions(heartbeat=0.01)) as manager:
        body = AttachedStream(manager, served(server_info(pair[0].fileno())))
        next(body)
        (watch,) = watches
        first = watch.busy_since
        assert first is not None
        seen: list[float | None] = []
        step = QueueClient.__next__
        monkeypatch.setattr(QueueClient, "__next__", lambda client: (seen.append(watch.busy_since), step(client))[1])
        next(body)
        assert seen == [None]
        assert (watch.busy_since or 0) > first
        body.close()


# -- servers that stop -------------------------------------------------------------------------------------------------


def test_all_streams_of_a_server_that_is_stopping_are_drained_and_those_of_another_are_not(watcher: Watcher) -> None:
    stopping = [False]
    ours = [watch_over(watcher, None, stopping=lambda: stopping[0])[0] for _ in range(3)]
    other, _ = watch_over(watcher, None)
    watcher.tick(0)
    assert all(stream.told.empty() for stream in [*ours, other])
    stopping[0] = True
    for stream in ours:
        assert stream.told.get(timeout=TIMEOUT) == "drain"  # by the thread itself
    assert other.told.empty()


def test_a_stream_is_drained_only_once(watcher: Watcher) -> None:
    # If it is the only one that is left of a server that has ended, others must not be drained for it again and again.
    stream, _ = watch_over(watcher, None, stopping=lambda: True)
    assert stream.told.get(timeout=TIMEOUT) == "drain"
    for _ in range(3):
        watcher.tick(0)
    assert stream.told.empty()


def test_a_stream_that_was_drained_for_a_false_alarm_is_drained_when_the_server_stops(watcher: Watcher) -> None:
    stopping = [True]
    stream, _ = watch_over(watcher, None, stopping=lambda: stopping[0])
    assert stream.told.get(timeout=TIMEOUT) == "drain"
    stopping[0] = False
    watcher.tick(0)
    stopping[0] = True
    assert stream.told.get(timeout=TIMEOUT) == "drain"


def test_some_streams_are_asked_in_turn_whether_to_drain_and_all_after_a_yes(
    make: Callable[..., NotedWatcher],
) -> None:
    watcher = make(make_worker=IdleWorker)
    asked: list[int] = []
    stopping = [False]

    def ask(number: int) -> bool:
        asked.append(number)
        return stopping[0]

    streams = [watch_over(watcher, None, stopping=lambda n=n: ask(n))[0] for n in range(3 * STOP_SAMPLE)]
    for _ in range(3):
        watcher.tick(0)
    assert asked == list(range(3 * STOP_SAMPLE))
    stopping[0] = True
    watcher.tick(0)
    assert all(not stream.told.empty() for stream in streams)


# -- threads that run out ----------------------------------------------------------------------------------------------


def test_a_warning_is_logged_once_when_streams_hold_most_of_the_threads(
    watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    streams = [watch_over(watcher, None, threads=10)[0] for _ in range(7)]
    assert not caplog.records
    streams += [watch_over(watcher, None, threads=10)[0] for _ in range(3)]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("8 of the 10 threads of this a server process are held by open streams")
    assert "SSE_MAX_CLIENTS" in record.getMessage()


def test_nothing_is_logged_if_the_number_of_threads_is_unknown(
    watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    streams = [watch_over(watcher, None)[0] for _ in range(100)]
    assert streams
    assert not caplog.records


def test_of_two_streams_at_the_same_time_only_one_gets_the_last_thread() -> None:
    watcher = Watcher(make_worker=IdleWorker)

    class Overtaken(Watch):
        """Another one comes in right before this one is listed, which is when its hash is asked for."""

        def __hash__(self) -> int:
            if coming:
                added.append(watcher.add(coming.pop(), limit=1))
            return super().__hash__()

    first, second = Overtaken(Watched(), server_info(threads=2), 30), Watch(Watched(), server_info(threads=2), 30)
    added: list[bool] = []
    coming = [second]
    added.append(watcher.add(first, limit=1))
    assert added == [True, False]
    assert len(watcher) == 1
    watcher.remove(second)


# -- what is left ------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_watch_that_is_removed_leaves_nothing_and_twice_is_once(watcher: NotedWatcher, pair: Pair) -> None:
    before = descriptors()
    _stream, watch = watch_over(watcher, pair[0])
    assert descriptors() == before + 1
    watcher.remove(watch)
    watcher.remove(watch)
    assert descriptors() == before
    assert len(watcher) == 0
    del watch
    assert list(watcher.added) == []  # nothing keeps it alive


def test_a_duplicate_leaves_the_low_numbers_to_servers_that_select(pair: Pair) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit, lowest in [(2048, 1024), (512, 0)]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            watch = Watch(Watched(), server_info(pair[0].fileno()), 30)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert lowest <= watch.fileno() < limit
        watch.close()


def test_the_thread_ends_when_nothing_is_left_to_watch_and_comes_back(watcher: NotedWatcher, pair: Pair) -> None:
    (worker,) = watcher.workers
    for _ in range(3):
        stream, watch = watch_over(watcher, pair[0])
        thread = worker.thread
        assert thread is not None
        watcher.remove(watch)
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        assert stream.told.empty()
    assert worker.restarts == 0


def test_a_stream_that_is_dropped_without_a_close_is_forgotten(watcher: Watcher, pair: Pair) -> None:
    stream, _watch = watch_over(watcher, pair[0])
    del stream
    gc.collect()
    watcher.tick(0)
    assert len(watcher) == 0


def test_a_stream_without_connection_is_only_drained(watcher: Watcher) -> None:
    ours, theirs = socket.socketpair()
    fd = ours.fileno()
    ours.close(), theirs.close()
    _stream, watch = watch_over(watcher, None)
    assert Watch(Watched(), server_info(fd), 30).fileno() == -1
    with open(os.devnull) as no_connection:
        before = descriptors()
        assert Watch(Watched(), server_info(no_connection.fileno()), 30).fileno() == -1
        assert descriptors() == before
    watch.busy_since = 0.0
    watch.give_up_if_stalled(1e9)


def test_without_epoll_the_end_of_the_server_is_still_seen(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    monkeypatch.delattr(select, "epoll")  # as gevent does
    watcher = Watcher()
    stream, watch = watch_over(watcher, pair[0], stopping=lambda: True)
    assert stream.told.get(timeout=TIMEOUT) == "drain"
    watcher.remove(watch)


def test_a_watcher_without_descriptors_logs_it_once_and_does_the_rest(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "eventfd", fail)
    watchers = PerProcess(Watcher)
    before = descriptors()
    streams = [watch_over(watchers.get(), pair[0], stopping=lambda: True) for _ in range(3)]
    assert [stream.told.get(timeout=TIMEOUT) for stream, _ in streams] == ["drain"] * 3
    (record,) = caplog.records
    assert record.getMessage().endswith("Too many open files")
    for _, watch in streams:
        watchers.get().remove(watch)
    assert descriptors() == before


def test_a_forked_child_has_a_watcher_of_its_own(as_process: AsProcess) -> None:
    watchers = PerProcess(Watcher)
    ours = watchers.get()
    assert watchers.get() is ours
    with as_process(-1):
        assert watchers.get() is not ours


# -- the stream itself -------------------------------------------------------------------------------------------------


def test_a_stream_that_the_watcher_closes_before_a_step_does_not_open_again(pair: Pair) -> None:
    with SSEManager() as manager:
        body = AttachedStream(manager, served(server_info(pair[0].fileno())))
        next(body)
        body.close()
        assert list(body) == []
        assert manager.get_stats().clients == 0


def test_a_response_that_is_never_iterated_holds_no_descriptor(pair: Pair) -> None:
    before = descriptors()
    with SSEManager() as manager:
        body = AttachedStream(manager, served(server_info(pair[0].fileno())))
        assert descriptors() == before
        body.close()
