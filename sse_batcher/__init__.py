"""sse_batcher: push for synchronous Python web apps.

Any thread calls `enqueue()`, browsers get Server-Sent Events, and bursts arrive as a few batches instead of a flood.
How it works inside is in docs/explanation/architecture.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import signals
from .batching.batcher import EventBatcher
from .errors import (
    BackendError,
    BacklogFullError,
    ClosedError,
    ConfigurationError,
    InvalidEventError,
    InvalidFunctionError,
    MissingPackageError,
    SSEBatcherError,
    TooManyClientsError,
    UsageError,
)
from .event import Batch, Event, Text
from .manager import SSEManager
from .options import BatchOptions, ClientOptions, HistoryOptions
from .stats import BatcherStats, ManagerStats
from .streams.client import Client
from .streams.open_stream import ClientInfo
from .streams.opening import Snapshot
from .wsgi import health, script, stream

if TYPE_CHECKING:
    from .flask.extension import SSE

__all__ = [
    "SSE",
    "BackendError",
    "BacklogFullError",
    "Batch",
    "BatchOptions",
    "BatcherStats",
    "Client",
    "ClientInfo",
    "ClientOptions",
    "ClosedError",
    "ConfigurationError",
    "Event",
    "EventBatcher",
    "HistoryOptions",
    "InvalidEventError",
    "InvalidFunctionError",
    "ManagerStats",
    "MissingPackageError",
    "SSEBatcherError",
    "SSEManager",
    "Snapshot",
    "Text",
    "TooManyClientsError",
    "UsageError",
    "health",
    "script",
    "signals",
    "stream",
]


def __getattr__(name: str) -> Any:
    # Flask is imported when `SSE` is used: a script that only publishes does not need it.
    if name == "SSE":
        from .flask.extension import SSE  # noqa: PLC0415

        return SSE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
