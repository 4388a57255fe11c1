"""The configuration files of proxies that docs/guides/proxy.md shows, each run by its program in front of gunicorn.

Each proxy is started once.
"""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import BrowserContext

from .kit import nginx
from .kit.browser import chromium
from .kit.deploy import DEPLOY
from .kit.ports import free_port
from .kit.proxies import APACHE_THREADS, PROXIES, configuration, running_proxy
from .kit.redisserver import redis_server
from .kit.repository import ROOT
from .kit.servers import HOST, Server, gunicorn, running
from .kit.services import program
from .kit.sse_parser import EventStreamParser, ServerEvent
from .kit.waiting import TIMEOUT, TRIES, tried, wait_until

pytestmark = [pytest.mark.external, pytest.mark.timeout(90)]

HEARTBEAT = 1.0
IMPATIENT = 2
"""Seconds after which a proxy of one test ends a connection on which nothing comes."""

APP = """
import os, time
from flask import Flask, Response, render_template_string, request
from sse_batcher import SSE
from werkzeug.middleware.proxy_fix import ProxyFix

app = Flask(__name__)
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1)  # as on the page
app.config.update(
    SSE_HEARTBEAT=1.0, SSE_BATCH_WINDOW=0.05, SSE_BACKEND=os.environ.get("BACKEND", "memory://")
)
sse = SSE(app)

PAGE = \"\"\"<!doctype html><title>The app</title><link rel="icon" href="data:,"><p>{{ "text " * 1000 }}</p>
<script type="module">
  import { BatchedEventSource } from "{{ sse_script_url() }}";
  window.got = [];
  window.events = new BatchedEventSource("/events", { backoff: [300, 1000] });
  events.on("n", (data) => got.push(data));
</script>\"\"\"

@app.get("/")
def page():
    return render_template_string(PAGE)

@app.post("/enqueue")
def enqueue():
    for event_type, data in request.get_json():
        sse.enqueue(event_type, data)
    return "", 204

orders = []

@app.post("/orders")
def order():
    orders.append("order")
    return ""

@app.get("/orders-sent")
def sent():
    return str(len(orders))

@app.get("/stats")
def stats():
    return sse.manager.get_stats().as_dict()

@app.get("/seen")
def seen():
    return [request.scheme, request.remote_addr]

@app.get("/process")
def process():
    return str(os.getpid())

@app.get("/silent")
def silent():
    def blocks():
        yield "data: 1\\n\\n"
        time.sleep(SECONDS)
        yield "data: 2\\n\\n"
    return Response(blocks(), content_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
""".replace("SECONDS", str(2 * IMPATIENT))


@contextmanager
def app_on(port: int, folder: Path, **environment: str) -> Iterator[Server]:
    """The app, listening on this port, too."""
    (folder / "proxyapp.py").write_text(APP)
    command = gunicorn("-k", "gthread", "--threads=16", f"--bind={HOST}:{port}")
    with running((*command[:-1], "proxyapp:app"), folder, PYTHONPATH=str(folder), **environment) as server:
        server.request("GET", "/process")  # a proxy may not wait until the worker has imported the app
        yield server


