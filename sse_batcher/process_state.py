"""`ProcessState`: one process's part of a manager, with its batcher, backend, hub and threads.

Any thread. A process makes it at the first use of the manager; a forked child makes its own.
"""

from __future__ import annotations

import functools
import logging
import queue
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blinker import NamedSignal

from . import signals
from .backends import open_backend
from .batching.batcher import EventBatcher
from .draining import Draining
from .encoding import Encode, checked
from .event import Batch, User
from .options import BatchOptions, ClientOptions, HistoryOptions
from .reasons import BusyReason
from .runtime.app_thread import AppThread
from .runtime.log_fields import log_fields
from .runtime.log_once import LogOnce
from .runtime.worker import Deadline, Owner, Worker
from .stats import ManagerStats
from .streams.client import QueueClient, Reference, new_queue
from .streams.departures import Farewell
from .streams.hub import Hub
from .streams.open_stream import ClientInfo
from .streams.opening import StreamRequest
from .streams.refusals import Refusals
from .streams.revalidation import Ask, Revalidator
from .wire import Position

if TYPE_CHECKING:
    import redis

    from .backends import Backend

_log = logging.getLogger("sse_batcher.manager")

REOPEN_SECONDS = 2.0
"""A request that comes at least so many seconds after a drain shows that the server has not stopped."""

UNKNOWN = "unknown"
"""The cursor of an unknown place. A stream that begins with it gets ``sse_gap``, and the page then loads its state."""

STUCK_SECONDS = 5.0
"""How long the backend may take for a batch, in seconds, before the process counts as unhealthy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a manager was made with; the same in every process."""

    batching: BatchOptions
    clients: ClientOptions
    history: HistoryOptions
    backend: str | redis.Redis = field(repr=False)  # a URL may have a password
    encode: Encode
    context: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a `ProcessState` is made of. The defaults are for production; the testing kit has parts of its own."""

    clock: Callable[[], float] = time.monotonic
    """Returns seconds, from any start; never goes backwards."""
    make_worker: Callable[[Owner, str], Worker] = Worker
    """Makes the threads that run the app's functions."""
    make_backend: Callable[[Any, int], Backend] = open_backend
    make_batcher: Callable[..., EventBatcher] = EventBatcher
    make_queue: Callable[[], queue.SimpleQueue[Reference | None]] = new_queue
    """Makes the queue of a client."""
    has_server: bool = True
    """Whether a server's threads drive the streams. If not, they are attached, and not watched."""


