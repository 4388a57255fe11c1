"""The Flask extension: configuration, several apps, access to channels, and what the browser gets."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import gc
import json
import logging
import re
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
from flask import Config, Flask, Response, abort, current_app, has_app_context, has_request_context, request, url_for
from flask.json.provider import DefaultJSONProvider, JSONProvider
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client as WSGIClient
from werkzeug.test import TestResponse, create_environ, run_wsgi_app

from sse_batcher import (
    SSE,
    BatchOptions,
    ClientOptions,
    ConfigurationError,
    HistoryOptions,
    InvalidEventError,
    UsageError,
    signals,
    stream,
)
from sse_batcher.flask.config import KEYS
from sse_batcher.wire import HEADERS

from .kit.sse_parser import ServerEvent, take
from .kit.threads import in_thread

LOGGER = "sse_batcher.extension"
MakeApp = Callable[..., tuple[Flask, SSE]]


@pytest.fixture
def make_app() -> Iterator[MakeApp]:
    """Makes an app and its extension, or adds an app to one. All managers are shut down at the end."""
    managers = []

    def make(sse: SSE | None = None, name: str = "app", **config: Any) -> tuple[Flask, SSE]:
        app = Flask(name, static_folder=None)
        app.config.update(config)
        sse = sse or SSE()
        sse.init_app(app)
        with app.app_context():
            managers.append(sse.manager)
        return app, sse

    yield make
    for manager in managers:
        assert manager.shutdown()


def get(app: Flask, path: str = "/events", **options: Any) -> TestResponse:
    return app.test_client().get(path, **options)


def status(app: Flask, path: str = "/events", **options: Any) -> int:
    with get(app, path, **options) as response:
        return response.status_code


def read(response: TestResponse, count: int) -> list[ServerEvent]:
    return take(response.response, count)


# -- registration ------------------------------------------------------------------------------------------------------


def test_the_constructor_registers_an_app() -> None:
    app = Flask(__name__)
    sse = SSE(app)
    assert app.extensions["sse_batcher"] is sse
    assert "sse_batcher" in app.blueprints


def test_init_app_registers_an_app_later(make_app: MakeApp) -> None:
    app, sse = make_app()
    assert app.extensions["sse_batcher"] is sse


@pytest.mark.parametrize("same", [True, False])
def test_a_second_registration_is_refused_with_a_full_sentence(make_app: MakeApp, same: bool) -> None:
    app, sse = make_app()
    with pytest.raises(UsageError, match=r"^this app has an SSE already: create one SSE and call init_app\(\) once"):
        (sse if same else SSE()).init_app(app)
    assert app.extensions["sse_batcher"] is sse


def public(thing: object) -> list[str]:
    return [name for name in dir(thing) if not name.startswith("_")]


def test_an_sse_shows_what_an_app_calls_and_nothing_else(make_app: MakeApp) -> None:
    app, sse = make_app()
    decorators = ["allow_stats", "authorize", "identify", "revalidate", "snapshot"]
    methods = ["broadcast", "cursor", "enqueue", "for_app", "init_app", "kick", "manager", "response"]
    assert public(sse) == sorted(decorators + methods)
    assert public(sse.for_app(app)) == decorators


def test_an_sse_names_its_apps(make_app: MakeApp) -> None:
    sse = SSE()
    assert repr(sse) == "<SSE apps=[]>"
    _first, _second = make_app(sse, "shop"), make_app(sse, "blog")
    assert sorted(re.findall("'(.*?)'", repr(sse))) == ["blog", "shop"]


def test_the_decorators_of_an_app_name_its_functions(make_app: MakeApp) -> None:
    app, sse = make_app()
    hooks = sse.for_app(app)
    assert repr(hooks) == "<Hooks: no function>"
    sse.authorize(lambda channels: channels)
    hooks.identify(lambda: "ada")
    hooks.snapshot("a")(lambda: ("state", 1))
    assert repr(hooks) == "<Hooks: identify, snapshot('a')>"


def test_wrong_use_is_an_error_of_ours(make_app: MakeApp) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: channels)
    other = Flask("other")
    for use in (
        lambda: sse.init_app(app),
        lambda: sse.for_app(other),
        lambda: SSE().manager,
        lambda: sse.authorize(lambda channels: ()),
        sse.response,
    ):
        with pytest.raises(UsageError):
            use()


# -- configuration -----------------------------------------------------------------------------------------------------

GOOD = {
    "SSE_BATCH_WINDOW": 0.5,
    "SSE_MAX_BATCH_SIZE": 7,
    "SSE_MAX_FRAME_BYTES": 999,
    "SSE_DEDUP_KEY": "id",
    "SSE_CRITICAL_TYPES": {"alarm"},
    "SSE_MIXED": True,
    "SSE_LEADING": True,
    "SSE_MAX_PENDING_BYTES": 5_000,
    "SSE_PER_TYPE": {"log": {"dedup_key": None}},
    "SSE_QUEUE_FRAMES": 9,
    "SSE_QUEUE_BYTES": 9_999,
    "SSE_HEARTBEAT": 3.0,
    "SSE_SEND_TIMEOUT": 7.0,
    "SSE_MAX_STREAM_AGE": 600.0,
    "SSE_MAX_CLIENTS": 12,
    "SSE_MAX_CLIENTS_PER_USER": 3,
    "SSE_REVALIDATE_EVERY": 5.0,
    "SSE_TRANSPORT": "auto",
    "SSE_HTTP2": "allow",
    "SSE_RETRY_MS": 500,
    "SSE_HISTORY_FRAMES": 300,
    "SSE_HISTORY_BYTES": 50_000,
    "SSE_HISTORY_AGE": 60.0,
}
BAD = {
    "SSE_BATCH_WINDOW": [100, -1, "0.1", True],
    "SSE_MAX_BATCH_SIZE": [0, 1.5, "50"],
    "SSE_MAX_FRAME_BYTES": [0],
    "SSE_DEDUP_KEY": [1],
    "SSE_CRITICAL_TYPES": ["error"],
    "SSE_MIXED": ["yes"],
    "SSE_LEADING": [1],
    "SSE_MAX_PENDING_BYTES": [-1],
    "SSE_PER_TYPE": [{"log": {"batch_window": 100}}, {"log": {"mixed": True}}, []],
    "SSE_QUEUE_FRAMES": [0],
    "SSE_QUEUE_BYTES": [None],
    "SSE_HEARTBEAT": [0, 15_000],
    "SSE_SEND_TIMEOUT": [0, 30_000],
    "SSE_MAX_STREAM_AGE": [0, "1800"],
    "SSE_MAX_CLIENTS": [0, "many"],
    "SSE_MAX_CLIENTS_PER_USER": [0, True],
    "SSE_REVALIDATE_EVERY": [0, None],
    "SSE_TRANSPORT": ["detached", None],
    "SSE_HTTP2": [False, "refused"],
    "SSE_RETRY_MS": [0, 1.5],
    "SSE_HISTORY_FRAMES": [0],
    "SSE_HISTORY_BYTES": [1.5],
    "SSE_HISTORY_AGE": [0, "60"],
    "SSE_BATCHING": ["yes", None, 1, {"batchWindow": 0.1}, {"enabled": 1}, {"batch_window": 1}],
    "SSE_BACKEND": ["http://localhost", None],
    "SSE_URL_PREFIX": ["events", "", 7],
    "SSE_CORS_ORIGINS": [
        "example.com",
        "https://example.com/",
        "https://Example.com",
        ["*", "https://example.com"],
        ["null"],
        [None],
        None,
        7,
        "",
    ],
}


class Recorder:
    """Stands where `SSEManager` is made, and keeps what it is given."""

    def __init__(self, batching: Any, clients: Any, backend: Any, **more: Any) -> None:
        history = more["history"]
        self.options = {field.name: getattr(batching, field.name) for field in dataclasses.fields(batching)}
        self.options |= {field.name: getattr(clients, field.name) for field in dataclasses.fields(clients)}
        self.options |= {field.name: getattr(history, field.name) for field in dataclasses.fields(history)}
        self.options["backend"] = backend


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Which options a manager is made with under this config."""
    monkeypatch.setattr("sse_batcher.flask.extension.SSEManager", Recorder)

    def options(**config: Any) -> dict[str, Any]:
        app = Flask(__name__)
        app.config.update(config)
        return SSE(app).manager.options  # type: ignore[attr-defined]

    return options


