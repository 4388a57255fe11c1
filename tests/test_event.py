"""Events: their names, their data, and the JSON that is made of it."""

from __future__ import annotations

import enum
import functools
import json
import re
import sys
import unicodedata
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher import Batch, Event, InvalidEventError
from sse_batcher.encoding import check_json, checked, encode_data, encode_json, encode_string, json_encoder
from sse_batcher.event import check_channel, check_channels, check_own_channel, check_type

NAME_CHECKS = [check_type, check_channel, check_own_channel]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Kind(str, enum.Enum):  # noqa: UP042  # as apps have them
    LOG = "log"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", NAME_CHECKS)
@pytest.mark.parametrize("name", ["x", "x" * 128, "message", "a b", " x ", "a:b", "größe", "日本", "😀" * 128, "<b>"])
def test_a_name_has_1_to_128_characters_of_any_script(check: Any, name: str) -> None:
    assert check(name) == name


@pytest.mark.parametrize("check", NAME_CHECKS)
@pytest.mark.parametrize("name", ["", "x" * 129, "😀" * 129, "x" * 1_000_000])
def test_a_name_that_is_empty_or_too_long_is_refused(check: Any, name: str) -> None:
    with pytest.raises(InvalidEventError, match=f"must have 1 to 128 characters, not {len(name)}$"):
        check(name)


@pytest.mark.parametrize("check", NAME_CHECKS)
@pytest.mark.parametrize("name", [None, 1, True, b"log", ["log"], ("log",), object, float("nan")])
def test_a_name_that_is_no_string_is_refused(check: Any, name: Any) -> None:
    with pytest.raises(InvalidEventError, match=f"must be a string, not {type(name).__name__}"):
        check(name)


def test_exactly_control_characters_and_lone_surrogates_are_refused_in_a_name() -> None:
    def is_refused(character: str) -> bool:
        try:
            check_type("a" + character)
        except InvalidEventError:
            return True
        return False

    everything = map(chr, range(sys.maxunicode + 1))
    wrong = [c for c in everything if is_refused(c) != (unicodedata.category(c) in {"Cc", "Cs"})]
    assert wrong == []


@pytest.mark.parametrize("character", ["\n", "\0", "\x7f", "\x85", "\ud800"])
@pytest.mark.parametrize(("check", "field"), [(check_type, "type"), (check_channel, "channel")])
def test_a_refusal_names_the_field_and_the_character(check: Any, field: str, character: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        check(f"log{character}")
    assert caught.value.field == field
    assert f"the {field} " in str(caught.value)
    assert repr(character) in str(caught.value)
    str(caught.value).encode()  # can be logged


@pytest.mark.parametrize("check", NAME_CHECKS)
def test_a_string_enum_becomes_its_value(check: Any) -> None:
    name = check(Kind.LOG)
    assert name == "log"
    assert type(name) is str


@pytest.mark.parametrize("name", ["sse_open", "sse_gap", "sse_busy", "sse_bye", "sse_", "sse_own", "mixed", "x_batch"])
def test_a_reserved_type_is_refused_and_says_which_are(name: str) -> None:
    with pytest.raises(InvalidEventError, match=r"reserved: 'mixed', .*with 'sse_' .* end in '_batch' .*Choose"):
        check_type(name)


@pytest.mark.parametrize(
    "name", ["batch", "_batches", "sse", "sse-open", "SSE_open", "open", "error", "Mixed", "mixed_"]
)
def test_a_type_that_only_looks_reserved_is_taken(name: str) -> None:
    assert check_type(name) == name


def test_a_reserved_type_is_an_ordinary_channel() -> None:
    assert check_own_channel("sse_open") == "sse_open"


def test_the_channel_of_all_is_a_channel_that_nobody_may_name() -> None:
    assert check_channel("*") == "*"
    with pytest.raises(InvalidEventError, match=r"call broadcast\(\)") as caught:
        check_own_channel("*")
    assert caught.value.field == "channel"


# -- the channels of a stream ------------------------------------------------------------------------------------------


def test_the_channels_of_a_stream_keep_their_order_and_come_once() -> None:
    assert check_channels(["b", "a", "b", Kind.LOG, "log"]) == ("b", "a", "log")


def test_a_stream_has_1_to_100_channels() -> None:
    names = [str(number) for number in range(101)]
    assert check_channels(iter(names[:100])) == tuple(names[:100])
    for wrong in (names, []):
        with pytest.raises(InvalidEventError, match=f"1 to 100 channels, not {len(wrong)}"):
            check_channels(wrong)


def test_one_string_is_not_the_channels_of_a_stream() -> None:
    with pytest.raises(InvalidEventError, match=r"not one string: use \('default',\)"):
        check_channels("default")


@pytest.mark.parametrize("wrong", ["*", "", "a\nb", "\ud800", None, 1, "x" * 129])
def test_one_wrong_channel_refuses_the_stream(wrong: Any) -> None:
    with pytest.raises(InvalidEventError) as caught:
        check_channels(["default", wrong])
    assert caught.value.field == "channel"


# -- data --------------------------------------------------------------------------------------------------------------


@given(json_values)
def test_data_comes_back_from_one_line_of_ascii(value: Any) -> None:
    text = encode_json(value)
    assert text.isascii()
    assert text.isprintable()
    assert Event("log", "default", text).data == value


@given(json_values)
def test_json_is_compact(value: Any) -> None:
    assert encode_json(value) == json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (None, "null"),
        (True, "true"),
        (0, "0"),
        (-1.5, "-1.5"),
        ("", '""'),
        ("a\nb", r'"a\nb"'),
        ("\u2028é", r'"\u2028\u00e9"'),
        ("\ud800", r'"\ud800"'),
        ({1: "a", None: "b", False: "c", 1.5: "d"}, '{"1":"a","null":"b","false":"c","1.5":"d"}'),
        ((1, [2, ()]), "[1,[2,[]]]"),
        (Kind.LOG, '"log"'),
        (10**4000, "1" + "0" * 4000),
    ],
)
def test_what_the_encoder_of_python_accepts_is_accepted(data: Any, text: str) -> None:
    assert encode_data(encode_json, data) == text


