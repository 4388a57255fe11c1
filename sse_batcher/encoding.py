"""The encoding of data as JSON, and the check of what other encoders make.

Pure.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from .errors import InvalidEventError

Encode = Callable[[Any], str]
encode_string: Callable[[str], str] = json.encoder.encode_basestring_ascii
"""The JSON of one string, as `encode_json` makes it, in a quarter of the time."""


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
    except ENCODE_ERRORS as error:
        raise not_json(error, data, field) from error


ENCODE_ERRORS = (TypeError, ValueError, RecursionError)
"""What an encoder raises for data that it cannot encode. `not_json` says why."""


def not_json(error: Exception, data: object, field: str = "data") -> InvalidEventError:
    """Return the error for data for which an encoder has raised this one of `ENCODE_ERRORS`."""
    what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    if what.startswith("Out of range float"):  # Python's message does not name the place
        what = _not_finite(data, field) or what
    elif what.endswith("is not JSON serializable"):
        what += ". json_default=, or the JSON provider of a Flask app, can convert such objects"
    return InvalidEventError(f"the {field} cannot be sent as JSON: {what}", field=field)


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
