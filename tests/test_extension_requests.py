"""The Flask extension: access to channels, and what the browser gets."""

from __future__ import annotations

import logging
from queue import SimpleQueue
from typing import Any

import pytest
from flask import Flask, Response, abort, current_app, has_app_context, has_request_context, request, url_for
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client as WSGIClient
from werkzeug.test import create_environ, run_wsgi_app

from sse_batcher import SSE, UsageError, signals, stream
from sse_batcher.testing import open_stream
from sse_batcher.wire import HEADERS

from .kit.flask_apps import MakeApp, apps_fixture, get, read, status
from .kit.sse_parser import take_events
from .kit.waiting import TIMEOUT

make_app = apps_fixture()


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
        assert sse.manager.shutdown(TIMEOUT)


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
        assert sse.manager.shutdown(TIMEOUT)


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
        assert sse.manager.shutdown(TIMEOUT)


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
        assert sse.manager.shutdown(TIMEOUT)


def test_an_app_mounted_below_another_one_finds_its_stream(make_app: MakeApp) -> None:
    app, _sse = make_app()
    app.add_url_rule("/where", "where", lambda: url_for("sse_batcher.stream"))
    client = WSGIClient(DispatcherMiddleware(Flask("outer"), {"/sub": app}))
    assert client.get("/sub/where").text == "/sub/events"
    with client.get("/sub/events") as response:
        assert read(response, 1)[0].type == "sse_open"


def test_a_browser_gets_a_batch(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_BATCH_WINDOW=10)
    with open_stream(app) as stream:
        for name in "abc":
            sse.enqueue("tool_list_changed", {"server": name})
        stream.clock.advance(9.9)
        assert stream.events() == []
        stream.clock.advance(0.1)
        opened, batch = stream.frames()
    assert (opened.type, opened.data) == ("sse_open", {"heartbeat": 15.0, "channels": ["default"]})
    assert batch.type == "tool_list_changed_batch"
    assert batch.data["events"] == [{"server": "a"}, {"server": "b"}, {"server": "c"}]


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
        assert sse.manager.shutdown(TIMEOUT)  # after which the app thread has done all it had to
    assert (left.get(timeout=TIMEOUT), left.empty()) == ("left", True)


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
        assert sse.manager.shutdown(TIMEOUT)
        assert [event.type for event in take_events(response.response, 3)] == ["sse_open", "log", "sse_bye"]
        assert list(response.response) == []
