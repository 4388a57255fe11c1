"""Events and batches, what their names may be, and how data becomes JSON.

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
"""The most characters of a user, and the most digits."""
_TOO_LARGE = 10**MAX_USER


class NotGiven(Enum):
    """The type of `NOT_GIVEN`, which stands for an argument that the caller has left out, unlike an explicit None."""

    NOT_GIVEN = "not given"


NOT_GIVEN: Final = NotGiven.NOT_GIVEN

MIXED = "mixed"
BATCH_SUFFIX = "_batch"
# MIXED too: its batch would be named as the batches of `BatchOptions(mixed=True)` are.
RESERVED_TYPES = frozenset({"sse_open", "sse_gap", "sse_busy", "sse_bye", MIXED})

# Control characters (category Cc): a line end would forge a field. Lone surrogates (Cs), which are not UTF-8.
_FORBIDDEN_IN_NAMES = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

Encode = Callable[[Any], str]
encode_string: Callable[[str], str] = json.encoder.encode_basestring_ascii
"""The JSON of one string, as `encode_json` makes it, in a quarter of the time."""


class Event(NamedTuple):
    """One event as it was enqueued; `json` is its data, encoded in the thread that enqueued it.

    A tuple and not a dataclass, because one is made for each event of each batch.
    """

    type: str
    channel: str
    json: str

    @property
    def data(self) -> Any:
        """The data, parsed again at each access, so that a change of the result affects no other reader."""
        return json.loads(self.json)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one window held when it closed: one event or more, in the order in which they will be delivered.

    `type` is the type of its events, or ``"mixed"``. `reason` says why it closed: ``time_window``, ``size_limit``,
    ``leading``, ``critical``, ``manual`` or ``shutdown``. `timestamp` says when, in milliseconds since 1970.
    """

    channel: str
    type: str
    events: tuple[Event, ...]
    reason: BatchReason
    timestamp: int


def check_type(event_type: object) -> str:
    """Return the type as a plain `str`, or raise `InvalidEventError`."""
    name = _check_name(event_type, "type")
    if name in RESERVED_TYPES or name.endswith(BATCH_SUFFIX):
        raise InvalidEventError(
            f"the type {name!r} is reserved: {', '.join(sorted(RESERVED_TYPES))} and names that end in "
            f"{BATCH_SUFFIX!r} are for what sse_batcher itself sends. Choose another name.",
            field="type",
        )
    return name


def check_channel(channel: object) -> str:
    """Return the channel as a plain `str`, or raise `InvalidEventError`. ``*`` passes: whether it may be named is
    for the caller to say."""
    return _check_name(channel, "channel")


def check_own_channel(channel: object) -> str:
    """As `check_channel`, and refuse ``*``, which every client has and no caller may name."""
    name = check_channel(channel)
    if name == BROADCAST:
        raise broadcast_named()
    return name


def broadcast_named() -> InvalidEventError:
    """The error for a caller that names ``*``."""
    return InvalidEventError(
        "the channel '*' is every client's and cannot be named: call broadcast() to reach all of them", field="channel"
    )


def check_channels(channels: Iterable[str]) -> tuple[str, ...]:
    """The channels of one stream: 1 to 100 names, each once, in the order given."""
    if isinstance(channels, str):
        raise InvalidEventError(f"channels must be several names, not one string: use ({channels!r},)", field="channel")
    names = tuple(dict.fromkeys(check_own_channel(channel) for channel in channels))
    if not 1 <= len(names) <= MAX_CHANNELS:
        raise InvalidEventError(f"a stream has 1 to {MAX_CHANNELS} channels, not {len(names)}", field="channel")
    return names


