"""sse_batcher: push for synchronous Python web apps.

Any thread calls `enqueue()`, browsers get Server-Sent Events, and bursts arrive as a few batches instead of a flood.
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
    SSEBatcherError,
    TooManyClientsError,
)
from .event import Batch, Event
from .manager import SSEManager
from .options import BatchOptions, ClientOptions, HistoryOptions
from .streams.client import Client
from .wsgi import stream

if TYPE_CHECKING:
    from .flask.extension import SSE

__all__ = [
    "SSE",
    "BackendError",
    "BacklogFullError",
    "Batch",
    "BatchOptions",
    "Client",
    "ClientOptions",
    "ClosedError",
    "ConfigurationError",
    "Event",
    "EventBatcher",
    "HistoryOptions",
    "InvalidEventError",
    "SSEBatcherError",
    "SSEManager",
    "TooManyClientsError",
    "signals",
    "stream",
]


def __getattr__(name: str) -> Any:
    # Flask is imported by who uses `SSE`, not by a script that only publishes.
    if name == "SSE":
        from .flask.extension import SSE  # noqa: PLC0415

        return SSE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
