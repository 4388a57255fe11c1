"""Refusals: how many requests got no stream, and why.

Thread-safe.
"""

from __future__ import annotations

from typing import get_args

from ..errors import BackendError, ClosedError, TooManyClientsError
from ..reasons import BusyReason, RefusalReason
from ..runtime.locks import new_lock


class Refusals:
    """Counts requests that got no stream. `_lock` guards the counts."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._by_reason: dict[RefusalReason, int] = dict.fromkeys(get_args(RefusalReason), 0)

    def add(self, reason: RefusalReason) -> None:
        """Count a request."""
        with self._lock:
            self._by_reason[reason] += 1

    def by_reason(self) -> dict[RefusalReason, int]:
        """Return the counts, with every reason."""
        with self._lock:
            return dict(self._by_reason)


def refusal_reason(error: BackendError | ClosedError | TooManyClientsError) -> BusyReason:
    """Return the reason that stands for an error of `SSEManager.subscribe`."""
    if isinstance(error, BackendError):
        return "backend"
    return "limit" if isinstance(error, TooManyClientsError) else "draining"
