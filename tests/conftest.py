"""What all tests share."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import settings

import sse_batcher_pytest
from sse_batcher import BatchOptions, EventBatcher
from sse_batcher.runtime import process

from .kit.batching import LONG, OpenBatcher, Sink
from .kit.clock import Clock
from .kit.process import AsProcess
from .kit.site import make_site, site, threaded
from .kit.waiting import TIMEOUT

__all__ = ["make_site", "site", "threaded"]

# The same examples in every CI run; more, and other ones, on a developer's machine with --hypothesis-profile=search.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("default", deadline=None)
settings.register_profile("search", deadline=None, max_examples=2_000)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-versions", action="store_true", help="test_versions.py: not only the oldest and newest")


def pytest_configure(config: pytest.Config) -> None:
    """Our plugin is there, also if the package is not installed.

    Ctrl-C works in the servers that tests start, even where a shell has started these in the background.
    """
    if not config.pluginmanager.has_plugin("sse_batcher") and not config.pluginmanager.is_blocked("sse_batcher"):
        config.pluginmanager.register(sse_batcher_pytest, "sse_batcher")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is there by now stays, so no collection of garbage has to look through all of it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _what_a_module_leaves_stays() -> Iterator[None]:
    """What a module of tests has imported and reported stays, too: hundreds of tests collect garbage."""
    yield
    gc.collect()
    gc.freeze()


_OURS = re.compile(r"sse_batcher(?! doctor).*")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Every thread of ours ends with the test that started it. A doctor may examine beside it."""
    yield
    ours = [thread for thread in threading.enumerate() if _OURS.fullmatch(thread.name)]
    deadline = time.monotonic() + TIMEOUT
    for thread in ours:
        while thread.is_alive() and time.monotonic() < deadline:
            # A manager that the test dropped ends its threads. A request that is still ending may hold it until now.
            gc.collect()
            thread.join(0.1)
        assert not thread.is_alive(), f"{thread.name} outlives the test"


@pytest.fixture(autouse=True, scope="session")
def _servers_of_this_process_are_patient() -> Iterator[None]:
    """Those of `cli.serving` drop a client after a second otherwise, also if it is the machine that stands still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sse_batcher.cli.Handler.timeout", TIMEOUT)
        yield


@pytest.fixture
def clock() -> Clock:
    """Time that the test moves."""
    return Clock()


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def open_batcher(sink: Sink) -> Iterator[OpenBatcher]:
    """Makes batchers on `sink`, and closes them in the end."""
    with ExitStack() as stack:

        def open_one(options: BatchOptions = LONG) -> EventBatcher:
            return stack.enter_context(EventBatcher(sink, options))

        yield open_one
        sink.free.set()


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> AsProcess:
    """Within ``as_process(pid)`` this process has another number, as a forked child would."""

    @contextmanager
    def passing(pid: int) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: pid)
            patch.setattr(process, "process_id", process.ProcessId())
            yield

    return passing
