"""The hub: which clients get which frames.

`deliver` and `lose` are called by one thread at a time, the backend's; everything else is thread-safe. The listeners
(see `registry`) are offered frames without the lock.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from ..errors import BackendError, ClosedError
from ..event import Audience, User
from ..options import ClientOptions, HistoryOptions
from ..reasons import ByeReason, EndReason, GapReason
from ..runtime.locks import new_lock
from ..wire import Frame, Position
from .census import Census, first_waiting_locked
from .client import QueueClient, Reference, new_queue
from .control import ControlBlocks
from .counts import LoopCounts
from .departures import Departures, Farewell
from .dismissals import Dismissals
from .gate import Gate
from .history import History, ResumePoint, Slice, Wait
from .open_stream import ClientInfo, OpenStream
from .opening import Openings, StreamRequest
from .registry import Registry
from .roles import Cursors, Listener


class News(NamedTuple):
    """What a feed has to give to its groups."""

    frames: list[Frame]
    """The next frames of the channels that its streams have; none if it is up to date."""
    gone: list[str]
    """Channels of which frames are gone."""


class Survey(NamedTuple):
    """What operators see of a hub. Copied under its lock; the streams go on meanwhile."""

    streams: list[OpenStream]
    """The one that was opened, or detached, last comes last."""
    users: int
    """How many users have a stream."""
    frames: list[Frame]
    """The newest frames, the newest first."""


class Hub:
    """The open streams of one process, and the history that they read.

    `on_connect` and `on_disconnect` are called without the lock, by any thread; the second one also by the garbage
    collector. Not for polls. `clock` gives seconds, from any start, and never goes backwards. `lock` and `make_queue`
    are for tests.
    """

    def __init__(
        self,
        options: ClientOptions,
        history: HistoryOptions,
        cursors: Cursors,
        *,
        on_connect: Callable[[ClientInfo], None],
        on_disconnect: Callable[[ClientInfo, Farewell], None],
        clock: Callable[[], float] = time.monotonic,
        lock: threading.RLock | None = None,
        make_queue: Callable[[], queue.SimpleQueue[Reference | None]] = new_queue,
    ) -> None:
        self.clock = clock
        self.options = options
        self._slice = options.queue_frames, options.queue_bytes  # the bounds of what is read from the history at once
        self._compress = frozenset(options.compress)
        # Whether a stream was opened that is compressed and has no batches. Never unset.
        self._compress_unbatched = False
        self._cursors = cursors
        self._on_connect = on_connect
        self.make_queue = make_queue
        self._numbers = itertools.count(1)
        # Guards the registry, the history, the dismissals, and replacing the gate. Read without it, each a harmless
        # race: the gate, how many streams are open and whether a user has one, which were true a moment ago; `head` and
        # `ticket`, whose older value only means that more frames, or more dismissals, come after it.
        self._lock = new_lock() if lock is None else lock
        self._registry = Registry(options)
        self._departures = Departures(self._lock, self._registry, clock, on_disconnect)
        self._history = History(history, cursors.start)
        self._openings = Openings(self._history, cursors)
        self.offered: Position = cursors.start
        """Every frame up to it was offered to its listeners: a live stream for which nothing waits has all of them.
        Written by the delivering thread, after the offers; read without a lock, before a look at what waits."""
        self._dismissals = Dismissals()
        self._gate = Gate()
        self.control = ControlBlocks(options, cursors, self._registry, self._registry.polls)
        """Makes the control blocks."""
        self.loop_counts = LoopCounts()
        """The counts of the loop that drives detached streams. Replaced by the loop when it gets the first one."""
        self._thread_restarts = 0  # by the thread that was started again

    # -- for the backend -----------------------------------------------------------------------------------------------

    def deliver(self, frame: Frame) -> None:
        """Keep a frame, and offer it to the listeners of its channel or users."""
        _ = frame.plain  # encoded before the lock is taken, not while other threads wait for it
        if self._compress and frame.batch.audience in self._compress:
            frame.compress(unbatched=self._compress_unbatched)
        # In one step: a client that connects meanwhile is either listed here, or finds the frame in the history.
        with self._departures, self._lock:
            self._history.append(frame)
            readers = self._registry.readers(frame.batch.audience)
        for reader in readers:
            reader.offer(frame)
        self.offered = frame.position

    def lose(self, audience: Audience, position: Position, reason: GapReason = "publish_failed") -> None:
        """Let the clients of this audience know that they have missed something, and those that return later, too."""
        with self._departures, self._lock:
            self._history.lose(audience, position)
            readers = self._registry.readers(audience)
            for reader in readers:
                # Under the lock: a stream that reads the history at this moment must find this reason.
                reader.lose(audience, position, reason)
        for reader in readers:
            reader.fall_behind()
        self.offered = position

    # -- for the manager -----------------------------------------------------------------------------------------------

    def connect(self, request: StreamRequest) -> QueueClient:
        """Add a client. It reads the history from its cursor on, and is live when there is nothing more to read.

        A client that cannot go on at its cursor begins at the head, or with the snapshot. If it was dismissed after its
        ticket, it ends with its first step, and gets none of this. Raises `ClosedError` and `TooManyClientsError`, and
        `BackendError` if it is not known whether the client can go on.
        """
        replayed = self._can_replay(request)
        channels, user, ticket = request.channels, request.user, request.ticket
        client: QueueClient | None = None
        try:
            with self._departures, self._lock:
                if self.refuses:
                    raise ClosedError("this manager was shut down and takes no more clients")
                self._registry.check_limits(user)
                opening = self._openings.find_locked(request, replayed=replayed)
                info = ClientInfo(next(self._numbers), channels, user, address=request.address)
                client = QueueClient(self, info, opening, request)
                if opening.point.position == self._history.head and not opening.point.part:
                    client.go_live()
                self._registry.add(client)
                self._registry.listen(client, channels)
                if request.gzipped and not request.batches:
                    self._compress_unbatched = True
                # In the same step: a dismissal either comes before this look, or finds the client in the registry.
                dismissed = None if ticket is None else self._dismissals.after(ticket, user, channels)
            if dismissed is not None:
                client.dismiss(dismissed)
            if not request.poll:
                self._on_connect(client.info)
        except BaseException:
            if client is not None:
                self.remove(client, "left")  # the caller does not get it
            raise
        return client

    def can_resume(self, request: StreamRequest) -> bool:
        """Return whether a client with this request would miss nothing, if it came now. Raises `BackendError`."""
        replayed = self._can_replay(request)
        with self._departures, self._lock:
            return self._openings.find_locked(request, replayed=replayed).resumed

    @property
    def head(self) -> Position:
        """The position of the newest frame: a client that has everything up to it gets all that comes from now on.

        Takes no lock, since each request of the site asks for it.
        """
        return self._history.head

    @property
    def ticket(self) -> int:
        """The number that a request notes for `connect`, before the app decides about the request. Takes no lock."""
        return self._dismissals.newest

    def dismiss(self, reason: ByeReason, user: User | None = None, channel: str | None = None) -> int:
        """End the streams of this user, or of this channel, or of this user in this channel, now.

        Streams that are being opened end, too, if they have an older ticket. Returns how many open streams end by this.
        """
        with self._departures, self._lock:
            self._dismissals.add(reason, user, channel)
            streams = self._registry.streams(user)
        return sum(stream.dismiss(reason) for stream in streams if channel is None or channel in stream.channels)

    def has_user(self, user: User | None) -> bool:
        """Return whether this user has a stream. Takes no lock: it was true a moment ago."""
        return self._registry.has_user(user)

    def is_empty(self) -> bool:
        """Return whether no stream is open. Takes no lock: a forked child may ask this of its parent's hub."""
        return self._registry.is_empty()

    def stream_count(self) -> int:
        """Return the number of open streams. Takes no lock: it was true a moment ago."""
        return len(self._registry)

    def close(self, reason: ByeReason, *, for_good: bool = True) -> None:
        """Take no more clients, and let all streams end after what is queued for them.

        Unless it is `for_good`, `reopen` takes clients again.
        """
        with self._departures, self._lock:
            if self._gate.handover:
                self.control.return_ms = None  # all that are left end at once, so their return has to be spread
            self._gate = self._gate.close(reason, self.clock(), for_good=for_good)
            listeners = self._registry.listeners()
        for listener in listeners:
            listener.end(reason)

    def hand_over(self) -> list[OpenStream]:
        """Take no more clients. Return the open streams, which go on; the caller ends them, and takes them out.

        `close` ends all that are left, and `reopen` takes clients again.
        """
        with self._departures, self._lock:
            if self._gate.closing is not None:
                return []  # all of them end already
            streams = self._registry.streams()
            self._gate = self._gate.hand_over(streams, self.clock())
            return streams

    @property
    def closing(self) -> ByeReason | None:
        """Why all streams end; None if they do not. Takes no lock: look at it once, since the hub may open again."""
        return self._gate.closing

    @property
    def handover(self) -> list[OpenStream] | None:
        """The streams that are still to end, while they end in waves; None if they do not. Takes no lock."""
        return self._gate.handover

    @property
    def refuses(self) -> bool:
        """Whether no more clients are taken. Takes no lock."""
        return self._gate.refuses

    def reopen(self, after: float) -> bool:
        """Take clients again, if none were taken for at least `after` seconds, and the hub was not closed for good.

        Return whether that was so.
        """
        with self._departures, self._lock:
            if not self._gate.may_open(self.clock(), after):
                return False
            self._gate, self.control.return_ms = Gate(), None
            return True

    def wait_until_left(self, timeout: float | None) -> bool:
        """Wait until all streams have ended that other threads drive. Return whether they have.

        A stream that no thread has begun to iterate is not waited for. `timeout` is in seconds; None: no limit.
        """
        me = threading.get_ident()

        def have_left() -> bool:
            return all(stream.driver in (None, me) for stream in self._registry.streams())

        return self._departures.wait(have_left, timeout)

    def count(self) -> dict[str, Any]:
        """Return fields of `ManagerStats`: the open streams, and counters over all streams, ended ones included."""
        with self._departures, self._lock:
            census = Census.take_locked(self._registry, self._history)
        waiting = census.waiting()
        with self._departures, self._lock:
            first_waiting = first_waiting_locked(waiting, self._history)
        return census.stats(self.clock(), self._cursors.now(), first_waiting, self.loop_counts)

    def survey(self, frames: int) -> Survey:
        """Return what operators see: the open streams, and up to so many of the newest frames."""
        with self._departures, self._lock:
            return Survey(self._registry.streams(), self._registry.user_count(), self._history.newest(frames))

    def waits(self, streams: Iterable[OpenStream]) -> list[Wait]:
        """Return since when something waits for each of these streams, for operators. Name only a few."""
        with self._departures, self._lock:
            return [self._history.wait(stream.channels, stream.point, stream.info.user) for stream in streams]

    @property
    def thread_restarts(self) -> int:
        """How often a thread that drives streams of this hub was started again."""
        return self._thread_restarts

    # -- for streams and feeds -----------------------------------------------------------------------------------------

    def advance(self, stream: OpenStream) -> bool:
        """Give a stream that is behind its next slice of the history, or make it live if there is none.

        False if the history no longer has all of it: see `replay` and `skip`.
        """
        with self._departures, self._lock:
            self._history.expire(self._cursors.now())
            return self._advance_locked(stream)

    def advance_all(self, streams: Iterable[OpenStream]) -> None:
        """As `advance` for each of these streams, in one step. Nothing happens to those of which frames are gone."""
        with self._departures, self._lock:
            self._history.expire(self._cursors.now())
            for stream in streams:
                self._advance_locked(stream)

    def replay(self, channels: tuple[str, ...], point: ResumePoint, user: User | None = None) -> Slice | None:
        """Return what comes after a point that is too old for the history. None if the backend does not have it either.

        May wait for the backend. Raises `BackendError`.
        """
        older = self._openings.older(channels, point, user)
        if older is not None and self._compress:
            for frame in older.frames:
                if frame.batch.audience in self._compress:
                    frame.compress(unbatched=self._compress_unbatched)
        return older

    def settle(self, stream: OpenStream) -> None:
        """Move a stream's point to the head, if there is nothing for the stream in between. Otherwise change nothing.

        For a cursor that the client will come back with. That of a quiet channel would get old otherwise, and the floor
        that all quiet channels have in common might rise above it. A stream that was live until now is at `offered`
        already, whatever the floors are.
        """
        with self._departures, self._lock:
            stream.point = self._openings.settled_locked(stream.channels, stream.info.user, stream.point)

    def skip(self, stream: OpenStream) -> bytes:
        """Make a stream live at the head. Return the block that says that it has missed something, and why."""
        with self._departures, self._lock:
            missed: GapReason = "overflow"
            if stream.lost is not None and stream.lost[0] > stream.point.position:
                missed = stream.lost[1]
            stream.point = ResumePoint(self._history.head)
            stream.go_live()
        stream.counts.gaps += 1
        return self.control.opening(stream.point, missed, poll=stream.poll)

    def catch_up(self, client: QueueClient) -> bytes | None:
        """Give a client that is behind its next slice, from the history or the backend, or make it live.

        May wait for the backend. Return the block that has to come first, if there is one.
        """
        if self.advance(client):
            return None
        try:
            older = self.replay(client.channels, client.point, client.info.user)
        except BackendError:
            older = None
        if older is None:
            return self.skip(client)
        client.read_older(older)
        return None

    def remove(self, stream: OpenStream, reason: EndReason) -> None:
        """Forget a stream. Never waits. May be called more than once, and by the garbage collector."""
        self._departures.add(stream, reason)

    def replace(self, client: QueueClient, stream: OpenStream, feed: Listener, shared: Collection[str]) -> bool:
        """Let a stream that `feed` listens for go on in place of a client that is not iterated any more.

        `shared`: those of its channels that the feed reads for it. The stream itself is offered the frames of the
        others. The stream is behind, at the client's point. False if the client has left already.
        """
        with self._departures, self._lock:
            if client not in self._registry:
                return False
            self._registry.add(stream)  # first, since others look without the lock: the user has a stream all the time
            self._registry.remove(client)
            self._registry.listen(feed, shared)
            self._registry.add_reader(stream, [channel for channel in stream.channels if channel not in shared])
            client.give_way(stream)
        return True

    def share(self, stream: OpenStream, feed: Listener, channels: Collection[str]) -> None:
        """Offer the frames of these channels, which the stream was offered until now, to its feed instead."""
        with self._departures, self._lock:
            self._registry.listen(feed, channels)
            self._registry.unlisten(stream, channels)

    def reader_count(self, channel: str) -> int:
        """Return how many streams and feeds are offered the frames of this channel. Takes no lock."""
        return self._registry.reader_count(channel)

    def unlisten(self, feed: Listener, channels: Iterable[str]) -> None:
        """Offer a feed no more frames of these channels; with ``*`` among them, none at all."""
        with self._departures, self._lock:
            self._registry.unlisten(feed, channels)

    def news(self, channels: Collection[str], position: Position, first: Position) -> News:
        """Return what is new for a feed.

        `channels`: all that it reads for its streams, and ``*``. It has read everything up to `position`. `first` is
        the position of the first frame that was offered to it or its streams since then: there is nothing before that.
        """
        # Not from its position on, which may be old: if there are many channels, the floor of a quiet one may have
        # risen above it, though no frame of that channel is missing.
        point = ResumePoint(first, part=1) if first > position else ResumePoint(position)
        with self._departures, self._lock:
            frames = self._history.read_all(channels, point, *self._slice)
            return News(frames, self._history.gone(channels, point))

    def next_frames(self, channels: tuple[str, ...], position: Position) -> list[Frame] | None:
        """Return the frames of these channels that come after this position, for a group. None if some are gone."""
        point = ResumePoint(position)
        with self._departures, self._lock:
            if not self._history.covers(channels, point):
                return None
            return self._history.read(channels, point, *self._slice)

    def count_thread_restart(self) -> None:
        """Count that a thread that drives streams of this hub is started again. Called by that thread."""
        self._thread_restarts += 1

    # -- internal ------------------------------------------------------------------------------------------------------

    def _can_replay(self, request: StreamRequest) -> bool:
        """Return whether it takes the backend to go on at this cursor, and the backend can. Raises `BackendError`."""
        if not request.last_event_id:
            return False
        with self._departures, self._lock:
            if self._openings.find_locked(request).missed != "too_old":
                return False
        return self._openings.can_replay(request)

    def _advance_locked(self, stream: OpenStream) -> bool:
        channels, user = stream.channels, stream.info.user
        point = stream.point
        if point.position == self._history.head and not point.part:
            stream.go_live()  # nearly always so for a new stream, and there is nothing to look for
            return True
        if not self._history.covers(channels, point, user):
            return False
        frames = self._history.read(channels, point, *self._slice, user)
        if frames:
            stream.read_on(frames)
        else:
            stream.go_live()
        return True
