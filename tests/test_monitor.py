"""The monitor without a browser: what an overview has, what it leaves out, and what it costs."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sse_batcher import HistoryOptions, SSEManager, Text
from sse_batcher.event import User
from sse_batcher.manager_state import process_of
from sse_batcher.monitor import overview, page_files
from sse_batcher.monitor.overview import CHANNELS, FRAMES, MAX_CONTENT, NAMES, STREAMS, Monitor
from sse_batcher.streams.client import QueueClient
from sse_batcher.streams.opening import StreamRequest

from .kit.clock import Clock
from .kit.process import AsProcess
from .kit.site import Site
from .kit.waiting import TIMEOUT

Look = Callable[..., dict[str, Any]]


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    with SSEManager(batching=False, history=HistoryOptions(history_frames=100)) as manager:
        yield manager


@pytest.fixture
def look(manager: SSEManager) -> Look:
    """Takes an overview now. The last options of a monitor hold for the next one, too."""
    monitors = {}

    def look(search: str = "", **options: Any) -> dict[str, Any]:
        key = tuple(options.items())
        if key not in monitors:
            clock = Clock()
            monitors[key] = clock, Monitor(manager, clock=clock, **options)
        clock, monitor = monitors[key]
        clock.now += 1_000
        return monitor.look(search)

    return look


def subscribe(manager: SSEManager, *channels: str, user: User | None = None, address: str | None = None) -> QueueClient:
    """A stream that has begun."""
    client = process_of(manager).subscribe(StreamRequest(channels or ("default",), user=user, address=address))
    next(client)
    return client


def send(manager: SSEManager, *events: tuple[str, Any], channel: str = "default") -> None:
    for event_type, data in events:
        manager.enqueue(event_type, data, channel=channel)
        manager.flush_all()


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_row_says_who_has_the_stream(manager: SSEManager, look: Look) -> None:
    subscribe(manager, "a", "b", user="ada", address="10.0.0.7")
    subscribe(manager, user=7)
    newer, older = look()["streams"]["rows"]
    assert (older["user"], older["channels"], older["address"]) == ('"ada"', ["a", "b"], "10.0.0.7")
    assert (newer["user"], newer["channels"], newer["address"]) == ("7", ["default"], None)
    assert {(row["transport"], row["poll"], row["behind"], row["lag"]) for row in (newer, older)} == {
        ("attached", False, False, None)
    }
    assert 0 <= newer["age"] <= older["age"] < 60


def test_the_longest_behind_is_first(manager: SSEManager, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, idle = (subscribe(manager, user=name) for name in ("first", "second", "idle"))
    send(manager, ("t", 1), ("t", 2))
    for client, frames in [(second, 1), (idle, 2)]:
        for _ in range(frames):
            next(client)
    backend = process_of(manager).backend
    later = backend.now() + 20_000
    monkeypatch.setattr(backend, "now", lambda: later)
    streams = look()["streams"]
    assert [(row["user"], row["behind"], row["lag_is_longer"]) for row in streams["rows"]] == [
        ('"first"', True, False),
        ('"second"', True, False),
        ('"idle"', False, False),
    ]
    lags = [row["lag"] for row in streams["rows"]]
    assert 30 > lags[0] >= lags[1] >= 20
    assert lags[2] is None
    assert (streams["found"], streams["late"]) == (3, 2)
    first.close()


def test_a_stream_whose_frames_are_gone_is_behind_for_longer_than_is_known(manager: SSEManager, look: Look) -> None:
    client = subscribe(manager)
    send(manager, *[("t", number) for number in range(150)])
    (row,) = look()["streams"]["rows"]
    assert row["behind"]
    assert row["lag_is_longer"]
    assert row["lag"] is not None
    client.close()


def test_a_detached_stream_in_the_middle_of_a_frame_is_behind(site: Site) -> None:
    full = site.connect(small=True)
    site.connect("other")
    hub = site.hub
    site.deliver(data="x" * 1_000_000)  # nothing comes after it
    late = [stream for stream in hub.survey(0).streams if stream.is_waiting]
    assert [stream.transport for stream in late] == ["detached"]
    (wait,) = hub.waits(late)
    assert wait.since == 0  # when the frames of this site are made
    assert not wait.is_longer
    full.close()


def test_a_search_finds_users_channels_addresses_and_transports(manager: SSEManager, look: Look) -> None:
    subscribe(manager, "team-7", user="Ada", address="10.0.0.7")
    subscribe(manager, "team-8", user=42, address="10.0.0.8")

    def found(search: str, **options: Any) -> list[str]:
        streams = look(search, **options)["streams"]
        assert streams["found"] == len(streams["rows"])
        return sorted(row["user"] for row in streams["rows"])

    assert found("ada") == found("ADA") == found("team-7") == found("0.0.7") == ['"Ada"']
    assert found("42") == ["42"]
    assert found("attached") == found("") == ['"Ada"', "42"]
    assert found("nothing") == []


def test_without_addresses_none_is_sent_and_none_is_searched(manager: SSEManager, look: Look) -> None:
    subscribe(manager, user="ada", address="10.99.0.7")
    shown = look(addresses=False)
    assert "10.99" not in json.dumps(shown)
    assert shown["shows"] == {"content": False, "addresses": False}
    assert look("10.99", addresses=False)["streams"]["found"] == 0
    assert look("10.99")["streams"]["found"] == 1


def test_a_row_says_how_many_streams_its_user_has(manager: SSEManager, look: Look) -> None:
    for user in ("ada", "ada", "bob", None):
        subscribe(manager, user=user)
    assert sorted((row["user"] or "", row["streams_of_user"]) for row in look()["streams"]["rows"]) == [
        ("", 1),
        ('"ada"', 2),
        ('"ada"', 2),
        ('"bob"', 1),
    ]
    assert look()["users"] == 2


# -- events ------------------------------------------------------------------------------------------------------------


def test_the_newest_frames_come_first_without_their_contents(manager: SSEManager, look: Look) -> None:
    send(manager, ("a", "secret"), ("b", 2), channel="team-7")
    manager.enqueue("note", "secret", user=[7, "ada"])
    manager.broadcast("all", Text("secret"))
    manager.flush_all()
    shown = look()
    rows = [(row["types"], row["channel"], row["users"], row["count"]) for row in shown["events"]]
    assert rows == [
        ([("all", 1)], "*", [], 1),
        ([("note", 1)], None, ["7", '"ada"'], 1),
        ([("b", 1)], "team-7", [], 1),
        ([("a", 1)], "team-7", [], 1),
    ]
    assert all(row["bytes"] > 20 and 0 <= row["age"] < 60 and row["reason"] for row in shown["events"])
    assert "secret" not in json.dumps(shown)


def test_with_content_there_is_the_beginning_of_each(manager: SSEManager, look: Look) -> None:
    send(manager, ("a", {"x": 1}), ("b", Text("line\nline")), ("c", "y" * 5_000))
    shown = look(content=True)
    assert shown["shows"]["content"]
    long, text, short = (row["content"] for row in shown["events"])
    assert short == ['{"x":1}']
    assert text == ["line\nline"]
    assert len(long[0]) == MAX_CONTENT + 1


def test_a_batch_is_one_row_with_its_types(look: Look, manager: SSEManager) -> None:
    with SSEManager(batching={"maxBatchSize": 20}) as batching:
        for number in range(12):
            batching.enqueue("t", number)
        batching.flush_all()
        (row,) = Monitor(batching, content=True).look()["events"]
    assert (row["types"], row["count"], row["reason"]) == ([("t", 12)], 12, "manual")
    assert row["content"] == [str(number) for number in range(NAMES)]


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_the_process_and_its_counters_are_named(manager: SSEManager, look: Look) -> None:
    subscribe(manager).close()
    shown = look()
    assert shown["process"].keys() == {"id", "host", "pid", "running", "version"}
    counts = shown["counts"]
    assert counts["streams_opened"] == counts["streams_closed"]["left"] == 1
    assert "clients_by_channel" not in counts
    assert shown["backend"] == {
        "is_shared": False,
        "is_known": True,
        "unhealthy": None,
        "unread": 0,
        "processes": None,
    }


def test_lists_stay_short_however_much_there_is(manager: SSEManager, look: Look) -> None:
    many = [f"channel-{number}-{'x' * 100}" for number in range(90)]
    for number in range(300):
        subscribe(manager, *many[number % 60 : number % 60 + 20], user=f"{number}{'u' * 200}", address="a" * 64)
    send(manager, *[("t" * 128, "z" * 10_000)] * 90, channel="c" * 128)
    manager.enqueue("note", 1, user=[f"{number}{'u' * 200}" for number in range(1_000)])
    manager.flush_all()
    shown = look(content=True)
    streams = shown["streams"]
    assert (len(streams["rows"]), streams["found"]) == (STREAMS, 300)
    assert {(len(row["channels"]), row["more_channels"]) for row in streams["rows"]} == {(NAMES, 20 - NAMES)}
    assert (len(shown["channels"]["rows"]), shown["channels"]["total"]) == (CHANNELS, 79)
    assert len(shown["events"]) == FRAMES
    assert (len(shown["events"][0]["users"]), shown["events"][0]["more_users"]) == (NAMES, 1_000 - NAMES)
    assert len(json.dumps(shown)) < 250_000
    assert shown["channels"]["rows"][0][1] >= shown["channels"]["rows"][-1][1]


def test_pages_that_ask_for_the_same_share_an_overview(manager: SSEManager) -> None:
    clock, cpu = Clock(), Clock()
    monitor = Monitor(manager, clock=clock, cpu_clock=cpu)
    first = monitor.look()
    clock.now += 0.9
    assert monitor.look() is first
    other = monitor.look("x")
    assert other is not first
    assert monitor.look() is first
    clock.now += 0.2
    second = monitor.look()
    assert second is not first
    assert monitor.look("x") is other
    clock.now += 1.1
    assert monitor.look() is not second


class Asked:
    """A lock that says when a thread asks for it."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.asked.release()
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


