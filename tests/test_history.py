"""The history alone: what it keeps, what it remembers of the rest, and what a cursor finds there."""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import tracemalloc
from collections.abc import Collection, Sequence
from types import FunctionType, ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher import HistoryOptions
from sse_batcher.encoding import encode_json
from sse_batcher.event import Batch, Event
from sse_batcher.streams import history
from sse_batcher.streams.history import History, ResumePoint
from sse_batcher.wire import Frame, chunk

MANY = 10**9
LOWERED = "an eviction after a loss lowers the floor: silent loss"


SIZES = (400, 300, 300, 301, 1_600)
VARIANTS = list(itertools.product((True, False), repeat=2))
"""The arguments of `Frame.encoded`."""


def frame(position: Any, channel: str = "a", size: int = 0, timestamp: int = 0) -> Frame:
    """A frame. With a `size`, one of so many bytes."""
    event = Event("t", channel, '""')
    made = Frame(Batch(channel, "t", (event,), "manual", timestamp), position, f"x-{position}")
    if size:
        padded = Event("t", channel, f'"{"x" * (size - len(made.plain))}"')
        made = Frame(Batch(channel, "t", (padded,), "manual", timestamp), position, made.id)
        assert len(made.plain) == size
    return made


def filled(channels: Sequence[str], **options: Any) -> History:
    """A history of one frame for each of these channels, at the positions 1, 2, 3 ..."""
    kept = History(HistoryOptions(**options), 0)
    for position, channel in enumerate(channels, 1):
        kept.append(frame(position, channel))
    return kept


def positions(kept: History, *channels: str, after: ResumePoint, frames: int = MANY, size: int = MANY) -> list[Any]:
    return [found.position for found in kept.read(channels, after, frames, size)]


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_the_oldest_frames_go_when_there_are_too_many() -> None:
    kept = filled("aaaaa", history_frames=3)
    assert (len(kept), kept.head) == (3, 5)
    assert positions(kept, "a", after=ResumePoint(0)) == [3, 4, 5]


def test_the_oldest_frames_go_when_they_take_too_much_memory() -> None:
    first, second, third, fourth, large = made = [frame(n, size=size) for n, size in enumerate(SIZES, 1)]
    held = [one.held_bytes for one in made]
    kept = History(HistoryOptions(history_bytes=sum(held[:3])), 0)
    for one in (first, second, third):
        kept.append(one)
    assert (len(kept), kept.bytes) == (3, sum(held[:3]))
    kept.append(fourth)
    assert (len(kept), kept.bytes) == (3, sum(held[1:4]))
    kept.append(large)
    assert (len(kept), kept.bytes) == (1, held[4])


def test_the_newest_frame_is_kept_however_large_it_is() -> None:
    kept = History(HistoryOptions(history_frames=1, history_bytes=10), 0)
    for position in (1, 2):
        made = frame(position, size=500)
        kept.append(made)
        assert positions(kept, "a", after=ResumePoint(position - 1)) == [position]
        assert kept.bytes == made.held_bytes


@pytest.mark.parametrize(
    ("frames", "events", "size"), [(20_000, 1, 20), (1_500, 50, 20), (500, 10, 2_000), (99, 1, 99_000)]
)
def test_what_is_counted_is_the_memory_that_it_takes(frames: int, events: int, size: int) -> None:
    kept = History(HistoryOptions(history_frames=MANY, history_bytes=MANY), 0)

    def append(position: int) -> None:
        values = [encode_json({"n": position * events + n, "text": "x" * size}) for n in range(events)]
        batch = Batch("a", "t", tuple(Event("t", "a", value) for value in values), "manual", 10**12 + position)
        made = Frame(batch, position, f"5f3a9c1e-{position}")
        kept.append(made)
        for batches, chunked in VARIANTS:
            made.encoded(batches=batches, chunked=chunked)

    gc.collect()
    tracemalloc.start()
    try:
        for position in range(1, frames + 1):
            append(position)
        gc.collect()
        memory, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.7 * kept.bytes < memory < 1.1 * kept.bytes + 3 * history.FRESH_BYTES


def keeps_variants(one: Frame) -> bool:
    first, second = (one.encoded(batches=True, chunked=True) for _ in range(2))
    assert first == second == chunk(one.plain)
    return first is second


