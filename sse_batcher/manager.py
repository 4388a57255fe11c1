"""`SSEManager`: batcher, backend and hub as one thing, without any web framework.

All methods from any thread. What belongs to one process is a `_ProcessState`, made at the first use in it.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from blinker import NamedSignal

from . import signals
from .backends import open_backend
from .batching.batcher import EventBatcher
from .errors import BackendError, InvalidEventError, SSEBatcherError
from .event import (
    BROADCAST,
    DEFAULT_CHANNEL,
    NOT_GIVEN,
    Batch,
    Encode,
    NotGiven,
    broadcast_named,
    check_channel,
    check_channels,
    check_pair,
    check_type,
    check_user,
    checked,
    encode_data,
    json_encoder,
)
from .functions import check_function
from .options import BatchOptions, ClientOptions, HistoryOptions, batch_options
from .reasons import BusyReason
from .runtime.app_thread import AppThread
from .runtime.process import PerProcess, close_at_exit, require_threads
from .runtime.worker import Deadline
from .stats import ManagerStats
from .streams.client import Client
from .streams.departures import Farewell
from .streams.hub import Hub, Snapshot
from .streams.open_stream import ClientInfo
from .streams.revalidation import Ask, Revalidator
from .wire import Position, block

if TYPE_CHECKING:
    import redis

_log = logging.getLogger("sse_batcher.manager")

DRAIN_SECONDS = 5.0
"""How long what is pending may take when the server is stopping."""

REOPEN_SECONDS = 2.0
"""How long after a drain a request shows that the server has not stopped."""

UNKNOWN = "unknown"
"""The cursor of a place that is not known. A stream that begins with it gets ``sse_gap``, and the page its state."""

STUCK_SECONDS = 5.0
"""How long the backend may take for a batch before that is an illness."""


class SSEManager:
    """Batched events from any thread to any number of clients.

    `batching`
        True (default), False, a `BatchOptions`, or the original's mapping
        ``{"enabled": True, "batchWindow": 100, "maxBatchSize": 50}``, in milliseconds.
    `clients`
        a `ClientOptions`: queue bounds, heartbeat, lease, limits, retry.
    `history`
        a `HistoryOptions`: what is kept for clients that return, or have fallen behind.
    `backend`
        ``"memory://"``: the clients of this process. ``"redis://..."``: those of all processes with the same Redis; see
        `sse_batcher.backends.redis.open_redis`. A ready ``redis.Redis`` is taken, too.
    `json_default`
        called for data that JSON does not know, as in `json.JSONEncoder`; `encode` instead replaces the whole encoder.
        What that returns is checked: it must be JSON on one line of ASCII.
    `revalidate`
        ``revalidate(user)`` says, True or False, whether a user may keep the open streams. Asked on a thread of its
        own, once for each user with a stream in every `ClientOptions.revalidate_every` seconds. If it raises, the
        streams stay open. A coroutine function is a `TypeError`.
    `context`
        makes a context manager in which that, and receivers of signals, run on the app thread.

    Raises `ConfigurationError` for options that cannot be meant. Starts no thread before it is used. All methods are
    thread-safe. A forked child starts afresh: without its parent's clients, events and counts. A manager that is
    still open at the end of the process is shut down, also in a child of `multiprocessing` and in Celery. Call
    `flush_all` before an `os._exit` of your own.

    >>> manager = SSEManager()
    >>> client = manager.subscribe()
    >>> manager.enqueue("tool_list_changed", {"server": "a"})
    """

    def __init__(
        self,
        batching: bool | BatchOptions | Mapping[str, Any] = True,
        clients: ClientOptions | None = None,
        backend: str | redis.Redis = "memory://",
        json_default: Callable[[Any], Any] | None = None,
        *,
        history: HistoryOptions | None = None,
        encode: Encode | None = None,
        revalidate: Ask | None = None,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        for name, function in [("json_default", json_default), ("encode", encode)]:
            if function is not None:
                check_function(name, function)
        kept = history or HistoryOptions()
        self._clients = clients or ClientOptions()
        open_backend(backend, kept.history_frames)  # refused here, not at the first event
        self.revalidate = revalidate
        self._process = PerProcess(
            functools.partial(
                _ProcessState,
                weakref.ref(self),
                batch_options(batching),
                self._clients,
                kept,
                backend,
                encode or json_encoder(json_default),
                context,
            )
        )
        self._reaches_others = backend != "memory://"
        close_at_exit(self)

    @property
    def revalidate(self) -> Ask | None:
        """The function that says whether a user may keep the open streams. May be set later, for streams after that."""
        return self._revalidate

    @revalidate.setter
    def revalidate(self, function: Ask | None) -> None:
        if function is not None:
            check_function("revalidate", function)
        self._revalidate = function

    def enqueue(self, event_type: str, data: Any, *, channel: str = DEFAULT_CHANNEL) -> None:
        """Send an event to the clients of one channel, batched with others of its type.

        Returns in microseconds. Raises as `EventBatcher.enqueue` does; the channel ``*`` is refused, too.
        """
        batcher = self._process.get().batcher
        try:
            if channel == BROADCAST:
                batcher.refuse(broadcast_named())
            batcher.enqueue(event_type, data, channel=channel)
        except SSEBatcherError as error:
            self._refused(error, event_type, channel)
            raise

    def broadcast(self, event_type: str, data: Any) -> None:
        """Send an event to all clients, whatever their channels. Otherwise as `enqueue`."""
        try:
            self._process.get().batcher.enqueue(event_type, data, channel=BROADCAST)
        except SSEBatcherError as error:
            self._refused(error, event_type, BROADCAST)
            raise

    def subscribe(
        self,
        channels: Iterable[str] = (DEFAULT_CHANNEL,),
        last_event_id: str | None = None,
        *,
        batches: bool = True,
        snapshot: Snapshot | None = None,
        user: str | int | None = None,
        ticket: int | None = None,
    ) -> Client:
        """Open a stream: iterating the client gives its bytes, from the events enqueued after this call on.

        `last_event_id` is the cursor of a client that returns: it gets what came after it. Whether that can be had is
        said in the first block: ``sse_open`` if nothing is missing, else ``sse_gap``. One that begins anew gets the
        `snapshot` next. Without `batches`, each event is a block of its own. `user` is whose stream it is, for limits,
        `kick` and `revalidate`: a str or an int, None for nobody. `ticket`: a kick after it ends the stream; see
        `ticket`. None: a kick after this call does. Close the client when its stream ends.

        Raises `InvalidEventError` for channels or a user that may not be, `TooManyClientsError` where a limit is
        reached, `BackendError` where it is not known where a stream would begin, and `ClosedError` after `shutdown`.
        """
        process = self._process.get()
        names = check_channels(channels)
        name = None if user is None else check_user(user)
        ticket = process.hub.ticket if ticket is None else ticket
        process.backend.open(last_event_id)
        client = process.hub.connect(names, last_event_id, batches=batches, snapshot=snapshot, user=name, ticket=ticket)
        try:
            # After the stream is listed: a question that ends now asks again for users that have one.
            if self.revalidate is not None and name is not None:
                process.revalidator.watch(name)
        except BaseException:
            client.close()  # the caller does not get it
            raise
        return client

    def ticket(self) -> int:
        """A number to take before you decide whether a request may have a stream, for `subscribe` and `stream`.

        A kick that comes after it counts for that stream, though it was not open then: it ends with its first step. Of
        other processes, kicks count from when they arrive here.
        """
        process = self._process.get()
        with suppress(BackendError):  # then no stream can be opened either
            process.backend.open(None)  # or what others have kicked long ago would look new
        return process.hub.ticket

    def kick(self, *, user: str | int | NotGiven = NOT_GIVEN, channel: str | NotGiven = NOT_GIVEN) -> int:
        """End the streams of this user, or of this channel, or of this user in this channel, in all processes.

        Nothing more is handed to them but ``sse_bye``. Browsers come back at once, and the app decides again whether
        they may. A stream that is still being opened ends, too, if its `ticket` was taken before; also by a kick from
        within the app's `identify`.

        Returns how many streams of this process end by it; those of other processes are not counted. `user` is what
        `subscribe` was given: ``"7"`` and ``7`` are two users. Raises `InvalidEventError` for a user or a channel that
        cannot be, None among them, `ValueError` if neither is given, and `BackendError` if other processes cannot be
        reached; those of this process have ended then.
        """
        if user is NOT_GIVEN and channel is NOT_GIVEN:
            raise ValueError("say whom: kick(user=...), kick(channel=...) or both")
        who = None if isinstance(user, NotGiven) else check_user(user)
        where = None if isinstance(channel, NotGiven) else check_channel(channel)
        if where == BROADCAST:
            raise InvalidEventError("'*' is no channel to kick: name one, or shut the manager down", field="channel")
        process = self._process.get()
        process.warn_if_cut_off()
        # Here first, whatever becomes of the others. What comes back from the backend finds nothing left to end.
        ended = process.hub.dismiss("kicked", who, where)
        if not ended and who is not None:
            process.hint_at_other_type(who)
        process.backend.kick(who, where)
        return ended

    def can_resume(self, channels: Iterable[str], last_event_id: str | None) -> bool:
        """Whether a client that comes with this id now gets all that it has missed, and needs no snapshot."""
        process = self._process.get()
        process.backend.open(last_event_id)
        return process.hub.can_resume(check_channels(channels), last_event_id)

    def snapshot(self, take: Callable[[], Iterable[tuple[str, Any]]]) -> Snapshot:
        """Note where the history stands, then take the state: ``take()`` gives ``(event_type, data)`` pairs.

        For `subscribe`, which goes on from that place: between the state and the stream nothing is missed, and what
        comes twice was in the state already. Raises `InvalidEventError` for a bad type or data.
        """
        process = self._process.get()
        process.backend.open(None)
        cursor, encode = process.backend.format(process.hub.head), process.encode
        state = [check_pair(pair) for pair in take()]
        blocks = [(check_type(event_type), encode_data(encode, data)) for event_type, data in state]
        ids = [*[None] * (len(blocks) - 1), cursor]
        named = zip(blocks, ids, strict=False)  # of no blocks there is no last one
        return Snapshot(cursor, b"".join(block(event=name, data=text, id=id) for (name, text), id in named))

    def cursor(self) -> str:
        """Where the history stands: a client that subscribes with this `last_event_id` gets all that comes from now on.

        Ask for it before you read the state that the events are about; then nothing is missed between the two, and at
        most something comes twice. Never waits: where it is not known yet, since Redis has not answered this process,
        the client gets ``sse_gap`` as soon as its stream begins.
        """
        return self.format(self.place())

    def place(self) -> Position | None:
        """Where the history stands, for `format`. So little work that each request can note it."""
        process = self._process.get()
        return process.hub.head if process.backend.is_known() else None

    def moment(self) -> tuple[Position | None, int]:
        """Return the `place` and the number of the newest kick, which is a `ticket`. So little work that each request
        can note it. Never waits: while the place is not known, kicks that were made long ago may look newer."""
        process = self._process.get()
        return process.hub.head if process.backend.is_known() else None, process.hub.ticket

    def format(self, place: Position | None) -> str:
        """The cursor that stands for a `place`."""
        return UNKNOWN if place is None else self._process.get().backend.format(place)

    def busy_block(self, reason: BusyReason, last_event_id: str | None = None) -> bytes:
        """The one block of a stream that cannot be opened now: the client comes back later, with the same cursor."""
        return self._process.get().hub.control.busy(reason, last_event_id)

    @property
    def reaches_others(self) -> bool:
        """Whether the backend brings events to other processes, too."""
        return self._reaches_others

    @property
    def send_timeout(self) -> float:
        """`ClientOptions.send_timeout`, for transports."""
        return self._clients.send_timeout

    @property
    def transport(self) -> str:
        """`ClientOptions.transport`: ``attached`` or ``auto``."""
        return self._clients.transport

    @property
    def http2(self) -> str:
        """`ClientOptions.http2`: ``refuse`` or ``allow``."""
        return self._clients.http2

    def flush_all(self, timeout: float | None = None) -> bool:
        """Close all windows now, and wait until the backend has taken what was enqueued before. See `EventBatcher`."""
        return self._process.get().batcher.flush_all(timeout)

    def get_stats(self) -> ManagerStats:
        """Counters of this process, as a frozen value."""
        process = self._process.get()
        batcher = process.batcher.get_stats()
        counts: dict[str, Any] = batcher.as_dict() | process.hub.count()
        counts["thread_restarts"] += process.hub.thread_restarts
        return ManagerStats(
            **counts,
            signals_dropped=process.app_thread.dropped,
            backend_silent=process.backend.silent_for,
            backend_answered=process.backend.answered_ago,
            ignored=process.backend.ignored,
        )

    def unhealthy_reason(self) -> str | None:
        """Why this process cannot serve streams as it should, None if it can. For health checks.

        ``draining``: it is being shut down. ``backend``: that has not answered, or not taken a batch, for five seconds.
        Takes no lock and looks at no client, so that anybody may ask.
        """
        process = self._process.get()
        if process.hub.closing:
            return "draining"
        stuck = max(process.batcher.publishing_for, process.backend.silent_for)
        return "backend" if stuck > STUCK_SECONDS else None

    @property
    def backend_answered(self) -> float:
        """As in `ManagerStats`. Takes no lock and looks at no client."""
        return self._process.get().backend.answered_ago

    def drain(self) -> None:
        """Deliver what is pending, end all streams with ``sse_bye``, and take no more; events are still accepted.

        Returns at once. For a server that seems to be stopping, and waits for its streams. `reopen` undoes it if the
        server goes on. Calls while it is drained change nothing.
        """
        process = self._process.get()
        if process.draining or process.hub.closing is not None:
            return
        process.draining = True

        def drain() -> None:
            deadline = Deadline(DRAIN_SECONDS)
            process.batcher.flush_all(deadline.left())
            process.backend.wait_until_delivered(deadline.left())
            process.draining = False  # before the streams end: the next drain must count, should they open again
            process.hub.close("shutdown", for_good=False)

        _log.info("the server seems to be stopping: all streams end")
        try:
            threading.Thread(target=drain, name="sse_batcher-drain", daemon=True).start()
        except RuntimeError:  # no thread can be started at the end of a process
            drain()

    def reopen(self, is_stopping: Callable[[], bool]) -> None:
        """Take clients again after a drain, if the server has gone on. To be called in a request that it serves.

        What looked like its end may have been the end of the main thread alone, or of another server of this process.
        It has gone on if it serves a request some time after the drain, and does not say now that it is stopping.
        """
        hub = self._process.get().hub
        if hub.closing is not None and not is_stopping() and hub.reopen(REOPEN_SECONDS):
            _log.info("the server has not stopped: streams open again")

    def shutdown(self, timeout: float | None = 5.0) -> bool:
        """Refuse further events and clients, deliver what is pending, and end all streams with ``sse_bye``.

        True if within `timeout` seconds (None: no limit) everything was delivered and every stream that another thread
        iterates has ended. Idempotent.
        """
        process = self._process.get()
        deadline = Deadline(timeout)
        delivered = process.batcher.destroy(timeout) and process.backend.wait_until_delivered(deadline.left())
        process.hub.close("shutdown")
        ended = process.hub.wait_until_left(deadline.left())
        closed = process.backend.close(deadline.left())
        process.questions.close(0)  # an answer of the app that is under way is of no use any more
        return process.app_thread.close(deadline.left()) and closed and ended and delivered

    close = shutdown

    def __enter__(self) -> SSEManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def _refused(self, error: SSEBatcherError, event_type: object, channel: object) -> None:
        signals.send(signals.event_refused, self, error=error, event_type=event_type, channel=channel)


class _ProcessState:
    """One process's part of a manager."""

    def __init__(
        self,
        manager: weakref.ref[SSEManager],
        batching: BatchOptions,
        clients: ClientOptions,
        history: HistoryOptions,
        backend: str | redis.Redis,
        encode: Encode,
        context: Callable[[], AbstractContextManager[object]],
    ) -> None:
        require_threads()
        owner = manager()
        if owner is not None:  # it is None if the garbage collector has begun to collect the manager
            close_at_exit(owner)  # again: the manager may have been made in another process, before a fork
        self.app_thread = app_thread = AppThread(context)
        # A thread of its own: while an answer takes long, signals and log lines go on.
        self.questions = AppThread(context, name="sse_batcher-revalidate")
        self.encode = encode = checked(encode)
        self.draining = False
        """Whether a drain is under way, that has not ended the streams yet. A race of two of them is harmless."""
        self._hinted = False

        def announce(signal: NamedSignal, **values: Any) -> None:
            # Weakly: a thread of ours must not keep a manager alive that everybody else has dropped.
            sender = manager()
            if sender is not None and signal.receivers:
                app_thread.post(lambda: signals.send(signal, sender, **values))

        def tell_end(client: ClientInfo, farewell: Farewell) -> None:
            # Not here: the garbage collector may end a stream, on a thread that is in the middle of a log call.
            if _log.isEnabledFor(logging.INFO):
                app_thread.post(
                    lambda: _log.info(
                        "stream %d (%s) ended after %.1f s, %d frames, %d bytes: %s",
                        client.id,
                        ", ".join(map(repr, client.channels)),  # some characters forge a line, or turn it round
                        farewell.duration,
                        farewell.frames,
                        farewell.bytes,
                        farewell.reason,
                    )
                )
            announce(signals.client_disconnected, client=client, **farewell._asdict())

        self.backend = publisher = open_backend(backend, history.history_frames)
        self.hub = Hub(
            clients,
            history,
            publisher,
            on_connect=lambda client: announce(signals.client_connected, client=client),
            on_disconnect=tell_end,
        )

        def may_stay(user: str | int) -> Any:
            asked = manager()
            return True if asked is None or asked.revalidate is None else asked.revalidate(user)

        self.revalidator = Revalidator(may_stay, clients.revalidate_every, self.hub, self.questions)
        publisher.connect(self.hub)

        self.warn_if_cut_off = warn_if_cut_off = _cut_off_warning(owner, self.hub)

        def publish(batch: Batch) -> None:
            warn_if_cut_off()
            publisher.publish(batch)
            announce(signals.batch_flushed, batch=batch)

        self.batcher = EventBatcher(publish, batching, encode=encode)

    def hint_at_other_type(self, user: str | int) -> None:
        """Say, once, if this user has no stream, and the one that only differs in its type has."""
        other: str | int | None = str(user)
        if isinstance(user, str):
            other = int(user) if user.isascii() and user.isdecimal() and str(int(user)) == user else None
        if not self._hinted and self.hub.has_user(other) and not self.hub.has_user(user):
            self._hinted = True  # by two threads at once twice: a harmless race
            _log.warning(
                "kick(user=%r) ended no stream, but there are streams of the user %r: these are two users. Give kick() "
                "what identify returns",
                user,
                other,
            )


def _cut_off_warning(manager: SSEManager | None, hub: Hub) -> Callable[[], None]:
    """Make the function that logs, once, that this process does not reach the streams of its parent.

    A server forks its workers before it has streams. So a parent with open streams has forked this process for a job,
    unless it has streams of its own. To be called before this process has its own part of the manager.
    """
    parent = None if manager is None or manager.reaches_others else manager._process.inherited()
    is_cut_off = parent is not None and not parent.hub.is_empty()

    def warn() -> None:
        nonlocal is_cut_off
        if is_cut_off and hub.is_empty():
            is_cut_off = False
            _log.warning(
                "this process was forked from a process with open streams. They do not get its events, because the "
                "backend memory:// reaches only streams of the same process: use a redis:// backend"
            )

    return warn
