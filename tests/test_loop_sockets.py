"""The loop and its sockets: those that are full, break, or take a part of what they are sent."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.streams.history import ResumePoint
from sse_batcher.transports.detached import connection as connections
from sse_batcher.transports.detached import group as groups
from sse_batcher.transports.detached.connection import SocketClient

from .kit.site import Site, events, fail, has_ended, numbers, read, read_again
from .kit.sse_parser import parse

# -- clients that are slow ---------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_delays_no_other_and_gets_all_in_the_end(site: Site) -> None:
    slow, quick = site.connect(small=True), site.connect()
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    assert len(events(quick)) == 20
    assert site.hub.count()["clients_by_state"] == {"live": 1, "behind": 1}
    assert site.hub.count()["overflows"] == 1
    assert read_again(site, slow) == ["x" * 2_000] * 20
    site.deliver()
    assert (numbers(slow), numbers(quick)) == ([21], [21])
    assert site.hub.count()["clients_by_state"] == {"live": 2, "behind": 0}


def test_a_client_that_reads_too_late_gets_a_gap_between_two_frames(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=5))
    slow = site.connect(small=True)
    for _ in range(40):
        site.deliver(1, "x" * 1_500)
    data = b""
    while part := read(slow):
        data += part
        site.loop.run()
    got = list(parse(data))
    frames = [event for event in got if event.type == "t"]
    (gap,) = [event for event in got if event.type == "sse_gap"]
    assert all(event.data == json.dumps("x" * 1_500) for event in frames)  # also the one that was cut
    assert got[-1] is gap
    assert gap.id == "x-40"
    site.deliver(1, "on")
    assert numbers(slow) == ["on"]


def test_a_client_that_does_not_read_keeps_no_frames_but_the_one_that_was_cut(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=5))
    for _ in range(10):
        site.connect(small=True)
    kept = []
    for _ in range(100):
        frame = site.delivery.frame("x" * 20_000)
        kept.append(weakref.ref(frame))
        site.hub.deliver(frame)
        del frame
        site.loop.run()
    gc.collect()
    assert sum(reference() is not None for reference in kept) == 5
    rests = [connection.rest for connection in site.loop.clients.values()]
    assert all(isinstance(rest, memoryview) and len(rest) < 20_100 for rest in rests)
    assert len({id(rest.obj) for rest in rests if isinstance(rest, memoryview)}) == 1  # of the same frame, shared


def test_a_client_that_takes_nothing_is_given_up_and_a_slow_one_is_not(make_site: Callable[..., Site]) -> None:
    site = make_site(send_timeout=30.0)
    stalled, slow = site.connect(small=True), site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    for _ in range(7):
        assert slow.recv(6_000)
        site.wait(5)
    site.wait(1)
    assert read(stalled)
    assert has_ended(stalled)
    assert site.hub.count()["clients"] == 1
    assert site.delivery.left == [(1, "left")]


def test_the_lease_of_a_stalled_client_does_not_keep_it(make_site: Callable[..., Site]) -> None:
    site = make_site(send_timeout=30.0, max_stream_age=10.0)
    site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    for _ in range(40):
        site.wait(1.5)
    assert site.hub.count()["clients"] == 0


def test_what_waits_of_frames_in_the_history_does_not_count_as_kept(site: Site) -> None:
    client = site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    read(client)
    site.loop.run()  # it reads the history, and its socket is full again
    (ours,) = site.loop.clients.values()
    assert ours.behind
    assert ours.rest
    assert (site.loop.kept, site.loop.kept_bytes) == ({}, 0)


def test_a_client_is_given_up_at_the_very_end_of_its_time(make_site: Callable[..., Site]) -> None:
    site = make_site(send_timeout=30.0)
    site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    (ours,) = site.loop.clients.values()
    start = site.clock()
    for seconds in (0.0, 22.5):
        ours.check(start + seconds)
    assert ours.dismissed is None
    ours.check(start + 30.0)
    assert ours.dismissed == "left"


def test_a_client_is_looked_at_a_few_times_in_its_time(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(send_timeout=30.0)
    site.connect()
    looks: list[int] = []
    monkeypatch.setattr(connections, "has_taken_all", lambda fd: looks.append(fd) or True)
    monkeypatch.setattr(connections, "sign_of_life", fail)  # not asked of one that has taken all: it costs more
    site.wait(30)
    (ours,) = site.loop.clients.values()
    assert set(looks) == {ours.fd}
    assert connections.STALL_CHECKS <= len(looks) <= connections.STALL_CHECKS + 1


# -- what a socket takes -----------------------------------------------------------------------------------------------


def test_what_a_client_was_handed_is_what_it_has_read(site: Site) -> None:
    first = site.connect("a")
    site.connect("b")
    site.deliver(1, channel="b")
    second = site.connect("a")  # where its group has not been
    old, new = (connection for connection in site.loop.clients.values() if connection.channels == ("a",))
    before = old.handed, new.handed
    site.wait(15)
    site.deliver(2, channel="a")
    new.group.leave(new)
    site.delivery.deliver(1, channel="a")
    for _ in new.serve():  # it reads that itself before its group does, and is where that will be
        pass
    site.loop.run()
    for client, connection, (frames, size) in zip((first, second), (old, new), before, strict=True):
        assert connection.handed == (frames + 3, size + len(read(client)))


def test_what_a_client_was_handed_does_not_include_what_its_group_sent_before(site: Site) -> None:
    site.connect()
    site.deliver(2)
    client = site.connect()
    _, new = site.loop.clients.values()
    frames, opening = new.handed
    assert frames == 0
    site.deliver(1)
    size = opening + len(read(client))
    assert new.handed == (1, size)
    new.group.leave(new)
    assert new.handed == (1, size)
    site.deliver(1)
    site.loop.post(new)
    site.loop.run()
    assert new.handed == (2, size + len(read(client)))


def test_bytes_that_are_counted_are_those_that_were_sent(site: Site) -> None:
    client = site.connect()
    (ours,) = site.loop.clients.values()
    _, opening = ours.handed
    counted = site.hub.count()["bytes"]
    site.deliver(3)
    ours.group.leave(ours)
    ours.point = ResumePoint(1)  # so it reads two frames again
    site.loop.post(ours)
    site.loop.run()
    site.hub.dismiss("kicked")
    site.loop.run()
    got = read(client)
    assert [event.type for event in parse(got)] == ["t"] * 5 + ["sse_bye"]
    assert (site.hub.count()["bytes"] - counted, ours.handed[1] - opening) == (len(got), len(got))
    assert ours.handed[0] == site.hub.count()["frames"] == 5


@pytest.mark.parametrize("sent", ["frames", "the last block"])
def test_a_client_whose_connection_takes_no_send_is_closed_at_once(
    site: Site, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = site.connect()
    site.deliver()
    read(client)
    (ours,) = site.loop.clients.values()
    monkeypatch.setattr(connections, "send_to", lambda fd, data: None)
    if sent == "frames":
        ours.group.leave(ours)
        ours.point = ResumePoint(0)
        site.loop.post(ours)
    else:
        site.hub.dismiss("kicked")
    site.loop.run()
    assert has_ended(client)
    assert len(site.loop) == 0
    assert site.delivery.left == [(1, "left" if sent == "frames" else "kicked")]


def test_a_client_whose_connection_breaks_at_its_first_block_joins_no_group(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = site.connect()
    (group,) = {ours.group for ours in site.loop.clients.values()}
    monkeypatch.setattr(connections, "send_to", lambda fd, data: None)
    with pytest.raises(AssertionError):
        site.connect()
    assert site.delivery.left == [(2, "left")]
    assert len(group.in_step) == len(site.loop) == 1
    site.deliver()
    assert numbers(other) == [1]


def test_the_descriptor_0_is_one_like_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.connect()
    (ours,) = site.loop.clients.values()
    ours.check(site.clock())  # whether it has stalled is not checked again at this time
    real, ours.fd, lease, ours.lease = ours.fd, 0, ours.lease, site.clock()
    ours.check(site.clock())
    assert ours.dismissed == "lease"
    ours.fd, ours.lease, ours.dismissed = real, lease, None
    ours.group.leave(ours)
    ours.fd = 0
    assert list(ours.serve()) == []  # it has nothing to read, so it is live again
    ours.fd = real
    assert ours.live
    closed: list[int] = []
    forget, hang_up = site.loop.forget, connections.hang_up

    def forget_real(client: SocketClient) -> None:
        client.fd = real  # the loop knows it by this number
        forget(client)
        client.fd = 0

    monkeypatch.setattr(site.loop, "forget", forget_real)
    monkeypatch.setattr(connections, "hang_up", closed.append)
    ours.fd = 0
    ours.close("left")
    assert closed == [0]
    hang_up(real)


ONE_FRAME = len(b"event: t\ndata: 1\nid: x-1\n\n")


@pytest.mark.parametrize("taken", [0, 1, ONE_FRAME - 1, ONE_FRAME, ONE_FRAME + 1, 2 * ONE_FRAME - 1])
def test_what_a_socket_does_not_take_of_two_frames_follows(
    site: Site, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [site.connect() for _ in range(2)]
    before = site.hub.count()
    send = groups.send
    with monkeypatch.context() as patch:
        patch.setattr(groups, "send", lambda fd, data, size, flags: send(fd, data[:taken], groups.sized(taken), flags))
        site.delivery.deliver(2)
        for _ in range(3):
            site.loop.turn(0)
    site.loop.run()
    blocks = b"".join(f"event: t\ndata: {number}\nid: x-{number}\n\n".encode() for number in (1, 2))
    assert [read(client) for client in clients] == [blocks] * 2
    after = site.hub.count()
    assert {name: after[name] - before[name] for name in ("frames", "bytes", "overflows")} == {
        "frames": 4,
        "bytes": 2 * len(blocks),
        "overflows": 2,
    }


def test_frames_that_a_broken_connection_did_not_take_are_not_counted(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = site.connect()
    (ours,) = site.loop.clients.values()
    handed, before = ours.handed, site.hub.count()
    monkeypatch.setattr(groups, "send", lambda *_: -1)
    monkeypatch.setattr(groups, "taken", lambda sent: None)
    site.deliver(2)
    assert has_ended(client)
    assert site.delivery.left == [(1, "left")]
    assert ours.handed == handed
    after = site.hub.count()
    assert [after[name] for name in ("frames", "bytes", "overflows")] == [
        before[name] for name in ("frames", "bytes", "overflows")
    ]


def test_a_first_block_that_the_socket_does_not_take_at_once_is_sent_later(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_to, refused = connections.send_to, []

    def send_later(fd: int, data: bytes) -> int | None:
        if refused:
            return send_to(fd, data)
        refused.append(data)
        return 0

    monkeypatch.setattr(connections, "send_to", send_later)
    client = site.connect()  # reads the first block
    assert len(refused) == 1
    site.deliver()
    assert numbers(client) == [1]
