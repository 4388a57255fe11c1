"""Signals: events of the library that an app can subscribe to.

The sender of each is the `SSEManager`. Connect with ``signals.client_connected.connect(receiver)``, or for one
manager with ``.connect(receiver, sender=manager)``; blinker holds receivers weakly. An error that a
receiver raises is logged, and has no other effect.

`event_refused` is sent in the thread whose call is refused. The others are sent on the manager's app thread, under
Flask in a fresh app context, with plain values. Nothing waits for receivers: if they are too slow, signals are
dropped and counted (``signals_dropped`` in the stats).
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from blinker import NamedSignal, Namespace

from .runtime.log_fields import log_fields

_log = logging.getLogger("sse_batcher.signals")
_signals = Namespace()

client_connected = _signals.signal(
    "client_connected", "A stream that is not a poll was opened. Arguments: `client`, a `ClientInfo`."
)
client_disconnected = _signals.signal(
    "client_disconnected",
    "A stream that is not a poll has ended. Arguments: `client`, a `ClientInfo`; `reason`, that of its ``sse_bye``, or "
    "``left`` if the client closed the connection or does not answer; `duration`, in seconds; `frames` and `bytes`, "
    "how many were handed to it.",
)
batch_flushed = _signals.signal("batch_flushed", "The backend took a batch. Arguments: `batch`, a `Batch`.")
event_refused = _signals.signal(
    "event_refused",
    "A call of `enqueue` or `broadcast` raised. Arguments: `error`, what was raised; `event_type`, `channel` and "
    "`user`, as they were given, or None.",
)


def send(signal: NamedSignal, sender: Any, **values: Any) -> None:
    """Send to each receiver. One that raises is logged, and the next one is called."""
    for receiver in signal.receivers_for(sender):
        try:
            answer = receiver(sender, **values)
        except Exception:
            _log.exception(
                "a receiver of the signal %s failed",
                signal.name,
                extra=log_fields("receiver_failed", signal=signal.name),
            )
        else:
            if inspect.iscoroutine(answer):
                _log.error(
                    "a receiver of the signal %s is async, and so does nothing: write it with def",
                    signal.name,
                    extra=log_fields("receiver_is_async", signal=signal.name),
                )
                answer.close()
