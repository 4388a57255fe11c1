"""Options: what can be set, in which unit, and what is refused.

Pure. An options object that exists is valid: every check is made when it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from .errors import ConfigurationError, InvalidEventError
from .event import check_channel, check_text, check_type, text_bytes
from .functions import check_function

DedupKey = str | Callable[[str, Any], Any] | None


class _Default(str):
    """The text of an option that was not given."""

    __slots__ = ()


DEFAULT_DEDUP_KEY = _Default("server")
"""The `dedup_key` of options that do not name one. It equals the name that it has, and is another object."""

MAX_WINDOW = 10.0
_PER_TYPE = ("batch_window", "max_batch_size", "dedup_key", "join", "leading")


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeRules:
    """How events of one type are batched: the options with the type's own overrides merged in."""

    type: str
    batch_window: float
    max_batch_size: int
    dedup_key: DedupKey
    join: str
    leading: bool
    critical: bool
    join_bytes: int = field(init=False)
    """The bytes that `join` takes on the wire."""
    batched: bool = field(init=False)
    """Whether there are windows at all: not with a window of 0 s or a size of 1."""
    dedup_by_default: bool = field(init=False)
    """Whether the app has not set `dedup_key`."""

    def __post_init__(self) -> None:
        _check_rules(self)
        object.__setattr__(self, "join", check_text(self.join))
        object.__setattr__(self, "join_bytes", text_bytes(self.join))
        object.__setattr__(self, "batched", self.batch_window > 0 and self.max_batch_size > 1)
        object.__setattr__(self, "dedup_by_default", self.dedup_key is DEFAULT_DEDUP_KEY)
        if self.dedup_by_default:
            object.__setattr__(self, "dedup_key", str(self.dedup_key))  # `enqueue` has a fast path for a plain str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How events are gathered. Immutable, and checked when made: `ConfigurationError` names the option.

    `batch_window`
        Seconds, 0 to 10. How long a window is open after its first event. 0: no batching.
    `max_batch_size`
        Events. How many a window may have: it closes when it has so many. 1: no batching.
    `max_frame_bytes`
        Bytes. How much data a frame may have on the wire: the length of its ``data:`` line, with the JSON around a
        batch; or of all its ``data:`` lines, in UTF-8, if it is a text of several lines. A larger event is refused.
    `dedup_key`
        Within a window, a newer event replaces an older one of the same type and the same key. A string: the key is the
        value of that field, if the data is a dict that has it. A function ``(event_type, data) -> key or None``: it is
        called in the thread that enqueues. ``None``: only events with a `key=` of their own replace others. A `Text`
        has no such key. As long as the app has not set this option, the first replacement of each type is logged as a
        warning.
    `join`
        What comes between the texts of a window, which arrive as one event. Use ``""`` for the tokens of a language
        model.
    `critical_types`
        Types of events that are sent at once. What waits in the same channel is sent just before them.
    `mixed`
        ``True``: all types of a channel share one window and one event, ``mixed_batch``, in total order.
    `leading`
        ``True``: the first event after a pause is sent at once, and what follows within the window is batched.
    `max_pending_bytes`
        Bytes. How much may wait for the backend, which is about the memory that it takes: the data of each event on the
        wire, plus 200 bytes for each event and 100 for each of its users. Above it, `enqueue` raises
        `BacklogFullError`.
    `per_type`
        ``{type: {option: value}}``, other values for some types, of `batch_window`, `max_batch_size`, `dedup_key`,
        `join` and `leading`. With `mixed`, of `dedup_key` alone.
    """

    batch_window: float = 0.1
    max_batch_size: int = 50
    max_frame_bytes: int = 262_144
    dedup_key: DedupKey = DEFAULT_DEDUP_KEY
    join: str = "\n"
    critical_types: Iterable[str] = frozenset({"hub_state", "error"})
    mixed: bool = False
    leading: bool = False
    max_pending_bytes: int = 67_108_864
    per_type: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rules(self)
        _whole("max_frame_bytes", self.max_frame_bytes, "bytes")
        _whole("max_pending_bytes", self.max_pending_bytes, "bytes")
        _flag("mixed", self.mixed)
        if isinstance(self.critical_types, (str, bytes)) or not isinstance(self.critical_types, Iterable):
            raise ConfigurationError(
                f"critical_types must be several types, such as {{'error'}}, not {self.critical_types!r}",
                option="critical_types",
            )
        critical = frozenset(_type_name("critical_types", name) for name in self.critical_types)
        object.__setattr__(self, "critical_types", critical)
        object.__setattr__(self, "per_type", _per_type(self.per_type, self.mixed))
        for name in self.per_type:
            try:
                self.rules(name)
            except ConfigurationError as error:
                raise ConfigurationError(f"per_type[{name!r}]: {error}", option="per_type") from error

    def rules(self, event_type: str) -> TypeRules:
        """The rules for one type, per-type overrides merged onto the options."""
        merged = {name: getattr(self, name) for name in _PER_TYPE} | dict(self.per_type.get(event_type, {}))
        return TypeRules(type=event_type, critical=event_type in self.critical_types, **merged)

    def unbatched(self) -> BatchOptions:
        """The same with batching off, which is a batch size of one."""
        return replace(self, max_batch_size=1, mixed=False, leading=False, dedup_key=None, per_type={})


TRANSPORTS = ("auto", "attached")
HTTP2 = ("refuse", "allow")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Limits of one client and of all, and how connections are kept alive. Immutable, and checked when made.

    `queue_frames`
        Frames. How many may wait for one client. A client that falls further behind reads the history, in slices of
        this size.
    `queue_bytes`
        Bytes. How many bytes of frames may wait for one client, in the same way.
    `heartbeat`
        Seconds, up to 3,600. If a stream sends nothing for this time, it sends a comment line.
    `send_timeout`
        Seconds, up to 3,600. If a client takes nothing of what is sent to it for this time, its connection is closed,
        under servers that let the library see that. Otherwise a client that has stopped reading would keep its stream,
        and the thread of an attached stream, forever.
    `max_stream_age`
        Seconds, up to 31,536,000. A stream ends by itself after a random 80 to 100 % of this time, and the client comes
        back at once, with its cursor. So a stream also ends if its client has gone and the proxy has not closed the
        connection. Detached streams are checked every two seconds, so they end a little later. ``None``: no limit.
    `max_clients`
        Clients. How many streams may be open in one process. A further client gets ``sse_busy`` and comes back after 10
        to 30 s; no open stream is ended for it. ``None``: as many as file descriptors allow. File descriptors are a
        limit in any case: a quarter of those that the process may have (at most 1,024) is not used for streams.
    `max_clients_per_user`
        Clients. How many streams one user may have open in one process, in the same way. ``None``: no limit.
    `revalidate_every`
        Seconds, up to 86,400. The time between two calls of `revalidate` for the same user, if the app has registered
        it.
    `transport`
        ``"auto"``: if the server allows it, a stream leaves its thread after the first block, and one thread of this
        process writes to all such streams. Other streams stay attached: they hold a thread each, half of the server's
        at most, or all except 50 if these are more. ``"attached"``: each open stream holds a thread of the server.
    `poll_wait`
        Seconds, up to 3,600. A poll (a stream that a client has asked for with ``poll=1``) that has got nothing ends
        after this time, or up to two seconds later if it is detached. The module for browsers gives up a poll that
        brings nothing for 60 s and two heartbeats.
    `retry_ms`
        Milliseconds. How long a browser waits before it connects again. ``None``: a random time for each connection,
        from 1,000 to 2,000 plus one for each open client, so that a restart does not bring all of them back at once;
        for a stream that ends in one of many waves, from 500 to 1,000; for a poll, from 500 to 1,000 plus one for each
        open poll.
    `compress`
        Channels whose streams are compressed, for clients that ask for gzip. Each frame is compressed once, for all of
        them. A stream is compressed only if all of its channels are named here and it has no user; broadcasts in it
        only if ``"*"`` is named, too. Name no channel whose frames contain secrets together with what others may write:
        the size of such a frame reveals the secret, byte by byte.
    `http2`
        What happens to streams over HTTP/2 if gunicorn itself speaks it, not a proxy in front. Such a stream keeps all
        other requests of the same browser waiting, so with ``"refuse"`` the client gets ``sse_busy`` and comes back
        later. ``"allow"``: it is served.
    """

    queue_frames: int = 256
    queue_bytes: int = 1_048_576
    heartbeat: float = 15.0
    send_timeout: float = 30.0
    max_stream_age: float | None = 1800.0
    max_clients: int | None = None
    max_clients_per_user: int | None = None
    revalidate_every: float = 30.0
    transport: str = "auto"
    poll_wait: float = 25.0
    retry_ms: int | None = None
    compress: Iterable[str] = frozenset()
    http2: str = "refuse"

    def __post_init__(self) -> None:
        _whole("queue_frames", self.queue_frames, "frames")
        _whole("queue_bytes", self.queue_bytes, "bytes")
        object.__setattr__(self, "compress", _channels("compress", self.compress))
        _seconds("heartbeat", self.heartbeat, 3600)
        _seconds("send_timeout", self.send_timeout, 3600)
        _seconds("revalidate_every", self.revalidate_every, 86_400)
        _seconds("poll_wait", self.poll_wait, 3600)
        for name, values in [("transport", TRANSPORTS), ("http2", HTTP2)]:
            if getattr(self, name) not in values:
                raise ConfigurationError(
                    f"{name} must be one of {', '.join(map(repr, values))}, not {getattr(self, name)!r}", option=name
                )
        if self.max_stream_age is not None:
            _seconds("max_stream_age", self.max_stream_age, 31_536_000)
        for name, unit in [
            ("max_clients", "clients"),
            ("max_clients_per_user", "clients"),
            ("retry_ms", "milliseconds"),
        ]:
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryOptions:
    """What is kept for clients that come back or have fallen behind. Immutable, and checked when made.

    `history_frames`
        Frames. How many of the newest frames of channels are kept, and as many again of those for users. The newest
        frame is always kept.
    `history_bytes`
        Bytes. How much memory the frames of channels may take in one process, and those for users as much again: what
        is sent, the data that it was made of, and the Python objects of both. The newest frames take a few MiB more if
        clients need them in different forms. No more can wait for a client than is kept here. With Redis, older frames
        are read from the Redis stream.
    `history_age`
        Seconds, up to 31,536,000. Older frames are not replayed; with Redis, its clock decides. ``None``: no limit.
    """

    history_frames: int = 10_000
    history_bytes: int = 33_554_432
    history_age: float | None = None

    def __post_init__(self) -> None:
        _whole("history_frames", self.history_frames, "frames")
        _whole("history_bytes", self.history_bytes, "bytes")
        if self.history_age is not None:
            _seconds("history_age", self.history_age, 31_536_000)


