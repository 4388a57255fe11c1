"""The loop: what one thread writes to many connections. Stepped by the test, on real sockets and a clock of ours."""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import Batch, Event
from sse_batcher.manager_state import process_of
from sse_batcher.streams.history import MAX_FLOORS
from sse_batcher.transports.detached import connection as connections
from sse_batcher.transports.detached import group as groups
from sse_batcher.transports.detached.loop import GATHER_SECONDS, LOOP_TICK_SECONDS, ROUND_SECONDS, Loop
from sse_batcher.transports.watcher import Watcher
from sse_batcher.wire import LAST_CHUNK, Frame, chunk

from .kit.exchange import descriptors
from .kit.site import Site, Threaded, batched, events, fail, has_ended, numbers, read, read_again
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT


class Sends:
    """What is sent, and to which descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[tuple[int, bytes]] = []
        self._send = groups.send
        monkeypatch.setattr(groups, "send", self)
        monkeypatch.setattr(connections, "send_to", self._send_to)

    def _send_to(self, fd: int, data: bytes) -> int | None:
        return groups.taken(self(fd, data, groups.sized(len(data)), groups.FLAGS))

    def __call__(self, fd: int, data: bytes, size: Any, flags: int) -> int:
        assert flags == groups.FLAGS
        self.all.append((fd, data))
        return self._send(fd, data, size, flags)


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_clients_get_the_frames_of_their_channels_and_broadcasts(site: Site) -> None:
    one, two = site.connect("a"), site.connect("a", "b")
    site.deliver(1, "to a", "a")
    site.deliver(1, "to b", "b")
    site.deliver(1, "to all", "*")
    assert (numbers(one), numbers(two)) == (["to a", "to all"], ["to a", "to b", "to all"])


def test_all_with_the_same_channels_are_sent_the_same_bytes_object(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        site.connect("a", chunked=True)
    sends = Sends(monkeypatch)
    site.deliver(1, channel="a")
    assert len(sends.all) == 5
    assert len({id(data) for _, data in sends.all}) == 1


def test_frames_that_wait_together_go_out_in_one_piece(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client = site.connect()
    sends = Sends(monkeypatch)
    site.delivery.deliver(10)
    site.loop.run()
    assert len(sends.all) == 1
    assert numbers(client) == list(range(1, 11))


def test_each_frame_is_a_chunk_where_the_head_says_chunked(site: Site) -> None:
    client = site.connect(chunked=True)
    site.deliver(2, "x")
    blocks = [f'event: t\ndata: "x"\nid: x-{number}\n\n'.encode() for number in (1, 2)]
    assert read(client) == b"".join(map(chunk, blocks))


def test_a_client_without_batches_gets_each_event_as_its_own_block(site: Site) -> None:
    client = site.connect(batches=False)
    batched = tuple(Event("t", "default", str(number)) for number in (1, 2, 3))
    site.delivery.position += 1
    site.hub.deliver(Frame(Batch("default", "t", batched, "manual", 0), 1, "x-1"))
    site.loop.run()
    assert [(event.data, event.id) for event in events(client)] == [("1", "x-1.1"), ("2", "x-1.2"), ("3", "x-1")]


def test_what_batches_save_is_counted_for_each_client_that_gets_them(site: Site) -> None:
    for batches in (True, True, False):
        site.connect(batches=batches)
    site.connect("other")
    batched = tuple(Event("t", "default", str(number)) for number in range(20))
    site.delivery.position += 1
    frame = Frame(Batch("default", "t", batched, "manual", 0), 1, "x-1")
    site.hub.deliver(frame)
    site.loop.run()
    counts = site.hub.count()
    assert (counts["frames"], counts["saved_frames"]) == (3, 2 * 19)
    assert counts["saved_bytes"] == 2 * frame.saved_bytes > 0


def test_a_client_that_returns_gets_what_it_missed_and_then_new_events(site: Site) -> None:
    site.deliver(600)
    client = site.connect(cursor="x-3")
    site.deliver()
    assert read_again(site, client) == list(range(4, 602))


def test_what_was_delivered_between_the_first_block_and_the_take_over_is_sent(site: Site) -> None:
    client = site.delivery.connect()
    first = next(client)
    site.delivery.deliver(3)  # queued, as for an attached one
    theirs = site.hand_over(client, first)
    site.delivery.deliver(2)
    site.loop.run()
    assert numbers(theirs)[1:] == [1, 2, 3, 4, 5]


def test_a_quiet_channel_has_no_gap_where_others_are_many(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=10))
    client = site.connect("quiet")
    site.deliver(1, "first", "quiet")
    for number in range(MAX_FLOORS + 50):
        site.delivery.deliver(1, channel=f"other{number}")
    site.wait(15)  # a heartbeat must not look at the history either
    site.deliver(1, "second", "quiet")
    assert [event.type for event in events(client)] == ["t", "t"]


def test_all_clients_get_a_gap_for_a_lost_frame_and_then_new_events(site: Site) -> None:
    one, two = site.connect(), site.connect()
    site.deliver()
    site.delivery.position += 1
    site.hub.lose("default", site.delivery.position)
    site.loop.run()
    site.wait(15)
    site.deliver()
    for client in (one, two):
        got = events(client)
        assert [event.type for event in got] == ["t", "sse_gap", "t"]
        assert [json.loads(event.data).get("reason") for event in got[1:2]] == ["publish_failed"]
        assert [event.id for event in got] == ["x-1", "x-2", "x-3"]


@pytest.mark.parametrize("chunked", [False, True])
def test_live_clients_get_each_batch_in_one_block(site: Site, chunked: bool) -> None:
    clients = [site.connect(chunked=chunked) for _ in range(2)]
    frames = []
    for count in (3, 2):
        frames.append(batched(site, "default", count))
        site.loop.run()
    blocks = [frame.plain for frame in frames]
    assert [read(client) for client in clients] == [b"".join(map(chunk, blocks) if chunked else blocks)] * 2
    counts = site.hub.count()
    assert (counts["frames"], counts["saved_frames"]) == (4, 2 * (2 + 1))
    assert counts["saved_bytes"] == 2 * sum(frame.saved_bytes for frame in frames)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_has_a_part_of_a_frame_gets_its_rest_and_then_whole_frames(site: Site, chunked: bool) -> None:
    first, second = batched(site, "a", 3), batched(site, "a", 2)
    client = site.connect("a", cursor="x-1.1", chunked=chunked)
    blocks = [first.rest(1), second.plain]
    assert read(client) == b"".join(map(chunk, blocks) if chunked else blocks)


def test_a_part_of_a_frame_of_another_channel_takes_nothing_from_the_next_frame(site: Site) -> None:
    batched(site, "a", 3)
    frame = batched(site, "b", 2)
    client = site.connect("b", cursor="x-1.1")  # of a stream that had the channel "a", too
    assert read(client) == frame.plain


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunked", "beat"), [(False, b":\n"), (True, b"2\r\n:\n\r\n")])
def test_a_heartbeat_is_sent_after_a_silence(site: Site, chunked: bool, beat: bytes) -> None:
    client = site.connect(chunked=chunked)
    site.wait(14)
    assert read(client) == b""
    site.wait(1)
    assert read(client) == beat
    site.wait(8)
    site.deliver()
    assert read(client)
    site.wait(14)
    assert read(client) == b""
    site.wait(1)
    assert read(client) == beat


@pytest.mark.parametrize("chunked", [False, True])
def test_a_stream_ends_with_a_goodbye_when_its_lease_is_over(site: Site, chunked: bool) -> None:
    client = site.connect(chunked=chunked)
    site.deliver()
    read(client)
    site.wait(1_430)
    assert b"sse_bye" not in read(client)
    site.wait(371)
    site.wait(1)
    data = read(client)
    assert b'data: {"reason":"lease"}\nid: x-1\n\n' in data
    assert data.endswith(LAST_CHUNK) == chunked
    assert has_ended(client)
    assert site.delivery.left == [(1, "lease")]


def test_a_group_sends_a_heartbeat_only_if_it_is_due_and_the_group_is_not_busy(site: Site) -> None:
    client = site.connect()
    (ours,) = site.loop.clients.values()
    group = ours.group
    due = group.sent_at + group.heartbeat
    for now, busy, expected in [(due - 0.5, False, b""), (due, True, b""), (due, False, b":\n")]:
        site.clock.now, group.busy = now, busy
        list(group.serve())
        assert read(client) == expected


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 1, 9, 300])
def test_a_lease_ends_in_time_however_many_other_streams_have_ended(site: Site, others: int) -> None:
    ending = [site.connect() for _ in range(others)]
    site.connect()
    *_, ours = site.loop.clients.values()
    site.wait(ROUND_SECONDS + LOOP_TICK_SECONDS)  # into the middle of a round
    for client in ending:
        client.close()
    site.loop.run()
    ours.lease = site.clock()
    site.wait(ROUND_SECONDS + LOOP_TICK_SECONDS)
    assert site.delivery.left == [*((number, "left") for number in range(1, others + 1)), (others + 1, "lease")]


def test_a_lease_is_over_at_its_very_end(site: Site) -> None:
    site.connect()
    (ours,) = site.loop.clients.values()
    ours.lease = site.clock() + 1
    ours.check(site.clock())
    assert ours.dismissed is None
    site.clock.now = ours.lease
    ours.check(site.clock())
    assert ours.dismissed == "lease"


def test_a_client_that_leaves_is_forgotten_at_once(site: Site) -> None:
    client = site.connect()
    site.connect("other")
    client.close()
    site.loop.run()
    assert site.hub.count()["clients_by_channel"] == {"other": 1}
    (feed,) = site.loop.feeds.values()
    assert set(feed.channels) == {"other", "*"}


def test_a_client_that_is_live_or_closed_has_nothing_to_do(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.connect()
    (ours,) = site.loop.clients.values()
    monkeypatch.setattr(site.hub, "advance", fail)  # it must not look at the history
    assert list(ours.serve()) == []
    assert list(ours.group.in_step) == [ours]
    ours.close("left")
    assert list(ours.serve()) == []
    assert list(ours.group.in_step) == []
    assert (ours.fd, ours.rest) == (-1, b"")


def test_a_kick_ends_these_streams_and_no_others(site: Site) -> None:
    one, two = site.connect("a"), site.connect("b")
    site.hub.dismiss("kicked", channel="a")
    site.delivery.deliver(1, channel="a")
    site.loop.run()
    assert [event.type for event in events(one)] == ["sse_bye"]
    assert has_ended(one)
    assert not has_ended(two)


def test_a_client_kicked_in_the_middle_of_a_frame_gets_only_its_rest(site: Site) -> None:
    client = site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 1_500)
    site.hub.dismiss("kicked")
    site.loop.run()
    data = b""
    while part := read(client):
        data += part
        site.loop.run()
    got = list(parse(data))
    assert len(got) < 20
    assert [event.type for event in got[-2:]] == ["t", "sse_bye"]
    assert got[-1].id == got[-2].id
    assert has_ended(client)


def test_a_kick_before_the_loop_has_the_connection_is_not_lost(site: Site) -> None:
    client = site.delivery.connect()
    theirs = site.hand_over(client, next(client))
    site.hub.dismiss("kicked")
    site.loop.run()
    assert [event.type for event in events(theirs)] == ["sse_open", "sse_bye"]


def test_a_client_that_is_closed_before_the_loop_has_the_connection_ends(site: Site) -> None:
    client = site.delivery.connect()
    theirs = site.hand_over(client, b"")
    client.close()
    site.loop.run()
    assert has_ended(theirs)
    assert len(site.loop) == 0


def test_at_the_end_all_get_what_is_left_and_a_goodbye(site: Site) -> None:
    live, behind = site.connect(), site.connect(small=True)
    for _ in range(10):
        site.deliver(1, "x" * 2_000)
    read(live)
    site.delivery.deliver(1, "last")
    site.hub.close("shutdown")
    site.loop.run()
    assert [event.type for event in events(live)] == ["t", "sse_bye"]
    data = b""
    while part := read(behind):
        data += part
        site.loop.run()
    got = list(parse(data))
    assert [event.type for event in got] == ["t"] * 11 + ["sse_bye"]
    assert has_ended(live)
    assert has_ended(behind)
    assert site.hub.wait_until_left(0)


def test_a_server_that_stops_has_its_manager_drained(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    drained: list[bool] = []
    with site.manager:
        monkeypatch.setattr(process_of(site.manager), "drain", lambda: drained.append(True))
        site.connect()
        site.wait(1)
        assert len(drained) == 0
        site.server.stopping = True
        site.wait(3 * LOOP_TICK_SECONDS)
        assert len(drained) == 1  # once only: it may open again while this connection is still there
        site.connect()
        site.wait(LOOP_TICK_SECONDS)
        assert len(drained) == 2
        site.server.stopping = False  # it has gone on, with the streams that were left
        site.wait(LOOP_TICK_SECONDS)
        site.server.stopping = True
        site.wait(LOOP_TICK_SECONDS)
        assert len(drained) == 3


def test_one_client_that_fails_ends_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = site.connect(), site.connect()
    third = next(iter(site.loop.clients.values()))
    monkeypatch.setattr(site.hub, "advance", fail)
    third.group.leave(third)
    site.loop.post(third)
    site.loop.run()
    monkeypatch.undo()
    site.deliver()
    assert has_ended(one)
    assert numbers(two) == [1]


def test_one_client_that_cannot_be_checked_ends_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = site.connect(), site.connect()
    broken = next(iter(site.loop.clients.values()))
    check = type(broken).check
    monkeypatch.setattr(type(broken), "check", lambda self, now: fail() if self is broken else check(self, now))
    site.wait(5)
    assert broken not in broken.group.in_step
    site.deliver()
    assert has_ended(one)
    assert numbers(two) == [1]


def test_a_dismissal_counts_each_stream_once(site: Site) -> None:
    site.connect()
    assert [site.hub.dismiss("kicked"), site.hub.dismiss("kicked")] == [1, 0]


# -- what wakes it -----------------------------------------------------------------------------------------------------


def handed_over(site: Site) -> Any:
    client = site.delivery.connect()
    return site.hand_over(client, next(client))


def test_streams_that_come_right_after_another_do_not_wake_the_loop_but_are_taken_in(site: Site) -> None:
    handed_over(site)
    assert site.loop.epoll.poll(0)
    site.loop.turn(0)
    second, third = handed_over(site), handed_over(site)
    assert not site.loop.epoll.poll(0)
    site.loop.turn(GATHER_SECONDS)
    assert read(second).startswith(b"event: sse_open\n")
    assert read(third).startswith(b"event: sse_open\n")
    site.loop.turn(0)  # none came since
    handed_over(site)
    assert site.loop.epoll.poll(0)
    site.loop.run()


class Polls:
    """An epoll that notes how long the loop would wait, and calls `meanwhile` instead of waiting."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.timeouts: list[float] = []
        self.meanwhile: Callable[[], object] = int

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self.timeouts.append(timeout)
        self.meanwhile()
        return self._epoll.poll(0)


