"""Hooks: the functions with which an app decides who may have which stream, and what they may answer.

Registered by any thread, usually while modules are imported; called by request threads, in the view. Knows no Flask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ..errors import InvalidEventError
from ..event import DEFAULT_CHANNEL, check_own_channel, check_pair, check_user
from ..functions import check_function, described
from ..manager import SSEManager

_log = logging.getLogger("sse_batcher.hooks")

Authorize = Callable[[tuple[str, ...]], "Iterable[str] | None"]
A = TypeVar("A", bound=Authorize)
TakeState = Callable[[], "tuple[str, Any]"]
S = TypeVar("S", bound=TakeState)
F = TypeVar("F", bound=Callable[..., Any])


class Hooks:
    """The functions that were registered in one place, for all apps or for one, and the decorators that do so.

    Each decorator raises `TypeError` for what is not callable or is async, and `RuntimeError` for a second function:
    which of two decides must not depend on the order of imports. The same one again changes nothing.
    """

    _one_for = "an app"
    divided = False
    """Whether an app has an `authorize` of its own."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}  # by the decorator's name
        self._snapshots: dict[str, TakeState] = {}

    def snapshot(self, channel: str) -> Callable[[S], S]:
        """Register the function that gives the state of a channel. A decorator.

        ``function()`` returns a tuple ``(event_type, data)``. It is called in the view when a client is new, or returns
        after it has missed something. The client gets this event first, and then everything that was delivered since
        just before the call. If it raises, that is logged, and the client gets ``sse_busy`` and comes back; ``abort()``
        refuses it for good.
        """
        name = check_own_channel(channel)

        def register(function: S) -> S:
            self._add(self._snapshots, name, f"the snapshot of channel {name!r}", function)
            return function

        return register

    def authorize(self, function: A) -> A:
        """Register the function that says who may see which channels. A decorator.

        ``function(channels)`` is asked in the view, at every connect, with a tuple of the names asked for, ``default``
        included. It returns those that this request may have, or aborts. A subset is served, none (or None) is 403,
        and a name that was not asked for is a `RuntimeError`, as is an answer of another kind. Without a function only
        ``default`` is served, to everybody.
        """
        self._add(self._functions, "authorize", "authorize", function)
        return function

    def identify(self, function: F) -> F:
        """Register the function that says whose stream it is. A decorator.

        ``function()`` is asked in the view, at every connect, and returns a str of 1 to 256 characters or an int, None
        for nobody; anything else is a `RuntimeError`. ``"7"`` and ``7`` are two users. It is what `kick` and
        `revalidate` go by, and ``SSE_MAX_CLIENTS_PER_USER``.
        """
        self._add(self._functions, "identify", "identify", function)
        return function

    def revalidate(self, function: F) -> F:
        """Register the function that says whether a user may keep the open streams. A decorator.

        ``function(user)`` is asked every ``SSE_REVALIDATE_EVERY`` seconds about each user with a stream, one at a time,
        on a thread of its own in an app context without a request. It returns True or False, and False also for a user
        that there is no more; False ends the user's streams, and `authorize` decides when they come back. If it raises,
        that is logged, and the streams stay open until the next time.
        """
        self._add(self._functions, "revalidate", "revalidate", function)
        return function

    def allow_stats(self, function: F) -> F:
        """Register the function that says who may see the counters, at ``/events/stats``. A decorator.

        ``function()`` is asked in the view, and returns True or False; anything else is a `RuntimeError`. Without one
        there is no such page.
        """
        self._add(self._functions, "allow_stats", "allow_stats", function)
        return function

    def find(self, name: str) -> Callable[..., Any] | None:
        """The function of this decorator, None if there is none."""
        return self._functions.get(name)

    def find_snapshot(self, channel: str) -> TakeState | None:
        """The function that gives the state of this channel, None if there is none."""
        return self._snapshots.get(channel)

    def _add(self, functions: dict[str, Any], key: str, what: str, function: Callable[..., Any]) -> None:
        check_function(what, function)
        there = functions.setdefault(key, function)
        if there is not function:
            raise RuntimeError(f"{there!r} is registered as {what} already: there can be only one for {self._one_for}")


