"""`flask sse doctor`: an app from inside."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from flask import Flask, Response, abort, redirect, request
from flask_compress import Compress

from sse_batcher import stream
from sse_batcher.testing import live_server

from .kit.flask_apps import MakeApp, apps_fixture
from .kit.redisserver import redis_server
from .kit.scripted_server import scripted_server, sending
from .kit.servers import gunicorn, running
from .kit.waiting import TIMEOUT, tried

make_app = apps_fixture()

KEY = {"SECRET_KEY": "secret"}


def run(app: Flask, *arguments: str) -> tuple[int, str]:
    """The exit status, and what is printed on stdout."""
    result = app.test_cli_runner().invoke(args=["sse", "doctor", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def report(app: Flask, *arguments: str) -> dict[str, Any]:
    status, printed = run(app, "--json", *arguments)
    made: dict[str, Any] = json.loads(printed)
    assert status == (0 if made["ok"] else 1)
    return made


@pytest.fixture
def _no_block_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for long."""
    monkeypatch.setattr("sse_batcher.flask.doctor.PATIENCE_SECONDS", 1.0)


def report_with(expected: list[tuple[str, str]], app: Flask, *arguments: str) -> dict[str, Any]:
    """The report with these codes and levels. A machine that stands still looks like a fault."""

    def found(made: dict[str, Any]) -> list[tuple[str, str]]:
        return [(finding["code"], finding["level"]) for finding in made["findings"]]

    made = tried(lambda: report(app, *arguments), lambda made: found(made) == expected)
    assert found(made) == expected, made["findings"]
    return made


def check(app: Flask, code: str | None, level: str = "fault", *names: str) -> dict[str, Any]:
    """The code is found and nothing else, and the words name these settings. Returns the facts."""
    made = report_with([(code, level)] if code else [], app)
    for finding in made["findings"]:
        for name in names:
            assert name in f"{finding['what']} {finding['do']}"
    facts: dict[str, Any] = made["facts"]["app"]
    return facts


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of gunicorn around the tests count, and a block that comes may come late."""
    monkeypatch.setattr("sse_batcher.flask.doctor.PATIENCE_SECONDS", TIMEOUT)
    monkeypatch.chdir(tmp_path)
    for name in ("WEB_CONCURRENCY", "GUNICORN_CMD_ARGS"):
        monkeypatch.delenv(name, raising=False)


def test_a_healthy_app_gets_a_clean_bill_in_words(make_app: MakeApp) -> None:
    app, _ = make_app(name="shop", **KEY)
    status, printed = run(app)
    assert status == 0
    first, fine, end = printed.strip().split("\n\n")
    assert first == "The app 'shop' in this process: streams at /events; transport 'auto'; backend: memory"
    assert fine.startswith("Fine: the app, with all its middleware, streams at /events; a heartbeat every 15 s")
    assert end == "Nothing is wrong."


def test_the_request_in_this_process_logs_nothing(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """No server serves it, so it stays attached, which the library would log otherwise."""
    app, _ = make_app(**KEY)
    check(app, None)
    assert "attached" not in caplog.text


def test_an_app_without_a_key_may_need_none(make_app: MakeApp) -> None:
    app, _ = make_app()
    check(app, None)


def test_a_heartbeat_that_is_too_long_for_the_usual_proxies(make_app: MakeApp) -> None:
    app, _ = make_app(SSE_HEARTBEAT=90.0, **KEY)
    check(app, "idle_timeout", "warning", "SSE_HEARTBEAT")


def test_an_app_without_routes_is_examined_as_far_as_it_can_be(make_app: MakeApp) -> None:
    app, _ = make_app(SSE_URL_PREFIX=None, **KEY)
    assert check(app, None)["request"] is None


def test_an_app_that_lets_the_library_compress(make_app: MakeApp) -> None:
    app, _ = make_app(SSE_COMPRESS=["default"], **KEY)
    request = check(app, None)["request"]
    assert request["coded_by_library"]
    assert request["answer"]["headers"]["content-encoding"] == "gzip"
    assert request["first"]["type"] == "sse_open"


def test_an_app_whose_stream_is_at_the_root(make_app: MakeApp) -> None:
    app, _ = make_app(SSE_URL_PREFIX="/", **KEY)
    assert check(app, None)["request"]["path"] == "/"


def test_a_config_that_was_changed_since(make_app: MakeApp) -> None:
    app, _ = make_app(**KEY)
    app.config["SSE_HEARTBEAT"] = "soon"
    result = app.test_cli_runner().invoke(args=["sse", "doctor"])
    assert result.exit_code == 1
    assert "SSE_HEARTBEAT" in result.stderr


# -- gunicorn ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variable", "value"), [("WEB_CONCURRENCY", "3"), ("GUNICORN_CMD_ARGS", "-w 3 --threads=99")])
def test_several_processes_without_redis(
    variable: str, value: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    app, _ = make_app(**KEY)
    check(app, "separate_processes", "fault", variable, "SSE_BACKEND", "3 processes")


@pytest.mark.parametrize(
    ("file", "arguments", "workers", "where"),
    [
        ("workers = 1", "", 1, "`gunicorn.conf.py`"),
        ("threads = 8", "", 4, "`WEB_CONCURRENCY` with `gunicorn.conf.py`"),
        ("workers = count()", "", None, None),
        ("workers = 1\nworkers += 1", "", None, None),
        ("workers: int = 2", "", 2, "`gunicorn.conf.py`"),
        ("workers = int(os.environ.get('WEB_CONCURRENCY', 1))", "", 4, "`WEB_CONCURRENCY`"),
        ("workers = 1", "-w3 -kgthread", 3, "`GUNICORN_CMD_ARGS`"),
        ("workers = 1", "--worker-connections 9 -b :80 -w=5 -w 2", 2, "`GUNICORN_CMD_ARGS`"),
        ("workers = 1", "-c other.py", 7, "`other.py`"),
        ("workers = 1", "-w", 1, "`gunicorn.conf.py`"),
        ("workers = 1", "'", 1, "`gunicorn.conf.py`"),
    ],
)
def test_the_workers_are_those_that_gunicorn_starts(
    file: str,
    arguments: str,
    workers: int | None,
    where: str | None,
    make_app: MakeApp,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arguments win over the file, and the file over WEB_CONCURRENCY, which is only the default."""
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    monkeypatch.setenv("GUNICORN_CMD_ARGS", arguments)
    Path("gunicorn.conf.py").write_text(f"{file}\n")
    Path("other.py").write_text("workers = 7\n")
    app, _ = make_app(**KEY)
    made = report(app)
    gunicorn = made["facts"]["app"]["gunicorn"] or {"workers": None, "where": None}
    assert (gunicorn["workers"], gunicorn["where"]) == (workers, where)
    assert made["ok"] is (workers in {None, 1})


