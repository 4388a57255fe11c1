"""Replay: reads frames that only the backend still has, for detached clients, on a thread of its own.

A backend may take long to answer, and the loop's thread must never wait. So the loop's thread only asks, and the
answers come back to it through `SocketClient.answer`. The replay thread is there while clients wait for an answer. A
client asks for its next slice when its socket has taken the last one, so a client that reads slowly does not hold up
the others.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from ...errors import BackendError
from ...runtime.log_fields import log_fields
from ...runtime.worker import Owner, Worker
from ...streams.hub import Hub
from .connection import LEFT, SocketClient

_log = logging.getLogger("sse_batcher.transports.replay")

FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.1, 2.0
"""Seconds until a backend that does not answer is asked again, the first time and at most. Each pause is twice as long
as the one before."""

IDLE_SECONDS = 0.2
"""Seconds for which the thread stays after an answer, because a client that got one usually asks again soon. Starting a
thread takes the loop as long as ten sends, and much longer beside a CPU-bound thread."""


class Replay:
    """Answers the clients of one hub. `clock` gives seconds, from any start. `make_worker` makes the thread.

    Takes no lock. Only `_asking` is used by two threads: the loop's thread appends to it and the replay thread removes
    from it, each in a single step of a deque, which is atomic. All other attributes belong to the replay thread.
    """

    def __init__(
        self, hub: Hub, clock: Callable[[], float], make_worker: Callable[[Owner, str], Worker] = Worker
    ) -> None:
        self._hub = hub
        self._clock = clock
        self._asking: deque[SocketClient] = deque()
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._next_try = 0.0  # the backend is not asked before this time
        self._has_answered = False  # since the thread was idle the last time
        self._worker = make_worker(self, "sse_batcher-replay")
        self._worker.stop()  # so its thread ends when no client waits, and the next question starts another one

    def ask(self, client: SocketClient) -> None:
        """Answer this client soon. Called by the loop's thread; does not block.

        If no thread can be started, the process is ending: the stream is closed, and its client comes back to another
        process.
        """
        self._asking.append(client)
        self._worker.wake()
        if not self._worker.ensure():
            client.dismiss(LEFT)

    def work(self) -> float | None:
        """Answer all clients in the order in which they have asked. One turn of the thread, for `Worker`."""
        while self._asking:
            rest = self._next_try - self._clock()
            if rest > 0:
                return rest
            client = self._asking[0]
            if client.waits and not self._answer(client):
                self._next_try = self._clock() + self._retry_seconds
                self._retry_seconds = min(2 * self._retry_seconds, MAX_RETRY_SECONDS)
                continue
            self._asking.popleft()
            self._has_answered = True
        stays, self._has_answered = self._has_answered, False
        return IDLE_SECONDS if stays else None

    def _answer(self, client: SocketClient) -> bool:
        """Ask the backend and answer the client. Returns False if the backend does not answer now.

        The stream stays open until the backend answers again, and loses nothing.
        """
        try:
            older = self._hub.replay(client.channels, client.point, client.info.user)
        except BackendError as error:
            if self._retry_seconds == FIRST_RETRY_SECONDS:
                _log.warning(
                    "clients wait for events that they have missed, because these cannot be read now: %s",
                    error,
                    extra=log_fields("replay_waits", error=error),
                )
            return False
        except Exception:
            _log.exception(
                "the events that a detached stream has missed cannot be replayed: the stream is closed",
                extra=log_fields("replay_failed", client=client.info.id, channels=client.channels),
            )
            client.dismiss(LEFT)
            return True
        self._retry_seconds = FIRST_RETRY_SECONDS
        client.answer(older)
        return True
