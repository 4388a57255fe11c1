"""Hooks: the decorators that register an app's functions, and where these functions are kept.

Any thread, usually while modules are imported. Knows no Flask. `access` calls the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar, overload

from ..errors import UsageError
from ..event import check_own_channel
from ..functions import check_function

Authorize = Callable[[tuple[str, ...]], Iterable[str] | None]
Identify = Callable[[], str | int | None]
Revalidate = Callable[[str], bool] | Callable[[int], bool]
"""Of the type that `identify` returns, or of both."""
Allow = Callable[[], bool]
TakeState = Callable[[], tuple[str, object]]
TakeChannelState = Callable[[str], tuple[str, object] | None]
TakeUserState = Callable[[str], tuple[str, object] | None] | Callable[[int], tuple[str, object] | None]
"""Of the type that `identify` returns, or of both."""

F = TypeVar("F", bound=Callable[..., object])
AuthorizeF = TypeVar("AuthorizeF", bound=Authorize)
IdentifyF = TypeVar("IdentifyF", bound=Identify)
RevalidateF = TypeVar("RevalidateF", bound=Revalidate)
AllowF = TypeVar("AllowF", bound=Allow)
TakeStateF = TypeVar("TakeStateF", bound=TakeState)
TakeChannelStateF = TypeVar("TakeChannelStateF", bound=TakeChannelState)
TakeUserStateF = TypeVar("TakeUserStateF", bound=TakeUserState)


_ALLOWING = ("allow_stats", "allow_monitor", "allow_kick")


class Slot(Generic[F]):
    """A place for one function. `what`: what the function is registered as. `owner`: what can have only one."""

    function: F | None = None

    def __init__(self, what: str, owner: str) -> None:
        self._what = what
        self._owner = owner

    def fill(self, function: F) -> None:
        """Register a function. The same one again changes nothing.

        Raises `InvalidFunctionError` for what cannot be called or is async, and `UsageError` for a second function.
        """
        check_function(self._what, function)
        there = vars(self).setdefault("function", function)  # atomic: of two threads, one fills it
        if there != function:  # equal: each access to a method of an object makes another bound method
            raise UsageError(
                f"{there!r} is registered as {self._what} already: there can be only one for {self._owner}"
            )


class Functions:
    """The functions that were registered in one place: with an `SSE`, for all its apps, or for one app."""

    def __init__(self, owner: str) -> None:
        self.authorize: Slot[Authorize] = Slot("authorize", owner)
        self.identify: Slot[Identify] = Slot("identify", owner)
        self.revalidate: Slot[Revalidate] = Slot("revalidate", owner)
        self.allow_stats: Slot[Allow] = Slot("allow_stats", owner)
        self.allow_monitor: Slot[Allow] = Slot("allow_monitor", owner)
        self.allow_kick: Slot[Allow] = Slot("allow_kick", owner)
        self.is_divided = False
        """For the functions of an `SSE`: whether one of its apps has an `authorize` of its own."""
        self.channel_snapshot: Slot[TakeChannelState] = Slot("the snapshot of channels without one", owner)
        self.user_snapshot: Slot[TakeUserState] = Slot("user_snapshot", owner)
        self._snapshots: dict[str, Slot[TakeState]] = {}  # by channel
        self._owner = owner

    def snapshot(self, channel: str) -> Slot[TakeState]:
        """The place for the function that gives the state of this channel."""
        return self._snapshots.setdefault(channel, Slot(f"the snapshot of channel {channel!r}", self._owner))

    def find_snapshot(self, channel: str) -> TakeState | None:
        """The function that gives the state of this channel, None if there is none."""
        slot = self._snapshots.get(channel)  # channels come from outside: no place is made for them
        return None if slot is None else slot.function

    def __str__(self) -> str:
        """What is registered, such as ``authorize, snapshot('a')``."""
        slots = {name: getattr(self, name) for name in ("authorize", "identify", "revalidate", *_ALLOWING)}
        slots |= {f"snapshot({channel!r})": slot for channel, slot in list(self._snapshots.items())}
        slots |= {"snapshot": self.channel_snapshot, "user_snapshot": self.user_snapshot}
        return ", ".join(name for name, slot in slots.items() if slot.function is not None) or "no function"


class Hooks:
    """Decorators for the functions that decide which streams a request may have, and what a stream begins with.

    What all of them return and raise is in the docstring of `SSE`.
    """

    def __init__(self, functions: Functions, changed: Callable[[], None]) -> None:
        self._functions = functions
        self._changed = changed
        """Called after each registration."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._functions}>"

    @overload
    def snapshot(self, channel: str) -> Callable[[TakeStateF], TakeStateF]: ...

    @overload
    def snapshot(self, channel: TakeChannelStateF) -> TakeChannelStateF: ...

    def snapshot(self, channel: str | TakeChannelStateF) -> Callable[[TakeStateF], TakeStateF] | TakeChannelStateF:
        """Register the function that gives the state of a channel. A decorator.

        With a name, ``@sse.snapshot("board")``: ``function()`` returns a tuple ``(event_type, data)``. It is called in
        the view, for a client that is new, and for one that comes back and has missed something. The client gets this
        event first, and then everything that was delivered since just before the call. If the function raises, that is
        logged, and the client gets ``sse_busy`` and comes back. ``abort()`` answers with an error status instead.

        Without a name, ``@sse.snapshot``: ``function(channel)`` does the same for each channel that has no function of
        its own, for example those of teams or orders. It may return None if the channel has no state.

        Raises `InvalidEventError` for an invalid name of a channel.
        """
        if not isinstance(channel, str) and callable(channel):
            self._functions.channel_snapshot.fill(channel)
            self._changed()
            return channel
        name = check_own_channel(channel)

        def register(function: TakeStateF) -> TakeStateF:
            self._functions.snapshot(name).fill(function)
            self._changed()
            return function

        return register

    def user_snapshot(self, function: TakeUserStateF) -> TakeUserStateF:
        """Register the function that gives the state of a user. A decorator.

        ``function(user)`` is called as that of a channel is, for each stream with a user. It returns a tuple
        ``(event_type, data)``, or None if the user has no state. The client gets this event after those of channels.
        """
        self._functions.user_snapshot.fill(function)
        self._changed()
        return function

    def authorize(self, function: AuthorizeF) -> AuthorizeF:
        """Register the function that says which channels a request may have. A decorator.

        ``function(channels)`` is called in the view, at every connect, with a tuple of the names asked for, ``default``
        included. It returns the names that this request may have, or aborts. If it grants only some of them, the stream
        has these. None, or no name, is answered with 403. A name that was not asked for is a `UsageError`, and so is an
        answer of another type. Without a function, all clients may have ``default``, and no other channel.
        """
        self._functions.authorize.fill(function)
        self._changed()
        return function

    def identify(self, function: IdentifyF) -> IdentifyF:
        """Register the function that says whose stream it is. A decorator.

        ``function()`` is called in the view, at every connect. It returns a str of 1 to 256 characters or an int, or
        None if the stream belongs to no user; anything else is a `UsageError`. ``"7"`` and ``7`` are two users. `kick`,
        `revalidate` and ``SSE_MAX_CLIENTS_PER_USER`` refer to this user.
        """
        self._functions.identify.fill(function)
        self._changed()
        return function

    def revalidate(self, function: RevalidateF) -> RevalidateF:
        """Register the function that says whether a user may keep the open streams. A decorator.

        ``function(user)`` is called every ``SSE_REVALIDATE_EVERY`` seconds for each user with a stream, one at a time,
        on a thread of its own in an app context without a request. It returns True or False, and False also for a user
        that no longer exists. False ends the user's streams, and `authorize` decides when they come back. If it raises,
        that is logged, and the streams stay open until the next time.
        """
        self._functions.revalidate.fill(function)
        self._changed()
        return function

    def allow_stats(self, function: AllowF) -> AllowF:
        """Register the function that says whether a request may see the counters, at ``/events/stats``. A decorator.

        ``function()`` is called in the view, and returns True or False; anything else is a `UsageError`. False is
        answered with 403. Without a function, the answer is 404.
        """
        self._functions.allow_stats.fill(function)
        self._changed()
        return function

    def allow_monitor(self, function: AllowF) -> AllowF:
        """Register the function that says whether a request may see the monitor, at ``/events/monitor``. A decorator.

        ``function()`` is called in the view, for the page and each time that it asks for its data. It returns True or
        False; anything else is a `UsageError`. False is answered with 403. Without a function, the answer is 404. The
        page shows users, channels and addresses: let in only those who may see all of them.
        """
        self._functions.allow_monitor.fill(function)
        self._changed()
        return function

    def allow_kick(self, function: AllowF) -> AllowF:
        """Register the function that says whether a request may kick users in the monitor. A decorator.

        ``function()`` is called in the view, at each kick, and when the page asks for its data, to show the buttons. It
        returns True or False; anything else is a `UsageError`. `allow_monitor` has to let the request in, too. Without
        a function, the page has no buttons.
        """
        self._functions.allow_kick.fill(function)
        self._changed()
        return function
