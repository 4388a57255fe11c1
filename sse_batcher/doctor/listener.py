"""Listener: reads an open stream while other things are examined, and counts what comes.

A thread of its own, which is the only one to use the stream as long as it runs.
"""

from __future__ import annotations

import bisect
import threading
import time

from ..parser import Block, Comment
from ..remote.message import RemoteError
from ..remote.stream import RemoteStream
from .client import plain_object
from .facts import FirstBlock, Listening

UNKNOWN_HEARTBEAT_SECONDS = 15.0
MAX_TIMES = 10_000
"""Of how many heartbeats the times are kept. An app sends fewer, and a server can send any number of comments."""


class Listener:
    """Reads a stream on a thread of its own, for some seconds.

    `heartbeat`: the time between two, if that is known. `rest`: what came together with the first block.
    """

    def __init__(
        self, stream: RemoteStream, heartbeat: float | None, seconds: float, rest: list[Block | Comment]
    ) -> None:
        self._stream = stream
        self._near = 0.2 * (heartbeat or UNKNOWN_HEARTBEAT_SECONDS)
        self._began = time.monotonic()
        self._deadline = self._began + seconds
        self._stopping = False
        self._heartbeats = 0
        self._heartbeat_times: list[float] = []  # of the first ones
        self._last = self._began  # when the last byte came
        self._silence = 0.0  # the longest one so far
        self._events = 0
        self._bye = ""
        self._is_invalid = False
        self._ended = 0.0
        self._take(self._began, rest)
        self._thread = threading.Thread(target=self._run, name="sse_batcher doctor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait for the end. Returns whether it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def left(self) -> float:
        """For how many seconds it listens from now on, at most."""
        return max(0.0, self._deadline - time.monotonic())

    def stop(self) -> None:
        """End it now. A thread that a server holds is left behind after a second, so that Ctrl-C ends the program."""
        self._stopping = True
        self._thread.join(1.0)

    def result(self) -> Listening:
        """Return what has come. After the end."""
        times = sorted(self._heartbeat_times)
        together = [bisect.bisect_left(times, one + self._near) - index for index, one in enumerate(times)]
        silence_at_end = self._ended - self._last
        return Listening(
            seconds=self._ended - self._began,
            heartbeats=self._heartbeats,
            together=max(together, default=0),
            events=self._events,
            silence=max(self._silence, silence_at_end),
            end="invalid" if self._is_invalid else self._stream.end,
            silence_at_end=silence_at_end,
            bye=self._bye,
        )

    def _run(self) -> None:
        try:
            while not self._stopping and time.monotonic() < self._deadline and self._stream.end is None:
                self._read()
        except RemoteError:
            self._is_invalid = True
        finally:
            self._ended = time.monotonic()

    def _read(self) -> None:
        piece = self._stream.read(min(0.2, max(0.001, self._deadline - time.monotonic())))
        if piece is None:
            return
        if piece.body:  # not the last, empty chunk, with which some proxies end a response that they cut
            self._silence = max(self._silence, piece.at - self._last)
            self._last = piece.at
        self._take(piece.at, piece.items)

    def _take(self, at: float, items: list[Block | Comment]) -> None:
        for item in items:
            if isinstance(item, Comment):
                self._heartbeats += 1
                if len(self._heartbeat_times) < MAX_TIMES:
                    self._heartbeat_times.append(at)
            elif item.type == "sse_bye":
                self._bye = FirstBlock(type=item.type, data=plain_object(item.data)).reason
            elif not item.type.startswith("sse_"):
                self._events += 1
