"""The backend of many processes on many hosts: one Redis stream, which each process reads back. Extra: ``redis``.

`RedisBackend.publish` runs in the batcher's thread, and waits there while Redis is away. One reader thread a process,
started by the first client, reads the stream and delivers: own events, too, so that all processes agree on the order.

An entry holds the batch and not its bytes on the wire (`_fields`). Beside the stream, one key names its epoch: where
that is gone or another one, the stream is another, too. Follows https://redis.io/docs/latest/commands/xadd/ and xread.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
import re
import secrets
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ..errors import BackendError, ConfigurationError, SSEBatcherError
from ..event import BROADCAST, MIXED, Batch, Event, check_channel, check_type
from ..history import Cursor
from ..hub import Receiver
from ..wire import Frame
from ..worker import Deadline, Worker

if TYPE_CHECKING:
    import redis

_log = logging.getLogger("sse_batcher.backends.redis")

Position = tuple[int, int, int]
"""The generation (how many epochs this process has met before), and the two numbers of the entry's id."""

START: Position = (0, 0, 0)
PREFIX = "sse_batcher"
VERSION = b"1"
TIMEOUT = 5.0
"""Seconds for each call of Redis."""
BLOCK_MS = 500
"""How long one call of the reader waits for news. Well below `TIMEOUT`."""
AT_ONCE = 500
"""Entries in one call."""
OPEN_SECONDS = 2.0
"""How long a new client waits for the history, or for the reader to come to where the client has been."""
LONGEST_PAUSE = 2.0
MAX_PUBLISHERS = 10_000

