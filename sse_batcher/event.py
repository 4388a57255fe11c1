"""Events and batches, and the rules for their names, users, keys and texts.

Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple

from .encoding import ENCODE_ERRORS, Encode, encode_string, not_json
from .errors import InvalidEventError
from .reasons import BatchReason

BROADCAST = "*"
DEFAULT_CHANNEL = "default"
MAX_NAME = 128
MAX_CHANNELS = 100
MAX_USER = 256
"""The most characters of a user that is a `str`, and the most digits of one that is an `int`."""
_TOO_LARGE = 10**MAX_USER
MAX_KEY = 1_024
"""The most characters of a key: what it takes is not counted as pending."""
MAX_USERS = 1_000
"""The most users that one event can be for."""
USER_BYTES = 100
"""About the memory that each user in the audience of an event takes."""


class NotGiven(Enum):
    """The type of `NOT_GIVEN`, the default of arguments for which None has a meaning of its own."""

    NOT_GIVEN = "not given"


NOT_GIVEN: Final = NotGiven.NOT_GIVEN

MIXED = "mixed"
"""A reserved type: its batches would have the name of those of `BatchOptions(mixed=True)`."""
BATCH_SUFFIX = "_batch"
RESERVED_PREFIX = "sse_"
_DATA_FIELD_BYTES = len("data: ")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Control characters (category Cc), since a line end would forge a field. Lone surrogates (Cs), which UTF-8 lacks.
_FORBIDDEN_IN_NAMES = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

User = str | int
Users = tuple[User, ...]
Audience = str | Users
"""What an event is sent to: the clients of a channel, ``*`` for all clients, or users, in a fixed order."""

EVERY_USER: Users = ()
"""All users: an audience for what was lost, if it is not known which users it was for. No event has it."""


class Text(str):
    """Text that goes out as it is, instead of JSON: HTML, Markdown, log lines, tokens.

    It is not escaped. For HTML, use a template with autoescape, or ``markupsafe.Markup("<b>{}</b>").format(name)``.
    Line ends arrive as LF. NUL and lone surrogates are refused when the event is enqueued. Make it in the last step:
    the methods and operators of a `Text` return a plain `str`, which is sent as JSON. Raises `InvalidEventError` unless
    the text is a `str`.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Text:
        if not isinstance(text, str):
            raise InvalidEventError(f"a Text is made from a str, not from {type(text).__name__}", field="data")
        return str.__new__(cls, text)  # `super` takes longer, and each event that is a text passes here


class Key(str):
    """The JSON of a key that was given with an event. Equals that of a key that `dedup_key` has found."""

    __slots__ = ()


class Event(NamedTuple):
    """One event as it was enqueued. Immutable."""

    # A tuple and not a dataclass, because each call of `enqueue` makes one.
    type: str
    """Its type."""
    audience: Audience
    """What it is sent to: a channel, or a tuple of users. See `channel` and `users`."""
    body: str
    """Its data on the wire: a `Text`, or JSON, encoded in the thread of the call."""

    @property
    def channel(self) -> str | None:
        """The channel, ``*`` for a broadcast. None if the event is for users."""
        return channel_of(self.audience)

    @property
    def users(self) -> Users:
        """The users whose streams get it. Empty if the event is for a channel."""
        return users_of(self.audience)

    @property
    def is_text(self) -> bool:
        """Whether it was enqueued as a `Text`."""
        return is_text(self.body)

    @property
    def json(self) -> str:
        """The data as JSON: of a text, its JSON string."""
        return encode_string(self.body) if is_text(self.body) else self.body

    @property
    def data(self) -> Any:
        """The data, a `Text` or what the JSON says. Made at each access, so that changing it changes nothing else."""
        return self.body if is_text(self.body) else json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Batch:
    """The events of one window when it closed: one or more, in the order of delivery. Immutable."""

    audience: Audience
    """What it is sent to: a channel, or a tuple of users. See `channel` and `users`."""
    type: str
    """The type of its events, or ``"mixed"``."""
    events: tuple[Event, ...]
    """Its events, oldest first."""
    reason: BatchReason
    """Why the window closed, such as ``"time_window"``."""
    timestamp: int
    """When the window closed, in milliseconds since 1970."""
    join: str | None = None
    """What comes between its texts when they are sent as one event. None if they are not texts, or not all."""

    @property
    def channel(self) -> str | None:
        """The channel, ``*`` for a broadcast. None if the batch is for users."""
        return channel_of(self.audience)

    @property
    def users(self) -> Users:
        """The users whose streams get it. Empty if the batch is for a channel."""
        return users_of(self.audience)