def test_the_loop_waits_only_shortly_for_streams_that_do_not_wake_it(make_site: Callable[..., Site]) -> None:
    polls = Polls()
    site = make_site(loop={"epoll": polls})
    handed_over(site)
    site.loop.turn(0)
    polls.timeouts.clear()
    streams: list[Any] = []
    polls.meanwhile = lambda: streams.append(handed_over(site)) if len(streams) < 2 else None
    for _ in range(2):
        site.loop.turn(TIMEOUT)
        assert read(streams[-1]).startswith(b"event: sse_open\n")
    polls.meanwhile = int
    site.loop.turn(TIMEOUT)  # none comes, and it waits for long again
    site.loop.turn(TIMEOUT)
    assert polls.timeouts == pytest.approx([GATHER_SECONDS] * 3 + [LOOP_TICK_SECONDS])


def test_a_frame_wakes_the_loop_although_it_waits_for_streams(site: Site) -> None:
    one = site.connect()
    two = handed_over(site)
    assert not site.loop.epoll.poll(0)
    site.delivery.deliver(1, "news", "default")
    assert site.loop.epoll.poll(0)
    site.loop.run()
    assert numbers(one) == ["news"]
    assert [event.type for event in parse(read(two))] == ["sse_open", "t"]


# -- the thread --------------------------------------------------------------------------------------------------------