def batch_options(batching: bool | BatchOptions | Mapping[str, Any], base: BatchOptions | None = None) -> BatchOptions:
    """Return the options that the `batching` argument stands for: a bool, options, or a mapping.

    The mapping may have ``enabled``, ``batchWindow`` (milliseconds) and ``maxBatchSize``.
    `base`: the options that True stands for, and that the mapping changes.
    """
    base = base or BatchOptions()
    if isinstance(batching, BatchOptions):
        return batching
    if isinstance(batching, bool):
        return base if batching else base.unbatched()
    if not isinstance(batching, Mapping):
        raise ConfigurationError(
            f"batching must be True, False, a BatchOptions or a mapping such as {{'enabled': True, 'batchWindow': 100, "
            f"'maxBatchSize': 50}}, not {batching!r}",
            option="batching",
        )
    unknown = sorted(map(str, set(batching) - {"enabled", "batchWindow", "maxBatchSize"}))
    if unknown:
        raise ConfigurationError(
            f"batching does not know {', '.join(unknown)}: the mapping has enabled, batchWindow (ms) and maxBatchSize; "
            f"everything else is set through BatchOptions",
            option="batching",
        )
    enabled = _flag("batching['enabled']", batching.get("enabled", True), "batching")
    changes: dict[str, Any] = {}
    if "batchWindow" in batching:
        window_ms = _number("batching['batchWindow']", batching["batchWindow"], "milliseconds", "batching")
        if 0 < window_ms < 1 or not 0 <= window_ms <= MAX_WINDOW * 1000:
            raise ConfigurationError(
                f"batching['batchWindow'] is in milliseconds: 0 (no batching) or 1 to {MAX_WINDOW * 1000:.0f}, "
                f"not {window_ms!r}",
                option="batching",
            )
        changes["batch_window"] = window_ms / 1000
    if "maxBatchSize" in batching:
        changes["max_batch_size"] = _whole("batching['maxBatchSize']", batching["maxBatchSize"], "events", "batching")
    options = replace(base, **changes)
    return options if enabled else options.unbatched()


