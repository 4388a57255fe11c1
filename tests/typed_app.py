"""A sample app that uses the whole public API, for type checkers: `mypy --strict` and `pyright` in strict mode pass.

`assert_type` says what a caller gets. Where a call must be refused, an ``ignore`` stands beside it: a checker that
accepts the call reports that the ``ignore`` is not needed. `tests/test_typed_app.py` runs the app, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, assert_type

from flask import Flask, Response, session
from prometheus_client import CollectorRegistry, generate_latest

from sse_batcher import (
    SSE,
    BackendError,
    BacklogFullError,
    Batch,
    BatcherStats,
    BatchOptions,
    Client,
    ClientInfo,
    ClientOptions,
    ClosedError,
    ConfigurationError,
    Event,
    EventBatcher,
    HistoryOptions,
    InvalidEventError,
    InvalidFunctionError,
    ManagerStats,
    MissingPackageError,
    Snapshot,
    SSEBatcherError,
    SSEManager,
    Text,
    TooManyClientsError,
    UsageError,
    health,
    script,
    signals,
    stream,
)
from sse_batcher.after_commit import AfterCommit
from sse_batcher.backends.redis import open_redis
from sse_batcher.prometheus import SSECollector
from sse_batcher.stats import Histogram

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

# -- Flask -------------------------------------------------------------------------------------------------------------

sse = SSE()


@sse.authorize
def allowed(channels: tuple[str, ...]) -> list[str]:
    return [name for name in channels if name.startswith("team-") or name == "default"]


@sse.identify
def user() -> str | None:
    found: object = session.get("user")
    return found if isinstance(found, str) else None


@sse.revalidate
def may_stay(user: str) -> bool:
    return user != "mallory"


@sse.allow_stats
def may_see_stats() -> bool:
    return user() == "ada"


@sse.allow_monitor
def may_see_monitor() -> bool:
    return user() == "ada"


@sse.allow_kick
def may_kick() -> bool:
    return user() == "ada"


@sse.snapshot("default")
def state() -> tuple[str, object]:
    return "state", {"visits": 0}


@sse.snapshot
def state_of(channel: str) -> tuple[str, object] | None:
    return ("message", Text(f"<p>{channel}</p>")) if channel.startswith("team-") else None


@sse.user_snapshot
def notes_of(user: str) -> tuple[str, object] | None:
    return "notes", []


# A decorator returns the function as it is.
assert_type(allowed(("default",)), list[str])
assert_type(may_stay("ada"), bool)
assert_type(state(), tuple[str, object])
assert_type(state_of("team-7"), tuple[str, object] | None)
assert_type(notes_of("ada"), tuple[str, object] | None)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.from_mapping(SECRET_KEY="for the example", SSE_BATCH_WINDOW=0.05)
    sse.init_app(app)

    @sse.for_app(app).snapshot("team-7")
    def team() -> tuple[str, list[int]]:
        return "team", [1, 2, 3]

    @sse.for_app(app).snapshot
    def order(channel: str) -> tuple[str, Text] | None:
        return None

    @sse.for_app(app).user_snapshot
    def greeting(user: str) -> tuple[str, Text]:
        return "message", Text(f"Hello {user}")

    def press() -> str:
        sse.enqueue("press", {"by": user()}, channel="team-7")
        sse.broadcast("press", None, key="press")
        sse.enqueue("message", Text("<b>pressed</b>"), key=7)
        sse.enqueue("note", Text("pressed"), user="ada", key="note")
        sse.enqueue("note", {"by": 7}, user=["ada", 7])
        return sse.cursor()

    def leave() -> str:
        ended = sse.kick(user="ada") + sse.kick(user=7) + sse.kick(channel="team-7")
        assert_type(ended, int)
        return str(ended + sse.kick(user="ada", channel="team-7"))

    def page() -> str:
        return f'<script type="module">import {{ BatchedEventSource }} from "{sse.script_url()}";</script>'

    def signed() -> str:
        token = sse.sign(["default", "team-7"], user="ada", ttl=0.5) + sse.sign()
        assert_type(token, str)
        assert_type(sse.url(("team-7",), user=7, ttl=60, external=True), str)
        return sse.url()

    def team_events() -> Response:
        return sse.response(["team-7"], user="ada")

    def own_events() -> Response:
        return sse.response((), user=7)

    app.add_url_rule("/press", view_func=press, methods=["POST"])
    app.add_url_rule("/leave", view_func=leave, methods=["POST"])
    app.add_url_rule("/page", view_func=page)
    app.add_url_rule("/signed", view_func=signed)
    app.add_url_rule("/team/events", view_func=team_events)
    app.add_url_rule("/own/events", view_func=own_events)
    assert_type(team(), tuple[str, list[int]])
    assert_type(order("order-7"), tuple[str, Text] | None)
    assert_type(greeting("ada"), tuple[str, Text])
    return app


# -- without Flask -----------------------------------------------------------------------------------------------------


def latest_of(event_type: str, data: dict[str, object]) -> object:
    return data.get("server")


def create_manager(backend: str = "memory://") -> SSEManager:
    return SSEManager(
        batching=BatchOptions(
            batch_window=0.05,
            max_batch_size=20,
            dedup_key=latest_of,
            join="\n\n",
            critical_types={"error"},
            per_type={"log": {"batch_window": 10.0, "dedup_key": None}, "token": {"join": ""}},
        ),
        clients=ClientOptions(
            max_clients=100, max_clients_per_user=4, max_stream_age=None, transport="attached", poll_wait=20.0
        ),
        history=HistoryOptions(history_frames=1_000, history_age=3600.0),
        backend=backend,
        json_default=str,
        revalidate=may_stay,
    )


def states() -> Iterator[tuple[str, object]]:
    yield "state", {"a": 1}
    yield "state", Text("<ul></ul>")


class App:
    """A WSGI app with one stream, and the module for browsers."""

    def __init__(self, manager: SSEManager) -> None:
        self.manager = manager

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/sse-batcher.js":
            answer = script(environ)
            assert_type(answer, tuple[str, list[tuple[str, str]], list[bytes]])
            start_response(*answer[:2])
            return answer[2]
        if environ["PATH_INFO"] == "/ready":
            answer = health(self.manager, environ, "ready")
            assert_type(answer, tuple[str, list[tuple[str, str]], list[bytes]])
            health(self.manager, environ)
            start_response(*answer[:2])
            return answer[2]
        ticket = self.manager.ticket()
        status, headers, body = stream(
            self.manager, environ, ["default"], snapshot=states, user=environ.get("REMOTE_USER"), ticket=ticket
        )
        assert_type(status, str)
        assert_type(headers, list[tuple[str, str]])
        start_response(status, headers)
        return body


def read(manager: SSEManager) -> list[bytes]:
    """The first blocks of a stream that begins with a state."""
    snapshot = manager.snapshot(states)
    assert_type(snapshot, Snapshot)
    assert_type(snapshot.cursor, str)
    client = manager.subscribe(("default", "a"), snapshot=snapshot, user=7, ticket=manager.ticket(), batches=False)
    assert_type(client, Client)
    assert_type(client.info, ClientInfo)
    assert_type(client.info.user, str | int | None)
    manager.enqueue("log", {"line": 1}, channel="a")
    manager.broadcast("log", Text("2"), key=2)
    manager.enqueue("log", Text("3"), user=7, key="3")
    manager.enqueue("log", 4, user={7, "ada"})
    assert_type(manager.flush_all(5.0), bool)
    blocks = [next(client) for _ in range(2)]
    assert_type(blocks, list[bytes])
    manager.kick(user=7)
    client.close()
    manager.subscribe(last_event_id=manager.cursor()).close()
    return blocks


def change(manager: SSEManager, session: Session, sessions: scoped_session[Session]) -> None:
    """Note events in a session of SQLAlchemy, and commit."""
    for each in (session, sessions):
        events = manager.after_commit(each)
        assert_type(events, AfterCommit)
        events.enqueue("order", {"id": 7}, channel="orders", key=7)
        events.enqueue("order", Text("7"), user=["ada", 7])
        events.broadcast("order", 7, key="7")
        assert_type(sse.after_commit(each), AfterCommit)
        manager.after_commit("session")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        each.commit()


def counters(manager: SSEManager) -> dict[str, Any]:
    assert_type(manager.unhealthy_reason() is None, bool)
    stats = manager.get_stats()
    assert_type(stats, ManagerStats)
    assert_type(stats.clients, int)
    assert_type(stats.clients_by_channel["default"] if stats.clients_by_channel else 0, int)
    assert_type(stats.streams_closed["left"], int)
    assert_type(sum(stats.streams_refused.values()), int)
    assert_type((stats.pending_age, stats.client_lag, stats.gil_yielded), tuple[float, float, float])
    assert_type(stats.lifetimes, Histogram)
    assert_type(stats.lifetimes.buckets["60"] * stats.loop_delay.sum, float)
    return stats.as_dict()


def metrics(manager: SSEManager) -> bytes:
    registry = CollectorRegistry()
    registry.register(SSECollector(manager, channels=["default"]))
    return generate_latest(registry)


# -- the engine alone --------------------------------------------------------------------------------------------------


def batched(lines: Iterable[str]) -> tuple[list[Batch], BatcherStats]:
    batches: list[Batch] = []
    with EventBatcher(batches.append, BatchOptions(mixed=True), encode=json.dumps) as batcher:
        for line in lines:
            batcher.enqueue("log", {"line": line}, key=len(batches))
            batcher.enqueue("line", Text(line), channel="lines", key=line)
        batcher.flush_all()
        stats = batcher.get_stats()
    for batch in batches:
        assert_type(batch.events, tuple[Event, ...])
        for event in batch.events:
            assert_type((event.type, event.channel, event.json), tuple[str, str | None, str])
            assert_type((event.users, event.is_text), tuple[tuple[str | int, ...], bool])
        assert_type((batch.channel, batch.users, batch.join), tuple[str | None, tuple[str | int, ...], str | None])
    return batches, stats


# -- signals and errors ------------------------------------------------------------------------------------------------


def listen(manager: SSEManager, seen: list[str]) -> list[object]:
    """Connect receivers of this manager's signals. They are held weakly, so the caller has to keep them."""

    @signals.client_connected.connect_via(manager, weak=True)
    def connected(sender: SSEManager, *, client: ClientInfo) -> None:
        seen.append(f"client {client.id} of {client.channels} connected")

    @signals.client_disconnected.connect_via(manager, weak=True)
    def disconnected(
        sender: SSEManager, *, client: ClientInfo, reason: str, duration: float, frames: int, bytes: int
    ) -> None:
        seen.append(f"client {client.id} {reason} after {duration:.0f} s, {frames} frames and {bytes} bytes")

    @signals.batch_flushed.connect_via(manager, weak=True)
    def flushed(sender: SSEManager, *, batch: Batch) -> None:
        seen.append(f"{batch.type}, {batch.reason}")

    @signals.event_refused.connect_via(manager, weak=True)
    def refused(
        sender: SSEManager, *, error: SSEBatcherError, event_type: object, channel: object, user: object
    ) -> None:
        seen.append(f"{event_type} in {channel} for {user}: {type(error).__name__}")

    return [connected, disconnected, flushed, refused]