class Site:
    """The app, and each of the proxies in front of it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.port = free_port()
        self._apps = stack.enter_context(ExitStack())
        self.start()
        self.proxies = {}
        for name, proxy in PROXIES.items():
            (folder / name).mkdir()
            config = configuration(proxy, f"{HOST}:{self.port}")
            self.proxies[name] = stack.enter_context(running_proxy(proxy, config, folder / name))

    def start(self) -> None:
        self.app = self._apps.enter_context(app_on(self.port, self.folder))

    def clients(self) -> int:
        count: int = self.app.stats()["clients"]
        return count


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path_factory.mktemp("site"), stack)


def client(server: Server, *, http2: bool = False) -> httpx.Client:
    limits = httpx.Limits(max_connections=1) if http2 else httpx.Limits()
    return httpx.Client(base_url=server.url, verify=False, http1=not http2, http2=http2, timeout=TIMEOUT, limits=limits)


class Reader:
    """Reads a stream as the bytes come, and notes the heartbeats."""

    def __init__(self, response: httpx.Response) -> None:
        self._chunks = response.iter_raw()
        self._parser = EventStreamParser(strict=True)
        self._events: list[ServerEvent] = []

    @property
    def heartbeats(self) -> int:
        return len(self._parser.comments)

    def next(self) -> ServerEvent:
        while not self._events:
            self._events += self._parser.feed(next(self._chunks))
        return self._events.pop(0)

    def reads_to_end(self) -> bool:
        """Read on. Whether the response ends as it should; false if it is cut off."""
        try:
            for chunk in self._chunks:
                self._parser.feed(chunk)
        except httpx.RemoteProtocolError:
            return False
        return True


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("name", PROXIES)
def test_each_event_comes_before_the_next_is_sent_and_is_not_compressed(site: Site, name: str, http2: bool) -> None:
    with client(site.proxies[name], http2=http2) as browser:
        page = browser.get("/")
        assert page.headers["Content-Encoding"] == "gzip"
        with browser.stream("GET", "/events") as response:
            assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
            assert response.headers.get("Content-Encoding", "identity") == "identity"
            reader = Reader(response)
            assert reader.next().type == "sse_open"

            def heartbeats() -> int:
                """How many come among some events."""
                before = reader.heartbeats
                for number in range(4):
                    site.app.enqueue(("n", number))
                    event = reader.next()
                    assert (event.type, event.json) == ("n", number)
                return reader.heartbeats - before

            # A proxy that passes a block on with the next write would pass these on with heartbeats each time.
            assert any(heartbeats() == 0 for _ in range(TRIES))
    at_once = name in ("nginx", "caddy") or (name == "haproxy" and http2)
    limit = (0.9 if at_once else 2.9) * HEARTBEAT
    # A machine that stands still delays some of these, and a proxy that waits for heartbeats delays all.
    assert any(seconds_until_noticed(site, name, http2=http2) < limit for _ in range(5))


def seconds_until_noticed(site: Site, name: str, *, http2: bool) -> float:
    """How long the app does not know that a client has left, which was there for a moment."""
    with client(site.proxies[name], http2=http2) as browser, browser.stream("GET", "/events") as response:
        assert Reader(response).next().type == "sse_open"
    left = time.monotonic()
    wait_until(lambda: site.clients() == 0, "the app has noticed that the client has left")
    return time.monotonic() - left


def test_heartbeats_keep_an_idle_stream_open(site: Site, tmp_path: Path) -> None:
    with ExitStack() as stack:
        proxies = {}
        for name, proxy in PROXIES.items():
            (tmp_path / name).mkdir()
            config = configuration(proxy, f"{HOST}:{site.port}", idle=IMPATIENT)
            proxies[name] = stack.enter_context(running_proxy(proxy, config, tmp_path / name))
        # Caddy has no such timeout.
        expected = {"nginx": (False, True), "apache": (False, True), "caddy": (True, True), "haproxy": (False, True)}
        assert tried(lambda: kept_open(site, proxies), lambda kept: kept == expected) == expected


def kept_open(site: Site, proxies: dict[str, Server]) -> dict[str, tuple[bool, bool]]:
    """Whether a response without a byte for some time, and an idle stream with heartbeats, live on behind each."""
    with ExitStack() as stack:

        def get(server: Server, path: str) -> Reader:
            return Reader(stack.enter_context(stack.enter_context(client(server)).stream("GET", path)))

        streams = {name: get(server, "/events") for name, server in proxies.items()}
        silent = {name: get(server, "/silent") for name, server in proxies.items()}
        has_lived = {name: reader.reads_to_end() for name, reader in silent.items()}
        site.app.enqueue(("n", "after"))

        def has_after(reader: Reader) -> bool:
            with suppress(httpx.RemoteProtocolError, StopIteration):
                events = [reader.next().type, reader.next().json]
                return events == ["sse_open", "after"] and reader.heartbeats >= IMPATIENT
            return False

        return {name: (has_lived[name], has_after(reader)) for name, reader in streams.items()}


@pytest.mark.parametrize("name", PROXIES)
def test_the_app_sees_the_scheme_and_the_address_of_the_client(site: Site, name: str) -> None:
    with client(site.proxies[name]) as browser:
        seen = browser.get("/seen", headers={"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Proto": "http"}).json()
        assert seen == ["https", HOST]


def test_a_stream_takes_a_thread_of_apache(site: Site) -> None:
    apache = site.proxies["apache"]
    with ExitStack() as stack:
        readers = []
        for _ in range(APACHE_THREADS):
            response = stack.enter_context(stack.enter_context(client(apache)).stream("GET", "/events"))
            readers.append(Reader(response))  # kept, since a response is closed with its iterator
            assert readers[-1].next().type == "sse_open"
        with client(apache) as browser, pytest.raises(httpx.TimeoutException):
            browser.get("/", timeout=0.5)
    wait_until(lambda: site.clients() == 0, "all have left")


def test_an_app_that_comes_back_is_served_at_once(site: Site) -> None:
    site.app.stop(signal.SIGTERM)
    with ExitStack() as stack:
        browsers = {name: stack.enter_context(client(server)) for name, server in site.proxies.items()}
        for name, browser in browsers.items():
            response = browser.get("/events")
            assert response.status_code == PROXIES[name].down, name
            assert "Back in a moment" not in response.text
        site.start()
        for name, browser in browsers.items():
            assert browser.get("/events/health").status_code == 200, name


@pytest.fixture(scope="module")
def chrome() -> Iterator[BrowserContext]:
    with chromium() as browser:
        yield browser.new_context(ignore_https_errors=True)  # the certificate is signed by itself


def test_ten_tabs_have_a_stream_each_over_http2(site: Site, chrome: BrowserContext) -> None:
    nginx = site.proxies["nginx"]
    tabs = [chrome.new_page() for _ in range(10)]
    for tab in tabs:
        tab.goto(nginx.url, wait_until="load")
        tab.wait_for_function("window.events?.state === 'open'")
        assert tab.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol") == "h2"
    assert site.clients() == 10
    site.app.enqueue(("n", 1))
    for tab in tabs:
        tab.wait_for_function("got.length")
    for tab in tabs:
        tab.close()
    wait_until(lambda: site.clients() == 0, "all have left")


def test_a_page_of_nginx_waits_for_the_app_and_open_pages_come_back(site: Site, chrome: BrowserContext) -> None:
    nginx = site.proxies["nginx"]
    # Its timers run faster: it looks about every quarter of a second.
    chrome.add_init_script("const later = setTimeout; window.setTimeout = (run, ms) => later(run, ms / 20)")
    before, meanwhile = chrome.new_page(), chrome.new_page()
    before.goto(nginx.url, wait_until="load")
    before.wait_for_function("window.events?.state === 'open'")
    site.app.stop(signal.SIGTERM)
    before.wait_for_function("events.state === 'waiting'")
    response = meanwhile.goto(f"{nginx.url}/?page=1", wait_until="load")
    assert response is not None
    assert (response.status, response.headers["cache-control"], meanwhile.title()) == (
        502,
        "no-store",
        "Back in a moment",
    )
    with meanwhile.expect_response(lambda response: response.status == 502):
        pass  # it has looked, and stays
    assert meanwhile.title() == "Back in a moment"
    form = chrome.new_page()
    form.goto(nginx.url, wait_until="load")
    with form.expect_navigation(url="**/orders"):
        form.evaluate("""() => {
            document.body.innerHTML = "<form method=post action=/orders></form>";
            document.forms[0].submit();
        }""")
    assert form.title() == "Back in a moment"
    site.start()
    meanwhile.wait_for_function("document.title === 'The app' && window.events?.state === 'open'")
    assert meanwhile.url == f"{nginx.url}/?page=1"
    form.wait_for_function("document.title === 'The app'")
    assert site.app.request("GET", "/orders-sent") == "0"
    form.close()
    before.wait_for_function("events.state === 'open'")
    site.app.enqueue(("n", "after"))
    for page in (before, meanwhile):
        page.wait_for_function("got.includes('after')")
        page.close()


# -- nginx and two processes of the app --------------------------------------------------------------------------------


@contextmanager
def balanced(ports: list[int], folder: Path) -> Iterator[Server]:
    """nginx, with the block of the file for several processes, in front of these two ports."""
    whole, several = ((DEPLOY / name).read_text() for name in ("nginx.conf", "nginx-upstreams.conf"))
    (block,) = re.findall(r"^upstream .*?^}\n", whole, re.M | re.S)
    upstreams = several.replace("127.0.0.1:8001", f"{HOST}:{ports[1]}")
    assert upstreams != several
    (folder / "nginx").mkdir()
    config = configuration(PROXIES["nginx"], f"{HOST}:{ports[0]}", whole.replace(block, upstreams))
    with running_proxy(PROXIES["nginx"], config, folder / "nginx") as server:
        yield server


def test_the_restart_of_one_process_is_invisible(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        backend = stack.enter_context(redis_server(tmp_path / "redis")).url
        apps = [stack.enter_context(app_on(port, tmp_path, BACKEND=backend)) for port in ports]
        browser = stack.enter_context(client(stack.enter_context(balanced(ports, tmp_path)), http2=True))

        def processes() -> set[str]:
            """The processes that answer. Each request succeeds."""
            responses = [browser.get("/process") for _ in range(8)]
            assert {response.status_code for response in responses} == {200}
            return {response.text for response in responses}

        def stream(cursor: str = "") -> Reader:
            url = f"/events?last_event_id={cursor}"
            return Reader(stack.enter_context(browser.stream("GET", url)))

        before = processes()
        assert len(before) == 2
        streams = [stream(), stream()]
        cursors = [reader.next().id for reader in streams]
        assert [app.stats()["clients"] for app in apps] == [1, 1]
        stopping = threading.Thread(target=apps[0].stop, args=[signal.SIGTERM])
        stopping.start()
        while stopping.is_alive():
            processes()
        assert len(processes()) == 1
        apps[1].enqueue(("n", "meanwhile"))
        # One stream has ended in good order, and comes back to the other process.
        seen = [[reader.next().type] for reader in streams]
        assert sorted(seen) == [["n"], ["sse_bye"]]
        again = stream(cursors[seen.index(["sse_bye"])])
        assert [again.next().type, again.next().json] == ["sse_open", "meanwhile"]
        stack.enter_context(app_on(ports[0], tmp_path, BACKEND=backend))
        assert len(processes()) == 2
        assert len(processes() & before) == 1


@contextmanager
def breaking() -> Iterator[tuple[int, list[str]]]:
    """A server that takes each request and closes the connection. Its port, and the methods that came."""
    methods: list[str] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(ConnectionError):
                if request := connection.recv(1000):  # some other program may try whether this port is free
                    methods.append(request.split()[0].decode())

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], methods
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_get_is_tried_at_the_next_process_and_a_post_is_not(tmp_path: Path) -> None:
    with ExitStack() as stack:
        ports, methods = zip(*(stack.enter_context(breaking()) for _ in range(2)), strict=True)
        browser = stack.enter_context(client(stack.enter_context(balanced(list(ports), tmp_path))))
        assert browser.get("/events").status_code == 502
        assert methods == (["GET"], ["GET"])
        assert browser.post("/enqueue", json=[]).status_code == 502
        assert sorted(chain(*methods)) == ["GET", "GET", "POST"]


# -- is anything held back? --------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/guides/proxy.md").read_text()


def curl(server: Server) -> str:
    """What the page's command prints, within two seconds."""
    (command,) = re.findall(r"^```sh\n(curl .*)\n```$", PAGE, re.M)
    name, *arguments = shlex.split(command.replace("https://app.example.com", server.url))
    path = program(name, package="Debian: curl")
    more = ["--insecure", "--silent", "--max-time", "2"]
    return subprocess.run([path, *arguments, *more], capture_output=True, text=True, check=False).stdout


def curl_of_a_stream(server: Server) -> str:
    """The same, where a stream comes at once, if the machine does not stand still."""
    return tried(lambda: curl(server), lambda printed: "sse_open" in printed)


def test_curl_shows_whether_a_proxy_holds_streams_back(site: Site, tmp_path: Path) -> None:
    arguments = nginx.arguments_of(
        program("nginx", package="Debian: nginx-light"), nginx.HOLDING, host=HOST, upstream=f"{HOST}:{site.port}"
    )
    with running(arguments, tmp_path) as holding, ThreadPoolExecutor() as pool:
        nothing = pool.submit(curl, holding)
        outputs = [*pool.map(curl_of_a_stream, site.proxies.values())]
    assert nothing.result() == ""
    for output in outputs:
        assert re.search(r"^content-type: text/event-stream.*^event: sse_open$", output, re.M | re.S | re.I)
