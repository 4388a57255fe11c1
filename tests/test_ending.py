"""How a stream is ended, and who is not let in: leases, limits, kicks, and users whose revalidator have changed."""

from __future__ import annotations

import logging
import random
import re
import threading
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest

from sse_batcher import Client, ClientOptions, InvalidEventError, SSEManager, TooManyClientsError, stream
from sse_batcher.manager_state import process_of
from sse_batcher.runtime.locks import new_lock
from sse_batcher.streams.hub import Hub
from sse_batcher.streams.opening import Snapshot
from sse_batcher.transports.server import ServerInfo
from sse_batcher.wire import HEARTBEAT

from .kit.clock import Clock
from .kit.delivery import Delivery, connect, last, numbers, take
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT, wait_until


def aging(clock: Clock, **options: Any) -> Delivery:
    return Delivery(clock=clock, **options)


def retry_of(block: bytes) -> int:
    return int(block.partition(b"\nretry: ")[2].partition(b"\n")[0])


# -- leases ------------------------------------------------------------------------------------------------------------


def test_a_stream_ends_between_two_frames_when_its_lease_is_over_and_loses_nothing(clock: Clock) -> None:
    delivery = aging(clock, max_stream_age=100)
    client = delivery.connect()
    next(client)
    delivery.deliver(3)
    assert numbers(client, 1) == [1]
    clock.now += 100
    bye = last(client)
    assert (bye.type, bye.json, bye.id) == ("sse_bye", {"reason": "lease"}, "x-1")
    assert delivery.left == [(1, "lease")]
    returned = delivery.connect(cursor=bye.id)
    assert [event for event, _, _ in take(returned, 1)] == ["sse_open"]
    assert numbers(returned, 2) == [2, 3]


def test_a_client_that_is_behind_has_a_lease_too(clock: Clock) -> None:
    delivery = aging(clock, max_stream_age=100, queue_frames=1)
    client = delivery.connect()
    next(client)
    delivery.deliver(3)
    assert client.behind
    assert numbers(client, 1) == [1]
    clock.now += 100
    assert last(client).id == "x-1"


