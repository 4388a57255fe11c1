"""The archive: reads older entries of the Redis stream again, for cursors that this process's history does not reach.

Called by the threads of streams. `Archive` has one connection and reads for one thread at a time, which bounds the
number of connections and the memory for the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...event import BROADCAST, EVERY_USER, Batch, User
from ...streams.history import ResumePoint, Slice
from ...wire import Frame, Position
from .connections import Link, SharedLink
from .entries import RawEntry, Unreadable, audience_of, before, id_of, numbers, read_fields
from .state import Keys, State

ENTRIES_PER_SLICE = 64
"""How many entries one call asks for."""
BYTES_PER_SLICE = 65_536
"""About how many bytes of frames a slice has. A stream whose client has stopped reading keeps them in memory."""


class Archive:
    """The entries that the stream still has, up to where the reader is. `reader` is the reader's link. Thread-safe."""

    def __init__(self, keys: Keys, connect: Callable[[], Any], state: State, reader: Link) -> None:
        self._keys = keys
        self._state = state
        self._link = SharedLink(connect, "Replaying from", "older events", reader)

    def has(self, position: Position) -> bool:
        """Return whether there is an entry at this position. Raises `BackendError` if Redis does not answer."""
        id = id_of(position)
        (found,) = self._ask(lambda pipeline: pipeline.xrange(self._keys.stream, min=id, max=id))
        return bool(found)

    def read(self, channels: Iterable[str], point: ResumePoint, user: User | None) -> Slice | None:
        """Return the next frames for such a stream after the point, and first the one that the client has a part of.

        None if some may be missing, or if the point was refused. Raises `BackendError` if Redis does not answer.
        """
        state, position = self._state, point.position
        end = state.read
        if position >= end or position[:1] != end[:1]:  # that of a refused point is empty
            return None
        entries, first, last = self._ask(lambda pipeline: self._queue(pipeline, position, end, bool(point.part)))
        # The first entry shows that nothing after the cursor was trimmed. The entry that the reader has read last shows
        # that the stream is still the same, and not that of a replica that had received less.
        if not first or not last or before(numbers(first[0][0])) > position[1:]:
            return None
        if point.part and (not entries or numbers(entries[0][0]) != position[1:3]):
            return None
        found = self._frames({*channels, BROADCAST}, user, entries, end)
        # The floor is read last, since the reader raises it before it forgets a duplicate.
        return found if (state.floor < position if point.part else state.floor <= position) else None

    def close(self) -> None:
        self._link.close()

    def _frames(self, channels: set[str], user: User | None, entries: list[RawEntry], end: Position) -> Slice | None:
        state = self._state
        reached = end if len(entries) < ENTRIES_PER_SLICE else (end[0], *numbers(entries[-1][0]), 0)
        frames: list[Frame] = []
        room = BYTES_PER_SLICE
        for id, fields in entries:
            position: Position = (end[0], *numbers(id), 0)
            wanted = _is_for(fields, channels, user) and position not in state.duplicates
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
        """Queue three calls: the entries, the first entry of the stream, and the entry that was read last."""
        key, last = self._keys.stream, id_of(end)
        pipeline.xrange(key, min=("" if inclusive else "(") + id_of(begin), max=last, count=ENTRIES_PER_SLICE)
        pipeline.xrange(key, count=1)
        pipeline.xrange(key, min=last, max=last)

    def _ask(self, queue: Callable[[Any], object]) -> Any:
        """Make the calls that `queue` adds to a pipeline, and return their answers."""

        def call(client: Any) -> Any:
            pipeline = client.pipeline(transaction=False)
            queue(pipeline)
            return pipeline.execute()

        return self._link.ask(call)


def _is_for(fields: dict[bytes, bytes], channels: set[str], user: User | None) -> bool:
    audience = audience_of(fields)
    if isinstance(audience, str):
        return audience in channels
    return user is not None and (user in audience or audience == EVERY_USER)