def channel_of(audience: Audience) -> str | None:
    """Return the channel, None if the audience is users."""
    return audience if isinstance(audience, str) else None


def users_of(audience: Audience) -> Users:
    """Return the users, none if the audience is a channel."""
    return () if isinstance(audience, str) else audience


def audience_bytes(audience: Audience) -> int:
    """Return about how much memory the users of an event take, 0 if it is for a channel."""
    return 0 if isinstance(audience, str) else USER_BYTES * len(audience)


def is_text(body: str) -> bool:
    """Return whether the body of an event is a text and not JSON."""
    return isinstance(body, Text)


def body_bytes(body: str) -> int:
    """Return the bytes that the body of an event takes on the wire, without the first ``data: ``."""
    return len(body) if body.__class__ is str else text_bytes(body)  # JSON is ASCII on one line


def text_bytes(text: str) -> int:
    """Return the bytes that a text takes on the wire, without the first ``data: ``: each line has one of its own."""
    return (len(text) if text.isascii() else len(text.encode())) + _DATA_FIELD_BYTES * text.count("\n")


def check_type(event_type: object) -> str:
    """Return an event's type as a plain `str`, or raise `InvalidEventError`."""
    name = _check_name(event_type, "type")
    if name == MIXED or name.startswith(RESERVED_PREFIX) or name.endswith(BATCH_SUFFIX):
        raise InvalidEventError(
            f"the type {name!r} is reserved: {MIXED!r}, names that begin with {RESERVED_PREFIX!r} and names that end "
            f"in {BATCH_SUFFIX!r} are for what sse_batcher itself sends. Choose another name.",
            field="type",
        )
    return name


def check_channel(channel: object) -> str:
    """Return the channel as a plain `str`, or raise `InvalidEventError`. Accepts ``*``."""
    return _check_name(channel, "channel")


def check_own_channel(channel: object) -> str:
    """As `check_channel`, but refuse ``*``, which every client has without naming it."""
    name = check_channel(channel)
    if name == BROADCAST:
        raise broadcast_named()
    return name


def broadcast_named() -> InvalidEventError:
    """Return the error for a caller that names ``*``."""
    return InvalidEventError(
        "the channel '*' is every client's and cannot be named: call broadcast() to reach all of them", field="channel"
    )


def check_channels(channels: Iterable[str], *, may_be_none: bool = False) -> tuple[str, ...]:
    """Return the channels of one stream, each once, in the given order. Raises `InvalidEventError` unless 1 to 100.

    `may_be_none`: no channel is allowed, too, because the stream has a user.
    """
    if isinstance(channels, str):
        raise InvalidEventError(f"channels must be several names, not one string: use ({channels!r},)", field="channel")
    names = tuple(dict.fromkeys(check_own_channel(channel) for channel in channels))
    if not (names or may_be_none) or len(names) > MAX_CHANNELS:
        raise InvalidEventError(
            f"a stream has 1 to {MAX_CHANNELS} channels, not {len(names)}; without a channel, it has a user",
            field="channel",
        )
    return names


def check_users(user: object) -> Users:
    """Return one user, or several in a list, tuple or set, as an audience. Raises `InvalidEventError`."""
    # A named tuple, such as a row of a database, is one thing: its fields are no users, though they may look like some.
    several = isinstance(user, (list, tuple, AbstractSet)) and not hasattr(user, "_fields")
    if not several and isinstance(user, (Mapping, Iterator)):
        raise InvalidEventError(f"several users are a list, tuple or set, not {type(user).__name__}", field="user")
    if not several:
        return (check_user(user),)
    assert isinstance(user, Collection)
    users = {check_user(each) for each in user}
    if not 1 <= len(users) <= MAX_USERS:
        advice = "split them up" if users else "leave the call out"
        raise InvalidEventError(f"an event is for 1 to {MAX_USERS} users, not {len(users)}: {advice}", field="user")
    return tuple(sorted(users, key=_user_order))  # the same users in any order share a window


def _user_order(user: User) -> tuple[bool, User]:
    return isinstance(user, str), user  # a str and an int cannot be compared


def check_audience(channel: object, user: object) -> Audience:
    """Return for whom an event is, if these are given with it; each may be `NOT_GIVEN`. Raises `InvalidEventError`."""
    if user is NOT_GIVEN:
        return DEFAULT_CHANNEL if channel is NOT_GIVEN else check_own_channel(channel)
    if channel is not NOT_GIVEN:
        raise InvalidEventError(
            "an event is for a channel or for users, not both: leave channel= or user= out, or call twice", field="user"
        )
    return check_users(user)