def test_a_silent_stream_ends_when_its_lease_is_over_and_not_at_the_next_heartbeat(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = aging(clock, max_stream_age=100, heartbeat=15)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    client = delivery.connect()
    next(client)
    waited: list[float] = []

    def pass_time(source: Any, timeout: float) -> Any:
        waited.append(timeout)
        clock.now += timeout
        return source.get_nowait()

    monkeypatch.setattr("sse_batcher.streams.client.take", pass_time)
    assert [next(client) for _ in range(6)] == [HEARTBEAT] * 6
    assert last(client).json == {"reason": "lease"}
    assert waited == [15] * 6 + [10]
    for rest in (15, 0.25):  # a heartbeat that is due at the end of the lease is left out
        client = delivery.connect()
        next(client)
        client.lease = clock.now + rest
        assert last(client).json == {"reason": "lease"}
    assert waited[7:] == [15, 0.25]


def test_leases_differ_so_that_those_who_came_together_do_not_leave_together(clock: Clock) -> None:
    delivery = aging(clock, max_stream_age=100)
    ages = sorted(delivery.connect().lease - clock.now for _ in range(200))
    assert 80 <= ages[0] < 85
    assert 95 < ages[-1] <= 100


def test_after_a_lease_the_client_is_told_to_come_back_at_once(clock: Clock) -> None:
    delivery = aging(clock, max_stream_age=1)
    clients = [delivery.connect() for _ in range(50)]
    clock.now += 1
    retries = {retry_of(next(client)) for client in clients if next(client)}
    assert all(100 <= retry <= 1000 for retry in retries)
    assert len(retries) > 10


def test_without_a_lease_a_stream_does_not_end(clock: Clock) -> None:
    delivery = aging(clock, max_stream_age=None, heartbeat=0.001)
    client = delivery.connect()
    next(client)
    clock.now += 1e9
    assert next(client) == HEARTBEAT


# -- limits ------------------------------------------------------------------------------------------------------------


def test_one_client_too_many_is_refused_and_none_is_ended_for_it() -> None:
    delivery = Delivery(max_clients=2)
    clients = [delivery.connect() for _ in range(2)]
    with pytest.raises(TooManyClientsError, match=r"^2 streams are open: close some, or raise max_clients$"):
        delivery.connect()
    assert delivery.hub.count()["clients"] == 2
    assert delivery.left == []
    clients[0].close()
    delivery.connect()


def test_the_limit_of_a_user_is_his_own() -> None:
    delivery = Delivery(max_clients_per_user=1)
    client = delivery.connect("default", user="ada")
    with pytest.raises(TooManyClientsError, match=r"^1 streams of the user 'ada' are open: "):
        delivery.connect("default", user="ada")
    delivery.connect("default", user="bob")
    delivery.connect(), delivery.connect()  # clients without a user have no limit for each user
    client.close()
    delivery.connect("default", user="ada")


@pytest.fixture
def make() -> Iterator[Callable[..., SSEManager]]:
    managers = []

    def make_one(**options: Any) -> SSEManager:
        managers.append(SSEManager(batching=False, clients=ClientOptions(**options)))
        return managers[-1]

    yield make_one
    for manager in managers:
        assert manager.shutdown(TIMEOUT)


def body_of(manager: SSEManager, query: str = "", user: Hashable = None) -> Iterator[bytes]:
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": query}
    status, _, body = stream(manager, environ, user=user)  # type: ignore[arg-type]
    assert status == "200 OK"
    return iter(body)


def test_who_is_refused_by_a_limit_is_told_softly_to_come_back_later(make: Callable[..., SSEManager]) -> None:
    manager = make(max_clients=1, retry_ms=5)
    cursor = manager.cursor()
    opened = body_of(manager)
    next(opened)
    retries = []
    for _ in range(50):
        [block] = body_of(manager, f"last_event_id={cursor}")
        [busy] = parse(block, strict=True)
        assert (busy.type, busy.json, busy.id) == ("sse_busy", {"reason": "limit"}, cursor)
        retries.append(retry_of(block))
    assert all(10_000 <= retry <= 30_000 for retry in retries)
    assert len(set(retries)) > 10
    assert manager.get_stats().clients == 1
    opened.close()  # type: ignore[attr-defined]


# -- kicks -------------------------------------------------------------------------------------------------------------


def test_who_is_kicked_gets_nothing_more_but_the_end_and_where_he_stood() -> None:
    delivery = Delivery()
    client = delivery.connect()
    next(client)
    delivery.deliver(3)
    assert numbers(client, 1) == [1]
    delivery.hub.dismiss("kicked", channel="default")
    bye = last(client)
    assert (bye.type, bye.json, bye.id) == ("sse_bye", {"reason": "kicked"}, "x-1")
    assert delivery.left == [(1, "kicked")]


def test_who_is_kicked_while_his_driver_waits_is_ended_at_once() -> None:
    delivery = Delivery()
    client = delivery.connect()
    next(client)
    blocks: list[bytes] = []
    driver = threading.Thread(target=lambda: blocks.extend(client))
    driver.start()
    client.dismiss("kicked")
    driver.join(TIMEOUT)
    assert b"kicked" in blocks[0]


def test_a_kick_names_a_user_or_a_channel_or_both(make: Callable[..., SSEManager]) -> None:
    manager = make()
    clients = {
        (user, channel): manager.subscribe([channel], user=user) for user in ("ada", "bob") for channel in ("x", "y")
    }
    for client in clients.values():
        next(client)
    for who, ended in [
        ({"user": "ada", "channel": "x"}, {("ada", "x")}),
        ({"user": "nobody"}, set()),
        ({"user": "bob"}, {("bob", "x"), ("bob", "y")}),
        ({"channel": "y"}, {("ada", "y")}),
    ]:
        assert manager.kick(**who) == len(ended)
        assert manager.kick(**who) == 0
        for key in ended:
            assert last(clients.pop(key)).json == {"reason": "kicked"}
        assert manager.get_stats().clients == len(clients)
    with pytest.raises(InvalidEventError, match="say whose streams end"):
        manager.kick()


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ({"user": None}, r"^user is None: nobody is logged in\?$"),
        ({"user": None, "channel": "team-7"}, r"^user is None"),
        ({"user": "ada", "channel": None}, "the channel must be a string, not NoneType"),
        ({"channel": None}, "the channel must be a string"),
        ({"user": True}, "a user is a str or an int, not bool"),
        ({"user": 7.0}, "not float"),
        ({"user": ("ada", 1)}, "not tuple"),
        ({"user": b"ada"}, "not bytes"),
        ({"user": ""}, "1 to 256 characters, not 0"),
        ({"channel": "*"}, "is no channel to kick"),
        ({"channel": ["team-7"]}, "the channel must be a string, not list"),
    ],
)
def test_a_kick_of_what_cannot_be_is_refused(
    make: Callable[..., SSEManager], who: dict[str, Any], message: str
) -> None:
    manager = make()
    client = manager.subscribe(["team-7"], user="ada")
    with pytest.raises(InvalidEventError, match=message) as caught:
        manager.kick(**who)
    assert caught.value.field in who
    manager.enqueue("item", 1, channel="team-7")
    assert manager.flush_all(TIMEOUT)
    assert [event for event, _, _ in take(client, 2)] == ["sse_open", "item"]


