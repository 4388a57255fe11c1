"""When the data of an event is what an assertion asks for, or has it as a part.

Pure. The data is what clients get: JSON, or a text. What is asked for may also have values that JSON does not have,
such as dates. `as_sent` returns such a value as it would be sent, or the value itself if it cannot be sent. Objects
with an ``==`` of their own, such as `unittest.mock.ANY`, may be anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Number
from typing import Any

AsSent = Callable[[Any], Any]


def is_same(data: Any, expected: Any, as_sent: AsSent) -> bool:
    """Return whether this is all of the data. As ``==``, but 1 and True differ, also inside dicts and lists."""
    return _is_same(data, expected, as_sent) or _is_same(data, as_sent(expected), None)


def contains(data: Any, part: Any, as_sent: AsSent) -> bool:
    """Return whether this is a part of the data.

    Parts are all of it; a piece of a text; some fields of a dict; an element of a list, or a list of some elements in
    their order. A field or an element may be a part, too, but strings in them count only as a whole: "paid" is not a
    part of ``{"state": "unpaid"}``. Something empty is a part only of something empty.
    """
    if isinstance(data, str) and isinstance(part, str):
        piece = as_sent(part)
        return piece in data if piece else not data
    return _has_part(data, part, as_sent) or _has_part(data, as_sent(part), None)


def find_unsendable(expected: Any, as_sent: AsSent) -> Any:
    """Return the first value in it that cannot be sent, and that no data equals. None if there is none."""
    if isinstance(expected, dict):
        expected = list(expected.values())
    if isinstance(expected, (list, tuple)):
        found = (find_unsendable(each, as_sent) for each in expected)
        return next((each for each in found if each is not None), None)
    equals_no_data = (
        type(expected).__eq__ is object.__eq__  # type: ignore[comparison-overlap]  # it may be inherited
        or isinstance(expected, (set, frozenset, bytes, bytearray))
        or (isinstance(expected, float) and not math.isfinite(expected))
    )
    return expected if equals_no_data and as_sent(expected) is expected else None


def _is_same(data: Any, expected: Any, as_sent: AsSent | None) -> bool:
    """`as_sent` is None for what has been converted."""
    if isinstance(data, dict) and isinstance(expected, dict):
        fields = list(_fields(expected, as_sent))
        return len(data) == len(fields) and all(
            name in data and _is_same(data[name], value, as_sent) for name, value in fields
        )
    if isinstance(data, list) and isinstance(expected, (list, tuple)):
        return len(data) == len(expected) and all(
            _is_same(one, other, as_sent) for one, other in zip(data, expected, strict=True)
        )
    if not _differ_in_kind(data, expected) and data == expected:
        return True
    return as_sent is not None and _is_leaf(expected) and _is_same(data, as_sent(expected), None)


def _has_part(data: Any, part: Any, as_sent: AsSent | None) -> bool:
    if _is_same(data, part, as_sent):
        return True
    if isinstance(data, dict) and isinstance(part, dict):
        return bool(part) and all(
            name in data and _has_part(data[name], value, as_sent) for name, value in _fields(part, as_sent)
        )
    if isinstance(data, list):
        is_element = any(_has_part(each, part, as_sent) for each in data)
        return is_element or (isinstance(part, (list, tuple)) and _has_elements(data, part, as_sent))
    return as_sent is not None and _is_leaf(part) and _has_part(data, as_sent(part), None)


def _has_elements(data: list[Any], parts: Sequence[Any], as_sent: AsSent | None) -> bool:
    """Return whether each part has an element of its own, in the same order."""
    rest = iter(data)
    return bool(parts) and all(any(_has_part(each, part, as_sent) for each in rest) for part in parts)


def _fields(expected: dict[Any, Any], as_sent: AsSent | None) -> Iterator[tuple[Any, Any]]:
    """Yield the fields of a dict, with names as they are sent: JSON has only strings."""
    for name, value in expected.items():
        yield name if as_sent is None or isinstance(name, str) else next(iter(as_sent({name: None})), name), value


def _differ_in_kind(data: Any, expected: Any) -> bool:
    """Return whether one is a bool and the other another number: JSON has both, and Python takes them for equal."""
    return (
        isinstance(data, Number)
        and isinstance(expected, Number)
        and isinstance(data, bool) is not isinstance(expected, bool)
    )


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, (dict, list, tuple))
