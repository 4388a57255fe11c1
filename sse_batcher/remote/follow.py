"""Following a stream for hours: from its cursor, whatever happens to the connection.

The caller's thread. It does as the module for browsers does, except that it never polls.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any

from ..parser import Block
from .message import Head, RemoteError, Request, json_object
from .stream import RemoteStream, connect
from .url import without_token

HEARTBEAT_SECONDS = 15.0
"""What a stream's heartbeat is taken for until it says so."""
BACKOFF_SECONDS = (1.0, 30.0)
"""The shortest and the longest time between two attempts, if the server does not say how long to wait."""
LEAST_WAIT_SECONDS = 0.5
"""The shortest time between two attempts, whatever the server asks for."""
LEAST_HEARTBEAT_SECONDS = 1.0
"""The shortest heartbeat that a server can have. The stream counts as silent after two of them."""
STEADY_SECONDS = 5.0
"""How long a stream must be open to count as a success. After shorter ones, the time between attempts grows."""
LONGEST_SECONDS = 3_600.0
"""The longest heartbeat and the longest wait that a server can ask for."""
_FINAL = {204, 400, 401, 403, 404, 405, 410}
"""Statuses that another attempt would not change."""


class FinalError(RemoteError):
    """The server refuses the stream, and another attempt would not change that."""


class Follower:
    """Reads one stream again and again. Not thread-safe.

    `ask`
        returns the request, for the cursor after which to go on (empty: from now on). It is called for each attempt.
    `notice`
        is called with a sentence for each thing that is not an event: gaps, ends, new attempts.
    `cursor`
        the cursor to begin at.
    """

    def __init__(self, ask: Callable[[str], Request], notice: Callable[[str], None], cursor: str = "") -> None:
        self.cursor = cursor
        """The place after the newest complete block."""
        self._ask = ask
        self._notice = notice
        self._was_open = False  # ever: else a failure is the user's to mend
        self._opened_at: float | None = None  # in this attempt
        self._tries = 0  # in a row without success
        self._retry: float | None = None  # seconds, as the server said last
        self._after = 0.0  # seconds that the server asks to wait, at least
        self._heartbeat = HEARTBEAT_SECONDS

    def events(self) -> Iterator[tuple[float, Block]]:
        """Yield each block that is not the stream's own, with the time in seconds since 1970 when it came.

        Never ends. Raises `RemoteError` if the first attempt fails, or if the server refuses for good.
        """
        while True:
            self._opened_at = None
            self._after = 0.0
            try:
                with connect(self._ask(self.cursor)) as stream:
                    if stream.is_stream:
                        yield from self._read(stream)
                        why = "the server has ended the stream" if stream.end else "the stream is silent"
                    else:
                        why = self._refusal(stream.head)
            except FinalError:
                raise
            except RemoteError as error:
                if not self._was_open:
                    raise
                why = str(error)
            self._wait(why)

    def _read(self, stream: RemoteStream) -> Iterator[tuple[float, Block]]:
        """Yield what comes, until the stream ends or is silent."""
        while (piece := stream.read(2 * self._heartbeat)) is not None:
            at = time.time() - (time.monotonic() - piece.at)
            for item in piece.items:
                if not isinstance(item, Block):
                    continue
                retry = stream.parser.retry
                self._retry = self._retry if retry is None else min(retry / 1_000, LONGEST_SECONDS)
                if item.has_id:
                    self.cursor = item.id
                if item.type in {"sse_open", "sse_gap", "sse_busy", "sse_bye"}:
                    self._take_own(item.type, json_object(item.data))
                else:
                    yield at, item

    def _take_own(self, block_type: str, data: dict[str, Any]) -> None:
        reason = data.get("reason")
        if block_type == "sse_busy":
            self._notice(f"the server opens no stream now: {reason}")
            self._was_open = True  # it is a site of ours, and the next attempt may succeed
            self._after = self._retry or 0.0
            return
        if block_type == "sse_bye":
            self._notice(f"the server ends the stream: {reason}")
            return
        heartbeat = data.get("heartbeat")
        if isinstance(heartbeat, (int, float)) and heartbeat > 0:
            self._heartbeat = float(min(max(heartbeat, LEAST_HEARTBEAT_SECONDS), LONGEST_SECONDS))
        if block_type == "sse_gap":
            self._notice(f"gap: events may be missing here ({reason})")
        if self._opened_at is None:
            self._opened_at = time.monotonic()
            names = data.get("channels")
            channels = ", ".join(map(str, names)) if isinstance(names, list) else ""
            self._notice(f"{'open again' if self._was_open else 'open'}: {channels or 'no channel'}")
        self._was_open = True

    def _refusal(self, head: Head) -> str:
        """Return why there is no stream. Raises `FinalError` if there never will be one."""
        status = f"{head.status} {head.reason}".strip()
        location = head.headers.get("Location")
        if location is not None:
            place = without_token(location)
            raise FinalError(f"the answer is {status}, to {place}: give that URL, or a token or cookie", "answer")
        if head.status == 200:
            kind = head.headers.get_content_type()
            raise FinalError(f"the answer is {kind}, not an event stream: is this the URL of the stream?", "answer")
        if head.status in _FINAL or not self._was_open:
            raise FinalError(f"the server answers with {status}", "answer")
        self._after = _retry_after(head)
        return f"the server answers with {status}"

    def _wait(self, why: str) -> None:
        least, most = BACKOFF_SECONDS
        was_open = self._opened_at is not None
        if self._opened_at is not None and time.monotonic() - self._opened_at >= STEADY_SECONDS:
            self._tries = 0
        wait = min(most, least * 2.0 ** min(self._tries, 10)) * random.uniform(0.5, 1)
        if self._retry is not None and self._tries == 0:
            wait = self._retry  # by which the server spreads its clients
        elif self._retry is not None and was_open:
            wait = max(wait, self._retry)
        wait = max(wait, self._after, LEAST_WAIT_SECONDS)
        self._tries += 1
        self._notice(f"{why}; next attempt in {wait:.1f} s")
        time.sleep(wait)


def _retry_after(head: Head) -> float:
    """Return the seconds that the header ``Retry-After`` asks for, 0 if it does not."""
    text = head.headers.get("Retry-After", "")
    try:
        seconds = float(text) if text.isdecimal() else parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError, OSError):
        return 0.0
    return min(max(0.0, seconds), LONGEST_SECONDS)