@pytest.mark.parametrize(("kicked", "there"), [(7, "7"), ("7", 7)])
def test_a_kick_of_the_same_user_in_another_type_is_hinted_at_once(
    make: Callable[..., SSEManager], caplog: pytest.LogCaptureFixture, kicked: Any, there: Any
) -> None:
    manager = make()
    manager.subscribe(user="07")
    assert manager.kick(user=kicked) == 0
    assert caplog.messages == []
    manager.subscribe(user=there)
    assert [manager.kick(user=kicked) for _ in range(2)] == [0, 0]
    (line,) = caplog.messages
    assert line.startswith(f"kick(user={kicked!r}) ended no stream, but there are streams of the user {there!r}")
    assert manager.kick(user=there) == 1


@pytest.mark.parametrize(("named", "there"), [(7, "7"), ("7", 7)])
def test_an_event_for_the_same_user_in_another_type_is_hinted_at_once(
    make: Callable[..., SSEManager],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    named: Any,
    there: Any,
) -> None:
    manager = make()
    manager.subscribe(user=there)
    for user in (there, [named, "ada"], "07"):
        manager.enqueue("note", 1, user=user)
    assert manager.flush_all(TIMEOUT)
    assert caplog.messages == []
    for _ in range(2):
        manager.enqueue("note", 1, user=named)
        assert manager.flush_all(TIMEOUT)
    (line,) = caplog.messages
    assert line == (
        f"enqueue(user={named!r}) reached no stream, but there are streams of the user {there!r}: these are two users. "
        f"Give enqueue() what identify returns"
    )
    looked: list[object] = []
    monkeypatch.setattr(Hub, "has_user", lambda hub, user: looked.append(user))
    manager.enqueue("note", 1, user=named)
    assert manager.flush_all(TIMEOUT)
    assert looked == []  # there is no other line to log


@pytest.mark.parametrize("user", [True, 7.5, ("a",), "", "x" * 257, 10**256, object()])
def test_a_stream_of_a_user_that_cannot_be_is_refused(make: Callable[..., SSEManager], user: Any) -> None:
    manager = make()
    with pytest.raises(InvalidEventError) as caught:
        manager.subscribe(user=user)
    assert caught.value.field == "user"
    with pytest.raises(InvalidEventError):  # at the call, and not in the first step
        stream(manager, {"REQUEST_METHOD": "GET"}, user=user)
    assert manager.get_stats().clients == 0


# -- kicks of streams that are being opened ----------------------------------------------------------------------------


def told(client: Iterator[bytes]) -> list[tuple[str, str | None, str]]:
    """All that a stream gives that ends with its first step: type, reason and id of each block."""
    events = [(event.type, event.json.get("reason"), event.id) for event in parse(next(client), strict=True)]
    assert [name for name, _, _ in events][1:] == ["sse_bye"]
    assert list(client) == []
    return events


@pytest.mark.parametrize("who", [{"user": "ada"}, {"channel": "a"}, {"user": "ada", "channel": "b"}, {}], ids=str)
def test_a_stream_that_was_kicked_while_it_opened_ends_with_its_first_step(who: dict[str, str]) -> None:
    hub = Delivery().hub
    ticket = hub.ticket
    assert hub.dismiss("kicked", **who) == 0
    client = connect(hub, "a", "b", user="ada", ticket=ticket)
    assert told(client)[-1][1] == "kicked"


