"""`EventBatcher`: checks and encodes events in the caller's thread, and hands them to the engine of this process.

Thread-safe. Takes no lock of its own.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ..encoding import Encode, checked, encode_data, encode_json, encode_string
from ..errors import InvalidEventError, SSEBatcherError
from ..event import (
    DEFAULT_CHANNEL,
    Audience,
    Batch,
    Event,
    audience_bytes,
    check_channel,
    check_key,
    check_type,
    encode_body,
    text_bytes,
)
from ..functions import check_function
from ..options import BatchOptions, TypeRules
from ..runtime.log_fields import log_fields
from ..runtime.process import PerProcess
from ..stats import BatcherStats
from .engine import Engine

_log = logging.getLogger("sse_batcher.batcher")

_MAX_KNOWN_NAMES = 10_000


class EventBatcher:
    """Gathers events from any thread, and hands them as batches to `sink` on a thread of its own.

    `sink`
        A function: ``sink(batch)`` is called for one `Batch` at a time, in order. If it raises, the batch is counted as
        failed, logged, and not tried again. Until it returns, further events wait, up to
        `BatchOptions.max_pending_bytes`.
    `options`
        A `BatchOptions`. None: its defaults.
    `encode`
        A function that turns data into one line of ASCII JSON. It is called in the thread of the caller, and what it
        returns is checked.
    `clock`, `wall`
        For tests: functions that return monotonic time in seconds, and seconds since 1970. They must not call the
        batcher.
    `make_engine`
        For tests, too: it makes the engine of a process, with the same arguments.

    All methods are thread-safe, and safe in a callback, a signal handler, a `__del__` and a logging handler. The first
    event starts the thread. A forked child has a new batcher, without the events of its parent. A batcher that is still
    open at the end of the process delivers what is pending.

    >>> with EventBatcher(print) as batcher:
    ...     batcher.enqueue("log", {"line": 1})
    """

    def __init__(
        self,
        sink: Callable[[Batch], None],
        options: BatchOptions | None = None,
        *,
        encode: Encode = encode_json,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        make_engine: Callable[..., Engine] = Engine,
    ) -> None:
        check_function("sink", sink)  # a coroutine function would lose all events without an error
        check_function("encode", encode)
        self._options = options or BatchOptions()
        self._max_frame_bytes = self._options.max_frame_bytes
        self._encode = checked(encode)
        # Names that were already checked. No lock: a harmless race, since at worst two threads check the same name.
        self._rules: dict[str, TypeRules] = {}
        self._channels: set[str] = set()
        self._engine = PerProcess(functools.partial(make_engine, sink, self._options, clock, wall))

    def enqueue(
        self, event_type: str, data: Any, *, channel: str = DEFAULT_CHANNEL, key: str | int | None = None
    ) -> None:
        """Take one event. It is delivered within `batch_window` seconds plus scheduling, or at once if it is critical.

        Returns in microseconds, and never waits for the sink. `data` is encoded before it returns, so that the caller
        may change the object afterwards; a `Text` is sent as it is. Within a window, an event replaces an older one of
        its type with the same `key`, a str or an int. None: `BatchOptions.dedup_key` decides, except for texts.

        Raises `InvalidEventError` if the type, channel or key is not allowed, or the data is too large or cannot be
        sent; `ClosedError` after `destroy`; `BacklogFullError` when `max_pending_bytes` wait. Other events are not
        affected.
        """
        try:
            if channel.__class__ is not str or channel not in self._channels:
                channel = self._known_channel(channel)
        except InvalidEventError as error:
            refuse(self, error)
        put(self, event_type, data, channel, key)

    def flush_all(self, timeout: float | None = None) -> bool:
        """Close all windows now, and wait until the sink has taken everything that was enqueued before this call.

        Returns True if it has, and False if `timeout` seconds (None: no limit) have passed or a batch has failed. If
        the delivery has to wait for the caller, for example for the sink itself, it requests the flush and returns
        False at once.
        """
        return self._engine.get().flush("manual", timeout)

    def destroy(self, timeout: float | None = 5.0) -> bool:
        """Refuse further events, deliver what is pending, and end the thread.

        Returns True if the sink took everything within `timeout` seconds (None: no limit) and the thread has ended.
        Idempotent. `close` is another name for it, and the end of a ``with`` block calls it.
        """
        return self._engine.get().close(timeout)

    close = destroy

    def get_stats(self) -> BatcherStats:
        """Return the counters of this process, as a frozen value."""
        return self._engine.get().stats()

    @property
    def publishing_for(self) -> float:
        """For how many seconds the current call of the sink has run; 0 if there is none. Takes no lock."""
        return self._engine.get().publishing_for()

    def __repr__(self) -> str:
        engine = self._engine.existing()
        return f"<EventBatcher {'unused in this process' if engine is None else engine.description}>"

    def __enter__(self) -> EventBatcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.destroy()

    def _rules_of(self, event_type: str) -> TypeRules:
        name = check_type(event_type)
        rules = self._rules.get(name)
        if rules is None:
            if len(self._rules) >= _MAX_KNOWN_NAMES:
                self._rules.clear()
            rules = self._rules[name] = self._options.rules(name)
            if name in {"error", "open"}:
                _log.info(
                    "A browser also calls on%s for an event of the type %r. The page can tell them apart by "
                    "event.data, which the browser's own events do not have.",
                    name,
                    name,
                    extra=log_fields("type_of_browsers", type=name),
                )
        return rules

    def _known_channel(self, channel: str) -> str:
        name = check_channel(channel)
        if len(self._channels) >= _MAX_KNOWN_NAMES:
            self._channels.clear()
        self._channels.add(name)
        return name

    def _key(self, rules: TypeRules, data: Any) -> str | None:
        """Return the JSON text of the event's dedup key, so that 1, True and "1" are three keys."""
        how = rules.dedup_key
        value = None
        if isinstance(how, str):
            if isinstance(data, dict):
                value = data.get(how)
        elif how is not None:
            try:
                value = how(rules.type, data)
            except Exception as error:
                raise InvalidEventError(f"dedup_key raised {error!r} for this event", field="dedup_key") from error
        if value is None:
            return None
        return encode_string(value) if value.__class__ is str else encode_data(self._encode, value, "dedup_key")


