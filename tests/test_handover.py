"""The handover: while a server is stopping, streams end in waves, if other processes have the same events."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sse_batcher import Client, ClosedError, SSEManager
from sse_batcher.backends.memory import MemoryBackend
from sse_batcher.draining import CLOSE_SECONDS
from sse_batcher.manager_state import process_of
from sse_batcher.process_state import Parts, ProcessState
from sse_batcher.reasons import ByeReason
from sse_batcher.runtime.worker import Deadline
from sse_batcher.streams import handover
from sse_batcher.streams.client import QueueClient
from sse_batcher.streams.handover import (
    HANDOVER_SECONDS,
    RETURN_MS,
    START_SECONDS,
    WAVE_SECONDS,
    WAVE_STREAMS,
    Handover,
)

from .kit.clock import Clock
from .kit.delivery import Delivery, last, numbers, take
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT, wait_until


class Site:
    """A hub with open streams, which have got their first block, and the clock that its handover uses."""

    def __init__(self, count: int, **options: int) -> None:
        self.clock = Clock()
        self.delivery = Delivery(**options)
        self.hub = self.delivery.hub
        self.clients: list[QueueClient] = []
        self.ended: list[QueueClient] = []
        """Those that were dismissed."""
        for _ in range(count):
            self.open()

    def open(self, user: str | None = None) -> None:
        client = self.delivery.connect(user=user)
        next(client)
        self.clients.append(client)
        note(client, lambda: self.ended.append(client))

    def begin(self) -> Handover:
        """Begin a handover. It is time for the first wave."""
        waves = Handover(self.hub, self.clock)
        assert waves.end_next() == pytest.approx(START_SECONDS)
        assert self.ended == []
        self.clock.now += START_SECONDS
        return waves


def note(client: QueueClient, happens: Callable[[], None]) -> None:
    """Have this happen when the client is dismissed."""
    dismiss = client.dismiss

    def dismiss_and_tell(reason: ByeReason) -> bool:
        happens()
        return dismiss(reason)

    client.dismiss = dismiss_and_tell  # type: ignore[method-assign]


def retry_of(client: Client) -> int:
    return int(b"".join(client).partition(b"\nretry: ")[2].partition(b"\n")[0])


# -- the waves ---------------------------------------------------------------------------------------------------------


def test_streams_end_in_waves_in_the_order_in_which_they_were_opened() -> None:
    site = Site(2 * WAVE_STREAMS + 1)
    waves = site.begin()
    for count in (WAVE_STREAMS, 2 * WAVE_STREAMS):
        assert waves.end_next() == pytest.approx(WAVE_SECONDS)
        assert site.ended == site.clients[:count]
        assert waves.end_next() == pytest.approx(WAVE_SECONDS)  # it is not time yet
        assert site.ended == site.clients[:count]
        site.clock.now += WAVE_SECONDS
    assert waves.end_next() is None
    assert site.ended == site.clients
    assert waves.ended == len(site.clients)


def test_waves_of_many_streams_are_larger_so_that_all_end_in_time() -> None:
    site = Site(50 * WAVE_STREAMS)
    began = site.clock.now
    waves = site.begin()
    sizes = [0]
    while (pause := waves.end_next()) is not None:
        sizes.append(waves.ended - sum(sizes))
        site.clock.now += pause
    assert site.clock.now - began < HANDOVER_SECONDS
    assert waves.ended == len(site.clients)
    assert WAVE_STREAMS < max(sizes) < 2 * WAVE_STREAMS


def test_a_thread_that_is_late_ends_all_streams_whose_turn_has_come() -> None:
    site = Site(4 * WAVE_STREAMS)
    waves = site.begin()
    waves.end_next()
    site.clock.now += 2.5 * WAVE_SECONDS
    assert waves.end_next() == pytest.approx(0.5 * WAVE_SECONDS)
    assert waves.ended == 3 * WAVE_STREAMS


def test_streams_that_wait_for_their_wave_get_all_events_and_the_others_get_them_when_they_return() -> None:
    site = Site(WAVE_STREAMS + 1)
    waves = site.begin()
    first, second = site.clients[0], site.clients[-1]
    site.delivery.deliver()
    waves.end_next()
    site.delivery.deliver()
    assert numbers(second, 2) == [1, 2]
    bye = last(first)
    assert (bye.type, bye.json, bye.id) == ("sse_bye", {"reason": "shutdown"}, "x-0")
    assert site.hub.reopen(0)  # stands for another process with the same history
    returned = site.delivery.connect(cursor=bye.id)
    assert [event for event, _, _ in take(returned, 1)] == ["sse_open"]
    assert numbers(returned, 2) == [1, 2]


def test_while_streams_end_in_waves_no_stream_opens() -> None:
    site = Site(WAVE_STREAMS + 1)
    site.begin().end_next()
    assert site.hub.refuses
    assert site.hub.closing is None
    with pytest.raises(ClosedError):
        site.delivery.connect()


def test_a_kick_reaches_a_stream_that_waits_for_its_wave() -> None:
    site = Site(WAVE_STREAMS)
    site.open("ada")
    waves = site.begin()
    waves.end_next()
    assert site.hub.dismiss("kicked", "ada") == 1
    site.clock.now += WAVE_SECONDS
    assert waves.end_next() is None
    assert last(site.clients[-1]).json == {"reason": "kicked"}


def test_no_wave_waits_for_clients_that_have_left() -> None:
    site = Site(3 * WAVE_STREAMS)
    waves = site.begin()
    waves.end_next()
    for client in site.clients:
        client.close()
    assert waves.end_next() is None


# -- when the clients return -------------------------------------------------------------------------------------------


def test_a_client_of_a_wave_returns_within_a_second() -> None:
    site = Site(WAVE_STREAMS)
    site.begin().end_next()
    least, most = RETURN_MS
    retries = [retry_of(client) for client in site.clients]
    assert least <= min(retries) < max(retries) <= most == 1_000
    assert len(set(retries)) > WAVE_STREAMS / 3


def test_clients_of_large_waves_wait_longer_so_that_not_all_return_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "HANDOVER_SECONDS", START_SECONDS + 2 * WAVE_SECONDS)
    site = Site(1_320)
    waves = site.begin()
    waves.end_next()
    site.clock.now += WAVE_SECONDS
    assert waves.end_next() is None
    retries = sorted(retry_of(client) for client in site.clients)
    # At 600 in a second, 2.2 s are needed for them. The waves take 0.2 s of it.
    assert retries[0] >= RETURN_MS[0]
    assert RETURN_MS[1] + 1_900 < retries[-1] <= RETURN_MS[1] + 2_000


def test_the_option_wins_over_the_short_time_to_return() -> None:
    site = Site(2, retry_ms=7_000)
    site.begin().end_next()
    assert retry_of(site.clients[0]) == 7_000


# -- how a handover is ended -------------------------------------------------------------------------------------------


def test_closing_the_hub_ends_the_streams_that_are_left_and_spreads_their_return() -> None:
    site = Site(2 * WAVE_STREAMS)
    waves = site.begin()
    waves.end_next()
    site.hub.close("shutdown")
    site.clock.now += WAVE_SECONDS
    assert waves.end_next() is None
    assert [last(client).type for client in site.clients[-2:]] == ["sse_bye"] * 2
    retries = [retry_of(client) for client in site.clients[WAVE_STREAMS:-2]]
    assert min(retries) >= 1_000
    assert max(retries) > RETURN_MS[1]


def test_a_hub_that_opens_again_keeps_the_streams_that_are_left() -> None:
    site = Site(2 * WAVE_STREAMS)
    waves = site.begin()
    waves.end_next()
    assert site.hub.reopen(0)
    site.clock.now += WAVE_SECONDS
    assert waves.end_next() is None
    assert site.ended == site.clients[:WAVE_STREAMS]
    site.delivery.deliver()
    assert numbers(site.clients[-1], 1) == [1]
    next(site.delivery.connect())
    again = Handover(site.hub, site.clock)  # a second handover, and the first one has no part in it
    assert waves.end_next() is None
    assert again.end_next() is not None


def test_a_hub_that_is_closed_hands_nothing_over() -> None:
    site = Site(2)
    site.hub.close("shutdown")
    assert Handover(site.hub, site.clock).end_next() is None
    assert site.ended == []
    assert not site.hub.handover


def test_a_handover_stops_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "START_SECONDS", 0.0)
    site = Site(2 * WAVE_STREAMS)
    Handover(site.hub, site.clock).run(Deadline(WAVE_SECONDS / 2))
    assert site.ended == site.clients[:WAVE_STREAMS]


# -- draining ----------------------------------------------------------------------------------------------------------


class Sharing:
    """Gives managers with the URL of a Redis a backend in memory. It seems to reach other processes, too."""

    def reaches(self, manager: SSEManager) -> bool:
        return True

    def make_state(self, manager: SSEManager, make: Callable[[Parts], ProcessState]) -> ProcessState:
        return make(Parts(make_backend=lambda url, frames: MemoryBackend()))


class Draining:
    """A manager with open streams, and how many of them were dismissed one by one."""

    def __init__(self, streams: int, *, url: str = "redis://localhost/0", stopping: bool = False) -> None:
        self.manager = SSEManager(backend=url)
        self.process = process_of(self.manager)
        self.process.reopen(lambda: stopping)
        self.dismissed = 0
        self.clients = [self.manager.subscribe() for _ in range(streams)]
        for client in self.clients:
            next(client)
            assert isinstance(client, QueueClient)
            note(client, self.count)

    def count(self) -> None:
        self.dismissed += 1

    def begin(self) -> None:
        self.process.drain()

    def wait_until_closed(self) -> None:
        wait_until(lambda: self.process.hub.closing == "shutdown", "all streams have ended")

    def byes(self) -> int:
        """How many streams have an end, whatever has ended them."""
        return sum(b"sse_bye" in b"".join(client) for client in self.clients)


Make = Callable[..., Draining]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr("sse_batcher.manager_state.stand_ins", [Sharing()])
    monkeypatch.setattr(handover, "START_SECONDS", 0.0)
    made: list[Draining] = []

    def make_one(streams: int, **options: Any) -> Draining:
        made.append(Draining(streams, **options))
        return made[-1]

    yield make_one
    for draining in made:
        draining.manager.shutdown(0)


def test_a_drain_ends_many_streams_in_waves_and_logs_how_long_it_took(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draining = make(2 * WAVE_STREAMS)
    first, go_on = threading.Event(), threading.Event()
    end_next = Handover.end_next

    def wait_after_first(self: Handover) -> float | None:
        pause = end_next(self)
        first.set()
        assert go_on.wait(TIMEOUT)
        return pause

    monkeypatch.setattr(Handover, "end_next", wait_after_first)
    with caplog.at_level(logging.INFO, "sse_batcher.manager"):
        draining.begin()
        assert first.wait(TIMEOUT)
        assert draining.dismissed == WAVE_STREAMS
        assert draining.process.hub.closing is None
        assert draining.manager.unhealthy_reason() == "draining"
        draining.begin()  # as the watcher does, again and again
        go_on.set()
        draining.wait_until_closed()
    assert draining.dismissed == 2 * WAVE_STREAMS
    fields = [vars(record) for record in caplog.records]
    assert [each["sse_code"] for each in fields] == ["draining", "handed_over"]
    assert fields[1]["sse_clients"] == 2 * WAVE_STREAMS
    assert fields[1]["sse_seconds"] >= WAVE_SECONDS


@pytest.mark.parametrize(
    ("streams", "url"), [(WAVE_STREAMS, "redis://localhost/0"), (3 * WAVE_STREAMS, "memory://")], ids=["few", "memory"]
)
def test_few_streams_end_at_once_and_so_do_those_of_a_backend_for_one_process(
    make: Make, streams: int, url: str
) -> None:
    draining = make(streams, url=url)
    draining.begin()
    draining.wait_until_closed()
    assert draining.dismissed == 0
    assert draining.byes() == streams


def test_a_shutdown_waits_for_the_waves_of_a_drain(make: Make) -> None:
    draining = make(3 * WAVE_STREAMS)
    draining.begin()
    assert draining.manager.shutdown()
    assert draining.dismissed == 3 * WAVE_STREAMS


def test_a_shutdown_ends_streams_in_waves_if_the_server_is_stopping(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server may end the process before the next tick, at which its streams would notice that it is stopping.
    limits: list[float | None] = []
    run = Handover.run

    def note_limit(self: Handover, deadline: Deadline) -> None:
        limits.append(deadline.left())
        run(self, deadline)

    monkeypatch.setattr(Handover, "run", note_limit)
    goes_on, stops = make(WAVE_STREAMS + 1), make(WAVE_STREAMS + 1, stopping=True)
    assert goes_on.manager.shutdown(TIMEOUT)
    assert (goes_on.dismissed, goes_on.byes()) == (0, WAVE_STREAMS + 1)
    assert stops.manager.shutdown(TIMEOUT)
    assert stops.dismissed == WAVE_STREAMS + 1
    [limit] = limits
    assert limit is not None
    assert limit <= TIMEOUT - CLOSE_SECONDS


def test_a_shutdown_without_time_ends_all_streams_at_once(make: Make) -> None:
    draining = make(3 * WAVE_STREAMS, stopping=True)
    draining.manager.shutdown(0)
    assert draining.dismissed <= WAVE_STREAMS
    assert draining.byes() == 3 * WAVE_STREAMS


class SecondSignal(BaseException):
    """As a signal handler raises it."""


def test_an_exception_of_a_signal_handler_ends_the_streams_that_wait_for_their_wave(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    draining = make(3 * WAVE_STREAMS, stopping=True)

    def interrupt(self: Handover, deadline: Deadline) -> None:
        self.end_next()
        raise SecondSignal

    monkeypatch.setattr(Handover, "run", interrupt)
    with pytest.raises(SecondSignal):
        draining.manager.shutdown()
    assert draining.process.hub.closing == "shutdown"
    assert draining.byes() == 3 * WAVE_STREAMS


@pytest.mark.parametrize("where", ["_log.info", "Handover.run"])
def test_an_exception_of_a_signal_handler_leaves_no_drain_that_the_next_shutdown_waits_for(
    make: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    draining = make(3 * WAVE_STREAMS, stopping=True)
    slept: list[float] = []
    monkeypatch.setattr("sse_batcher.draining.time.sleep", slept.append)
    monkeypatch.setattr(f"sse_batcher.draining.{where}", raise_signal)
    with pytest.raises(SecondSignal):
        draining.manager.shutdown()
    draining.manager.shutdown()
    assert slept == []


def raise_signal(*_: object, **__: object) -> None:
    raise SecondSignal


def test_without_a_further_thread_all_streams_end_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # The calling thread may be the loop, which writes to all streams.
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    draining = make(3 * WAVE_STREAMS)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        draining.begin()
    assert draining.process.hub.closing == "shutdown"
    assert (draining.dismissed, draining.byes()) == (0, 3 * WAVE_STREAMS)
    assert draining.process.hub.reopen(0)
    for _ in range(3 * WAVE_STREAMS):
        draining.manager.subscribe()
    draining.begin()  # nothing is under way
    draining.wait_until_closed()


def test_of_two_drains_at_once_the_newer_one_ends_the_streams_in_waves(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    draining = make(3 * WAVE_STREAMS)
    run = Handover.run
    second: list[Handover] = []

    def overtake(self: Handover, deadline: Deadline) -> None:
        second.append(Handover(draining.process.hub))
        run(self, deadline)

    monkeypatch.setattr(Handover, "run", overtake)
    draining.begin()
    name = "sse_batcher-drain"
    wait_until(lambda: all(thread.name != name for thread in threading.enumerate()), "the first drain is over")
    assert draining.process.hub.closing is None
    assert draining.dismissed == 0
    run(second[0], Deadline(None))
    assert draining.dismissed == 3 * WAVE_STREAMS


def test_a_drain_stops_without_closing_if_the_server_has_gone_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    draining = make(3 * WAVE_STREAMS)
    monkeypatch.setattr("sse_batcher.process_state.REOPEN_SECONDS", 0)
    end_next = Handover.end_next

    def reopen(self: Handover) -> float | None:
        pause = end_next(self)
        draining.process.reopen(lambda: False)
        return pause

    monkeypatch.setattr(Handover, "end_next", reopen)
    draining.begin()
    name = "sse_batcher-drain"
    wait_until(lambda: all(thread.name != name for thread in threading.enumerate()), "the drain is over")
    assert draining.dismissed == WAVE_STREAMS
    assert draining.manager.unhealthy_reason() is None
    client = draining.manager.subscribe()
    assert [event.type for event in parse(next(client))] == ["sse_open"]