def test_pages_that_ask_at_the_same_time_share_an_overview(
    manager: SSEManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, goes_on, made = Asked(), threading.Event(), []
    monkeypatch.setattr(overview, "new_lock", lambda: lock)
    monitor = Monitor(manager)

    def make(monitor: Monitor, search: str) -> dict[str, Any]:
        made.append(search)
        assert goes_on.wait(TIMEOUT)
        return {}

    monkeypatch.setattr(Monitor, "_make", make)
    with ThreadPoolExecutor(2) as pool:
        looks = [pool.submit(monitor.look) for _ in range(2)]
        assert all(lock.asked.acquire(timeout=TIMEOUT) for _ in looks)
        goes_on.set()
        assert looks[0].result() is looks[1].result()
    assert made == [""]


def test_an_expensive_overview_is_made_seldom(manager: SSEManager) -> None:
    clock = Clock()
    times = iter([0.0, 0.001, 0.0, 0.2])  # a fifth of a second of CPU time for the second one
    monitor = Monitor(manager, clock=clock, cpu_clock=lambda: next(times))
    assert monitor.look()["next"] == 2.0
    clock.now += 10
    second = monitor.look()
    assert second["next"] == 30.0
    clock.now += 29
    assert monitor.look() is second


@pytest.mark.parametrize(
    "searches", [[""], ["", "ada"], [""] * 10 + ["ada"], [f"room-{number}" for number in range(10)]]
)
def test_pages_that_search_for_different_texts_share_one_limit(manager: SSEManager, searches: list[str]) -> None:
    clock, cpu, made = Clock(), Clock(), Counter[str]()

    class Making(Monitor):
        def _make(self, search: str) -> dict[str, Any]:
            cpu.now += 0.1
            made[search] += 1
            return {}

    monitor = Making(manager, clock=clock, cpu_clock=cpu)
    due = [0.0] * len(searches)
    for second in range(3_000):
        for page, search in enumerate(searches):
            if due[page] <= second:
                due[page] = second + monitor.look(search)["next"]
        clock.now += 1
    assert sum(made.values()) * 0.1 <= 0.007 * 3_000 + 0.1 * len(made)  # the first of each text is made at once
    assert max(made.values()) - min(made.values()) <= 2  # each gets its turn


def test_texts_that_no_page_searches_for_any_more_are_forgotten(manager: SSEManager) -> None:
    clock, times = Clock(), iter(range(1_000))
    monitor = Monitor(manager, clock=clock, cpu_clock=lambda: next(times) / 10)  # each takes 0.1 s
    texts = [f"{number}" for number in range(overview.MAX_SEARCHES + 5)]
    rests = [monitor.look(text)["next"] for text in texts]
    assert max(rests) == rests[-1] == 15.0 * overview.MAX_SEARCHES
    clock.now += 10_000
    assert monitor.look()["next"] == 15.0


def test_a_search_that_is_being_typed_does_not_make_pages_wait(manager: SSEManager) -> None:
    clock, times = Clock(), iter(range(1_000))
    monitor = Monitor(manager, clock=clock, cpu_clock=lambda: next(times) / 10)  # each takes 0.1 s
    monitor.look()
    for text in ("a", "ad", "ada"):
        clock.now += 0.3
        assert monitor.look(text)["next"] == 15.0
    for _ in range(2):
        clock.now += 15
        rests = [monitor.look(text)["next"] for text in ("", "ada")]
    assert rests == [30.0, 30.0]  # these two pages go on


def test_a_forked_child_is_another_process(manager: SSEManager, as_process: AsProcess) -> None:
    monitor = Monitor(manager)
    here = monitor.this_process()["process"]["id"]
    assert monitor.is_here(here)
    with as_process(4321):
        assert not monitor.is_here(here)
        assert monitor.this_process()["process"]["id"] != here


def test_nothing_is_read_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A monitor that no page is open for does nothing: it has no thread, and no hook in the way of events."""
    page_files.cache_clear()
    with SSEManager() as manager:
        monitor = Monitor(manager)
        assert repr(manager).endswith("unused in this process>")
        assert page_files.cache_info().currsize == 0
        monitor.look()
        assert not repr(manager).endswith("unused in this process>")


def test_ten_thousand_streams_take_less_than_a_hundredth_of_a_core() -> None:
    with SSEManager() as manager:
        for number in range(10_000):
            subscribe(manager, f"room-{number % 500}", f"own-{number}", user=number)
        clock = Clock()
        monitor = Monitor(manager, clock=clock)
        first = monitor.look()
        began = time.thread_time()
        clock.now += first["next"]
        shown = monitor.look("own-77")
        assert time.thread_time() - began < 0.01 * 60  # with a page that asks once a minute, at the slowest
        assert (shown["streams"]["found"], len(shown["streams"]["rows"])) == (111, STREAMS)
        assert first["next"] >= 2.0
        assert len(json.dumps(first)) < 40_000


def test_the_version_of_a_copy_that_is_not_installed_is_unknown(
    manager: SSEManager, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise overview.PackageNotFoundError(name)

    monkeypatch.setattr(overview, "version", version)
    overview.package_version.cache_clear()
    assert look()["process"]["version"] == "unknown"
    overview.package_version.cache_clear()
