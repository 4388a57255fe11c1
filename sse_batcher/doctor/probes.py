"""Probes: gather the facts about one stream over HTTP.

The caller's thread, and one more that listens to the stream meanwhile. Harmless for the site: at most three streams at
the same time, about twenty short requests, and no event.
"""

from __future__ import annotations

import email.utils
import itertools
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from urllib.parse import urljoin, urlsplit

from ..parser import Block, Comment
from ..remote.message import RemoteError
from ..remote.stream import RemoteStream
from .client import ANY_CODING, Client, Target, answer_of, below, json_object
from .diagnoses import heartbeat_limit
from .facts import Answer, Facts, FirstBlock, Listening
from .http2 import try_http2

PATIENCE_SECONDS = 5.0
"""How long an answer, or a first block, may take. The module for browsers waits as long before it polls."""
MAX_LISTEN_SECONDS = 150.0
GOES_ON_SECONDS = 0.5
UNKNOWN_HEARTBEAT_SECONDS = 15.0
POLLS = 12
"""How many new connections look for several processes. Workers that share a socket do not take turns."""
POLLS_AT_ONCE = 4
STREAMS = 3
"""How many streams are open at the same time, at most."""
FOREIGN_CURSOR = "00000000-1-0"
"""A cursor of a history that does not exist."""
_PLAIN = {"", "identity"}
_READABLE = _PLAIN | {"gzip", "x-gzip", "deflate"}
"""The codings that `remote` can read."""

Progress = Callable[[str], None]


def examine(target: Target, progress: Progress = lambda line: None) -> Facts:
    """Look at the stream from outside. Takes about one and a half heartbeats, or `Target.seconds`.

    Raises `RemoteError` if the URL, a header or the token is not valid.
    """
    patience = PATIENCE_SECONDS if target.seconds is None else min(PATIENCE_SECONDS, max(0.5, target.seconds))
    client = Client(target, patience)
    facts = Facts(url=without_token(target.url), patience=patience, origin=target.origin, has_token=bool(target.token))
    progress("opening the stream")
    rest: list[Block | Comment] = []
    with ExitStack() as stack:
        stream = _open(client, facts, rest)
        if stream is None:
            if facts.stage == "silent":
                _ask_short(client, facts)
            return facts
        stack.enter_context(stream)
        if facts.answer is not None and not facts.answer.is_stream:
            _look_elsewhere(client, target, facts)
        elif facts.first is None or facts.first.type == "sse_busy":
            _ask_short(client, facts)
        else:
            _examine_stream(client, target, facts, stream, rest, progress)
    return facts


def without_token(url: str) -> str:
    """Return a URL that can be printed."""
    return re.sub(r"([?&]token=)[^&#]*", r"\1...", url)


# -- opening -----------------------------------------------------------------------------------------------------------


def _open(client: Client, facts: Facts, rest: list[Block | Comment]) -> RemoteStream | None:
    """Open the stream as a browser does, and once more without compression if it comes compressed.

    `rest` gets what comes together with the first block.
    """
    try:
        stream = client.open(ANY_CODING)
        facts.answer = answer_of(stream)
        facts.clock_offset = _clock_offset(facts.answer)
        facts.coding = facts.answer.header("content-encoding").strip()
        if not facts.answer.is_stream:
            return stream
        if facts.coding not in _PLAIN:
            facts.coded_block = _comes_coded(client, stream, facts.coding)
            stream.close()
            stream = client.open()
            facts.plain = answer_of(stream)
        facts.first = client.first_block(stream, rest)
        return stream
    except RemoteError as error:
        if error.stage == "arguments":
            raise
        facts.failure = str(error)
        is_silent = error.stage == "answer" and isinstance(error.__cause__, TimeoutError)
        facts.stage = "silent" if is_silent else error.stage
        return None


def _comes_coded(client: Client, stream: RemoteStream, coding: str) -> bool | None:
    """Return whether a compressed first block comes, and the stream goes on. None: it cannot be read."""
    if coding not in _READABLE:
        with suppress(RemoteError), client.open(("Accept-Encoding", "gzip, deflate")) as other:
            second = answer_of(other).header("content-encoding").strip()
            if second in _READABLE - _PLAIN:
                return _comes_coded(client, other, second)
        return None if stream.read(client.patience) is not None and _goes_on(stream) else False
    return client.first_block(stream) is not None and _goes_on(stream)


