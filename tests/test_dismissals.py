"""Dismissals: none that is after a ticket is missed, however many are forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sse_batcher.streams.dismissals import Dismissals

USERS = st.sampled_from([None, "ada", "7", 7])
CHANNELS = st.sampled_from([None, "a", "b", "c"])
SENT = st.lists(st.tuples(st.sampled_from(["kicked", "revoked"]), USERS, CHANNELS), max_size=30)


@given(SENT, st.integers(0, 30), USERS, st.sets(CHANNELS.filter(bool), min_size=1), st.sampled_from([1, 3, 100]))
def test_the_answer_is_that_of_a_full_list(
    sent: list[tuple[str, object, str | None]], ticket: int, user: object, channels: set[str], most: int
) -> None:
    dismissals = Dismissals(most)
    for each in sent:
        dismissals.add(*each)
    assert dismissals.newest == len(sent)
    expected = None
    for number, (reason, who, where) in enumerate(sent, 1):
        if number > ticket and who in (None, user) and (where is None or where in channels):
            expected = reason
    answer = dismissals.after(ticket, user, channels)
    newest = {(who, where): number for number, (_, who, where) in enumerate(sent, 1)}
    floor = max(sorted(newest.values())[:-most], default=0)  # that of the newest pair that is forgotten
    if ticket >= floor:
        assert answer == expected
    else:
        assert answer is not None


def test_a_ticket_below_the_floor_counts_as_kicked() -> None:
    dismissals = Dismissals(2)
    for user in ("ada", "bob", "eve"):
        dismissals.add("revoked", user, None)
    assert dismissals.after(0, "zoe", ["a"]) == "kicked"
    assert dismissals.after(1, "zoe", ["a"]) is None
    assert dismissals.after(1, "bob", ["a"]) == "revoked"


def test_a_repeated_dismissal_takes_one_place_and_is_forgotten_last() -> None:
    dismissals = Dismissals(2)
    for user in ("ada", "bob", "ada", "ada", "eve"):
        dismissals.add("kicked", user, None)
    assert dismissals.after(2, "zoe", ["a"]) is None
    assert dismissals.after(2, "ada", ["a"]) == "kicked"
