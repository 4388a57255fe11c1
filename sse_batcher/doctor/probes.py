"""Probes: gather the facts about one stream over HTTP.

The caller's thread, and one more that listens to the stream meanwhile. Harmless for the site: at most three streams at
the same time, about twenty short requests, and no event.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from urllib.parse import urljoin, urlsplit

from ..parser import Block, Comment
from ..remote.message import RemoteError
from ..remote.stream import RemoteStream
from ..remote.url import below, within_site, without_token
from ..wire import begins_compressed
from .client import ANY_CODING, Client, Target, answer_of, is_timeout
from .facts import POLLS_AT_ONCE, Answer, Check, Facts, FirstBlock
from .flow import heartbeat_limit
from .http2 import try_http2
from .listener import UNKNOWN_HEARTBEAT_SECONDS, Listener
from .together import call_together

PATIENCE_SECONDS = 5.0
"""How long an answer, or a first block, may take. The module for browsers waits as long before it polls."""
AGAIN_SECONDS = 2.0
"""The same for a second try, while other requests are answered."""
MAX_LISTEN_SECONDS = 150.0
GOES_ON_SECONDS = 0.5
"""How long a compressed stream must stay open after its first block."""
POLLS = 12
"""How many new connections look for several processes. Workers that share a socket do not take turns."""
STREAMS = 3
"""How many streams are open at the same time, at most."""
FOREIGN_CURSOR = "00000000-1-0"
"""A cursor of a history that does not exist."""
_PLAIN = {"", "identity"}
_READABLE = _PLAIN | {"gzip", "x-gzip", "deflate"}
"""The codings that `remote` can read."""

Progress = Callable[[str], None]


def examine(target: Target, progress: Progress = lambda line: None, every: float = 1.0) -> Facts:
    """Look at the stream from outside. Takes about one and a half heartbeats, or `Target.seconds`.

    `progress` gets a line for each step, and, while there is nothing to do but listen, one every so many seconds.
    Raises `RemoteError` if the URL, a header or the token is not valid.
    """
    return _Examination(target, progress, every).run()


class _Examination:
    """One examination: what it has seen is in `facts`."""

    def __init__(self, target: Target, progress: Progress, every: float) -> None:
        patience = PATIENCE_SECONDS if target.seconds is None else min(PATIENCE_SECONDS, max(0.5, target.seconds))
        self.facts = Facts(
            url=without_token(target.url), patience=patience, origin=target.origin, has_token=target.has_token
        )
        self._target = target
        self._client = Client(target, patience)
        self._progress = progress
        self._every = every
        self._rest: list[Block | Comment] = []  # what came together with the first block

    def run(self) -> Facts:
        facts = self.facts
        self._progress("opening the stream")
        with ExitStack() as stack:
            try:
                stream = self._open(stack)
            except RemoteError as error:
                if error.stage == "arguments":
                    raise
                facts.failure = str(error)
                facts.stage = "silent" if is_timeout(error) else error.stage
                return facts
            if facts.answer is not None and not facts.answer.is_stream:
                self._look_elsewhere(facts.answer, stream.head.headers.get("Location", ""))
            elif facts.first is None or facts.first.type == "sse_busy":
                self._ask_short()
            else:
                self._examine_stream(stream, facts.first)
        return facts

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self, stack: ExitStack) -> RemoteStream:
        """Open the stream; once more, if only the first request may have been slow, as with a process that starts."""
        try:
            return self._open_once(self._client, stack)
        except RemoteError as error:
            if not is_timeout(error):
                raise
            self._ask_short()
            if self.facts.poll is None and self.facts.health is None:
                raise
        return self._open_once(Client(self._target, min(AGAIN_SECONDS, self._client.patience)), stack)

    def _open_once(self, client: Client, stack: ExitStack) -> RemoteStream:
        """Open the stream as a browser does, and once more without compression if it comes compressed."""
        facts = self.facts
        stream = stack.enter_context(client.open(ANY_CODING))
        facts.answer = answer_of(stream)
        facts.clock_offset = _clock_offset(facts.answer)
        facts.coding = facts.answer.header("content-encoding").strip()
        if not facts.answer.is_stream:
            return stream
        if facts.coding not in _PLAIN:
            facts.coded_block = _comes_coded(client, stream, facts.coding)
            facts.coded_by_library = begins_compressed(stream.coded_start)
            stream.close()
            stream = stack.enter_context(client.open())
            facts.plain = answer_of(stream)
        facts.first = client.first_block(stream, self._rest)
        return stream

    def _ask_short(self) -> None:
        """Ask what is answered although there is no stream, all at the same time."""
        client, facts = self._client, self.facts
        questions: list[Callable[[], Check | None]] = [client.poll]
        questions += [partial(client.health, f"health{name}") for name in ("", "/ready", "/live")]
        facts.poll, facts.health, facts.ready, facts.live = call_together(questions, len(questions))

    def _look_elsewhere(self, answer: Answer, location: str) -> None:
        """Follow a redirect within the site, or look for the path of the stream."""
        client, target, facts = self._client, self._target, self.facts
        if 300 <= answer.status < 400:
            place = within_site(target.url, location)
            if place is not None:
                with suppress(RemoteError), client.open(url=place) as stream:
                    facts.leads_to = answer_of(stream)
        elif answer.status in {200, 404, 405}:
            root = urljoin(target.url, "/")
            likely = [urljoin(target.url, "events"), urljoin(root, "events"), below(target.url, "events"), root]
            for url in dict.fromkeys(likely):
                check = client.health_at(below(url, "health/live"))
                if check is not None and check.word in {"ok", "thread"}:
                    facts.found_at = urlsplit(url).path or "/"
                    break

    # -- with an open stream -------------------------------------------------------------------------------------------

    def _examine_stream(self, stream: RemoteStream, first: FirstBlock) -> None:
        facts, progress = self.facts, self._progress
        facts.histories += _history(first)
        seconds = self._target.seconds
        if seconds is None:
            heartbeat = UNKNOWN_HEARTBEAT_SECONDS if facts.heartbeat is None else facts.heartbeat
            seconds = min(MAX_LISTEN_SECONDS, heartbeat_limit(heartbeat) + 0.25 * heartbeat + 0.5)
        listener = Listener(stream, facts.heartbeat, seconds, self._rest)
        listener.start()
        try:
            progress("asking beside the open stream")
            self._examine_beside()
            if facts.answers_beside:
                self._examine_others()
            while not listener.wait(self._every):
                progress(f"listening for heartbeats, {listener.left():.0f} s more")
        finally:
            listener.stop()
        facts.listened = listener.result()
        if first.cursor and facts.answers_beside:
            progress("coming back")
            facts.resumed = self._client.first_of(cursor=first.cursor)
            if facts.resumed is not None and facts.resumed.reason == "epoch":
                # That was a new process, or one of several.
                facts.histories_after = [*_history(facts.resumed), *self._histories()]

    def _examine_beside(self) -> None:
        """Find out what else the server answers while streams are open."""
        client, facts = self._client, self.facts
        facts.streams_beside = 1
        facts.health = client.health("health")
        facts.answers_beside = facts.health is not None
        if not facts.answers_beside:
            return
        facts.live = client.health("health/live")
        with ExitStack() as stack:
            while facts.streams_beside < STREAMS:
                try:
                    stream = stack.enter_context(client.open())
                except RemoteError as error:
                    if is_timeout(error):
                        facts.answers_beside = False
                        return
                    break
                first = client.first_block(stream) if stream.is_stream else None
                if first is not None and first.type == "sse_busy":
                    facts.busy_beside = first.reason
                    break
                facts.histories += _history(first)
                facts.streams_beside += 1
            facts.ready = client.health("health/ready")
            facts.answers_beside = facts.ready is not None

    def _examine_others(self) -> None:
        """Look for several processes, for cursors that do not arrive, and at what a page of another origin may do."""
        client, target, facts = self._client, self._target, self.facts
        facts.histories += self._histories()
        by_header = client.first_of(query={"poll": "1"}, cursor=FOREIGN_CURSOR)
        by_query = client.first_of(query={"poll": "1", "last_event_id": FOREIGN_CURSOR})
        facts.by_header = by_header.type if by_header else ""
        facts.by_query = by_query.type if by_query else ""
        if target.origin is not None:
            asked = [("Access-Control-Request-Method", "GET"), ("Access-Control-Request-Headers", "authorization")]
            browser = Client(target._replace(headers=(), token=None), client.patience)
            with suppress(RemoteError), browser.open(*asked, method="OPTIONS") as response:
                facts.preflight = answer_of(response)
        short = client.request(url=below(target.url, "health/live"))
        facts.http2 = try_http2(client.request(), short, client.patience, client.new_context())

    def _histories(self) -> list[str]:
        """Make some new connections, which several processes would share. Returns what each of them met."""
        poll = partial(self._client.first_of, query={"poll": "1"})
        firsts = call_together([poll] * POLLS, POLLS_AT_ONCE)
        return [history for first in firsts for history in _history(first)]


def _history(first: FirstBlock | None) -> list[str]:
    """Return the history that a stream is in, if its first block names one."""
    return [first.cursor.partition("-")[0]] if first is not None and first.cursor else []


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
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):  # it may be any text
        return None
