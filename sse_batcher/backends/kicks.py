"""Kicks: up to which time the tokens of a user are refused, and the times that tokens and kicks get.

Thread-safe. A lock guards what each object has.
"""

from __future__ import annotations

from collections import OrderedDict

from ..event import User
from ..runtime.locks import new_lock

MAX_TOKEN_SECONDS = 604_800
"""The longest lifetime of a token, a week: kicks of users are remembered for as long."""
MAX_KICKED_USERS = 100_000
"""How many kicked users a process remembers."""
MICROSECONDS = 1_000_000


class Stamps:
    """Times in microseconds since 1970, of which each is later than all before it, even if the clock is set back.

    So a token and a kick of the same process are always in the order of the calls that have made them.
    """

    def __init__(self) -> None:
        self._newest = 0
        self._lock = new_lock()

    def next(self, milliseconds: float) -> int:
        """Return the stamp for this time of a clock, or the first one that is free."""
        with self._lock:
            self._newest = max(int(milliseconds * 1_000), self._newest + 1)
            return self._newest

    def raise_to(self, stamp: int) -> None:
        """Have all further stamps be later than this one."""
        with self._lock:
            self._newest = max(self._newest, stamp)


class KickedUsers:
    """The newest kick of each user, in the memory of one process. All times are stamps.

    `since`: kicks before that are not known, so tokens that were made before it are refused, for all users. Only
    the `most` newest kicks are remembered: for each one that is forgotten, `since` rises to it.
    """

    def __init__(self, since: int, most: int = MAX_KICKED_USERS) -> None:
        self._since = since
        self._most = most
        self._by_user: OrderedDict[User, int] = OrderedDict()  # oldest first
        self._lock = new_lock()

    def add(self, user: User, stamp: int) -> None:
        """Note a kick, and forget those that no token can be older than."""
        with self._lock:
            # Two kicks may come in another order than that of their stamps. Neither makes the other one older.
            stamp = max(stamp, self._by_user.get(user, 0))
            self._by_user[user] = stamp
            self._by_user.move_to_end(user)
            oldest = stamp - MAX_TOKEN_SECONDS * MICROSECONDS
            while len(self._by_user) > self._most or next(iter(self._by_user.values())) < oldest:
                self._since = max(self._since, self._by_user.popitem(last=False)[1])

    def until(self, user: User) -> int:
        """Return the stamp up to which tokens of this user are refused."""
        with self._lock:
            return max(self._since, self._by_user.get(user, 0))