class ProcessState:
    """One process's part of a manager: what transports, `wsgi` and the Flask part need beside the public methods.

    `sender`
        the manager, as the sender of its signals. It is held weakly, because a thread of this library must not keep a
        manager alive that the app has dropped.
    `find_revalidate`
        returns the app's `revalidate` function, or None.
    `parent`
        the part of the process that this one was forked from, if there is one.
    `parts`
        what it is made of.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        sender: weakref.ref[Any],
        find_revalidate: Callable[[], Ask | None],
        parent: ProcessState | None,
        parts: Parts | None = None,
    ) -> None:
        parts = parts or Parts()
        self.has_server = parts.has_server
        """See `Parts`."""
        self.options = settings.clients
        self._compress = frozenset(settings.clients.compress)
        self.reaches_others = settings.backend != "memory://"
        """Whether the backend also brings events to other processes."""
        self.encode = checked(settings.encode)
        self.app_thread = AppThread(settings.context, parts.clock, make_worker=parts.make_worker)
        # On a thread of its own: while an answer of the app takes long, signals and log lines go on.
        self.questions = AppThread(settings.context, parts.clock, "sse_batcher-revalidate", parts.make_worker)
        announcer = Announcer(sender, self.app_thread)
        self.backend = parts.make_backend(settings.backend, settings.history.history_frames)
        self.hub = Hub(
            settings.clients,
            settings.history,
            self.backend,
            on_connect=announcer.stream_opened,
            on_disconnect=announcer.stream_ended,
            clock=parts.clock,
            make_queue=parts.make_queue,
        )
        self.refusals = Refusals()
        """The requests that got no stream. Whatever answers one so counts it here, except for `busy_block`."""
        self._find_revalidate = find_revalidate
        may_stay = functools.partial(_may_stay, find_revalidate)
        every = settings.clients.revalidate_every
        self.revalidator = Revalidator(may_stay, every, self.hub, self.questions, parts.clock)
        self.backend.connect(self.hub)
        self._cut_off = CutOffWarning(self.hub, None if self.reaches_others or parent is None else parent.hub)
        self._other_type = OtherTypeWarning(self.hub)
        # Not a method of this object: that would be a cycle, and only the garbage collector would end the threads.
        self.batcher = parts.make_batcher(
            Publisher(self.backend, announcer, self._cut_off, self._other_type), settings.batching, encode=self.encode
        )
        self.is_closed = False
        """Whether it was shut down."""
        self._draining = Draining(self.hub, self.batcher, self.backend, reaches_others=self.reaches_others)

    # -- opening and ending streams ------------------------------------------------------------------------------------

    def subscribe(self, request: StreamRequest) -> QueueClient:
        """Open a stream, as `SSEManager.subscribe` does, or a poll. Without a ticket, no earlier kick ends it."""
        self.backend.open(request.last_event_id)
        client = self.hub.connect(request)
        try:
            # After the stream is listed: a question that ends now asks again about users that have a stream.
            if request.user is not None and self._find_revalidate() is not None:
                self.revalidator.watch(request.user)
        except BaseException:
            client.close()  # the caller does not get it
            raise
        return client

    def ticket(self) -> int:
        """Return the number of the newest kick, for `StreamRequest`. May wait, once. Raises `BackendError`.

        It does not wait once the history is known: a kick that came meanwhile would not count for the stream.
        """
        if not self.backend.is_known:
            self.backend.open(None)  # until then, kicks that other processes made long ago look new
        return self.hub.ticket

    def can_resume(self, request: StreamRequest) -> bool:
        """Whether a client with this request gets all that it has missed, if it comes now, and needs no snapshot."""
        self.backend.open(request.last_event_id)
        return self.hub.can_resume(request)

    def compresses(self, channels: tuple[str, ...]) -> bool:
        """Whether a stream of these channels may be compressed, if it has no user."""
        compress = self._compress
        return bool(compress) and bool(channels) and compress.issuperset(channels)

    def busy_block(self, reason: BusyReason, last_event_id: str | None = None) -> bytes:
        """The only block of a stream that cannot be opened now: the client comes back later, with the same cursor.

        Counts the refusal.
        """
        self.refusals.add(reason)
        return self.hub.control.busy(reason, last_event_id)

    def kick(self, user: User | None, channel: str | None) -> int:
        """End the streams of this user, or of this channel, or of this user in this channel, in all processes.

        Returns how many streams of this process end. Raises `BackendError`.
        """
        self._cut_off.warn()
        # Here first, even if the others cannot be reached. What comes back from the backend finds nothing left to end.
        ended = self.hub.dismiss("kicked", user, channel)
        if not ended and user is not None:
            self._other_type.warn("kick", "ended", user)
        self.backend.kick(user, channel)
        return ended

    # -- places in the history -----------------------------------------------------------------------------------------

    def place(self) -> Position | None:
        """Where the history stands, for `format`; None if that is not known yet: it is found out from now on."""
        return self.hub.head if self.backend.find_position() else None

    def moment(self) -> tuple[Position | None, int]:
        """Return the `place` and the number of the newest kick, which is a `ticket`. Cheap enough for each request.

        Never waits, and starts nothing: a page may have nothing to do with streams. While the place is not known, kicks
        that were made long ago may look newer.
        """
        hub = self.hub  # not `place`, since each request of the site pays for this
        return hub.head if self.backend.is_known else None, hub.ticket

    def format(self, place: Position | None) -> str:
        """The cursor that stands for a `place`."""
        return UNKNOWN if place is None else self.backend.format(place)

    # -- health and counters -------------------------------------------------------------------------------------------

    def unhealthy_reason(self) -> str | None:
        """See `SSEManager.unhealthy_reason`."""
        if self.hub.refuses:
            return "draining"
        stuck = max(self.batcher.publishing_for, self.backend.silent_for)
        return "backend" if stuck > STUCK_SECONDS else None

    @property
    def backend_answered(self) -> float:
        """As in `ManagerStats`. Takes no lock and looks at no client."""
        return self.backend.answered_ago

    @property
    def description(self) -> str:
        """The state in a few words, for a `repr`. Takes no lock."""
        count = self.hub.stream_count()
        return f"{'open' if self.hub.closing is None else 'closed'}, {count} client{'' if count == 1 else 's'}"

    def stats(self) -> ManagerStats:
        """See `SSEManager.get_stats`."""
        counts: dict[str, Any] = self.batcher.get_stats().as_dict() | self.hub.count()
        counts["thread_restarts"] += self.hub.thread_restarts
        return ManagerStats(
            **counts,
            streams_refused=self.refusals.by_reason(),
            signals_dropped=self.app_thread.dropped,
            backend_silent=self.backend.silent_for,
            backend_answered=self.backend.answered_ago,
            ignored=self.backend.ignored,
        )

    # -- the end -------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Deliver what is pending, end all streams with ``sse_bye``, and open no more; events are still accepted.

        Returns at once. For a server that seems to be stopping and waits for its streams; `reopen` undoes it if the
        server goes on. While a drain is under way, further calls change nothing. If one fails, the next call drains.
        """
        self._draining.begin()

    def end_streams(self) -> None:
        """Deliver what is pending, and let all streams end. Until `reopen`, or `Hub.reopen`, no more are taken."""
        self._draining.end_at_once()

    def reopen(self, is_stopping: Callable[[], bool]) -> None:
        """Open streams again after a drain, if the server has gone on. Call this in a request that the server serves.

        What looked like the end of the server may have been the end of the main thread alone, or of another server in
        this process. The server has gone on if it serves a request some time after the drain and does not say now that
        it is stopping.
        """
        self._draining.note_server(is_stopping)
        if self.hub.refuses and not is_stopping() and self.hub.reopen(REOPEN_SECONDS):
            _log.info("the server has not stopped: streams open again", extra=log_fields("reopened"))

    def shutdown(self, timeout: float | None) -> bool:
        """See `SSEManager.shutdown`."""
        deadline = Deadline(timeout)
        self.is_closed = True
        self._draining.finish(deadline)
        delivered = self.batcher.destroy(deadline.left()) and self.backend.wait_until_delivered(deadline.left())
        self.hub.close("shutdown")
        ended = self.hub.wait_until_left(deadline.left())
        closed = self.backend.close(deadline.left())
        self.questions.close(0)  # an answer of the app that is still to come is of no use
        return self.app_thread.close(deadline.left()) and closed and ended and delivered


