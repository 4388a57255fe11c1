"""Set-ups for `doctor`: a server, often with a proxy in front of it, that has one fault, or none.

Each is started by a function of a `Workshop`, a context manager that yields the URL of the stream. Heartbeats and
time-outs are short, so that it soon shows what is wrong. `look` reads a stream with no opinion of it, to prove that.
"""

from __future__ import annotations

import itertools
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from sse_batcher.remote.message import Head, RemoteError, make_request
from sse_batcher.remote.stream import connect

from . import nginx
from .deploy import DEPLOY
from .http_proxy import Meddling, meddling_proxy
from .ports import HOST, free_port
from .proxies import PROXIES, configuration, running_proxy
from .redisserver import RedisServer, redis_server
from .servers import GTHREAD, SERVERS, Kind, Server, running, serving
from .services import program
from .waiting import wait_until

QUICK = 0.3
"""Seconds between the heartbeats of most apps."""
SLOW = 1.6
"""Seconds between the heartbeats of the apps behind a proxy that is too impatient."""
IMPATIENT = 1
"""The seconds that such a proxy waits. Apache knows no fractions."""


class Seen(NamedTuple):
    """What came of a stream."""

    head: Head | None
    """None: not even this came."""
    body: bytes = b""
    """Decompressed."""
    ended: float | None = None
    """Seconds until the stream ended. None: it did not."""

    def header(self, name: str) -> str:
        return self.head.headers.get(name, "") if self.head else ""

    @property
    def heartbeats(self) -> int:
        return len(re.findall(rb"^:", self.body, re.M))

    @property
    def blocks(self) -> int:
        return self.body.count(b"data: ")


def look(url: str, seconds: float, *headers: tuple[str, str]) -> Seen:
    """Read a stream for some seconds, as a client that would take it compressed."""
    request = make_request(url, headers=[("Accept-Encoding", "gzip"), *headers])
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # certificates are signed by themselves
    try:
        stream = connect(request, seconds, context)
    except RemoteError:
        return Seen(None)
    with stream:
        end, body = stream.began + seconds, b""
        while (left := end - time.monotonic()) > 0 and stream.end is None:
            piece = stream.read(left)
            body += piece.body if piece else b""
        return Seen(stream.head, body, time.monotonic() - stream.began if stream.end else None)


class Workshop:
    """A folder for set-ups, and the apps that several of them share. Each app is started by the first that needs it.

    Thread-safe: set-ups can run side by side.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._lock = threading.Lock()  # guards the apps, and the numbers of the folders
        self._apps: dict[float, Server] = {}
        self._numbers = itertools.count()

    def app(self, heartbeat: float = QUICK) -> Server:
        with self._lock:
            if heartbeat not in self._apps:
                app = running(GTHREAD, self._folder_locked("app"), HEARTBEAT=str(heartbeat))
                server = self._apps[heartbeat] = self._stack.enter_context(app)
                server.stats()  # gunicorn listens before its worker is there: too long before, for some proxies
            return self._apps[heartbeat]

    def folder(self, name: str) -> Path:
        """Make a new folder for a server."""
        with self._lock:
            return self._folder_locked(name)

    def _folder_locked(self, name: str) -> Path:
        folder = self._folder / f"{name}-{next(self._numbers)}"
        folder.mkdir()
        return folder


Start = Callable[[Workshop], AbstractContextManager[str]]


class Setup(NamedTuple):
    """A set-up with a fault."""

    start: Start
    code: str
    """What `doctor` has to report, and nothing else."""
    names: tuple[str, ...]
    """What its words have to name: the setting to change, and the numbers."""
    is_there: Callable[[str], bool]
    """Looks at this URL. Whether the fault is there: false for a set-up without it."""
    level: str = "fault"


def events(server: Server) -> str:
    return f"{server.url}/events"


# -- what stands before the app ----------------------------------------------------------------------------------------


@contextmanager
def nginx_before(port: int, location: str, folder: Path) -> Iterator[Server]:
    """Run nginx with these directives before what listens at this port."""
    path = program("nginx", package="Debian: nginx-light")
    arguments = nginx.arguments_of(path, location, host=HOST, upstream=f"{HOST}:{port}")
    with running(arguments, folder) as server:
        yield server


def behind_nginx(*locations: str, heartbeat: float = QUICK) -> Start:
    """An app behind an nginx for each location; the last one is what the client sees."""

    @contextmanager
    def start(workshop: Workshop) -> Iterator[str]:
        with ExitStack() as stack:
            server = workshop.app(heartbeat)
            for location in locations:
                folder = workshop.folder("nginx")
                server = stack.enter_context(nginx_before(server.port, f"{nginx.PASS} {location}", folder))
            yield events(server)

    return start


@contextmanager
def nginx_alone(workshop: Workshop) -> Iterator[str]:
    with nginx_before(free_port(), nginx.PASS, workshop.folder("nginx")) as server:
        yield events(server)


def behind_meddling(meddling: Meddling) -> Start:
    """An app behind the tests' own proxy."""

    @contextmanager
    def start(workshop: Workshop) -> Iterator[str]:
        with meddling_proxy(workshop.app().port, meddling) as url:
            yield f"{url}/events"

    return start


