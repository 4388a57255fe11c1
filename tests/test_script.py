"""The module for browsers as it is served, found and copied: `script`, the route, `sse_script_url`, `flask sse client`.

What the module does is tested in browsers.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from flask import Flask, Response, render_template_string, request, session
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client as WSGIClient

from sse_batcher import SSE, UsageError, browser, reasons, script, wsgi
from sse_batcher.browser import SCRIPT, SOURCE, TYPES, VERSION
from sse_batcher.cli import serving

from .kit.browser import chromium
from .kit.commands import started
from .kit.flask_apps import MakeApp, apps_fixture, get
from .kit.services import program
from .kit.waiting import TIMEOUT

make_app = apps_fixture()

ALWAYS = {"Access-Control-Allow-Origin": "*", "X-Content-Type-Options": "nosniff"}
WHOLE = ALWAYS | {"Content-Type": "text/javascript; charset=utf-8", "Content-Length": str(len(SCRIPT))}
ETAG = f'W/"{VERSION}"'
FOR_A_YEAR = {"Cache-Control": "public, max-age=31536000, immutable", "ETag": ETAG}
ASK_EACH_TIME = {"Cache-Control": "no-cache", "ETag": ETAG}
NOT_AT_ALL = {"Cache-Control": "no-store"}

Ask = Callable[..., tuple[int, dict[str, str], bytes]]


def ask_wsgi(query: str = "", method: str = "GET", condition: str = "") -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body of `script`, through the validator, which fails for whatever PEP 3333 forbids."""
    environ: dict[str, Any] = {"QUERY_STRING": query, "REQUEST_METHOD": method}
    if condition:
        environ["HTTP_IF_NONE_MATCH"] = condition
    setup_testing_defaults(environ)
    answer: list[Any] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        status, headers, body = script(environ)
        start_response(status, headers)
        return body

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., Any]:
        answer.extend([int(status[:3]), dict(headers)])
        assert len(dict(headers)) == len(headers)
        return lambda data: None

    body = validator(app)(environ, start_response)
    content = b"".join(body)
    body.close()  # type: ignore[attr-defined]
    return answer[0], answer[1], content


@pytest.fixture(params=["plain WSGI", "Flask"])
def ask(request: pytest.FixtureRequest, make_app: MakeApp) -> Ask:
    """Asks for the module: a query, a method, an ``If-None-Match``."""
    if request.param == "plain WSGI":
        return ask_wsgi
    app, _sse = make_app()

    def ask_flask(query: str = "", method: str = "GET", condition: str = "") -> tuple[int, dict[str, str], bytes]:
        headers = {"If-None-Match": condition} if condition else {}
        response = app.test_client().open(f"/events/sse-batcher.js?{query}", method=method, headers=headers)
        return response.status_code, dict(response.headers), response.data

    return ask_flask


# -- what caches may keep ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "caching"),
    [
        (f"v={VERSION}", FOR_A_YEAR),
        ("v=0123456789ab", NOT_AT_ALL),
        (f"v={VERSION}x", NOT_AT_ALL),
        (f"v=0123456789ab&v={VERSION}", NOT_AT_ALL),
        ("", ASK_EACH_TIME),
        ("v=", ASK_EACH_TIME),
        (f"version={VERSION}", ASK_EACH_TIME),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_cache_keeps_only_the_version_that_was_asked_for(
    ask: Ask, query: str, caching: dict[str, str], method: str
) -> None:
    body = SCRIPT if method == "GET" else b""
    assert ask(query, method) == (200, WHOLE | caching, body)


CONDITIONS = [ETAG, f'"{VERSION}"', "*", f'"a", {ETAG}', f' W/"b" ,{ETAG} , "c"']


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("query", "caching"), [("", ASK_EACH_TIME), (f"v={VERSION}", FOR_A_YEAR)])
def test_a_client_that_has_the_module_gets_304(
    ask: Ask, condition: str, method: str, query: str, caching: dict[str, str]
) -> None:
    assert ask(query, method, condition) == (304, ALWAYS | caching, b"")


