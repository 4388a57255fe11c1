"""Events for users: each stream of these users gets them, once and in order, and no other stream does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from sse_batcher import SSE, BatchOptions, ClientOptions, InvalidEventError, SSEManager, Text, TooManyClientsError
from sse_batcher.event import User
from sse_batcher.options import TRANSPORTS
from sse_batcher.signals import event_refused

from .kit.checker import values_of
from .kit.redisserver import redis_server
from .kit.sse_parser import ServerEvent, take_events
from .kit.users import HOSTILE, Pair, user_site
from .kit.waiting import TIMEOUT

# -- one contract for both transports and both backends ----------------------------------------------------------------

BACKENDS = ["memory", pytest.param("redis", marks=pytest.mark.external)]
FRAMINGS = ["batches", "batch=0", "mixed"]


@pytest.fixture(params=BACKENDS)
def redis(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | None]:
    """The URL of a Redis; None for a backend in memory."""
    if request.param == "memory":
        yield None
    else:
        with redis_server(tmp_path) as server:
            yield server.url


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("framing", FRAMINGS)
def test_all_streams_of_a_user_get_all_once_and_in_order(redis: str | None, transport: str, framing: str) -> None:
    options = BatchOptions(batch_window=10, dedup_key=None, mixed=framing == "mixed")
    query = {"batch": 0} if framing == "batch=0" else {}
    with user_site(transport, options, redis=redis, processes=1 if redis is None else 2) as site:
        last = len(site.managers) - 1
        seven = [
            site.open("default", user=7, **query),
            site.open("default", user=7, process=last, **query),
            site.open("default", "a", user=7, **query),
            site.open(user=7, process=last, **query),
        ]
        text, ada = site.open("default", user="7", **query), site.open(user="ada", process=last, **query)
        nobody = [site.open(*HOSTILE, **query), site.open(*HOSTILE, process=last, **query)]

        site.send(("t", 1), user=7)
        site.send(("t", 2), ("t", 3), channel="default")
        site.send(("t", 4), ("t", 5), ("t", 6), user=7)
        site.send(("t", 7), ("t", 8), user=["ada", 7])
        site.send(("t", 9), channel="a")
        site.send(("t", 10), user="7")
        site.send(("row", Text("<b>eleven</b>")), user={7})
        site.send(("t", 12))
        site.send(("t", 13), user=(7, "7", 99))
        site.send(("end", 0))

        ours: list[Pair] = [("t", number) for number in (1, 2, 3, 4, 5, 6, 7, 8, 9)]
        ours += [("row", "<b>eleven</b>"), ("t", 12), ("t", 13)]
        without = [pair for pair in ours if pair[1] != 9]
        assert [tab.until("end") for tab in seven] == [
            without,
            without,
            ours,
            [pair for pair in without if pair[1] not in (2, 3)],
        ]
        assert numbers(text.until("end")) == [2, 3, 10, 12, 13]
        assert numbers(ada.until("end")) == [7, 8, 12]
        assert [numbers(tab.until("end")) for tab in nobody] == [[12]] * 2


def numbers(pairs: list[Pair]) -> list[Any]:
    return [data for _, data in pairs]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_user_that_comes_back_gets_what_came_meanwhile(redis: str | None, transport: str) -> None:
    with user_site(transport, redis=redis) as site:
        tab = site.open("default", user=7)
        site.send(("t", 1), user=7)
        assert tab.take().json == 1
        cursor = tab.events[-1].id
        tab.close()
        site.send(("t", 2), user=7)
        site.send(("t", 3), user=8)
        site.send(("t", 4), channel="default")
        site.send(("end", 0))
        for user, expected in ((7, [2, 4]), (8, [3, 4]), ("7", [4]), (None, [4])):
            back = site.open("default", user=user, last_event_id=cursor)
            assert back.events[0].type == "sse_open"
            assert numbers(back.until("end")) == expected


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("user", [7, "7"])
def test_a_kick_ends_the_streams_of_this_user_in_all_processes(redis: str | None, transport: str, user: User) -> None:
    with user_site(transport, redis=redis, processes=1 if redis is None else 2) as site:
        last = len(site.managers) - 1
        tabs = {
            each: [site.open("default", user=each), site.open("default", user=each, process=last)] for each in (7, "7")
        }
        site.send(("t", 1), user=user)
        site.managers[0].kick(user=user)
        assert [tab.ends() for tab in tabs.pop(user)] == ["kicked"] * 2
        (others,) = tabs.values()
        site.send(("end", 0))
        assert [tab.until("end") for tab in others] == [[]] * 2


# -- who is who --------------------------------------------------------------------------------------------------------


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    clients = ClientOptions(heartbeat=0.5, max_clients_per_user=2, revalidate_every=0.05)
    with SSEManager(batching=BatchOptions(batch_window=10), clients=clients) as manager:
        yield manager


def numbers_of(manager: SSEManager, *streams: Any) -> list[list[Any]]:
    """What these streams have got, up to a last event, which is sent now."""
    manager.broadcast("end", None)
    assert manager.flush_all(TIMEOUT)
    return [numbers([pair for event in until_end(stream) for pair in values_of(event)]) for stream in streams]


def until_end(stream: Any) -> list[ServerEvent]:
    """The events before the next one of the type ``end``, without those of our own."""
    events: list[ServerEvent] = []
    while not events or events[-1].type != "end":
        events += take_events(stream, 1)
    return [event for event in events[:-1] if not event.type.startswith("sse_")]


def test_a_number_and_its_digits_are_two_users_everywhere(manager: SSEManager) -> None:
    number, digits = manager.subscribe(user=7), manager.subscribe(user="7")
    manager.enqueue("t", "for the number", user=7)
    manager.enqueue("t", "for the digits", user="7")
    assert numbers_of(manager, number, digits) == [["for the number"], ["for the digits"]]
    with closing(manager.subscribe(user=7)), pytest.raises(TooManyClientsError):
        manager.subscribe(user=7)
    manager.subscribe(user="7").close()
    assert manager.kick(user="7") == 1
    assert [event.type for event in take_events(digits, 1)] == ["sse_bye"]
    manager.enqueue("t", "again", user=7)
    assert numbers_of(manager, number) == [["again"]]


def test_revalidate_asks_about_the_user_that_events_and_kicks_name(manager: SSEManager) -> None:
    asked: set[User] = set()
    manager.revalidate = lambda user: asked.add(user) or user != "7"
    number, digits = manager.subscribe(user=7), manager.subscribe(user="7")
    assert [event.type for event in take_events(digits, 2)] == ["sse_open", "sse_bye"]
    assert asked <= {7, "7"}
    manager.enqueue("t", 1, user=7)
    assert numbers_of(manager, number) == [[1]]


class Id(IntEnum):
    ADA = 7


class Name(str):
    def __eq__(self, other: object) -> bool:
        return True  # what an app does to its own classes changes nothing here

    __hash__ = str.__hash__


@pytest.mark.parametrize(("given", "user"), [(Id.ADA, 7), (Name("ada"), "ada"), (0, 0), (-(10**255), -(10**255))])
def test_a_user_is_taken_as_a_plain_str_or_int(manager: SSEManager, given: User, user: User) -> None:
    stream, other = manager.subscribe(user=given), manager.subscribe(user="another")
    assert (stream.info.user, type(stream.info.user)) == (user, type(user))
    manager.enqueue("t", 1, user=user)
    manager.enqueue("t", 2, user=[given, given, user])
    assert numbers_of(manager, stream, other) == [[1, 2], []]
    assert manager.kick(user=given) == 1


def test_the_same_users_in_any_order_share_a_window(manager: SSEManager) -> None:
    stream = manager.subscribe(user=8)
    manager.enqueue("t", 1, user=[8, "a", 0])  # 0 and 8 are in a set in the order in which they were added
    manager.enqueue("t", 2, user=("a", 0, 8, 0))
    manager.enqueue("t", 3, user={0, 8, "a"})
    assert manager.flush_all(TIMEOUT)
    assert [event.type for event in take_events(stream, 2)] == ["sse_open", "t_batch"]
    stream.close()


def test_a_thousand_users_are_one_frame(manager: SSEManager) -> None:
    first, last, other = (manager.subscribe(user=user) for user in (0, 999, 1_000))
    manager.enqueue("t", 1, user=range_of(1_000))
    assert numbers_of(manager, first, last, other) == [[1], [1], []]
    assert manager.get_stats().history_frames == 2


def range_of(count: int) -> list[User]:
    return list(range(count))


# -- what is refused ---------------------------------------------------------------------------------------------------

NOT_USERS: list[tuple[Any, str]] = [
    (None, "user is None: nobody is logged in?"),
    (True, "a user is a str or an int, not bool: use a name or an id, such as str(user.id)"),
    (1.5, "a user is a str or an int, not float: use a name or an id, such as str(user.id)"),
    (b"7", "a user is a str or an int, not bytes: use a name or an id, such as str(user.id)"),
    ("", "a user has 1 to 256 characters, not 0"),
    ("x" * 257, "a user has 1 to 256 characters, not 257"),
    (10**256, "a user that is an int has at most 256 digits"),
]
NOT_LISTS: list[tuple[Any, str]] = [
    ([], "an event is for 1 to 1000 users, not 0: leave the call out"),
    (range_of(1_001), "an event is for 1 to 1000 users, not 1001: split them up"),
    ({7: "a mapping"}, "several users are a list, tuple or set, not dict"),
    ([[7]], "a user is a str or an int, not list: use a name or an id, such as str(user.id)"),
]


@pytest.mark.parametrize(
    ("user", "message"), [*NOT_USERS, *NOT_LISTS, *(([7, each], text) for each, text in NOT_USERS)]
)
def test_an_event_for_what_is_no_user_is_refused_and_reaches_no_stream(
    manager: SSEManager, user: Any, message: str
) -> None:
    streams = [manager.subscribe(), manager.subscribe(user=7)]
    refused: list[Any] = []
    with event_refused.connected_to(lambda sender, **details: refused.append(details), manager):
        with pytest.raises(InvalidEventError) as caught:
            manager.enqueue("t", "secret", user=user)
    assert (str(caught.value), caught.value.field) == (message, "user")
    assert [(each["user"], each["channel"]) for each in refused] == [(user, None)]
    assert manager.get_stats().refused == 1
    assert numbers_of(manager, *streams) == [[], []]


@pytest.mark.parametrize(("user", "message"), NOT_USERS)
def test_a_kick_and_a_stream_of_what_is_no_user_are_refused(manager: SSEManager, user: Any, message: str) -> None:
    with closing(manager.subscribe(user=7)) as stream:
        with pytest.raises(InvalidEventError) as caught:
            manager.kick(user=user)
        assert (str(caught.value), caught.value.field) == (message, "user")
        if user is not None:  # a stream may belong to no user
            with pytest.raises(InvalidEventError) as caught:
                manager.subscribe(user=user)
            assert (str(caught.value), caught.value.field) == (message, "user")
        assert numbers_of(manager, stream) == [[]]


@pytest.mark.parametrize("user", [[7], (7,), {7}, []])
def test_a_kick_is_for_one_user(manager: SSEManager, user: Any) -> None:
    with closing(manager.subscribe(user=7)) as stream:
        with pytest.raises(InvalidEventError, match=f"^a user is a str or an int, not {type(user).__name__}: "):
            manager.kick(user=user)
        assert numbers_of(manager, stream) == [[]]


@pytest.mark.parametrize("channel", ["default", "a", None, "*"])
@pytest.mark.parametrize("user", [7, None, []])
def test_an_event_is_for_a_channel_or_for_users(manager: SSEManager, channel: Any, user: Any) -> None:
    streams = [manager.subscribe(), manager.subscribe(user=7)]
    with pytest.raises(InvalidEventError, match=r"^an event is for a channel or for users, not both: ") as caught:
        manager.enqueue("t", "secret", user=user, channel=channel)
    assert caught.value.field == "user"
    assert numbers_of(manager, *streams) == [[], []]


def test_a_stream_with_neither_channel_nor_user_is_refused(manager: SSEManager) -> None:
    with pytest.raises(InvalidEventError, match="1 to 100 channels, not 0; without a channel, it has a user"):
        manager.subscribe(())
    manager.subscribe((), user=7).close()


# -- what a client can name, and where users show ----------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_channel_with_the_name_of_a_user_is_another_thing(manager: SSEManager, name: str) -> None:
    users: list[User] = [7, "7", "ada", "u:7", -1, "None", name]
    channel, user = manager.subscribe((name,)), manager.subscribe((), user=name)
    manager.enqueue("t", "secret", user=users)
    manager.enqueue("t", "public", channel=name)
    assert numbers_of(manager, channel, user) == [["public"], ["secret"]]
    assert manager.kick(channel=name) == 1
    manager.enqueue("t", 1, user=name)
    assert numbers_of(manager, user) == [[1]]


def test_users_are_no_channels_in_counters_labels_and_log_lines(
    manager: SSEManager, caplog: pytest.LogCaptureFixture
) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from sse_batcher.prometheus import SSECollector

    caplog.set_level(logging.DEBUG)
    secret, number = "ada@example.org", 987_654_321
    registry = CollectorRegistry()
    registry.register(SSECollector(manager, channels=["default"]))
    streams = [manager.subscribe(user=secret), manager.subscribe((), user=number)]
    manager.enqueue("t", 1, user=[secret, number])
    assert numbers_of(manager, *streams) == [[1], [1]]
    assert manager.get_stats().clients_by_channel == {"default": 1}
    exported = generate_latest(registry).decode()
    for stream in streams:
        stream.close()
    assert manager.shutdown()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("'default'" in line or "no channel" in line for line in lines) == 2
    for text in (repr(manager), exported, *lines):
        assert secret not in text
        assert str(number) not in text


def test_no_query_reaches_the_frames_of_a_user() -> None:
    app = Flask("app")
    app.config.update(SSE_BATCH_WINDOW=10, SSE_HEARTBEAT=0.5)
    sse = SSE(app)
    sse.authorize(lambda channels: channels)
    client = app.test_client()
    assert client.get("/events?channel=*").status_code == 400
    query = "&".join(f"channel={name}" for name in HOSTILE)
    with client.get(f"/events?{query}&user=7&users=7&u=7") as response:
        take_events(response.response, 1)
        with app.app_context():
            sse.enqueue("t", "secret", user=[7, "7", "ada", -1])
            assert numbers_of(sse.manager, response.response) == [[]]
            assert sse.manager.shutdown()


# -- Flask -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def app() -> Iterator[tuple[Flask, SSE]]:
    app = Flask("app")
    app.config.update(SSE_BATCH_WINDOW=10, SSE_HEARTBEAT=0.5, SSE_MAX_CLIENTS_PER_USER=1)
    sse = SSE(app)
    yield app, sse
    with app.app_context():
        assert sse.manager.shutdown()


@pytest.mark.parametrize("user", [7, "7"])
def test_a_view_of_your_own_names_the_user_that_events_limits_and_kicks_mean(
    app: tuple[Flask, SSE], user: User
) -> None:
    flask, sse = app
    flask.add_url_rule("/mine", view_func=lambda: sse.response((), user=user))
    client = flask.test_client()
    with client.get("/mine") as response:
        (opening,) = take_events(response.response, 1)
        assert opening.json["channels"] == []
        with client.get("/mine") as another:
            (busy,) = take_events(another.response, 1)
            assert (busy.type, busy.json["reason"]) == ("sse_busy", "limit")
        with flask.app_context():
            sse.enqueue("t", "mine", user=user)
            sse.enqueue("t", "another's", user=str(user) if isinstance(user, int) else int(user))
            assert numbers_of(sse.manager, response.response) == [["mine"]]
            assert sse.kick(user=user) == 1
        assert [event.type for event in take_events(response.response, 1)] == ["sse_bye"]


def test_identify_names_the_user_that_events_are_for(app: tuple[Flask, SSE]) -> None:
    flask, sse = app
    sse.authorize(lambda channels: channels)
    sse.identify(lambda: 7)
    with flask.test_client().get("/events") as response:
        take_events(response.response, 1)
        with flask.app_context():
            sse.enqueue("t", 1, user=7)
            sse.enqueue("t", 2, user="7")
            with pytest.raises(InvalidEventError, match="nobody is logged in"):
                sse.enqueue("t", 3, user=None)
            with pytest.raises(InvalidEventError, match="nobody is logged in"):
                sse.kick(user=None)
            assert numbers_of(sse.manager, response.response) == [[1]]