def test_only_the_newest_frames_keep_their_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [200, 900, 200, 200, 200, 900, 200, 200, 200, 200]
    monkeypatch.setattr(history, "FRESH_FRAMES", 2)
    monkeypatch.setattr(history, "FRESH_BYTES", 3_200)
    kept = History(HistoryOptions(history_frames=5, history_age=1.0), 0)
    made: list[Frame] = []
    expected = [1, 1, 1, 2, 2, 1, 1, 2, 2, 2]  # a frame of 900 bytes takes 2,440, and one of 200 takes 1,040
    for position, (size, fresh) in enumerate(zip(sizes, expected, strict=True), 1):
        made.append(frame(position, size=size))
        kept.append(made[-1])
        assert [keeps_variants(one) for one in made[-5:]] == [False] * (len(made[-5:]) - fresh) + [True] * fresh
    kept.expire(1e15)  # those that are gone are not counted among the newest
    made = [frame(position, size=200) for position in (11, 12)]
    for one in made:
        kept.append(one)
    assert all(map(keeps_variants, made))


@pytest.mark.parametrize(("bound", "most"), [("FRESH_FRAMES", 3), ("FRESH_BYTES", 3 * frame(1, size=200).held_bytes)])
@pytest.mark.parametrize("evicted", [0, 1, 2, 3])
def test_frames_that_are_evicted_make_room_for_the_variants_of_others(
    bound: str, most: int, evicted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, bound, most)
    kept = History(HistoryOptions(history_age=1.0), 0)
    made = [frame(position, size=200, timestamp=position) for position in range(1, 9)]
    for one in made[:4]:
        kept.append(one)
    assert [keeps_variants(one) for one in made[:4]] == [False, True, True, True]
    kept.expire(1_001 + evicted)
    assert len(kept) == 4 - evicted
    for count in range(5, 9):
        kept.append(made[count - 1])
        left = made[evicted:count]
        assert [keeps_variants(one) for one in left] == [False] * (len(left) - 3) + [True] * min(3, len(left))


def test_the_newest_frame_keeps_its_variants_however_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "FRESH_BYTES", 10)
    kept = History(HistoryOptions(), 0)
    large, small = frame(1, size=500), frame(2)
    kept.append(large)
    assert large.encoded(batches=True, chunked=True) is large.encoded(batches=True, chunked=True)
    kept.append(small)
    assert large.encoded(batches=True, chunked=True) is not large.encoded(batches=True, chunked=True)


def test_a_frame_that_cannot_be_encoded_changes_nothing() -> None:
    kept = filled("aa", history_frames=2)
    before = kept.bytes
    bad = Frame(Batch("a", "t", (Event("t", "a", "1"),), "manual", 0), 3, "no id")
    with pytest.raises(ValueError, match="an id is"):
        kept.append(bad)
    assert (len(kept), kept.bytes, kept.head) == (2, before, 2)
    kept.append(frame(4))
    assert positions(kept, "a", after=ResumePoint(1)) == [2, 4]


def test_what_is_older_than_the_age_goes_even_the_newest() -> None:
    kept = History(HistoryOptions(history_age=10.0), 0)
    for position in (1, 2, 3):
        kept.append(frame(position, timestamp=position * 1_000))
    kept.expire(12_000)  # the second is just as old as it may be
    assert positions(kept, "a", after=ResumePoint(1)) == [2, 3]
    assert not kept.covers(["a"], ResumePoint(0))
    kept.expire(60_000)
    assert (len(kept), kept.bytes, kept.head) == (0, 0, 3)
    assert not kept.covers(["a"], ResumePoint(2))
    assert kept.covers(["a"], ResumePoint(3))


def test_a_frame_is_expired_a_millisecond_after_it_has_the_age() -> None:
    kept = History(HistoryOptions(history_age=10.0), 0)
    old = frame(1, timestamp=500)
    assert not kept.is_expired(old, 10_500)
    assert kept.is_expired(old, 10_501)


def test_without_an_age_nothing_gets_too_old() -> None:
    kept = filled("aaa")
    kept.expire(1e15)
    assert len(kept) == 3


# -- floors ------------------------------------------------------------------------------------------------------------


def test_a_cursor_is_covered_from_the_newest_evicted_frame_on() -> None:
    kept = filled("aaaaa", history_frames=3)
    assert [kept.covers(["a"], ResumePoint(position)) for position in range(6)] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]


