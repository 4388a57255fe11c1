"""The reader of one process: entries, answers of Redis, batches that it cannot read, and other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import redis

from sse_batcher import BatchOptions
from sse_batcher.backends.redis.backend import RedisBackend
from sse_batcher.backends.redis.connections import Link
from sse_batcher.backends.redis.entries import Entry, Kick, Position, RawEntry, to_fields
from sse_batcher.backends.redis.reader import Reader
from sse_batcher.backends.redis.state import Keys, State
from sse_batcher.event import EVERY_USER, Batch, Event
from sse_batcher.manager_state import process_of
from sse_batcher.streams.history import ResumePoint
from sse_batcher.streams.roles import Receiver

from .kit.clock import Clock
from .kit.receiver import RecordingReceiver
from .kit.redisserver import RedisServer, cursor_of, redis_fixture
from .kit.servers import HOST
from .kit.viewers import EPOCH, FORGETFUL, STREAM, Make, Viewer, add, flat, managers_fixture, send, wait_until_read
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external


server = redis_fixture()


make = managers_fixture()


# -- entries and answers -----------------------------------------------------------------------------------------------


class FakeRedis:
    """A client of Redis whose stream has the entries that the test adds. `news` is the answer to the next XREAD."""

    def __init__(self) -> None:
        self.entries: list[RawEntry] = [(b"0-1", to_fields(Entry("0" * 16, 0, None)))]
        self.news: list[RawEntry] = []
        self.epoch = b"00000000"
        self.answers: list[Any] = []
        self.connection_pool = self

    def pipeline(self, *, transaction: bool) -> FakeRedis:
        self.answers = []
        return self

    def execute(self) -> list[Any]:
        return self.answers

    def xread(self, *_: Any, **__: Any) -> None:
        self.answers.append([[b"x:stream", self.news]] if self.news else [])

    def get(self, key: str) -> None:
        self.answers.append(self.epoch)

    def xrange(self, key: str, first: Any = "-", last: Any = "+", *, count: int) -> None:
        self.answers.append([entry for entry in self.entries if first in {"-", entry[0]}][:count])

    def time(self) -> None:
        self.answers.append((0, 0))

    def zadd(self, *_: Any) -> None:
        self.answers.append(1)

    def zremrangebyscore(self, *_: Any) -> None:
        self.answers.append(0)

    def zcard(self, *_: Any) -> None:
        self.answers.append(1)

    def disconnect(self) -> None: ...


class Reading:
    """A reader of a stream that the test fills, and what its receiver gets. `known`: whether it knows the end of it."""

    def __init__(self, *, known: bool = True) -> None:
        self.clock = Clock(0.0)
        self.redis = FakeRedis()
        self.receiver = RecordingReceiver()
        self.state = State()
        self.reader = reader_of(self.redis, self.receiver, self.state, self.clock)
        if known:
            self.read()
            assert self.state.known

    def read(self, *entries: tuple[int, dict[bytes, bytes]]) -> list[tuple[Any, ...]]:
        """What the receiver gets if these entries, each a number for its id and its fields, are read in one turn."""
        self.redis.news = [(f"{id}-0".encode(), fields) for id, fields in entries]
        self.redis.entries += [entry for entry in self.redis.news if entry not in self.redis.entries]
        self.receiver.received.clear()
        assert self.reader.work() == 0
        return self.receiver.received


def reader_of(client: Any, receiver: Receiver, state: State, clock: Callable[[], float] = time.monotonic) -> Reader:
    return Reader(receiver, Keys("x"), Link(lambda: client, "Reading from"), state, clock)


def fields(
    number: int, *, channel: str = "a", publisher: str = "0123456789abcdef", **more: bytes
) -> dict[bytes, bytes]:
    batch = Batch(channel, "t", (Event("t", channel, str(number)),), "manual", 5)
    entry = Entry(publisher, number, batch)
    return to_fields(entry) | {name.encode(): value for name, value in more.items()}


def newer(number: int, **more: Any) -> dict[bytes, bytes]:
    return fields(number, v=b"3", **more)


def test_an_answer_that_comes_twice_is_read_once() -> None:
    reading = Reading()
    kick = to_fields(Entry("0123456789abcdef", 0, Kick("ada", None)))
    entries = [(1, fields(1)), (2, kick), (3, {b"hello": b"world"})]
    assert reading.read(*entries) == [("1", (1, 0, 0)), ("kicked", "ada", None)]
    assert reading.read(*entries, (4, fields(2))) == [("2", (4, 0, 0))]
    assert reading.state.ignored == 1
    assert reading.state.read == (0, 4, 0, 0)


def test_the_number_of_remembered_kicks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sse_batcher.backends.redis.reader.MAX_KICKS", 3)
    reading = Reading()
    kicks = [(id, to_fields(Entry("0123456789abcdef", 0, Kick("ada", None)))) for id in range(1, 6)]
    assert reading.read(*kicks) == [("kicked", "ada", None)] * 5
    reading.redis.epoch = b"11111111"
    reading.read()
    assert reading.read(*kicks).count(("kicked", "ada", None)) == 2


def test_a_publisher_that_was_forgotten_has_missed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before the line changed tells which batches come again, and not how many came since then."""
    monkeypatch.setattr("sse_batcher.backends.redis.reader.MAX_PUBLISHERS", 2)
    reading = Reading()
    reading.read((1, fields(1)))
    reading.redis.epoch = b"11111111"
    reading.read()
    reading.read((2, fields(2)), (3, fields(1, publisher="1" * 16)), (4, fields(1, publisher="2" * 16)))
    assert reading.read((5, fields(3))) == [("3", (5, 0, 0))]