@pytest.mark.parametrize(
    "who", [{"user": "bob"}, {"user": 7}, {"channel": "c"}, {"user": "ada", "channel": "c"}], ids=str
)
def test_a_kick_of_others_does_not_count(who: dict[str, str]) -> None:
    hub = Delivery(heartbeat=0.01).hub
    ticket = hub.ticket
    hub.dismiss("kicked", **who)
    client = connect(hub, "a", "b", user="ada", ticket=ticket)
    assert [next(client)[:15], next(client)] == [b"event: sse_open", HEARTBEAT]


def test_a_kick_before_the_ticket_does_not_count() -> None:
    hub = Delivery(heartbeat=0.01).hub
    hub.dismiss("kicked", user="ada")
    client = connect(hub, "a", user="ada", ticket=hub.ticket)
    assert [next(client)[:15], next(client)] == [b"event: sse_open", HEARTBEAT]


def test_a_stream_that_was_revoked_while_it_opened_says_so() -> None:
    hub = Delivery().hub
    ticket = hub.ticket
    hub.dismiss("revoked", user="ada")
    assert told(connect(hub, "a", user="ada", ticket=ticket))[-1][:2] == ("sse_bye", "revoked")


def test_a_stream_that_was_kicked_while_it_opened_gets_no_history_and_loses_none() -> None:
    delivery = Delivery()
    delivery.deliver(3)
    ticket = delivery.hub.ticket
    delivery.hub.dismiss("kicked", user="ada")
    client = delivery.connect("default", cursor="x-1", user="ada", ticket=ticket)
    assert told(client) == [("sse_open", None, "x-1"), ("sse_bye", "kicked", "x-1")]
    assert delivery.left == [(1, "kicked")]
    assert numbers(connected(delivery.connect(cursor="x-1")), 2) == [2, 3]


def connected(client: Client) -> Client:
    next(client)
    return client


STATE = Snapshot("x-3", b"event: state\ndata: 1\nid: x-3\n\n")


@pytest.mark.parametrize(("cursor", "first"), [(None, "sse_open"), ("y-1", "sse_gap")])
@pytest.mark.parametrize("when", ["before connect", "before the first step"])
def test_who_was_kicked_before_the_state_gets_none_and_no_id(cursor: str | None, first: str, when: str) -> None:
    # With an id, the client would come back with that, and not get the state any more.
    delivery = Delivery()
    delivery.deliver(3)
    ticket = delivery.hub.ticket
    if when == "before connect":
        delivery.hub.dismiss("kicked", user="ada")
    client = delivery.connect("default", cursor=cursor, snapshot=STATE, user="ada", ticket=ticket)
    if when == "before the first step":
        delivery.hub.dismiss("kicked", user="ada")
    assert [(name, id) for name, _, id in told(client)] == [(first, ""), ("sse_bye", "")]


def test_who_is_kicked_after_the_state_keeps_the_place() -> None:
    delivery = Delivery()
    client = delivery.connect("default", snapshot=STATE._replace(cursor="x-0"), user="ada")
    assert b"event: state\n" in next(client)
    delivery.hub.dismiss("kicked", user="ada")
    assert last(client).id == "x-0"


class Passed:
    """A lock, with a function that is called once: at the start or end of the block with this number, counted from 0.

    At the end, the lock is free.
    """

    def __init__(self) -> None:
        self.blocks = -1
        self.happens: dict[tuple[str, int], Callable[[], object]] = {}
        self._lock = new_lock()

    def __enter__(self) -> None:
        self.blocks += 1
        self.happens.pop(("before", self.blocks), int)()
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        number = self.blocks
        self._lock.release()
        self.happens.pop(("after", number), int)()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kick_at_any_moment_of_a_connect_ends_the_stream(when: str) -> None:
    for number in count():
        lock = Passed()
        hub = Delivery(lock=lock).hub
        ticket, lock.blocks = hub.ticket, -1
        lock.happens[when, number] = partial(hub.dismiss, "kicked", "ada")
        client = connect(hub, "a", user="ada", ticket=ticket)
        if lock.happens:
            break
        assert told(client)[-1][:2] == ("sse_bye", "kicked")
    assert number > 0