def check_user(user: object) -> str | int:
    """Return the user as a plain `str` or `int`, or raise `InvalidEventError`. ``"7"`` and ``7`` are two users."""
    if user is None:
        raise InvalidEventError("user is None: nobody is logged in?", field="user")
    # By its real type: a proxy, such as current_user of Flask-Login, passes for the thing behind it in isinstance().
    if not issubclass(type(user), (str, int)) or isinstance(user, bool):
        raise InvalidEventError(
            f"a user is a str or an int, not {type(user).__name__}: take what names the user, such as str(user.id)",
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
    """One event of a snapshot, ``(event_type, data)``, or raise `InvalidEventError`."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidEventError(f"a state is a tuple (event_type, data), not {type(pair).__name__}")
    return pair[0], pair[1]


def _check_name(name: object, field: str) -> str:
    if not isinstance(name, str):
        raise InvalidEventError(f"the {field} must be a string, not {type(name).__name__}", field=field)
    name = str.__str__(name)  # of a str-based enum: its value
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidEventError(f"the {field} must have 1 to {MAX_NAME} characters, not {len(name)}", field=field)
    found = _FORBIDDEN_IN_NAMES.search(name)
    if found:
        raise InvalidEventError(
            f"the {field} {name!r} holds {found[0]!r}: control characters and lone surrogates are refused", field=field
        )
    return name


def json_encoder(default: Callable[[Any], Any] | None = None) -> Encode:
    """An encoder to one line of compact ASCII JSON. `default` is called for what JSON does not know, as in
    `json.JSONEncoder`. Thread-safe. Raises what `JSONEncoder` raises; NaN and infinity are no JSON."""
    encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=default)

    def make() -> Callable[[Any, int], Iterable[str]]:
        # What `encoder.encode` makes anew for each call, which takes two fifths of its time.
        accelerated = getattr(json.encoder, "c_make_encoder", None)
        return accelerated({}, encoder.default, encode_string, None, ":", ",", False, False, False)  # type: ignore[misc, no-any-return]

    try:
        idle = deque([make()])
    except TypeError:  # this Python has none, or one of another signature

        def encode_slowly(data: Any) -> str:  # a method cannot be marked
            return encoder.encode(data)

        return trusted(encode_slowly)

    def encode(data: Any) -> str:
        # Each remembers the containers that it is in, to find circles: it is used by one call at a time, also where one
        # call interrupts another, and thrown away after an error.
        try:
            accelerated = idle.pop()
        except IndexError:
            accelerated = make()
        text = "".join(accelerated(data, 0))
        idle.append(accelerated)
        return text

    return trusted(encode)


def trusted(encode: Encode) -> Encode:
    """Mark an encoder, and return it: its text always passes `check_json`, so that nobody has to check it."""
    encode.is_trusted = True  # type: ignore[attr-defined]
    return encode


def checked(encode: Encode) -> Encode:
    """This encoder, which raises `ValueError` or `TypeError` for text that does not pass `check_json`.

    One that is `trusted` is returned as it is: the check takes longer than the encoding.
    """
    if getattr(encode, "is_trusted", False):
        return encode

    def encode_and_check(data: Any) -> str:
        text = encode(data)
        check_json(text)
        return str.__str__(text)  # of a subclass, which might join or format in its own way: the text

    return trusted(encode_and_check)


encode_json: Encode = json_encoder()
"""The encoder used unless another is given: what `json.dumps` accepts, less NaN and infinity."""


def encode_data(encode: Encode, data: Any, field: str = "data") -> str:
    """Encode with a `trusted` encoder, and turn what goes wrong into `InvalidEventError` with its cause."""
    try:
        return encode(data)
    except (TypeError, ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        if what.startswith("Out of range float"):  # of which Python before 3.12 does not say more
            what = _not_finite(data, field) or what
        raise InvalidEventError(f"the {field} cannot be sent as JSON: {what}", field=field) from error


def _not_finite(data: object, name: str) -> str | None:
    """Say where the first NaN or infinity in this data is, and what to do about it. None if there is none."""
    waiting = deque([(name, data)])
    seen = set()  # containers may be in circles
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

    A line end would begin a line of its own on the wire, and sizes are counted in characters. Any depth passes.
    """
    if not isinstance(text, str):
        raise TypeError(f"encode() returned {type(text).__name__}, not a str")
    if not text.isascii():
        raise ValueError("encode() returned text that is not ASCII: use ensure_ascii=True")
    if "\n" in text or "\r" in text:
        raise ValueError("encode() returned text with a line end: leave out the indentation")
    try:
        _decoder.decode(text)
    except RecursionError:  # each version of Python, and each depth of the caller, has another limit
        _check_deep_json(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"encode() returned {constant}, which is not JSON: use allow_nan=False")


# Numbers become floats, since an int of thousands of digits is JSON, and Python refuses to read it.
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
    """As the decoder, but without recursion: many times slower, and any depth passes."""
    closing: list[str] = []  # what ends the containers that are open
    expected = _VALUE  # the kinds of what may come next: a sign, or t(ext), v(alue), k(ey) and e(nd)
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
