"""`SSEManager`: batcher, backend and hub as one thing, without any web framework.

All methods may be called from any thread. What belongs to one process is a `ProcessState`, made at the first use.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from . import signals
from .after_commit import AfterCommit, Send
from .backends import open_backend
from .batching.batcher import EventBatcher, hold, put, put_held, refuse
from .encoding import Encode, json_encoder
from .errors import BackendError, ClosedError, InvalidEventError, SSEBatcherError, TooManyClientsError
from .event import (
    BROADCAST,
    DEFAULT_CHANNEL,
    NOT_GIVEN,
    Audience,
    NotGiven,
    User,
    check_audience,
    check_channel,
    check_channels,
    check_pair,
    check_type,
    check_user,
    encode_body,
)
from .functions import check_function
from .manager_state import new_process
from .options import BatchOptions, ClientOptions, HistoryOptions, batch_options
from .process_state import Settings
from .runtime.process import PerProcess, close_at_exit, open_objects
from .stats import ManagerStats
from .streams.client import Client
from .streams.opening import Snapshot, StreamRequest
from .streams.refusals import refusal_reason
from .streams.revalidation import Ask
from .wire import block

if TYPE_CHECKING:
    import redis

    from .after_commit import AnySession


class SSEManager:
    """Batched events from any thread to any number of clients.

    `batching`
        ``True``; ``False``: no batching; a `BatchOptions`; or a mapping such as
        ``{"enabled": True, "batchWindow": 100, "maxBatchSize": 50}``, with the window in milliseconds.
    `clients`
        A `ClientOptions`: limits, heartbeat, transport. ``None``: its defaults.
    `history`
        A `HistoryOptions`: what is kept for clients that come back or have fallen behind. ``None``: its defaults.
    `backend`
        ``"memory://"``: events reach the clients of this process. A ``redis://`` URL (see
        `sse_batcher.backends.redis.open_redis`) or a ready ``redis.Redis``: those of all processes with the same Redis.
    `json_default`
        A function that is called for each object that `json.dumps` does not know, and returns one that it knows, such
        as ``str``.
    `encode`
        A function that replaces the whole encoder. What it returns is checked: it must be JSON on one line of ASCII.
    `revalidate`
        A function: ``revalidate(user)`` returns whether a user may keep the open streams, True or False. It is called
        on a thread of its own, every `ClientOptions.revalidate_every` seconds for each user with a stream. If it
        raises, the streams stay open. A coroutine function is an `InvalidFunctionError`.
    `context`
        A function that returns a context manager, in which `revalidate` and the receivers of signals run.

    Raises `ConfigurationError` for invalid options. Starts no thread before it is used. All methods are thread-safe. A
    forked child begins without its parent's clients, events and counts. A manager that is still open at the end of the
    process is shut down, also in a child of `multiprocessing` and in Celery. Call `flush_all` before an `os._exit` of
    your own.

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
        self._process = PerProcess(functools.partial(new_process, weakref.ref(self), settings))
        close_at_exit(self)

    @property
    def revalidate(self) -> Ask | None:
        """The function that says whether a user may keep the open streams.

        If it is set later, it counts for streams that are opened after that.
        """
        return self._revalidate

    @revalidate.setter
    def revalidate(self, function: Ask | None) -> None:
        if function is not None:
            check_function("revalidate", function)
        self._revalidate = function

    def enqueue(
        self,
        event_type: str,
        data: Any,
        *,
        channel: str | NotGiven = NOT_GIVEN,
        key: str | int | None = None,
        user: User | Sequence[User] | AbstractSet[User] | NotGiven = NOT_GIVEN,
    ) -> None:
        """Send an event to the clients of one channel, or to all streams of a user, batched with others of its type.

        `event_type`
            1 to 128 characters, none of them a control character. Types that begin with ``sse_`` or end in ``_batch``,
            and ``mixed``, are reserved.
        `data`
            What `json.dumps` accepts, without NaN and infinity; and what `json_default` or, under Flask, the JSON
            provider of the app adds. A `Text` is sent as it is, and is not escaped.
        `channel`
            1 to 128 characters, none of them a control character. If neither `channel` nor `user` is given, it is
            ``"default"``.
        `key`
            Within a window, an event replaces an older one of its type with the same key: a str of up to 1,024
            characters, or an int. None: `BatchOptions.dedup_key` decides, except for texts.
        `user`
            A user as `subscribe` was given it: a str of 1 to 256 characters, or an int. Or up to 1,000 of them in a
            list, tuple or set: they are one event.

        Returns in microseconds. Raises as `EventBatcher.enqueue` does; it also refuses the channel ``*``, `user`
        together with `channel`, and the user None.
        """
        batcher = self._process.get().batcher
        try:
            if user is NOT_GIVEN and channel is NOT_GIVEN:
                put(batcher, event_type, data, DEFAULT_CHANNEL, key)
            elif user is NOT_GIVEN and isinstance(channel, str) and channel != BROADCAST:
                batcher.enqueue(event_type, data, channel=channel, key=key)  # it checks each channel only once
            else:
                put(batcher, event_type, data, _audience(batcher, channel, user), key)
        except SSEBatcherError as error:
            self._refused(error, event_type, channel, user)
            raise

    def broadcast(self, event_type: str, data: Any, *, key: str | int | None = None) -> None:
        """Send an event to all clients, whatever their channels. Otherwise as `enqueue`."""
        try:
            put(self._process.get().batcher, event_type, data, BROADCAST, key)
        except SSEBatcherError as error:
            self._refused(error, event_type, BROADCAST, NOT_GIVEN)
            raise

    def after_commit(self, session: AnySession) -> AfterCommit:
        """Return an `AfterCommit`, whose `enqueue` and `broadcast` send when this SQLAlchemy session commits.

        `session` is a ``Session`` or a ``scoped_session``. Raises nothing itself: a session of another kind is a
        `UsageError` of the first event.

        >>> manager.after_commit(session).enqueue("order", {"id": 7, "state": "paid"})
        >>> session.commit()
        """
        return AfterCommit(session, self._hold)

    def subscribe(
        self,
        channels: Iterable[str] = (DEFAULT_CHANNEL,),
        last_event_id: str | None = None,
        *,
        batches: bool = True,
        snapshot: Snapshot | None = None,
        user: User | None = None,
        ticket: int | None = None,
    ) -> Client:
        """Open a stream: iterating the client gives its bytes, from the events that are enqueued after this call.

        `channels`
            1 to 100 channels. A stream with a user may have none.
        `last_event_id`
            The cursor of a client that comes back: it gets what came after it. The first block is ``sse_open`` if
            nothing is missing, otherwise ``sse_gap``.
        `batches`
            False: each event is a block of its own.
        `snapshot`
            What `SSEManager.snapshot` has returned. A client that is new, or has missed something, gets it after the
            first block.
        `user`
            Whose stream it is, for events of this user, limits, `kick` and `revalidate`: a str or an int. None: it
            belongs to no user.
        `ticket`
            What `SSEManager.ticket` has returned: a kick after that ends the stream. None: a kick after this call does.

        Close the client when its stream ends. May wait a few seconds for the backend.

        Raises `InvalidEventError` for invalid channels or an invalid user, `TooManyClientsError` if a limit is reached,
        `BackendError` if it is not known at which position the stream begins, and `ClosedError` after `shutdown`.
        """
        name = None if user is None else check_user(user)
        names = check_channels(channels, may_be_none=name is not None)
        process = self._process.get()
        try:
            ticket = process.ticket() if ticket is None else ticket
            return process.subscribe(StreamRequest(names, last_event_id, batches, snapshot, name, ticket))
        except (BackendError, ClosedError, TooManyClientsError) as error:
            process.refusals.add(refusal_reason(error))
            raise

    def ticket(self) -> int:
        """Return a number to take before you decide whether a request may have a stream, for `subscribe` and `stream`.

        A kick that comes after it ends that stream at its first step, although the stream was not open yet. A kick of
        another process counts from the moment it arrives here.
        """
        process = self._process.get()
        try:
            return process.ticket()
        except BackendError:  # then no stream can be opened either
            return process.hub.ticket

    def kick(self, *, user: User | NotGiven = NOT_GIVEN, channel: str | NotGiven = NOT_GIVEN) -> int:
        """End the streams of this user, or of this channel, or of this user in this channel.

        With Redis, those of all processes; without it, those of this process. They get nothing more but ``sse_bye``.
        Browsers come back after its ``retry``, and the app decides again whether they may have a stream. A stream that
        is still being opened ends, too, if its `ticket` was taken before, also if the kick comes from the app's
        `identify`. Under Flask, the tokens that `SSE.sign` has made for this user before are refused, too.

        Returns how many streams of this process end; those of other processes are not counted. `user` is what
        `subscribe` was given: ``"7"`` and ``7`` are two users. Raises `InvalidEventError` for an invalid user or
        channel, such as None, and if neither is given; and `BackendError` if other processes cannot be reached:
        those of this process have ended then.
        """
        if user is NOT_GIVEN and channel is NOT_GIVEN:
            raise InvalidEventError("say whose streams end: kick(user=...), kick(channel=...) or both", field="user")
        named_user = None if isinstance(user, NotGiven) else check_user(user)
        named_channel = None if isinstance(channel, NotGiven) else check_channel(channel)
        if named_channel == BROADCAST:
            raise InvalidEventError("'*' is no channel to kick: name one, or shut the manager down", field="channel")
        return self._process.get().kick(named_user, named_channel)

    def snapshot(self, take: Callable[[], Iterable[tuple[str, Any]]]) -> Snapshot:
        """Note where the history stands, then take the state: ``take()`` returns ``(event_type, data)`` pairs.

        Give it to `subscribe`, whose stream goes on from that place: nothing between the state and the stream is
        missed. An event may come again that the state already shows. Raises `InvalidEventError` for a bad type or data.
        """
        process = self._process.get()
        process.backend.open(None)
        cursor, encode = process.format(process.hub.head), process.encode
        state = [check_pair(pair) for pair in take()]
        blocks = [(check_type(event_type), encode_body(encode, data)) for event_type, data in state]
        ids = [*[None] * (len(blocks) - 1), cursor]
        named = zip(blocks, ids, strict=False)  # without blocks, there is one id too many
        return Snapshot(cursor, b"".join(block(event=name, data=text, id=id) for (name, text), id in named))

    def cursor(self) -> str:
        """Return where the history stands: a client with this `last_event_id` gets everything after this call.

        Call this before you read the state that the events are about: then nothing is missed between the two, and at
        most an event comes twice. Never waits. A process asks Redis for the place at its first stream or cursor. Until
        Redis has answered, the place is not known, and a client that begins there gets ``sse_gap``.
        """
        process = self._process.get()
        return process.format(process.place())

    def flush_all(self, timeout: float | None = None) -> bool:
        """Close all windows now, and wait until the backend has taken what was enqueued before. See `EventBatcher`."""
        return self._process.get().batcher.flush_all(timeout)

    def get_stats(self) -> ManagerStats:
        """Return the counters of this process, as a frozen value."""
        return self._process.get().stats()

    def unhealthy_reason(self) -> str | None:
        """Return why this process cannot serve streams properly, or None if it can. For health checks.

        ``draining``: it is being shut down. ``backend``: the backend has not answered, or not taken a batch, for five
        seconds. Takes no lock and looks at no client, so it stays cheap with many clients.
        """
        return self._process.get().unhealthy_reason()

    def shutdown(self, timeout: float | None = 5.0) -> bool:
        """Refuse further events and clients, deliver what is pending, and end all streams with ``sse_bye``.

        With Redis, if the server is stopping, many streams end in waves, for 4 s at most, as far as `timeout` allows
        it. Returns True if within `timeout` seconds (None: no limit) everything was delivered and every stream that
        another thread iterates has ended. Idempotent. `close` is another name for it, and the end of a ``with`` block
        calls it.
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

    def _hold(
        self,
        event_type: str,
        data: Any,
        *,
        channel: str | NotGiven,
        key: str | int | None,
        user: User | Sequence[User] | AbstractSet[User] | NotGiven,
        is_broadcast: bool,
    ) -> Send:
        """Check and encode an event, for `AfterCommit`. Returns a function that sends it, and raises as `enqueue`."""
        shown = BROADCAST if is_broadcast else channel
        batcher = self._process.get().batcher
        try:
            audience = BROADCAST if is_broadcast else _audience(batcher, channel, user)
            held = hold(batcher, event_type, data, audience, key)
        except SSEBatcherError as error:
            self._refused(error, event_type, shown, user)
            raise

        def send() -> None:
            try:
                put_held(self._process.get().batcher, held)  # not the batcher above: there may have been a fork
            except SSEBatcherError as error:
                self._refused(error, event_type, shown, user)
                raise

        return send

    def _refused(self, error: SSEBatcherError, event_type: object, channel: object, user: object) -> None:
        if channel is NOT_GIVEN:
            channel = DEFAULT_CHANNEL if user is NOT_GIVEN else None
        signals.send(
            *(signals.event_refused, self),
            error=error,
            event_type=event_type,
            channel=channel,
            user=None if user is NOT_GIVEN else user,
        )


def managers() -> list[SSEManager]:
    """Return the managers of this process."""
    return [each for each in open_objects() if isinstance(each, SSEManager)]


def _audience(batcher: EventBatcher, channel: object, user: object) -> Audience:
    """Return for whom an event is. Arguments that are not allowed count as a refusal of this batcher."""
    try:
        return check_audience(channel, user)
    except InvalidEventError as error:
        refuse(batcher, error)
