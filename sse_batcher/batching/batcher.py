"""`EventBatcher`: checks and encodes events in the caller's thread, and hands them to the engine of this process.

Any thread. Keeps nothing but names that were already checked.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import InvalidEventError, SSEBatcherError
from ..event import (
    DEFAULT_CHANNEL,
    Batch,
    Encode,
    Event,
    check_channel,
    check_type,
    checked,
    encode_data,
    encode_json,
    encode_string,
)
from ..functions import check_function
from ..options import BatchOptions, TypeRules
from ..runtime.process import PerProcess
from ..stats import BatcherStats
from .engine import Engine

_log = logging.getLogger("sse_batcher.batcher")

_MAX_KNOWN_NAMES = 10_000


class EventBatcher:
    """Gathers events from any thread and hands them to `sink` as batches, on one thread of its own.

    `sink(batch)` is called for one batch at a time, in order. If it raises, that batch is counted as failed, logged,
    and not tried again. While it does not return, events gather here, up to `max_pending_bytes`.

    `encode` turns data into one line of ASCII JSON, in the caller's thread; its text is checked there. `clock` is
    monotonic time in seconds, `wall` is seconds since 1970; both are for tests, and must not call back.

    All methods are thread-safe, and safe in a callback, a signal handler, a `__del__` and a logging handler. The
    thread is started by the first event; a forked child starts afresh, without events of its parent. A batcher that
    is still open at the end of the process delivers what is pending.

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
    ) -> None:
        check_function("sink", sink)  # a coroutine function would lose all, and no error would show
        check_function("encode", encode)
        self._options = options or BatchOptions()
        self._max_frame_bytes = self._options.max_frame_bytes
        self._encode = checked(encode)
        # Names already checked. Written without a lock: at worst two threads check the same name.
        self._rules: dict[str, TypeRules] = {}
        self._channels: set[str] = set()
        self._engine = PerProcess(functools.partial(Engine, sink, self._options, clock, wall))

    def enqueue(self, event_type: str, data: Any, *, channel: str = DEFAULT_CHANNEL) -> None:
        """Take one event, to be delivered within `batch_window` seconds plus scheduling, or at once if it is critical.

        Returns in microseconds, and never waits for the sink. The data is encoded before it returns: changing the
        object afterwards changes nothing.

        Raises `InvalidEventError` for a type or channel that may not be, for data that is no JSON or too large;
        `ClosedError` after `destroy`; `BacklogFullError` when `max_pending_bytes` wait. A refused event loses nothing
        but itself.
        """
        try:
            # The exact class first: an unhashable or exotic one goes the slow way, and is refused there.
            rules = self._rules.get(event_type) if event_type.__class__ is str else None
            if rules is None:
                rules = self._rules_of(event_type)
            if channel.__class__ is not str or channel not in self._channels:
                channel = self._known_channel(channel)
            text = encode_data(self._encode, data)
            if len(text) > self._max_frame_bytes:
                raise InvalidEventError(
                    f"the data has {len(text)} bytes of JSON, more than max_frame_bytes={self._max_frame_bytes}: let "
                    f"the page fetch the rest, or raise max_frame_bytes (SSE_MAX_FRAME_BYTES)",
                    field="data",
                )
            field = rules.dedup_key
            # What most events are first: they have no key.
            keyless = field is None or (field.__class__ is str and data.__class__ is dict and field not in data)
            key = None if keyless else self._key(rules, data)
        except InvalidEventError as error:
            self.refuse(error)
        # Event(...) itself goes through a function written in Python; this is half of its time.
        self._engine.get().add(tuple.__new__(Event, (rules.type, channel, text)), rules, key)

    def flush_all(self, timeout: float | None = None) -> bool:
        """Close all windows now, and wait until the sink has taken everything that was enqueued before this call.

        True if it has, False if `timeout` seconds (None: no limit) passed or one of the batches failed. From inside the
        sink, or from anywhere else that the delivery has to wait for, it asks for the flush and answers False at once.
        """
        return self._engine.get().flush("manual", timeout)

    def destroy(self, timeout: float | None = 5.0) -> bool:
        """Refuse further events, deliver what is pending, and end the thread.

        True if all of it was taken within `timeout` seconds (None: no limit) and the thread has ended. Idempotent.
        """
        return self._engine.get().close(timeout)

    close = destroy

    def get_stats(self) -> BatcherStats:
        """Counters of this process, as a frozen value."""
        return self._engine.get().stats()

    @property
    def publishing_for(self) -> float:
        """Seconds for which the sink has been taking the present batch; 0 if there is none. Takes no lock."""
        return self._engine.get().publishing_for()

    def refuse(self, error: SSEBatcherError) -> NoReturn:
        """Count a refusal, and raise it. For layers above that check more than this one does."""
        self._engine.get().count_refusal()
        raise error

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
                    "A browser also calls on%s for an event of the type %r: tell them apart by event.data, "
                    "which its own events do not have.",
                    name,
                    name,
                )
        return rules

    def _known_channel(self, channel: str) -> str:
        name = check_channel(channel)
        if len(self._channels) >= _MAX_KNOWN_NAMES:
            self._channels.clear()
        self._channels.add(name)
        return name

    def _key(self, rules: TypeRules, data: Any) -> str | None:
        """The JSON text of the event's dedup key, so that 1, True and "1" are three keys."""
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