def test_every_key_is_tested_here() -> None:
    assert (
        sorted(KEYS)
        == sorted(BAD)
        == sorted([*GOOD, "SSE_BATCHING", "SSE_BACKEND", "SSE_URL_PREFIX", "SSE_CORS_ORIGINS"])
    )


def test_without_any_key_the_options_have_their_defaults(options_of: Callable[..., dict[str, Any]]) -> None:
    expected = Recorder(
        BatchOptions(), ClientOptions(), "memory://", history=HistoryOptions(), encode=None, context=None
    ).options
    assert options_of() == expected


@pytest.mark.parametrize(("key", "value"), GOOD.items())
def test_a_key_sets_the_option_of_its_name_and_no_other(
    options_of: Callable[..., dict[str, Any]], key: str, value: Any
) -> None:
    assert options_of(**{key: value}) == options_of() | {key.removeprefix("SSE_").lower(): value}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_wrong_value_is_an_error_that_names_the_key_and_leaves_the_app_alone(key: str, value: Any) -> None:
    app = Flask(__name__)
    app.config[key] = value
    with pytest.raises(ConfigurationError, match=f"^{key}\\b") as caught:
        SSE(app)
    assert caught.value.option == key.removeprefix("SSE_").lower()
    assert not app.extensions
    assert not app.blueprints


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("SSE_BATCH_WINDOWS", "SSE_BATCH_WINDOW"),
        ("SSE_MAX_BATCHSIZE", "SSE_MAX_BATCH_SIZE"),
        ("SSE_DEDUPE_KEY", "SSE_DEDUP_KEY"),
        ("SSE_HARTBEAT", "SSE_HEARTBEAT"),
        ("SSE_RETRY", "SSE_RETRY_MS"),
        ("SSE_BATCH", "SSE_BATCHING"),
        ("SSE_URLPREFIX", "SSE_URL_PREFIX"),
    ],
)
def test_a_misspelled_key_is_an_error_that_says_what_was_meant(key: str, meant: str) -> None:
    app = Flask(__name__)
    app.config[key] = 1
    with pytest.raises(ConfigurationError, match=rf"no config key {key}: did you mean {meant}\?"):
        SSE(app)