def publish(manager: SSEManager, data: object) -> str:
    try:
        manager.enqueue("log", data)
    except InvalidEventError as error:
        return f"{error.field}: {error}"
    except BacklogFullError as error:
        return f"{error.pending_events + error.pending_bytes} wait for {error.publishing_for:.1f} s"
    except ClosedError as error:
        return str(error)
    return ""


def configured(window: float) -> BatchOptions | str | None:
    try:
        return BatchOptions(batch_window=window)
    except ConfigurationError as error:
        return error.option


OTHER_ERRORS = (BackendError, InvalidFunctionError, MissingPackageError, TooManyClientsError, UsageError)
REDIS = open_redis  # a backend; `SSEManager(backend="redis://...")` opens it


# -- what a checker must refuse ----------------------------------------------------------------------------------------

if TYPE_CHECKING:
    SSEManager(False)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    BatchOptions(0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    SSEManager().subscribe(user=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SSE().sign(user=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SSEManager().enqueue("t", 1, user=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SSEManager().enqueue("t", 1, user=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SSEManager().enqueue("t", 1, user=[None])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    SSEManager().enqueue("t", 1, channel=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SSEManager().enqueue("t", 1, key=b"k")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SSEManager().broadcast("t", 1, user=7)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    SSEManager().kick(user=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    EventBatcher(print).enqueue("t", 1, user=7)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    EventBatcher(print).enqueue("t", 1, key=("a", 1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    BatchOptions(join=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sse.enqueue("t", 1, user=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sse.broadcast("t", 1, key=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SSEManager().subscribe([7])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    SSEManager().drain()  # type: ignore[attr-defined]  # pyright: ignore

    @sse.revalidate  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
    def answers_with_a_name(user: str) -> str:
        return user

    @sse.snapshot  # type: ignore[type-var]  # pyright: ignore
    def state_without_a_type(channel: str) -> str:
        return channel

    @sse.snapshot("default")  # type: ignore[type-var]  # pyright: ignore
    def state_of_any(channel: str) -> tuple[str, object]:
        return channel, None

    @sse.user_snapshot  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
    def notes_of_all() -> tuple[str, object]:
        return "notes", None

    @sse.allow_stats  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportUntypedFunctionDecorator]
    async def answers_later() -> bool:
        return True