@pytest.mark.parametrize("condition", ['W/"0123456789ab"', '""', VERSION, '"*"', f'"{VERSION}', "W/", ",", "\\"])
def test_a_client_that_has_something_else_gets_the_module(ask: Ask, condition: str) -> None:
    assert ask("", "GET", condition) == (200, WHOLE | ASK_EACH_TIME, SCRIPT)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_process_with_another_version_never_answers_with_304(ask: Ask, condition: str) -> None:
    """The cache has stored what it has under the URL of the other version. So this answer must not refresh it."""
    assert ask("v=0123456789ab", "GET", condition) == (200, WHOLE | NOT_AT_ALL, SCRIPT)


def test_options_says_what_is_allowed(ask: Ask) -> None:
    status, headers, body = ask("", "OPTIONS")
    assert (status, {*headers["Allow"].split(", ")}, body) == (200, {"GET", "HEAD", "OPTIONS"}, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_another_method_is_405(ask: Ask, method: str) -> None:
    status, headers, _body = ask(f"v={VERSION}", method)
    assert (status, {*headers["Allow"].split(", ")}) == (405, {"GET", "HEAD", "OPTIONS"})
    assert "Cache-Control" not in headers


def test_the_headers_given_out_are_the_callers_own() -> None:
    script({})[1].append(("X-Mine", "1"))
    assert ask_wsgi()[1] == WHOLE | ASK_EACH_TIME


@pytest.mark.external
def test_a_browser_keeps_no_wrong_version_during_a_rolling_deploy(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[str] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["PATH_INFO"] != "/sse-batcher.js":
            start_response("200 OK", [("Content-Type", "text/html")])
            url = f"/sse-batcher.js?{environ['QUERY_STRING']}"
            return [f'<script type="module">import {{ name }} from "{url}"; self.got = name;</script>'.encode()]
        status, headers, body = script(environ)
        answers.append(status)
        start_response(status, headers)
        return body

    def use(version: str) -> None:
        monkeypatch.setattr(wsgi, "SCRIPT", f'export const name = "{version}";'.encode())
        monkeypatch.setattr(wsgi, "VERSION", version)

    with serving(app) as (host, port), chromium() as chrome, chrome.new_page() as page:

        def seen(query: str) -> tuple[str, list[str]]:
            answers.clear()
            page.goto(f"http://{host}:{port}/?{query}")
            return page.evaluate("self.got"), answers

        use("old")  # a page of a new process gets its module from an old one
        assert seen("v=new") == ("old", ["200 OK"])
        assert seen("v=new") == ("old", ["200 OK"])
        assert seen("v=old") == ("old", ["200 OK"])
        assert seen("") == ("old", ["200 OK"])
        use("new")
        assert seen("v=new") == ("new", ["200 OK"])
        assert seen("v=new") == ("new", [])
        assert seen("v=old") == ("old", [])
        assert seen("") == ("new", ["200 OK"])
        assert seen("") == ("new", ["304 Not Modified"])


# -- under Flask -------------------------------------------------------------------------------------------------------


def url_in(app: Flask, path: str = "/page", **options: Any) -> str:
    return get(app, path, **options).text


def add_pages(app: Flask, sse: SSE, **options: Any) -> None:
    """Add a page with the URL from a template, and one with the URL from Python."""

    def page(**values: str) -> str:
        return render_template_string("{{ sse_script_url() }}")

    app.add_url_rule("/page", "page", page, **options)
    app.add_url_rule("/other", "other", lambda **values: sse.script_url(), **options)


@pytest.mark.parametrize(("prefix", "path"), [("/events", "/events"), ("/", ""), ("/a/b/", "/a/b")])
def test_a_template_has_the_url_with_the_version(make_app: MakeApp, prefix: str, path: str) -> None:
    app, sse = make_app(SSE_URL_PREFIX=prefix)
    add_pages(app, sse)
    url = f"{path}/sse-batcher.js?v={VERSION}"
    assert [url_in(app), url_in(app, "/other")] == [url, url]
    assert get(app, url).headers["Cache-Control"] == FOR_A_YEAR["Cache-Control"]


def test_an_app_mounted_below_another_one_has_its_path_in_the_url(make_app: MakeApp) -> None:
    app, sse = make_app()
    add_pages(app, sse)
    client = WSGIClient(DispatcherMiddleware(Flask("outer"), {"/sub": app}))
    url = client.get("/sub/page").text
    assert url == f"/sub/events/sse-batcher.js?v={VERSION}"
    assert client.get(url).data == SCRIPT


def test_with_host_matching_the_module_is_at_each_host() -> None:
    app = Flask("app", host_matching=True, static_host="static.example.com")
    sse = SSE(app)
    add_pages(app, sse, host="<any>")
    base = "http://a.example.com"
    url = url_in(app, base_url=base)
    assert url == f"/events/sse-batcher.js?v={VERSION}"
    assert get(app, url, base_url=base).data == SCRIPT
    with app.app_context():
        assert sse.manager.shutdown(TIMEOUT)


def test_a_page_on_a_subdomain_gets_the_url_of_the_main_host() -> None:
    app = Flask("app", subdomain_matching=True, static_folder=None)
    app.config["SERVER_NAME"] = "example.com"
    sse = SSE(app)
    add_pages(app, sse, subdomain="shop")
    url = url_in(app, base_url="http://shop.example.com")
    assert url == f"http://example.com/events/sse-batcher.js?v={VERSION}"
    assert get(app, url).headers["Access-Control-Allow-Origin"] == "*"
    with app.app_context():
        assert sse.script_url() == url  # a page that is made outside a request
        assert sse.manager.shutdown(TIMEOUT)


def test_the_url_needs_an_app(make_app: MakeApp) -> None:
    app, sse = make_app()
    with pytest.raises(RuntimeError, match="application context"):
        sse.script_url()
    with app.app_context(), pytest.raises(RuntimeError, match="SERVER_NAME"):
        sse.script_url()
    with Flask("other").app_context(), pytest.raises(UsageError, match="the app 'other' does not know this SSE"):
        sse.script_url()


def test_without_routes_the_url_is_an_error_that_says_what_to_do(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_URL_PREFIX=None)
    with app.test_request_context():
        for ask in (sse.script_url, lambda: render_template_string("{{ sse_script_url() }}")):
            with pytest.raises(UsageError) as raised:
                ask()
            for words in ("SSE_URL_PREFIX = None", "sse_batcher.script(request.environ)", "flask sse client"):
                assert words in str(raised.value)
        assert render_template_string("{{ sse_cursor() }}") == sse.cursor()


def test_without_routes_a_view_of_the_app_can_serve_the_module(make_app: MakeApp) -> None:
    app, _sse = make_app(SSE_URL_PREFIX=None)

    @app.get("/static/sse-batcher.js")
    def module() -> Response:
        status, headers, body = script(request.environ)
        return Response(body, status, headers)

    response = get(app, f"/static/sse-batcher.js?v={VERSION}")
    assert (dict(response.headers), response.data) == (WHOLE | FOR_A_YEAR, SCRIPT)
    assert get(app, "/static/sse-batcher.js", headers={"If-None-Match": ETAG}).status_code == 304
    assert get(app, "/events/sse-batcher.js").status_code == 404


def test_any_client_may_have_the_module(make_app: MakeApp) -> None:
    app, sse = make_app(SSE_CORS_ORIGINS=["https://example.com"])
    sse.authorize(lambda channels: pytest.fail("it is asked only for streams"))
    sse.identify(lambda: pytest.fail("it is asked only for streams"))
    response = get(app, "/events/sse-batcher.js", headers={"Origin": "https://other.example"})
    assert dict(response.headers) == WHOLE | ASK_EACH_TIME


class OwnResponse(Response):
    """What an app may answer with instead of Flask's."""


@pytest.mark.parametrize("response_class", [Response, OwnResponse])
def test_no_cache_gets_the_cookie_of_a_user(make_app: MakeApp, response_class: type[Response]) -> None:
    app, _sse = make_app(SECRET_KEY="for this test")
    app.response_class = response_class

    @app.before_request
    def visit() -> None:
        session.permanent = True
        session["user"] = "ada"

    @app.after_request
    def note(response: Response) -> Response:
        assert isinstance(response, response_class)
        response.vary.add("Accept-Encoding")
        response.set_cookie("seen", "1")
        return response

    def seen(path: str) -> tuple[list[str], list[str]]:
        response = get(app, path)
        return response.headers.getlist("Set-Cookie"), sorted(response.vary)

    cookies, vary = seen("/events/health")
    assert (len(cookies), vary) == (2, ["Accept-Encoding", "Cookie"])
    assert seen(f"/events/sse-batcher.js?v={VERSION}") == ([], ["Accept-Encoding"])


# -- flask sse client --------------------------------------------------------------------------------------------------

NAMES = ("sse-batcher.js", "sse-batcher.d.ts")


@pytest.fixture
def write(make_app: MakeApp) -> Callable[..., tuple[int, str]]:
    """Runs ``flask sse client`` with these arguments: its exit code and what it prints."""
    app, _sse = make_app()

    def run(*arguments: object) -> tuple[int, str]:
        result = app.test_cli_runner().invoke(args=["sse", "client", *map(str, arguments)])
        return result.exit_code, result.output

    return run


Write = Callable[..., tuple[int, str]]


def test_the_module_and_its_types_are_written(write: Write, tmp_path: Path) -> None:
    said = "".join(f"{tmp_path / name} was written\n" for name in NAMES)
    assert write(tmp_path) == (0, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for name, content in zip(NAMES, (SOURCE, TYPES), strict=True):
        note, _, rest = (tmp_path / name).read_bytes().partition(b"\n")
        assert re.fullmatch(rb'// sse_batcher for browsers, version (\w+)\. Written by "flask sse client".*', note)
        assert VERSION.encode() in note
        assert rest.decode() == content


def test_a_second_run_changes_nothing(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    before = [(tmp_path / name).stat().st_mtime_ns for name in NAMES]
    assert write(tmp_path) == (0, "".join(f"{tmp_path / name} is up to date\n" for name in NAMES))
    assert [(tmp_path / name).stat().st_mtime_ns for name in NAMES] == before


def test_a_run_after_an_upgrade_overwrites_the_files_of_the_last_one(write: Write, tmp_path: Path) -> None:
    write(tmp_path)
    written = [(tmp_path / name).read_bytes() for name in NAMES]
    for name in NAMES:
        path = tmp_path / name
        path.write_bytes(path.read_bytes().replace(VERSION.encode(), b"0123456789ab") + b"// old\n")
    assert write(tmp_path) == (0, "".join(f"{tmp_path / name} was written\n" for name in NAMES))
    assert [(tmp_path / name).read_bytes() for name in NAMES] == written


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content", [b"", b"export {};\n", SOURCE.encode(), b"\xff\x00"], ids=["empty", "other", "ours", "binary"]
)
def test_a_file_of_someone_else_is_left_alone(write: Write, tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    code, said = write(tmp_path)
    assert code == 1
    assert said == f"Error: {path} was not written by this command: remove it, or name another folder\n"
    assert (path.read_bytes(), len([*tmp_path.iterdir()])) == (content, 1)


def test_a_folder_must_be_there(write: Write, tmp_path: Path) -> None:
    code, said = write(tmp_path / "nowhere")
    assert code == 2
    assert f"Invalid value for 'FOLDER': Directory '{tmp_path / 'nowhere'}' does not exist" in said
    (tmp_path / "file").touch()
    code, said = write(tmp_path / "file")
    assert code == 2
    assert "is a file" in said
    assert write()[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_is_an_error(write: Write, tmp_path: Path) -> None:
    (tmp_path / NAMES[1]).mkdir()
    code, said = write(tmp_path)
    assert (code, said) == (1, f"Error: cannot write {tmp_path / NAMES[1]}: Is a directory\n")
    assert not (tmp_path / NAMES[0]).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_is_full_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import flask, sse_batcher\napp = flask.Flask('app')\nsse_batcher.SSE(app)\n")
    with Path("/dev/full").open("w") as full:
        with started("-m", "flask", "--app=app", "sse", "client", ".", folder=tmp_path, stdout=full) as process:
            _, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (1, "Error: the output cannot be written: No space left on device\n")
    assert {path.name for path in tmp_path.iterdir()} > set(NAMES)


# -- the files ---------------------------------------------------------------------------------------------------------


def test_the_module_has_at_most_6000_bytes_with_gzip() -> None:
    assert len(gzip.compress(SCRIPT, 9)) <= 6_000


def test_the_module_imports_nothing() -> None:
    assert not re.findall(rb"^import\b|\bimport\(|^export .* from\b|\brequire\(", SCRIPT, flags=re.M)


@pytest.mark.parametrize(
    ("event", "known"),
    [("sse_gap", reasons.GapReason), ("sse_busy", reasons.BusyReason), ("sse_bye", reasons.ByeReason)],
)
def test_the_types_have_the_reasons_that_the_server_gives(event: str, known: Any) -> None:
    declared = re.search(rf"\b{event}: {{[^}}]*?reason:([^;]*);", TYPES)
    assert declared
    assert re.findall(r'"(\w+)"', declared[1]) == [*get_args(known)]


def declared(kind: str, name: str) -> list[str]:
    """The names of the members that the types declare, `static ` before those of the class itself."""
    types = re.sub(r"/\*.*?\*/", "", TYPES, flags=re.S)
    (body,) = re.findall(rf"^export {kind} {name}\b.*?{{$\n(.*?)^}}$", types, flags=re.M | re.S)
    members = re.findall(r"^  (static )?(?:readonly |get |set )?(\w+)[?<(:]", body, flags=re.M)
    return sorted({"".join(member) for member in members} - {"constructor"})


MEMBERS = """
Object.assign(globalThis, { self: new EventTarget(), location: { href: "http://127.0.0.1:9/" } });  // as in a browser
const { BatchedEventSource, ...others } = await import(process.argv[1]);
const make = (options) => {
  const source = new BatchedEventSource("/events", Object.fromEntries(options.map((name) => [name, undefined])));
  source.close();
  return source;
};
const named = (object) => Object.getOwnPropertyNames(object).filter((name) => name !== "constructor");
const source = make(JSON.parse(process.argv[2]));
const added = Object.keys(source).concat(named(BatchedEventSource.prototype));
const statics = named(BatchedEventSource).filter((name) => !["length", "name", "prototype"].includes(name));
let refused;
try { make(["url", "another"]); } catch (error) { refused = String(error); }
console.log(JSON.stringify({
  others: Object.keys(others),
  added: [...added, ...statics.map((name) => `static ${name}`)],
  inherited: named(EventTarget.prototype),
  refused,
}));
process.exit();
"""


@pytest.mark.external
def test_the_module_has_the_members_and_options_that_its_types_declare() -> None:
    node = program("node", package="Debian: nodejs")
    module = (Path(browser.__file__).parent / "sse-batcher.js").as_uri()
    command = [node, "--input-type=module", "--eval", MEMBERS, module, json.dumps(declared("interface", "Options"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["others"] == []
    of_class = set(declared("class", "BatchedEventSource"))
    assert {name for name in found["added"] if not name.startswith("_")} <= of_class
    assert of_class <= {*found["added"], *found["inherited"]}
    assert found["refused"] == "TypeError: unknown option another"  # so it knows all that are declared
