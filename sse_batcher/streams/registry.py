"""The registry: the open streams, their users, and what listens to which channel.

Not thread-safe; the hub's lock guards it. May also be called without it: `len`, `is_empty`, `has_user`, `reader_count`.

A *reader* is offered each frame of its channels. A *listener* is a reader that is offered the frames of ``*``, too. A
stream with a queue is its own listener. Other streams have a feed, which listens for many of them at once; such a
stream is itself a reader of those of its channels that the feed does not read for it. A stream is also offered each
frame for its user.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from ..errors import TooManyClientsError
from ..event import BROADCAST, EVERY_USER, Audience, User
from ..options import ClientOptions
from ..reasons import EndReason
from ..stats import Histogram
from .counts import LIFETIMES, Buckets, Counts
from .index import Index
from .open_stream import OpenStream
from .roles import Listener, Reader


class Registry:
    """The open streams and the listeners of one hub.

    A signal handler may interrupt each method, which can then be called again with the same arguments.
    """

    def __init__(self, options: ClientOptions) -> None:
        self._max_clients = options.max_clients
        self._max_clients_per_user = options.max_clients_per_user
        self._streams: dict[OpenStream, None] = {}
        self.polls: dict[OpenStream, None] = {}
        """The open streams that are polls. Its length may be read without the lock, as `len`."""
        self._users: Index[User, OpenStream] = Index()
        self._readers: Index[str, Reader] = Index()  # by channel
        self._listeners: dict[Listener, None] = {}
        self._ended = Counts()  # of listeners that are gone
        self._closed: dict[EndReason, int] = dict.fromkeys(get_args(EndReason), 0)
        self._lifetimes = Buckets(LIFETIMES)

    # -- streams -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of open streams. A harmless race without the lock: it was true a moment ago."""
        return len(self._streams)

    def is_empty(self) -> bool:
        """Return whether there is no stream and no listener. May be called without the lock, as `len`."""
        return not (self._streams or self._users or self._readers or self._listeners)

    def __contains__(self, stream: OpenStream) -> bool:
        return stream in self._streams

    def check_limits(self, user: User | None) -> None:
        """Raise `TooManyClientsError` if this user must not have another stream now."""
        most = self._max_clients
        if most is not None and len(self._streams) >= most:
            raise TooManyClientsError(f"{most} streams are open: close some, or raise max_clients")
        most = self._max_clients_per_user
        if most is not None and user is not None and self._users.count(user) >= most:
            raise TooManyClientsError(
                f"{most} streams of the user {user!r} are open: close some, or raise max_clients_per_user"
            )

    def add(self, stream: OpenStream) -> None:
        """Add a stream. Its listener is added by `listen`."""
        self._streams[stream] = None
        if stream.poll:
            self.polls[stream] = None
        if stream.info.user is not None:
            self._users.add(stream.info.user, stream)

    def remove(self, stream: OpenStream, reason: EndReason | None = None, duration: float = 0.0) -> None:
        """Remove a stream that is there, also as a reader.

        `reason`: why it has ended. None: it has not, because another one goes on in its place. `duration`: for how many
        seconds it was open.
        """
        self.unlisten(stream, (*stream.channels, BROADCAST))
        if stream.info.user is not None:
            self._users.discard(stream.info.user, stream)
        self.polls.pop(stream, None)
        # Last: if this is interrupted, the stream is still here, and is removed again. There is no call between these
        # lines, so no signal handler runs there: the stream is counted exactly once.
        del self._streams[stream]
        if reason is not None:
            self._closed[reason] += 1
            if not stream.poll:
                self._lifetimes.add(duration)  # a call: if it is interrupted, this one is missing

    def streams(self, user: User | None = None) -> list[OpenStream]:
        """Return the streams of this user; None: all."""
        return list(self._streams if user is None else self._users.of(user))

    def has_user(self, user: User | None) -> bool:
        """Return whether this user has a stream. May be called without the lock, as `len`."""
        return user in self._users

    def user_count(self) -> int:
        """Return how many users have a stream."""
        return len(self._users)

    # -- listeners -----------------------------------------------------------------------------------------------------

    def listen(self, listener: Listener, channels: Iterable[str]) -> None:
        """Offer this listener the frames of these channels and of ``*``."""
        self._listeners[listener] = None
        self.add_reader(listener, channels)

    def add_reader(self, reader: Reader, channels: Iterable[str]) -> None:
        """Offer this reader the frames of these channels."""
        for channel in channels:
            self._readers.add(channel, reader)

    def unlisten(self, reader: Reader, channels: Iterable[str]) -> None:
        """Offer it no more frames of these channels. With ``*`` among them, the counts of a listener are kept."""
        for channel in channels:
            if channel == BROADCAST:
                self._keep_counts(reader)
            else:
                self._readers.discard(channel, reader)

    def readers(self, audience: Audience) -> Sequence[Reader]:
        """Return the readers of this channel, of ``*`` all listeners, or the streams of these users."""
        if isinstance(audience, str):
            return self.listeners() if audience == BROADCAST else list(self._readers.of(audience))
        users = self._users if audience == EVERY_USER else audience
        return [stream for user in users for stream in self._users.of(user)]

    def listeners(self) -> list[Listener]:
        """Return all listeners."""
        return list(self._listeners)

    def reader_count(self, channel: str) -> int:
        """Return the number of readers of this channel. Needs no lock: it was true a moment ago."""
        return self._readers.count(channel)

    def counts(self) -> Counts:
        """Return what was handed to all streams, including those that have ended."""
        counts = Counts()
        for each in (self._ended, *(listener.counts for listener in self._listeners)):
            counts.add(each)
        return counts

    def closed(self) -> dict[EndReason, int]:
        """Return how many streams have ended, by reason."""
        return dict(self._closed)

    def lifetimes(self) -> Histogram:
        """Return for how long the streams that have ended were open, without polls."""
        return self._lifetimes.histogram()

    def _keep_counts(self, reader: Reader) -> None:
        listeners: dict[Any, None] = self._listeners
        if reader in listeners:
            ended = Counts()
            ended.add(self._ended)
            ended.add(reader.counts)
            # There is no call between these two lines, so no signal handler runs there: it is counted exactly once.
            del listeners[reader]
            self._ended = ended
