"""Streams that a test opens: the real view and the real stream, read in the test's own thread.

Not thread-safe, except that any thread may enqueue.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from ..errors import UsageError
from ..event import BATCH_SUFFIX, DEFAULT_CHANNEL, MIXED, RESERVED_PREFIX, Text, User
from ..manager import SSEManager
from ..parser import Block, Parser
from ..runtime.locks import new_lock, run_if_free
from ..wsgi import stream
from .stage import Clock, Stage, staged

OK = "200 OK"
MEDIA_TYPE = "text/event-stream"
MAX_SHOWN_CHARACTERS = 1_000
"""The most characters that an error shows of an answer that is no stream."""


class StreamRefusedError(AssertionError):
    """The app did not answer with a stream. `status` is the number of its status, and `body` the text of its answer."""

    def __init__(self, status: int, body: str) -> None:
        shown = body.strip()[:MAX_SHOWN_CHARACTERS] or "(no body)"
        super().__init__(f"the app answered with {status} and no stream: {shown}")
        self.status = status
        self.body = body

    def __reduce__(self) -> tuple[type[StreamRefusedError], tuple[int, str], dict[str, Any]]:
        # Exceptions are pickled by calling the class with `args`, which here is the message alone.
        return StreamRefusedError, (self.status, self.body), vars(self)


class Frame(NamedTuple):
    """One block, as it came: an event, a batch, or what the stream itself says (``sse_open``, ``sse_gap`` ...)."""

    type: str
    """Such as ``order``, ``order_batch``, ``mixed_batch`` or ``sse_gap``."""
    data: Any
    """What its JSON says; or a `Text`, which may be several that were joined."""
    id: str
    """The cursor after it."""

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The events in it, each with its type and data. None for what the stream itself says."""
        if self.type.startswith(RESERVED_PREFIX):
            return []
        if not self.type.endswith(BATCH_SUFFIX):
            return [(self.type, self.data)]
        events = self.data["events"]
        if self.type == MIXED + BATCH_SUFFIX:
            return [(each["type"], Text(each["text"]) if "text" in each else each["data"]) for each in events]
        return [(self.type.removesuffix(BATCH_SUFFIX), data) for data in events]


class Answer(NamedTuple):
    """What the app answered: the status, and the body with a function that closes it."""

    status: str
    media_type: str
    body: Iterator[bytes]
    close: Callable[[], object]


class Source(Protocol):
    """Where a stream comes from."""

    def __call__(self, last_event_id: str | None) -> Answer:
        """Ask for the stream. `last_event_id` is the cursor of a client that comes back."""