def documented(name: str, *changes: tuple[str, str], idle: float = 60, heartbeat: float = QUICK) -> Start:
    """An app behind one of the proxies of the documentation, with its file, in which texts are replaced."""

    @contextmanager
    def start(workshop: Workshop) -> Iterator[str]:
        text = (DEPLOY / PROXIES[name].file).read_text()
        for old, new in changes:
            assert old in text, f"{name} has no {old}"
            text = text.replace(old, new)
        config = configuration(PROXIES[name], f"{HOST}:{workshop.app(heartbeat).port}", text, idle=idle)
        with running_proxy(PROXIES[name], config, workshop.folder(name)) as server:
            yield events(server)

    return start


# -- what is wrong with the app itself ---------------------------------------------------------------------------------


@contextmanager
def busy_app(workshop: Workshop) -> Iterator[str]:
    """Events come so often that there is no heartbeat."""
    with running(GTHREAD, workshop.folder("busy"), BATCH_WINDOW="0.05") as server:
        server.request("POST", "/publish", (200, 10))
        yield events(server)


@contextmanager
def two_processes(workshop: Workshop) -> Iterator[str]:
    with running((*GTHREAD[:-1], "--workers=2", GTHREAD[-1]), workshop.folder("two")) as server:
        wait_until(lambda: has_several_histories(events(server)), "both serve")
        yield events(server)


@contextmanager
def two_processes_with_redis(workshop: Workshop) -> Iterator[str]:
    with _redis(workshop) as redis, _app_with(redis, workshop, "--workers=2") as server:
        yield events(server)


@contextmanager
def without_redis(workshop: Workshop) -> Iterator[str]:
    """Redis was not there when the app started."""
    with _redis(workshop) as redis:
        redis.kill()
        with _app_with(redis, workshop) as server:
            yield events(server)


@contextmanager
def redis_that_went_away(workshop: Workshop) -> Iterator[str]:
    """It died while the app ran, so long ago that the app is sure."""
    with _redis(workshop) as redis, _app_with(redis, workshop) as server:
        wait_until(lambda: b"sse_open" in look(events(server), QUICK).body, "the app has met Redis")
        redis.kill()
        wait_until(lambda: is_degraded(events(server)), "the app has noticed")
        yield events(server)


def _redis(workshop: Workshop) -> AbstractContextManager[RedisServer]:
    return redis_server(workshop.folder("redis"), saves=False)


@contextmanager
def _app_with(redis: RedisServer, workshop: Workshop, *options: str) -> Iterator[Server]:
    command = (*GTHREAD[:-1], *options, GTHREAD[-1])
    with running(command, workshop.folder("app"), BACKEND=redis.url) as server:
        server.stats()  # now its worker is there
        yield server


# -- the set-ups -------------------------------------------------------------------------------------------------------


def sees(is_faulty: Callable[[Seen], bool], seconds: float = 1.0) -> Callable[[str], bool]:
    """Return what looks at a stream for some seconds, and tells whether that was so."""
    return lambda url: is_faulty(look(url, seconds))


is_held = sees(lambda seen: not seen.body and seen.ended is None)
is_compressed = sees(lambda seen: seen.header("Content-Encoding") == "gzip")
is_http_1_0 = sees(lambda seen: seen.head is not None and seen.head.version == "HTTP/1.0" and seen.heartbeats > 0)
has_no_cache_control = sees(lambda seen: seen.blocks > 0 and not seen.header("Cache-Control"))
# Streams share their heartbeats, so the first may come early. A second one would come too late.
ends_while_idle = sees(lambda seen: seen.blocks > 0 and seen.heartbeats < 2 and seen.ended is not None, 2 * SLOW)


