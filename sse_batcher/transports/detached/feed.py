"""A feed: reads the hub's history once for all groups of the hub's detached clients.

Runs on the loop's thread, except for the methods that the hub calls (`offer`, `lose`, `fall_behind` and `end`), in any
thread: they leave a note and wake the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ...event import BROADCAST, EVERY_USER, Audience
from ...manager import SSEManager
from ...reasons import ByeReason, GapReason
from ...streams.client import QueueClient
from ...streams.counts import Counts
from ...streams.history import ResumePoint
from ...streams.hub import Hub
from ...wire import Frame, Position
from .connection import SocketClient
from .group import Group, Key
from .replay import Replay

if TYPE_CHECKING:
    from .loop import Loop

STREAMS_PER_LOCK = 100
"""How many streams read the history at most while the hub's lock is held once."""

MAX_SLICE_BYTES = 33_554_432
"""The bytes of frames that streams may keep before they have their turn, in all. The history may have dropped these."""

HEARTBEAT_CHECKS = 20
"""How many times at most, within the time between two heartbeats, the groups are checked for one that is due."""

COMMON_READERS = 4
"""A channel with fewer readers is rare. A group of so few clients costs a broadcast more than it saves for the frames
of that channel."""

MAX_GROUPS_OF_RARE_CHANNELS = 16
"""If there are so many groups, new groups leave rare channels out. A few small groups cost a broadcast hardly anything,
and the frames of their rare channels less than if clients read them alone."""


