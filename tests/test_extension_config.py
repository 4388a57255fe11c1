"""The Flask extension: its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from flask import Config, Flask

from sse_batcher import SSE, BatchOptions, ClientOptions, ConfigurationError, HistoryOptions
from sse_batcher.flask.config import KEYS

from .kit.flask_apps import LOGGER, MakeApp, apps_fixture, get, read, status

make_app = apps_fixture()


# -- each key ----------------------------------------------------------------------------------------------------------

GOOD = {
    "SSE_BATCH_WINDOW": 0.5,
    "SSE_MAX_BATCH_SIZE": 7,
    "SSE_MAX_FRAME_BYTES": 999,
    "SSE_DEDUP_KEY": "id",
    "SSE_JOIN": "",
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
    "SSE_TRANSPORT": "attached",
    "SSE_POLL_WAIT": 10.0,
    "SSE_HTTP2": "allow",
    "SSE_RETRY_MS": 500,
    "SSE_COMPRESS": frozenset({"prices"}),
    "SSE_HISTORY_FRAMES": 300,
    "SSE_HISTORY_BYTES": 50_000,
    "SSE_HISTORY_AGE": 60.0,
}
BAD = {
    "SSE_BATCH_WINDOW": [100, -1, "0.1", True],
    "SSE_MAX_BATCH_SIZE": [0, 1.5, "50"],
    "SSE_MAX_FRAME_BYTES": [0],
    "SSE_DEDUP_KEY": [1],
    "SSE_JOIN": [None, 1, "\0"],
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
    "SSE_POLL_WAIT": [0, 25_000],
    "SSE_HTTP2": [False, "refused"],
    "SSE_RETRY_MS": [0, 1.5],
    "SSE_COMPRESS": ["prices", [1], [""]],
    "SSE_HISTORY_FRAMES": [0],
    "SSE_HISTORY_BYTES": [1.5],
    "SSE_HISTORY_AGE": [0, "60"],
    "SSE_BATCHING": ["yes", None, 1, {"batchWindow": 0.1}, {"enabled": 1}, {"batch_window": 1}],
    "SSE_BACKEND": ["http://localhost", None],
    "SSE_URL_PREFIX": ["events", "", 7],
    "SSE_TOKEN_SALT": ["", b"salt", 7],
    "SSE_MONITOR_CONTENT": ["yes", 1, None],
    "SSE_MONITOR_ADDRESSES": ["no", 0, None],
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
    monkeypatch.setattr("sse_batcher.flask.app_part.SSEManager", Recorder)

    def options(**config: Any) -> dict[str, Any]:
        app = Flask(__name__)
        app.config.update(config)
        return SSE(app).manager.options  # type: ignore[attr-defined]

    return options


def test_every_key_is_tested_here() -> None:
    others = ["SSE_BATCHING", "SSE_BACKEND", "SSE_URL_PREFIX", "SSE_CORS_ORIGINS", "SSE_TOKEN_SALT"]
    others += ["SSE_MONITOR_CONTENT", "SSE_MONITOR_ADDRESSES"]
    assert sorted(KEYS) == sorted(BAD) == sorted([*GOOD, *others])


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


# -- keys that come too late -------------------------------------------------------------------------------------------


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