class Stream:
    """A client with an open stream. It reads all that comes, at once, as a browser does; `stall` makes it slow.

    Made by `open_stream`.
    """

    def __init__(self, source: Source, stage: Stage) -> None:
        self.idle_reads = 0
        self._source = source
        self._stage = stage
        self._lock = new_lock()  # guards all below while one thread reads
        self._frames: list[Frame] = []
        self._answer: Answer | None = None
        self._parser = Parser()
        self._opening: Frame | None = None  # the first block of this connection
        self._expects_refusal = False  # whether the test has asked if this connection was refused
        self._in_state = False  # whether the blocks that come are a snapshot
        self._stalled = False
        self._error: Exception | None = None
        self._over = False

    # -- what has arrived ----------------------------------------------------------------------------------------------

    def events(self) -> list[tuple[str, Any]]:
        """Return the app's events that have arrived so far: ``(type, data)`` each, also those out of batches.

        Texts are `Text`; those of one window have arrived as one. Returns all since the beginning, or since `clear`.

        Raises `UsageError` if the stream was refused with ``sse_busy``, because then nothing can arrive; also `gaps`,
        `bye` and `channels`. A test that expects a refusal reads `busy`, `opened_with` or `is_open` before.
        """
        return [event for frame in self._frames_of_stream() for event in frame.events]

    def frames(self) -> list[Frame]:
        """Return the blocks that have arrived so far, as they came: batches, and what the stream itself says."""
        self.read()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return list(self._frames)

    def clear(self) -> None:
        """Forget what has arrived so far."""
        self.read()
        self._frames.clear()

    @property
    def clock(self) -> Clock:
        """The time of the test, which stands still until `Clock.advance`."""
        return self._stage.clock

    @property
    def opened_with(self) -> str:
        """What the connection began with: ``sse_open``, ``sse_gap`` or ``sse_busy``."""
        self._expects_refusal = True
        return self._first().type

    @property
    def channels(self) -> list[str]:
        """The channels that the stream was granted."""
        channels: list[str] = self._first().data.get("channels", [])
        self._check_not_refused()
        return channels

    @property
    def gaps(self) -> list[str]:
        """The reasons of all ``sse_gap`` that have arrived: each time, the client may have missed events."""
        return [frame.data["reason"] for frame in self._frames_of_stream() if frame.type == "sse_gap"]

    @property
    def busy(self) -> str | None:
        """Why the stream could not be opened now: the reason of its ``sse_busy``. None if it was opened."""
        return self._first().data["reason"] if self.opened_with == "sse_busy" else None

    @property
    def bye(self) -> str | None:
        """Why the server has ended the stream: the reason of its ``sse_bye``. None if it has not."""
        frames = self._frames_of_stream()
        return frames[-1].data["reason"] if frames and frames[-1].type == "sse_bye" else None

    @property
    def is_open(self) -> bool:
        """Whether the connection is there: neither side has ended it."""
        self._expects_refusal = True
        self.read()
        return self._answer is not None

    @property
    def cursor(self) -> str:
        """The id of the newest block that has arrived: where `reconnect` goes on. Empty if there is none."""
        return self._parser.last_id

    @property
    def retry(self) -> int | None:
        """After how many milliseconds the server lets the client come back."""
        return self._parser.retry

    # -- what happens to the connection --------------------------------------------------------------------------------

    def stall(self) -> None:
        """Take nothing from now on, as a client that is too slow does."""
        self.read()
        self._stalled = True

    def resume(self) -> None:
        """Take all that has come since `stall`, and go on as usual."""
        self._stalled = False
        self.read()

    def drop(self) -> None:
        """Break the connection. What has arrived stays, and `reconnect` goes on after the last complete block.

        If the client is stalled, the connection breaks in the middle of what the server sends next.
        """
        answer = self._answer
        if answer is None:
            raise UsageError("the connection is not there any more: reconnect() opens another one")
        # Only what a stalled client has not taken is on its way.
        with self._stage.reading(self):
            sent = next(answer.body, b"") if self._stalled else b""
        self._frames += map(self._frame, self._parser.blocks(sent[: len(sent) // 2]))
        self.close()

    def reconnect(self) -> None:
        """Open the stream again after the last complete block, as a browser does. Ends the connection, if it is there.

        Raises `StreamRefusedError` if the app answers with no stream this time, and `UsageError` after the end of the
        block of `open_stream`.
        """
        if self._over:
            raise UsageError("this stream is over: its open_stream() block, or the test of its fixture, has ended")
        self.close()
        self._stalled = False
        self.open(self._parser.last_id or None)

    def close(self) -> None:
        """End the connection, as a page that is closed does."""
        answer, self._answer = self._answer, None
        if self in self._stage.readers:
            self._stage.readers.remove(self)
        if answer is not None:
            answer.close()

    # -- internal ------------------------------------------------------------------------------------------------------

    def open(self, last_event_id: str | None) -> None:
        """Open the connection. For `open_stream`, which has done it, and `reconnect`."""
        self._parser = Parser(last_event_id or "")
        self._opening = None
        self._expects_refusal = False
        with self._stage.reading(self):
            answer = self._source(last_event_id)
            if answer.status[:3] != OK[:3] or answer.media_type != MEDIA_TYPE:
                try:
                    body = b"".join(answer.body).decode(errors="replace")
                finally:
                    answer.close()
                raise StreamRefusedError(int(answer.status[:3]), body)
        self._answer = answer
        self._stage.readers.append(self)
        try:
            self.frames()
        except BaseException:
            self.close()
            raise

    def end(self) -> None:
        """Close it for good: `reconnect` would read in real time, and wait forever."""
        self._over = True
        self.close()

    def read(self, wait: bool = True) -> None:
        """Take all that is there now, unless the client is stalled.

        Without `wait`, not if another thread does it at this moment.
        """
        run_if_free(self._lock, self._read_locked, -1 if wait else 0)

    def _read_locked(self) -> None:
        with self._stage.reading(self):
            while self._answer is not None and not self._stalled:
                before = self.idle_reads = 0
                try:
                    block = next(self._answer.body)
                except StopIteration:
                    self.close()
                    return
                except Exception as error:  # raised again in the test, which may not be what reads now
                    self._error = error
                    self.close()
                    return
                self._frames += map(self._frame, self._parser.blocks(block))
                if self.idle_reads > before:
                    return

    def _frame(self, block: Block) -> Frame:
        frame = Frame(block.type, self._data(block), block.id)
        if self._opening is None:
            self._opening = frame
            self._in_state = not block.has_id
        elif block.has_id:
            self._in_state = False
        return frame

    def _data(self, block: Block) -> Any:
        is_own = block.type.startswith(RESERVED_PREFIX) or block.type.endswith(BATCH_SUFFIX)
        # A snapshot ends with the id of the newest frame, which is another event.
        if not is_own and not self._in_state and self._is_text(block.id):
            return Text(block.data)
        try:
            return json.loads(block.data)
        except ValueError:  # the state of a snapshot may be text, too
            return Text(block.data)

    def _is_text(self, id: str) -> bool:
        frame, _, part = id.partition(".")
        are_texts = self._stage.are_texts.get(frame, [False])
        return are_texts[int(part) - 1 if part else -1]

    def _frames_of_stream(self) -> list[Frame]:
        """As `frames`, but of a stream that the test takes for an open one."""
        frames = self.frames()
        self._check_not_refused()
        return frames

    def _check_not_refused(self) -> None:
        first = self._opening
        if first is not None and first.type == "sse_busy" and not self._expects_refusal:
            raise UsageError(
                f"this stream was refused with sse_busy, for the reason {first.data['reason']!r}, so nothing can "
                f"arrive. If that is what the test expects, read `busy` before"
            )

    def _first(self) -> Frame:
        if self._opening is None:
            raise UsageError("the answer has no block: it is no stream of sse_batcher")
        return self._opening

    def __repr__(self) -> str:
        state = "closed" if self._answer is None else "stalled" if self._stalled else "open"
        first = self._opening
        busy = f", busy: {first.data['reason']}" if first is not None and first.type == "sse_busy" else ""
        return f"<Stream: {state}{busy}, {len(self._frames)} blocks have arrived>"


@contextmanager
def open_stream(
    source: Any,
    url: str = "/events",
    *,
    headers: Mapping[str, str] | None = None,
    last_event_id: str | None = None,
    channels: Iterable[str] | None = None,
    user: User | None = None,
    snapshot: Callable[[], Iterable[tuple[str, Any]]] | None = None,
    query: str = "",
) -> Iterator[Stream]:
    """Open a stream as a client does, and close it at the end. Never hangs, and nothing sleeps.

    `source`
        The test client of a Flask app, with its cookies; a Flask app, or another WSGI app; or an `SSEManager`.
    `url`, `headers`
        What is asked of an app.
    `channels`, `user`, `snapshot`, `query`
        For a manager: what `sse_batcher.stream` is given, and the query of the request, such as ``batch=0``.
    `last_event_id`
        The cursor of a client that comes back.

    All managers of the process are held on the time of the test, which `Stream.clock` or the fixture ``sse_clock``
    moves. Raises `StreamRefusedError` if the app does not answer with a stream, and `UsageError` for a wrong source.

    >>> with open_stream(client, "/events?channel=team-7") as stream:
    ...     sse.enqueue("order", {"id": 7}, channel="team-7")
    ...     stream.clock.advance(0.1)
    ...     assert stream.events() == [("order", {"id": 7})]
    """
    if isinstance(source, SSEManager):
        if headers is not None or url != "/events":
            raise UsageError("a manager has no URLs and headers: say channels=, user= and query=")
        names = (DEFAULT_CHANNEL,) if channels is None else channels
        ask = _of_manager(source, names, user, snapshot, query)
    elif channels is not None or user is not None or snapshot is not None or query:
        raise UsageError("the app decides which channels and user a stream has: say them in the URL, or log in")
    else:
        ask = _of_app(source, url, headers or {})
    with staged() as stage:
        opened = Stream(ask, stage)
        opened.open(last_event_id)
        try:
            yield opened
        finally:
            opened.end()


def _of_manager(
    manager: SSEManager,
    channels: Iterable[str],
    user: User | None,
    snapshot: Callable[[], Iterable[tuple[str, Any]]] | None,
    query: str,
) -> Source:
    """Return what asks a manager for a stream, as a WSGI app does."""
    channels = channels if isinstance(channels, str) else tuple(channels)

    def ask(last_event_id: str | None) -> Answer:
        environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": query, "HTTP_LAST_EVENT_ID": last_event_id or ""}
        status, headers, body = stream(manager, environ, channels, snapshot=snapshot, user=user)
        media_type = dict(headers)["Content-Type"].partition(";")[0]
        return Answer(status, media_type, iter(body), getattr(body, "close", lambda: None))

    return ask


def _of_app(source: Any, url: str, headers: Mapping[str, str]) -> Source:
    """Return what asks an app for a stream, through a test client."""
    client = _client(source)

    def ask(last_event_id: str | None) -> Answer:
        cursor = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
        response = client.get(url, headers={**headers, **cursor})
        body: Iterator[bytes] = iter(response.response)
        if response.headers.get("Content-Encoding") == "gzip":  # the test has asked for it
            body = map(zlib.decompressobj(wbits=31).decompress, body)
        return Answer(response.status, response.mimetype, body, response.close)

    return ask


def _client(source: Any) -> Any:
    """Return the test client of an app; or the client itself, if it is one."""
    from werkzeug.test import Client  # noqa: PLC0415  # only tests of apps need it

    if isinstance(source, Client):
        return source
    if hasattr(source, "test_client"):
        return source.test_client()
    if callable(source):
        return Client(source)
    raise UsageError(
        f"open_stream() takes a test client, a WSGI app or an SSEManager, not {type(source).__name__}: for an SSE, "
        f"give app.test_client() or sse.manager"
    )