def test_few_threads_that_streams_hold(make_app: MakeApp) -> None:
    Path("gunicorn.conf.py").write_text('worker_class = "gthread"\nthreads = 16\n')
    app, _ = make_app(SSE_TRANSPORT="attached", **KEY)
    check(app, "threads", "warning", "16 open tabs", "SSE_TRANSPORT")
    app, _ = make_app(**KEY)
    check(app, None)


def test_the_file_of_gunicorn_is_read_and_not_run(make_app: MakeApp) -> None:
    Path("gunicorn.conf.py").write_text("max_requests = 500\nworkers = 1\nraise SystemExit\n")
    app, _ = make_app(**KEY)
    check(app, "ends_early", "fault", "gunicorn.conf.py", "500")


@pytest.mark.parametrize("text", ["worker_class = 'sync'\n", "threads = 1\n"])
def test_the_worker_class_sync(text: str, make_app: MakeApp) -> None:
    Path("gunicorn.conf.py").write_text(text)
    app, _ = make_app(SSE_TRANSPORT="attached", **KEY)
    check(app, "one_thread", "fault", "sync", "SSE_TRANSPORT", "--worker-class gthread")


@pytest.mark.parametrize("text", ["worker_class = 'sync'\n", "threads = 1\n"])
def test_the_worker_class_sync_serves_detached_streams(text: str, make_app: MakeApp) -> None:
    Path("gunicorn.conf.py").write_text(text)
    app, _ = make_app(**KEY)
    check(app, None)


@pytest.mark.parametrize("text", ["workers = count()\n", "workers = 'many'\n", "this is no Python"])
def test_settings_that_cannot_be_read_are_left_out(text: str, make_app: MakeApp) -> None:
    Path("gunicorn.conf.py").write_text(text)
    app, _ = make_app(**KEY)
    check(app, None)


