"""The rules of batching: which events travel together, and when a window closes.

Pure: the caller passes the time, and there is no thread, lock or clock here. The outcome depends only on the events and
their times, never on how late the caller is: an event that comes at or after the end of a window does not join it.

The caller adds events, and calls `close_due` when `next_deadline` has come. It takes the closed windows from `closed`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from ..event import BROADCAST, MIXED, Audience, Event, User, body_bytes, is_text, users_of
from ..options import BatchOptions, TypeRules
from ..reasons import BatchReason
from ..wire import envelope_bytes, mixed_bytes

NOW = float("-inf")
NEVER = float("inf")

_CLOSED_KEPT = 100
"""The heap of deadlines is cleaned up if it is longer by this than twice the number of windows that are open."""


class Closed(NamedTuple):
    """The events of a window that has closed, in the order of delivery, and why it closed."""

    audience: Audience
    type: str
    events: tuple[Event, ...]
    reason: BatchReason
    since: float
    """When its first event came. With `leading`, also when the window before it closed."""
    join: str | None = None
    """What comes between the events, if they are texts that are sent as one."""


class _Window:
    __slots__ = ("audience", "bytes", "deadline", "events", "keyless", "number", "rules", "texts")

    def __init__(self, rules: TypeRules, audience: Audience, deadline: float, number: int) -> None:
        self.rules = rules
        self.audience = audience
        self.deadline = deadline
        self.number = number  # rises with each window that is opened, so that windows can be sorted by age
        # In the order of delivery. The key is that by which events are replaced, or a number if the event has none.
        self.events: dict[object, Event] = {}
        self.keyless = 0
        self.texts = False
        """Whether its events are texts, which are joined. Has no meaning with `mixed`."""
        self.bytes = envelope_bytes(rules.type, rules.max_batch_size)


class Windows:
    """The open windows of one batcher. Not thread-safe."""

    def __init__(self, options: BatchOptions) -> None:
        self.closed: deque[Closed] = deque()
        self._max_frame_bytes = options.max_frame_bytes
        # With `mixed`, an audience has one window, with these rules. Otherwise it has one for each type.
        self._mixed = options.rules(MIXED) if options.mixed else None
        self._open: dict[Audience, dict[str, _Window]] = {}
        self._audiences_of: dict[User, dict[Audience, None]] = {}  # those of the open windows
        # A heap of (deadline, number, window). A window that closes early stays here, without its events, until its
        # deadline, or until the heap is longer than `_longest`.
        self._deadlines: list[tuple[float, int, _Window]] = []
        self._longest = _CLOSED_KEPT
        self._numbers = 0

    def add(self, event: Event, type_rules: TypeRules, key: str | None, now: float) -> Event | None:
        """Add an event with the rules of its type and the JSON of its key. Return the event that it replaced."""
        audience = event.audience
        if type_rules.critical:
            # Events that came before it are delivered before it. Later events open new windows.
            self.close_due(now)
            self._close_all("critical", now, self._heard_by(audience))
            self.closed.append(Closed(audience, event.type, (event,), "critical", now))
            return None
        rules = self._mixed or type_rules
        if not rules.batched:
            self.closed.append(Closed(audience, rules.type, (event,), "size_limit", now))
            return None

        types = self._open.get(audience)
        window = types.get(rules.type) if types else None
        if window is not None and window.deadline <= now:
            window = self._expire(window, now)
        # The class first: it takes less time than `is_text`.
        body = event.body
        plain_json = body.__class__ is str and self._mixed is None
        text = self._mixed is None and not plain_json and is_text(body)
        if window is not None and window.texts is not text and window.events:
            window = self._close(window, "kind", now)
        if window is None:
            window = self._open_window(rules, audience, now)
            if rules.leading:
                self.closed.append(Closed(audience, rules.type, (event,), "leading", now))
                return None

        place: object = key if self._mixed is None else (event.type, key)
        old = None if key is None else window.events.get(place)
        # Without a call for most events.
        size, others = len(body) + 1 if plain_json else self._bytes(event, rules), len(window.events)
        if old is not None:
            size, others = size - self._bytes(old, rules), others - 1
        if others and window.bytes + size > self._max_frame_bytes:
            window = self._close(window, "size_limit", now) or self._open_window(rules, audience, now)
            old, size = None, self._bytes(event, rules)
        if text and not window.events:
            window.texts, window.bytes = True, -rules.join_bytes
        if key is None:
            window.keyless += 1
            place = window.keyless
        elif old is not None:
            del window.events[place]  # the newer event is added at the end
        window.events[place] = event
        window.bytes += size
        if len(window.events) >= rules.max_batch_size:
            self._close(window, "size_limit", now)
        return old

    def due(self, event: Event, type_rules: TypeRules, ahead: int, ahead_bytes: int, now: float) -> float:
        """Return when the windows must be checked because of an event that was not added yet: a time, or `NOW`.

        `ahead` events, this one included, and `ahead_bytes` were not added yet. If all of them joined its window, it
        might be full.

        May be called while another thread changes the windows. A harmless race: this only looks things up, and at worst
        the answer is that of a moment ago.
        """
        rules = self._mixed or type_rules
        if type_rules.critical or not rules.batched or ahead >= rules.max_batch_size:
            return NOW
        types = self._open.get(event.audience)
        window = types.get(rules.type) if types else None
        if window is None or window.deadline <= now:
            return NOW if rules.leading or ahead_bytes > self._max_frame_bytes else now + rules.batch_window
        if len(window.events) + ahead >= rules.max_batch_size or window.bytes + ahead_bytes > self._max_frame_bytes:
            return NOW
        if window.texts is not is_text(event.body) and self._mixed is None and window.events:
            return NOW
        return window.deadline

    def next_deadline(self) -> float:
        """Return when `close_due` must be called next: a time, `NOW` or `NEVER`."""
        if self.closed:
            return NOW
        while self._deadlines and not self._is_open(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else NEVER

    def open_since(self) -> float:
        """Return when the oldest window was opened that has an event; `NEVER` if there is none.

        May be called while another thread changes the windows. A harmless race: each value was true a moment ago.
        """
        windows = [window for _, _, window in list(self._deadlines)]
        return min(
            (each.deadline - each.rules.batch_window for each in windows if self._is_open(each) and each.events),
            default=NEVER,
        )

    def close_due(self, now: float) -> None:
        """Close the windows whose deadline has come, the earliest deadline first."""
        while self._deadlines and self._deadlines[0][0] <= now:
            window = heapq.heappop(self._deadlines)[2]
            if self._is_open(window):
                self._expire(window, now)

    def close_all(self, reason: BatchReason, now: float) -> None:
        """Close every window, the oldest first."""
        self.close_due(now)
        self._close_all(reason, now, self._open)

    def _heard_by(self, audience: Audience) -> Iterable[Audience]:
        """Return the audiences of open windows whose streams are, or may be, those of this audience."""
        if audience == BROADCAST:
            return self._open
        if isinstance(audience, str):
            return audience, BROADCAST
        found = (other for user in audience for other in self._audiences_of.get(user, ()))
        return dict.fromkeys((*found, BROADCAST))

    def _close_all(self, reason: BatchReason, now: float, audiences: Iterable[Audience]) -> None:
        windows = [window for audience in audiences for window in self._open.get(audience, {}).values()]
        for window in sorted(windows, key=lambda window: window.number):
            if window.events:
                self._close(window, reason, now)

    def _is_open(self, window: _Window) -> bool:
        return self._open.get(window.audience, {}).get(window.rules.type) is window

    def _open_window(self, rules: TypeRules, audience: Audience, now: float) -> _Window:
        self._numbers += 1
        window = _Window(rules, audience, now + rules.batch_window, self._numbers)
        types = self._open.get(audience)
        if types is None:
            types = self._open[audience] = {}
            for user in users_of(audience):
                self._audiences_of.setdefault(user, {})[audience] = None
        types[rules.type] = window
        heapq.heappush(self._deadlines, (window.deadline, window.number, window))
        if len(self._deadlines) > self._longest:
            self._forget_closed()
        return window

    def _forget_closed(self) -> None:
        """Take the windows that have closed out of the heap. The more windows are open, the less often it is called."""
        open_ones = [entry for entry in self._deadlines if self._is_open(entry[2])]
        heapq.heapify(open_ones)
        self._longest = 2 * len(open_ones) + _CLOSED_KEPT
        self._deadlines = open_ones

    def _close(self, window: _Window, reason: BatchReason, now: float) -> _Window | None:
        """Close a window. With `leading`, open the next one and return it: each window has one frame at most."""
        rules, audience = window.rules, window.audience
        types = self._open[audience]
        del types[rules.type]
        if not types:
            del self._open[audience]
            for user in users_of(audience):
                of_user = self._audiences_of[user]
                del of_user[audience]
                if not of_user:
                    del self._audiences_of[user]
        if not window.events:
            return None  # a pause has followed the leading event, so the next event is a leading one again
        join = rules.join if window.texts else None
        since = window.deadline - rules.batch_window
        self.closed.append(Closed(audience, rules.type, tuple(window.events.values()), reason, since, join))
        window.events = {}  # the heap may keep the window for a long time, and its events would stay in memory
        return self._open_window(rules, audience, now) if rules.leading else None

    def _expire(self, window: _Window, now: float) -> _Window | None:
        """Close a window whose deadline has come. Return the window that is open at `now`, if any."""
        following = self._close(window, "time_window", window.deadline)
        if following is not None and following.deadline <= now:
            return self._close(following, "time_window", now)
        return following

    def _bytes(self, event: Event, rules: TypeRules) -> int:
        """Return the bytes that an event adds to the frame: in a batch, its JSON and a comma; for texts, the join."""
        if self._mixed is not None:
            return mixed_bytes(event.type) + len(event.json) + 1
        body = event.body
        return len(body) + 1 if body.__class__ is str else body_bytes(body) + rules.join_bytes
