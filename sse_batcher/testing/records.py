"""What a test has sent: each event as it was enqueued, and assertions about them.

Any thread may enqueue. Takes no lock: single steps of a list are atomic.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

from ..encoding import Encode, encode_data
from ..errors import InvalidEventError, UsageError
from ..event import (
    BROADCAST,
    NOT_GIVEN,
    Event,
    NotGiven,
    Text,
    User,
    check_channel,
    check_key,
    check_text,
    check_type,
    check_user,
)
from ..manager import SSEManager
from .matching import contains, find_unsendable, is_same
from .stage import Clock, Stage, staged

MAX_SHOWN = 10
"""The most events that a failed assertion shows."""
MAX_SHOWN_CHARACTERS = 300
"""The most characters that it shows of one event's data."""


class Sent:
    """One event that was enqueued. It passed all checks, so production would have sent it."""

    __slots__ = ("_encode", "event", "key_json", "replaced")

    def __init__(self, event: Event, key: str | None, encode: Encode) -> None:
        self.key_json = key
        """The JSON of its key, in which 7 and "7" are two keys. None if it has none."""
        self._encode = encode
        self.event = event
        self.replaced = False
        """Whether a newer event with the same key has replaced it before its window closed, so that no client gets
        it."""

    @property
    def type(self) -> str:
        """Its type."""
        return self.event.type

    @property
    def data(self) -> Any:
        """Its data as clients get it: what the JSON says, or a `Text`."""
        return self.event.data

    @property
    def channel(self) -> str | None:
        """Its channel, ``*`` for a broadcast. None if it is for users."""
        return self.event.channel

    @property
    def users(self) -> tuple[User, ...]:
        """The users that it is for. Empty if it is for a channel."""
        return self.event.users

    @property
    def user(self) -> User | None:
        """The user that it is for. None if it is for a channel, or for several users."""
        return self.users[0] if len(self.users) == 1 else None

    @property
    def key(self) -> Any:
        """The key by which it replaces older events, its own or that of `dedup_key`. None if it has none."""
        return None if self.key_json is None else json.loads(self.key_json)

    def has_data(self, expected: Any) -> bool:
        """Return whether its data is what clients get for this value."""
        return self._may_be(expected) and is_same(self.data, expected, self._as_sent)

    def contains(self, expected: Any) -> bool:
        """Return whether its data has this part."""
        return self._may_be(expected) and contains(self.data, expected, self._as_sent)

    def find_unsendable(self, expected: Any) -> Any:
        """Return a value in this data that its manager could not send. None if there is none."""
        return find_unsendable(expected, self._as_sent)

    def _may_be(self, expected: Any) -> bool:
        """A `Text` is only what was sent as one. In dicts and lists, JSON knows only strings."""
        return self.event.is_text or not (isinstance(expected, Text) and isinstance(self.data, str))

    def _as_sent(self, value: Any) -> Any:
        """Return a value as clients get it, such as the text of a date; the value itself if it cannot be sent."""
        try:
            if isinstance(value, str):
                return check_text(value) if self.event.is_text else value
            return json.loads(encode_data(self._encode, value))
        except InvalidEventError:
            return value

    def __repr__(self) -> str:
        data = repr(self.data)
        if len(data) > MAX_SHOWN_CHARACTERS:
            data = f"{data[:MAX_SHOWN_CHARACTERS]}..."
        kind = "Text " if self.event.is_text else ""
        key = "" if self.key_json is None else f", key {self.key_json}"
        replaced = ", replaced by a newer one" if self.replaced else ""
        return f"<{self.type!r} {_audience(self.event)}: {kind}{data}{key}{replaced}>"