def test_ten_times_the_history_in_a_busy_channel_makes_no_gap_in_a_quiet_one() -> None:
    kept = filled(["quiet", "busy", *["busy"] * 100], history_frames=10)
    assert kept.covers(["quiet"], ResumePoint(1))
    assert positions(kept, "quiet", after=ResumePoint(1)) == []
    assert not kept.covers(["busy"], ResumePoint(1))
    assert not kept.covers(["quiet", "busy"], ResumePoint(1))
    assert not kept.covers(["quiet"], ResumePoint(0))  # its one frame is gone


def test_a_channel_in_which_nothing_was_ever_published_is_covered_from_the_start() -> None:
    assert filled(["busy"] * 100, history_frames=10).covers(["quiet"], ResumePoint(0))


def test_a_broadcast_that_is_gone_is_missed_by_everybody() -> None:
    kept = filled("a*bbb", history_frames=3)
    for channel in ("a", "b", "never used"):
        assert not kept.covers([channel], ResumePoint(1))
        assert kept.covers([channel], ResumePoint(2))


def test_a_frame_of_which_a_part_is_missing_must_still_be_there() -> None:
    kept = filled("aaaa", history_frames=2)
    assert not kept.covers(["a"], ResumePoint(2, part=1))
    assert kept.covers(["a"], ResumePoint(2))
    assert kept.covers(["a"], ResumePoint(3, part=1))


def test_forgotten_channels_have_one_floor_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_FLOORS", 2)
    kept = filled(["a", "b", "c", "d", "e"], history_frames=1)
    # The floors of c and d are known, those of a and b forgotten. All unknown channels get the highest forgotten floor.
    assert not kept.covers(["a"], ResumePoint(1))
    assert kept.covers(["a"], ResumePoint(2))
    assert not kept.covers(["never used"], ResumePoint(1))
    assert not kept.covers(["c"], ResumePoint(2))
    assert kept.covers(["c"], ResumePoint(3))
    assert not kept.covers(["d"], ResumePoint(3))
    assert kept.covers(["a", "b"], ResumePoint(2))


def test_the_channel_forgotten_is_the_one_whose_last_eviction_is_the_longest_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history, "MAX_FLOORS", 2)
    kept = filled(["a", "b", "a", "c", "e"], history_frames=1)
    assert kept.covers(["b"], ResumePoint(2))  # forgotten, so that the floor in common is 2
    assert kept.covers(["never used"], ResumePoint(2))
    assert not kept.covers(["never used"], ResumePoint(1))
    assert not kept.covers(["a"], ResumePoint(2))
    assert kept.covers(["a"], ResumePoint(3))


def test_the_number_of_floors_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_FLOORS", 10)
    kept = filled([f"channel{number}" for number in range(1_000)], history_frames=5)
    # Of 995 channels the only frame was evicted, and the last ten have a floor of their own.
    floors = {number: number + 1 if number >= 985 else 985 for number in range(995)}
    for number, floor in floors.items():
        assert kept.covers([f"channel{number}"], ResumePoint(floor))
        assert not kept.covers([f"channel{number}"], ResumePoint(floor - 1))


def test_a_channel_that_was_forgotten_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_FLOORS", 10)
    channel = "".join(["so", "me"])
    before = sys.getrefcount(channel)
    kept = filled([channel, *"abcde"], history_frames=5)
    assert sys.getrefcount(channel) > before  # it has a floor
    for position in range(7, 30):
        kept.append(frame(position, f"channel{position}"))
    assert sys.getrefcount(channel) == before


# -- frames that never come --------------------------------------------------------------------------------------------


def test_a_lost_frame_is_missed_by_who_asks_for_its_channel() -> None:
    kept = filled("aab")
    kept.lose("a", 4)
    assert kept.head == 4
    assert not kept.covers(["a"], ResumePoint(3))
    assert kept.covers(["a"], ResumePoint(4))
    assert kept.covers(["b"], ResumePoint(0))


def test_a_lost_broadcast_is_missed_by_everybody() -> None:
    kept = filled("a")
    kept.lose("*", 2)
    assert not kept.covers(["b"], ResumePoint(1))


def test_a_lost_frame_stays_missed_when_older_ones_are_evicted_after_it() -> None:
    kept = filled("aa", history_frames=2)
    kept.lose("a", 3)
    kept.append(frame(4))  # and 1 goes
    kept.append(frame(5))  # and 2 goes
    assert not kept.covers(["a"], ResumePoint(2))
    assert kept.covers(["a"], ResumePoint(3))


