"""Access: what an app's functions decide about the current request.

Request threads, in the view. Knows no Flask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from ..errors import InvalidEventError, UsageError
from ..event import DEFAULT_CHANNEL, check_pair, check_user
from ..functions import described
from ..runtime.log_once import LogOnce
from .hooks import F, Functions, Revalidate, Slot, TakeState

_log = logging.getLogger("sse_batcher.hooks")


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
        authorize = _first(self._own.authorize, self._shared.authorize)
        if authorize is None:
            return self._granted_to_all(asked)
        answer = authorize(asked)
        if answer is None:
            self._once.log(
                logging.WARNING,
                "authorize returned None, which is 403, for the channels %s: return the names that are granted, and "
                "() for none",
                asked,
            )
            return ()
        granted = _check_granted(asked, answer)
        if granted != asked:
            self._once.log(
                logging.INFO, "authorize did not grant all channels: %s of %s. sse_open names them", granted, asked
            )
        return granted

    def user(self) -> str | int | None:
        """Return the user of the current request, None if it belongs to no user."""
        identify = _first(self._own.identify, self._shared.identify)
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
        return _first(self._own.revalidate, self._shared.revalidate)

    def shows_stats(self) -> bool | None:
        """Whether the current request may see the counters. None: no request may."""
        allow = _first(self._own.allow_stats, self._shared.allow_stats)
        if allow is None:
            self._once.log(
                logging.WARNING,
                "a request for the counters was answered with 404, because no function says which requests may see "
                "them: register one with @sse.allow_stats",
            )
            return None
        answer: object = allow()
        if not isinstance(answer, bool):
            raise UsageError(f"allow_stats() has to return True or False, not {described(answer)}: use bool(...)")
        return answer

    def snapshot(self, channels: tuple[str, ...]) -> Callable[[], list[tuple[str, object]]] | None:
        """Return a function that takes the state of these channels, None if there is none to take."""
        found = [(channel, take) for channel in channels if (take := self._find_snapshot(channel)) is not None]
        return (lambda: [_state(channel, take()) for channel, take in found]) if found else None

    def _find_snapshot(self, channel: str) -> TakeState | None:
        own = self._own.find_snapshot(channel)
        return self._shared.find_snapshot(channel) if own is None else own

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
        )
        return ()


def _first(own: Slot[F], shared: Slot[F]) -> F | None:
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


def _state(channel: str, answer: object) -> tuple[str, object]:
    try:
        return check_pair(answer)
    except InvalidEventError as error:
        raise UsageError(f"the snapshot of channel {channel!r} returned {described(answer)}: {error}") from error
