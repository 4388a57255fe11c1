"""The archive: older entries of the stream, read again for cursors that a process's own history has left behind.

Called by the threads of streams. `Archive` holds one connection, and reads for one of them at a time: that bounds the
connections, and what is held of the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...errors import BackendError
from ...event import BROADCAST, Batch
from ...runtime.locks import new_lock, run_if_free
from ...streams.history import ResumePoint, Slice
from ...wire import Frame, Position
from .connections import Link, errors, understood
from .entries import Unreadable, before, channel_of, id_of, numbers, read_fields
from .reader import Keys, RawEntry, State

WAIT_SECONDS = 1.0
"""How long one stream waits for the others."""
SILENT_SECONDS = 2.0
"""If the reader has waited for so long, Redis is not asked at all: each call would hold a thread of the server."""
AT_ONCE = 64
"""Entries in one call."""
MAX_BYTES = 65_536
"""Of the frames in one slice. A stream whose client has stopped reading holds them, and nobody else needs them."""


class Archive:
    """What the stream still has, up to where the reader has been. `reader` is the reader's link."""

    def __init__(self, keys: Keys, connect: Callable[[], Any], state: State, reader: Link) -> None:
        self._keys = keys
        self._state = state
        self._reader = reader
        self._link = Link(connect, "Replaying from")
        self._reading = new_lock()
        self._closed = False

    def has(self, position: Position) -> bool:
        """Whether there is an entry at this position. Raises `BackendError` if Redis does not say."""
        id = id_of(position)
        (found,) = self._ask(lambda pipeline: pipeline.xrange(self._keys.stream, min=id, max=id))
        return bool(found)

    def read(self, channels: Iterable[str], point: ResumePoint) -> Slice | None:
        """The next frames of these channels after the cursor, and first the one that it has a part of.

        None if it is not sure that they are all. Raises `BackendError` if Redis does not say.
        """
        state, position = self._state, point.position
        end = state.read
        if position >= end or position[0] != end[0]:
            return None
        entries, first, last = self._ask(lambda pipeline: self._queue(pipeline, position, end, bool(point.part)))
        # The first entry: nothing after the cursor was trimmed. The last one that was read: this is still the line of
        # entries that we know, and not that of a replica which had got less.
        if not first or not last or before(numbers(first[0][0])) > position[1:]:
            return None
        if point.part and (not entries or numbers(entries[0][0]) != position[1:3]):
            return None
        found = self._frames({*channels, BROADCAST}, entries, end)
        # Looked at last: a double that is forgotten raises it first.
        return found if (state.floor < position if point.part else state.floor <= position) else None

    def close(self) -> None:
        self._closed = True
        self._link.disconnect()

    def _frames(self, channels: set[str], entries: list[RawEntry], end: Position) -> Slice | None:
        state = self._state
        reached = end if len(entries) < AT_ONCE else (end[0], *numbers(entries[-1][0]), 0)
        frames: list[Frame] = []
        room = MAX_BYTES
        for id, fields in entries:
            position: Position = (end[0], *numbers(id), 0)
            wanted = channel_of(fields) in channels and position not in state.doubles
            entry = read_fields(fields) if wanted else None
            content = None if entry is None else entry.content
            if isinstance(content, Unreadable):
                return None
            if isinstance(content, Batch):
                frame = Frame(content, position, f"{state.epochs[end[0]]}-{id_of(position)}", position[1])
                room -= len(frame.plain)
                if frames and room < 0:
                    break
                frames.append(frame)
        return Slice(frames, frames[-1].position if frames else reached)

    def _queue(self, pipeline: Any, begin: Position, end: Position, inclusive: bool) -> None:
        """The entries; and afterwards the first there is, and the last that was read."""
        key, last = self._keys.stream, id_of(end)
        pipeline.xrange(key, min=("" if inclusive else "(") + id_of(begin), max=last, count=AT_ONCE)
        pipeline.xrange(key, count=1)
        pipeline.xrange(key, min=last, max=last)

    def _ask(self, queue: Callable[[Any], object]) -> Any:
        """What is queued, in one go."""
        answers: list[Any] = []

        def ask() -> None:
            try:
                pipeline = self._link.client.pipeline(transaction=False)
                queue(pipeline)
                with understood():
                    answers.extend(pipeline.execute())
                self._link.succeed()
            except errors() as error:
                if self._closed:
                    self._link.drop()
                else:
                    self._link.fail(error)
                raise BackendError(f"Redis cannot be read again: {error}") from error

        answers_others = self._reader.silent_for <= SILENT_SECONDS
        if not (answers_others and run_if_free(self._reading, ask, timeout=WAIT_SECONDS)):
            raise BackendError("Redis does not answer those that ask for older entries")
        return answers
