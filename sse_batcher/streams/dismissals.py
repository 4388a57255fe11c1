"""Dismissals: which streams had to end, in numbered order, for streams that are still being opened.

Pure. Not thread-safe; the hub's lock guards it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from ..reasons import ByeReason

MAX_DISMISSALS = 10_000
"""How many pairs of a user and a channel are remembered."""


class Dismissals:
    """The newest dismissal of each user, of each channel, and of each user in a channel.

    A request notes the number of the newest dismissal, its *ticket*, before the app decides about the request. When its
    stream opens, every dismissal after the ticket applies to it. Only the `most` newest pairs of a user and a channel
    are remembered, and for all others the number of the newest one that was forgotten: a stream with an older ticket is
    dismissed, too. Its client comes back at once, and the app decides again.
    """

    def __init__(self, most: int = MAX_DISMISSALS) -> None:
        self.newest = 0
        """The number of the newest dismissal; 0 before the first one."""
        self._most = most
        self._floor = 0
        self._by_pair: OrderedDict[tuple[str | int | None, str | None], tuple[int, ByeReason]] = OrderedDict()

    def add(self, reason: ByeReason, user: str | int | None, channel: str | None) -> None:
        """Note a dismissal of the streams of this user in this channel. None: of any user, or in any channel."""
        self.newest += 1
        self._by_pair[user, channel] = self.newest, reason
        self._by_pair.move_to_end((user, channel))
        if len(self._by_pair) > self._most:
            self._floor, _ = self._by_pair.popitem(last=False)[1]

    def after(self, ticket: int, user: str | int | None, channels: Iterable[str]) -> ByeReason | None:
        """Return the reason of the newest dismissal after this ticket that ends such a stream; None: there is none."""
        if ticket >= self.newest:
            return None
        pairs: list[tuple[str | int | None, str | None]] = [(None, None), (user, None)]
        for channel in channels:
            pairs += [(None, channel), (user, channel)]
        found = max((self._by_pair[pair] for pair in pairs if pair in self._by_pair), default=(0, "kicked"))
        number, reason = max(found, (self._floor, "kicked"))
        return reason if number > ticket else None