def _check_rules(rules: BatchOptions | TypeRules) -> None:
    window = _number("batch_window", rules.batch_window, "seconds")
    if not 0 <= window <= MAX_WINDOW:
        raise ConfigurationError(
            f"batch_window is in seconds, from 0 (no batching) to {MAX_WINDOW:g}, not {window!r}", option="batch_window"
        )
    _whole("max_batch_size", rules.max_batch_size, "events")
    if rules.dedup_key is not None and not isinstance(rules.dedup_key, str) and not callable(rules.dedup_key):
        raise ConfigurationError(
            f"dedup_key must be the name of a field, a callable (event_type, data) -> key, or None, "
            f"not {rules.dedup_key!r}",
            option="dedup_key",
        )
    if callable(rules.dedup_key):
        try:
            check_function("dedup_key", rules.dedup_key)
        except TypeError as error:
            raise ConfigurationError(str(error), option="dedup_key") from error
    if not isinstance(rules.join, str):
        raise ConfigurationError(f"join must be a str that comes between texts, not {rules.join!r}", option="join")
    try:
        check_text(rules.join)
    except InvalidEventError as error:
        raise ConfigurationError(f"join: {error}", option="join") from error
    _flag("leading", rules.leading)


def _per_type(per_type: Any, mixed: bool) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(per_type, Mapping) or not all(isinstance(own, Mapping) for own in per_type.values()):
        raise ConfigurationError(
            f"per_type must be a mapping such as {{'log': {{'batch_window': 1.0}}}}, not {per_type!r}",
            option="per_type",
        )
    allowed = ("dedup_key",) if mixed else _PER_TYPE
    checked = {}
    for name, own in per_type.items():
        unknown = sorted(map(str, set(own) - set(allowed)))
        if unknown:
            raise ConfigurationError(
                f"per_type[{name!r}] may set {', '.join(allowed)}{' with mixed=True' if mixed else ''}, "
                f"not {', '.join(unknown)}",
                option="per_type",
            )
        checked[_type_name("per_type", name)] = MappingProxyType(dict(own))
    return MappingProxyType(checked)