# -- the request -------------------------------------------------------------------------------------------------------


def test_a_function_that_reads_the_response(make_app: MakeApp) -> None:
    app, _ = make_app(**KEY)

    @app.after_request
    def add_etag(response: Response) -> Response:
        response.direct_passthrough = False
        response.add_etag()
        return response

    check(app, "read_whole", "fault", "after_request", "direct_passthrough")


@pytest.mark.usefixtures("_no_block_comes")
def test_a_middleware_that_reads_the_response(make_app: MakeApp) -> None:
    app, _ = make_app(**KEY)
    inner = app.wsgi_app

    def reads(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return [b"".join(inner(environ, start_response))]

    app.wsgi_app = reads  # type: ignore[method-assign]
    check(app, "read_whole", "fault", "app.wsgi_app", "text/event-stream")


@pytest.mark.usefixtures("_no_block_comes")
@pytest.mark.parametrize("algorithm", ["zstd", "gzip"])
def test_flask_compress(algorithm: str, make_app: MakeApp) -> None:
    app, _ = make_app(
        SSE_URL_PREFIX="/other",
        COMPRESS_MIMETYPES=["text/event-stream"],
        COMPRESS_ALGORITHM_STREAMING=[algorithm],
        **KEY,
    )

    @app.after_request
    def forget(response: Response) -> Response:
        del response.headers["Content-Encoding"]
        response.direct_passthrough = False
        return response

    Compress(app)  # called before that one
    app.after_request_funcs[None].reverse()
    facts = check(app, "compressed", "fault", "COMPRESS_MIMETYPES", "Flask-Compress")
    assert facts["request"]["answer"]["headers"]["content-encoding"] == algorithm


def test_an_app_that_refuses_its_visitors_may_mean_it(make_app: MakeApp) -> None:
    app, _ = make_app(**KEY)

    @app.before_request
    def must_log_in() -> Any:
        return None if request.headers.get("Cookie") else redirect("/login")

    check(app, "redirected", "warning", "/login", "--header 'Cookie:", "signed token")
    assert report(app, "--header", "Cookie: session=1")["findings"] == []


def test_a_token_in_a_redirect_is_not_shown(make_app: MakeApp) -> None:
    app, _ = make_app(**KEY)
    app.before_request(lambda: redirect(f"/login?next={quote(request.full_path)}"))
    made = report(app, "http://127.0.0.1:9/events?token=sse1.visible")
    assert [finding["code"] for finding in made["findings"]] == ["redirected", "unreachable"]
    assert "visible" not in json.dumps(made)


@pytest.mark.parametrize(("status", "code"), [(401, "unauthorized"), (403, "forbidden")])
def test_an_app_that_refuses_with_a_status(status: int, code: str, make_app: MakeApp) -> None:
    app, _ = make_app()

    @app.before_request
    def refuse() -> None:
        abort(status)

    made = report(app)
    assert [finding["code"] for finding in made["findings"]] == [code]


def test_a_token_stands_for_authorize(make_app: MakeApp) -> None:
    app, sse = make_app(**KEY)

    @sse.authorize
    def authorize(channels: tuple[str, ...]) -> tuple[str, ...]:
        raise AssertionError("not asked")

    check(app, None)


def test_an_error_of_the_app_is_shown(make_app: MakeApp) -> None:
    app, _ = make_app(**KEY)

    @app.before_request
    def fail() -> None:
        raise LookupError("no such thing")

    check(app, "not_a_stream", "fault", "LookupError: no such thing")


def test_a_view_of_the_app_is_examined_at_the_path_of_the_url(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_URL_PREFIX=None, **KEY)

    @app.get("/mine")
    def mine() -> Response:
        status, headers, body = stream(sse.manager, request.environ)
        return Response(body, status, headers)

    facts = report(app, "http://127.0.0.1:9/mine")["facts"]["app"]
    assert (facts["request"]["path"], facts["request"]["first"]["type"]) == ("/mine", "sse_open")


# -- Redis -------------------------------------------------------------------------------------------------------------


@pytest.mark.external
def test_redis(make_app: MakeApp, tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as server:
        for index, (name, value, code) in enumerate(
            [("maxmemory", "100mb", None), ("maxmemory-policy", "allkeys-lru", "eviction")]
        ):
            server.config(name, value)
            app, _ = make_app(name=f"app{index}", SSE_BACKEND=server.url, **KEY)
            check(app, code, "fault", "maxmemory-policy", "noeviction")
        server.client.acl_setuser("few", enabled=True, passwords=["+x"], keys=["*"], commands=["+ping", "+time"])
        app, _ = make_app(name="few", SSE_BACKEND=server.url.replace("//", "//few:x@"), **KEY)
        check(app, "backend", "fault", "xrange", "SSE_BACKEND")
        server.client.replicaof("127.0.0.1", 9)
        server.config("maxmemory-policy", "noeviction")
        app, _ = make_app(name="replica", SSE_BACKEND=server.url, **KEY)
        check(app, "backend", "fault", "replica", "redis+sentinel://")
        app, _ = make_app(name="away", SSE_BACKEND=server.url, **KEY)
        server.kill()
        check(app, "backend", "fault", "SSE_BACKEND", "Connection refused")


@pytest.mark.external
def test_a_clock_of_redis_that_is_off(make_app: MakeApp, tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", clock="+1d") as server:
        app, _ = make_app(SSE_BACKEND=server.url, **KEY)
        check(app, "clock", "fault", "of Redis is 24 hours ahead", "NTP")


# -- with a URL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "given", "codes"),
    [
        (401, [], ["unauthorized", "secret_key"]),
        (403, [], ["forbidden", "secret_key"]),
        (404, [], ["not_found"]),
        (401, ["--token=sse1.a"], ["unauthorized"]),
        (403, ["--header=Cookie: a=b"], ["forbidden"]),
    ],
)
def test_a_server_that_refuses_an_app_without_a_key(
    status: int, given: list[str], codes: list[str], make_app: MakeApp
) -> None:
    app, _ = make_app(name="inside")
    server = Flask("server")
    server.before_request(lambda: abort(status))
    with live_server(server) as url:
        made = report(app, f"{url}/events", *given)
    assert [finding["code"] for finding in made["findings"] if "In this process" not in finding["what"]] == codes


@pytest.mark.parametrize(("given", "seconds"), [([], 210), (["--seconds=2"], 62)])
def test_the_token_that_it_signs_is_soon_over(given: list[str], seconds: int, make_app: MakeApp) -> None:
    app, _ = make_app(**KEY)
    with scripted_server(sending(b"HTTP/1.1 429 Later\r\n\r\n")) as server:
        report(app, server.url, *given)
    [payload] = re.findall(rb"Bearer sse1\.([^.]+)\.", server.heads[0])
    issued, expires, *_ = json.loads(base64.urlsafe_b64decode(payload + b"=="))
    assert expires - issued == seconds * 1_000_000


@pytest.mark.external
def test_with_a_url_the_site_is_examined_with_a_token_of_the_app(make_app: MakeApp, tmp_path: Path) -> None:
    app_of_site, _ = make_app(name="unauthorized", **KEY)
    app_of_other, _ = make_app(name="another", **KEY)
    app_with_random_key, _ = make_app(name="healthy", SECRET_KEY="other")
    command = tuple(part.replace("serverapp", "faultyapps") for part in gunicorn("-k", "gthread", "--threads=50"))
    with running(command, tmp_path) as server:
        url = f"{server.url}/unauthorized/events"
        made = report_with([], app_of_site, url, "--seconds=1")
        refused = report(app_of_other, url)
        given = report(app_of_other, f"{url}?token=sse1.visible.token")
        healthy = f"{server.url}/healthy/events"
        other = report_with([("secret_key", "warning")], app_with_random_key, healthy, "--seconds=1")
        status, printed = run(app_of_site, url, "--header", "X-Nothing: 1")
    assert made["url"] == url
    assert set(made["facts"]) > {"app", "answer", "listened"}
    assert "sse1." not in json.dumps(made)
    assert [finding["code"] for finding in refused["findings"]] == ["unauthorized", "secret_key"]
    assert "SECRET_KEY" in refused["findings"][1]["what"]
    assert other["facts"]["resumed"]["type"] == "sse_open"
    assert [finding["code"] for finding in given["findings"]] == ["unauthorized"] * 2  # also inside
    assert all("token" in finding["what"] for finding in given["findings"])
    assert given["url"] == f"{url}?token=..."
    assert "visible" not in json.dumps(given)
    assert status == 1
    assert "FAULT unauthorized: The app, or a proxy, answers 401" in printed
