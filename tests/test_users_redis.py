"""Users with Redis: what only the stream in Redis still has, and entries that this version cannot read."""

from __future__ import annotations

from typing import Any

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.backends.redis.entries import Entry, to_fields
from sse_batcher.event import Batch, Event, User, check_users
from sse_batcher.options import TRANSPORTS

from .kit.redisserver import RedisServer, cursor_of, redis_fixture
from .kit.users import Tab, UserSite, user_site
from .kit.viewers import FORGETFUL, STREAM
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

redis = redis_fixture()
both_transports = pytest.mark.parametrize("transport", TRANSPORTS)

USERS: list[User | None] = [7, "7", 8, None]


def send_mixture(site: UserSite) -> dict[User | None, list[int]]:
    """Send sixty frames for users and of channels. Return the numbers that a stream of each user, and of a, gets."""
    expected: dict[User | None, list[int]] = {user: [] for user in USERS}
    for number in range(0, 60, 6):
        site.send(("t", number), user=7)
        site.send(("t", number + 1), channel="a")
        site.send(("t", number + 2), user=[8, 7])
        site.send(("t", number + 3), user="7")
        site.send(("t", number + 4), channel="b")
        site.send(("t", number + 5))
        for user, own in ((7, (0, 2)), ("7", (3,)), (8, (2,)), (None, ())):
            expected[user] += [number + each for each in sorted({*own, 1, 5})]
    return expected


def numbers(tab: Tab) -> list[Any]:
    return [data for _, data in tab.until("end")]


@both_transports
@pytest.mark.parametrize("query", [{}, {"batch": 0}])
def test_what_only_redis_has_is_replayed_for_users(redis: RedisServer, transport: str, query: dict[str, Any]) -> None:
    with user_site(transport, redis=redis.url, processes=2, history=FORGETFUL) as site:
        start = cursor_of(site.managers[1])
        expected = send_mixture(site)
        tabs = [site.open("a", user=user, process=1, last_event_id=start, **query) for user in USERS]
        site.send(("end", None))
        assert [tab.events[0].type for tab in tabs] == ["sse_open"] * len(USERS)
        assert [numbers(tab) for tab in tabs] == [expected[user] for user in USERS]
        assert site.managers[1].get_stats().gaps == 0
        assert site.managers[1].get_stats().history_frames <= 2  # one of channels, and one for users


@both_transports
def test_frames_that_come_during_a_replay_follow_in_order(redis: RedisServer, transport: str) -> None:
    with user_site(transport, redis=redis.url, history=FORGETFUL) as site:
        start = cursor_of(site.managers[0])
        before = send_mixture(site)
        tabs = [site.open("a", user=user, last_event_id=start) for user in USERS]
        after = send_mixture(site)
        site.send(("end", None))
        assert [numbers(tab) for tab in tabs] == [before[user] + after[user] for user in USERS]


@both_transports
def test_a_client_that_polls_gets_in_slices_what_only_redis_has(redis: RedisServer, transport: str) -> None:
    with user_site(transport, redis=redis.url, history=FORGETFUL) as site:
        start = cursor_of(site.managers[0])
        sent = [send_mixture(site), send_mixture(site), send_mixture(site)]
        for user in (7, None):
            expected = [number for each in sent for number in each[user]]
            got: list[Any] = []
            cursor, polls = start, 0
            while len(got) < len(expected):
                tab = site.poll("a", user=user, last_event_id=cursor)
                first, *events = tab.rest()
                assert first.type == "sse_open"
                assert events
                got += [event.json for event in events]
                cursor, polls = events[-1].id, polls + 1
            assert got == expected
            assert polls > 1


def add_entry(redis: RedisServer, number: int, users: list[User], version: bytes = b"3", **more: bytes) -> None:
    """A process of another version adds a batch for these users, with more fields, or others."""
    audience = check_users(users)
    batch = Batch(audience, "t", (Event("t", audience, "1"),), "manual", 0)
    named = {name.encode(): value for name, value in more.items()}
    redis.client.xadd(STREAM, to_fields(Entry("fedcba9876543210", number, batch)) | {b"v": version} | named)


@both_transports
@pytest.mark.parametrize("history", [HistoryOptions(), FORGETFUL], ids=["history", "archive"])
def test_an_entry_of_a_later_version_is_a_gap_for_its_users(
    redis: RedisServer, transport: str, history: HistoryOptions
) -> None:
    with user_site(transport, redis=redis.url, history=history) as site:
        start = cursor_of(site.managers[0])
        tabs = [site.open("a", user=user) for user in USERS]
        site.send(("t", 1), channel="a")
        assert [tab.take().json for tab in tabs] == [1] * len(USERS)
        add_entry(redis, 1, [7])
        wait_until(lambda: site.managers[0].get_stats().ignored == 1, "it was read")
        gap = tabs[0].take()
        assert (gap.type, gap.json["reason"]) == ("sse_gap", "publish_failed")
        wait_until(lambda: site.managers[0].get_stats().clients_by_state["behind"] == 0, "all go on")
        site.send(("t", 2), channel="a")
        site.send(("end", None))
        got = [numbers(tab) for tab in tabs]
        assert (got[0], got[-1]) == ([2], [2])
        # Other users may get a gap, too, unless the archive has told their streams in time that they have missed none.
        assert all(each in ([2], ["publish_failed", 2]) for each in got)
        back = {user: site.open("a", user=user, last_event_id=start) for user in USERS}
        assert [tab.events[0].type for tab in back.values()] == ["sse_gap"] + ["sse_open"] * 3
        site.send(("end", None))
        assert [numbers(tab) for tab in back.values()] == [[], [1, 2], [1, 2], [1, 2]]


@both_transports
def test_an_entry_whose_users_cannot_be_read_is_a_gap_for_all_with_a_user(redis: RedisServer, transport: str) -> None:
    with user_site(transport, redis=redis.url, history=FORGETFUL) as site:
        start = cursor_of(site.managers[0])
        add_entry(redis, 1, [7], u=b"{7}")
        wait_until(lambda: site.managers[0].get_stats().ignored == 1, "it was read")
        site.send(("t", 1), channel="a")
        site.send(("t", 2), channel="a")
        back = [site.open("a", user=user, last_event_id=start) for user in USERS]
        assert [tab.events[0].type for tab in back] == ["sse_gap"] * 3 + ["sse_open"]
        site.send(("end", None))
        assert [numbers(tab) for tab in back] == [[], [], [], [1, 2]]


@both_transports
def test_an_entry_of_this_version_for_users_is_delivered_to_them_alone(redis: RedisServer, transport: str) -> None:
    with user_site(transport, redis=redis.url) as site:
        tabs = [site.open(user=user) if user is not None else site.open("a") for user in USERS]
        add_entry(redis, 1, [8, 7], b"2")
        site.managers[0].flush_all(TIMEOUT)
        wait_until(lambda: site.managers[0].get_stats().history_frames == 1, "it was read")
        site.send(("end", None))
        assert [numbers(tab) for tab in tabs] == [[1], [], [1], []]