def test_a_kick_between_the_call_of_stream_and_its_first_step_counts(make: Callable[..., SSEManager]) -> None:
    manager = make()
    body = body_of(manager, user="ada")
    assert manager.kick(user="ada") == 0
    assert told(body)[-1][1] == "kicked"


def test_a_kick_between_a_ticket_and_the_call_of_stream_counts(make: Callable[..., SSEManager]) -> None:
    manager = make()
    environ = {"REQUEST_METHOD": "GET"}
    ticket = manager.ticket()
    manager.kick(channel="default")
    _, _, body = stream(manager, environ, ticket=ticket)
    assert told(iter(body))[-1][1] == "kicked"
    _, _, body = stream(manager, environ)
    assert b"sse_open" in next(iter(body))
    assert manager.kick(channel="default") == 1


def test_a_kick_while_subscribe_waits_for_the_backend_counts(
    make: Callable[..., SSEManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make()
    kicks = [lambda: manager.kick(user="ada")]  # one only, in the first wait
    monkeypatch.setattr(process_of(manager).backend, "open", lambda cursor: kicks and kicks.pop()())
    assert told(manager.subscribe(user="ada"))[-1][:2] == ("sse_bye", "kicked")
    kicks.append(lambda: manager.kick(user="ada"))
    assert told(body_of(manager, user="ada"))[-1][:2] == ("sse_bye", "kicked")


def test_a_user_who_is_revoked_loses_a_stream_that_opens_meanwhile() -> None:
    ask, asked = threading.Event(), threading.Event()

    def may_stay(user: Hashable) -> bool:
        asked.set()
        assert ask.wait(TIMEOUT)
        return False

    with SSEManager(clients=ClientOptions(revalidate_every=0.01), revalidate=may_stay) as manager:
        there = manager.subscribe(user="ada")
        assert asked.wait(TIMEOUT)
        opening = body_of(manager, user="ada")
        ask.set()
        for client in (there, opening):
            assert [event.json for event in parse(b"".join(client))][-1] == {"reason": "revoked"}


# -- a server that stops -----------------------------------------------------------------------------------------------


def test_draining_delivers_what_is_pending_then_ends_all_streams_and_still_takes_events(
    make: Callable[..., SSEManager],
) -> None:
    manager = SSEManager(clients=ClientOptions(), batching=True)
    body = body_of(manager)
    next(body)
    manager.enqueue("item", 1)
    process_of(manager).drain()
    process_of(manager).drain()  # the watcher says so again and again
    assert [event.type for event in parse(b"".join(body))] == ["item", "sse_bye"]
    manager.enqueue("item", 2)
    assert manager.flush_all(TIMEOUT)
    [busy] = parse(b"".join(body_of(manager)))
    assert busy.json == {"reason": "draining"}
    assert manager.unhealthy_reason() == "draining"
    assert manager.shutdown(TIMEOUT)


class Interruption(BaseException):
    """As a time limit raises it in the middle of any call."""


def test_a_drain_that_a_log_handler_interrupts_can_be_repeated(make: Callable[..., SSEManager]) -> None:
    process = process_of(make())

    def interrupt(record: logging.LogRecord) -> bool:
        logger.removeFilter(interrupt)
        raise Interruption

    logger = logging.getLogger("sse_batcher.manager")
    logger.setLevel(logging.INFO)
    logger.addFilter(interrupt)
    try:
        with pytest.raises(Interruption):
            process.drain()
        assert process.unhealthy_reason() is None
        process.drain()
        wait_until(lambda: process.unhealthy_reason() == "draining", "the streams have ended")
    finally:
        logger.removeFilter(interrupt)
        logger.setLevel(logging.NOTSET)


def test_a_drain_that_fails_while_it_delivers_can_be_repeated(
    make: Callable[..., SSEManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of(make())
    flush = process.batcher.flush_all

    def interrupted(timeout: float | None = None) -> bool:
        monkeypatch.setattr(process.batcher, "flush_all", flush)
        raise Interruption

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(process.batcher, "flush_all", interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(Interruption):
            process.drain()
    assert process.unhealthy_reason() is None
    process.drain()
    wait_until(lambda: process.unhealthy_reason() == "draining", "the streams have ended")


class Drained:
    """A manager that was drained, and the server around it, as far as it is known."""

    def __init__(self, manager: SSEManager, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manager = manager
        self.clock = clock
        self.stopping = False
        host = ServerInfo("a server", None, None, lambda: self.stopping)
        monkeypatch.setattr("sse_batcher.wsgi.inspect_server", lambda environ: host)
        process_of(manager).hub.clock = clock
        self.drain()

    def drain(self) -> None:
        body = body_of(self.manager)
        next(body)
        process_of(self.manager).drain()
        [bye] = parse(b"".join(body))
        assert bye.json == {"reason": "shutdown"}

    def first(self) -> str:
        """The type of the first block that a client gets now."""
        body = body_of(self.manager)
        [event] = parse(next(body))
        body.close()  # type: ignore[attr-defined]
        return event.type


@pytest.fixture
def drained(make: Callable[..., SSEManager], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Drained:
    return Drained(make(), clock, monkeypatch)


def test_a_request_some_time_after_a_drain_opens_streams_again(drained: Drained) -> None:
    for pause in (0, 1.9):
        drained.clock.now += pause
        assert drained.first() == "sse_busy"
    drained.clock.now += 0.2
    assert [drained.first() for _ in range(2)] == ["sse_open"] * 2
    assert drained.manager.unhealthy_reason() is None


def test_no_stream_opens_while_the_server_still_says_that_it_stops(drained: Drained) -> None:
    drained.stopping = True
    drained.clock.now += 30
    assert drained.first() == "sse_busy"
    assert drained.manager.unhealthy_reason() == "draining"
    drained.stopping = False
    assert drained.first() == "sse_open"


def test_a_manager_that_opened_again_can_be_drained_again(drained: Drained) -> None:
    for _ in range(3):
        drained.clock.now += 2
        assert drained.first() == "sse_open"
        drained.drain()
        assert drained.first() == "sse_busy"


def test_after_a_shutdown_no_stream_opens_again(drained: Drained) -> None:
    assert drained.manager.shutdown(TIMEOUT)
    drained.clock.now += 1e6
    assert drained.first() == "sse_busy"
    process_of(drained.manager).drain()
    drained.clock.now += 1e6
    assert drained.first() == "sse_busy"


def test_what_a_stream_saves_is_counted() -> None:
    with SSEManager() as batched, SSEManager(batching=False) as plain:
        sizes = {}
        for manager in (batched, plain):
            client = manager.subscribe()
            next(client)
            before = client.counts.bytes
            for number in range(30):
                manager.enqueue("itém", {"n": number, "text": "as long as an event of a hub, or about that"})
            assert manager.flush_all(TIMEOUT)
            while client.point.position < process_of(manager).hub.head:
                next(client)
            sizes[manager] = client.counts.bytes - before
            client.close()
        stats = batched.get_stats()
        assert (stats.frames, stats.saved_frames, plain.get_stats().saved_frames) == (1, 29, 0)
        # But for the ids, which grow by a digit at the tenth.
        assert abs(stats.saved_bytes - (sizes[plain] - sizes[batched])) <= 30
        assert stats.saved_bytes > 0 == plain.get_stats().saved_bytes


def test_streams_that_go_on_are_counted_and_those_that_begin_are_not(make: Callable[..., SSEManager]) -> None:
    manager = make()
    cursor = manager.cursor()
    for asked in (None, cursor, "nonsense"):
        manager.subscribe(last_event_id=asked).close()
    assert manager.get_stats().replays == 1


def test_the_end_of_a_stream_is_logged_on_the_app_thread(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sse_batcher.manager"), SSEManager() as manager:
        client = manager.subscribe(["a", "b"])
        next(client)
        client.close()
    (record,) = caplog.records
    assert record.threadName == "sse_batcher-app"
    expected = rf"stream 1 \('a', 'b'\) ended after \d+\.\d s, 0 frames, {client.counts.bytes} bytes: left"
    assert re.fullmatch(expected, record.getMessage())


def test_a_channel_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    name = "a\u2028[ERROR] forged\u202e"  # a line separator for many viewers, and what turns the text round
    with caplog.at_level(logging.INFO, "sse_batcher.manager"), SSEManager() as manager:
        manager.subscribe([name]).close()
    (record,) = caplog.records
    assert record.getMessage().isprintable()
