"""The public errors: each can be copied, and pickled for another process, as `multiprocessing` and pytest-xdist do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

import sse_batcher
import sse_batcher.errors
import sse_batcher.testing
from sse_batcher import (
    BacklogFullError,
    ConfigurationError,
    InvalidEventError,
    MissingPackageError,
    SSEBatcherError,
)
from sse_batcher.testing import StreamRefusedError

PUBLIC = sorted(
    {
        each
        for module in (sse_batcher, sse_batcher.errors, sse_batcher.testing)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Exception)
    },
    key=lambda each: each.__name__,
)
WITH_FACTS: dict[type[Exception], Callable[[], Exception]] = {
    BacklogFullError: lambda: BacklogFullError(49, 9_849, 7.0),
    ConfigurationError: lambda: ConfigurationError("message", option="max_clients"),
    InvalidEventError: lambda: InvalidEventError("message", field="key"),
    MissingPackageError: lambda: MissingPackageError("message", name="redis"),
    StreamRefusedError: lambda: StreamRefusedError(403, "no" * 1_000),
}


def test_all_public_errors_are_tested() -> None:
    assert SSEBatcherError in PUBLIC
    assert set(WITH_FACTS) < set(PUBLIC)
    assert len(PUBLIC) == 11


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("kind", PUBLIC)
def test_a_public_error_can_be_copied_and_pickled(kind: type[Exception], copied: Callable[[Exception], object]) -> None:
    error = WITH_FACTS.get(kind, lambda: kind("message"))()
    error.add_note("a note")
    other = copied(error)
    assert type(other) is kind
    assert str(other) == str(error)
    assert vars(other) == vars(error)
    assert getattr(other, "name", None) == getattr(error, "name", None)
