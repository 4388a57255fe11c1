"""The overview: what the monitor shows of one manager in this process, as values for JSON.

Any thread. Nothing is recorded for it: each overview reads the open streams, the history and the counters, so it costs
nothing while no monitor is open. With many streams, only the most interesting are in it, and the number of all.
"""

from __future__ import annotations

import functools
import heapq
import json
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from ..event import Event, User
from ..manager import SSEManager
from ..manager_state import process_of
from ..process_state import ProcessState
from ..runtime.locks import new_lock
from ..runtime.process import PerProcess, process_began
from ..streams.history import Wait
from ..streams.hub import Survey
from ..streams.open_stream import OpenStream
from ..wire import Frame

STREAMS = 50
"""How many streams an overview has."""
FRAMES = 30
"""How many of the newest frames it has."""
CHANNELS = 12
"""How many channels it has, those with the most streams."""
NAMES = 6
"""How many channels of one stream, users of one frame, types of one frame and contents of one frame it has."""
MAX_CONTENT = 1_000
"""How many characters of the data of one event it has."""

REST = 150
"""An overview that took a second of CPU time is shown for so many seconds. So the monitor takes at most 0.7 % of a
core, and with the requests themselves less than 1 %. If pages search for three texts, each overview is shown three
times as long. A text that was asked for once, as during typing, does not count."""
MIN_SECONDS = 2.0
"""How many seconds pass between two overviews at least, as a page asks for them."""
SHARED_SECONDS = 1.0
"""For how many seconds an overview is kept at least, for other pages that ask for the same."""
MAX_SEARCHES = 30
"""For how many texts that pages search for overviews are kept. Each has about 15 kB."""

COUNTS = (
    *("clients", "clients_by_state", "clients_by_transport", "streams_opened", "streams_closed", "streams_refused"),
    *("enqueued", "replaced", "failed", "refused", "batches", "pending_events"),
    *("frames", "bytes", "saved_frames", "saved_bytes", "replays", "gaps", "overflows"),
    *("history_frames", "history_bytes", "history_age", "backend_silent", "backend_answered", "ignored"),
)
"""The fields of `ManagerStats` that it has."""


class _Kept(NamedTuple):
    """An overview that was made."""

    until: float
    """When it is too old."""
    awaited_until: float
    """A page that goes on to search for the same has asked again by then."""
    is_repeated: bool
    """Whether a page has gone on to search for the same."""
    overview: dict[str, Any]