class Announcer:
    """Sends a manager's signals, and logs each stream that ends, on the app thread."""

    def __init__(self, sender: weakref.ref[Any], app_thread: AppThread) -> None:
        self._sender = sender
        self._app_thread = app_thread

    def send(self, signal: NamedSignal, **values: Any) -> None:
        """Send a signal, if it has receivers and the manager still exists."""
        sender = self._sender()
        if sender is not None and signal.receivers:
            self._app_thread.post(lambda: signals.send(signal, sender, **values))

    def stream_opened(self, client: ClientInfo) -> None:
        self.send(signals.client_connected, client=client)

    def stream_ended(self, client: ClientInfo, farewell: Farewell) -> None:
        # Not in this thread: the garbage collector may end a stream, in a thread that is in the middle of a log call.
        if _log.isEnabledFor(logging.INFO):
            self._app_thread.post(functools.partial(_log_end, client, farewell))
        self.send(signals.client_disconnected, client=client, **farewell._asdict())


class CutOffWarning:
    """Warns, once, that this process does not reach the streams of the process that it was forked from.

    A server forks its workers before it has streams. So a parent with open streams (`parent` is its hub, None if there
    is none) has forked this process for a job, unless this process has streams of its own (`hub`).
    """

    def __init__(self, hub: Hub, parent: Hub | None) -> None:
        self._hub = hub
        self._is_cut_off = parent is not None and not parent.is_empty()
        self._once = LogOnce(_log)

    def warn(self) -> None:
        if self._is_cut_off and self._hub.is_empty():
            self._once.log(
                logging.WARNING,
                "this process was forked from a process with open streams. They do not get its events, because the "
                "backend memory:// reaches only streams of the same process: use a redis:// backend",
                extra=log_fields("forked_from_streams"),
            )


class OtherTypeWarning:
    """Warns, once for each method, of a user without a stream, if the user that differs only in its type has one.

    Takes no lock, since it looks at each batch for one user. A harmless race: two threads may log the same line.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._warned: set[str] = set()

    def warn(self, method: str, did: str, user: User) -> None:
        """Warn if there is a reason. `method` was called with this `user`, and `did` something to no stream here."""
        if method in self._warned:
            return
        other: User | None = str(user)
        if isinstance(user, str):
            other = int(user) if user.isascii() and user.isdecimal() and str(int(user)) == user else None
        if other is not None and self._hub.has_user(other) and not self._hub.has_user(user):
            self._warned.add(method)
            _log.warning(
                f"{method}(user=%r) {did} no stream, but there are streams of the user %r: these are two users. Give "
                f"{method}() what identify returns",
                user,
                other,
                extra=log_fields("user_of_other_type", method=method, user=user, other_user=other),
            )


class Publisher:
    """What the batcher of a manager hands its batches to. Called by one thread at a time."""

    def __init__(
        self, backend: Backend, announcer: Announcer, cut_off: CutOffWarning, other_type: OtherTypeWarning
    ) -> None:
        self._backend = backend
        self._announcer = announcer
        self._cut_off = cut_off
        self._other_type = other_type

    def __call__(self, batch: Batch) -> None:
        self._cut_off.warn()
        if len(batch.users) == 1:
            self._other_type.warn("enqueue", "reached", batch.users[0])
        self._backend.publish(batch)
        self._announcer.send(signals.batch_flushed, batch=batch)


def _may_stay(find_revalidate: Callable[[], Ask | None], user: User) -> Any:
    """The app's answer whether a user may keep the open streams; True if the app has no such function any more."""
    revalidate = find_revalidate()
    return True if revalidate is None else revalidate(user)


def _log_end(client: ClientInfo, farewell: Farewell) -> None:
    _log.info(
        "stream %d (%s) ended after %.1f s, %d frames, %d bytes: %s",
        client.id,
        # With `repr`, since some characters would forge a line, or reverse its direction.
        ", ".join(map(repr, client.channels)) or "no channel",
        farewell.duration,
        farewell.frames,
        farewell.bytes,
        farewell.reason,
        extra=log_fields(
            "stream_ended",
            client=client.id,
            channels=client.channels,
            user=client.user,
            reason=farewell.reason,
            duration=round(farewell.duration, 3),
            frames=farewell.frames,
            bytes=farewell.bytes,
        ),
    )
