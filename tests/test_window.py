"""The rules of batching: each test says when a window closes, and which events it has."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher import wire
from sse_batcher.batching.window import NEVER, NOW, Closed, Windows
from sse_batcher.encoding import encode_json
from sse_batcher.event import Audience, Event, Text
from sse_batcher.options import BatchOptions

from .kit.batching import SteppedBatcher

WINDOW = 0.1


def test_a_window_closes_a_batch_window_after_its_first_event() -> None:
    batcher = SteppedBatcher()
    for n in range(3):
        batcher.enqueue("log", n)
        batcher.advance(0.03)
    assert batcher.sent() == []
    batcher.advance(0.01)
    assert batcher.sent() == [[0, 1, 2]]
    assert batcher.batches[0].reason == "time_window"


def test_events_that_keep_coming_do_not_put_off_the_end_of_a_window() -> None:
    batcher = SteppedBatcher()
    for n in range(10):
        batcher.enqueue("log", n)
        batcher.advance(0.09)
    # Windows open at 0, 0.18, 0.36 ...: each has two events, and none waited longer than one window.
    assert batcher.sent() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_a_full_window_closes_at_once() -> None:
    batcher = SteppedBatcher(max_batch_size=3)
    for n in range(7):
        batcher.enqueue("log", n)
    batcher.step()
    assert batcher.sent() == [[0, 1, 2], [3, 4, 5]]
    assert {batch.reason for batch in batcher.batches} == {"size_limit"}


def test_the_timer_of_a_window_that_was_full_does_not_close_the_next_one_early() -> None:
    batcher = SteppedBatcher(max_batch_size=2)
    batcher.enqueue("log", 0)
    batcher.advance(0.09)
    batcher.enqueue("log", 1)
    batcher.advance(0.005)
    batcher.enqueue("log", 2)  # at 0.095
    batcher.advance(0.099)
    assert batcher.sent() == [[0, 1]]
    batcher.advance(0.001)
    assert batcher.sent() == [[0, 1], [2]]


@pytest.mark.parametrize("look_first", [True, False])
def test_an_event_at_the_very_end_of_a_window_opens_the_next_one(look_first: bool) -> None:
    batcher = SteppedBatcher(max_batch_size=2)
    batcher.enqueue("log", 0)
    batcher.step()
    batcher.clock.now += WINDOW
    if look_first:
        batcher.step()
    batcher.enqueue("log", 1)  # would fill the old window, if it were still open
    batcher.step()
    assert batcher.sent() == [[0]]
    batcher.advance(WINDOW)
    assert batcher.sent() == [[0], [1]]
    assert [batch.reason for batch in batcher.batches] == ["time_window", "time_window"]


def test_a_hot_type_neither_starves_nor_flushes_another() -> None:
    batcher = SteppedBatcher(max_batch_size=5)
    batcher.enqueue("quiet", "q")
    for n in range(20):
        batcher.enqueue("hot", n)
    batcher.step()
    assert [batch.type for batch in batcher.batches] == ["hot"] * 4
    batcher.advance(WINDOW)
    assert batcher.sent()[-1] == ["q"]


def test_channels_do_not_share_windows() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("log", 1, channel="a")
    batcher.enqueue("log", 2, channel="b")
    batcher.advance(WINDOW)
    assert [(batch.channel, len(batch.events)) for batch in batcher.batches] == [("a", 1), ("b", 1)]


@pytest.mark.parametrize("options", [{"batch_window": 0}, {"max_batch_size": 1}])
def test_without_a_window_or_with_a_size_of_one_nothing_is_batched(options: dict[str, Any]) -> None:
    batcher = SteppedBatcher(**options)
    batcher.enqueue("log", 1)
    batcher.enqueue("log", 2)
    batcher.step()
    assert batcher.sent() == [[1], [2]]


def test_a_window_closes_before_the_event_that_would_make_its_frame_too_large() -> None:
    batcher = SteppedBatcher(max_frame_bytes=300)
    for letter in "abc":
        batcher.enqueue("log", letter * 80)
    batcher.advance(WINDOW)
    assert [[len(data) for data in batch] for batch in batcher.sent()] == [[80, 80], [80]]
    assert [batch.reason for batch in batcher.batches] == ["size_limit", "time_window"]


def test_the_largest_event_goes_alone() -> None:
    batcher = SteppedBatcher(max_frame_bytes=300)
    batcher.enqueue("log", "small")
    batcher.enqueue("log", "x" * 298)
    batcher.advance(WINDOW)
    assert [len(batch.events) for batch in batcher.batches] == [1, 1]


# -- dedup -------------------------------------------------------------------------------------------------------------


def test_a_newer_state_replaces_the_older_one_and_takes_its_place_at_the_end() -> None:
    batcher = SteppedBatcher()
    for server, n in [("a", 1), ("b", 2), ("a", 3), (None, 4), ("c", 5)]:
        batcher.enqueue("tools", {"server": server, "n": n})
    batcher.advance(WINDOW)
    assert [data["n"] for data in batcher.sent()[0]] == [2, 3, 4, 5]
    assert batcher.get_stats().replaced == 1


def test_states_are_replaced_within_their_own_type_channel_and_window_alone() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("tools", {"server": "a"})
    batcher.enqueue("prompts", {"server": "a"})
    batcher.enqueue("tools", {"server": "a"}, channel="other")
    batcher.advance(WINDOW)
    batcher.enqueue("tools", {"server": "a"})
    batcher.advance(WINDOW)
    assert batcher.get_stats().replaced == 0
    assert len(batcher.batches) == 4


@pytest.mark.parametrize("data", [{"server": None}, {}, {"name": "a"}, ["server"], "server", 5, None])
def test_what_has_no_key_is_never_dropped(data: Any) -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("tools", data)
    batcher.enqueue("tools", data)
    batcher.advance(WINDOW)
    assert batcher.sent() == [[data, data]]


def test_keys_are_compared_by_their_json_text() -> None:
    batcher = SteppedBatcher()
    keys = [1, "1", True, "true", 1.0, ["a"], {"a": 1}, "a"]
    for key in [*keys, *keys]:
        batcher.enqueue("tools", {"server": key})
    batcher.advance(WINDOW)
    assert [data["server"] for data in batcher.sent()[0]] == keys


def test_limits_count_what_is_left_after_replacement() -> None:
    batcher = SteppedBatcher(max_batch_size=3)
    for n in range(10):
        batcher.enqueue("tools", {"server": n % 2, "n": n})
    batcher.step()
    assert batcher.sent() == []
    batcher.advance(WINDOW)
    assert [data["n"] for data in batcher.sent()[0]] == [8, 9]


def test_a_newer_state_that_does_not_fit_goes_into_the_next_window_and_both_are_sent() -> None:
    batcher = SteppedBatcher(max_frame_bytes=300)
    batcher.enqueue("tools", {"server": "a", "x": ""})
    batcher.enqueue("tools", {"server": "b", "x": "x" * 100})
    batcher.enqueue("tools", {"server": "a", "x": "x" * 150})
    batcher.advance(WINDOW)
    assert [[data["server"] for data in batch] for batch in batcher.sent()] == [["a", "b"], ["a"]]
    assert batcher.get_stats().replaced == 0


def test_a_newer_state_replaces_the_only_one_however_large_it_is() -> None:
    batcher = SteppedBatcher(max_frame_bytes=300)
    batcher.enqueue("tools", {"server": "a"})
    batcher.enqueue("tools", {"server": "a", "x": "x" * 270})
    batcher.advance(WINDOW)
    assert [len(batch) for batch in batcher.sent()] == [1]


def _by_length(event_type: str, data: Any) -> Any:
    return f"{event_type}{len(data)}"


@pytest.mark.parametrize(
    ("dedup_key", "kept"),
    [("id", ["b", "c"]), (None, ["a", "b", "c"]), (_by_length, ["b", "c"]), (lambda *_: None, ["a", "b", "c"])],
)
def test_the_key_can_be_another_field_a_callable_or_none(dedup_key: str | Callable[..., Any], kept: list[str]) -> None:
    batcher = SteppedBatcher(dedup_key=dedup_key)
    batcher.enqueue("tools", {"id": 1, "server": "s", "n": "a"})
    batcher.enqueue("tools", {"id": 1, "server": "s", "n": "b"})
    batcher.enqueue("tools", {"id": 2, "n": "c"})
    batcher.advance(WINDOW)
    assert [data["n"] for data in batcher.sent()[0]] == kept


# -- critical ----------------------------------------------------------------------------------------------------------


def test_a_critical_event_goes_at_once_after_what_came_before_it_and_before_what_comes_after() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("tools", 1)
    batcher.enqueue("prompts", 2)
    batcher.enqueue("tools", 3)
    batcher.enqueue("hub_state", "down")
    batcher.enqueue("tools", 4)
    batcher.step()
    assert batcher.sent() == [[1, 3], [2], ["down"]]
    assert {batch.reason for batch in batcher.batches} == {"critical"}
    batcher.advance(WINDOW)
    assert batcher.sent()[3:] == [[4]]


def test_several_critical_events_flush_the_windows_once_and_follow_in_order() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("tools", 1)
    for n in range(3):
        batcher.enqueue("error", f"e{n}")
    batcher.step()
    assert batcher.sent() == [[1], ["e0"], ["e1"], ["e2"]]


def test_a_critical_event_flushes_its_channel_and_the_broadcasts_alone() -> None:
    batcher = SteppedBatcher()
    for channel in ("*", "a", "b"):
        batcher.enqueue("tools", channel, channel=channel)
    batcher.enqueue("error", "boom", channel="a")
    batcher.step()
    assert batcher.sent() == [["*"], ["a"], ["boom"]]


def test_a_critical_broadcast_flushes_everything_oldest_first() -> None:
    batcher = SteppedBatcher()
    for channel in ("b", "*", "a"):
        batcher.enqueue("tools", channel, channel=channel)
    batcher.enqueue("error", "boom", channel="*")
    batcher.step()
    assert batcher.sent() == [["b"], ["*"], ["a"], ["boom"]]


def test_what_was_due_before_the_critical_event_was_closed_by_time() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("tools", 1)
    batcher.clock.now += WINDOW  # the thread is late
    batcher.enqueue("error", "boom")
    batcher.step()
    assert [batch.reason for batch in batcher.batches] == ["time_window", "critical"]


# -- per type, leading, mixed ------------------------------------------------------------------------------------------


def test_a_type_can_have_its_own_window_size_and_key() -> None:
    batcher = SteppedBatcher(per_type={"log": {"batch_window": 1.0, "dedup_key": None, "max_batch_size": 2}})
    batcher.enqueue("log", {"server": "a"})
    batcher.enqueue("tools", {"server": "a"})
    batcher.advance(WINDOW)
    assert [batch.type for batch in batcher.batches] == ["tools"]
    batcher.enqueue("log", {"server": "a"})
    batcher.step()
    assert [(batch.type, len(batch.events), batch.reason) for batch in batcher.batches[1:]] == [
        ("log", 2, "size_limit")
    ]


def test_with_leading_the_first_event_goes_at_once_and_then_one_frame_a_window() -> None:
    batcher = SteppedBatcher(leading=True)
    for n in range(5):
        batcher.enqueue("log", n)
        batcher.advance(0.03)
    assert batcher.sent() == [[0], [1, 2, 3]]  # 0 at 0.00; 1, 2, 3 at 0.10; 4 came at 0.12
    assert [batch.reason for batch in batcher.batches] == ["leading", "time_window"]
    batcher.advance(0.05)
    assert batcher.sent()[2:] == [[4]]  # at 0.20


def test_with_leading_an_empty_window_makes_it_idle_again() -> None:
    batcher = SteppedBatcher(leading=True)
    for n in range(3):
        batcher.enqueue("log", n)
        batcher.advance(WINDOW)
    assert batcher.sent() == [[0], [1], [2]]
    assert {batch.reason for batch in batcher.batches} == {"leading"}
    assert batcher.step() is None


def test_with_leading_a_late_thread_changes_nothing() -> None:
    punctual, late = SteppedBatcher(leading=True), SteppedBatcher(leading=True)
    for n, pause in enumerate([0.0, 0.05, 0.2, 0.01, 0.11, 0.5, 0.0]):
        for batcher in (punctual, late):
            batcher.clock.now += pause
        punctual.step()
        punctual.enqueue("log", n)
        late.enqueue("log", n)
    for batcher in (punctual, late):
        batcher.advance(1)
    assert late.sent() == punctual.sent()


def test_with_leading_an_event_at_the_end_of_an_empty_window_is_a_leading_one() -> None:
    options = BatchOptions(leading=True, batch_window=1)
    windows = Windows(options)
    for now in (0.0, 0.5, 2.0):  # the window after the leading event ends at 1.0, and the empty one after it at 2.0
        windows.add(Event("log", "default", f"{now}"), options.rules("log"), None, now)
    assert [(closed.events[0].json, closed.reason) for closed in windows.closed] == [
        ("0.0", "leading"),
        ("0.5", "time_window"),
        ("2.0", "leading"),
    ]
    assert windows.due(Event("log", "default", "3"), options.rules("log"), 1, 1, 2.5) == 3.0  # a window is open


def test_with_leading_a_critical_event_closes_the_window_and_the_next_one_is_as_long() -> None:
    options = BatchOptions(leading=True, batch_window=1)
    windows = Windows(options)
    for event_type, now in [("log", 0.0), ("log", 0.25), ("error", 0.5), ("log", 0.75)]:
        windows.add(Event(event_type, "default", f"{now}"), options.rules(event_type), None, now)
    assert [(closed.type, closed.events[0].json, closed.reason) for closed in windows.closed] == [
        ("log", "0.0", "leading"),
        ("log", "0.25", "critical"),
        ("error", "0.5", "critical"),
    ]
    windows.closed.clear()
    assert windows.next_deadline() == 1.5  # a batch window after the frame with the reason "critical"


@pytest.mark.parametrize("mixed", [True, False])
def test_an_event_that_needs_no_window_is_closed_with_its_type(mixed: bool) -> None:
    options = BatchOptions(max_batch_size=1, mixed=mixed)
    windows = Windows(options)
    for event_type in ("log", "error"):
        windows.add(Event(event_type, "default", "0"), options.rules(event_type), None, 0.0)
    assert [(closed.type, closed.reason) for closed in windows.closed] == [
        ("mixed" if mixed else "log", "size_limit"),
        ("error", "critical"),
    ]


def test_mixed_is_one_window_a_channel_in_total_order() -> None:
    batcher = SteppedBatcher(mixed=True)
    for n in range(3):
        batcher.enqueue("tools", {"server": "a", "n": n})
        batcher.enqueue("prompts", {"server": "a", "n": n})
    batcher.advance(WINDOW)
    (batch,) = batcher.batches
    assert batch.type == "mixed"
    # The key of a mixed window is type and key: one latest state for each.
    assert [(event.type, event.data["n"]) for event in batch.events] == [("tools", 2), ("prompts", 2)]


def test_mixed_closes_before_its_frame_is_too_large_types_included() -> None:
    batcher = SteppedBatcher(mixed=True, max_frame_bytes=400)
    for n in range(10):
        batcher.enqueue("a_rather_long_type_of_event", n)
    batcher.advance(WINDOW)
    assert len(batcher.batches) > 1
    for batch in batcher.batches:
        data = wire.batch_block(batch, "x-1").split(b"data: ")[1].split(b"\n")[0]
        assert len(data) <= 400


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(
    ("first", "newer"),
    [
        ("x" * 50, "x"),  # a smaller one makes room
        ("x", "x" * 50),  # a larger one takes it
    ],
)
@pytest.mark.parametrize("excess", [0, 1])
def test_a_window_counts_exactly_the_bytes_of_the_events_that_are_left(
    mixed: bool, first: str, newer: str, excess: int
) -> None:
    options = BatchOptions(max_frame_bytes=400, mixed=mixed)
    windows = Windows(options)
    rules = options.rules("state")

    def add(text: str, key: str | None = None) -> Event | None:
        return windows.add(Event("state", "default", encode_json(text)), rules, key, 0.0)

    add("other", "b")
    add(first, "a")
    replaced = add(newer, "a")
    assert replaced is not None
    assert replaced.json == encode_json(first)
    each = len('"",') + (wire.mixed_bytes("state") if mixed else 0)
    left = len("other") + len(newer) + 3 * each  # with the event that comes last
    room = 400 - wire.envelope_bytes("mixed" if mixed else "state", options.max_batch_size) - left
    add("x" * (room + excess))
    windows.close_all("shutdown", 0.0)
    assert [len(closed.events) for closed in windows.closed] == [[3], [2, 1]][excess]


def test_the_thread_is_needed_at_once_for_what_does_not_wait_for_a_window() -> None:
    options = BatchOptions(batch_window=1, max_batch_size=5, per_type={"bare": {"max_batch_size": 1}})
    windows = Windows(options)

    def due(event_type: str, ahead: int, now: float = 0.0) -> float:
        return windows.due(Event(event_type, "default", "0"), options.rules(event_type), ahead, 10, now)

    assert [due("log", ahead) for ahead in (1, 4, 5)] == [1.0, 1.0, NOW]
    assert [due("error", 1), due("bare", 1)] == [NOW, NOW]  # a critical one, and one without a window
    windows.add(Event("log", "default", "0"), options.rules("log"), None, 0.0)
    assert [due("log", 1, now) for now in (0.5, 1.0)] == [1.0, 2.0]  # at its end, the window is over


def test_with_leading_the_thread_is_needed_at_once_while_no_window_is_open() -> None:
    options = BatchOptions(leading=True, batch_window=1)
    windows, rules = Windows(options), options.rules("log")
    event = Event("log", "default", "0")
    assert windows.due(event, rules, 1, 10, 0.0) == NOW  # it will be a leading event
    windows.add(event, rules, None, 0.0)
    assert [windows.due(event, rules, 1, 10, now) for now in (0.5, 1.0)] == [1.0, NOW]


def test_a_window_may_be_full_once_the_waiting_events_have_joined_it() -> None:
    options = BatchOptions(max_frame_bytes=200, max_batch_size=5, batch_window=1)
    windows, rules = Windows(options), options.rules("log")
    event = Event("log", "default", "0")
    windows.add(event, rules, None, 0.0)
    room = 200 - wire.envelope_bytes("log", 5) - len("0,")
    assert windows.due(event, rules, 3, room, 0.5) == 1.0
    assert windows.due(event, rules, 4, room, 0.5) == NOW
    assert windows.due(event, rules, 3, room + 1, 0.5) == NOW


def test_a_window_that_is_not_open_yet_may_be_full_at_once() -> None:
    options = BatchOptions(max_frame_bytes=200, batch_window=1)
    windows, rules = Windows(options), options.rules("log")
    event = Event("log", "default", "0")
    assert [windows.due(event, rules, 2, size, 0.5) for size in (200, 201)] == [1.5, NOW]
    windows.add(event, rules, None, 0.0)
    assert [windows.due(event, rules, 2, size, 1.0) for size in (200, 201)] == [2.0, NOW]  # the old one is over


def test_windows_that_close_early_keep_neither_their_events_nor_the_memory_of_the_windows() -> None:
    options = BatchOptions(batch_window=10, max_batch_size=2)
    windows, rules = Windows(options), options.rules("log")
    windows.add(Event("quiet", "default", "0"), options.rules("quiet"), None, 0.0)  # this window ends first

    def grown(rounds: int) -> int:
        """How many bytes more are used after so many windows have opened, closed, and been delivered."""
        before, _ = tracemalloc.get_traced_memory()
        for number in range(2 * rounds):
            windows.add(Event("log", "default", f'"{number:0>5000}"'), rules, None, 0.1)
            windows.next_deadline()
            windows.closed.clear()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        assert grown(100) < 50 * 5_000
        assert grown(5_000) < 50 * 5_000
    finally:
        tracemalloc.stop()
    windows.close_due(10.1)
    assert [closed.type for closed in windows.closed] == ["quiet"]


# -- properties --------------------------------------------------------------------------------------------------------

RULES = st.fixed_dictionaries(
    {
        "batch_window": st.sampled_from([0, 0.001, 0.1, 10.0]),
        "max_batch_size": st.sampled_from([1, 2, 5, 2**31]),
        "max_frame_bytes": st.sampled_from([170, 300, 262_144]),
        "dedup_key": st.sampled_from(["server", None]),
        "join": st.sampled_from(["\n", "", "--"]),
        "mixed": st.booleans(),
        "leading": st.booleans(),
    }
)
AUDIENCES = ("default", "other", "*", (7,), (7, "ada"), ("ada",), ("bob",))


class Sent(NamedTuple):
    """An event of these tests, before it is one."""

    pause: float
    type: str
    audience: Audience
    text: bool
    key: int | None
    padding: str
    looks: bool
    """Whether the thread looks before it comes."""

    def event(self, number: int) -> Event:
        body = Text(f"{number} {self.padding}") if self.text else encode_json({"n": number, "x": self.padding})
        return Event(self.type, self.audience, body)

    def key_in(self, options: BatchOptions) -> str | None:
        """The key by which it is replaced: texts have one of their own, JSON has a field."""
        return None if self.key is None or (options.dedup_key is None and not self.text) else str(self.key)


ONE_EVENT = st.builds(
    Sent,
    pause=st.sampled_from([0.0, 0.0, 0.0005, 0.05, 0.1, 1.0, 10.0]),
    type=st.sampled_from(["a", "a", "b", "error"]),
    audience=st.sampled_from(AUDIENCES),
    text=st.booleans(),
    key=st.none() | st.integers(0, 2),
    padding=st.integers(0, 120).map(lambda size: "x" * size) | st.text(max_size=15),
    looks=st.booleans(),
)
# A size of at least 10 makes 20 and more usual.
EVENTS = st.lists(ONE_EVENT, max_size=10) | st.lists(ONE_EVENT, min_size=10, max_size=60)


@given(rules=RULES, events=EVENTS)
def test_what_goes_in_comes_out_once_in_order_unless_replaced(rules: dict[str, Any], events: list[Sent]) -> None:
    options = BatchOptions(**rules)
    windows = Windows(options)
    kept: list[Event] = []
    replaced: list[Event] = []
    now = 0.0
    for number, sent in enumerate(events):
        now += sent.pause
        if sent.looks:
            windows.close_due(now)
        event = sent.event(number)
        kept.append(event)
        old = windows.add(event, options.rules(sent.type), sent.key_in(options), now)
        if old is not None:
            replaced.append(old)
            assert old[:2] == event[:2]
            assert events[_number(old)].key == sent.key is not None
        assert windows.next_deadline() == NOW or windows.next_deadline() <= now + options.batch_window
    windows.close_all("shutdown", now)
    windows.close_due(now + 100)  # empty windows of `leading`
    assert windows.next_deadline() == NOW if windows.closed else NEVER

    out = [event for closed in windows.closed for event in closed.events]
    assert sorted([*out, *replaced], key=_number) == kept
    for closed in windows.closed:
        assert 1 <= len(closed.events) <= options.max_batch_size
        assert {event.audience for event in closed.events} == {closed.audience}
        _check_kind(closed, options)
    # In order: of one type and audience always, of one audience in a mixed one, and nothing overtakes a critical event.
    for audience in AUDIENCES:
        mine = [event for event in out if event.audience == audience]
        for event_type in ("a", "b", "error"):
            assert _numbers(mine, event_type) == sorted(_numbers(mine, event_type))
        if options.mixed:
            assert _numbers(mine) == sorted(_numbers(mine))
    for place, event in enumerate(out):
        if event.type == "error":
            heard = [_meet(other.audience, event.audience) for other in out]
            before = [_number(other) for other, too in zip(out[:place], heard[:place], strict=True) if too]
            after = [_number(other) for other, too in zip(out[place:], heard[place:], strict=True) if too]
            assert max(before, default=-1) < _number(event) == min(after)


def _check_kind(closed: Closed, options: BatchOptions) -> None:
    """Check that texts and JSON of one type share no window, and that several texts are joined."""
    kinds = {event.is_text for event in closed.events}
    assert options.mixed or len(kinds) == 1
    join = options.join if kinds == {True} and not options.mixed else None
    # What comes between texts has no meaning for one text.
    assert closed.join == join or (len(closed.events) == 1 and closed.join is None)


def _meet(one: Audience, other: Audience) -> bool:
    """Whether a stream may be of both because of a channel or a user that they have in common."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other or "*" in (one, other)
    return bool(set(one) & set(other))


def _number(event: Event) -> int:
    return int(event.body.partition(" ")[0]) if event.is_text else event.data["n"]


def _numbers(events: list[Event], event_type: str | None = None) -> list[int]:
    return [_number(event) for event in events if event_type in (None, event.type)]


@given(rules=RULES, events=EVENTS)
def test_how_late_the_thread_is_changes_nothing(rules: dict[str, Any], events: list[Sent]) -> None:
    options = BatchOptions(**rules)

    def run(*, punctual: bool) -> list[tuple[Any, ...]]:
        windows, now = Windows(options), 0.0
        for number, sent in enumerate(events):
            now += sent.pause
            while punctual and windows.next_deadline() <= now and not windows.closed:
                windows.close_due(windows.next_deadline())
            windows.add(sent.event(number), options.rules(sent.type), sent.key_in(options), now)
            if punctual:
                done.extend(windows.closed)
                windows.closed.clear()
        windows.close_all("shutdown", now)
        # Each number is in one batch, so it decides the order of all batches.
        return sorted(
            (_numbers(list(closed.events)), closed.events, closed.reason, closed.join)
            for closed in [*done, *windows.closed]
        )

    done: list[Any] = []
    on_time = run(punctual=True)
    done = []
    assert run(punctual=False) == on_time