def test_a_lost_frame_stays_missed_when_its_channel_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_FLOORS", 2)
    kept = filled("b*a", history_frames=3)
    kept.lose("a", 4)
    for position in (5, 6, 7):
        kept.append(frame(position, "c"))  # b and * are evicted, so that a is forgotten; then a, which brings it back
        if position == 6:
            assert not kept.covers(["forgotten"], ResumePoint(3))
    assert not kept.covers(["a"], ResumePoint(3))
    assert kept.covers(["a"], ResumePoint(4))


# -- slices ------------------------------------------------------------------------------------------------------------


def test_a_slice_has_at_most_so_many_frames() -> None:
    assert positions(filled("aaaaa"), "a", after=ResumePoint(1), frames=3) == [2, 3, 4]


def test_a_slice_has_at_most_so_many_bytes() -> None:
    kept = History(HistoryOptions(), 0)
    for position in range(1, 6):
        kept.append(frame(position, size=100))
    assert positions(kept, "a", after=ResumePoint(0), size=300) == [1, 2, 3]
    assert positions(kept, "a", after=ResumePoint(0), size=299) == [1, 2]


def test_a_slice_has_its_first_frame_however_large_it_is() -> None:
    kept = History(HistoryOptions(), 0)
    for position, size in enumerate((500, 50), 1):
        kept.append(frame(position, size=size))
    assert positions(kept, "a", after=ResumePoint(0), size=10) == [1]


def test_what_is_read_for_many_channels_has_the_same_bounds() -> None:
    kept = History(HistoryOptions(), 0)
    for position in (1, 2, 3, 4):
        kept.append(frame(position, size=100))

    def read(frames: int, size: int) -> list[Any]:
        return [found.position for found in kept.read_all({"a"}, ResumePoint(0), frames, size)]

    assert read(2, MANY) == [1, 2]
    assert read(4, 300) == [1, 2, 3]
    assert read(4, 299) == [1, 2]
    assert read(4, 1) == [1]


def test_several_channels_are_read_in_the_order_of_their_positions_with_every_broadcast() -> None:
    kept = filled("abc*ba*cab")
    assert positions(kept, "a", "b", after=ResumePoint(0)) == [1, 2, 4, 5, 6, 7, 9, 10]
    assert positions(kept, "b", after=ResumePoint(4)) == [5, 7, 10]
    assert positions(kept, "never used", after=ResumePoint(0)) == [4, 7]


def test_a_cursor_between_the_frames_of_a_channel_finds_the_next_one() -> None:
    assert positions(filled("abbba"), "a", after=ResumePoint(3)) == [5]


def test_a_cursor_with_a_part_finds_its_own_frame_first() -> None:
    kept = filled("abab")
    assert positions(kept, "a", "b", after=ResumePoint(2, part=1)) == [2, 3, 4]
    assert positions(kept, "a", after=ResumePoint(2, part=1)) == [3]  # it is not of a channel asked for
    assert positions(kept, "a", after=ResumePoint(4, part=1)) == []


def test_slices_one_after_the_other_are_the_whole() -> None:
    kept = filled("abc*" * 10, history_frames=30)
    cursor, read = ResumePoint(10), []
    while found := positions(kept, "a", "c", after=cursor, frames=4):
        read += found
        cursor = ResumePoint(found[-1])
    assert read == [position for position in range(11, 41) if position % 4 != 2]


# -- all of it at once -------------------------------------------------------------------------------------------------

CHANNELS = ("a", "b", "c", "*")
SOME = st.lists(st.sampled_from("abc"), unique=True, min_size=1)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("append", "append", "append", "lose", "expire")), st.sampled_from(CHANNELS), st.integers(0, 60)
    ),
    max_size=40,
)