class Recording(Sequence[Sent]):
    """The events that were sent while it recorded, in their order: a sequence of `Sent`.

    `clock` is the time of the test, which stands still until `Clock.advance`.
    """

    def __init__(self, reaches: Callable[[SSEManager], bool], stage: Stage) -> None:
        self.clock: Clock = stage.clock
        self.refused = 0
        """How many events were refused, because a check has failed."""
        self._reaches = reaches
        self._stage = stage
        self._sent: list[Sent] = []

    def assert_sent(
        self,
        event_type: str,
        data: Any = NOT_GIVEN,
        *,
        containing: Any = NOT_GIVEN,
        channel: str | NotGiven = NOT_GIVEN,
        user: User | NotGiven = NOT_GIVEN,
        key: str | int | NotGiven = NOT_GIVEN,
        times: int | None = None,
    ) -> Sent:
        """Check that such an event was sent, and return the newest one. What is not given may be anything.

        `data`
            All of its data. Values that JSON does not have, such as dates, are compared as they are sent. 1 and 1.0 are
            the same number, and 1 and True differ.
        `containing`
            A part of its data: a piece of a text; some fields of a dict; an element of a list, or a list of some
            elements in their order. Fields and elements may be parts, too, at any depth, but a string in them has to be
            the whole one. Something empty is a part only of something empty.
        `channel`
            Its channel, ``*`` for broadcasts.
        `user`
            One of the users that it is for.
        `key`
            Its key, its own or that of `BatchOptions.dedup_key`.
        `times`
            How many such events were sent, exactly.

        Raises `AssertionError`, which shows what was sent instead, the nearest first, and `UsageError` for arguments
        that no event can have.
        """
        __tracebackhide__ = True
        wanted = _Wanted(event_type, data, containing, channel, user, key)
        found = [sent for sent in self._sent if wanted.matches(sent)]
        if times is not None and (isinstance(times, bool) or not isinstance(times, int) or times < 1):
            raise UsageError(f"times= is a number from 1 on, not {times!r}: for none, call assert_not_sent()")
        if not found or times not in (None, len(found)):
            count = "" if times is None else f" {len(found)} times, not {times}" if found else f" {times} times"
            raise AssertionError(f"{wanted} was {'' if found else 'not '}sent{count}. {self._instead(wanted)}")
        return found[-1]

    def assert_not_sent(
        self,
        event_type: str,
        data: Any = NOT_GIVEN,
        *,
        containing: Any = NOT_GIVEN,
        channel: str | NotGiven = NOT_GIVEN,
        user: User | NotGiven = NOT_GIVEN,
        key: str | int | NotGiven = NOT_GIVEN,
    ) -> None:
        """Check that no such event was sent. The arguments are those of `assert_sent`.

        A broadcast is for each channel and each user.

        Raises `UsageError` if it would always pass: for a `user` such as ``"7"`` if 7 got it, and no event is for a
        user of that type; for a `key` such as ``"7"`` if it was sent with the key 7, and no event of this type has a
        key of that type; and for data that cannot be sent.
        """
        __tracebackhide__ = True
        wanted = _Wanted(event_type, data, containing, channel, user, key, is_for_all_too=True)
        found = [sent for sent in self._sent if wanted.matches(sent)]
        if found:
            raise AssertionError("\n".join([f"{wanted} was sent:", *_shown(found)]))
        wanted.check_types(self._sent)
        wanted.check_data(self._sent)

    def clear(self) -> None:
        """Forget what was sent so far."""
        self._sent.clear()
        self.refused = 0

    def lose_history(self) -> None:
        """Let the history be lost, as when the server or Redis restarts without it.

        Streams that are open stay open. One that comes back gets ``sse_gap``, with the reason ``epoch``.
        """
        self._stage.lose_history(self._reaches)

    @overload
    def __getitem__(self, index: int) -> Sent: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sent]: ...
    def __getitem__(self, index: int | slice) -> Sent | list[Sent]:
        return self._sent[index]

    def __len__(self) -> int:
        return len(self._sent)

    def __iter__(self) -> Iterator[Sent]:
        return iter(list(self._sent))

    def __repr__(self) -> str:
        return f"<Recording: {self._sent!r}>"

    def _instead(self, wanted: _Wanted) -> str:
        """Return what was sent instead, for a message."""
        refused = f" {self.refused} were refused: see the signal event_refused." if self.refused else ""
        if not self._sent:
            return f"Nothing was sent.{refused}"
        nearest = sorted(self._sent, key=wanted.distance)
        return "\n".join([f"This was sent, the nearest first:{refused}", *_shown(nearest)])

    # -- for the stage -------------------------------------------------------------------------------------------------

    def reaches(self, manager: SSEManager) -> bool:
        return self._reaches(manager)

    def add(self, event: Event, key: str | None, encode: Encode) -> None:
        self._sent.append(Sent(event, key, encode))

    def remove(self, event: Event) -> None:
        self._sent = [sent for sent in self._sent if sent.event is not event]

    def replace(self, event: Event) -> None:
        for sent in reversed(self._sent):
            if sent.event is event:
                sent.replaced = True
                return

    def count_refusal(self) -> None:
        self.refused += 1


