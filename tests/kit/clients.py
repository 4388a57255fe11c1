"""The clients that people use, each as one iterator of what it reports: from Python, from Node, and a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypedDict
from urllib.parse import urljoin

import httpx
import httpx_sse
import ld_eventsource
import ld_eventsource.actions
import ld_eventsource.config
import ld_eventsource.errors
import requests
import requests_sse
import sseclient
from playwright.sync_api import Browser, Page

from sse_batcher.wire import HEADERS

from .services import npm_install, program
from .sse_parser import ServerEvent
from .waiting import TIMEOUT

JAVASCRIPT = Path(__file__).parent / "javascript"


class Memory:
    """What stands in for a server: the bytes of one stream after the other, as they reach a client's parser."""

    def __init__(self, *streams: Iterable[bytes]) -> None:
        self._streams = iter(streams)
        self.last_event_ids: list[str | None] = []

    def connect(self, last_event_id: str | None) -> Iterator[bytes] | None:
        """The next stream, None at the end."""
        self.last_event_ids.append(last_event_id)
        stream = next(self._streams, None)
        return None if stream is None else iter(stream)


class Client(NamedTuple):
    """A client in Python. Its iterators end with the stream, or, if it `reconnects`, where the answer is 204."""

    name: str
    parse: Callable[[Memory], Iterator[ServerEvent]]
    connect: Callable[..., AbstractContextManager[Iterator[ServerEvent]]]
    """Called with a URL, and an id to return with."""
    reconnects: bool = False


# -- httpx-sse ---------------------------------------------------------------------------------------------------------


def _of_httpx_sse(source: httpx_sse.EventSource) -> Iterator[ServerEvent]:
    with suppress(httpx.RemoteProtocolError):  # cut off
        for event in source.iter_sse():
            yield ServerEvent(event.event, event.data, event.id)


def _parse_httpx_sse(memory: Memory) -> Iterator[ServerEvent]:
    return _of_httpx_sse(httpx_sse.EventSource(httpx.Response(200, headers=HEADERS, content=memory.connect(None))))


@contextmanager
def _connect_httpx_sse(url: str, last_event_id: str = "") -> Iterator[Iterator[ServerEvent]]:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    with (
        httpx.Client(timeout=TIMEOUT, trust_env=False) as client,
        httpx_sse.connect_sse(client, "GET", url, headers=headers) as source,
    ):
        yield _of_httpx_sse(source)


# -- sseclient-py, over requests ---------------------------------------------------------------------------------------


def _of_sseclient(source: Iterator[bytes]) -> Iterator[ServerEvent]:
    with suppress(requests.exceptions.ChunkedEncodingError):  # cut off
        for event in sseclient.SSEClient(source).events():
            yield ServerEvent(event.event, event.data, event.id or "")


def _parse_sseclient(memory: Memory) -> Iterator[ServerEvent]:
    return _of_sseclient(memory.connect(None) or iter(()))


@contextmanager
def _session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@contextmanager
def _connect_sseclient(url: str, last_event_id: str = "") -> Iterator[Iterator[ServerEvent]]:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    with _session() as session, session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        yield _of_sseclient(iter(response))


# -- requests-sse ------------------------------------------------------------------------------------------------------


class _MemoryAdapter(requests.adapters.BaseAdapter):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        stream = self._memory.connect(request.headers.get("Last-Event-ID"))
        response = requests.Response()
        response.request, response.url = request, str(request.url)
        response.status_code = 204 if stream is None else 200
        response.headers.update(HEADERS)
        response.raw = SimpleNamespace(stream=lambda *args, **kwargs: stream, close=lambda: None)
        return response

    def close(self) -> None:
        pass


@contextmanager
def _requests_sse(url: str, session: requests.Session, last_event_id: str = "") -> Iterator[Iterator[ServerEvent]]:
    with requests_sse.EventSource(
        url,
        session=session,
        timeout=TIMEOUT,
        reconnection_time=timedelta(0),
        latest_event_id=last_event_id,
    ) as source:
        yield _of_requests_sse(source)


def _of_requests_sse(source: requests_sse.EventSource) -> Iterator[ServerEvent]:
    with suppress(requests_sse.InvalidStatusCodeError):
        for event in source:
            yield ServerEvent(event.type or "", event.data or "", event.last_event_id)


def _parse_requests_sse(memory: Memory) -> Iterator[ServerEvent]:
    with _session() as session:
        session.mount("http://memory", _MemoryAdapter(memory))
        with _requests_sse("http://memory", session) as events:
            yield from events


@contextmanager
def _connect_requests_sse(url: str, last_event_id: str = "") -> Iterator[Iterator[ServerEvent]]:
    with _session() as session, _requests_sse(url, session, last_event_id) as events:
        yield events


# -- launchdarkly-eventsource ------------------------------------------------------------------------------------------


class _MemoryStrategy(ld_eventsource.config.ConnectStrategy):
    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def create_client(self, logger: object) -> ld_eventsource.config.ConnectionClient:
        client = ld_eventsource.config.ConnectionClient()
        client.connect = self._connect
        return client

    def _connect(self, last_event_id: str | None) -> ld_eventsource.config.ConnectionResult:
        stream = self._memory.connect(last_event_id)
        if stream is None:
            raise ld_eventsource.errors.HTTPStatusError(204)
        return ld_eventsource.config.ConnectionResult(stream, None)


