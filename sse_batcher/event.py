"""Events and batches, the rules for their names, and the encoding of data as JSON.

Pure.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple, NoReturn

from .errors import InvalidEventError
from .reasons import BatchReason

BROADCAST = "*"
DEFAULT_CHANNEL = "default"
MAX_NAME = 128
MAX_CHANNELS = 100
MAX_USER = 256
"""The most characters of a user that is a `str`, and the most digits of one that is an `int`."""
_TOO_LARGE = 10**MAX_USER


class NotGiven(Enum):
    """The type of `NOT_GIVEN`, the default of arguments for which None has a meaning of its own."""

    NOT_GIVEN = "not given"


NOT_GIVEN: Final = NotGiven.NOT_GIVEN

MIXED = "mixed"
BATCH_SUFFIX = "_batch"
# MIXED is reserved because the batches of that type would have the name of those of `BatchOptions(mixed=True)`.
RESERVED_TYPES = frozenset({"sse_open", "sse_gap", "sse_busy", "sse_bye", MIXED})

# Control characters (category Cc), since a line end would forge a field. Lone surrogates (Cs), which UTF-8 lacks.
_FORBIDDEN_IN_NAMES = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

Encode = Callable[[Any], str]
encode_string: Callable[[str], str] = json.encoder.encode_basestring_ascii
"""The JSON of one string, as `encode_json` makes it, in a quarter of the time."""


class Event(NamedTuple):
    """One event as it was enqueued. `json` is its data, encoded in the thread that enqueued it.

    A tuple and not a dataclass, because each call of `enqueue` makes one.
    """

    type: str
    channel: str
    json: str

    @property
    def data(self) -> Any:
        """The data. Parsed at each access, so that changing the result changes nothing else."""
        return json.loads(self.json)


@dataclass(frozen=True, slots=True)
class Batch:
    """The events of one window when it closed: one or more, in the order of delivery.

    `type` is the type of its events, or ``"mixed"``. `reason` says why it closed: ``time_window``, ``size_limit``,
    ``leading``, ``critical``, ``manual`` or ``shutdown``. `timestamp` says when, in milliseconds since 1970.
    """

    channel: str
    type: str
    events: tuple[Event, ...]
    reason: BatchReason
    timestamp: int


def check_type(event_type: object) -> str:
    """Return an event's type as a plain `str`, or raise `InvalidEventError`."""
    name = _check_name(event_type, "type")
    if name in RESERVED_TYPES or name.endswith(BATCH_SUFFIX):
        raise InvalidEventError(
            f"the type {name!r} is reserved: {', '.join(sorted(RESERVED_TYPES))} and names that end in "
            f"{BATCH_SUFFIX!r} are for what sse_batcher itself sends. Choose another name.",
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


def check_channels(channels: Iterable[str]) -> tuple[str, ...]:
    """Return the channels of one stream, each once, in the given order. Raises `InvalidEventError` unless 1 to 100."""
    if isinstance(channels, str):
        raise InvalidEventError(f"channels must be several names, not one string: use ({channels!r},)", field="channel")
    names = tuple(dict.fromkeys(check_own_channel(channel) for channel in channels))
    if not 1 <= len(names) <= MAX_CHANNELS:
        raise InvalidEventError(f"a stream has 1 to {MAX_CHANNELS} channels, not {len(names)}", field="channel")
    return names


def check_user(user: object) -> str | int:
    """Return the user as a plain `str` or `int`, or raise `InvalidEventError`. ``"7"`` and ``7`` are two users."""
    if user is None:
        raise InvalidEventError("user is None: is the user logged in?", field="user")
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


def check_pair(pair: object) -> tuple[Any, Any]:
    """Return one event of a snapshot, ``(event_type, data)``, or raise `InvalidEventError`."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidEventError(f"a state is a tuple (event_type, data), not {type(pair).__name__}")
    return pair[0], pair[1]


def _check_name(name: object, field: str) -> str:
    if not isinstance(name, str):
        raise InvalidEventError(f"the {field} must be a string, not {type(name).__name__}", field=field)
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


def json_encoder(default: Callable[[Any], Any] | None = None) -> Encode:
    """Return an encoder to one line of compact ASCII JSON. Thread-safe.

    `default` is called for objects that JSON does not have, as in `json.JSONEncoder`. Raises the errors of
    `json.JSONEncoder`, also for NaN and infinity.
    """
    encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=default)

    def make() -> Callable[[Any, int], Iterable[str]]:
        # `encoder.encode` makes such an object for each call, which takes two fifths of its time.
        accelerated = getattr(json.encoder, "c_make_encoder", None)
        return accelerated({}, encoder.default, encode_string, None, ":", ",", False, False, False)  # type: ignore[misc, no-any-return]

    try:
        idle = deque([make()])
    except TypeError:  # this Python does not have it, or with another signature

        def encode_slowly(data: Any) -> str:  # a function, since `trusted` sets an attribute
            return encoder.encode(data)

        return trusted(encode_slowly)

    def encode(data: Any) -> str:
        # To find circular references, each object remembers the containers that it is in. So only one call at a time
        # uses it, even if one call interrupts another, and it is dropped after an error.
        try:
            accelerated = idle.pop()
        except IndexError:
            accelerated = make()
        text = "".join(accelerated(data, 0))
        idle.append(accelerated)
        return text

    return trusted(encode)


def trusted(encode: Encode) -> Encode:
    """Mark an encoder whose text always passes `check_json`, so that it is not checked, and return it."""
    encode.is_trusted = True  # type: ignore[attr-defined]
    return encode


def checked(encode: Encode) -> Encode:
    """Return an encoder that checks this encoder's text with `check_json`.

    A `trusted` encoder is returned as it is, since the check takes longer than the encoding.
    """
    if getattr(encode, "is_trusted", False):
        return encode

    def encode_and_check(data: Any) -> str:
        text = encode(data)
        check_json(text)
        return str.__str__(text)  # a subclass of `str` might format itself in another way

    return trusted(encode_and_check)


encode_json: Encode = json_encoder()
"""The default encoder: as `json.dumps`, but NaN and infinity are refused."""


def encode_data(encode: Encode, data: Any, field: str = "data") -> str:
    """Encode with a `trusted` or `checked` encoder. Errors become an `InvalidEventError` that names the reason."""
    try:
        return encode(data)
    except (TypeError, ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        if what.startswith("Out of range float"):  # Python's message does not name the place
            what = _not_finite(data, field) or what
        raise InvalidEventError(f"the {field} cannot be sent as JSON: {what}", field=field) from error


def _not_finite(data: object, name: str) -> str | None:
    """Say where the first NaN or infinity in this data is, and what to do about it. None if there is none."""
    waiting = deque([(name, data)])
    seen = set()  # containers may contain each other
    while waiting:
        place, value = waiting.popleft()
        if isinstance(value, float) and not math.isfinite(value):
            place = place if len(place) <= 200 else f"{place[:200]}..."
            return f"{place} is {value!r}, and JSON has no NaN and no infinity. Send None instead, or a string"
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            waiting.extend((f"{place}[{reprlib.repr(key)}]", inner) for key, inner in pairs)
            if isinstance(value, dict):
                waiting.extend((f"a key of {place}", key) for key in value)
    return None


def check_json(text: object) -> None:
    """Raise `ValueError` unless this is JSON on one line of ASCII, and `TypeError` unless it is a string.

    A line end would begin another field on the wire, and sizes are counted in characters. Any nesting depth passes.
    """
    if not isinstance(text, str):
        raise TypeError(f"encode() returned {type(text).__name__}, not a str")
    if not text.isascii():
        raise ValueError("encode() returned text that is not ASCII: use ensure_ascii=True")
    if "\n" in text or "\r" in text:
        raise ValueError("encode() returned text with a line end: leave out the indentation")
    try:
        _decoder.decode(text)
    except RecursionError:  # the limit depends on the version of Python and on how deep the caller is
        _check_deep_json(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"encode() returned {constant}, which is not JSON: use allow_nan=False")


# Numbers are read as floats: Python refuses to read an int of thousands of digits, which is valid JSON.
_decoder = json.JSONDecoder(parse_int=float, parse_constant=_refuse)
_TOKEN = re.compile(
    r"""[ \t]*(?:
    (?P<text> "(?:[^"\\\x00-\x1f] | \\(?:["\\/bfnrt] | u[0-9a-fA-F]{4}))*")
    | (?P<value> -?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)? | true | false | null)
    | (?P<sign> [][{}:,])
    | (?P<end> \Z))""",
    re.VERBOSE,
)
_VALUE = "tv[{"


def _check_deep_json(text: str) -> None:
    """Check as the decoder does, but without recursion: many times slower, for any depth."""
    closing: list[str] = []  # the closing signs of the open containers
    expected = _VALUE  # the kinds of token that may come next: a sign, or t(ext), v(alue), k(ey) and e(nd)
    place = 0
    while expected:
        token = _TOKEN.match(text, place)
        kind = "" if token is None else token["sign"] or str(token.lastgroup)[0]
        if kind == "t" and "k" in expected:
            kind = "k"
        if token is None or kind not in expected:
            raise ValueError(f"encode() returned text that is not JSON from character {place} on")
        place = token.end()
        if kind == "[":
            closing.append("]")
            expected = _VALUE + "]"
        elif kind == "{":
            closing.append("}")
            expected = "k}"
        elif kind == ",":
            expected = _VALUE if closing[-1] == "]" else "k"
        elif kind in "k:":
            expected = ":" if kind == "k" else _VALUE
        else:
            if kind in "]}":
                closing.pop()
            expected = "" if kind == "e" else "," + closing[-1] if closing else "e"