def _type_name(option: str, name: object) -> str:
    try:
        return check_type(name)
    except InvalidEventError as error:
        raise ConfigurationError(f"{option}: {error}", option=option) from error


def _channels(option: str, names: object) -> frozenset[str]:
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise ConfigurationError(f"{option} must be several channels, such as ['prices'], not {names!r}", option=option)
    try:
        return frozenset(check_channel(name) for name in names)
    except InvalidEventError as error:
        raise ConfigurationError(f"{option}: {error}", option=option) from error


def _number(name: str, value: float, unit: str, option: str | None = None) -> float:
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not number:
        raise ConfigurationError(f"{name} must be a number of {unit}, not {value!r}", option=option or name)
    return value


def _seconds(name: str, value: float, most: float) -> None:
    if not 0 < _number(name, value, "seconds") <= most:
        raise ConfigurationError(
            f"{name} is in seconds, more than 0 and at most {most:.0f}, not {value!r}", option=name
        )


def _whole(name: str, value: Any, unit: str, option: str | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            f"{name} must be a whole number of {unit}, at least 1, not {value!r}", option=option or name
        )
    return value


def _flag(name: str, value: Any, option: str | None = None) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, not {value!r}", option=option or name)
    return value


BATCH_OPTION_NAMES = tuple(item.name for item in fields(BatchOptions))
CLIENT_OPTION_NAMES = tuple(item.name for item in fields(ClientOptions))
HISTORY_OPTION_NAMES = tuple(item.name for item in fields(HistoryOptions))