class _Wanted:
    """What an assertion asks for. Raises `UsageError` if no event can be like that.

    `is_for_all_too`: broadcasts, which all clients get, are for each channel and user.
    """

    def __init__(
        self,
        event_type: str,
        data: Any,
        containing: Any,
        channel: str | NotGiven,
        user: User | NotGiven,
        key: str | int | NotGiven,
        *,
        is_for_all_too: bool = False,
    ) -> None:
        if data is not NOT_GIVEN and containing is not NOT_GIVEN:
            raise UsageError("data= is all of the data and containing= a part of it: give one of them")
        if channel is not NOT_GIVEN and user is not NOT_GIVEN:
            raise UsageError("an event is for a channel or for users, never both: give channel= or user=")
        try:
            self.type = check_type(event_type)
            self.channel = channel if isinstance(channel, NotGiven) else check_channel(channel)
            self.user = user if isinstance(user, NotGiven) else check_user(user)
            self.key = None if isinstance(key, NotGiven) else check_key(key)
        except InvalidEventError as error:
            raise UsageError(f"no event can be like that: {error}") from error
        self.data = data
        self.containing = containing
        self._is_for_all_too = is_for_all_too
        self._any_type_of_user = False
        self._any_type_of_key = False

    def check_types(self, events: Sequence[Sent]) -> None:
        """Raise `UsageError` if the app uses the other type for its users or keys: then no event would ever match.

        Call it after `matches` has found nothing: from here on, 7 matches "7" if nothing is of the type that is given.
        """
        __tracebackhide__ = True
        users = [user for sent in events for user in sent.users]
        keys = [sent.key for sent in events if sent.type == self.type]
        self._any_type_of_user = not any(type(user) is type(self.user) for user in users)
        self._any_type_of_key = not any(type(key) is type(self._plain_key()) for key in keys)
        for sent in filter(self.matches, events):
            for other in sent.users:
                if str(other) == str(self.user) and other != self.user:
                    raise UsageError(
                        f"{self.user!r} and {other!r} are two users, and it was sent to {other!r}: {sent!r}"
                    )
            other_key = sent.key_json
            raise UsageError(f"{self.key} and {other_key} are two keys, and it was sent with {other_key}: {sent!r}")

    def check_data(self, events: Sequence[Sent]) -> None:
        """Raise `UsageError` if the data cannot be sent: then no event would ever match."""
        __tracebackhide__ = True
        expected = self._expected()
        found = [sent.find_unsendable(expected) for sent in events if sent.type == self.type]
        if found and expected is not NOT_GIVEN and all(each is not None for each in found):
            raise UsageError(f"no event can have {found[0]!r} in its data: it cannot be sent as JSON")

    def matches(self, sent: Sent) -> bool:
        return not any(self._differences(sent))

    def distance(self, sent: Sent) -> float:
        """Return how different an event is: 0 for what was asked for."""
        other_type, other_audience, other_key, other_data = self._differences(sent)
        return (
            4 * other_type * (1 - _likeness(self.type, sent.type) / 2)
            + 2 * other_audience
            + other_key
            + other_data * (1 - _likeness(repr(self._expected()), repr(sent.data)) / 2)
        )

    def _expected(self) -> Any:
        return self.containing if self.data is NOT_GIVEN else self.data

    def _plain_key(self) -> Any:
        return None if self.key is None else json.loads(self.key)

    def _differences(self, sent: Sent) -> tuple[bool, bool, bool, bool]:
        """Whether type, audience, key and data differ."""
        is_for_all = self._is_for_all_too and sent.channel == BROADCAST
        other_channel = self.channel is not NOT_GIVEN and sent.channel != self.channel and not is_for_all
        other_user = self.user is not NOT_GIVEN and not any(map(self._is_user, sent.users)) and not is_for_all
        other_key = self.key is not None and not self._is_key(sent)
        other_data = self.data is not NOT_GIVEN and not sent.has_data(self.data)
        other_part = self.containing is not NOT_GIVEN and not sent.contains(self.containing)
        return sent.type != self.type, other_channel or other_user, other_key, other_data or other_part

    def _is_user(self, user: User) -> bool:
        return user == self.user or (self._any_type_of_user and str(user) == str(self.user))

    def _is_key(self, sent: Sent) -> bool:
        if sent.key_json == self.key:
            return True
        key, own = sent.key, self._plain_key()
        return self._any_type_of_key and key is not None and (str(key) == str(own) or key == own)

    def __str__(self) -> str:
        text = repr(self.type)
        if self.data is not NOT_GIVEN:
            text += f" with the data {_data_shown(self.data)}"
        if self.containing is not NOT_GIVEN:
            text += f" containing {_data_shown(self.containing)}"
        if self.channel is not NOT_GIVEN:
            text += " to all clients" if self.channel == "*" else f" to the channel {self.channel!r}"
        if self.user is not NOT_GIVEN:
            text += f" to the user {self.user!r}"
        if self.key is not None:
            text += f" with the key {self.key}"
        return text


