"""The errors of this library.

Pure. Every one is an `SSEBatcherError` and also a builtin kind, so that a caller need not import it to catch it.
"""

from __future__ import annotations

from typing import Any


class SSEBatcherError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigurationError(SSEBatcherError, ValueError):
    """An option has an invalid value. Raised when options are made, never later.

    `option` is the name of the option (``None`` if the error concerns several).
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class InvalidEventError(SSEBatcherError, ValueError):
    """An event, or one of its fields, cannot be sent. Raised in the caller's thread; only this event is refused.

    `field` names what is wrong: ``"type"``, ``"channel"``, ``"data"``, ``"user"``, ``"key"``, ``"dedup_key"``, ``"id"``
    or ``"retry"``.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UsageError(SSEBatcherError, RuntimeError):
    """The library was called in a way that cannot work, or a function of the app gave an answer that cannot be used."""


class InvalidFunctionError(SSEBatcherError, TypeError):
    """What was given as a function cannot be called, or is a coroutine function."""


class MissingPackageError(SSEBatcherError, ImportError):
    """A package that is not installed is needed for this. The message names the extra that installs it.

    `name` is the name of the package.
    """


class ClosedError(SSEBatcherError, RuntimeError):
    """The batcher or manager was closed before this call."""


class TooManyClientsError(SSEBatcherError, RuntimeError):
    """`max_clients` or `max_clients_per_user` streams are open already. Raised by `subscribe`; a response
    is ``sse_busy`` instead."""


class BackendError(SSEBatcherError, RuntimeError):
    """The backend does not answer. Raised by `subscribe` and `kick`; a response is ``sse_busy`` instead, and enqueued
    events wait."""


class BacklogFullError(SSEBatcherError, RuntimeError):
    """The backend does not take batches as fast as events come, and `max_pending_bytes` wait already.

    `pending_events` and `pending_bytes` say how much waits; `publishing_for` is how long, in seconds, the current call
    of `publish` has not returned (0.0 when none is under way).
    """

    def __init__(self, pending_events: int, pending_bytes: int, publishing_for: float) -> None:
        super().__init__(
            f"{pending_events} events ({pending_bytes} bytes) wait and publish has not returned for "
            f"{publishing_for:.1f} s: the backend is stuck or too slow. Send less, or raise max_pending_bytes."
        )
        self.pending_events = pending_events
        self.pending_bytes = pending_bytes
        self.publishing_for = publishing_for

    def __reduce__(self) -> tuple[type[BacklogFullError], tuple[int, int, float], dict[str, Any]]:
        # Exceptions are pickled by calling the class with `args`, which here is the message alone.
        return BacklogFullError, (self.pending_events, self.pending_bytes, self.publishing_for), vars(self)