def check_user(user: object) -> User:
    """Return the user as a plain `str` or `int`, or raise `InvalidEventError`. ``"7"`` and ``7`` are two users."""
    if user is None:
        raise InvalidEventError("user is None: nobody is logged in?", field="user")
    # type() and not isinstance(), which a proxy deceives, for example Flask-Login's current_user.
    if not issubclass(type(user), (str, int)) or isinstance(user, bool):
        raise InvalidEventError(
            f"a user is a str or an int, not {type(user).__name__}: use a name or an id, such as str(user.id)",
            field="user",
        )
    if isinstance(user, str):
        name = str.__str__(user)
        if not 1 <= len(name) <= MAX_USER:
            raise InvalidEventError(f"a user has 1 to {MAX_USER} characters, not {len(name)}", field="user")
        return name
    assert isinstance(user, int)
    number = int(user)
    if abs(number) >= _TOO_LARGE:
        raise InvalidEventError(f"a user that is an int has at most {MAX_USER} digits", field="user")
    return number


def check_key(key: object) -> Key:
    """Return the JSON of the `key` of an event, so that 1 and "1" are two keys, or raise `InvalidEventError`."""
    kind = type(key)  # and not isinstance(), which a proxy deceives
    if issubclass(kind, str):
        text = str.__str__(key)
        if len(text) > MAX_KEY:
            raise InvalidEventError(f"a key has at most {MAX_KEY} characters, not {len(text)}", field="key")
        return Key(encode_string(text))
    if not issubclass(kind, int) or kind is bool:
        raise InvalidEventError(f"a key is a str or an int, not {kind.__name__}", field="key")
    try:
        return Key(int.__repr__(key))
    except ValueError as error:
        raise InvalidEventError(f"a key that is an int has fewer digits: {error}", field="key") from error


def check_text(text: str) -> Text:
    """Return a text as it arrives, with LF for CR and CRLF. Raises `InvalidEventError` for what cannot be sent."""
    if type(text) is not Text:
        # The characters of a subclass, whose methods may do anything; and of a proxy, which is another text later.
        text = Text(str.__str__(text) if issubclass(type(text), str) else text)
    if "\r" in text:
        text = Text(text.replace("\r\n", "\n").replace("\r", "\n"))
    if "\0" in text:
        raise InvalidEventError("the text contains NUL, which cannot be sent: remove it", field="data")
    if not text.isascii() and (found := _LONE_SURROGATE.search(text)):
        raise InvalidEventError(
            f"the text contains the lone surrogate {found[0]!r}, which is not UTF-8: remove it, or decode the text "
            f"with errors='replace'",
            field="data",
        )
    return text


def check_no_html(data: object) -> None:
    """Raise `InvalidEventError` for HTML that is not a `Text`: it would arrive as a JSON string, with its quotes."""
    if isinstance(data, str) and hasattr(data, "__html__"):
        raise InvalidEventError(
            f"the data is HTML ({type(data).__name__}): send it as Text(html), or as a JSON string with str(html)",
            field="data",
        )


def encode_body(encode: Encode, data: Any) -> str:
    """Return the data of an event as it is sent: a `Text`, or JSON of this encoder, which is `trusted` or `checked`.

    Raises `InvalidEventError`.
    """
    if isinstance(data, Text):
        return check_text(data)
    if data.__class__ is not dict:
        check_no_html(data)
    try:  # as `encode_data`, without another call: each event passes here
        return encode(data)
    except ENCODE_ERRORS as error:
        raise not_json(error, data) from error


def check_pair(pair: object) -> tuple[Any, Any]:
    """Return one event of a snapshot, ``(event_type, data)``, or raise `InvalidEventError`."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidEventError(f"a state is a tuple (event_type, data), not {type(pair).__name__}")
    return pair[0], pair[1]


def _check_name(name: object, field: str) -> str:
    if not isinstance(name, str):
        is_several = field == "channel" and isinstance(name, (list, tuple, set))
        hint = ": for several channels, call once for each" if is_several else ""
        raise InvalidEventError(f"the {field} must be a string, not {type(name).__name__}{hint}", field=field)
    name = str.__str__(name)  # for an enum that is a str: its value
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidEventError(f"the {field} must have 1 to {MAX_NAME} characters, not {len(name)}", field=field)
    found = _FORBIDDEN_IN_NAMES.search(name)
    if found:
        raise InvalidEventError(
            f"the {field} {name!r} contains {found[0]!r}: control characters and lone surrogates are refused",
            field=field,
        )
    return name
