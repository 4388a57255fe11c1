"""`SSEManager`: batcher, backend and hub as one thing, without any web framework.

All methods from any thread. What belongs to one process is a `_ProcessState`, made at the first use in it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from . import signals
from .backends import open_backend
from .batching.batcher import refuse
from .errors import BackendError, InvalidEventError, SSEBatcherError
from .event import (
    BROADCAST,
    DEFAULT_CHANNEL,
    NOT_GIVEN,
    Encode,
    NotGiven,
    broadcast_named,
    check_channel,
    check_channels,
    check_pair,
    check_type,
    check_user,
    encode_data,
    json_encoder,
)
from .functions import check_function
from .options import BatchOptions, ClientOptions, HistoryOptions, batch_options
from .process_state import ProcessState, Settings
from .runtime.process import PerProcess, close_at_exit, require_threads
from .stats import ManagerStats
from .streams.client import Client
from .streams.hub import Snapshot
from .streams.revalidation import Ask
from .wire import block

if TYPE_CHECKING:
    import redis


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
        streams stay open. A coroutine function is an `InvalidFunctionError`.
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
        *,
        batching: bool | BatchOptions | Mapping[str, Any] = True,
        clients: ClientOptions | None = None,
        history: HistoryOptions | None = None,
        backend: str | redis.Redis = "memory://",
        json_default: Callable[[Any], Any] | None = None,
        encode: Encode | None = None,
        revalidate: Ask | None = None,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        for name, function in [("json_default", json_default), ("encode", encode)]:
            if function is not None:
                check_function(name, function)
        settings = Settings(
            batching=batch_options(batching),
            clients=clients or ClientOptions(),
            history=history or HistoryOptions(),
            backend=backend,
            encode=encode or json_encoder(json_default),
            context=context,
        )
        open_backend(backend, settings.history.history_frames)  # refused here, not at the first event
        self._backend_kind = f"{backend.partition('://')[0]}://" if isinstance(backend, str) else type(backend).__name__
        self.revalidate = revalidate
        self._process = PerProcess(functools.partial(_new_process, weakref.ref(self), settings))
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
                refuse(batcher, broadcast_named())
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
        names = check_channels(channels)
        name = None if user is None else check_user(user)
        return self._process.get().subscribe(
            names, last_event_id, batches=batches, snapshot=snapshot, user=name, ticket=ticket
        )

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
        cannot be, None among them, and if neither is given; and `BackendError` if other processes cannot be reached:
        those of this process have ended then.
        """
        if user is NOT_GIVEN and channel is NOT_GIVEN:
            raise InvalidEventError("say whose streams end: kick(user=...), kick(channel=...) or both", field="user")
        who = None if isinstance(user, NotGiven) else check_user(user)
        where = None if isinstance(channel, NotGiven) else check_channel(channel)
        if where == BROADCAST:
            raise InvalidEventError("'*' is no channel to kick: name one, or shut the manager down", field="channel")
        return self._process.get().kick(who, where)

    def snapshot(self, take: Callable[[], Iterable[tuple[str, Any]]]) -> Snapshot:
        """Note where the history stands, then take the state: ``take()`` gives ``(event_type, data)`` pairs.

        For `subscribe`, which goes on from that place: between the state and the stream nothing is missed, and what
        comes twice was in the state already. Raises `InvalidEventError` for a bad type or data.
        """
        process = self._process.get()
        process.backend.open(None)
        cursor, encode = process.format(process.hub.head), process.encode
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
        process = self._process.get()
        return process.format(process.place())

    def flush_all(self, timeout: float | None = None) -> bool:
        """Close all windows now, and wait until the backend has taken what was enqueued before. See `EventBatcher`."""
        return self._process.get().batcher.flush_all(timeout)

    def get_stats(self) -> ManagerStats:
        """Counters of this process, as a frozen value."""
        return self._process.get().stats()

    def unhealthy_reason(self) -> str | None:
        """Why this process cannot serve streams as it should, None if it can. For health checks.

        ``draining``: it is being shut down. ``backend``: that has not answered, or not taken a batch, for five seconds.
        Takes no lock and looks at no client, so that anybody may ask.
        """
        return self._process.get().unhealthy_reason()

    def shutdown(self, timeout: float | None = 5.0) -> bool:
        """Refuse further events and clients, deliver what is pending, and end all streams with ``sse_bye``.

        True if within `timeout` seconds (None: no limit) everything was delivered and every stream that another thread
        iterates has ended. Idempotent.
        """
        return self._process.get().shutdown(timeout)

    close = shutdown

    def __repr__(self) -> str:
        # The kind of backend, not its URL, which may hold a password. Takes no lock and starts nothing.
        process = self._process.existing()
        state = "unused in this process" if process is None else process.description
        return f"<{type(self).__name__} {self._backend_kind}, {state}>"

    def __enter__(self) -> SSEManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def _refused(self, error: SSEBatcherError, event_type: object, channel: object) -> None:
        signals.send(signals.event_refused, self, error=error, event_type=event_type, channel=channel)


def process_of(manager: SSEManager) -> ProcessState:
    """This process's part of a manager, for transports, `wsgi` and the Flask part."""
    return manager._process.get()


def _new_process(reference: weakref.ref[SSEManager], settings: Settings) -> ProcessState:
    require_threads()
    manager, parent = reference(), None
    if manager is not None:  # it is None if the garbage collector has begun to collect the manager
        close_at_exit(manager)  # again: the manager may have been made in another process, before a fork
        parent = manager._process.inherited()
    find_revalidate = functools.partial(_revalidate_of, reference)
    return ProcessState(settings, sender=reference, find_revalidate=find_revalidate, parent=parent)


def _revalidate_of(reference: weakref.ref[SSEManager]) -> Ask | None:
    manager = reference()
    return None if manager is None else manager.revalidate
