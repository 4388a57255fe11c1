"""Rights: asks, every so often, whether a user may still have the streams that are open.

The questions run on the helper thread, one at a time; `watch` is called by any thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

from .helper import Helper
from .hub import Hub

_log = logging.getLogger("sse_batcher.rights")

Ask = Callable[[Hashable], Any]
"""True or False; anything else is a mistake of the app."""


class Rights:
    """One question for each user that has a stream, however many he has, `every` so many seconds."""

    def __init__(self, ask: Ask, every: float, hub: Hub, helper: Helper) -> None:
        self._ask = ask
        self._every = every
        self._hub = hub
        self._helper = helper
        # Users whose next question is on its way. Single steps of a dictionary are atomic.
        self._asked: dict[Hashable, object] = {}

    def watch(self, user: Hashable) -> None:
        """Ask about this user from now on, for as long as he has a stream."""
        mine = object()
        if self._asked.setdefault(user, mine) is mine:
            self._helper.post_later(self._every, lambda: self._question(user))

    def _question(self, user: Hashable) -> None:
        if self._hub.has_user(user) and not self._may_stay(user):
            self._hub.dismiss("revoked", user)
        del self._asked[user]
        # After the removal: one of his streams that was opened before it has not been watched.
        if self._hub.has_user(user):
            self.watch(user)

    def _may_stay(self, user: Hashable) -> bool:
        """The app's answer. One that fails, or is none, ends nothing: a database that is away must not."""
        try:
            answer = self._ask(user)
        except Exception:
            _log.exception("whether user %r may stay cannot be told; he stays, and it is asked again", user)
            return True
        if not isinstance(answer, bool):
            _log.error("revalidate must return True or False, not %r; user %r stays until then", answer, user)
            return True
        return answer