def test_an_unrelated_key_with_our_prefix_is_a_warning(caplog: pytest.LogCaptureFixture, make_app: MakeApp) -> None:
    make_app(SSE_REDIS_URL="redis://localhost", SSEBATCH=1, OTHER=2)
    (record,) = caplog.records
    assert (record.name, record.levelname) == (LOGGER, "WARNING")
    assert "SSE_REDIS_URL" in record.getMessage()


def test_batching_is_turned_off(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_BATCHING=False, SSE_BATCH_WINDOW=5)
    with get(app) as response:
        sse.enqueue("log", 1)
        sse.enqueue("log", 2)
        assert [event.data for event in read(response, 3)[1:]] == ["1", "2"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"SSE_BATCHING": True}, {}),
        ({"SSE_BATCHING": True, "SSE_BATCH_WINDOW": 2}, {"batch_window": 2}),
        ({"SSE_BATCHING": {}}, {}),
        ({"SSE_BATCHING": {"batchWindow": 250}}, {"batch_window": 0.25}),
        ({"SSE_BATCHING": {"maxBatchSize": 9}, "SSE_LEADING": True}, {"max_batch_size": 9, "leading": True}),
        ({"SSE_BATCHING": {"enabled": False}}, {"max_batch_size": 1, "dedup_key": None}),
        ({"SSE_BATCHING": False, "SSE_BATCH_WINDOW": 2}, {"batch_window": 2, "max_batch_size": 1, "dedup_key": None}),
        ({"SSE_BATCHING": BatchOptions(batch_window=3)}, {"batch_window": 3}),
        ({"SSE_BATCHING": BatchOptions(leading=True), "SSE_HEARTBEAT": 9}, {"leading": True, "heartbeat": 9}),
    ],
)
def test_the_batching_key_takes_what_the_argument_takes(
    options_of: Callable[..., dict[str, Any]], config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert options_of(**config) == options_of() | expected


@pytest.mark.parametrize(
    ("batching", "key"),
    [
        ({"batchWindow": 100}, "SSE_BATCH_WINDOW"),
        ({"enabled": True}, "SSE_MAX_BATCH_SIZE"),
        (BatchOptions(), "SSE_BATCH_WINDOW"),
        (BatchOptions(), "SSE_MAX_FRAME_BYTES"),
    ],
)
def test_batching_that_is_configured_twice_is_an_error_that_names_both_keys(batching: Any, key: str) -> None:
    app = Flask(__name__)
    app.config.update({"SSE_BATCHING": batching, key: GOOD[key]})
    with pytest.raises(ConfigurationError, match=f"^SSE_BATCHING and {key} both say how to batch"):
        SSE(app)


def test_the_other_keys_are_checked_also_with_batching_off() -> None:
    app = Flask(__name__)
    app.config.update(SSE_BATCHING=False, SSE_BATCH_WINDOW=100)
    with pytest.raises(ConfigurationError, match=r"^SSE_BATCH_WINDOW: batch_window is in seconds"):
        SSE(app)


# -- configuration that comes too late ---------------------------------------------------------------------------------


def late_keys_logged(app: Flask, caplog: pytest.LogCaptureFixture, path: str = "/") -> list[tuple[str, str]]:
    """What the next request logs about the config: the level, and the beginning of the text."""
    caplog.clear()
    with get(app, path):
        pass
    return [
        (record.levelname, record.getMessage().partition(" after ")[0])
        for record in caplog.records
        if record.name == LOGGER
    ]


@pytest.mark.parametrize(
    ("change", "logged"),
    [
        (lambda config: config.update(SSE_BACKEND="redis://x"), ("ERROR", "the config key SSE_BACKEND was set")),
        (lambda config: config.update(SSE_MIXED=True), ("ERROR", "the config key SSE_MIXED was set")),
        (lambda config: config.update(SSE_HEARTBEAT=9), ("ERROR", "the config key SSE_HEARTBEAT was changed")),
        (lambda config: config.pop("SSE_HEARTBEAT"), ("ERROR", "the config key SSE_HEARTBEAT was removed")),
        (
            lambda config: config["SSE_CORS_ORIGINS"].append("https://b"),
            ("ERROR", "the config key SSE_CORS_ORIGINS was changed"),
        ),
        (
            lambda config: config["SSE_PER_TYPE"]["log"].update(leading=True),
            ("ERROR", "the config key SSE_PER_TYPE was changed"),
        ),
        (lambda config: config.update(SSE_BATCH_WINDOWS=1), ("ERROR", "the config key SSE_BATCH_WINDOWS was set")),
        (
            lambda config: config.update(SSE_REDIS_URL="redis://x"),
            ("WARNING", "sse_batcher does not know the config key SSE_REDIS_URL and ignores it"),
        ),
    ],
)
def test_a_key_that_is_set_too_late_is_logged_at_the_first_request(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, change: Callable[[Any], Any], logged: tuple[str, str]
) -> None:
    app, _ = make_app(SSE_HEARTBEAT=3, SSE_CORS_ORIGINS=["https://a"], SSE_PER_TYPE={"log": {"leading": False}})
    change(app.config)
    assert late_keys_logged(app, caplog) == [
        logged
    ]  # for any page: with a late SSE_URL_PREFIX, the stream's URL is a 404
    assert late_keys_logged(app, caplog, "/events") == []


def test_the_log_line_of_a_late_key_says_what_to_do(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    app, _ = make_app()
    app.config.update(SSE_BACKEND="redis://x", SSE_BATCH_WINDOWS=1)
    assert len(late_keys_logged(app, caplog)) == 2
    assert "and that has no effect: set it before" in caplog.messages[0]
    assert "and that has no effect: set SSE_BATCH_WINDOW before" in caplog.messages[1]


def test_keys_that_have_not_changed_are_not_logged(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    app, _ = make_app(SSE_OTHER=object(), SSE_PER_TYPE={"log": {"leading": True}}, SSE_CRITICAL_TYPES={"alarm"})
    app.config["SSE_CRITICAL_TYPES"] = {"alarm"}
    app.config["SECRET_KEY"] = "x"
    assert late_keys_logged(app, caplog) == []


def test_a_late_backend_key_suppresses_no_warning(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    app, _ = make_app()
    app.config["SSE_BACKEND"] = "memory://"
    with get(app, environ_overrides={"wsgi.multiprocess": True}):
        assert any("this server runs several processes" in message for message in caplog.messages)


def test_a_backend_key_that_is_removed_later_still_suppresses_the_warning(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = make_app(SSE_BACKEND="memory://")
    del app.config["SSE_BACKEND"]
    with get(app, environ_overrides={"wsgi.multiprocess": True}):
        assert not any("this server runs several processes" in message for message in caplog.messages)


def test_a_late_limit_for_each_user_has_no_effect(make_app: MakeApp) -> None:
    app, _ = make_app()
    app.config["SSE_MAX_CLIENTS_PER_USER"] = 1
    assert status(app) == 200


def test_after_the_first_request_no_request_reads_our_keys(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_HEARTBEAT=3)
    sse.allow_stats(lambda: True)
    read_keys: list[object] = []

    class Watched(Config):
        def __getitem__(self, key: str) -> Any:
            read_keys.append(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read_keys.append(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            read_keys.append(key)
            return super().__contains__(key)

        def items(self) -> Any:
            read_keys.append("SSE_ all of them")
            return super().items()

    assert status(app) == 200
    app.config = Watched(app.root_path, app.config)
    for path in ("/", "/events", "/events?channel=x", "/events/stats", "/events/health"):
        status(app, path)
    assert read_keys
    assert [key for key in read_keys if str(key).startswith("SSE_")] == []


# -- several apps ------------------------------------------------------------------------------------------------------


def test_with_one_app_any_thread_enqueues_without_a_context(make_app: MakeApp) -> None:
    app, sse = make_app()
    with get(app) as response:
        in_thread(lambda: sse.enqueue("log", 1))
        in_thread(lambda: sse.broadcast("note", 2))
        assert in_thread(lambda: sse.manager.flush_all(5))
        assert [event[:2] for event in read(response, 3)[1:]] == [("log", "1"), ("note", "2")]


def test_inside_a_context_it_is_that_apps_manager(make_app: MakeApp) -> None:
    first, sse = make_app()
    second, _ = make_app(sse)
    with first.app_context():
        mine = sse.manager
        sse.enqueue("log", 1)
        with second.app_context():
            assert sse.manager is not mine
        assert sse.manager is mine
    assert mine.get_stats().enqueued == 1
    with second.app_context():
        assert sse.manager.get_stats().enqueued == 0


def test_with_two_apps_a_thread_without_a_context_gets_an_error(make_app: MakeApp) -> None:
    _first, sse = make_app()
    _second, _ = make_app(sse)
    for use in (lambda: sse.enqueue("log", 1), lambda: sse.broadcast("log", 1), lambda: sse.manager):
        with pytest.raises(UsageError, match=r"2 apps have this SSE: take sse\.manager inside an app context"):
            in_thread(use)


def test_a_manager_taken_inside_a_context_is_passed_on(make_app: MakeApp) -> None:
    first, sse = make_app()
    _second, _ = make_app(sse)
    with first.app_context():
        manager = sse.manager
    in_thread(lambda: manager.enqueue("log", 1))
    assert manager.get_stats().enqueued == 1


def test_once_the_other_app_is_gone_a_thread_needs_no_context(make_app: MakeApp) -> None:
    first, sse = make_app()
    second, _ = make_app(sse)
    with second.app_context():
        expected = sse.manager
    del first
    gc.collect()
    assert in_thread(lambda: sse.manager) is expected


def test_without_any_app_a_call_is_an_error() -> None:
    with pytest.raises(UsageError, match="no app has this SSE"):
        SSE().enqueue("log", 1)


def test_in_the_context_of_a_foreign_app_a_call_is_an_error(make_app: MakeApp) -> None:
    _app, sse = make_app()
    with Flask("other").app_context(), pytest.raises(UsageError, match=r"call sse\.init_app\(app\)"):
        sse.enqueue("log", 1)


def test_an_extension_keeps_no_app_alive() -> None:
    class Provider(DefaultJSONProvider):
        def default(self, value: Any) -> Any:
            return str(value)

    sse = SSE()

    def use_an_app() -> weakref.ref[Flask]:
        app = Flask(__name__)
        app.json = Provider(app)
        sse.init_app(app)
        with get(app) as response:
            sse.enqueue("log", object)
            assert sse.manager.flush_all(5)
            read(response, 2)
        return weakref.ref(app)

    app = use_an_app()
    gc.collect()
    assert app() is None
    with pytest.raises(UsageError, match="no app has"):
        _ = sse.manager


def test_a_manager_that_was_passed_on_outlives_its_app() -> None:
    app = Flask(__name__)
    sse = SSE(app)
    manager = sse.manager
    del app
    gc.collect()
    with pytest.raises(UsageError, match="no app has"):
        _ = sse.manager
    with manager:
        manager.enqueue("log", {"a": 1})


# -- access to channels ------------------------------------------------------------------------------------------------


def test_without_authorize_only_the_default_channel_is_served(make_app: MakeApp) -> None:
    app, sse = make_app()
    assert status(app) == 200
    assert status(app, "/events?channel=default") == 200
    assert status(app, "/events?channel=other") == 403
    assert status(app, "/events?channel=default&channel=other") == 403
    assert sse.manager.get_stats().clients == 0


def test_authorize_is_called_once_in_the_view_with_all_names_in_order(make_app: MakeApp) -> None:
    app, sse = make_app()
    asked = []

    @sse.authorize
    def may_see(channels: tuple[str, ...]) -> tuple[str, ...]:
        asked.append((channels, request.endpoint, request.headers["X-User"], current_app.name))
        return channels

    assert status(app, "/events?channel=b&channel=a&channel=b", headers={"X-User": "me"}) == 200
    assert asked == [(("b", "a"), "sse_batcher.stream", "me", "app")]


def test_authorize_is_called_for_the_default_channel_too(make_app: MakeApp) -> None:
    app, sse = make_app()
    asked = []
    sse.authorize(asked.append)
    assert status(app) == 403
    assert asked == [("default",)]


def test_authorize_is_called_at_every_connect(make_app: MakeApp) -> None:
    app, sse = make_app()
    answers = iter([["a"], [], ["a"]])
    sse.authorize(lambda channels: next(answers))
    assert [status(app, "/events?channel=a") for _ in range(3)] == [200, 403, 200]


def test_authorize_is_a_decorator_that_leaves_the_function_as_it_was() -> None:
    def function(channels: tuple[str, ...]) -> tuple[str, ...]:
        return channels

    assert SSE().authorize(function) is function


def test_a_subset_is_served(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_BATCHING=False)
    sse.authorize(lambda channels: {"a"} & set(channels))
    with get(app, "/events?channel=a&channel=secret") as response:
        sse.enqueue("log", "hidden", channel="secret")
        sse.enqueue("log", "seen", channel="a")
        assert read(response, 2)[1].json == "seen"


def test_the_channels_asked_for_are_the_ones_served(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_BATCHING=False)
    sse.authorize(lambda channels: channels)
    with get(app, "/events?channel=a&channel=b") as response:
        for channel in ("a", "default", "b"):
            sse.enqueue("log", channel, channel=channel)
        sse.broadcast("log", "all")
        assert [event.json for event in read(response, 4)[1:]] == ["a", "b", "all"]


@pytest.mark.parametrize("answer", [None, (), [], set(), iter(())])
def test_none_or_nothing_from_authorize_is_403(make_app: MakeApp, answer: Any) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: answer)
    assert status(app) == 403


@pytest.mark.parametrize("answer", [["default", "foreign"], ["d"], ["*"]])
def test_an_authorize_that_adds_a_channel_is_an_error(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: answer)
    assert status(app) == 500
    assert "which was not asked for: return some of ('default',)" in caplog.text
    app.testing = True
    with pytest.raises(UsageError, match=r"^authorize\(\) returned"):
        get(app)


def test_authorize_may_abort(make_app: MakeApp) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: abort(401))
    assert status(app) == 401


# -- requests that cannot be served ------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["channel=*", "channel=", "channel=a%0Ab", "channel=a%00", "channel=" + "x" * 129])
def test_an_invalid_channel_is_400_and_authorize_is_not_called(make_app: MakeApp, query: str) -> None:
    app, sse = make_app()
    asked = []
    sse.authorize(asked.append)
    assert status(app, f"/events?{query}") == 400
    assert status(app, f"/events?channel=default&{query}") == 400
    assert asked == []


def test_a_hundred_channels_are_served_and_one_more_is_400(make_app: MakeApp) -> None:
    app, sse = make_app()
    sse.authorize(lambda channels: channels)
    names = [f"channel={number}" for number in range(101)]
    assert status(app, "/events?" + "&".join(names[:100])) == 200
    with get(app, "/events?" + "&".join(names)) as response:
        assert response.status_code == 400
        assert "1 to 100 channels, not 101" in response.text


def test_a_channel_that_is_refused_is_escaped_in_the_answer(make_app: MakeApp) -> None:
    app, _sse = make_app()
    assert "<script>" not in get(app, "/events?channel=%3Cscript%3E%00").text


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_another_method_is_405(make_app: MakeApp, method: str) -> None:
    app, _sse = make_app()
    response = app.test_client().open("/events", method=method)
    assert response.status_code == 405
    assert response.allow == {"GET", "HEAD", "OPTIONS"}


def test_options_says_what_is_allowed_and_ends(make_app: MakeApp) -> None:
    app, sse = make_app()
    response = app.test_client().options("/events")
    assert (response.status_code, response.data) == (200, b"")
    assert response.allow == {"GET", "HEAD", "OPTIONS"}
    assert sse.manager.get_stats().bytes == 0


def test_head_has_the_headers_of_a_stream_and_no_length_and_ends(make_app: MakeApp) -> None:
    app, sse = make_app()
    response = app.test_client().head("/events")
    assert (response.status_code, response.data) == (200, b"")
    assert sorted(response.headers) == sorted(HEADERS)
    assert sse.manager.get_stats().bytes == 0


def test_head_is_authorized_as_get_is(make_app: MakeApp) -> None:
    app, _sse = make_app()
    assert app.test_client().head("/events?channel=other").status_code == 403


# -- the stream --------------------------------------------------------------------------------------------------------


def test_a_stream_has_exactly_the_headers_of_the_contract(make_app: MakeApp) -> None:
    app, _sse = make_app()
    with get(app) as response:
        assert sorted(response.headers) == [
            ("Cache-Control", "no-cache, no-transform"),
            ("Content-Encoding", "identity"),
            ("Content-Type", "text/event-stream; charset=utf-8"),
            ("X-Accel-Buffering", "no"),
            ("X-Content-Type-Options", "nosniff"),
        ]


@pytest.mark.parametrize(
    ("prefix", "paths", "others"),
    [
        (None, ["/events", "/events/"], ["/", "/eventsx"]),
        ("/", ["/"], ["/events"]),
        ("/a/b", ["/a/b", "/a/b/"], ["/a", "/events"]),
        ("/a/b/", ["/a/b", "/a/b/"], ["/a", "/b"]),
    ],
)
def test_the_stream_is_at_the_prefix_with_and_without_a_slash(
    make_app: MakeApp, prefix: str | None, paths: list[str], others: list[str]
) -> None:
    app, _sse = make_app(**{} if prefix is None else {"SSE_URL_PREFIX": prefix})
    assert [status(app, path) for path in paths] == [200] * len(paths)
    assert [status(app, path) for path in others] == [404] * len(others)
    with app.test_request_context():
        assert url_for("sse_batcher.stream") == paths[0]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("prefix", "path", "options"),
    [
        ("/events", "/events", {}),
        ("/events", "/events/", {"methods": ["GET", "POST"]}),
        ("/events", "/events/health", {}),
        ("/", "/", {}),
        ("/", "/stats", {}),
    ],
)
def test_a_route_with_a_path_of_ours_is_a_warning(
    caplog: pytest.LogCaptureFixture, prefix: str, path: str, options: dict[str, Any], first: bool
) -> None:
    app = Flask("app", static_folder=None)
    app.config["SSE_URL_PREFIX"] = prefix
    if first:
        app.add_url_rule(path, "mine", lambda: "mine", **options)
    sse = SSE(app)
    sse.allow_stats(lambda: False)
    assert len(caplog.records) == first  # as early as it can be known
    if not first:
        app.add_url_rule(path, "mine", lambda: "mine", **options)
    assert [status(app, path), status(app, "/nothing")] == [403 if path == "/stats" and not first else 200, 404]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"GET {path} is a path of sse_batcher, and your endpoint 'mine' has it, too:")
    with app.app_context():
        assert sse.manager.shutdown()


def test_other_routes_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("app", subdomain_matching=True)
    app.config["SERVER_NAME"] = "example.com"
    app.add_url_rule("/events", "post", lambda: "mine", methods=["POST"])
    app.add_url_rule("/events", "elsewhere", lambda: "mine", subdomain="calendar")
    sse = SSE(app)
    app.add_url_rule("/<path:path>", "all", lambda path: path)
    app.add_url_rule("/events/<int:number>", "one", lambda number: "mine")
    assert [status(app), status(app, base_url="http://calendar.example.com"), status(app, "/events/7")] == [200] * 3
    assert caplog.records == []
    with app.app_context():
        assert sse.manager.shutdown()


@pytest.mark.parametrize("host", ["a.example.com", "localhost:5000"])
def test_with_host_matching_the_stream_is_at_each_host(host: str) -> None:
    app = Flask("app", host_matching=True, static_host="static.example.com")
    sse = SSE(app)
    sse.authorize(lambda channels: channels)
    sse.allow_stats(lambda: True)

    @app.get("/where", host="<any>")
    def where(any: str) -> str:
        return " ".join([url_for("sse_batcher.stream"), url_for("sse_batcher.stream", channel="a", _external=True)])

    base = f"http://{host}"
    with get(app, base_url=base) as response:
        assert read(response, 1)[0].type == "sse_open"
    assert [status(app, f"/events/{path}", base_url=base) for path in ("", "health", "stats")] == [200] * 3
    assert get(app, "/where", base_url=base).text == f"/events http://{host}/events?channel=a"
    app.config["SERVER_NAME"] = host
    with app.app_context():
        assert url_for("sse_batcher.stream") == f"http://{host}/events"
        assert sse.manager.shutdown()


def test_a_subdomain_can_have_a_route_of_its_own() -> None:
    app = Flask("app", subdomain_matching=True, static_folder=None)
    app.config["SERVER_NAME"] = "example.com"
    sse = SSE(app)

    @app.get("/events", subdomain="shop")
    def events() -> Response:
        status, headers, body = stream(sse.manager, request.environ, ["default"])
        return Response(body, status, headers)

    assert status(app, base_url="http://other.example.com") == 404
    for base in ("http://example.com", "http://shop.example.com"):
        with get(app, base_url=base) as response:
            assert read(response, 1)[0].type == "sse_open"
    with app.app_context():
        assert sse.manager.shutdown()


def test_an_app_mounted_below_another_one_finds_its_stream(make_app: MakeApp) -> None:
    app, _sse = make_app()
    app.add_url_rule("/where", "where", lambda: url_for("sse_batcher.stream"))
    client = WSGIClient(DispatcherMiddleware(Flask("outer"), {"/sub": app}))
    assert client.get("/sub/where").text == "/sub/events"
    with client.get("/sub/events") as response:
        assert read(response, 1)[0].type == "sse_open"


def test_a_browser_gets_a_batch(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_BATCH_WINDOW=10)
    with get(app) as response:
        for name in "abc":
            sse.enqueue("tool_list_changed", {"server": name})
        assert sse.manager.flush_all(5)
        opened, batch = read(response, 2)
    assert (opened.type, opened.json) == ("sse_open", {"heartbeat": 15.0, "channels": ["default"]})
    assert batch.type == "tool_list_changed_batch"
    assert batch.json["events"] == [{"server": "a"}, {"server": "b"}, {"server": "c"}]


@pytest.mark.parametrize("where", ["header", "query"])
def test_a_browser_that_returns_goes_on_from_its_last_event_id(make_app: MakeApp, where: str) -> None:
    app, _sse = make_app()
    with get(app) as response:
        (first,) = read(response, 1)
    options = (
        {"headers": {"Last-Event-ID": first.id}} if where == "header" else {"query_string": {"lastEventId": first.id}}
    )
    with get(app, **options) as response:
        assert read(response, 1)[0][::2] == ("sse_open", first.id)
    with get(app, headers={"Last-Event-ID": "00000000-1"}) as response:
        assert read(response, 1)[0].type == "sse_gap"


def test_a_stream_that_is_never_iterated_holds_nothing(make_app: MakeApp) -> None:
    app, sse = make_app()
    body = app.wsgi_app(create_environ("/events"), lambda status, headers, exc_info=None: None)
    assert sse.manager.get_stats().clients == 0
    body.close()
    assert sse.manager.get_stats().clients == 0
    assert list(body) == []


def test_closing_a_stream_twice_is_closing_it_once(make_app: MakeApp) -> None:
    app, sse = make_app()
    left = SimpleQueue()

    def receiver(manager: object, reason: str, **_: object) -> None:
        left.put(reason)

    with signals.client_disconnected.connected_to(receiver, sender=sse.manager):
        body, _status, _headers = run_wsgi_app(app, create_environ("/events"))
        next(iter(body))
        assert sse.manager.get_stats().clients == 1
        body.close()
        body.close()
        assert sse.manager.get_stats().clients == 0
        assert list(body) == []
        assert sse.manager.shutdown()  # after which the app thread has done all it had to
    assert (left.get(timeout=5), left.empty()) == ("left", True)


def test_the_request_is_over_before_its_stream_begins(make_app: MakeApp) -> None:
    app, sse = make_app()
    torn_down = []
    app.teardown_request(torn_down.append)
    app.teardown_appcontext(torn_down.append)
    body = app.wsgi_app(create_environ("/events"), lambda status, headers, exc_info=None: None)
    assert torn_down == [None, None]
    next(iter(body))
    assert not has_request_context()
    assert not has_app_context()
    assert sse.manager.get_stats().clients == 1
    body.close()


def test_a_shutdown_ends_a_stream_with_sse_bye(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_BATCH_WINDOW=10)
    with get(app) as response:
        sse.enqueue("log", 1)
        assert sse.manager.shutdown()
        assert [event.type for event in take(response.response, 3)] == ["sse_open", "log", "sse_bye"]
        assert list(response.response) == []


# -- JSON --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    x: int
    y: int


RICH = {
    "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "day": datetime.date(2026, 1, 1),
    "id": uuid.UUID(int=1),
    "price": decimal.Decimal("1.50"),
    "point": Point(1, 2),
}


def text_of(app: Flask, sse: SSE, data: Any) -> str:
    """The JSON text on the wire."""
    with get(app) as response:
        in_thread(lambda: sse.enqueue("log", data))
        assert sse.manager.flush_all(5)
        return read(response, 2)[1].data


def test_data_is_encoded_as_the_app_encodes_it(make_app: MakeApp) -> None:
    app, sse = make_app()
    sent = json.loads(text_of(app, sse, RICH))
    assert sent == json.loads(app.json.dumps(RICH))
    assert sent["id"] == "00000000-0000-0000-0000-000000000001"
    assert (sent["price"], sent["point"]) == ("1.50", {"x": 1, "y": 2})


def test_keys_keep_their_order_whatever_the_app_sorts(make_app: MakeApp) -> None:
    app, sse = make_app()
    assert text_of(app, sse, {"b": 1, "a": 2}) == '{"b":1,"a":2}'


def test_a_provider_that_is_set_after_init_app_counts(make_app: MakeApp) -> None:
    class Provider(DefaultJSONProvider):
        default = staticmethod(lambda value: f"<{value}>")

    app, sse = make_app()
    app.json = Provider(app)
    assert text_of(app, sse, decimal.Decimal(1)) == '"<1>"'


class OtherProvider(JSONProvider):
    """As one around another library: no `default`, and text that is neither ASCII nor one line."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return json.dumps({"wrapped": obj}, default=str, ensure_ascii=False, indent=2)

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return json.loads(s)


def test_a_provider_of_another_kind_is_called_and_its_text_made_one_line_of_ascii(make_app: MakeApp) -> None:
    app, sse = make_app()
    app.json = OtherProvider(app)
    assert text_of(app, sse, {"é": uuid.UUID(int=0)}) == (
        r'{"wrapped":{"\u00e9":"00000000-0000-0000-0000-000000000000"}}'
    )


def test_text_of_another_kind_of_provider_is_still_checked(make_app: MakeApp) -> None:
    app, sse = make_app()
    app.json = OtherProvider(app)
    with pytest.raises(InvalidEventError, match="data is nan, and JSON has no NaN"):
        sse.enqueue("log", float("nan"))


def test_data_that_the_app_cannot_encode_is_refused_in_the_caller(make_app: MakeApp) -> None:
    _app, sse = make_app()
    with pytest.raises(InvalidEventError, match="object is not JSON serializable"):
        sse.enqueue("log", object())


# -- around it ---------------------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_receivers_on_the_app_thread_are_in_their_apps_context(make_app: MakeApp) -> None:
    first, sse = make_app(name="first")
    second, _ = make_app(sse, name="second")
    seen: SimpleQueue[tuple] = SimpleQueue()

    def receiver(sender: object, client: object) -> None:
        seen.put((current_app.name, sse.manager is sender, has_request_context(), threading.current_thread().name))

    with signals.client_connected.connected_to(receiver):
        for app in (first, second):
            assert status(app) == 200
            assert seen.get(timeout=5) == (app.name, True, False, "sse_batcher-app")


def test_logs_are_ours_and_never_the_apps(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app, sse = make_app(SSE_OTHER_THING=1)
    text_of(app, sse, 1)
    assert {record.name.split(".")[0] for record in caplog.records} == {"sse_batcher"}


def test_a_second_function_that_authorizes_is_refused(make_app: MakeApp) -> None:
    _, sse = make_app()
    sse.authorize(lambda channels: channels)
    with pytest.raises(UsageError, match="only one"):
        sse.authorize(lambda channels: ())
