"""A feed: what the detached clients of one hub have still to get. It reads the history once for all of their groups.

Run by the loop's thread alone, but for what the hub calls (`offer`, `lose`, `fall_behind` and `end`), which leaves a
note and wakes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from ...event import BROADCAST
from ...reasons import ByeReason, GapReason
from ...streams.client import QueueClient
from ...streams.counts import Counts
from ...streams.hub import Hub
from ...wire import Frame, Position
from .connection import Loop, SocketClient
from .group import Group
from .replay import Replay

LOOKS = 20
"""How often, at most, within a heartbeat, it is looked who has to get one."""


Key = tuple[tuple[str, ...], bool, bool]


class Owner(Protocol):
    """Whose streams they are. Kept alive by them."""

    def drain(self) -> None:
        """The server is stopping."""


class Feed:
    """`position`: all frames up to it, of the channels that are asked for, were handed to the groups."""

    def __init__(self, loop: Loop, hub: Hub, owner: Owner, client: QueueClient) -> None:
        self.loop = loop
        self.hub = hub
        self.owner = owner
        self.position = client.point.position
        self.counts = Counts()
        self.channels: dict[str, dict[Group, None]] = {}
        """The groups of each channel that anybody asks for; of ``*``, all."""
        self._groups: dict[Key, Group] = {}
        self._replay = Replay(hub, loop.clock)
        self._lost: dict[str, tuple[Position, GapReason]] = {}
        self._lost_at = self.position
        self._heartbeat = client.options.heartbeat
        self._next_look = 0.0
        self._busy = False
        # Whether it was told of news that it has not read yet, and of which frame first. Written by the delivering
        # thread in this order, the other way round by ours.
        self._first: Position = self.position
        self._told = False

    # -- for the hub ---------------------------------------------------------------------------------------------------

    def offer(self, frame: Frame) -> None:
        self._tell(frame.position)

    def lose(self, channel: str, position: Position, reason: GapReason) -> None:
        self._lost[channel] = position, reason
        self._lost_at = position

    def fall_behind(self) -> None:
        self._tell(self._lost_at)

    def end(self, reason: ByeReason) -> None:
        self.loop.post(self)  # the hub knows the reason

    def _tell(self, position: Position) -> None:
        if not self._told:
            self._first = position
            self._told = True
            self.loop.post(self)

    # -- its groups ----------------------------------------------------------------------------------------------------

    def group_of(self, client: QueueClient, *, chunked: bool) -> Group:
        """The group in which this client's connection will be; one that is not listed yet if there is none."""
        return self._groups.get(_key(client.channels, client.batches, chunked)) or Group(self, client, chunked=chunked)

    def enlist(self, group: Group) -> None:
        self._groups[_key(group.channels, group.batches, group.chunked)] = group
        for channel in (*group.channels, BROADCAST):
            self.channels.setdefault(channel, {})[group] = None

    def unlist(self, group: Group) -> None:
        del self._groups[_key(group.channels, group.batches, group.chunked)]
        unasked = []
        for channel in (*group.channels, BROADCAST):
            groups = self.channels[channel]
            del groups[group]
            if not groups:
                del self.channels[channel]
                self._lost.pop(channel, None)
                unasked.append(channel)
        if unasked:
            self.hub.unlisten(self, unasked)

    def lost_in(self, channels: Sequence[str]) -> tuple[Position, GapReason] | None:
        lost = [self._lost[channel] for channel in (*channels, BROADCAST) if channel in self._lost]
        return max(lost, default=None)

    def replay(self, connection: SocketClient) -> None:
        """Have the connection answered with what only the backend still has."""
        self._replay.ask(connection)

    # -- by the loop ---------------------------------------------------------------------------------------------------

    def serve(self) -> Iterator[None]:
        """Give the groups what there is, with a pause where others have to have their turn."""
        if self._busy:
            return  # who is at it looks again before it ends
        self._busy = True
        while self._told:
            # In this order: a frame that comes in between is read now, and told of once more.
            first = self._first
            self._told = False
            while frames := self._read(first):  # all of it: of the next one it is said that this was read
                for group, part in self._sorted(frames).items():
                    group.give(part)
                    if self.loop.turn_is_over:
                        yield
        self._busy = False
        if self.hub.closing is not None:
            for group in self._groups.values():
                group.send_away()

    def look(self, now: float) -> None:
        """Look at the time."""
        if now < self._next_look:
            return
        rest = self._heartbeat
        for group in self._groups.values():
            left = group.until_heartbeat(now)
            if left <= 0:
                self.loop.post(group)
            elif left < rest:
                rest = left
        self._next_look = now + max(rest, self._heartbeat / LOOKS)

    def _read(self, first: Position) -> list[Frame]:
        """The next frames. Who has missed some is sent to read for himself."""
        frames, gone = self.hub.news(self.channels, self.position, first)
        for channel in gone:
            for group in self.channels[channel]:
                group.send_away()
        if frames:
            self.position = frames[-1].position
        return frames

    def _sorted(self, frames: Sequence[Frame]) -> dict[Group, list[Frame]]:
        """Which group gets which of these."""
        parts: dict[Group, list[Frame]] = {}
        for frame in frames:
            for group in self.channels.get(frame.batch.channel, ()):
                parts.setdefault(group, []).append(frame)
        return parts


def _key(channels: tuple[str, ...], batches: bool, chunked: bool) -> Key:
    """Of those who get the same bytes."""
    return tuple(sorted(channels)), batches, chunked