class Garbled:
    """A client of Redis whose proxy repeats, loses or exchanges answers."""

    def __init__(self, *answer: Any) -> None:
        self.answer = answer
        self.connection_pool = self

    def pipeline(self, *, transaction: bool) -> Garbled:
        return self

    def xread(self, *_: Any, **__: Any) -> None: ...
    def get(self, *_: Any) -> None: ...
    def time(self) -> None: ...
    def disconnect(self) -> None: ...

    def xrange(self, *_: Any, **__: Any) -> Any:
        return self.answer[-1]

    def execute(self) -> Any:
        return self.answer


NEWS = (b"1-0", {b"hello": b"world"})


@pytest.mark.parametrize(
    "answer",
    [
        ([NEWS], b"00000000", []),
        ([[b"x:stream", [b"1-0"]]], b"00000000", []),
        ([[b"x:stream", [NEWS]]], [NEWS], b"00000000"),
        ({b"x:stream": 7}, b"00000000", []),
        (b"OK", b"00000000", []),
        ([], b"00000000"),
        ([], b"00000000", b"OK"),
        ([], b"00000000", 7),
        ([], 7, []),
        7,
        ([], b"00000000", [], b"OK"),
        ([], b"00000000", [], (1, b"OK")),
    ],
)
def test_an_answer_to_something_else_is_a_connection_that_failed(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    state, receiver = State(), RecordingReceiver()
    state.epochs[0], state.ready = "00000000", True
    if not (isinstance(answer, tuple) and len(answer) == 4):
        state.set_clock(0)  # so that it does not ask for the time
    pause = reader_of(Garbled(*answer) if isinstance(answer, tuple) else Garbled(answer), receiver, state).work()
    assert pause is not None
    assert pause > 0  # it tries again
    assert receiver.received == []
    assert state.read == (0, 0, 0, 0)
    assert "the answer belongs to another call" in caplog.text


def test_a_batch_is_added_again_if_the_answer_is_one_to_something_else() -> None:
    class Client(Garbled):
        def xadd(self, key: str, fields: dict[bytes, bytes], *, maxlen: int) -> Any:
            added.append(fields)
            return answers.pop()

    added: list[dict[bytes, bytes]] = []
    answers: list[Any] = [b"1-0", [], None]
    backend = RedisBackend(Client, "x", 10)
    backend.publish(Batch("a", "t", (Event("t", "a", "1"),), "manual", 5))
    assert len(added) == 3
    assert added[0] == added[1] == added[2]  # with the same number, by which readers know it


# -- what happens meanwhile -------------------------------------------------------------------------------------------


class ReadsOn(State):
    """A state whose reader delivers entries right after one attribute was looked at."""

    def __init__(self, after: str, up_to: Position) -> None:
        super().__init__()
        self.epochs[0] = "00000000"
        self.head = self.read = (0, 1, 0, 0)
        self.pending: tuple[str, Position] | None = after, up_to

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        pending = super().__getattribute__("__dict__").get("pending")
        if pending is not None and pending[0] == name:
            self.pending = None
            self.head = self.read = pending[1]
            self.generation = pending[1][0]
            self.epochs.setdefault(self.generation, "11111111")
        return value


@pytest.mark.parametrize("attribute", ["generation", "epochs", "read", "head"])
@pytest.mark.parametrize(
    "up_to", [(0, 2, 0, 0), (0, 9, 0, 0), (1, 9, 0, 0)], ids=["to there", "further", "another line"]
)
def test_a_reader_that_goes_on_meanwhile_makes_a_cursor_skip_nothing(attribute: str, up_to: Position) -> None:
    """The client comes from a process that has read entry 2, which this one has still to read when it looks."""
    backend = RedisBackend(lambda: None, "x", 10, state=ReadsOn(attribute, up_to))
    assert backend.parse("00000000-2-0") == ResumePoint((0, 2, 0, 0))


def test_a_point_that_was_refused_is_not_looked_up() -> None:
    """As that of a cursor, if its epoch ends while the client is being served."""
    backend = RedisBackend(lambda: None, "x", 10)
    point = backend.parse("00000000-2-0")
    assert point == ResumePoint(refused="epoch")
    assert backend.replay(["default"], point, None) is None


class Overtaken(redis.Redis):
    """The client of a process that begins an epoch. Another process begins it, too, right before the call of `step`."""

    step = ""

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        pipeline = super().pipeline(transaction, shard_hint)
        if transaction:
            setattr(pipeline, self.step, partial(self.overtake, getattr(pipeline, self.step)))
        return pipeline

    def overtake(self, function: Callable[..., Any], *args: Any) -> Any:
        self.xadd(STREAM, to_fields(Entry("0" * 16, 0, None)))  # type: ignore[arg-type]
        self.set(EPOCH, "12345678")
        return function(*args)


@external
@pytest.mark.parametrize("step", ["watch", "get", "execute"])
def test_processes_that_begin_an_epoch_at_the_same_time_agree_on_one(
    server: RedisServer, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    client = Overtaken(host=HOST, port=server.port, socket_timeout=TIMEOUT)
    client.step = step
    backend = RedisBackend(lambda: client, "sse_batcher", 10)
    receiver = RecordingReceiver()
    backend.connect(receiver)
    wait_until(backend.find_position, "the end of the stream is known")
    assert server.client.get(EPOCH) == b"12345678"
    assert backend.format((0, 1, 2, 0)) == "12345678-1-2"
    assert backend.close(TIMEOUT)
    assert not caplog.records


# -- batches that cannot be read ---------------------------------------------------------------------------------------


def test_clients_get_a_gap_for_a_batch_of_a_later_version() -> None:
    reading = Reading()
    assert reading.read((1, fields(1)), (2, newer(2)), (3, fields(3))) == [
        ("1", (1, 0, 0)),
        ("publish_failed", "a", (2, 0, 0)),
        ("3", (3, 0, 0)),  # the number went on: nothing is missing for others
    ]
    assert reading.state.ignored == 1
    assert reading.state.floor == (0, 0, 0, 0)  # a client that reads it again finds the entry itself


def test_all_clients_get_a_gap_for_a_broken_batch_without_a_channel() -> None:
    assert Reading().read((1, fields(1, e=b"NaN", c=b"\xff"))) == [("publish_failed", "*", (1, 0, 0))]


def test_unreadable_batches_are_reported_once_a_second() -> None:
    reading = Reading()
    assert len(reading.read((1, newer(1)))) == 1
    reading.clock.now = 0.9
    assert reading.read((2, newer(2)), (3, newer(3, channel="b", publisher="f" * 16)), (4, fields(3))) == [
        ("3", (4, 0, 0))
    ]
    reading.clock.now = 1.0
    assert reading.read() == [("publish_failed", "a", (4, 0, 1)), ("publish_failed", "b", (4, 0, 1))]
    assert reading.state.floor == (0, 4, 0, 1)  # clients may have come back in between
    reading.clock.now = 9.0
    assert reading.read() == []
    assert reading.read((5, newer(4))) == [("publish_failed", "a", (5, 0, 0))]


def test_before_there_are_clients_each_unreadable_batch_has_its_place() -> None:
    reading = Reading(known=False)
    received = reading.read((1, newer(1)), (2, newer(2)), (3, newer(3, channel="b")))
    assert received[1:] == [("publish_failed", channel, (id, 0, 0)) for channel, id in (("a", 1), ("a", 2), ("b", 3))]
    reading.read()
    assert reading.state.known
    assert reading.read((4, newer(4))) == [("publish_failed", "a", (4, 0, 0))]


def test_unreadable_batches_for_users_are_one_gap_for_all_users() -> None:
    reading = Reading()
    broken = {b"u": b'["ada"]', b"k": b"?"}, {b"u": b"[7, 8]", b"v": b"3"}, {b"u": b"[true]"}
    entries = [(number, fields(number) | more) for number, more in enumerate((*broken, {}), 1)]
    assert reading.read(*entries) == [("publish_failed", EVERY_USER, (1, 0, 0)), ("4", (4, 0, 0))]
    assert reading.state.ignored == 3
    reading.read((5, newer(5)), (6, fields(6) | broken[1]))
    reading.clock.now = 1.0
    assert reading.read() == [("publish_failed", EVERY_USER, (6, 0, 1)), ("publish_failed", "a", (6, 0, 1))]
    assert reading.read() == []


def test_an_unreadable_batch_that_comes_twice_is_reported_once() -> None:
    reading = Reading()
    assert len(reading.read((1, newer(1)), (2, newer(1)))) == 1


@external
def test_what_cannot_be_read_is_a_gap_for_the_clients_it_was_for(
    server: RedisServer, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A report of the second one would be for all clients.
    monkeypatch.setattr("sse_batcher.backends.redis.reader.UNREADABLE_REPORT_SECONDS", 600.0)
    manager = make(server.url, history=FORGETFUL)
    with Viewer(manager) as viewer, Viewer(manager, "quiet") as quiet:
        first = add(server, 1)
        viewer.numbers(1)
        for number in (2, 3):
            server.client.xadd(STREAM, newer(number, channel="default", publisher="fedcba9876543210"))
        add(server, 4)
        add(server, 5, "end", channel="quiet")
        assert flat(viewer.until_type("sse_gap")) == ["publish_failed"]
        assert flat(quiet.until(lambda event: event.json == "end")) == ["end"]
    epoch = manager.cursor().partition("-")[0]
    wait_until_read(manager)
    # Neither the history nor Redis bring a client over that place, but they do so for others.
    for other in (manager, make(server.url, history=FORGETFUL)):
        with Viewer(other, cursor=f"{epoch}-{first}") as viewer:
            assert flat(viewer.events[:1]) == ["too_old"]
        with Viewer(other, "quiet", cursor=f"{epoch}-{first}") as viewer:
            assert viewer.events[0].type == "sse_open"
    assert manager.get_stats().ignored == 2
    assert len([record for record in caplog.records if "cannot be read" in record.getMessage()]) == 2  # a process each


@external
def test_redis_is_not_read_over_what_cannot_be_read(server: RedisServer, make: Make) -> None:
    manager = make(server.url, BatchOptions(max_batch_size=1), history=FORGETFUL)
    start = cursor_of(manager)
    send(manager, *range(100))
    server.client.xadd(STREAM, newer(1, channel="default", publisher="fedcba9876543210"))
    send(manager, *range(100, 200))
    wait_until_read(manager)
    backend = process_of(manager).backend
    assert isinstance(backend, RedisBackend)
    epoch = start.partition("-")[0]
    entries = server.client.xrange(STREAM)
    [place] = [number for number, (_, entry) in enumerate(entries) if entry[b"v"] == b"3"]
    for number in (place - 1, place):
        cursor = backend.parse(f"{epoch}-{entries[number][0].decode()}")
        assert isinstance(cursor, ResumePoint)
        found = backend.replay(["default"], cursor, None)
        assert (found is None) == (number < place)