@contextmanager
def _ld_eventsource(connect: ld_eventsource.config.ConnectStrategy, last: str = "") -> Iterator[Iterator[ServerEvent]]:
    def apply(error: Exception | None) -> tuple[bool, None]:
        return isinstance(error, ld_eventsource.errors.HTTPStatusError), None

    with ld_eventsource.SSEClient(
        connect,
        initial_retry_delay=0,
        error_strategy=ld_eventsource.config.ErrorStrategy.from_lambda(apply),
        last_event_id=last or None,
    ) as client:
        yield _of_ld_eventsource(client)


def _of_ld_eventsource(client: ld_eventsource.SSEClient) -> Iterator[ServerEvent]:
    with suppress(ld_eventsource.errors.HTTPStatusError):
        for event in client.events:
            yield ServerEvent(event.event, event.data, event.last_event_id or "")


def _parse_ld_eventsource(memory: Memory) -> Iterator[ServerEvent]:
    with _ld_eventsource(_MemoryStrategy(memory)) as events:
        yield from events


@contextmanager
def _connect_ld_eventsource(url: str, last_event_id: str = "") -> Iterator[Iterator[ServerEvent]]:
    http = ld_eventsource.config.ConnectStrategy.http(url, urllib3_request_options={"timeout": TIMEOUT})
    with _ld_eventsource(http, last_event_id) as events:
        yield events


PYTHON_CLIENTS = {
    client.name: client
    for client in (
        Client("httpx-sse", _parse_httpx_sse, _connect_httpx_sse),
        Client("sseclient-py", _parse_sseclient, _connect_sseclient),
        Client("requests-sse", _parse_requests_sse, _connect_requests_sse, reconnects=True),
        Client("ld_eventsource", _parse_ld_eventsource, _connect_ld_eventsource, reconnects=True),
    )
}


# -- JavaScript --------------------------------------------------------------------------------------------------------


class Job(TypedDict):
    """What `collect` of ``collect.mjs`` takes: read these URLs, each until an event of the type `last`."""

    urls: Sequence[str]
    types: Sequence[str]
    last: str
    atOnce: int


Collected = dict[str, list[ServerEvent]]
"""What was received, by URL."""


class Collecting(Protocol):
    """A run, which grows until it is done."""

    def is_done(self) -> bool: ...

    def read(self) -> dict[str, Collected]:
        """What there is up to now, by client."""


class JavaScript(Protocol):
    """Where clients in JavaScript run: several at a time, each with its job."""

    names: Sequence[str]
    at_once: int

    def collecting(self, jobs: Mapping[str, Job]) -> AbstractContextManager[Collecting]: ...


class Node:
    """Node's own client, and the packages of ``javascript/package.json``, which are installed in this folder."""

    names: Sequence[str] = ("eventsource2", "eventsource3", "eventsource4", "eventsource5", "node")
    at_once = 1  # of each, and all of them at the same time

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._node = program("node", package="Debian: nodejs")
        for path in JAVASCRIPT.iterdir():
            shutil.copy(path, folder)
        npm_install(folder)

    @contextmanager
    def collecting(self, jobs: Mapping[str, Job]) -> Iterator[Collecting]:
        output = self._folder / "output"
        with output.open("wb") as stdout:
            process = subprocess.Popen(
                [self._node, "--experimental-eventsource", "--no-warnings", "client.mjs"],
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=stdout,
            )
        try:
            assert process.stdin
            with process.stdin:
                process.stdin.write(json.dumps(jobs).encode())
            yield _NodeCollecting(process, output)
        finally:
            process.kill()
            process.wait()


class _NodeCollecting:
    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process = process
        self._output = output

    def is_done(self) -> bool:
        assert not self._process.poll(), f"node ends with {self._process.returncode}"
        return self._process.returncode is not None

    def read(self) -> dict[str, Collected]:
        found: dict[str, Collected] = {}
        for line in self._output.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                name, url, event = json.loads(line)
                found.setdefault(name, {}).setdefault(url, []).append(ServerEvent(*event))
        return found


class Chromium:
    """A browser's client. All URLs of a job have the same origin, whose ``/`` or ``/stats`` is no stream."""

    names: Sequence[str] = ("chromium",)
    at_once = 6  # it has no more connections to one origin

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    @contextmanager
    def collecting(self, jobs: Mapping[str, Job]) -> Iterator[Collecting]:
        job = jobs["chromium"]
        page = self._browser.new_page()
        try:
            page.goto(urljoin(job["urls"][0], "/stats"), wait_until="load")
            collect = (JAVASCRIPT / "collect.mjs").read_text().replace("export ", "")
            page.evaluate(
                f"""(job) => {{
                    {collect}
                    window.received = [];
                    const report = (...values) => received.push(values);
                    collect(EventSource, job, report).then(() => {{ window.done = true; }});
                }}""",
                job,
            )
            yield _ChromiumCollecting(page)
        finally:
            page.close()


class _ChromiumCollecting:
    def __init__(self, page: Page) -> None:
        self._page = page

    def is_done(self) -> bool:
        return bool(self._page.evaluate("window.done"))

    def read(self) -> dict[str, Collected]:
        found: Collected = {}
        for url, event in json.loads(self._page.evaluate("JSON.stringify(received)")):  # in one piece: much faster
            found.setdefault(url, []).append(ServerEvent(*event))
        return {"chromium": found}