def has_several_histories(url: str) -> bool:
    """Whether new connections meet cursors that begin in different ways."""
    with ThreadPoolExecutor(8) as pool:
        bodies = [seen.body for seen in pool.map(lambda _: look(url, QUICK), range(16))]
    return len({history for body in bodies for history in re.findall(rb"^id: (\w+)-", body, re.M)}) > 1


def takes_any_cursor(url: str) -> bool:
    """Whether a client with a cursor of another history gets no ``sse_gap``."""
    return b"event: sse_open" in look(url, QUICK, ("Last-Event-ID", "00000000-1-0")).body


def is_degraded(url: str) -> bool:
    """Whether the health check says that the app works, but not its backend."""
    return b'"degraded"' in look(f"{url}/health/ready", 1).body


GZIP = "gzip on; gzip_types text/event-stream; gzip_min_length 0; gzip_proxied any; proxy_hide_header Content-Encoding;"
ENCODES = "\tencode {\n\t\tgzip\n\t\tminimum_length 1\n\t\tmatch header Content-Type text/*\n\t}"

SETUPS = {
    "nginx that ignores the header": Setup(
        behind_nginx("proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;"),
        "buffered",
        ("proxy_ignore_headers", "proxy_buffering off"),
        is_held,
    ),
    # The first takes the header for itself, and the second never sees it.
    "nginx behind nginx": Setup(
        behind_nginx("", ""), "buffered", ("proxy_buffering off", "in front of another"), is_held
    ),
    "a proxy that waits for the end": Setup(
        behind_meddling(Meddling(holds=1_000_000)), "buffered", ("buffer",), is_held
    ),
    "a proxy that waits for some kilobytes": Setup(
        behind_meddling(Meddling(holds=1_000)), "buffered", ("buffer",), is_held
    ),
    "nginx with gzip": Setup(behind_nginx(GZIP), "compressed", ("gzip_types",), is_compressed, level="warning"),
    "nginx with a short time-out": Setup(
        behind_nginx(f"proxy_read_timeout {IMPATIENT}s;", heartbeat=SLOW),
        "idle_timeout",
        ("proxy_read_timeout", "SSE_HEARTBEAT", f"{SLOW:g} s", "s without a byte"),
        ends_while_idle,
    ),
    "nginx that removes Cache-Control": Setup(
        behind_nginx("proxy_hide_header Cache-Control;"),
        "headers",
        ("Cache-Control", "proxy_hide_header"),
        has_no_cache_control,
        level="warning",
    ),
    "nginx that changes the type": Setup(
        behind_nginx('proxy_hide_header Content-Type; add_header Content-Type "text/plain" always;'),
        "not_a_stream",
        ("Content-Type", "text/plain"),
        sees(lambda seen: seen.header("Content-Type") == "text/plain" and seen.blocks > 0),
    ),
    "nginx that removes the cursor": Setup(
        behind_nginx('proxy_set_header Last-Event-ID "";'),
        "no_resume",
        ("Last-Event-ID", "proxy_set_header"),
        takes_any_cursor,
    ),
    "nginx without the app": Setup(
        nginx_alone,
        "unreachable",
        ("proxy_pass",),
        sees(lambda seen: seen.head is not None and seen.head.status == 502),
    ),
    "a proxy that holds small pieces back": Setup(
        behind_meddling(Meddling(holds=60)),  # the first block is larger
        "heartbeats_missing",
        ("buffer",),
        sees(lambda seen: seen.blocks > 0 and seen.heartbeats == 0 and seen.ended is None),
    ),
    "a proxy that drops comments": Setup(
        behind_meddling(Meddling(drops_comments=True)),
        "heartbeats_missing",
        ("heartbeat",),
        sees(lambda seen: seen.blocks > 0 and seen.heartbeats == 0 and seen.ended is None),
    ),
    "a proxy with a limit for whole responses": Setup(
        behind_meddling(Meddling(cuts_after=0.8)),
        "ends_early",
        ("limit of the proxy for a whole response",),
        sees(lambda seen: seen.heartbeats >= 2 and seen.ended is not None, 1.5),
    ),
    "a proxy with HTTP/1.0": Setup(
        behind_meddling(Meddling(version="HTTP/1.0")),
        "http_1_0",
        ("HTTP/1.1",),
        is_http_1_0,
        level="warning",
    ),
    "Apache that compresses": Setup(
        documented("apache", ("SetEnvIf Request_URI ^/events no-gzip", "")),
        "compressed",
        ("no-gzip", "Apache"),
        is_compressed,
        level="warning",
    ),
    "Apache that removes Cache-Control": Setup(
        documented("apache", ("SSLEngine on", "SSLEngine on\n    Header unset Cache-Control")),
        "headers",
        ("Cache-Control", "Header unset"),
        has_no_cache_control,
        level="warning",
    ),
    "Apache with a short time-out": Setup(
        documented("apache", idle=IMPATIENT, heartbeat=SLOW),
        "idle_timeout",
        ("ProxyTimeout", "SSE_HEARTBEAT", f"{SLOW:g} s"),
        ends_while_idle,
    ),
    "Apache with HTTP/1.0": Setup(
        documented(
            "apache", ("SetEnvIf", "SetEnvIf Request_URI ^/events downgrade-1.0 force-response-1.0\n    SetEnvIf")
        ),
        "http_1_0",
        ("force-response-1.0",),
        is_http_1_0,
        level="warning",
    ),
    "Caddy that compresses": Setup(
        documented(
            "caddy",
            ("\tencode gzip", ENCODES),
            ("127.0.0.1:8000", "127.0.0.1:8000 {\n\t\theader_down -Content-Encoding\n\t}"),
        ),
        "compressed",
        ("Caddy", "encode", "header_down -Content-Encoding"),
        is_compressed,
    ),
    "Caddy with a short time-out": Setup(
        documented(
            "caddy",
            (
                "127.0.0.1:8000",
                f"127.0.0.1:8000 {{\n\t\ttransport http {{\n\t\t\tread_timeout {IMPATIENT}s\n\t\t}}\n\t}}",
            ),
            heartbeat=SLOW,
        ),
        "idle_timeout",
        ("read_timeout", "SSE_HEARTBEAT", f"{SLOW:g} s"),
        ends_while_idle,
    ),
    "Caddy that buffers": Setup(
        documented("caddy", ("127.0.0.1:8000", "127.0.0.1:8000 {\n\t\tbuffer_responses\n\t}")),
        "buffered",
        ("Caddy", "buffer_responses"),
        is_held,
    ),
    "HAProxy with a short time-out": Setup(
        documented("haproxy", idle=IMPATIENT, heartbeat=SLOW),
        "idle_timeout",
        ("timeout server", "SSE_HEARTBEAT", f"{SLOW:g} s"),
        ends_while_idle,
    ),
    "HAProxy that removes Cache-Control": Setup(
        documented("haproxy", ("option forwardfor", "http-response del-header Cache-Control\n    option forwardfor")),
        "headers",
        ("Cache-Control", "http-response del-header"),
        has_no_cache_control,
        level="warning",
    ),
    "two processes": Setup(two_processes, "separate_processes", ("SSE_BACKEND", "--workers 1"), has_several_histories),
    "no Redis at the start": Setup(
        without_redis, "backend", ("SSE_BACKEND", "Redis"), sees(lambda seen: b"sse_busy" in seen.body, 3)
    ),
    "Redis that went away": Setup(redis_that_went_away, "backend", ("SSE_BACKEND", "Redis"), is_degraded),
}
"""The set-ups with a fault, by a description."""


def server_of_the_table(kind: Kind) -> Start:
    """One of `SERVERS`."""

    @contextmanager
    def start(workshop: Workshop) -> Iterator[str]:
        with serving(kind, workshop.folder("server")) as server:
            yield events(server)

    return start


HEALTHY: dict[str, Start] = {
    **{name: server_of_the_table(kind) for name, kind in SERVERS.items()},
    **{f"the documented {name}": documented(name) for name in PROXIES},
    "an app with many events": busy_app,
    "two processes with Redis": two_processes_with_redis,
}
"""Set-ups without a fault: all servers that people run, and the proxies as the documentation sets them up."""