class Model:
    """The rules, with nothing but a list of all that ever was. `expired` is where the age limit has got to."""

    def __init__(self, options: HistoryOptions) -> None:
        self.options = options
        self.all: list[tuple[str, Frame | None]] = []  # None: lost
        self.first = 0  # the index of the first that is not evicted

    def step(self, what: str, channel: str, size: int, now: int) -> Frame | None:
        if what == "expire":
            oldest = now * 1_000 - 10_000
            while self.kept() and self.kept()[0].batch.timestamp < oldest:
                self.evict()
            return None
        made = frame(len(self.all) + 1, channel, 100 + size, now * 1_000) if what == "append" else None
        self.all.append((channel, made))
        if made is not None:
            while len(self.kept()) > 1 and (
                len(self.kept()) > self.options.history_frames
                or sum(old.held_bytes for old in self.kept()) > self.options.history_bytes
            ):
                self.evict()
        return made

    def kept(self) -> list[Frame]:
        return [made for _, made in self.all[self.first :] if made is not None]

    def evict(self) -> None:
        self.first = self.kept()[0].position

    def missing(self, channels: Collection[str], cursor: ResumePoint) -> bool:
        """Whether anything of these channels that comes after the cursor is gone."""
        gone = [
            position
            for position, (channel, made) in enumerate(self.all, 1)
            if channel in channels and (made is None or position <= self.first)
        ]
        return any(position > cursor.position or (cursor.part and position == cursor.position) for position in gone)

    def after(self, channels: Sequence[str], cursor: ResumePoint) -> list[int]:
        first = cursor.position if cursor.part else cursor.position + 1
        return [old.position for old in self.kept() if old.batch.channel in {*channels, "*"} and old.position >= first]


@given(
    steps=STEPS,
    channels=SOME,
    at=st.integers(0, 45),
    part=st.integers(0, 1),
    frames=st.integers(1, 6),
    size=st.integers(1_500, 6_000),
)
def test_it_is_what_a_list_of_all_frames_and_the_rules_say(
    steps: list[tuple[str, str, int]], channels: list[str], at: int, part: int, frames: int, size: int
) -> None:
    options = HistoryOptions(history_frames=frames, history_bytes=size, history_age=10.0)
    kept, model = History(options, 0), Model(options)
    for now, (what, channel, number) in enumerate(steps):
        made = model.step(what, channel, number, now)
        if made is not None:
            kept.append(made)
        elif what == "lose":
            kept.lose(channel, len(model.all))
        else:
            kept.expire(now * 1_000)
        assert (len(kept), kept.head) == (len(model.kept()), len(model.all))
        assert kept.bytes == sum(old.held_bytes for old in model.kept())
        position = min(at, len(model.all))
        # No client has a part of what was before the first frame.
        cursor = ResumePoint(position, part if position else 0)
        all_channels = {*channels, "*"}
        assert kept.covers(channels, cursor) == (not model.missing(all_channels, cursor))
        assert set(kept.gone(all_channels, cursor)) == {one for one in all_channels if model.missing({one}, cursor)}
        assert positions(kept, *channels, after=cursor) == model.after(channels, cursor)
        for most in [(MANY, MANY), (2, MANY), (MANY, 500)]:
            assert kept.read_all(all_channels, cursor, *most) == kept.read(channels, cursor, *most)


# -- what it costs -----------------------------------------------------------------------------------------------------


@functools.total_ordering
class Counted:
    """A position that counts how often any is compared."""

    compared = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return isinstance(other, Counted) and self.value == other.value

    def __lt__(self, other: Counted) -> bool:
        Counted.compared += 1
        return self.value < other.value

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return str(self.value)


def test_ten_thousand_reconnects_do_not_scan_the_history_each() -> None:
    kept = History(HistoryOptions(history_frames=10_000), Counted(0))
    for number in range(1, 12_001):
        kept.append(frame(Counted(number), "quiet" if number % 1_000 == 0 else "busy"))
    Counted.compared = 0
    for number in range(10_000):
        cursor = ResumePoint(Counted(2_000 + number))
        assert kept.covers(["busy", "quiet"], cursor)
        assert kept.read(["busy", "quiet"], cursor, 4, MANY)
    # Two searches by halving, a merge of two for five frames, and three floors; a scan would be thousands.
    assert Counted.compared < 10_000 * 80


def longest(kept: History) -> int:
    """The length of the longest container that the history holds."""
    seen, waiting, found = set(), [vars(kept)], 0
    while waiting:
        value: Any = waiting.pop()
        if id(value) not in seen and not isinstance(value, (type, ModuleType, FunctionType)):
            seen.add(id(value))
            found = max(found, len(value) if isinstance(value, Collection) else 0)
            waiting += gc.get_referents(value)
    return found


def test_an_append_costs_the_same_however_long_the_history_is() -> None:
    kept = History(HistoryOptions(history_frames=1_000), Counted(0))
    for number in range(1, 1_001):
        kept.append(frame(Counted(number)))
    Counted.compared = 0
    for number in range(1_001, 11_001):
        kept.append(frame(Counted(number)))
    assert Counted.compared < 10_000 * 8
    assert longest(kept) <= 2 * 1_000 + 1  # what was cut off at the front is let go of