def _goes_on(stream: RemoteStream) -> bool:
    """Return whether a stream is still open a moment later. The app ends one that a compressor holds back."""
    deadline = time.monotonic() + GOES_ON_SECONDS
    while stream.end is None and time.monotonic() < deadline:
        stream.read(deadline - time.monotonic())
    return stream.end is None


def _clock_offset(answer: Answer) -> float | None:
    """Return how far the clock of the server is ahead."""
    now = time.time()
    try:
        # The header names the second in which the answer was made.
        return email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp() + 0.5 - now
    except (KeyError, TypeError, ValueError):
        return None


def _ask_short(client: Client, facts: Facts) -> None:
    """Ask what is answered although there is no stream, all at the same time."""
    with ThreadPoolExecutor(4) as pool:
        poll = pool.submit(client.poll)
        health, ready, live = (pool.submit(client.health, f"/health{name}") for name in ("", "/ready", "/live"))
        facts.poll, facts.health, facts.ready, facts.live = (
            poll.result(),
            health.result(),
            ready.result(),
            live.result(),
        )


def _look_elsewhere(client: Client, target: Target, facts: Facts) -> None:
    """Follow a redirect to the same host, or look for the path of the stream."""
    answer = facts.answer
    assert answer is not None
    if 300 <= answer.status < 400:
        place = urljoin(target.url, answer.headers.get("location", ""))
        if urlsplit(place).hostname == urlsplit(target.url).hostname:  # no other host gets the token
            with suppress(RemoteError), client.open(url=place) as stream:
                facts.leads_to = answer_of(stream)
    elif answer.status in {200, 404, 405}:
        root = urljoin(target.url, "/")
        for url in dict.fromkeys(
            [urljoin(target.url, "events"), urljoin(root, "events"), below(target.url, "/events"), root]
        ):
            check = client.health_at(below(url, "/health/live"))
            if check is not None and check.word in {"ok", "thread"}:
                facts.found_at = urlsplit(url).path or "/"
                break


# -- with an open stream -----------------------------------------------------------------------------------------------


def _examine_stream(
    client: Client,
    target: Target,
    facts: Facts,
    stream: RemoteStream,
    rest: list[Block | Comment],
    progress: Progress,
) -> None:
    first = facts.first
    assert first is not None
    _note_history(facts, first)
    seconds = target.seconds
    if seconds is None:
        heartbeat = UNKNOWN_HEARTBEAT_SECONDS if facts.heartbeat is None else facts.heartbeat
        seconds = min(MAX_LISTEN_SECONDS, heartbeat_limit(heartbeat) + 0.25 * heartbeat + 0.5)
    listener = Listener(stream, facts.heartbeat, seconds, rest)
    listener.start()
    try:
        progress("asking beside the open stream")
        _examine_beside(client, facts)
        if facts.answers_beside is not False:
            _examine_others(client, target, facts)
        while not listener.wait(1.0):
            progress(f"listening for heartbeats, {listener.left():.0f} s more")
    finally:
        listener.stop()
    facts.listened = listener.result()
    stream.close()
    if first.cursor and facts.answers_beside is not False:
        progress("coming back")
        facts.resumed = client.first_of(cursor=first.cursor)
        if facts.resumed is not None and facts.resumed.reason == "epoch":
            _note_history(facts, facts.resumed)
            _meet_processes(client, facts)  # whether that was a new process, or one of several


def _examine_beside(client: Client, facts: Facts) -> None:
    """Find out what else the server answers while streams are open."""
    facts.streams_beside = 1
    facts.health = client.health("/health")
    facts.answers_beside = facts.health is not None
    if not facts.answers_beside:
        return
    facts.live = client.health("/health/live")
    with ExitStack() as stack:
        while facts.streams_beside < STREAMS:
            try:
                stream = stack.enter_context(client.open())
            except RemoteError:
                facts.answers_beside = False
                return
            first = client.first_block(stream) if stream.is_stream else None
            if first is not None and first.type == "sse_busy":
                facts.busy_beside = first.reason
                break
            _note_history(facts, first)
            facts.streams_beside += 1
        facts.ready = client.health("/health/ready")
        facts.answers_beside = facts.ready is not None


