"""Options: what may be set, and what the error says where it may not."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace
from decimal import Decimal
from typing import Any

import pytest

from sse_batcher import BatchOptions, ClientOptions, ConfigurationError, HistoryOptions, SSEBatcherError, SSEManager
from sse_batcher.options import BATCH_OPTION_NAMES, CLIENT_OPTION_NAMES, HISTORY_OPTION_NAMES, batch_options

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [True, False, None, "1", b"1", NAN, INF, -INF, [1], Decimal(1), 1j]
NO_WHOLE_NUMBERS = [*NO_NUMBERS, 0, -1, 1.0, 1.5, 0.0]
NO_NUMBERS_BUT_NONE = [value for value in NO_NUMBERS if value is not None]
NO_WHOLE_NUMBERS_BUT_NONE = [value for value in NO_WHOLE_NUMBERS if value is not None]

GOOD = {
    "batch_window": [0, 0.0, 0.001, 1, 9.999, 10, 10.0],
    "max_batch_size": [1, 2, 2**31, 10**30],
    "max_frame_bytes": [1, 2**31],
    "dedup_key": [None, "", "id", lambda event_type, data: None, str],
    "join": ["", "\n", "\r\n", " ", "<hr>", "\u2028", "\U0001f600"],
    "critical_types": [(), [], set(), {"x"}, ("x", "x"), ["error"]],
    "mixed": [True, False],
    "leading": [True, False],
    "max_pending_bytes": [1, 2**40],
    "per_type": [
        {},
        {"log": {}},
        {"log": {"batch_window": 1.0, "dedup_key": None}},
        {"x": {"leading": True, "join": ""}},
    ],
    "queue_frames": [1, 10**6],
    "queue_bytes": [1, 2**31],
    "heartbeat": [0.001, 1, 15.0, 3600],
    "send_timeout": [0.001, 1, 30.0, 3600],
    "max_stream_age": [None, 0.001, 1800, 31_536_000],
    "max_clients": [None, 1, 10**6],
    "max_clients_per_user": [None, 1, 10**6],
    "revalidate_every": [0.001, 30, 86_400],
    "transport": ["attached", "auto"],
    "poll_wait": [0.001, 1, 25.0, 3600],
    "http2": ["refuse", "allow"],
    "compress": [(), [], {"prices"}, ("a",), ["prices", "*", "prices"]],
    "retry_ms": [None, 1, 60_000],
    "history_frames": [1, 10**6],
    "history_bytes": [1, 2**40],
    "history_age": [None, 0.001, 60, 31_536_000],
}
BAD = {
    # option: [(values, what the message says)]
    "batch_window": [
        (NO_NUMBERS, "batch_window must be a number of seconds, not"),
        ([-1, -0.001, 10.001, 11, 100, 10**400], r"batch_window is in seconds, from 0 \(no batching\) to 10, not"),
    ],
    "max_batch_size": [(NO_WHOLE_NUMBERS, "max_batch_size must be a whole number of events, at least 1, not")],
    "max_frame_bytes": [(NO_WHOLE_NUMBERS, "max_frame_bytes must be a whole number of bytes, at least 1, not")],
    "dedup_key": [([1, True, ["a"], b"id", ("a", "b")], "dedup_key must be the name of a field, a callable")],
    "join": [
        ([None, True, 1, b"", ["\n"], ("", "")], "join must be a str that comes between texts, not"),
        (["\0", "a\0\n"], "join: the text contains NUL, which cannot be sent"),
        (["\ud800", "a\udfff"], "join: the text contains the lone surrogate"),
    ],
    "critical_types": [
        (["error", "", b"error", None, 1], "critical_types must be several types, such as {'error'}, not"),
        ([[1], [None], [b"error"]], "critical_types: the type must be a string"),
        ([["x_batch"], ["mixed"]], "critical_types: the type '.*' is reserved"),
        ([[""], ["x" * 129]], "critical_types: the type must have 1 to 128 characters"),
    ],
    "mixed": [([None, 0, 1, "true", []], "mixed must be True or False, not")],
    "leading": [([None, 0, 1, "true", []], "leading must be True or False, not")],
    "max_pending_bytes": [(NO_WHOLE_NUMBERS, "max_pending_bytes must be a whole number of bytes, at least 1, not")],
    "per_type": [
        ([None, [], "log", {"log": 1.0}, {"log": None}, {"log": ["leading"]}], "per_type must be a mapping such as"),
        (
            [{"log": {"mixed": True}}, {"log": {"batchWindow": 1}}, {"log": {1: 2}}],
            r"per_type\['log'\] may set batch_window, max_batch_size, dedup_key, join, leading, not",
        ),
        ([{"x_batch": {}}, {"": {}}, {1: {}}], "per_type: the type"),
        ([{"log": {"batch_window": 100}}], r"per_type\['log'\]: batch_window is in seconds"),
        ([{"log": {"max_batch_size": 0}}], r"per_type\['log'\]: max_batch_size must be a whole number of events"),
        ([{"log": {"dedup_key": 1}}], r"per_type\['log'\]: dedup_key must be"),
        ([{"log": {"join": None}}], r"per_type\['log'\]: join must be a str"),
        ([{"log": {"join": "\0"}}], r"per_type\['log'\]: join: the text contains NUL"),
        ([{"log": {"leading": 1}}], r"per_type\['log'\]: leading must be True or False"),
    ],
    "queue_frames": [(NO_WHOLE_NUMBERS, "queue_frames must be a whole number of frames, at least 1, not")],
    "queue_bytes": [(NO_WHOLE_NUMBERS, "queue_bytes must be a whole number of bytes, at least 1, not")],
    "heartbeat": [
        (NO_NUMBERS, "heartbeat must be a number of seconds, not"),
        ([0, 0.0, -1, 3601, 15_000], "heartbeat is in seconds, more than 0 and at most 3600, not"),
    ],
    "send_timeout": [
        (NO_NUMBERS, "send_timeout must be a number of seconds, not"),
        ([0, 0.0, -1, 3601, 30_000], "send_timeout is in seconds, more than 0 and at most 3600, not"),
    ],
    "poll_wait": [
        (NO_NUMBERS, "poll_wait must be a number of seconds, not"),
        ([0, 0.0, -1, 3601, 25_000], "poll_wait is in seconds, more than 0 and at most 3600, not"),
    ],
    "max_stream_age": [
        (NO_NUMBERS_BUT_NONE, "max_stream_age must be a number of seconds, not"),
        ([0, 0.0, -1, 31_536_001], "max_stream_age is in seconds, more than 0 and at most 31536000, not"),
    ],
    "max_clients": [(NO_WHOLE_NUMBERS_BUT_NONE, "max_clients must be a whole number of clients, at least 1, not")],
    "max_clients_per_user": [
        (NO_WHOLE_NUMBERS_BUT_NONE, "max_clients_per_user must be a whole number of clients, at least 1, not")
    ],
    "transport": [([None, True, "", "detached", b"auto"], "transport must be one of 'auto', 'attached', not")],
    "http2": [([None, True, "", "attached", b"allow"], "http2 must be one of 'refuse', 'allow', not")],
    "revalidate_every": [
        (NO_NUMBERS, "revalidate_every must be a number of seconds, not"),
        ([0, -1, 86_401], "revalidate_every is in seconds, more than 0 and at most 86400, not"),
    ],
    "history_frames": [(NO_WHOLE_NUMBERS, "history_frames must be a whole number of frames, at least 1, not")],
    "history_bytes": [(NO_WHOLE_NUMBERS, "history_bytes must be a whole number of bytes, at least 1, not")],
    "history_age": [
        (NO_NUMBERS_BUT_NONE, "history_age must be a number of seconds, not"),
        ([0, 0.0, -1, 31_536_001], "history_age is in seconds, more than 0 and at most 31536000, not"),
    ],
    "compress": [
        (["prices", "", b"prices", None, True, 1], r"compress must be several channels, such as \['prices'\], not"),
        ([[1], [None], [b"prices"]], "compress: the channel must be a string"),
        ([[""], ["x" * 129]], "compress: the channel must have 1 to 128 characters"),
        ([["a\nb"]], "compress: the channel"),
    ],
    "retry_ms": [(NO_WHOLE_NUMBERS_BUT_NONE, "retry_ms must be a whole number of milliseconds")],
}


NAMES = {
    **dict.fromkeys(BATCH_OPTION_NAMES, BatchOptions),
    **dict.fromkeys(CLIENT_OPTION_NAMES, ClientOptions),
    **dict.fromkeys(HISTORY_OPTION_NAMES, HistoryOptions),
}


def options_with(name: str, value: Any) -> Any:
    return NAMES[name](**{name: value})


def test_every_option_is_tested_here() -> None:
    assert sorted(GOOD) == sorted(BAD) == sorted(NAMES)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_a_value_that_can_be_meant_is_taken(name: str, value: Any) -> None:
    taken = getattr(options_with(name, value), name)
    assert taken == (frozenset(value) if name in ("critical_types", "compress") else value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, value, message) for name, cases in BAD.items() for values, message in cases for value in values],
)
def test_an_invalid_value_is_refused_with_the_options_name_and_unit(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}") as caught:
        options_with(name, value)
    assert caught.value.option == name
    assert isinstance(caught.value, SSEBatcherError)
    assert isinstance(caught.value, ValueError)


def test_the_message_shows_the_value() -> None:
    with pytest.raises(ConfigurationError, match=r"not 100$"):
        BatchOptions(batch_window=100)
    with pytest.raises(ConfigurationError, match=r"not '50'$"):
        BatchOptions(max_batch_size="50")  # type: ignore[arg-type]


def test_the_defaults_are_those_of_the_contract() -> None:
    assert BatchOptions() == BatchOptions(
        batch_window=0.1,
        max_batch_size=50,
        max_frame_bytes=262_144,
        dedup_key="server",
        join="\n",
        critical_types={"hub_state", "error"},
        mixed=False,
        leading=False,
        max_pending_bytes=67_108_864,
        per_type={},
    )
    assert ClientOptions() == ClientOptions(
        queue_frames=256,
        queue_bytes=1_048_576,
        heartbeat=15.0,
        send_timeout=30.0,
        max_stream_age=1800.0,
        max_clients=None,
        max_clients_per_user=None,
        revalidate_every=30.0,
        transport="auto",
        poll_wait=25.0,
        retry_ms=None,
        compress=frozenset(),
        http2="refuse",
    )
    assert HistoryOptions() == HistoryOptions(history_frames=10_000, history_bytes=33_554_432, history_age=None)


@pytest.mark.parametrize("name", NAMES)
def test_options_do_not_change(name: str) -> None:
    value = GOOD[name][-1]
    options = options_with(name, value)
    with pytest.raises(FrozenInstanceError):
        setattr(options, name, value)


def test_options_do_not_change_with_what_they_were_made_of() -> None:
    critical, own = {"x"}, {"leading": True}
    per_type = {"log": own}
    options = BatchOptions(critical_types=critical, per_type=per_type)
    critical.add("y")
    own["leading"] = 7
    per_type["more"] = {}
    assert options.critical_types == {"x"}
    assert options.per_type == {"log": {"leading": True}}
    with pytest.raises(TypeError):
        options.per_type["more"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        options.per_type["log"]["leading"] = False  # type: ignore[index]


# -- per type ----------------------------------------------------------------------------------------------------------


def test_what_a_type_sets_wins_and_the_rest_is_inherited() -> None:
    options = BatchOptions(
        batch_window=0.5,
        max_batch_size=7,
        dedup_key="id",
        join="\r\n",
        leading=True,
        critical_types={"alarm"},
        per_type={"log": {"batch_window": 2, "dedup_key": None, "join": ""}, "alarm": {"leading": False}},
    )
    log, alarm, other = (options.rules(name) for name in ("log", "alarm", "other"))
    assert (log.batch_window, log.max_batch_size, log.dedup_key, log.leading, log.critical) == (2, 7, None, True, False)
    assert (alarm.batch_window, alarm.dedup_key, alarm.leading, alarm.critical) == (0.5, "id", False, True)
    assert (other.batch_window, other.dedup_key, other.leading, other.critical) == (0.5, "id", True, False)
    assert log.type == "log"
    assert (log.join, log.join_bytes) == ("", 0)
    assert (alarm.join, other.join, other.join_bytes) == ("\n", "\n", len("\ndata: "))  # CR and CRLF arrive as LF


@pytest.mark.parametrize(
    ("options", "by_default"),
    [
        (BatchOptions(), True),
        (replace(BatchOptions(), leading=True), True),
        (batch_options({"enabled": True, "batchWindow": 100, "maxBatchSize": 50}), True),
        (BatchOptions(per_type={"log": {"batch_window": 1.0}}), True),
        (BatchOptions(dedup_key="server"), False),
        (replace(BatchOptions(dedup_key="server"), leading=True), False),
        (batch_options({"batchWindow": 100}, BatchOptions(dedup_key="server")), False),
        (BatchOptions(per_type={"log": {"dedup_key": "server"}}), False),
    ],
)
def test_the_default_key_differs_from_the_same_name_given(options: BatchOptions, by_default: bool) -> None:
    rules = options.rules("log")
    assert (rules.dedup_key, rules.dedup_by_default) == ("server", by_default)
    assert type(rules.dedup_key) is str  # which `enqueue` is fast for


@pytest.mark.parametrize("name", ["batch_window", "max_batch_size", "join", "leading"])
def test_in_a_mixed_window_a_type_sets_only_its_dedup_key(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^per_type\['log'\] may set dedup_key with mixed=True, not {name}$"):
        BatchOptions(mixed=True, per_type={"log": {name: 1}})
    assert BatchOptions(mixed=True, per_type={"log": {"dedup_key": "id"}}).rules("log").dedup_key == "id"


# -- the batching argument ---------------------------------------------------------------------------------------------


def test_batching_is_on_with_true_and_off_with_false() -> None:
    base = BatchOptions(batch_window=2, leading=True, mixed=True, per_type={"log": {"dedup_key": "id"}})
    assert batch_options(True) == BatchOptions()
    assert batch_options(True, base) is base
    off = batch_options(False, base)
    assert (off.max_batch_size, off.mixed, off.leading, off.dedup_key, dict(off.per_type)) == (
        1,
        False,
        False,
        None,
        {},
    )
    assert off.critical_types == base.critical_types


def test_options_are_taken_as_they_are() -> None:
    options = BatchOptions(batch_window=2)
    assert batch_options(options) is options


def test_the_mapping_of_the_original_is_in_milliseconds() -> None:
    options = batch_options({"enabled": True, "batchWindow": 250, "maxBatchSize": 20})
    assert options == BatchOptions(batch_window=0.25, max_batch_size=20)


def test_the_mapping_leaves_what_it_does_not_name() -> None:
    base = BatchOptions(batch_window=2, max_batch_size=7, leading=True)
    assert batch_options({}, base) == base
    assert batch_options({"maxBatchSize": 3}, base) == BatchOptions(batch_window=2, max_batch_size=3, leading=True)


def test_the_mapping_turns_batching_off() -> None:
    assert batch_options({"enabled": False, "maxBatchSize": 20}).max_batch_size == 1


@pytest.mark.parametrize("window_ms", [0, 1, 1.5, 10_000])
def test_a_window_of_the_mapping_may_be_zero_or_1_to_10_000(window_ms: float) -> None:
    assert batch_options({"batchWindow": window_ms}).batch_window == window_ms / 1000


MAPPING_ERRORS = [
    ({"batchWindow": value}, r"batching\['batchWindow'\] is in milliseconds: 0 \(no batching\) or 1 to 10000, not")
    for value in (0.1, 0.5, 0.999, -1, 10_001, 1e9)
]
MAPPING_ERRORS += [
    ({"batchWindow": value}, r"batching\['batchWindow'\] must be a number of milliseconds, not") for value in NO_NUMBERS
]
MAPPING_ERRORS += [
    ({"maxBatchSize": value}, r"batching\['maxBatchSize'\] must be a whole number of events, at least 1, not")
    for value in NO_WHOLE_NUMBERS
]
MAPPING_ERRORS += [
    ({"enabled": value}, r"batching\['enabled'\] must be True or False, not") for value in (None, 0, 1, "yes")
]
MAPPING_ERRORS += [
    ({"enabled": True, name: 1}, f"batching does not know {name}: the mapping has enabled, batchWindow")
    for name in ("batch_window", "max_batch_size", "window", "BatchWindow", "", 7)
]
MAPPING_ERRORS += [
    (value, "batching must be True, False, a BatchOptions or a mapping")
    for value in (None, 0, 1, "true", 0.1, ["enabled"], BatchOptions, ClientOptions())
]


@pytest.mark.parametrize(("batching", "message"), MAPPING_ERRORS)
def test_an_invalid_batching_argument_is_refused(batching: Any, message: str) -> None:
    for refuse in (batch_options, lambda value: SSEManager(batching=value)):
        with pytest.raises(ConfigurationError, match=f"^{message}") as caught:
            refuse(batching)
        assert caught.value.option == "batching"


def test_one_error_names_all_unknown_names_of_the_mapping() -> None:
    with pytest.raises(ConfigurationError, match="does not know a, b:"):
        batch_options({"b": 1, "a": 1})


def test_the_mapping_is_checked_also_where_it_turns_batching_off() -> None:
    with pytest.raises(ConfigurationError, match=re.escape("batching['batchWindow']")):
        batch_options({"enabled": False, "batchWindow": -1})


@pytest.mark.parametrize("backend", ["", "memory", "http://localhost", None, 7])
def test_an_unknown_backend_is_refused(backend: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^backend must be .*, not") as caught:
        SSEManager(backend=backend)
    assert caught.value.option == "backend"
