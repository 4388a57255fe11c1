"""Draining: all streams of a process end, because its server is stopping.

Any thread. See "A reload with Redis" in docs/guides/deployment.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .batching.batcher import EventBatcher
from .runtime.log_fields import log_fields
from .runtime.worker import Deadline
from .streams.handover import HANDOVER_SECONDS, WAVE_STREAMS, Handover
from .streams.hub import Hub

if TYPE_CHECKING:
    from .backends import Backend

_log = logging.getLogger("sse_batcher.manager")

DELIVER_SECONDS = 5.0
"""How long a drain may take to deliver pending events, in seconds."""

CLOSE_SECONDS = 1.0
"""How much of the time of a shutdown is kept for what comes after the streams have ended in waves, in seconds."""

LOOK_SECONDS = 0.05
"""How often a shutdown looks whether the streams have ended in waves, in seconds."""

LAST_SECONDS = 0.3
"""How long a second Ctrl-C waits for the last blocks of streams to be written, in seconds."""


class _Drain:
    """One drain. There is a new object for each, so that one that fails does not end a newer one."""

    def __init__(self) -> None:
        self.delivers = True
        """Whether it has not begun to end the streams. Written by the thread that drains."""


class Draining:
    """Ends the streams of one process.

    `reaches_others`: whether other processes have the same events. Then many streams end in waves: see `Handover`.

    Takes no lock, and waits for none: a signal handler may call `finish` in the middle of any other step. All threads
    that drain write the attributes. If two of them drain at once, the newer handover counts.
    """

    def __init__(self, hub: Hub, batcher: EventBatcher, backend: Backend, *, reaches_others: bool) -> None:
        self._is_stopping: Callable[[], bool] = lambda: False  # until a server is known
        self._hub = hub
        self._batcher = batcher
        self._backend = backend
        self._reaches_others = reaches_others
        self._newest: _Drain | None = None
        """The newest drain, until it has ended all streams."""

    def note_server(self, is_stopping: Callable[[], bool]) -> None:
        """Note how to find out whether the server of the newest request is stopping."""
        # Only if it is used: with some servers, it keeps the server alive, and so its app and this object, until the
        # garbage collector finds them.
        if self._reaches_others:
            self._is_stopping = is_stopping

    def begin(self) -> None:
        """Drain in another thread. Does nothing while a drain is under way. If one fails, the next call drains."""
        if not self._can_begin():
            return
        drain = self._start()
        try:
            self._log_begin()
            try:
                threading.Thread(target=self._run, args=(drain, None), name="sse_batcher-drain", daemon=True).start()
            except RuntimeError:
                # No thread can be started at the end of a process. The calling one may be that which writes to all
                # streams, so there are no waves.
                self.end_at_once()
                self._stop(drain)
        except BaseException:  # of a log handler or a signal handler: nothing is under way
            self._stop(drain)
            raise

    def end_at_once(self) -> None:
        """Deliver what is pending, and let all streams end. Until `Hub.reopen`, no more are taken."""
        self._deliver(Deadline(DELIVER_SECONDS))
        self._hub.close("shutdown", for_good=False)

    def finish(self, deadline: Deadline) -> None:
        """Wait until streams that end in waves have ended, and begin with it if the server is stopping.

        For a shutdown, which then ends the streams that are left. A server may end the process before its streams have
        noticed that it is stopping.
        """
        if not self._reaches_others:
            return
        left = deadline.left()
        # Limited in any case: a signal handler may call this in the middle of the drain that it would wait for.
        waves = Deadline(DELIVER_SECONDS + HANDOVER_SECONDS if left is None else max(0.0, left - CLOSE_SECONDS))
        drain: _Drain | None = None
        try:
            if self._can_begin() and self._has_waves() and self._is_stopping():
                drain = self._start()
                self._log_begin()
                self._run(drain, waves)
            else:
                while self._newest is not None and (rest := waves.left()):
                    time.sleep(min(rest, LOOK_SECONDS))
        except BaseException:  # such as a second Ctrl-C
            if drain is not None:
                self._stop(drain)
            self._hub.close("shutdown")
            self._hub.wait_until_left(LAST_SECONDS)
            raise

    def _can_begin(self) -> bool:
        newest = self._newest  # read once: another thread may stop it
        return not ((newest is not None and newest.delivers) or self._hub.refuses)

    def _has_waves(self) -> bool:
        return self._reaches_others and self._hub.stream_count() > WAVE_STREAMS

    def _start(self) -> _Drain:
        drain = self._newest = _Drain()
        return drain

    def _stop(self, drain: _Drain) -> None:
        if self._newest is drain:  # not a newer one
            self._newest = None

    def _log_begin(self) -> None:
        _log.info(
            "the server seems to be stopping: all streams end",
            extra=log_fields("draining", clients=self._hub.stream_count()),
        )

    def _run(self, drain: _Drain, waves: Deadline | None) -> None:
        """Deliver what is pending, and let all streams end. `waves`: how long this may take; None: no limit."""
        try:
            try:
                self._deliver(Deadline(DELIVER_SECONDS) if waves is None else waves)
                handover = Handover(self._hub) if self._has_waves() else None
            finally:
                # Before the streams end: if they open again, the next drain must count.
                drain.delivers = False
            if handover is None:
                self._hub.close("shutdown", for_good=False)
            else:
                self._end_in_waves(handover, Deadline(None) if waves is None else waves)
        finally:
            self._stop(drain)

    def _deliver(self, deadline: Deadline) -> None:
        self._batcher.flush_all(deadline.left())
        self._backend.wait_until_delivered(deadline.left())

    def _end_in_waves(self, handover: Handover, deadline: Deadline) -> None:
        """Let the streams end in waves, unless the hub is opened again meanwhile."""
        began = time.monotonic()
        handover.run(deadline)
        if not handover.is_valid:
            return
        seconds = time.monotonic() - began
        _log.info(
            "%d streams have ended within %.1f s, a few at a time",
            handover.ended,
            seconds,
            extra=log_fields("handed_over", clients=handover.ended, seconds=round(seconds, 1)),
        )
        self._hub.close("shutdown", for_good=False)
