"""The counters of streams: how many were opened, why they ended, and why requests got none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, fields
from typing import Any, get_args

import pytest
from flask import Flask, abort, redirect, request
from flask.typing import ResponseReturnValue

from sse_batcher import SSE, ClientOptions, SSEManager, TooManyClientsError, stream
from sse_batcher.errors import BackendError, ClosedError
from sse_batcher.reasons import EndReason, RefusalReason
from sse_batcher.stats import ManagerStats
from sse_batcher.streams.census import LOOKUPS
from sse_batcher.streams.counts import Counts
from sse_batcher.streams.history import History
from sse_batcher.transports.detached.connection import SocketClient
from sse_batcher.transports.detached.group import IN_STEP
from sse_batcher.transports.server import ServerInfo

from .kit import polls
from .kit.flask_sites import making
from .kit.polls import MakePoll
from .kit.site import Site, has_ended, read

SERVER = ServerInfo(name="", fd=None, threads=None, is_stopping=lambda: False)

poll = polls.poll
site = polls.site


def closed(counts: dict[str, Any]) -> dict[str, int]:
    """The streams that have ended, by reason, without those reasons that there were not."""
    assert counts["streams_opened"] == counts["clients"] + sum(counts["streams_closed"].values())
    return {reason: count for reason, count in counts["streams_closed"].items() if count}


def refused(stats: ManagerStats) -> dict[str, int]:
    return {reason: count for reason, count in stats.streams_refused.items() if count}


# -- opened and closed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["attached", "detached"])
def test_each_stream_is_counted_once_by_why_it_ended(site: Site, transport: str) -> None:
    def connect(user: int) -> Any:
        return site.connect(user=user) if transport == "detached" else site.delivery.connect(user=user)

    leaving, kicked, staying = connect(1), connect(2), connect(3)
    leaving.close()
    site.hub.dismiss("kicked", 2)
    if transport == "detached":
        site.loop.run()
        read(kicked)
        assert has_ended(kicked)
    else:
        list(kicked)
    counts = site.hub.count()
    assert (counts["streams_opened"], closed(counts)) == (3, {"left": 1, "kicked": 1})
    leaving.close()  # a second time
    assert closed(site.hub.count()) == {"left": 1, "kicked": 1}
    staying.close()


def test_a_stream_that_is_detached_was_opened_once_and_has_not_ended(site: Site) -> None:
    site.connect()
    counts = site.hub.count()
    assert (counts["streams_opened"], counts["clients_by_transport"]["detached"], closed(counts)) == (1, 1, {})


def test_polls_are_counted_too_with_a_reason_of_their_own(site: Site, poll: MakePoll) -> None:
    poll().answer()
    waiting = poll("x-0")
    site.deliver()
    waiting.answer()
    poll("x-1").leave()
    counts = site.hub.count()
    assert (counts["streams_opened"], closed(counts)) == (3, {"polled": 2, "left": 1})


def test_a_shutdown_ends_streams_and_they_are_counted() -> None:
    with SSEManager() as manager:
        client = manager.subscribe()
        next(client)
        manager.shutdown(0)
        list(client)
    assert closed(manager.get_stats().as_dict()) == {"shutdown": 1}


# -- how long they were open -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 0.5, 1, 1.5, 59, 61, 86_400, 86_401])
def test_a_stream_counts_in_the_smallest_bucket_that_it_is_within(site: Site, seconds: float) -> None:
    client = site.delivery.connect()
    site.clock.now += seconds
    client.close()
    lifetimes = site.hub.count()["lifetimes"]
    (limit,) = (limit for limit, count in lifetimes.buckets.items() if count)
    below = [float(other) for other in lifetimes.buckets if float(other) < float(limit)]
    assert max(below, default=-1) < seconds <= float(limit)
    assert lifetimes.sum == seconds


def test_the_lifetime_of_a_stream_that_is_detached_begins_where_it_was_opened(site: Site) -> None:
    client = site.delivery.connect()
    site.clock.now += 100
    theirs = site.hand_over(client, next(client))
    site.loop.run()
    site.clock.now += 100
    theirs.close()
    site.loop.run()
    lifetimes = site.hub.count()["lifetimes"]
    assert (lifetimes.sum, lifetimes.buckets["300"], sum(lifetimes.buckets.values())) == (200, 1, 1)


def test_polls_have_no_lifetime(site: Site, poll: MakePoll) -> None:
    poll().answer()
    assert sum(site.hub.count()["lifetimes"].buckets.values()) == 0


# -- how long frames wait ----------------------------------------------------------------------------------------------


def lag(site: Site, monkeypatch: pytest.MonkeyPatch, ms: int) -> float:
    """The lag at this time, in milliseconds, by the clock of frames. They all have the time 0."""
    monkeypatch.setattr(site.delivery.cursors, "now", lambda: ms)
    return float(site.hub.count()["client_lag"])


def test_a_client_that_has_taken_all_does_not_lag(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(site.delivery.connect()) as client:
        next(client)
        site.connect("other")
        assert lag(site, monkeypatch, 5_000) == 0
        site.deliver()
        assert lag(site, monkeypatch, 5_000) == 5
        next(client)
        assert lag(site, monkeypatch, 6_000) == 0


def test_frames_of_other_channels_are_no_lag(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(site.delivery.connect("mine")) as client:
        site.deliver(3, channel="other")
        client.fall_behind()
        assert client.behind
        assert lag(site, monkeypatch, 5_000) == 0
        site.deliver(channel="mine")
        assert lag(site, monkeypatch, 5_000) == 5


def test_a_client_that_takes_nothing_lags(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.connect(small=True)
    site.deliver(20, data="x" * 10_000)
    assert site.hub.count()["clients_by_state"]["behind"] == 1
    assert lag(site, monkeypatch, 7_000) == 7


def test_a_client_that_joins_others_while_it_is_looked_at_does_not_lag(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.connect()
    site.deliver(2)
    # As if the client had been behind a moment ago, and was in step with others when its point is read.
    monkeypatch.setattr(SocketClient, "is_waiting", True)
    assert [stream.point for stream in site.hub.survey(0).streams] == [IN_STEP]
    assert lag(site, monkeypatch, 5_000) == 0


def test_the_oldest_frame_that_any_client_waits_for_counts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [site.delivery.connect(channel) for channel in ("b", "a", "b")]
    for channel, time in [("nobody", 500), ("a", 1_000), ("b", 2_000)]:
        frame = site.delivery.frame(channel=channel)
        frame.time = time
        site.hub.deliver(frame)
    assert lag(site, monkeypatch, 10_000) == 9
    for client in clients:
        client.close()


def test_looking_for_the_lag_has_an_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    found = History.first_after

    def look(self: History, *args: Any) -> Any:
        looked.append(args)
        return found(self, *args)

    monkeypatch.setattr(History, "first_after", look)
    clients = [site.delivery.connect("quiet") for _ in range(3 * LOOKUPS)]
    for client in clients:
        client.fall_behind()
    site.hub.count()
    assert len(looked) == LOOKUPS
    site.deliver(channel="quiet")
    looked.clear()
    assert site.hub.count()["clients"] == 3 * LOOKUPS
    assert len(looked) == LOOKUPS
    for client in clients:
        client.close()


# -- refused: without Flask --------------------------------------------------------------------------------------------


def test_a_stream_above_the_limit_is_counted_as_refused() -> None:
    environ: dict[str, Any] = {"REQUEST_METHOD": "GET"}
    with SSEManager(clients=ClientOptions(max_clients=1)) as manager, closing(manager.subscribe()):
        with pytest.raises(TooManyClientsError):
            manager.subscribe()
        _, _, body = stream(manager, environ)
        assert b'{"reason":"limit"}' in b"".join(body)
        assert refused(manager.get_stats()) == {"limit": 2}
        assert manager.get_stats().streams_opened == 1


def test_invalid_channels_are_counted_as_refused() -> None:
    with SSEManager() as manager:
        assert stream(manager, {"REQUEST_METHOD": "GET"}, [""])[0] == "400 Bad Request"
        assert refused(manager.get_stats()) == {"bad_request": 1}


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ClosedError("closed"), "draining"), (BackendError("away"), "backend"), (TooManyClientsError("many"), "limit")],
)
def test_what_subscribe_raises_is_counted_as_refused(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    with SSEManager() as manager:
        manager.cursor()  # makes the part of this process
        monkeypatch.setattr("sse_batcher.process_state.ProcessState.subscribe", fail)
        with pytest.raises(type(error)):
            manager.subscribe()
        assert refused(manager.get_stats()) == {reason: 1}


def test_a_stream_over_http2_is_counted_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sse_batcher.wsgi.inspect_server", lambda environ: SERVER._replace(http2=True))
    with SSEManager() as manager:
        list(stream(manager, {"REQUEST_METHOD": "GET"})[2])
        assert refused(manager.get_stats()) == {"http2": 1}


# -- refused: under Flask ----------------------------------------------------------------------------------------------


class App:
    """An app whose `authorize` does what the header ``X-Do`` says."""

    def __init__(self) -> None:
        self.app = Flask("counted", static_folder=None)
        self.app.secret_key = "secret"
        self.sse = SSE(self.app)
        self.manager = self.sse.manager
        self.sse.authorize(self.authorize)
        self.sse.snapshot("broken")(self.fail)

    def authorize(self, channels: tuple[str, ...]) -> tuple[str, ...]:
        todo = request.headers.get("X-Do", "grant")
        if todo.isdecimal():
            abort(int(todo))
        if todo == "login":
            abort(redirect("/login"))
        if todo == "fail":
            self.fail()
        return () if todo == "refuse" else channels

    def fail(self) -> Any:
        raise RuntimeError("a fault of the app")

    def get(self, query: str = "", todo: str = "grant", method: str = "GET") -> int:
        headers = {"X-Do": todo}
        with self.app.test_client().open(f"/events{query}", method=method, headers=headers) as response:
            if response.is_streamed:
                next(iter(response.response), None)  # type: ignore[call-overload]
            return response.status_code

    def refused(self) -> dict[str, int]:
        return refused(self.manager.get_stats())


@pytest.fixture
def app() -> Iterator[App]:
    with making(App) as make:
        yield make()


@pytest.mark.parametrize(
    ("query", "todo", "status", "reason"),
    [
        ("?channel=", "grant", 400, "bad_request"),
        ("?token=sse1.forged.token", "grant", 401, "unauthorized"),
        ("", "401", 401, "unauthorized"),
        ("", "refuse", 403, "forbidden"),
        ("", "403", 403, "forbidden"),
        ("", "404", 404, "other"),
        ("", "login", 302, "other"),
        ("", "fail", 500, "other"),
        ("?channel=broken", "grant", 200, "snapshot"),
    ],
)
def test_a_request_that_gets_no_stream_is_counted_once(
    app: App, query: str, todo: str, status: int, reason: RefusalReason
) -> None:
    assert app.get(query, todo) == status
    assert app.refused() == {reason: 1}
    assert app.manager.get_stats().streams_opened == 0


def test_a_refusal_before_the_view_is_counted(app: App) -> None:
    @app.app.before_request
    def keep_out() -> ResponseReturnValue:
        return "not you", 403

    assert app.get() == 403
    assert app.refused() == {"forbidden": 1}


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_other_requests_are_no_refusals(app: App, method: str) -> None:
    app.get(method=method)
    app.app.test_client().get("/events/stats")  # 404
    app.app.test_client().get("/no-such-page")
    assert app.refused() == {}


def test_every_reason_is_in_the_json(app: App) -> None:
    app.sse.allow_stats(lambda: True)
    answer = app.app.test_client().get("/events/stats").get_json()
    assert set(answer["streams_refused"]) == set(get_args(RefusalReason))
    assert set(answer["streams_closed"]) == set(get_args(EndReason))


def test_counts_are_added_with_all_their_fields() -> None:
    names = [field.name for field in fields(Counts)]
    counts = Counts(**dict.fromkeys(names, 1))
    counts.add(Counts(**{name: 10 * number for number, name in enumerate(names)}))
    assert asdict(counts) == {name: 1 + 10 * number for number, name in enumerate(names)}