class AppHooks(Hooks):
    """The functions that decide for one app: its own, otherwise those of its `SSE`. With what they have to do with.

    `limits_users`: the config limits the streams of each user.
    """

    def __init__(self, shared: Hooks, manager: SSEManager, *, limits_users: bool) -> None:
        super().__init__()
        self.manager = manager
        self._shared = shared
        self._limits_users = limits_users
        self._said: set[str] = set()
        self.pass_on_revalidate()

    def authorize(self, function: A) -> A:
        """Register the function that says who may see which channels of this app. See `Hooks.authorize`."""
        super().authorize(function)
        self._shared.divided = True
        return function

    def revalidate(self, function: F) -> F:
        """Register the function that says whether a user may keep the open streams. See `Hooks.revalidate`."""
        super().revalidate(function)
        self.pass_on_revalidate()
        return function

    def pass_on_revalidate(self) -> None:
        """Give the manager the function that counts now."""
        self.manager.revalidate = self.find("revalidate")

    def find(self, name: str) -> Callable[..., Any] | None:
        """The app's own function of this decorator, otherwise that of the `SSE`; None if there is none."""
        own = super().find(name)
        return self._shared.find(name) if own is None else own

    def find_snapshot(self, channel: str) -> TakeState | None:
        """The function that gives the state of this channel, found in the same way."""
        own = super().find_snapshot(channel)
        return self._shared.find_snapshot(channel) if own is None else own

    # -- for the blueprint ---------------------------------------------------------------------------------------------

    def allowed(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Which of these channels the current request may have."""
        authorize = self.find("authorize")
        if authorize is None:
            return self._without_authorize(asked)
        answer = authorize(asked)
        if answer is None:
            self._say(
                logging.WARNING,
                "authorize returned None, which is 403, for the channels %s: return the names that are granted, and "
                "() for none",
                asked,
            )
            return ()
        granted = _granted(asked, answer)
        if granted != asked:
            self._say(
                logging.INFO, "authorize did not grant all channels: %s of %s. sse_open names them", granted, asked
            )
        return granted

    def user(self) -> str | int | None:
        """Whose the current request is."""
        identify = self.find("identify")
        if identify is None:
            if self._limits_users or self.find("revalidate") is not None:
                raise RuntimeError(
                    "revalidate and SSE_MAX_CLIENTS_PER_USER need to know the users: register @sse.identify"
                )
            return None
        answer = identify()
        try:
            return None if answer is None else check_user(answer)
        except InvalidEventError as error:
            raise RuntimeError(f"identify() returned {described(answer)}: {error}; or None for nobody") from error

    def shows_stats(self) -> bool | None:
        """Whether the current request may see the counters; None: nobody may."""
        allow = self.find("allow_stats")
        if allow is None:
            return None
        answer = allow()
        if not isinstance(answer, bool):
            raise RuntimeError(f"allow_stats() has to return True or False, not {described(answer)}: use bool(...)")
        return answer

    def snapshot_of(self, channels: tuple[str, ...]) -> Callable[[], list[tuple[str, Any]]] | None:
        """What takes the state of these channels, None if no function is registered for any."""
        found = [(channel, take) for channel in channels if (take := self.find_snapshot(channel)) is not None]
        return (lambda: [_state(channel, take()) for channel, take in found]) if found else None

    def _without_authorize(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        if self._shared.divided:  # not served to everybody because the other app's function is not ours
            raise RuntimeError(
                "another app of this SSE has an authorize of its own, and this one has none: register one with "
                "@sse.for_app(app).authorize"
            )
        if asked == (DEFAULT_CHANNEL,):
            return asked
        self._say(
            logging.WARNING,
            "the channels %s were asked for, and refused with 403: no function is registered with @sse.authorize, and "
            "without one only 'default' is served",
            asked,
        )
        return ()

    def _say(self, level: int, text: str, *values: object) -> None:
        """Log this once. By two threads at once twice: a harmless race."""
        if text not in self._said:
            self._said.add(text)
            _log.log(level, text, *values)


def _granted(asked: tuple[str, ...], answer: Any) -> tuple[str, ...]:
    # Not everything that can be iterated: a string would be taken apart, and a mapping may say False of a name.
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise RuntimeError(
            f"authorize() has to return the names of the channels that are granted, of those asked for, such as "
            f"[name for name in channels if ...], not {described(answer)}"
        )
    names = tuple(answer)
    foreign = [name for name in names if name not in asked]
    if foreign:
        raise RuntimeError(f"authorize() returned {foreign!r}, which was not asked for: return some of {asked!r}")
    return tuple(name for name in asked if name in names)


def _state(channel: str, answer: object) -> tuple[str, Any]:
    try:
        return check_pair(answer)
    except InvalidEventError as error:
        raise RuntimeError(f"the snapshot of channel {channel!r} returned {described(answer)}: {error}") from error