def thread() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == "sse_batcher-loop"), None)


@pytest.mark.parametrize("make", [Loop, Watcher])
def test_a_loop_that_another_one_has_forestalled_keeps_no_descriptor(make: Callable[[], object]) -> None:
    """Threads that serve the first streams of a process at the same time may each make one. One of them is used."""
    before = descriptors()
    made = make()
    assert len(descriptors()) == len(before) + 2
    del made
    assert descriptors() == before


def test_the_thread_is_there_while_there_are_streams(threaded: Threaded) -> None:
    assert thread() is None
    for _ in range(3):
        client = threaded.connect()
        running = thread()
        assert running is not None
        threaded.manager.enqueue("t", 1)
        assert b"data: 1\n" in client.recv(1_000)
        client.close()
        running.join(TIMEOUT)
        assert not running.is_alive()
    assert threaded.manager.get_stats().thread_restarts == 0  # it has ended, and did not die


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_replaced_and_its_clients_come_back(
    threaded: Threaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = threaded.connect()
    turn, died = threaded.loop.turn, threading.Event()

    def die(patience: float) -> None:
        monkeypatch.setattr(threaded.loop, "turn", turn)
        died.set()
        raise SystemExit

    monkeypatch.setattr(threaded.loop, "turn", die)
    threaded.manager.enqueue("t", 1)
    assert died.wait(TIMEOUT)
    assert threaded.manager.flush_all(TIMEOUT)  # or the event may come to the next client
    while client.recv(1_000):
        pass
    client.close()
    again = threaded.connect()
    threaded.manager.enqueue("t", 2)
    assert b"data: 2\n" in again.recv(1_000)
    assert threaded.manager.get_stats().thread_restarts == 1
    assert "died and is replaced" in caplog.text
    again.close()


def test_a_shutdown_waits_until_all_were_told(threaded: Threaded) -> None:
    client = threaded.connect()
    threaded.manager.enqueue("t", 1)
    assert threaded.manager.shutdown(TIMEOUT)
    data = b""
    while part := client.recv(1_000):
        data += part
    assert [event.type for event in parse(data)] == ["t", "sse_bye"]
    client.close()
