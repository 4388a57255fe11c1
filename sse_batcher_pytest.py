"""The pytest plugin of sse_batcher: the fixtures sse_events, sse_clock and sse_stream. See docs/guides/testing.md.

Not in the package, so that a test run that uses none of them does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sse_batcher.testing import Clock, Recording, Stream


@pytest.fixture
def sse_events() -> Iterator[Recording]:
    """The events that were sent in this test. They are recorded instead of delivered, for all managers."""
    from sse_batcher.testing import record  # noqa: PLC0415  # only a test that uses it pays for it

    with record() as sent:
        yield sent


@pytest.fixture
def sse_clock() -> Iterator[Clock]:
    """The time of this test. It stands still until ``sse_clock.advance(seconds)``."""
    from sse_batcher.testing import record  # noqa: PLC0415

    with record() as sent:
        yield sent.clock


@pytest.fixture
def sse_stream(sse_clock: Clock) -> Iterator[Callable[..., Stream]]:
    """Opens streams, with the arguments of `open_stream`. They are closed at the end of the test."""
    from sse_batcher.testing import open_stream  # noqa: PLC0415

    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(open_stream(*args, **options))