def test_a_lone_surrogate_in_data_arrives_as_an_escape_and_comes_back() -> None:
    assert Event("log", "default", encode_json({"\udfff": "\ud800"})).data == {"\udfff": "\ud800"}


@given(st.text(st.characters()))
def test_a_string_encodes_the_same_the_fast_way(text: str) -> None:
    assert encode_string(text) == encode_json(text)


def test_a_default_is_called_for_what_json_does_not_know() -> None:
    assert json_encoder(default=sorted)({"a": {2, 1}}) == '{"a":[1,2]}'


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda data: '"é"', "ensure_ascii=True"),
        (functools.partial(json.dumps, indent=2), "a line end: leave out the indentation"),
        (lambda data: "[1,\r2]", "a line end"),
        (lambda data: '"a\x01"', "Invalid control character"),
        (lambda data: json.dumps(float("nan")), "NaN, which is not JSON: use allow_nan=False"),
        (lambda data: json.dumps([-float("inf")]), "-Infinity, which is not JSON"),
        (lambda data: json.dumps(data).encode(), "bytes, not a str"),
        (lambda data: None, "NoneType, not a str"),
        (lambda data: "", "Expecting value"),
        (str, "Expecting"),
        (lambda data: "[" * 200_000 + "]" * 199_999, "not JSON from character 399999 on"),
        (lambda data: "[" * 200_000 + "}" * 200_000, "not JSON from character 200000 on"),
    ],
)
def test_an_encoder_that_returns_no_line_of_json_is_refused(encode: Any, said: str) -> None:
    with pytest.raises(InvalidEventError, match=re.escape(said)) as caught:
        encode_data(checked(encode), {"a": ["x"]})
    assert caught.value.field == "data"


def test_an_encoder_may_nest_deeper_than_python_reads() -> None:
    text = '[{"a":' * 100_000 + "null" + "}]" * 100_000
    assert encode_data(checked(lambda data: text), None) == text


def test_an_encoder_may_write_longer_numbers_than_python_reads() -> None:
    text = "1" * 10_000
    with pytest.raises(ValueError, match="limit"):
        json.loads(text)
    assert encode_data(checked(lambda data: text), None) == text


def test_the_text_of_an_encoder_becomes_a_plain_string() -> None:
    class Shouting(str):
        def __str__(self) -> str:
            return self.upper()

    text = encode_data(checked(lambda data: Shouting('"a"')), None)
    assert (text, type(text)) == ('"a"', str)


def test_an_encoder_of_ours_is_not_checked_and_one_that_was_checked_not_twice() -> None:
    assert checked(encode_json) is encode_json
    once = checked(json.dumps)
    assert once is not json.dumps
    assert checked(once) is once


DEPTH = 100_000
"""So many levels are too deep for the decoder of every version of Python."""


def accepts(check: Any, text: str) -> bool:
    try:
        check(text)
    except ValueError:
        return False
    return True


@given(json_values, st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["", *'[]{},:"\\ua01-+.eE tfn']))))
def test_deep_text_is_read_by_the_same_rules(value: Any, changes: list[tuple[float, str]]) -> None:
    text = json.dumps(value)
    for place, character in changes[:2]:
        at = int(place * len(text))
        text = text[:at] + character + text[at + 1 :]
    shallow, deep = [f"{'[' * depth}{text}{']' * depth}" for depth in (20, DEPTH)]
    assert accepts(check_json, deep) == accepts(check_json, shallow)


def test_the_data_of_an_event_is_parsed_anew_at_each_access() -> None:
    event = Event("log", "default", '{"a":[1]}')
    event.data["a"].append(2)
    assert event.data == {"a": [1]}


def test_events_and_batches_do_not_change() -> None:
    event = Event("log", "default", "1")
    with pytest.raises(AttributeError):
        event.json = "2"  # type: ignore[misc]
    batch = Batch("default", "log", (event,), "manual", 1)
    with pytest.raises(FrozenInstanceError):
        batch.type = "x"  # type: ignore[misc]


def test_an_encoding_that_interrupts_another_of_the_same_data_sees_no_circle_in_it() -> None:
    answers = iter([lambda: encode(data), lambda: "inner"])
    encode = json_encoder(lambda value: next(answers)())
    data = {"value": object()}
    assert json.loads(encode(data)) == {"value": '{"value":"inner"}'}


def test_an_encoding_that_failed_leaves_nothing_behind() -> None:
    encode = json_encoder()
    data: dict[str, Any] = {"a": [object()]}
    for _ in range(3):
        with pytest.raises(TypeError, match="not JSON serializable"):
            encode(data)
    data["a"] = [data]
    for _ in range(3):
        with pytest.raises(ValueError, match="Circular"):
            encode(data)
    data["a"] = [1]
    assert encode(data) == '{"a":[1]}'


@pytest.mark.parametrize("accelerated", [None, lambda: None], ids=["none", "one of another signature"])
def test_a_python_without_the_accelerated_encoder_encodes_the_same(
    monkeypatch: pytest.MonkeyPatch, accelerated: Any
) -> None:
    data = {"a": [1, 2.5, None, "\u2028"], 5: True}
    monkeypatch.setattr(json.encoder, "c_make_encoder", accelerated)
    encode = json_encoder()
    monkeypatch.undo()
    assert encode(data) == encode_json(data)
