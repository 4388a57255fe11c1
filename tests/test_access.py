"""Under Flask: users and their limits, streams that end, other origins, health and counters."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from flask import Flask, Response, abort, current_app, has_request_context, request
from flask.sessions import SecureCookieSession, SessionInterface
from werkzeug.test import TestResponse, create_environ

from sse_batcher import SSE, ConfigurationError, EventBatcher, UsageError
from sse_batcher.flask.cors import Cors
from sse_batcher.manager_state import process_of
from sse_batcher.options import TRANSPORTS
from sse_batcher.testing import StreamRefusedError, open_stream

from .kit import locks
from .kit.flask_sites import making
from .kit.redisserver import be_patient, redis_server
from .kit.sse_parser import parse
from .kit.threads import in_thread
from .kit.waiting import TIMEOUT

MakeSite = Callable[..., "Site"]


class Site:
    """An app whose users are named in the header ``X-User``."""

    def __init__(self, **config: Any) -> None:
        self.app = Flask("site", static_folder=None)
        self.app.config.update(config)
        self.sse = SSE(self.app)
        self.manager = self.sse.manager

    def identify(self) -> None:
        self.sse.identify(lambda: request.headers.get("X-User"))

    def request(self, path: str = "/events", method: str = "GET", **headers: str) -> TestResponse:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.app.test_client().open(path, method=method, headers=names)


@pytest.fixture
def make_site() -> Iterator[MakeSite]:
    with making(Site) as make:
        yield make


def first(response: TestResponse) -> tuple[str, Any]:
    (event,) = parse(next(iter(response.response)), strict=True)  # type: ignore[arg-type]
    return event.type, event.json


# -- users -------------------------------------------------------------------------------------------------------------


def test_each_user_has_a_limit_of_their_own(make_site: MakeSite) -> None:
    site = make_site(SSE_MAX_CLIENTS_PER_USER=1)
    site.identify()
    ada = {"X-User": "ada"}
    with open_stream(site.app, headers=ada) as opened, open_stream(site.app, headers=ada) as refused:
        assert (opened.opened_with, refused.busy) == ("sse_open", "limit")
        with open_stream(site.app, headers={"X-User": "bob"}) as other:
            assert other.opened_with == "sse_open"


def test_a_kicked_user_comes_back_and_authorize_decides(make_site: MakeSite) -> None:
    site = make_site()
    site.identify()
    banned: set[Hashable] = set()
    site.sse.authorize(lambda channels: () if request.headers["X-User"] in banned else channels)
    with open_stream(site.app, headers={"X-User": "ada"}) as stream:
        banned.add("ada")
        site.sse.kick(user="ada")
        assert stream.bye == "kicked"
        with pytest.raises(StreamRefusedError) as refused:
            stream.reconnect()
    assert refused.value.status == 403


class SlowStore(SessionInterface):
    """A session store that lets something happen while it saves."""

    def __init__(self, happen: Callable[[], None]) -> None:
        self.happen = happen

    def open_session(self, *_: Any) -> SecureCookieSession:
        return SecureCookieSession()

    def save_session(self, *_: Any) -> None:
        self.happen()


MOMENTS = ["before_request", "authorize", "identify", "snapshot", "after_request", "session", "first step"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kick_while_a_stream_opens_ends_it(make_site: MakeSite, moment: str, transport: str) -> None:
    site = make_site(SSE_BATCHING=False, SSE_TRANSPORT=transport)
    kicked: list[int] = []

    def reach(name: str) -> None:
        if name == moment and not kicked:
            kicked.append(site.sse.kick(user="ada"))
            site.sse.enqueue("log", "secret")
            assert site.manager.flush_all(TIMEOUT)

    @site.sse.authorize
    def allowed(channels: tuple[str, ...]) -> tuple[str, ...]:
        reach("authorize")
        return channels

    @site.sse.identify
    def user() -> str:
        reach("identify")
        return "ada"

    @site.sse.snapshot("default")
    def state() -> tuple[str, str]:
        reach("snapshot")
        return "state", "secret"

    site.app.before_request(lambda: reach("before_request"))
    site.app.after_request(lambda response: [reach("after_request"), response][1])
    site.app.session_interface = SlowStore(lambda: reach("session"))
    # Not the test client, which takes the first step at once.
    body = site.app.wsgi_app(create_environ("/events"), lambda status, headers, exc_info=None: lambda data: None)
    reach("first step")
    blocks = iter(body)
    events = list(parse(next(blocks), strict=True))
    assert kicked == [0]
    assert [(event.type, event.json.get("reason"), event.id) for event in events] == [
        ("sse_open", None, ""),
        ("sse_bye", "kicked", ""),
    ]
    assert list(blocks) == []
    with site.request() as response:
        opened, state_of_it = parse(next(iter(response.response)), strict=True)  # type: ignore[arg-type]
        assert (opened.type, state_of_it.json) == ("sse_open", "secret")


def test_the_first_stream_of_a_process_is_not_ended_by_an_old_kick(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_patient(monkeypatch)
    with redis_server(tmp_path) as server:
        before, site = make_site(SSE_BACKEND=server.url), make_site(SSE_BACKEND=server.url)
        before.sse.kick(user="ada")
        site.identify()
        with site.request(X_User="ada") as response:
            assert first(response)[0] == "sse_open"  # and no other block
        assert [each.manager.shutdown(TIMEOUT) for each in (before, site)] == [True, True]


def test_a_view_of_the_apps_own_that_opens_the_stream_is_covered(make_site: MakeSite) -> None:
    site = make_site()
    view = site.app.view_functions["sse_batcher.stream"]

    @site.sse.authorize
    def allowed(channels: tuple[str, ...]) -> tuple[str, ...]:
        site.sse.kick(channel="default")
        return channels

    site.app.add_url_rule("/mine", "mine", view)
    with site.request("/mine") as response:
        events = parse(next(iter(response.response)), strict=True)  # type: ignore[arg-type]
    assert [event.type for event in events] == ["sse_open", "sse_bye"]


@pytest.mark.parametrize("config", [{"SSE_MAX_CLIENTS_PER_USER": 1}, {}], ids=["limit", "revalidate"])
def test_limits_and_revalidate_need_identify(make_site: MakeSite, config: dict[str, Any]) -> None:
    site = make_site(**config)
    if not config:
        site.sse.revalidate(lambda user: True)
    site.app.testing = True
    with pytest.raises(UsageError, match=r"register @sse\.identify"):
        site.request()
    site.identify()
    with site.request(X_User="ada") as response:
        assert first(response)[0] == "sse_open"


def test_revalidate_runs_in_an_app_context_and_ends_streams(make_site: MakeSite) -> None:
    site = make_site(SSE_REVALIDATE_EVERY=0.01)
    site.identify()
    asked: SimpleQueue[tuple[Hashable, str, bool]] = SimpleQueue()

    @site.sse.revalidate
    def may_stay(user: Hashable) -> bool:
        asked.put((user, current_app.name, has_request_context()))
        return False

    with site.request(X_User="ada") as response:
        events = parse(b"".join(response.response), strict=True)  # type: ignore[arg-type]
    assert [event.type for event in events] == ["sse_open", "sse_bye"]
    assert events[-1].json == {"reason": "revoked"}
    assert asked.get(timeout=TIMEOUT) == ("ada", "site", False)


@pytest.mark.parametrize("name", ["authorize", "identify", "revalidate", "allow_stats"])
def test_a_second_function_for_the_same_decision_is_refused(make_site: MakeSite, name: str) -> None:
    decorate = getattr(make_site().sse, name)

    def decide(*_: object) -> bool:
        return True

    assert decorate(decide) is decide
    assert decorate(decide) is decide  # the same one: as when a factory registers it for each app that it makes
    with pytest.raises(UsageError, match=f"is registered as {name} already: there can be only one"):
        decorate(lambda *_: False)


# -- other origins -----------------------------------------------------------------------------------------------------

HERE, THERE = "https://here.example", "https://there.example"
CORS = "Access-Control-Allow-"
EXPOSED = "Access-Control-Expose-Headers"


def cors_of(response: TestResponse) -> dict[str, str]:
    names = ("Origin", "Credentials", "Methods", "Headers")
    found = {name: response.headers[CORS + name] for name in names if CORS + name in response.headers}
    return found | ({"Vary": response.headers["Vary"]} if "Vary" in response.headers else {})


def test_no_other_origin_may_read_the_stream_unless_the_app_says_so(make_site: MakeSite) -> None:
    site = make_site()
    for method in ("GET", "OPTIONS"):
        with site.request(method=method, Origin=THERE) as response:
            assert cors_of(response) == {}


def test_an_origin_on_the_list_may_read_the_stream_with_cookies_and_another_may_not(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS=[HERE, "http://localhost:5173"])
    with site.request(Origin=HERE) as response:
        assert cors_of(response) == {"Origin": HERE, "Credentials": "true", "Vary": "Origin"}
    for other in (THERE, "null", HERE + ".evil.example", HERE.upper(), "https://here.example:443"):
        with site.request(Origin=other) as response:
            assert cors_of(response) == {"Vary": "Origin"}
    with site.request() as response:
        assert cors_of(response) == {"Vary": "Origin"}


def test_preflights_and_refusals_have_cors_headers_too(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS=HERE)
    preflight = cors_of(site.request(method="OPTIONS", Origin=HERE, Access_Control_Request_Method="GET"))
    assert preflight == {
        "Origin": HERE,
        "Credentials": "true",
        "Methods": "GET",
        "Headers": "Authorization, Cache-Control, Last-Event-ID",
        "Vary": "Origin",
    }
    refused = site.request("/events?channel=secret", Origin=HERE)
    assert (refused.status_code, refused.headers[CORS + "Origin"]) == (403, HERE)


@pytest.mark.parametrize("origins", [HERE, "*"])
def test_pages_of_another_origin_can_read_retry_after(make_site: MakeSite, origins: str) -> None:
    site = make_site(SSE_CORS_ORIGINS=origins)
    site.sse.authorize(lambda _: abort(Response("slow down", 429, {"Retry-After": "8"})))
    assert site.request(Origin=HERE).headers[EXPOSED] == "Retry-After"
    assert EXPOSED not in site.request(method="OPTIONS", Origin=HERE, Access_Control_Request_Method="GET").headers
    if origins != "*":
        assert EXPOSED not in site.request(Origin=THERE).headers


def test_with_a_star_any_origin_may_read_the_stream_without_cookies(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS="*")
    with site.request(Origin=THERE) as response:
        assert cors_of(response) == {"Origin": "*"}


def test_the_counters_are_not_for_other_origins(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS="*")
    site.sse.allow_stats(lambda: True)
    for path in ("/events/health", "/events/stats"):
        assert cors_of(site.request(path, Origin=THERE)) == {}


@pytest.mark.parametrize("origins", [{HERE}, (HERE,), [HERE], HERE, "capacitor://localhost", "http://[::1]:8000"])
def test_origins_are_given_one_by_one_or_as_a_list(origins: Any) -> None:
    Cors(origins)


@pytest.mark.parametrize("origins", ["", "here.example", HERE + "/", HERE + "/path", ["*", HERE], [None], 7, b"*"])
def test_an_invalid_origin_is_refused(origins: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^cors_origins"):
        Cors(origins)


# -- health, counters --------------------------------------------------------------------------------------------------


def test_health_says_ok_or_why_not(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()

    def health() -> tuple[int, Any, str]:
        response = site.request("/events/health")
        return response.status_code, response.json, response.headers["Cache-Control"]

    assert health() == (200, {"status": "ok", "backend_answered": 0.0}, "no-store")
    for seconds, expected in [(4.9, (200, "ok")), (5.1, (503, "backend"))]:
        with monkeypatch.context() as patched:
            patched.setattr(EventBatcher, "publishing_for", seconds)
            assert health() == (expected[0], {"status": expected[1], "backend_answered": 0.0}, "no-store")
    assert site.manager.shutdown(TIMEOUT)
    assert health() == (503, {"status": "draining", "backend_answered": 0.0}, "no-store")


def test_health_takes_no_lock(make_site: MakeSite) -> None:
    with locks.recorded() as made:
        process = process_of(make_site().manager)
        process.stats()  # makes the engine of its batcher
    with made.held(at_least=3):
        assert in_thread(lambda: (process.unhealthy_reason(), process.backend_answered)) == (None, 0.0)


def test_health_looks_at_no_client(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()

    def count() -> None:
        pytest.fail("it counts the clients")

    monkeypatch.setattr(process_of(site.manager).hub, "count", count)
    assert site.request("/events/health").status_code == 200


def test_allow_stats_decides_who_sees_the_counters(make_site: MakeSite) -> None:
    site = make_site()
    assert site.request("/events/stats").status_code == 404
    site.sse.allow_stats(lambda: request.headers.get("X-User") == "root")
    assert site.request("/events/stats", X_User="ada").status_code == 403
    response = site.request("/events/stats", X_User="root")
    assert json.loads(response.text).keys() == site.manager.get_stats().as_dict().keys()
    assert response.headers["Cache-Control"] == "no-store"


def test_a_forgotten_allow_stats_is_logged_once(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site()
    assert [site.request("/events/stats").status_code for _ in range(2)] == [404, 404]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("sse_batcher.hooks", "WARNING")
    assert "register one with @sse.allow_stats" in record.getMessage()
