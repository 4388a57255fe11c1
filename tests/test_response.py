"""`sse.response`: a view of the app's own returns the stream. And `SSE_URL_PREFIX = None`: no view of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, abort, render_template_string, request, url_for
from werkzeug.routing import BuildError
from werkzeug.test import TestResponse, create_environ

from sse_batcher import SSE, InvalidEventError, UsageError
from sse_batcher.options import TRANSPORTS
from sse_batcher.wire import HEADERS

from .kit.flask_sites import making
from .kit.ids import steady
from .kit.servers import GTHREAD, HOST, Server, Stream, running
from .kit.sse_parser import ServerEvent, parse, take_events
from .kit.waiting import TIMEOUT, wait_until

HERE, THERE = "https://here.example", "https://there.example"
MakeSite = Callable[..., "Site"]


class Site:
    """An app with a view of its own at ``/mine``, which returns `answer()`."""

    def __init__(self, **config: Any) -> None:
        self.app = Flask("site", static_folder=None)
        self.app.config.update(SSE_URL_PREFIX=None, SSE_BATCHING=False)
        self.app.config.update(config)
        self.app.testing = True  # an error of the app is raised
        self.sse = SSE(self.app)
        self.manager = self.sse.manager
        self.answer: Callable[[], Response] = self.sse.response

        @self.app.route("/mine", methods=["GET", "POST"])
        def mine() -> Response:
            return self.answer()

    def request(self, query: str = "", method: str = "GET", **headers: str) -> TestResponse:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.app.test_client().open(f"/mine?{query}", method=method, headers=names)

    def blocks(self, query: str = "", **headers: str) -> list[ServerEvent]:
        """The first chunk of a stream, which is closed then."""
        with self.request(query, **headers) as response:
            assert response.status_code == 200
            return parse(next(iter(response.response)), strict=True)  # type: ignore[arg-type]


@pytest.fixture
def make_site() -> Iterator[MakeSite]:
    with making(Site) as make:
        yield make


# -- the stream --------------------------------------------------------------------------------------------------------


def test_a_view_returns_the_stream_of_the_channels_it_names(make_site: MakeSite) -> None:
    site = make_site()
    site.answer = lambda: site.sse.response(["a", "b"])
    with site.request() as response:
        assert sorted(response.headers) == sorted(HEADERS)
        for channel in ("a", "default", "b"):
            site.sse.enqueue("log", channel, channel=channel)
        opened, *events = take_events(response.response, 3)
        assert opened.json == {"heartbeat": 15.0, "channels": ["a", "b"]}
        assert [event.json for event in events] == ["a", "b"]


def test_without_channels_it_is_the_stream_of_the_default_channel(make_site: MakeSite) -> None:
    (opened,) = make_site().blocks("channel=other")
    assert opened.json["channels"] == ["default"]


def test_authorize_is_not_called(make_site: MakeSite) -> None:
    site = make_site()
    site.sse.authorize(lambda channels: pytest.fail("authorize is called"))
    site.answer = lambda: site.sse.response(["a"])
    assert site.blocks()[0].type == "sse_open"


@pytest.mark.parametrize("channels", [[], ["*"], [""], [7], "team", ["x" * 129]], ids=repr)
def test_invalid_channels_are_an_error(make_site: MakeSite, channels: Any) -> None:
    site = make_site()
    site.answer = lambda: site.sse.response(channels)
    with pytest.raises(InvalidEventError) as caught:
        site.request()
    assert caught.value.field == "channel"


@pytest.mark.parametrize("where", ["Last-Event-ID", "last_event_id", "lastEventId"])
def test_a_client_that_returns_gets_what_it_missed(make_site: MakeSite, where: str) -> None:
    site = make_site()
    cursor = site.manager.cursor()
    site.sse.enqueue("log", 1)
    assert site.manager.flush_all(TIMEOUT)
    header = {"Last_Event_ID": cursor} if where == "Last-Event-ID" else {}
    with site.request("" if header else f"{where}={cursor}", **header) as response:
        opened, missed = take_events(response.response, 2)
    assert (opened.type, opened.id, missed.json) == ("sse_open", cursor, 1)


@pytest.mark.parametrize(("query", "types"), [("batch=0", ["log", "log"]), ("", ["log_batch"])])
def test_a_client_that_knows_no_batches_says_so_in_the_query(make_site: MakeSite, query: str, types: list[str]) -> None:
    site = make_site(SSE_BATCHING=True)
    with site.request(query) as response:
        for number in range(2):
            site.sse.enqueue("log", number)
        assert site.manager.flush_all(TIMEOUT)
        assert [event.type for event in take_events(response.response, 1 + len(types))[1:]] == types


def test_a_new_client_gets_the_snapshots_of_its_channels(make_site: MakeSite) -> None:
    site = make_site()
    for channel in ("a", "b"):
        site.sse.snapshot(channel)(lambda channel=channel: ("state", channel))
    site.answer = lambda: site.sse.response(["b", "quiet"])
    assert [event.json for event in site.blocks()[1:]] == ["b"]


def test_a_snapshot_that_fails_is_logged_and_answered_with_sse_busy(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    site.sse.snapshot("default")(lambda: ("state", 1 // 0))
    (busy,) = site.blocks()
    assert (busy.type, busy.json) == ("sse_busy", {"reason": "snapshot"})
    assert [(record.name, record.levelname) for record in caplog.records] == [("sse_batcher.blueprint", "ERROR")]


@pytest.mark.parametrize(
    "state",
    [
        lambda: ("state", 1 // 0),
        lambda: ("state", object()),
        lambda: ("sse_state", 1),
        lambda: "state",
    ],
)
def test_the_log_shows_what_a_snapshot_has_raised(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture, state: Callable[[], Any]
) -> None:
    site = make_site()
    site.sse.snapshot("default")(state)
    for _ in range(5):
        assert [block.json for block in site.blocks()] == [{"reason": "snapshot"}]
    assert [vars(record)["sse_code"] for record in caplog.records] == ["snapshot_failed"] * 3  # 1, 2 and 4
    assert "_SnapshotFailedError" not in caplog.text
    assert all(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("has_snapshot", [True, False])
def test_an_error_that_is_not_of_a_snapshot_is_not_called_one(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, has_snapshot: bool
) -> None:
    site = make_site()
    if has_snapshot:
        site.sse.snapshot("default")(lambda: ("state", 1))
    monkeypatch.setattr("sse_batcher.wsgi.open_stream", lambda *_: 1 // 0)
    for _ in range(5):
        assert [(block.type, block.json) for block in site.blocks()] == [("sse_busy", {"reason": "error"})]
    assert [vars(record)["sse_code"] for record in caplog.records] == ["opening_failed"] * 3
    assert "snapshot" not in "".join(record.getMessage() for record in caplog.records)
    assert "ZeroDivisionError" in caplog.text
    assert site.manager.get_stats().streams_refused["error"] == 5


def test_a_snapshot_may_abort(make_site: MakeSite) -> None:
    site = make_site()
    site.sse.snapshot("default")(lambda: abort(403))
    assert site.request().status_code == 403


def test_a_stream_of_several_processes_is_warned_of_once(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site()
    for _ in range(2):
        site.app.test_client().get("/mine", environ_overrides={"wsgi.multiprocess": True}).close()
    (record,) = caplog.records
    assert record.getMessage().startswith("this server runs several processes")


def test_head_ends_at_once_and_another_method_is_405(make_site: MakeSite) -> None:
    site = make_site()
    head = site.request(method="HEAD")
    assert (head.status_code, head.data, sorted(head.headers)) == (200, b"", sorted(HEADERS))
    assert site.request(method="POST").status_code == 405


def test_the_response_can_be_changed_but_not_read(make_site: MakeSite) -> None:
    site = make_site()

    def answer() -> Response:
        response = site.sse.response()
        response.headers["X-Mine"] = "1"
        with pytest.raises(UsageError, match="has no end, so its body cannot be read"):
            response.get_data()
        return response

    site.answer = answer
    with site.request() as response:
        assert response.headers["X-Mine"] == "1"
        assert take_events(response.response, 1)[0].type == "sse_open"


def test_outside_a_request_there_is_nothing_to_answer(make_site: MakeSite) -> None:
    site = make_site()
    with site.app.app_context(), pytest.raises(UsageError, match="return it from a view"):
        site.sse.response()


def test_an_app_that_does_not_know_the_sse_cannot_return_it(make_site: MakeSite) -> None:
    site, other = make_site(), Flask("other")
    with other.test_request_context(), pytest.raises(UsageError, match="the app 'other' does not know this SSE"):
        site.sse.response()


def test_a_request_that_did_not_come_through_the_app_is_answered(make_site: MakeSite) -> None:
    site = make_site()
    with site.app.test_request_context():
        assert site.sse.response().status_code == 200


# -- users -------------------------------------------------------------------------------------------------------------


def test_the_user_is_the_one_that_identify_returns(make_site: MakeSite) -> None:
    site = make_site()
    site.sse.identify(lambda: request.headers["X-User"])
    with site.request(X_User="ada") as response:
        take_events(response.response, 1)
        assert [site.sse.kick(user=user) for user in ("bob", "ada")] == [0, 1]


@pytest.mark.parametrize("user", ["ada", 7])
def test_the_user_that_is_given_wins_over_identify(make_site: MakeSite, user: Any) -> None:
    site = make_site(SSE_MAX_CLIENTS_PER_USER=1)
    site.sse.identify(lambda: pytest.fail("identify is called"))
    site.answer = lambda: site.sse.response(user=user)
    with site.request() as response:
        take_events(response.response, 1)
        (busy,) = site.blocks()
        assert (busy.type, busy.json) == ("sse_busy", {"reason": "limit"})
        assert site.sse.kick(user=user) == 1
        assert [event.json for event in parse(b"".join(response.response))] == [{"reason": "kicked"}]  # type: ignore[arg-type]


def test_none_as_the_user_is_no_user(make_site: MakeSite) -> None:
    site = make_site(SSE_MAX_CLIENTS_PER_USER=1)
    site.answer = lambda: site.sse.response(user=None)
    with site.request() as response:
        assert [take_events(response.response, 1)[0].type, site.blocks()[0].type] == ["sse_open", "sse_open"]


def test_a_limit_for_users_needs_a_user_or_identify(make_site: MakeSite) -> None:
    with pytest.raises(UsageError, match=r"register @sse\.identify"):
        make_site(SSE_MAX_CLIENTS_PER_USER=1).request()


@pytest.mark.parametrize("user", ["", True, 1.5, object()], ids=steady)
def test_an_invalid_user_is_an_error(make_site: MakeSite, user: Any) -> None:
    site = make_site()
    site.answer = lambda: site.sse.response(user=user)
    with pytest.raises(InvalidEventError) as caught:
        site.request()
    assert caught.value.field == "user"


MOMENTS = ["before_request", "view", "identify", "snapshot", "after_request", "first step"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kick_after_the_request_has_begun_ends_the_stream(make_site: MakeSite, moment: str, transport: str) -> None:
    site = make_site(SSE_TRANSPORT=transport)
    kicked: list[int] = []

    def reach(name: str) -> None:
        if name == moment and not kicked:
            kicked.append(site.sse.kick(user="ada"))
            site.sse.enqueue("log", "secret")
            assert site.manager.flush_all(TIMEOUT)

    def answer() -> Response:
        reach("view")
        return site.sse.response()

    @site.sse.identify
    def user() -> str:
        reach("identify")
        return "ada"

    @site.sse.snapshot("default")
    def state() -> tuple[str, str]:
        reach("snapshot")
        return "state", "secret"

    site.answer = answer
    site.app.before_request(lambda: reach("before_request"))
    site.app.after_request(lambda response: [reach("after_request"), response][1])
    # Not the test client, which takes the first step at once.
    body = site.app.wsgi_app(create_environ("/mine"), lambda status, headers, exc_info=None: lambda data: None)
    reach("first step")
    blocks = iter(body)
    events = list(parse(next(blocks), strict=True))
    assert kicked == [0]
    assert [(event.type, event.json.get("reason")) for event in events] == [("sse_open", None), ("sse_bye", "kicked")]
    assert list(blocks) == []
    assert [event.type for event in site.blocks()] == ["sse_open", "state"]  # the next request may have it


# -- other origins -----------------------------------------------------------------------------------------------------


def test_an_origin_of_the_config_may_read_the_stream_and_another_may_not(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS=HERE)
    with site.request(Origin=HERE) as response:
        assert response.headers["Access-Control-Allow-Origin"] == HERE
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
    with site.request(Origin=THERE) as response:
        assert "Access-Control-Allow-Origin" not in response.headers
        assert response.headers["Vary"] == "Origin"
    with make_site().request(Origin=HERE) as response:
        assert "Access-Control-Allow-Origin" not in response.headers
        assert "Vary" not in response.headers


def test_a_view_that_takes_options_answers_a_preflight(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS=HERE)
    site.app.add_url_rule("/all", "all", site.sse.response, methods=["GET", "OPTIONS"], provide_automatic_options=False)
    response = site.app.test_client().options("/all", headers={"Origin": HERE})
    assert response.headers["Access-Control-Allow-Methods"] == "GET"
    assert "Last-Event-ID" in response.headers["Access-Control-Allow-Headers"]


def test_identify_does_not_refuse_a_preflight(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS=HERE)
    site.sse.identify(lambda: abort(401))
    site.app.add_url_rule("/all", "all", site.sse.response, methods=["GET", "OPTIONS"], provide_automatic_options=False)
    client = site.app.test_client()
    assert client.options("/all", headers={"Origin": HERE}).status_code == 200
    assert client.get("/all").status_code == 401


# -- no blueprint ------------------------------------------------------------------------------------------------------


def test_without_a_prefix_there_is_no_route_of_ours(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site()
    site.sse.allow_stats(lambda: True)
    for path in ("/", "/events", "/events/", "/events/health", "/events/stats", "/health"):
        assert site.app.test_client().get(path).status_code == 404
    with site.app.test_request_context(), pytest.raises(BuildError):
        url_for("sse_batcher.stream")
    assert not site.app.blueprints
    assert caplog.records == []


def test_without_a_prefix_pages_still_have_a_cursor(make_site: MakeSite) -> None:
    site = make_site()
    site.app.add_url_rule("/", "page", lambda: render_template_string("{{ sse_cursor() }}"))
    before = site.manager.cursor()
    site.app.before_request(lambda: [site.sse.enqueue("log", 1), site.manager.flush_all(TIMEOUT), None][2])
    assert site.app.test_client().get("/").text == before != site.manager.cursor()


def test_without_a_prefix_a_late_key_is_still_logged(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site()
    site.app.config["SSE_URL_PREFIX"] = "/events"
    site.app.test_client().get("/")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "SSE_URL_PREFIX was changed after" in record.getMessage()


def test_beside_the_blueprint_both_views_stream(make_site: MakeSite) -> None:
    site = make_site(SSE_URL_PREFIX="/events")
    with site.app.test_client().get("/events") as response, site.request() as mine:
        site.sse.enqueue("log", 1)
        assert [take_events(each.response, 2)[1].json for each in (response, mine)] == [1, 1]


# -- real servers ------------------------------------------------------------------------------------------------------

PROGRAM = """
import os
from flask import Flask, abort, request
from sse_batcher import SSE