class Feed:
    """The groups of one hub, and how far its history was read for them.

    What a client reads alone (see `group_of`) is noted for this client, and not read for any group.

    `position`: all frames up to it, of the channels that clients have, were given to the groups.

    Takes no lock. What two threads use, and why that is safe:

    - `_has_news` and `_first_news` tell the loop's thread that there are frames, and where the first of them is. The
      hub calls `_note_news` in one thread at a time. The two threads work in opposite orders, so no frame is lost:

          the hub's thread                         the loop's thread (`serve`)
          adds the frame to the history            1. reads `_first_news`
          if `_has_news` is false:                 2. sets `_has_news` to False
              writes `_first_news`                 3. reads the history from that position
              sets `_has_news` to True

      `_noted_after` is written and read together with `_first_news`.

      A frame that is added before step 3 is read there, and if it was noted after step 2, one more turn finds nothing.
      A frame that is added after step 3 finds `_has_news` false, and is noted.
    - `noted` has the clients with frames that they read alone. The hub adds a client to it (`note`) after the frame is
      in the history, and before it adds the next frame. The loop's thread removes clients, and then lets them read the
      history. It does so after each look at the history, and before it gives the groups what it has found there: so a
      client that has to leave its group has left before the group is given a newer frame. Single steps of a dictionary
      are atomic.
    - `_lost` is written by the hub under its lock, before `fall_behind`. The loop's thread removes channels that no
      client has any more. Harmless race: single steps of a dictionary are atomic.
    """

    def __init__(self, loop: Loop, hub: Hub, manager: SSEManager, client: QueueClient) -> None:
        self.loop = loop
        self.hub = hub
        self.manager = manager
        """The manager of these streams, which lives at least as long as they do."""
        self.position = client.point.position
        self.counts = Counts()
        self.channels: dict[str, dict[Group, None]] = {}
        """The groups of each channel that clients have; under ``*``, all groups."""
        self._groups: dict[Key, Group] = {}
        self._given: Position = self.position  # see `let_read_alone`
        self._replay = Replay(hub, loop.clock, loop.make_worker)
        self._lost: dict[Audience, tuple[Position, GapReason]] = {}
        self._lost_at = self.position
        self.options = client.options
        hub.loop_counts = loop.counts
        self._next_heartbeat_check = 0.0
        self._serving = False
        self._first_news: Position = self.position
        self._noted_after: Position = self.position  # up to here, all was offered before `_first_news`
        self._has_news = False
        self.noted: dict[SocketClient, None] = {}

    # -- for the hub ---------------------------------------------------------------------------------------------------

    def offer(self, frame: Frame) -> None:
        self._note_news(frame.position)

    def note(self, client: SocketClient, position: Position | None = None) -> None:
        """Note that there is a frame at this position which the client reads alone; None: where one was lost."""
        self.noted[client] = None
        self._note_news(self._lost_at if position is None else position)

    def lose(self, audience: Audience, position: Position, reason: GapReason) -> None:
        # `EVERY_USER` stands for all that streams read alone, since that may be many users and channels. At worst, a
        # gap has the reason of the gap of another one.
        self._lost[audience] = position, reason
        self._lost_at = position

    def fall_behind(self) -> None:
        self._note_news(self._lost_at)

    def end(self, reason: ByeReason) -> None:
        self.loop.post(self)  # `serve` finds the reason in the hub

    def _note_news(self, position: Position) -> None:
        """Wake the loop because of what is in the history at this position, unless an earlier note is still there."""
        if not self._has_news:
            self._noted_after = self.hub.offered
            self._first_news = position
            self._has_news = True
            self.loop.post(self)

    # -- its groups ----------------------------------------------------------------------------------------------------

    @property
    def reached(self) -> Position | None:
        """A position up to which all frames were given to the groups. None if it is not known: some are on their way.

        Called by the loop's thread.
        """
        offered = self.hub.offered  # in this order: what was offered until now was noted
        if self._serving:
            return None
        return self._noted_after if self._has_news else offered

    def group_of(self, client: QueueClient, *, chunked: bool) -> Group:
        """Return the group for this client. If there is none, a new one, which is listed with its first client.

        If there are many groups already, it is the group of those channels that are not rare. The client reads the
        frames of its rare channels alone, as those for its user. So clients that have a channel of their own beside
        common ones are one group for the frames of the common ones.
        """
        channels: Iterable[str] = client.channels
        if len(self._groups) >= MAX_GROUPS_OF_RARE_CHANNELS:
            channels = [channel for channel in channels if not self._is_rare(channel)]
        key = Key(tuple(sorted(channels)), client.batches, client.poll, client.gzipped, chunked)
        return self._group(key, client.point.position)

    def regroup(self, client: SocketClient) -> None:
        """Move a client, before it joins its group, to the one that has also those of its channels that were rare once.

        A frame that the client has not read yet was either noted for it, or is given to its new group later.
        """
        group = client.group
        if len(group.channels) == len(client.channels):
            return
        found = [name for name in client.channels if name not in group.channels and not self._is_rare(name)]
        if not found:
            return
        self.hub.share(client, self, found)
        key = group.key._replace(channels=tuple(sorted((*group.channels, *found))))
        client.group = self._group(key, client.point.position)
        client.group.grow()
        group.shrink()

    def _group(self, key: Key, position: Position) -> Group:
        return self._groups.get(key) or Group(self, key, position)

    def _is_rare(self, channel: str) -> bool:
        """Return whether few streams have this channel."""
        count = self.hub.reader_count(channel)
        for group in self.channels.get(channel, ()):
            if count >= COMMON_READERS:
                break
            count += group.size
        return count < COMMON_READERS

    def enlist(self, group: Group) -> None:
        """Read for this group from now on. The hub already reports its channels to this feed."""
        self._groups[group.key] = group
        for channel in (*group.channels, BROADCAST):
            self.channels.setdefault(channel, {})[group] = None

    def unlist(self, group: Group) -> None:
        """Forget this group, and unsubscribe from the channels that no other group has."""
        del self._groups[group.key]
        unused = []
        for channel in (*group.channels, BROADCAST):
            groups = self.channels[channel]
            del groups[group]
            if not groups:
                del self.channels[channel]
                self._lost.pop(channel, None)
                unused.append(channel)
        if unused:
            self.hub.unlisten(self, unused)

    def lost_in(self, channels: Sequence[str], *, alone: bool = False) -> tuple[Position, GapReason] | None:
        """The position of the newest frame of such a stream that never arrived, and why; None if there is none.

        `alone`: also of what streams read alone.
        """
        audiences: list[Audience] = [*channels, BROADCAST]
        if alone:
            audiences.append(EVERY_USER)
        lost = [self._lost[audience] for audience in audiences if audience in self._lost]
        return max(lost, default=None)

    def let_read_alone(self, reached: Position | None = None) -> None:
        """Let the clients that were noted go on without their groups, and read their next frames from the history now.

        `reached`: all that came up to this position was given to the groups, and what clients read alone was noted
        before the last call of this method. A client that leaves its group begins there, and not at the old position of
        a quiet group: the floor that all quiet channels, or users, have in common may have risen above that, though the
        client has missed nothing.
        """
        if not self.noted:
            return
        clients = list(self.noted)
        for client in clients:
            del self.noted[client]  # before it reads: what is noted after this is either read, or noted once more
            was_live = client.live
            if was_live:  # otherwise it goes on alone already, or waits until its socket has room
                client.leave_group()
            # Not if it leaves later, because its group is busy.
            if was_live and not client.live and reached is not None and client.point.position < reached:
                client.point = ResumePoint(reached)
        self.read_for(clients)

    def read_for(self, clients: Sequence[SocketClient]) -> None:
        """Read the next frames of these streams from the history now, if they are about to do so themselves.

        When a stream has its turn, its frames might be gone, as in `read_ahead`. Nothing is read while streams keep
        `MAX_SLICE_BYTES` that they have not begun to send.
        """
        waiting = [client for client in clients if client.needs_slice]
        for start in range(0, len(waiting), STREAMS_PER_LOCK):
            if self.loop.slice_bytes >= MAX_SLICE_BYTES:
                break
            self.hub.advance_all(waiting[start : start + STREAMS_PER_LOCK])

    def replay(self, client: SocketClient) -> None:
        """Read the client's next slice from the backend, on another thread. See `SocketClient.answer`."""
        self._replay.ask(client)

    # -- for the loop --------------------------------------------------------------------------------------------------

    def serve(self) -> Iterator[None]:
        """Read the new frames and give them to the groups. Yields when the turn is over."""
        if self._serving:
            return  # a call that is between two of its turns finds these news before it ends
        self._serving = True
        while self._has_news:
            first, self._given = self._first_news, max(self._given, self._noted_after)  # in this order: see the class
            self._has_news = False
            offered = self.hub.offered
            # Until there are no more: the next note means that all frames before its position were read.
            while frames := self._read(first):
                for group, part in self._by_group(frames).items():
                    group.give(part)
                    if self.loop.turn_is_over:
                        yield
                # A frame that groups were given may also be one that a client reads alone, and is yet to be noted.
                self._given = max(self._given, min(self.position, offered))
                offered = self.hub.offered
        self._serving = False
        if self.hub.closing is not None:
            for group in self._groups.values():
                group.settle()
                group.split_up()

    def read_ahead(self) -> None:
        """Read the new frames of streams that have some of their own, before `serve` has its turn.

        `serve` comes after what the loop already has to do. In a loop over many users, that can take so long that
        their frames are gone from the history by then.
        """
        if self.noted:
            self.let_read_alone(self.reached)

    def check(self, now: float) -> None:
        """Let the groups send the heartbeats that are due. `now` is by the loop's clock."""
        if now < self._next_heartbeat_check:
            return
        rest = self.options.heartbeat
        for group in self._groups.values():
            left = group.until_heartbeat(now)
            if left <= 0:
                self.loop.post(group)
            elif left < rest:
                rest = left
        self._next_heartbeat_check = now + max(rest, self.options.heartbeat / HEARTBEAT_CHECKS)

    def _read(self, first: Position) -> list[Frame]:
        """Read the next frames. Streams that cannot go on with their groups read on alone: they need other frames.

        These are the clients that were noted, and groups of channels that have lost some. `first`: see `Hub.news`.
        """
        news = self.hub.news(self.channels, self.position, first)
        self.let_read_alone(self._given)
        for channel in news.gone:
            for group in self.channels[channel]:
                group.split_up()
        if news.frames:
            self.position = news.frames[-1].position
        return news.frames

    def _by_group(self, frames: Sequence[Frame]) -> dict[Group, list[Frame]]:
        """Return for each group the frames that it has to send."""
        parts: dict[Group, list[Frame]] = {}
        for frame in frames:
            channel = frame.batch.channel
            assert channel is not None, "frames for users are not read for groups"
            for group in self.channels.get(channel, ()):
                parts.setdefault(group, []).append(frame)
        return parts
