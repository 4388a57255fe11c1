"""Revalidator: asks the app, at intervals, whether users may keep their open streams.

The questions run on an app thread, one at a time. `watch` is thread-safe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ..functions import described
from ..runtime.app_thread import AppThread
from ..runtime.log_fields import log_fields
from .hub import Hub

_log = logging.getLogger("sse_batcher.rights")

Ask = Callable[[Any], Any]
"""Called with a user. Returns True or False; anything else is an error of the app, and logged."""

SERIOUS = 3
"""From this many errors in a row about one user on, they are logged at the level ERROR."""
QUIET_SECONDS = 60.0
"""Minimum time between two log lines of the same level: an unreachable database makes an error for every user."""


class Revalidator:
    """Asks about each user with a stream every `every` seconds: one question, however many streams the user has.

    `ask` runs on the `app_thread`. A user for whom it returns False is dismissed from the `hub`.
    """

    def __init__(
        self, ask: Ask, every: float, hub: Hub, app_thread: AppThread, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._every = every
        self._hub = hub
        self._app_thread = app_thread
        self._clock = clock
        # Users whose next question is scheduled. Takes no lock: single steps of a dictionary are atomic.
        self._asked: dict[str | int, object] = {}
        # By the app thread only: the number of errors in a row about each user, and when each level was last logged.
        self._errors: dict[str | int, int] = {}
        self._logged_at: dict[int, float] = {}

    def watch(self, user: str | int) -> None:
        """Ask about this user from now on, for as long as the user has a stream. Thread-safe."""
        mine = object()
        try:
            if self._asked.setdefault(user, mine) is mine:
                self._app_thread.post_later(self._every, lambda: self._question(user, mine))
        except BaseException:
            # Raised by a signal handler. It may be scheduled or not, and without this question none would follow. If it
            # is scheduled twice, the second one is dropped.
            if self._asked.get(user) is mine:
                self._app_thread.post_later(self._every, lambda: self._question(user, mine))
            raise

    def _question(self, user: str | int, mine: object) -> None:
        if self._asked.get(user) is not mine:
            return  # it was scheduled twice, and asked already
        try:
            if self._hub.has_user(user) and not self._may_stay(user):
                self._hub.dismiss("revoked", user)
        finally:  # whatever was raised, ask about this user again
            del self._asked[user]
            # After the removal: a stream of this user that was opened before it has scheduled no question.
            if self._hub.has_user(user):
                self.watch(user)
            else:
                self._errors.pop(user, None)

    def _may_stay(self, user: str | int) -> bool:
        """Ask the app. If it raises or returns no bool, the user's streams stay open: a database may be unreachable."""
        try:
            answer = self._ask(user)
        except Exception as error:
            self._count_error(user, f"raised {type(error).__name__}", error)
            return True
        if not isinstance(answer, bool):
            self._count_error(user, f"returned {described(answer)} instead of True or False")
            return True
        self._errors.pop(user, None)
        return answer

    def _count_error(self, user: str | int, what: str, error: Exception | None = None) -> None:
        count = self._errors[user] = self._errors.get(user, 0) + 1
        level = logging.ERROR if count >= SERIOUS else logging.WARNING
        now = self._clock()
        if now - self._logged_at.get(level, -QUIET_SECONDS) < QUIET_SECONDS:
            return
        self._logged_at[level] = now
        _log.log(
            level,
            "revalidate %s for the user %r. Errors in a row: %d; users with errors: %d. Their streams stay open, and "
            "it is called again every %g s. It must return False for a user who may not stay, also for one who was "
            "deleted",
            what,
            user,
            count,
            len(self._errors),
            self._every,
            exc_info=error,
            extra=log_fields("revalidate_failed", user=user, failures=count, users=len(self._errors)),
        )