app = Flask(__name__)
app.config.update(SSE_URL_PREFIX=None, SSE_TRANSPORT=os.environ["TRANSPORT"])
sse = SSE(app)

@app.get("/events")
def events():
    user = request.headers["X-User"]
    if user == "eve":
        abort(403)
    return sse.response(["red"], user=user)

@app.post("/red")
def write():
    sse.enqueue("note", request.get_json(), channel="red")
    return "", 204

@app.post("/kick/<user>")
def kick(user):
    return str(sse.kick(user=user))

@app.get("/stats")
def stats():
    return sse.manager.get_stats().as_dict()
"""


def counts(server: Server) -> dict[str, int]:
    return server.stats()["clients_by_transport"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "command",
    [("-m", "flask", "run", f"--host={HOST}", "--port={port}"), (*GTHREAD[:-1], "app:app")],
    ids=["flask run", "gunicorn"],
)
@pytest.mark.parametrize(("transport", "kind"), [("attached", "attached"), ("auto", "detached")])
def test_a_server_streams_it_and_a_kick_of_its_user_ends_it(
    tmp_path: Path, command: tuple[str, ...], transport: str, kind: str
) -> None:
    (tmp_path / "app.py").write_text(PROGRAM)
    with running(command, tmp_path, TRANSPORT=transport) as server, server.watched():
        with Stream(server, {"X-User": "eve"}) as refused:
            assert refused.response.status == 403
        with Stream(server, {"X-User": "ada"}) as ada, Stream(server, {"X-User": "bob"}) as bob:
            for stream in (ada, bob):
                assert stream.until("sse_open")[0].data["channels"] == ["red"]
            wait_until(lambda: counts(server)[kind] == 2, f"two streams are {kind}")
            server.request("POST", "/red", {"n": 1})
            assert [stream.until("note")[-1].data for stream in (ada, bob)] == [{"n": 1}, {"n": 1}]
            assert server.request("POST", "/kick/ada") == "1"
            assert [(block.event, block.data) for block in ada.to_end()] == [("sse_bye", {"reason": "kicked"})]
            server.request("POST", "/red", {"n": 2})
            assert bob.until("note")[-1].data == {"n": 2}
