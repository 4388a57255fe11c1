"""Sites under Flask that a test makes and that are shut down at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from sse_batcher import SSEManager

from .waiting import TIMEOUT


class Site(Protocol):
    """What has a manager."""

    manager: SSEManager


S = TypeVar("S", bound=Site)


@contextmanager
def making(kind: Callable[..., S]) -> Iterator[Callable[..., S]]:
    """Within the block, a function that makes sites. At its end, the manager of each of them is shut down."""
    sites: list[S] = []

    def make(**config: Any) -> S:
        sites.append(kind(**config))
        return sites[-1]

    yield make
    for site in sites:
        assert site.manager.shutdown(TIMEOUT)