def _examine_others(client: Client, target: Target, facts: Facts) -> None:
    """Look for several processes, for cursors that do not arrive, and at what a page of another origin may do."""
    _meet_processes(client, facts)
    by_header = client.first_of(query={"poll": "1"}, cursor=FOREIGN_CURSOR)
    by_query = client.first_of(query={"poll": "1", "last_event_id": FOREIGN_CURSOR})
    facts.by_header = by_header.type if by_header else ""
    facts.by_query = by_query.type if by_query else ""
    if target.origin is not None:
        asked = [("Access-Control-Request-Method", "GET"), ("Access-Control-Request-Headers", "authorization")]
        with (
            suppress(RemoteError),
            Client(target._replace(headers=(), token=None), client.patience).open(*asked, method="OPTIONS") as response,
        ):
            facts.preflight = answer_of(response)
    bearer = [("Authorization", f"Bearer {target.token}")] if target.token else []
    short = urlsplit(below(target.url, "/health/live")).path
    facts.http2 = try_http2(target.url, short, [*target.headers, *bearer], client.patience, client.context)


def _meet_processes(client: Client, facts: Facts) -> None:
    """Make some new connections, which several processes would share."""
    with ThreadPoolExecutor(POLLS_AT_ONCE) as pool:
        firsts = list(pool.map(lambda _: client.first_of(query={"poll": "1"}), range(POLLS)))
    for first in firsts:
        _note_history(facts, first)


def _note_history(facts: Facts, first: FirstBlock | None) -> None:
    if first is not None and first.cursor:
        facts.histories.append(first.cursor.partition("-")[0])


class Listener:
    """Reads a stream on a thread of its own, for some seconds.

    `heartbeat`: the time between two, if that is known. `rest`: what came together with the first block.
    """

    def __init__(
        self, stream: RemoteStream, heartbeat: float | None, seconds: float, rest: list[Block | Comment]
    ) -> None:
        self._stream = stream
        self._near = 0.2 * (heartbeat or UNKNOWN_HEARTBEAT_SECONDS)
        self._began = time.monotonic()
        self._deadline = self._began + seconds
        self._stopping = False
        self._heartbeats: list[float] = []
        self._arrivals = [self._began]
        self._events = 0
        self._bye = ""
        self._is_invalid = False
        self._ended = 0.0
        self._take(self._began, rest)
        self._thread = threading.Thread(target=self._run, name="sse_batcher doctor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait for the end. Returns whether it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def left(self) -> float:
        """For how many seconds it listens from now on, at most."""
        return max(0.0, self._deadline - time.monotonic())

    def stop(self) -> None:
        """End it now."""
        self._stopping = True
        self._thread.join()

    def result(self) -> Listening:
        """Return what has come. After the end."""
        times = [*self._arrivals, self._ended]
        silences = [after - before for before, after in itertools.pairwise(times)]
        together = [
            sum(0 <= other - one < self._near for other in self._heartbeats[index:])
            for index, one in enumerate(self._heartbeats)
        ]
        return Listening(
            seconds=self._ended - self._began,
            heartbeats=len(self._heartbeats),
            together=max(together, default=0),
            events=self._events,
            silence=max(silences),
            end="invalid" if self._is_invalid else self._stream.end,
            silence_at_end=silences[-1],
            bye=self._bye,
        )

    def _run(self) -> None:
        try:
            while not self._stopping and time.monotonic() < self._deadline and self._stream.end is None:
                self._read()
        except RemoteError:
            self._is_invalid = True
        self._ended = time.monotonic()

    def _read(self) -> None:
        piece = self._stream.read(min(0.2, max(0.001, self._deadline - time.monotonic())))
        if piece is None:
            return
        if piece.body:  # not the last, empty chunk, with which some proxies end a response that they cut
            self._arrivals.append(piece.at)
        self._take(piece.at, piece.items)

    def _take(self, at: float, items: list[Block | Comment]) -> None:
        for item in items:
            if isinstance(item, Comment):
                self._heartbeats.append(at)
            elif item.type == "sse_bye":
                self._bye = FirstBlock(type=item.type, data=json_object(item.data)).reason
            elif not item.type.startswith("sse_"):
                self._events += 1
