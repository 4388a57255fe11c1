"""The monitor's routes: who may see it, who may kick, and everything that must not get through."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from flask import Flask, request
from itsdangerous import Signer
from werkzeug.test import TestResponse

from sse_batcher import SSE, BackendError, ConfigurationError, SSEManager, UsageError
from sse_batcher.flask.monitor import HEADERS, MAX_BODY, TOKEN_SECONDS, PageTokens
from sse_batcher.flask.signing import SKEW_SECONDS
from sse_batcher.monitor import PAGE, page_files

from .kit.clock import Clock
from .kit.flask_sites import making

PATHS = ["/events/monitor", "/events/monitor/data", "/events/monitor/monitor.js"]
HERE = "http://localhost"
FROM_HERE = {"Sec-Fetch-Site": "same-origin"}

MakeSite = Callable[..., "Site"]


class Site:
    """An app with a monitor. The header ``X-Role`` says what a request may do: see it, or also kick."""

    def __init__(self, *, allows: bool = True, name: str = "site", secret: Any = "secret", **config: Any) -> None:
        self.app = Flask(name, static_folder=None)
        self.app.config.update(config, SECRET_KEY=secret)
        self.sse = SSE(self.app)
        self.manager = self.sse.manager
        if allows:
            self.sse.allow_monitor(lambda: request.headers.get("X-Role") in {"watcher", "admin"})
            self.sse.allow_kick(lambda: request.headers.get("X-Role") == "admin")

    def get(self, path: str = "/events/monitor/data", role: str = "admin", **options: Any) -> TestResponse:
        headers = {"X-Role": role, **options.pop("headers", {})}
        return self.app.test_client().get(path, headers=headers, **options)

    def data(self, role: str = "admin") -> dict[str, Any]:
        shown: dict[str, Any] = self.get(role=role).json
        return shown

    def body(self, user: Any = '"ada"', **changes: Any) -> dict[str, Any]:
        """What the page sends for a kick."""
        shown = self.data()
        return {"user": user, "process": shown["process"]["id"], "token": shown["kick"]["token"], **changes}

    def kick(
        self, body: Any, headers: dict[str, str] | None = None, role: str = "admin", **options: Any
    ) -> TestResponse:
        given = {"X-Role": role, **(FROM_HERE if headers is None else headers)}
        return self.app.test_client().post("/events/monitor/kick", json=body, headers=given, **options)


@pytest.fixture
def make_site() -> Iterator[MakeSite]:
    with making(Site) as make:
        yield make


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    """A site on which ada has a stream."""
    site = make_site()
    site.manager.subscribe(user="ada")
    return site


# -- who may see it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_without_a_function_the_monitor_is_not_there(
    make_site: MakeSite, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(allows=False)
    assert [site.get(path).status_code for _ in range(2)] == [404, 404]
    assert site.kick({}).status_code == 404
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("sse_batcher.hooks", "WARNING")
    assert "register one with @sse.allow_monitor" in record.getMessage()


def test_allow_stats_does_not_show_the_monitor(make_site: MakeSite) -> None:
    site = make_site(allows=False)
    site.sse.allow_stats(lambda: True)
    assert [site.get(path).status_code for path in PATHS] == [404] * 3


@pytest.mark.parametrize("path", PATHS)
def test_allow_monitor_is_asked_at_each_request(make_site: MakeSite, path: str) -> None:
    site = make_site()
    assert [site.get(path, role).status_code for role in ("watcher", "nobody", "admin", "")] == [200, 403, 200, 403]


@pytest.mark.parametrize("answer", [1, None, "yes", lambda: True])
@pytest.mark.parametrize("name", ["allow_monitor", "allow_kick"])
def test_an_answer_that_is_no_bool_is_an_error(make_site: MakeSite, name: str, answer: Any) -> None:
    site = make_site(allows=False)
    if name == "allow_kick":
        site.sse.allow_monitor(lambda: True)
    getattr(site.sse, name)(lambda: answer)
    site.app.testing = True
    with pytest.raises(UsageError, match=rf"^{name}\(\) has to return True or False, not "):
        site.get()


@pytest.mark.parametrize("path", [*PATHS, "/events/monitor/none"])
@pytest.mark.parametrize("role", ["admin", "nobody"])
def test_each_answer_has_the_headers_that_protect_it(make_site: MakeSite, path: str, role: str) -> None:
    response = make_site().get(path, role)
    assert dict(HEADERS).items() <= dict(response.headers).items()
    assert "Access-Control-Allow-Origin" not in response.headers
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_other_routes_keep_their_headers(make_site: MakeSite) -> None:
    assert "Content-Security-Policy" not in make_site().get("/events/health").headers


def test_the_page_has_only_files_of_its_own_and_nothing_inline(make_site: MakeSite) -> None:
    site = make_site()
    html = page_files()[PAGE].content.decode()
    for name in ("style=", "<style", "onclick", "http:", "https:", "//"):
        assert name not in html
    for name, file in page_files().items():
        with site.get(f"/events/monitor/{name}") as response:
            assert (response.status_code, response.data, response.content_type) == (200, file.content, file.type)
        for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert dangerous not in file.content.decode()
    assert site.get("/events/monitor/overview.py").status_code == 404


def test_pages_of_other_sites_get_no_data_even_with_the_cookies_of_a_visitor(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS="*")
    for value, status in [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]:
        response = site.get(headers={"Sec-Fetch-Site": value, "Origin": "https://evil.example"})
        assert response.status_code == status
        assert "Access-Control-Allow-Origin" not in response.headers


def test_the_data_are_those_of_an_overview(site: Site) -> None:
    shown = site.get("/events/monitor/data?search=ad").json
    assert [row["user"] for row in shown["streams"]["rows"]] == ['"ada"']
    assert site.get("/events/monitor/data?search=bob").json["streams"]["found"] == 0
    assert site.get(f"/events/monitor/data?search={'x' * 2_000}").json["streams"]["found"] == 0


def test_a_page_that_shows_another_process_gets_only_the_name_of_this_one(site: Site) -> None:
    here = site.data()["process"]["id"]
    assert "counts" in site.get(f"/events/monitor/data?process={here}").json
    assert site.get("/events/monitor/data?process=another").json.keys() == {"process"}


def test_contents_and_addresses_are_sent_as_the_config_says(make_site: MakeSite) -> None:
    for config, expected in [
        ({}, {"content": False, "addresses": True}),
        ({"SSE_MONITOR_CONTENT": True, "SSE_MONITOR_ADDRESSES": False}, {"content": True, "addresses": False}),
    ]:
        site = make_site(**config)
        site.manager.enqueue("t", "hello")
        site.manager.flush_all()
        with site.app.test_client().get("/events", environ_base={"REMOTE_ADDR": "10.99.0.7"}) as stream:
            next(iter(stream.response))
            shown = site.data()
        assert shown["shows"] == expected
        assert ("hello" in json.dumps(shown)) == expected["content"]
        assert ("10.99.0.7" in json.dumps(shown)) == expected["addresses"]


@pytest.mark.parametrize("key", ["SSE_MONITOR_CONTENT", "SSE_MONITOR_ADDRESSES"])
def test_the_config_keys_are_true_or_false(key: str) -> None:
    app = Flask("app")
    app.config[key] = "yes"
    with pytest.raises(ConfigurationError, match=rf"^{key} must be True or False, not 'yes'$"):
        SSE(app)


@pytest.mark.parametrize("address", ["10.0.0.7", "", "f" * 5_000])
def test_the_address_is_that_of_remote_addr_and_no_longer_than_one(make_site: MakeSite, address: str) -> None:
    site = make_site()
    client, headers = site.app.test_client(), {"X-Forwarded-For": "6.6.6.6"}
    with client.get("/events", environ_base={"REMOTE_ADDR": address}, headers=headers) as stream:
        next(iter(stream.response))
        (row,) = site.data()["streams"]["rows"]
    assert row["address"] == (address[:64] or None)


# -- who may kick ------------------------------------------------------------------------------------------------------


def test_a_kick_from_the_page_ends_the_streams_of_the_user(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sse_batcher.monitor")
    other = site.manager.subscribe(user="bob")
    response = site.kick(site.body())
    assert (response.status_code, response.json) == (200, {"ended": 1, "everywhere": False, "error": None})
    (record,) = caplog.records
    assert record.getMessage() == "the user 'ada' was kicked in the monitor, by a request from 127.0.0.1"
    assert site.kick(site.body()).json["ended"] == 0
    assert b"sse_open" in next(other)
    other.close()


@pytest.mark.parametrize("user", ["7", 7, 2**60, "a\nb", "𝕬" * 256])
def test_each_user_can_be_kicked(make_site: MakeSite, user: Any) -> None:
    site = make_site()
    site.manager.subscribe(user=user)
    (row,) = site.data()["streams"]["rows"]
    assert site.kick(site.body(row["user"])).json["ended"] == 1


def test_a_kick_refuses_tokens_of_streams(site: Site) -> None:
    with site.app.app_context():
        token = site.sse.sign(user="ada")
    site.kick(site.body())
    assert site.get(f"/events?token={token}").status_code == 401


class Refused(NamedTuple):
    """A kick that must not get through: what differs from one of the page."""

    status: int
    headers: dict[str, str] = FROM_HERE
    role: str = "admin"
    changes: Mapping[str, Any] = MappingProxyType({})


REFUSED = {
    "cross-site": Refused(403, {"Sec-Fetch-Site": "cross-site", "Origin": HERE}),
    "same-site": Refused(403, {"Sec-Fetch-Site": "same-site", "Origin": HERE}),
    "user-initiated": Refused(403, {"Sec-Fetch-Site": "none", "Origin": HERE}),
    "two-values": Refused(403, {"Sec-Fetch-Site": "same-origin, cross-site"}),
    "empty-value": Refused(403, {"Sec-Fetch-Site": ""}),
    "no-origin": Refused(403, {}),
    "null-origin": Refused(403, {"Origin": "null"}),
    "foreign-origin": Refused(403, {"Origin": "http://evil.example"}),
    "longer-origin": Refused(403, {"Origin": f"{HERE}.evil.example"}),
    "other-port": Refused(403, {"Origin": f"{HERE}:8000"}),
    "other-scheme": Refused(403, {"Origin": "https://localhost"}),
    "referer-only": Refused(403, {"Referer": f"{HERE}/events/monitor"}),
    "no-role": Refused(403, role="nobody"),
    "watcher": Refused(403, role="watcher"),
    "no-token": Refused(403, changes={"token": None}),
    "empty-token": Refused(403, changes={"token": ""}),
    "odd-token": Refused(403, changes={"token": ["x"]}),
    "forged-token": Refused(403, changes={"token": "1795738808.imTRXItZdqD8ZM1pdwex8FaOPFJwK9DTl5Zubmz_LGI"}),
    "unicode-token": Refused(403, changes={"token": "1795738808.é\ud800"}),
    "user-is-no-text": Refused(400, changes={"user": 7}),
    "user-is-no-json": Refused(400, changes={"user": "ada"}),
    "user-is-null": Refused(400, changes={"user": "null"}),
    "user-is-a-bool": Refused(400, changes={"user": "true"}),
    "user-is-several": Refused(400, changes={"user": '["ada"]'}),
    "user-is-empty": Refused(400, changes={"user": '""'}),
    "user-is-deep": Refused(400, changes={"user": "[" * 4_000}),
    "user-is-missing": Refused(400, changes={"user": None}),
    "too-large": Refused(413, changes={"more": "x" * MAX_BODY}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_kick_that_is_not_from_the_page_is_refused(site: Site, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, body = REFUSED[case], site.body()
    monkeypatch.setattr(SSEManager, "kick", lambda self, **_: pytest.fail("it was kicked"))
    assert site.kick({**body, **refused.changes}, refused.headers, refused.role).status_code == refused.status


def test_an_origin_counts_where_browsers_do_not_say_more(site: Site) -> None:
    assert site.kick(site.body(), {"Origin": HERE}).status_code == 200
    options = {"base_url": "https://Shop.example:8443/"}
    assert site.kick(site.body(), {"Origin": "https://shop.example:8443"}, **options).status_code == 200
    assert site.kick(site.body(), {"Origin": HERE}, **options).status_code == 403


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD"])
def test_only_post_kicks(site: Site, method: str) -> None:
    body = site.body()
    response = site.app.test_client().open(
        "/events/monitor/kick", method=method, json=body, headers={"X-Role": "admin", **FROM_HERE}
    )
    assert response.status_code == (404 if method in {"GET", "HEAD"} else 405)  # it is no file of the page


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx", "text/json"],
)
def test_only_json_kicks(site: Site, content_type: str) -> None:
    text = json.dumps(site.body())
    headers = {"X-Role": "admin", **FROM_HERE}
    client = site.app.test_client()
    response = client.post("/events/monitor/kick", data=text, content_type=content_type, headers=headers)
    assert response.status_code == 415


@pytest.mark.parametrize("text", ["[]", "{", "null", '"x"', "[" * 5_000, b"\xff"])
def test_a_body_that_is_no_object_is_refused(site: Site, text: Any) -> None:
    headers = {"X-Role": "admin", **FROM_HERE}
    client = site.app.test_client()
    response = client.post("/events/monitor/kick", data=text, content_type="application/json", headers=headers)
    assert response.status_code == 400


def test_a_body_of_unknown_length_is_refused(site: Site) -> None:
    headers = {"X-Role": "admin", **FROM_HERE}
    response = site.app.test_client().post("/events/monitor/kick", content_type="application/json", headers=headers)
    assert response.status_code == 411


def test_without_allow_kick_there_is_no_kick(make_site: MakeSite) -> None:
    site = make_site(allows=False)
    site.sse.allow_monitor(lambda: True)
    assert site.data()["kick"] == {"allowed": False, "token": None}
    token = PageTokens(site.app, "site").make()
    assert site.kick({"user": '"ada"', "token": token}).status_code == 404


def test_a_visitor_who_may_not_kick_gets_no_token(site: Site) -> None:
    assert site.data("watcher")["kick"] == {"allowed": False, "token": None}


def test_without_a_secret_key_there_is_no_token(make_site: MakeSite) -> None:
    site = make_site(secret=None)
    shown = site.data()
    assert shown["kick"] == {"allowed": True, "token": None}
    assert site.kick({"user": '"ada"', "token": "x", "process": shown["process"]["id"]}).status_code == 403


def test_the_tokens_of_other_apps_and_kinds_are_refused(site: Site, make_site: MakeSite) -> None:
    others = [make_site(name="other"), make_site(secret="another"), make_site(SSE_TOKEN_SALT="another")]
    with site.app.app_context():
        foreign = [site.sse.sign(user="ada"), Signer("secret").sign("1").decode()]
    for token in [*foreign, *(other.data()["kick"]["token"] for other in others)]:
        assert site.kick(site.body(token=token)).status_code == 403
    twin = make_site()
    assert site.kick(site.body(token=twin.data()["kick"]["token"])).status_code == 200


def test_a_token_of_the_page_opens_no_stream(site: Site) -> None:
    token = site.data()["kick"]["token"]
    for form in (token, f"sse1.{token}"):
        assert site.manager is not None
        response = site.get(f"/events?token={form}&channel=secret")
        assert response.status_code in {401, 403}


def test_a_token_is_valid_for_ten_minutes() -> None:
    app, clock = Flask("app"), Clock(1_000_000.0)
    app.secret_key = "secret"
    tokens = PageTokens(app, "app", clock)
    token = tokens.make()
    assert tokens.check(token)
    for seconds, valid in [(TOKEN_SECONDS, True), (TOKEN_SECONDS + 1, False), (-SKEW_SECONDS, True), (-11, False)]:
        clock.now = 1_000_000.0 + seconds
        assert tokens.check(token) is valid


def test_a_token_survives_a_change_of_the_key() -> None:
    app = Flask("app")
    app.secret_key = "old"
    tokens = PageTokens(app, "app")
    token = tokens.make()
    app.secret_key = "new"
    assert not tokens.check(token)
    app.config["SECRET_KEY_FALLBACKS"] = ["old"]
    assert tokens.check(token)
    assert tokens.check(tokens.make())


def test_in_memory_another_process_does_not_kick(site: Site) -> None:
    response = site.kick(site.body(process="another"))
    assert response.json.keys() == {"process"}
    assert site.kick(site.body()).json["ended"] == 1


def test_a_kick_that_other_processes_did_not_get_says_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def kick(self: SSEManager, **_: Any) -> int:
        raise BackendError("Redis is away")

    monkeypatch.setattr(SSEManager, "kick", kick)
    response = site.kick(site.body())
    assert (response.status_code, response.json["error"]) == (503, "Redis is away")


def test_without_routes_there_is_no_monitor(make_site: MakeSite) -> None:
    site = make_site(SSE_URL_PREFIX=None)
    assert [site.get(path).status_code for path in PATHS] == [404] * 3


@pytest.mark.parametrize("prefix", ["/", "/live/updates"])
def test_the_monitor_is_below_the_prefix(make_site: MakeSite, prefix: str) -> None:
    site = make_site(SSE_URL_PREFIX=prefix)
    start = prefix.rstrip("/")
    assert site.get(f"{start}/monitor").status_code == 200
    assert site.get(f"{start}/monitor/data").status_code == 200