def put(
    batcher: EventBatcher,
    event_type: str,
    data: Any,
    audience: Audience,
    key: str | int | None,
    add: Callable[[Event, int, TypeRules, str | None], None] | None = None,
) -> None:
    """Take an event for an audience that was checked. For `EventBatcher.enqueue` and the layers above the batcher.

    `add` is called with the event, as `Engine.add` is. None: the engine of this process takes it.
    """
    try:
        # Only an exact `str` is looked up, since another object may not be hashable. The slow way refuses it.
        rules = batcher._rules.get(event_type) if event_type.__class__ is str else None
        if rules is None:
            rules = batcher._rules_of(event_type)
        name: str | None = None if key is None else check_key(key)
        body = encode_body(batcher._encode, data)
        if body.__class__ is not str:  # a text
            size = text_bytes(body)
        else:
            size = len(body)
            if name is None:
                field = rules.dedup_key
                # The fast check first: most events have no key.
                keyless = field is None or (field.__class__ is str and data.__class__ is dict and field not in data)
                name = None if keyless else batcher._key(rules, data)
        if size > batcher._max_frame_bytes:
            raise _too_large(size, batcher._max_frame_bytes, "JSON" if body.__class__ is str else "text on the wire")
        if audience.__class__ is not str:
            size += audience_bytes(audience)
    except InvalidEventError as error:
        refuse(batcher, error)
    # Event(...) would call a function that is written in Python. This takes half as long.
    event = tuple.__new__(Event, (rules.type, audience, body))
    if add is None:  # in full, since a method that is in a variable is called more slowly
        batcher._engine.get().add(event, size, rules, name)
    else:
        add(event, size, rules, name)


Held = tuple[Event, int, TypeRules, str | None]
"""An event that was checked and encoded, as `Engine.add` takes it."""


def hold(batcher: EventBatcher, event_type: str, data: Any, audience: Audience, key: str | int | None) -> Held:
    """Check and encode an event as `put` does, for `put_held`. Raises `InvalidEventError`."""
    held: list[Held] = []

    def keep(event: Event, size: int, rules: TypeRules, key: str | None) -> None:
        held.append((event, size, rules, key))

    put(batcher, event_type, data, audience, key, keep)
    return held[0]


def put_held(batcher: EventBatcher, held: Held) -> None:
    """Take an event that `hold` has checked. Raises `ClosedError` or `BacklogFullError`."""
    batcher._engine.get().add(*held)


def refuse(batcher: EventBatcher, error: SSEBatcherError) -> NoReturn:
    """Count a refusal, and raise it. For layers above the batcher, which check more than it does."""
    batcher._engine.get().count_refusal()
    raise error


def _too_large(size: int, most: int, what: str) -> InvalidEventError:
    return InvalidEventError(
        f"the data has {size} bytes of {what}, more than max_frame_bytes={most}. Let the page fetch the rest, or raise "
        f"max_frame_bytes (SSE_MAX_FRAME_BYTES)",
        field="data",
    )
