"""Access: what an app's functions decide about the current request.

Request threads, in the view. Knows no Flask.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import InvalidEventError, UsageError
from ..event import DEFAULT_CHANNEL, User, check_pair, check_user
from ..functions import described
from ..runtime.log_fields import log_fields
from ..runtime.log_once import LogOnce
from .hooks import Allow, F, Functions, Revalidate, Slot

_log = logging.getLogger("sse_batcher.hooks")


class _Source(NamedTuple):
    """Where a part of the state comes from."""

    what: str
    """Whose state it is."""
    take: Callable[[], object]
    may_be_none: bool
    """Whether there may be no state. A function for one channel has one, or it was forgotten to return it."""


class Access:
    """The decisions for one app: by its own functions, or else by those of its `SSE`.

    `own`, `shared`: the functions of the app, and of the `SSE`. `limits_users`: the config limits the streams of each
    user.
    """

    def __init__(self, own: Functions, shared: Functions, *, limits_users: bool) -> None:
        self._own = own
        self._shared = shared
        self._limits_users = limits_users
        self._once = LogOnce(_log)

    def granted(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of these channels that the current request may have."""
        authorize = _own_or_shared(self._own.authorize, self._shared.authorize)
        if authorize is None:
            return self._granted_to_all(asked)
        answer = authorize(asked)
        if answer is None:
            self._once.log(
                logging.WARNING,
                "authorize returned None, which is 403, for the channels %s: return the names that are granted, and "
                "() for none",
                asked,
                extra=log_fields("authorize_returned_none", channels=asked),
            )
            return ()
        granted = _check_granted(asked, answer)
        if granted != asked:
            self._once.log(
                logging.INFO,
                "authorize did not grant all channels: %s of %s. sse_open names them",
                granted,
                asked,
                extra=log_fields("authorize_granted_some", channels=granted, asked=asked),
            )
        return granted

    def user(self) -> str | int | None:
        """Return the user of the current request, None if it belongs to no user."""
        identify = _own_or_shared(self._own.identify, self._shared.identify)
        if identify is None:
            if self._limits_users or self.revalidate() is not None:
                raise UsageError(
                    "revalidate and SSE_MAX_CLIENTS_PER_USER need to know the users: register @sse.identify"
                )
            return None
        answer = identify()
        try:
            return None if answer is None else check_user(answer)
        except InvalidEventError as error:
            raise UsageError(
                f"identify() returned {described(answer)}: {error}; or None if there is no user"
            ) from error

    def revalidate(self) -> Revalidate | None:
        """Return the function that says whether a user may keep the open streams."""
        return _own_or_shared(self._own.revalidate, self._shared.revalidate)

    def shows_stats(self) -> bool | None:
        """Whether the current request may see the counters. None: no request may."""
        allowed = _allowed("allow_stats", self._own.allow_stats, self._shared.allow_stats)
        if allowed is None:
            self._once.log(
                logging.WARNING,
                "a request for the counters was answered with 404, because no function says which requests may see "
                "them: register one with @sse.allow_stats",
                extra=log_fields("stats_not_allowed"),
            )
        return allowed

    def shows_monitor(self) -> bool | None:
        """Whether the current request may see the monitor. None: no request may."""
        allowed = _allowed("allow_monitor", self._own.allow_monitor, self._shared.allow_monitor)
        if allowed is None:
            self._once.log(
                logging.WARNING,
                "a request for the monitor was answered with 404, because no function says which requests may see "
                "it: register one with @sse.allow_monitor",
                extra=log_fields("monitor_not_allowed"),
            )
        return allowed

    def may_kick(self) -> bool | None:
        """Whether the current request may kick users in the monitor. None: no request may."""
        return _allowed("allow_kick", self._own.allow_kick, self._shared.allow_kick)

    def snapshot(self, channels: tuple[str, ...], user: User | None) -> Callable[[], list[tuple[str, object]]] | None:
        """Return a function that takes the state of these channels and this user, None if there is none to take."""
        sources = [source for channel in channels if (source := self._source_of(channel)) is not None]
        of_user = _own_or_shared(self._own.user_snapshot, self._shared.user_snapshot)
        if user is not None and of_user is not None:
            take: Callable[[Any], object] = of_user
            sources.append(_Source(f"user {user!r}", functools.partial(take, user), may_be_none=True))

        def take_all() -> list[tuple[str, object]]:
            states = [_state(source) for source in sources]
            return [state for state in states if state is not None]

        return take_all if sources else None

    def _source_of(self, channel: str) -> _Source | None:
        """Return the source of this channel's state: a function of its own, or the one for all others."""
        named = self._own.find_snapshot(channel) or self._shared.find_snapshot(channel)
        if named is not None:
            return _Source(f"channel {channel!r}", named, may_be_none=False)
        others = _own_or_shared(self._own.channel_snapshot, self._shared.channel_snapshot)
        if others is None:
            return None
        return _Source(f"channel {channel!r}", functools.partial(others, channel), may_be_none=True)

    def _granted_to_all(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Return what is granted if no `authorize` is registered for this app."""
        if self._shared.is_divided:
            # The other app restricts its channels. This one has probably forgotten to.
            raise UsageError(
                "another app of this SSE has an authorize of its own, and this one has none: register one with "
                "@sse.for_app(app).authorize"
            )
        if asked == (DEFAULT_CHANNEL,):
            return asked
        self._once.log(
            logging.WARNING,
            "the channels %s were asked for and refused with 403: no function is registered with @sse.authorize, and "
            "without one only 'default' is served",
            asked,
            extra=log_fields("authorize_missing", channels=asked),
        )
        return ()


def _allowed(name: str, own: Slot[Allow], shared: Slot[Allow]) -> bool | None:
    """Ask the function that is registered as this. Returns None if there is none."""
    allow = _own_or_shared(own, shared)
    if allow is None:
        return None
    answer: object = allow()
    if not isinstance(answer, bool):
        raise UsageError(f"{name}() has to return True or False, not {described(answer)}: use bool(...)")
    return answer


def _own_or_shared(own: Slot[F], shared: Slot[F]) -> F | None:
    return shared.function if own.function is None else own.function


def _check_granted(asked: tuple[str, ...], answer: object) -> tuple[str, ...]:
    # Not everything that can be iterated: a string would be taken apart, and a mapping may say False about a name.
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise UsageError(
            f"authorize() has to return the names of the channels that are granted, of those asked for, such as "
            f"[name for name in channels if ...], not {described(answer)}"
        )
    names = tuple(answer)
    foreign = [name for name in names if name not in asked]
    if foreign:
        raise UsageError(f"authorize() returned {foreign!r}, which was not asked for: return some of {asked!r}")
    return tuple(name for name in asked if name in names)


def _state(source: _Source) -> tuple[str, object] | None:
    answer = source.take()
    if answer is None and source.may_be_none:
        return None
    try:
        return check_pair(answer)
    except InvalidEventError as error:
        raise UsageError(f"the snapshot of {source.what} returned {described(answer)}: {error}") from error