# A cursor comes from outside: it is matched whole, bounded, and rebuilt from its parts.
_CURSOR = re.compile(r"([0-9a-f]{8})-(0|[1-9][0-9]{0,18})-(0|[1-9][0-9]{0,19})(?:\.([1-9][0-9]{0,8}))?", re.ASCII)
_EPOCH = re.compile(rb"[0-9a-f]{8}")
_PUBLISHER = re.compile(r"[0-9a-f]{16}", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_REASONS = frozenset({"time_window", "size_limit", "leading", "critical", "manual", "shutdown"})


class Kick(NamedTuple):
    """A control entry: end the streams of this user, or of this channel."""

    user: Hashable
    channel: str | None


class Entry(NamedTuple):
    """What one entry says. `number` counts the batches of a `publisher`, from 1; 0 is that of a kick.

    A kick that failed may be in the stream or not: with a number, it would look like a batch that is missing.
    """

    publisher: str
    number: int
    content: Batch | Kick


class RedisBackend:
    """`client`: a ``redis.Redis``, of which only the connection's settings are used. `prefix`: of the two keys."""

    start = START

    def __init__(self, client: redis.Redis, prefix: str, frames: int) -> None:
        self._frames = frames
        self._keys = Keys(prefix)
        self._connect: Callable[[], Any] = lambda: _copy(client)
        self._publisher = secrets.token_hex(8)
        self._number = 0
        self._mine: Any = None  # the client that publishes; made by the first call
        self._closing = threading.Event()
        self._state = State()
        self._reader: Reader | None = None
        self._published: Position = START  # the newest of our own

    def connect(self, receiver: Receiver) -> None:
        self._reader = Reader(receiver, self._keys, self._frames, self._connect, self._state)

    def publish(self, batch: Batch) -> None:
        """Add an entry, however long it takes: what comes meanwhile waits in the batcher. Raises after `close` only."""
        pause = 0.05
        with self._state.adding:
            self._number += 1
            fields = _fields(Entry(self._publisher, self._number, batch))
            while True:
                try:
                    self._published = max(self._published, self._xadd(fields))
                    return
                except _errors() as error:
                    self._mine = None
                    if self._closing.is_set():
                        raise
                    self._state.tell_failure("takes no batches", error)
                # The number stays: an entry that was added though no answer came is known by it, and read once.
                self._closing.wait(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, LONGEST_PAUSE)

    def kick(self, user: Hashable, channel: str | None) -> None:
        """Have all processes end these streams. Raises `BackendError` where Redis does not take it."""
        if not isinstance(user, (str, int, type(None))):
            raise ValueError(f"between processes a user is a str or an int, not {user!r}")
        # Who publishes holds it for as long as Redis is away.
        if not self._state.adding.acquire(timeout=OPEN_SECONDS):
            raise BackendError("Redis does not take anything, and so no kick: try again")
        try:
            self._xadd(_fields(Entry(self._publisher, 0, Kick(user, channel))))
        except _errors() as error:
            self._mine = None
            raise BackendError(f"Redis did not take the kick: {error}") from error
        finally:
            self._state.adding.release()

    def _xadd(self, fields: dict[bytes, bytes]) -> Position:
        self._state.tell_question()
        if self._mine is None:
            self._mine = self._connect()
        id = self._mine.xadd(self._keys.stream, fields, maxlen=self._frames, approximate=True)
        self._state.tell_answer()
        return (self._state.generation, *_numbers(id))

    # -- clients -------------------------------------------------------------------------------------------------------

    def open(self, cursor: str | None) -> None:
        """Have the history here, up to where this client has been. Raises `BackendError` where that cannot be had."""
        state = self._state
        assert self._reader is not None, "connect() comes first"
        self._reader.start()
        deadline = Deadline(OPEN_SECONDS)
        with state.changed:
            if not state.changed.wait_for(lambda: state.ready, 0 if state.gave_up else deadline.left()):
                state.gave_up = True  # who comes next does not wait for as long
                raise BackendError("Redis does not answer: it is not known where a new stream would begin")
            # He may come from a process that has read further than this one.
            place = self.read(cursor).position if cursor else None
            if place is not None:
                state.changed.wait_for(lambda: state.read >= place, min(0.5, deadline.left() or 0.0))

    def wait_until_delivered(self, timeout: float | None) -> bool:
        """Wait until what this process has published was read back, where it reads at all."""
        state = self._state
        if self._reader is None or not self._reader.started:
            return True
        with state.changed:
            return state.changed.wait_for(lambda: state.read >= self._published, timeout)

    def close(self, timeout: float | None) -> bool:
        self._closing.set()
        return self._reader is None or self._reader.close(timeout)

    @property
    def silent_for(self) -> float:
        """Seconds for which Redis owes an answer."""
        return self._state.silent_for

    @property
    def ignored(self) -> int:
        """Entries that are none of ours, or broken."""
        return self._state.ignored

    # -- cursors -------------------------------------------------------------------------------------------------------

    def format(self, position: Position) -> str:
        generation, milliseconds, sequence = position
        return f"{self._state.epochs[generation]}-{milliseconds}-{sequence}"

    def read(self, cursor: str) -> Cursor:
        match = _CURSOR.fullmatch(cursor)
        if match is None:
            return Cursor(refused="malformed")
        state = self._state
        if match[1] != state.epochs.get(state.generation):
            return Cursor(refused="epoch")
        return Cursor((state.generation, int(match[2]), int(match[3])), int(match[4] or 0))

    def normalize(self, cursor: str) -> str | None:
        match = _CURSOR.fullmatch(cursor)
        return match and match[0]


class Keys:
    """The names of the keys."""

    def __init__(self, prefix: str) -> None:
        self.stream = f"{prefix}:stream"
        self.epoch = f"{prefix}:epoch"


class State:
    """What is known of the stream. `changed` guards and tells of `ready`, `read`, `generation` and `epochs`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.adding = threading.Lock()  # held by who adds an entry, so that numbers rise in the stream, too
        self.ready = False
        self.gave_up = False
        self.read: Position = START
        self.generation = 0
        self.epochs: dict[int, str] = {}
        self.ignored = 0
        self._asked_at: float | None = None
        self._failing = False

    @property
    def silent_for(self) -> float:
        since = self._asked_at
        return 0.0 if since is None else time.monotonic() - since

    def tell_question(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def tell_answer(self) -> None:
        self._asked_at = None
        if self._failing:
            self._failing = False
            _log.info("Redis answers again")

    def tell_failure(self, what: str, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            _log.error("Redis %s: %s. It is tried again until it does; nothing more is logged until then", what, error)


class Reader:
    """The thread that reads the stream. Holds the receiver weakly, so that a dropped manager ends it."""

    def __init__(self, receiver: Receiver, keys: Keys, frames: int, connect: Any, state: State) -> None:
        self.started = False
        self._receiver = weakref.ref(receiver)
        self._keys = keys
        self._frames = frames
        self._connect = connect
        self._state = state
        self._client: Any = None
        self._closed = False
        self._pause = 0.05
        self._lost = ""  # why something before the next entry is missing
        self._numbers: OrderedDict[str, int] = OrderedDict()  # of each publisher, the newest that was read
        self._worker = Worker(self, "sse_batcher-redis")

    def start(self) -> None:
        """Read from now on. Idempotent."""
        if not self.started:
            self.started = True
            self._worker.wake()
        if not self._closed:
            self._worker.ensure()

    def close(self, timeout: float | None) -> bool:
        self._closed = True
        self._worker.stop()
        return self._worker.join(timeout)

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`: wait for news, and deliver them."""
        receiver = self._receiver()
        if receiver is None or self._closed:
            self._client = None
            self._state.tell_answer()  # none is waited for any more
            return None
        self._state.tell_question()
        try:
            if self._client is None:
                self._client = self._connect()
            if self._state.ready:
                self._read_on(receiver)
            else:
                self._begin(receiver)
        except _errors() as error:
            self._client = None
            self._state.tell_failure("cannot be read", error)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return self._pause * random.uniform(0.5, 1)
        self._pause = 0.05
        self._state.tell_answer()
        return 0.0

    # -- the first look, and the first at another stream ---------------------------------------------------------------

    def _begin(self, receiver: Receiver) -> None:
        """Read what there is, up to the end."""
        client, state = self._client, self._state
        self._set_epoch(self._epoch(), receiver)
        before_first = self._before_first()
        if before_first > state.read:
            receiver.lose(BROADCAST, before_first, "too_old")
            self._advance(before_first)
        while entries := client.xrange(self._keys.stream, min=_after(state.read), count=AT_ONCE):
            self._deliver(receiver, entries)
        with state.changed:
            state.ready, state.gave_up = True, False
            state.changed.notify_all()

    def _epoch(self) -> bytes:
        client, key = self._client, self._keys.epoch
        epoch = client.get(key)
        if epoch is None or not _EPOCH.fullmatch(epoch):
            client.set(key, secrets.token_hex(4), nx=epoch is None)
            epoch = client.get(key) or b""
        if not _EPOCH.fullmatch(epoch):
            raise BackendError(f"the key {key} holds {epoch!r}, which is no epoch")
        return bytes(epoch)

    def _before_first(self) -> Position:
        """The position of the newest entry that was there once and is no more, or a later one before all that are."""
        try:
            info = self._client.xinfo_stream(self._keys.stream)
        except _errors("ResponseError"):
            return self._state.read  # there is no such stream yet
        if info.get("entries-added") == info["length"]:
            return self._state.read  # none has ever gone. Redis 6 does not say
        first = info["first-entry"]
        return (
            self._state.generation,
            *(_before(_numbers(first[0])) if first else _numbers(info["last-generated-id"])),
        )

    def _set_epoch(self, epoch: bytes, receiver: Receiver) -> None:
        state, name = self._state, epoch.decode()
        if state.epochs.get(state.generation) == name:
            return
        if state.epochs:
            with state.changed:
                state.generation += 1
                state.epochs[state.generation] = name
                state.ready = False
                state.changed.notify_all()
            # The numbers stay: where it is only the key that was lost, what is in the stream was had already.
            self._lost = ""
            receiver.lose(BROADCAST, (state.generation, 0, 0), "epoch")
            self._advance((state.generation, 0, 0))
        else:
            state.epochs[0] = name

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _read_on(self, receiver: Receiver) -> None:
        state, keys = self._state, self._keys
        last = _id(state.read)
        # In one go: what is new, and afterwards whether this is still the same stream, and whether the last entry read
        # is still there. If it is, nothing after it was trimmed.
        pipeline = self._client.pipeline(transaction=False)
        pipeline.xread({keys.stream: last}, count=AT_ONCE, block=BLOCK_MS)
        pipeline.get(keys.epoch)
        pipeline.xrange(keys.stream, min=last, max=last)
        news, epoch, kept = pipeline.execute()
        if epoch is None or epoch.decode("ascii", "replace") != state.epochs[state.generation]:
            self._begin_anew()
            return
        if not kept and state.read[1:] != (0, 0):
            self._lost = self._lost or "overflow"
        self._deliver(receiver, _entries(news))

    def _begin_anew(self) -> None:
        with self._state.changed:
            self._state.ready = False

    def _deliver(self, receiver: Receiver, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> None:
        state = self._state
        for id, fields in entries:
            position: Position = (state.generation, *_numbers(id))
            entry = read_fields(fields)
            if entry is None:
                state.ignored += 1
                if state.ignored == 1:
                    _log.warning("an entry of %s is none of ours and ignored: %s", self._keys.stream, id)
            elif not self._had(entry):
                self._deliver_one(receiver, entry.content, position)
            self._advance(position)

    def _deliver_one(self, receiver: Receiver, content: Batch | Kick, position: Position) -> None:
        if self._lost:
            # Up to here, and not to just before it: there may be no place between this entry and the last one.
            receiver.lose(BROADCAST, position, self._lost)
        if isinstance(content, Kick):
            receiver.dismiss("kicked", *content)
        elif not self._lost:
            epoch = self._state.epochs[position[0]]
            try:
                receiver.deliver(Frame(content, position, f"{epoch}-{_id(position)}"))
            except Exception:  # or it would be read again and again
                _log.exception("a batch of %s cannot be delivered, and is lost", self._keys.stream)
                receiver.lose(content.channel, position)
        self._lost = ""

    def _had(self, entry: Entry) -> bool:
        """Whether it was read before: its publisher added it twice, since it had no answer. Notes what is missing."""
        if isinstance(entry.content, Kick):
            return False
        last = self._numbers.pop(entry.publisher, None)
        self._numbers[entry.publisher] = entry.number if last is None else max(last, entry.number)
        if len(self._numbers) > MAX_PUBLISHERS:
            self._numbers.popitem(last=False)
        if last is not None and entry.number > last + 1:
            self._lost = self._lost or "publish_failed"
        return last is not None and entry.number <= last

    def _advance(self, position: Position) -> None:
        with self._state.changed:
            self._state.read = position
            self._state.changed.notify_all()


# -- entries -----------------------------------------------------------------------------------------------------------


def _fields(entry: Entry) -> dict[bytes, bytes]:
    """The fields of an entry. Events are lines, since their JSON has none."""
    fields = {"v": VERSION.decode(), "p": entry.publisher, "n": str(entry.number)}
    content = entry.content
    if isinstance(content, Kick):
        fields |= {"kick": json.dumps({"user": content.user, "channel": content.channel})}
    else:
        fields |= {
            "c": content.channel,
            "t": content.type,
            "e": "\n".join(event.json for event in content.events),
            "r": content.reason,
            "ts": str(content.timestamp),
        }
        if content.type == MIXED:
            fields["types"] = "\n".join(event.type for event in content.events)
    return {name.encode(): value.encode() for name, value in fields.items()}


def read_fields(fields: dict[bytes, bytes]) -> Entry | None:
    """What an entry says, None where it is none of ours: it comes from outside, and may be anything."""
    try:
        if fields.get(b"v") != VERSION:
            return None
        text = {name.decode(): value.decode() for name, value in fields.items()}
        if not (_PUBLISHER.fullmatch(text["p"]) and _NUMBER.fullmatch(text["n"])):
            return None
        content = _read_kick(text["kick"]) if "kick" in text else _read_batch(text)
        return Entry(text["p"], int(text["n"]), content)
    except (KeyError, TypeError, ValueError, RecursionError, SSEBatcherError):
        return None


def _read_kick(text: str) -> Kick:
    said = json.loads(text)
    user, channel = said["user"], said["channel"]
    if not isinstance(user, (str, int, type(None))) or (user is None and channel is None):
        raise ValueError(text)
    return Kick(user, None if channel is None else check_channel(channel))


def _read_batch(text: dict[str, str]) -> Batch:
    channel, batch_type, texts = text["c"], text["t"], text["e"].split("\n")
    if channel != BROADCAST:
        check_channel(channel)
    types = text["types"].split("\n") if batch_type == MIXED else [check_type(batch_type)] * len(texts)
    if text["r"] not in _REASONS or not _NUMBER.fullmatch(text["ts"]):
        raise ValueError(text["r"])
    for event_type in set(types):
        check_type(event_type)
    for data in texts:
        _check_json(data)
    events = tuple(Event(event_type, channel, data) for event_type, data in zip(types, texts, strict=True))
    return Batch(channel, batch_type, events, text["r"], int(text["ts"]))


def _check_json(text: str) -> None:
    """Refuse what is no JSON on one line of ASCII. A carriage return would begin a line of its own on the wire."""
    if not text.isascii() or "\r" in text:
        raise ValueError(text)
    json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _numbers(id: bytes | str) -> tuple[int, int]:
    milliseconds, _, sequence = (id.decode() if isinstance(id, bytes) else id).partition("-")
    return int(milliseconds), int(sequence or 0)


def _id(position: Position) -> str:
    return f"{position[1]}-{position[2]}"


def _after(position: Position) -> str:
    return f"({_id(position)}"


def _before(numbers: tuple[int, int]) -> tuple[int, int]:
    """The largest id below this one."""
    milliseconds, sequence = numbers
    if sequence:
        return milliseconds, sequence - 1
    return (milliseconds - 1, 2**64 - 1) if milliseconds else (0, 0)


def _entries(news: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Those of the one stream, in each shape that versions of redis-py and of the protocol give it."""
    if not news:
        return []
    if isinstance(news, dict):
        (entries,) = news.values()
        return [entry for group in entries for entry in group] if entries and isinstance(entries[0], list) else entries
    return list(news[0][1])


# -- connections -------------------------------------------------------------------------------------------------------


def _redis() -> Any:
    try:
        import redis  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            "the backend redis:// needs the package redis: pip install 'sse_batcher[redis]'", option="backend"
        ) from error
    return redis


def _errors(name: str = "RedisError") -> tuple[type[Exception], ...]:
    """What redis-py raises, and `BackendError`, our own word for what is not as it should be."""
    return getattr(_redis().exceptions, name), BackendError, OSError


def _settings() -> dict[str, Any]:
    _redis()
    from redis.backoff import NoBackoff  # noqa: PLC0415
    from redis.retry import Retry  # noqa: PLC0415

    return {
        "socket_timeout": TIMEOUT,
        "socket_connect_timeout": TIMEOUT,
        "decode_responses": False,
        "retry": Retry(NoBackoff(), 0),  # we do that, and know what was read twice
    }


def _copy(client: redis.Redis) -> redis.Redis:
    """A client of its own pool of connections, to the same place, with our time-out on every call."""
    redis = _redis()
    pool: Any = client.connection_pool
    settings = {name: value for name, value in pool.connection_kwargs.items() if name != "connection_pool"}
    settings |= _settings()
    if hasattr(pool, "sentinel_manager"):
        return pool.sentinel_manager.master_for(pool.service_name, **settings)  # type: ignore[no-any-return]
    return redis.Redis(connection_pool=redis.ConnectionPool(pool.connection_class, **settings))  # type: ignore[no-any-return]


def open_redis(backend: Any, frames: int) -> RedisBackend:
    """The backend of a URL, or of a ready ``redis.Redis``.

    ``redis://[user:password@]host[:port]/[db]``, ``rediss://`` for TLS, ``unix://path``, and
    ``redis+sentinel://[user:password@]host:port[,host:port]/service[/db]``; ``?prefix=`` is the prefix of the keys.
    """
    redis = _redis()
    if isinstance(backend, redis.Redis):
        return RedisBackend(backend, PREFIX, frames)
    if not isinstance(backend, str):
        raise ConfigurationError(f"backend must be a URL or a redis.Redis, not {backend!r}", option="backend")
    url, _, asked = backend.partition("?")
    query = dict(parse_qsl(asked))
    prefix = query.pop("prefix", PREFIX)
    try:
        if url.startswith("redis+sentinel:"):
            client = _sentinel(urlsplit(url), query)
        else:
            client = redis.Redis.from_url(f"{url}?{urlencode(query)}")
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the backend {_without_password(backend)} cannot be meant: {error}", option="backend"
        ) from error
    return RedisBackend(client, prefix, frames)


def _sentinel(parts: SplitResult, query: dict[str, str]) -> Any:
    sentinel: Any = importlib.import_module("redis.sentinel")
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("the path names the service, as in redis+sentinel://host:26379/mymaster/0")
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    places = [(host, int(port or 26379)) for host, _, port in (place.partition(":") for place in hosts.split(","))]
    options = _settings() | {"db": int(db or 0)} | query
    if login:
        options |= {"username": unquote(username) or None, "password": unquote(password) or None}
    return sentinel.Sentinel(places, socket_timeout=TIMEOUT).master_for(service, **options)


def _without_password(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//...@", url)
