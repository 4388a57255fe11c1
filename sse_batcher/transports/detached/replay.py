"""Replay: reading again what only the backend still has, for detached clients, on a thread of its own.

The loop's thread asks, and never waits; the answers come back to it by `SocketClient.answer`. The other thread is there
while connections wait for an answer. A connection asks for the next slice when its socket has taken the last one, so a
client that reads slowly does not hold up the others.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from ...errors import BackendError
from ...runtime.worker import Worker
from ...streams.hub import Hub
from .connection import LEFT, SocketClient

_log = logging.getLogger("sse_batcher.transports.replay")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds until a backend that does not answer is asked again; each pause is twice as long as the last one."""

IDLE = 0.2
"""Seconds for which the thread stays, because a client that was answered mostly asks again. To start one takes the loop
as long as ten sends, and much longer while another thread computes."""


class Replay:
    """For the connections of one hub. `clock` is in seconds, from any start."""

    def __init__(self, hub: Hub, clock: Callable[[], float]) -> None:
        self._hub = hub
        self._clock = clock
        self._asking: deque[SocketClient] = deque()  # its single steps are atomic
        self._pause = FIRST_PAUSE
        self._next = 0.0  # not before this time
        self._has_answered = False  # since the thread was last idle
        self._worker = Worker(self, "sse_batcher-replay")
        self._worker.stop()  # its thread ends when nothing is asked, and is started by the next question

    def ask(self, connection: SocketClient) -> None:
        """Have the connection answered soon. By the loop's thread."""
        self._asking.append(connection)
        self._worker.wake()
        if not self._worker.ensure():
            connection.dismiss(LEFT)  # the process ends: the client comes back, to another one

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`: answer all, in the order in which they have asked."""
        while self._asking:
            rest = self._next - self._clock()
            if rest > 0:
                return rest
            connection = self._asking[0]
            if connection.waits and not self._answer(connection):
                self._next = self._clock() + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
                continue
            self._asking.popleft()
            self._has_answered = True
        stays, self._has_answered = self._has_answered, False
        return IDLE if stays else None

    def _answer(self, connection: SocketClient) -> bool:
        """False if the backend does not say. That passes: the stream stays open meanwhile, and loses nothing."""
        try:
            older = self._hub.replay(connection.channels, connection.point)
        except BackendError as error:
            if self._pause == FIRST_PAUSE:
                _log.warning("clients wait for what they have missed, which cannot be read again now: %s", error)
            return False
        except Exception:
            _log.exception("a detached stream cannot be replayed: it is closed, and its client comes back")
            connection.dismiss(LEFT)
            return True
        self._pause = FIRST_PAUSE
        connection.answer(older)
        return True