@contextmanager
def record(source: Any = None) -> Iterator[Recording]:
    """Record events instead of delivering them: there is no thread, no server and no Redis, and time stands still.

    `source` is an `SSE` or an `SSEManager`; None: all managers of this process, also those that are made later. Each
    event passes the checks that it passes in production. Blocks may be nested: each one records what is sent inside it.
    At the end, also after an error, the managers go on as before. `open_stream` shows what a client gets meanwhile.

    >>> with record(sse) as sent:
    ...     place_order(7)
    >>> sent.assert_sent("order", {"id": 7}, channel="team-7")
    """
    reaches = _reach(source)
    with staged(reaches) as stage:
        recording = Recording(reaches, stage)
        stage.recorders.append(recording)
        try:
            yield recording
        finally:
            stage.recorders.remove(recording)


def _reach(source: Any) -> Callable[[SSEManager], bool]:
    """Return a function that says whether a manager is one of these."""
    if source is None:
        return lambda manager: True
    if isinstance(source, SSEManager):
        return lambda manager: manager is source
    managers = getattr(source, "_managers", None)
    if not callable(managers):
        raise UsageError(f"record() takes an SSE or an SSEManager, or nothing for all of them, not {source!r}")
    return lambda manager: any(manager is each for each in managers())


def _likeness(one: str, other: str) -> float:
    """Return how alike two texts are, from 0 to 1."""
    return difflib.SequenceMatcher(None, one[:MAX_SHOWN_CHARACTERS], other[:MAX_SHOWN_CHARACTERS]).ratio()


def _shown(events: list[Sent]) -> list[str]:
    lines = [f"  {sent!r}" for sent in events[:MAX_SHOWN]]
    rest = len(events) - MAX_SHOWN
    return [*lines, f"  ... and {rest} more"] if rest > 0 else lines


def _data_shown(data: Any) -> str:
    return f"Text {data!r}" if isinstance(data, Text) else repr(data)


def _audience(event: Event) -> str:
    if event.users:
        return f"to the user{'s' if len(event.users) > 1 else ''} {', '.join(map(repr, event.users))}"
    return "to all clients" if event.channel == "*" else f"to the channel {event.channel!r}"