class _InProcess:
    """What a monitor has in one process. `making` is held while an overview is made, and guards `kept`."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.kept: dict[str, _Kept] = {}  # by the text that is searched for, the oldest first
        self.making = new_lock()


class Monitor:
    """Makes the overviews of one manager.

    `content`
        whether they have the data of the newest events.
    `addresses`
        whether they have the addresses of clients.
    `clock`, `cpu_clock`
        return seconds, from any start: of monotonic time, and of CPU time of the calling thread.
    """

    def __init__(
        self,
        manager: SSEManager,
        *,
        content: bool = False,
        addresses: bool = True,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._manager = manager
        self._content = content
        self._addresses = addresses
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._in_process = PerProcess(_InProcess)

    def look(self, search: str = "") -> dict[str, Any]:
        """Return an overview. Pages that ask for the same share it.

        `search`: only streams are listed that have this text in their user, a channel, their transport or their
        address.
        """
        own = self._in_process.get()
        with own.making:  # of pages that ask at the same time, one makes it, and the others wait for it
            now = self._clock()
            found = own.kept.get(search)
            if found is not None and now < found.until:
                return found.overview
            others = {text: kept for text, kept in own.kept.items() if text != search and now < kept.awaited_until}
            is_full = len(others) >= MAX_SEARCHES
            if is_full:
                del others[next(iter(others))]
            began = self._cpu_clock()
            overview = self.this_process() | self._make(search)
            # If there are too many, it is not known which of them are asked for again.
            counted = len(others) if is_full else sum(kept.is_repeated for kept in others.values())
            rest = REST * (self._cpu_clock() - began) * (counted + 1)
            pause = max(MIN_SECONDS, rest)
            overview["next"] = round(pause, 1)
            is_repeated = found is not None and now < found.awaited_until
            kept = _Kept(now + max(SHARED_SECONDS, rest), now + 2 * pause, is_repeated, overview)
            own.kept = {**others, search: kept}
            return overview

    def is_here(self, process: str) -> bool:
        """Return whether this is the process with this `id`."""
        return process == self._in_process.get().id

    def this_process(self) -> dict[str, Any]:
        """Return only which process this is, for a page that shows another one."""
        return {"process": _process(self._in_process.get().id)}

    def _make(self, search: str) -> dict[str, Any]:
        process = process_of(self._manager)
        stats = process.stats()
        channels = stats.clients_by_channel
        hub = process.hub
        survey = hub.survey(FRAMES)
        now_ms = process.backend.now()
        return {
            "at": self._clock(),
            "counts": {name: getattr(stats, name) for name in COUNTS},
            "users": survey.users,
            "channels": {
                "total": len(channels),
                "rows": heapq.nlargest(CHANNELS, channels.items(), key=lambda item: item[1]),
            },
            "streams": self._streams(process, survey, search.casefold(), now_ms),
            "events": [_frame_row(frame, now_ms, with_content=self._content) for frame in survey.frames],
            "shows": {"content": self._content, "addresses": self._addresses},
            "backend": _backend(process),
        }

    def _streams(self, process: ProcessState, survey: Survey, search: str, now_ms: float) -> dict[str, Any]:
        """List streams: the one that is behind for longest first, then those that were opened last."""
        found = survey.streams
        if search:
            found = [stream for stream in found if search in self._searched(stream)]
        late = [stream for stream in found if stream.is_waiting]
        rows = heapq.nsmallest(STREAMS, late, key=lambda stream: stream.point.position)
        waits: list[Wait | None] = [*process.hub.waits(rows)]
        behind = set(late)
        for stream in reversed(found):
            if len(rows) >= STREAMS:
                break
            if stream not in behind:
                rows.append(stream)
                waits.append(None)
        users = {stream.info.user for stream in rows}
        of_user = Counter(stream.info.user for stream in survey.streams if stream.info.user in users)
        now = process.hub.clock()
        listed = [self._stream_row(stream, wait, now, now_ms) for stream, wait in zip(rows, waits, strict=True)]
        for stream, row in zip(rows, listed, strict=True):
            row["streams_of_user"] = of_user[stream.info.user]
        return {"found": len(found), "late": len(late), "rows": listed}

    def _searched(self, stream: OpenStream) -> str:
        """Return the text in which a stream is searched for. Only what the page may show is in it."""
        info = stream.info
        address = info.address if self._addresses else None
        parts = ["" if info.user is None else str(info.user), address or "", stream.transport, *info.channels]
        return "\n".join(parts).casefold()

    def _stream_row(self, stream: OpenStream, wait: Wait | None, now: float, now_ms: float) -> dict[str, Any]:
        info = stream.info
        row = {
            "id": info.id,
            "user": None if info.user is None else _user(info.user),
            "channels": list(info.channels[:NAMES]),
            "more_channels": max(0, len(info.channels) - NAMES),
            "behind": wait is not None,
            "lag": None if wait is None or wait.since is None else _seconds(now_ms - wait.since, 1000),
            "lag_is_longer": wait is not None and wait.is_longer,
            "transport": stream.transport,
            "poll": stream.poll,
            "age": _seconds(now - stream.opened_at),
        }
        return row | {"address": info.address} if self._addresses else row


def _frame_row(frame: Frame, now_ms: float, *, with_content: bool) -> dict[str, Any]:
    batch = frame.batch
    types = Counter(event.type for event in batch.events)
    row = {
        "id": frame.id,
        "types": types.most_common(NAMES),
        "more_types": max(0, len(types) - NAMES),
        "channel": batch.channel,
        "users": [_user(user) for user in batch.users[:NAMES]],
        "more_users": max(0, len(batch.users) - NAMES),
        "count": len(batch.events),
        "bytes": len(frame.plain),
        "reason": batch.reason,
        "age": _seconds(now_ms - frame.time, 1000),
    }
    return row | {"content": [_content(event) for event in batch.events[:NAMES]]} if with_content else row


def _content(event: Event) -> str:
    body = event.body
    return body if len(body) <= MAX_CONTENT else f"{body[:MAX_CONTENT]}…"


def _backend(process: ProcessState) -> dict[str, Any]:
    backend = process.backend
    return {
        "is_shared": process.reaches_others,
        "is_known": backend.find_position(),
        "unhealthy": process.unhealthy_reason(),
        "unread": backend.unread,
        "processes": backend.processes,
    }


def _user(user: User) -> str:
    """Return a user as JSON: ``"7"`` and ``7`` are two users, and a browser knows no large whole numbers."""
    return json.dumps(user)


def _seconds(difference: float, divisor: int = 1) -> float:
    return round(max(0.0, difference / divisor), 3)


def _process(id: str) -> dict[str, Any]:
    return {
        "id": id,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "running": round(time.time() - process_began()),
        "version": package_version(),
    }


@functools.cache
def package_version() -> str:
    """Return the version of sse_batcher that is installed."""
    try:
        return version("sse_batcher")
    except PackageNotFoundError:  # it was copied, not installed
        return "unknown"
