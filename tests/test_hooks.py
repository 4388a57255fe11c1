"""The functions that an app registers: what they may be, what they may answer, and for which app they decide."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from flask import Flask, Response, current_app, request
from werkzeug.local import LocalProxy
from werkzeug.test import TestResponse

from sse_batcher import SSE, InvalidEventError, InvalidFunctionError, UsageError
from sse_batcher.event import check_user
from sse_batcher.functions import check_function

from .kit.ids import steady
from .kit.sse_parser import parse

LOGGER = "sse_batcher.hooks"
HOOKS = ["authorize", "identify", "revalidate", "allow_stats", "snapshot"]
TWO = "/events?channel=a&channel=b"


def make_app(sse: SSE | None = None, **config: Any) -> tuple[Flask, SSE]:
    app = Flask("site", static_folder=None)
    app.config.update(config)
    app.testing = True  # an error of the app is raised
    sse = sse or SSE()
    sse.init_app(app)
    return app, sse


def get(app: Flask, path: str = "/events") -> TestResponse:
    return app.test_client().get(path)


def first(app: Flask, path: str = "/events") -> tuple[str, Any]:
    """The first block of a stream: its type and its data."""
    with get(app, path) as response:
        assert response.status_code == 200
        event, *_ = parse(next(iter(response.response)), strict=True)  # type: ignore[arg-type]
        return event.type, event.json


def register(sse: SSE, hook: str, function: Callable[..., Any]) -> None:
    decorate = sse.snapshot("default") if hook == "snapshot" else getattr(sse, hook)
    decorate(function)


# -- what may be registered --------------------------------------------------------------------------------------------


async def later(*_: Any) -> bool:
    return True


async def stream_of(*_: Any) -> AsyncIterator[str]:
    yield "default"


class Later:
    async def __call__(self, *_: Any) -> bool:
        return True

    async def method(self, *_: Any) -> bool:
        return True


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "function",
    [later, stream_of, Later(), Later().method, functools.partial(later, 1), functools.partial(Later(), 1)],
    ids=["function", "generator", "object", "method", "partial", "partial of an object"],
)
def test_an_async_function_is_refused_when_it_is_registered(hook: str, function: Any) -> None:
    app, sse = make_app()
    with pytest.raises(InvalidFunctionError, match=rf"{hook}.* must not be async, .*asgiref\.sync\.async_to_sync"):
        register(sse, hook, function)
    with pytest.raises(InvalidFunctionError, match="must not be async"):
        register(sse.for_app(app), hook, function)  # type: ignore[arg-type]
    assert first(app)[0] == "sse_open"
    assert get(app, "/events/stats").status_code == 404


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("function", [None, True, "default", ["default"]], ids=repr)
def test_anything_but_a_function_is_refused_when_it_is_registered(hook: str, function: Any) -> None:
    with pytest.raises(InvalidFunctionError, match="must be a function"):
        register(SSE(), hook, function)


def test_any_callable_that_is_not_async_can_be_registered() -> None:
    class Now:
        def __call__(self) -> bool:
            return True

    for function in (lambda: True, Now(), functools.partial(Now()), print, dict):
        check_function("authorize", function)


def test_a_snapshot_without_a_name_is_that_of_all_channels_without_their_own() -> None:
    app, sse = make_app()
    asked: list[str] = []

    def state(channel: str) -> tuple[str, str] | None:
        asked.append(channel)
        return ("state", channel) if channel == "b" else None

    def own() -> tuple[str, str]:
        return "state", "its own"

    sse.authorize(lambda channels: channels)
    assert sse.snapshot(state) is state
    assert sse.snapshot("c")(own) is own
    with get(app, "/events?channel=a&channel=b&channel=c") as response:
        blocks = iter(response.response)
        opened, *states = parse(next(blocks), strict=True)  # type: ignore[arg-type]
    assert opened.type == "sse_open"
    assert [(event.type, event.json) for event in states] == [("state", "b"), ("state", "its own")]
    assert asked == ["a", "b"]


def test_a_second_snapshot_without_a_name_is_refused() -> None:
    app, sse = make_app()
    for hooks in (sse, sse.for_app(app)):
        first_one, second = (lambda channel: None), (lambda channel: ("state", channel))
        hooks.snapshot(first_one)
        hooks.snapshot(first_one)
        with pytest.raises(UsageError, match="is registered as the snapshot of channels without one already"):
            hooks.snapshot(second)


@pytest.mark.parametrize("channel", [None, "", "*", 7])
def test_a_snapshot_of_an_invalid_channel_is_refused(channel: Any) -> None:
    with pytest.raises(InvalidEventError, match="channel"):
        SSE().snapshot(channel)


# -- what may be answered ----------------------------------------------------------------------------------------------


class User:
    """As of an ORM."""


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (lambda: True, "True"),
        (lambda: False, "False"),
        (lambda: "a", "type str"),
        (lambda: b"a", "type bytes"),
        (lambda: {"a": True, "b": False}, "type dict"),
        (lambda: 7, "type int"),
        (lambda: Response("no", 403), "type Response"),
        (later, "a coroutine"),
    ],
)
def test_an_invalid_answer_of_authorize_is_an_error(answer: Callable[[], Any], named: str) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: answer())
    with pytest.raises(UsageError, match=rf"^authorize\(\) has to return the names .*, not .*{named}$"):
        get(app, TWO)


@pytest.mark.parametrize("answer", [True, None, 1, "yes", [], later, Response("no", 403)], ids=steady)
def test_an_invalid_answer_of_allow_stats_is_an_error(answer: Any) -> None:
    app, sse = make_app()
    sse.allow_stats(lambda: answer() if answer is later else answer)
    if answer is True:
        assert get(app, "/events/stats").status_code == 200
        return
    with pytest.raises(UsageError, match=r"^allow_stats\(\) has to return True or False, not "):
        get(app, "/events/stats")
    app.testing = False
    assert get(app, "/events/stats").status_code == 500


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (True, "not bool"),
        (7.5, "not float"),
        (User(), r"not User: use a name or an id, such as str\(user\.id\)"),
        (LocalProxy(lambda: "ada"), "not LocalProxy"),
        (LocalProxy(User), "not LocalProxy"),
        ("", "1 to 256 characters, not 0"),
        ("x" * 257, "1 to 256 characters, not 257"),
        (10**256, "at most 256 digits"),
        (later, "a coroutine"),
    ],
)
def test_an_invalid_answer_of_identify_is_an_error(answer: Any, message: str) -> None:
    app, sse = make_app()
    sse.identify(lambda: answer() if answer is later else answer)
    with pytest.raises(UsageError, match=rf"^identify\(\) returned .*{message}"):
        get(app)


@pytest.mark.parametrize("user", [None, "ada", 7, 0, -1, "x" * 256, 10**255])
def test_identify_returns_a_str_or_an_int_or_none(user: Any) -> None:
    app, sse = make_app()
    sse.identify(lambda: user)
    with get(app) as response:
        next(iter(response.response))
        assert user is None or sse.kick(user=user) == 1


def test_a_user_of_a_subclass_becomes_a_plain_one() -> None:
    class Name(str):
        __slots__ = ()

    class Number(int):
        pass

    assert [type(check_user(user)) for user in (Name("ada"), Number(7))] == [str, int]


@pytest.mark.parametrize(
    "answer",
    [None, "ab", {"a": 1, "b": 2}, {"a", "b"}, ("state",), ("state", 1, 2), 7, later],
    ids=steady,
)
def test_an_invalid_snapshot_is_logged_and_answered_with_sse_busy(
    answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app, sse = make_app()
    sse.snapshot("default")(lambda: answer() if answer is later else answer)
    assert first(app)[0] == "sse_busy"
    assert "the snapshot of channel 'default' returned " in caplog.text
    assert "a state is a tuple (event_type, data), not " in caplog.text


@pytest.mark.parametrize("states", [("state", 1), ["ab"], [None], [{"a": 1, "b": 2}], [("state", 1, 2)]], ids=repr)
def test_invalid_snapshots_for_plain_wsgi_are_refused(states: Any) -> None:
    _, sse = make_app()
    with pytest.raises(InvalidEventError, match=r"a state is a tuple \(event_type, data\)"):
        sse.manager.snapshot(lambda: states)


# -- which channels ----------------------------------------------------------------------------------------------------


def test_a_forgotten_authorize_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    app, _ = make_app()
    assert [get(app, path).status_code for path in ("/events?channel=team-7", "/events?channel=other")] == [403, 403]
    (record,) = caplog.records
    assert (record.name, record.levelno) == (LOGGER, logging.WARNING)
    assert "@sse.authorize" in record.getMessage()
    assert "team-7" in record.getMessage()


def test_a_channel_with_a_bidi_control_is_escaped_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app, _ = make_app()
    assert get(app, "/events?channel=%E2%80%AEdnim").status_code == 403
    assert "'\\u202ednim'" in caplog.text


def test_an_authorize_that_returns_none_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: None)
    assert [get(app).status_code for _ in range(2)] == [403, 403]
    (record,) = caplog.records
    assert record.getMessage().startswith("authorize returned None, which is 403, for the channels ('default',)")


def test_a_refusal_by_authorize_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: ())
    assert get(app).status_code == 403
    assert caplog.records == []


def test_the_first_block_names_the_channels_that_were_granted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    app, sse = make_app()
    sse.authorize(lambda channels: {"b", "a"} & set(channels))
    for _ in range(2):
        assert first(app, TWO + "&channel=secret") == ("sse_open", {"heartbeat": 15.0, "channels": ["a", "b"]})
    assert [record.getMessage() for record in caplog.records if record.name == LOGGER] == [
        "authorize did not grant all channels: ('a', 'b') of ('a', 'b', 'secret'). sse_open names them"
    ]
    assert first(app, TWO + "&last_event_id=00000000-1") == (
        "sse_gap",
        {"heartbeat": 15.0, "channels": ["a", "b"], "reason": "epoch"},
    )


def test_a_kick_without_a_user_is_an_error() -> None:
    app, sse = make_app()
    with get(app) as response:
        next(iter(response.response))
        with pytest.raises(InvalidEventError, match="user is None"):
            sse.kick(user=None, channel="default")  # type: ignore[arg-type]
        assert sse.kick(channel="default") == 1


# -- for which app -----------------------------------------------------------------------------------------------------


def granted(app: Flask, path: str = TWO) -> list[str]:
    return first(app, path)[1]["channels"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("early", [True, False], ids=["before the apps", "after them"])
def test_a_function_of_the_sse_decides_for_all_its_apps(early: bool) -> None:
    sse = SSE()
    apps = [] if early else [make_app(sse)[0] for _ in range(2)]
    sse.authorize(lambda channels: ["a"])
    apps = apps or [make_app(sse)[0] for _ in range(2)]
    assert [granted(app) for app in apps] == [["a"], ["a"]]


def test_a_factory_makes_an_app_again_and_again() -> None:
    sse = SSE()

    def create_app(name: str) -> Flask:
        app, _ = make_app(sse)

        @sse.for_app(app).authorize
        def allowed(channels: tuple[str, ...]) -> list[str]:
            return [channel for channel in channels if channel == app.config["TEAM"]]

        @sse.for_app(app).identify
        def user() -> str:
            return request.headers.get("X-User", name)

        @sse.for_app(app).snapshot("a")
        def state() -> tuple[str, str]:
            return "state", name

        app.config["TEAM"] = name
        return app

    apps = [create_app("ab"[number % 2]) for number in range(100)]
    for app, name in zip(apps, "ab" * 50, strict=True):
        assert granted(app) == [name]
    references = [weakref.ref(app) for app in apps]
    del app, apps
    gc.collect()
    assert [reference() for reference in references] == [None] * 100


def test_functions_that_know_their_app_do_not_keep_it() -> None:
    sse = SSE()
    app, _ = make_app(sse)
    for hook in HOOKS:
        register(sse.for_app(app), hook, lambda *_, app=app: app)  # type: ignore[arg-type]
    reference = weakref.ref(app)
    del app
    gc.collect()
    assert reference() is None


def test_a_factory_that_registers_for_all_apps_twice_gets_an_error() -> None:
    sse = SSE()

    def create_app() -> None:
        make_app(sse)

        @sse.authorize
        def allowed(channels: tuple[str, ...]) -> tuple[str, ...]:
            return channels

    create_app()
    with pytest.raises(
        UsageError, match=r"is registered as authorize already: .* application factory, .* @sse\.for_app\(app\)"
    ):
        create_app()


def test_the_same_function_again_changes_nothing() -> None:
    class Rules:
        def granted(self, channels: tuple[str, ...]) -> tuple[str, ...]:
            return channels

    def granted(channels: tuple[str, ...]) -> tuple[str, ...]:
        return channels

    rules = Rules()
    for get in (lambda: granted, lambda: rules.granted):  # each access makes another object of a bound method
        sse = SSE()
        first = sse.authorize(get())
        assert sse.authorize(get()) == first
        with pytest.raises(UsageError, match="is registered as authorize already"):
            sse.authorize(Rules().granted)


@pytest.mark.parametrize("hook", ["authorize", "identify", "revalidate", "allow_stats"])
def test_an_app_has_one_function_of_its_own(hook: str) -> None:
    app, sse = make_app()
    register(sse.for_app(app), hook, lambda *_: True)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"is registered as {hook} already: there can be only one for an app"):
        register(sse.for_app(app), hook, lambda *_: True)  # type: ignore[arg-type]


@pytest.mark.parametrize("own_first", [True, False])
def test_the_function_of_an_app_counts_before_that_of_the_sse(own_first: bool) -> None:
    sse = SSE()
    mine, other = make_app(sse)[0], make_app(sse)[0]

    def register_own() -> None:
        sse.for_app(mine).authorize(lambda channels: ["a"])
        sse.for_app(mine).identify(lambda: "own")
        sse.for_app(mine).allow_stats(lambda: True)
        sse.for_app(mine).snapshot("a")(lambda: ("own", 1))

    def register_shared() -> None:
        sse.authorize(lambda channels: ["b"])
        sse.identify(lambda: "shared")
        sse.allow_stats(lambda: False)
        sse.snapshot("a")(lambda: ("shared", 1))

    for step in (register_own, register_shared) if own_first else (register_shared, register_own):
        step()
    assert [granted(app) for app in (mine, other)] == [["a"], ["b"]]
    assert [get(app, "/events/stats").status_code for app in (mine, other)] == [200, 403]
    with get(mine, TWO) as response:
        assert b"event: own\n" in next(iter(response.response))
        with mine.app_context():
            assert sse.kick(user="shared") == 0
            assert sse.kick(user="own") == 1


def test_each_app_has_its_own_revalidate() -> None:
    def own(user: str) -> bool:
        return True

    def shared(user: str) -> bool:
        return True

    sse = SSE()
    mine, other = make_app(sse)[0], make_app(sse)[0]
    sse.for_app(mine).revalidate(own)
    sse.revalidate(shared)
    later_on, _ = make_app(sse)
    asked = []
    for app in (mine, other, later_on):
        with app.app_context():
            asked.append(sse.manager.revalidate)
    assert asked == [own, shared, shared]


def test_another_decorator_leaves_the_revalidate_of_the_manager_alone() -> None:
    def own(user: str | int) -> bool:
        return True

    app, sse = make_app()
    sse.manager.revalidate = own
    sse.identify(lambda: "ada")
    sse.for_app(app).snapshot("a")(lambda: ("state", 1))
    assert sse.manager.revalidate is own


def test_without_authorize_beside_an_app_with_its_own_no_stream_is_served() -> None:
    sse = SSE()
    mine, other = make_app(sse)[0], make_app(sse)[0]
    assert granted(other, "/events") == ["default"]
    sse.for_app(mine).authorize(lambda channels: channels)
    with pytest.raises(UsageError, match=r"another app of this SSE has an authorize of its own, .*for_app"):
        get(other)
    sse.authorize(lambda channels: channels)
    assert granted(other) == ["a", "b"]


def test_for_app_accepts_current_app() -> None:
    app, sse = make_app()
    with app.app_context():
        sse.for_app(current_app).authorize(lambda channels: ["a"])
    assert granted(app) == ["a"]


def test_an_app_that_does_not_know_the_sse_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"the app 'other' does not know this SSE: call sse\.init_app\(app\)"):
        SSE().for_app(Flask("other"))
