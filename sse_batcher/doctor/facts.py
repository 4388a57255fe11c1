"""Facts: what the probes have seen of a stream from outside.

Pure. Times are in seconds. None means that it was not looked at, or that there was no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

POLLS_AT_ONCE = 4
"""How many connections look for several processes at the same time."""
MAX_HEARTBEAT_SECONDS = 3_600.0
"""The largest `SSE_HEARTBEAT`. What the stream says is a number of any size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The head of one response."""

    status: int
    version: str = "HTTP/1.1"
    headers: Mapping[str, str] = field(default_factory=dict)
    """By their names in lower case. Several of one name are joined by a comma."""
    after: float = 0.0
    """From the request to the complete head."""

    @property
    def is_stream(self) -> bool:
        """Whether a browser takes it for an event stream."""
        return self.status == 200 and self.header("content-type").partition(";")[0].strip() == "text/event-stream"

    def header(self, name: str) -> str:
        """Return a header in lower case, "" if there is none."""
        return self.headers.get(name, "").lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstBlock:
    """The first block of a stream."""

    type: str
    data: Mapping[str, Any] = field(default_factory=dict)
    cursor: str = ""
    after: float = 0.0
    """From the head of the response to the block."""

    @property
    def reason(self) -> str:
        """Why it is not ``sse_open``, "" if that is not said."""
        return str(self.data.get("reason", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A short request: a poll, or a question about the health."""

    status: int
    word: str = ""
    """The `status` of a health check, or the type of a poll's first block with its reason, as ``sse_busy backend``."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Those that say what has answered."""
    after: float = 0.0
    """From the request to the end of the body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """What came on one stream after its first block."""

    seconds: float
    """How long it was listened to, or until it ended."""
    heartbeats: int = 0
    together: int = 0
    """The largest number of heartbeats that came at the same moment."""
    events: int = 0
    """Blocks of the app."""
    silence: float = 0.0
    """The longest time without a byte, that before the end included."""
    end: Literal["complete", "closed", "reset", "invalid"] | None = None
    """How the response has ended: see `remote.stream.End`. ``invalid``: by something that is not HTTP."""
    silence_at_end: float = 0.0
    """For how long nothing had come when it ended."""
    bye: str = ""
    """The reason of its ``sse_bye``."""


@dataclass(slots=True, kw_only=True)
class Facts:
    """All that was seen. Filled by `probes.examine`."""

    url: str
    """Without a token."""
    patience: float = 5.0
    """How long an answer, or a first block, was waited for."""
    origin: str | None = None
    """The origin of a page that is to read the stream."""
    has_token: bool = False

    # -- the stream
    failure: str | None = None
    """Why there is no answer, as a sentence."""
    stage: str | None = None
    """What was being done then: see `remote.message.Stage`. ``silent``: the server answered nothing in time."""
    answer: Answer | None = None
    first: FirstBlock | None = None
    leads_to: Answer | None = None
    """For a redirect within the site, what is there."""
    found_at: str | None = None
    """For a path without a stream, the path of one that was found."""
    coding: str = ""
    """The ``Content-Encoding`` of the answer to a client that takes any, as browsers do."""
    coded_block: bool | None = None
    """Whether the first block came in that coding. None: it cannot be read here."""
    coded_by_library: bool = False
    """Whether this library has compressed it: the app has set `SSE_COMPRESS`."""
    plain: Answer | None = None
    """The answer to a client that takes no coding, if that is another request than the one of `answer`."""
    listened: Listening | None = None

    # -- beside the stream
    poll: Check | None = None
    health: Check | None = None
    ready: Check | None = None
    live: Check | None = None
    streams_beside: int = 0
    """How many streams were open at the same time."""
    answers_beside: bool | None = None
    """Whether a short request was answered beside them."""
    busy_beside: str = ""
    """The reason of the ``sse_busy`` that one of them got."""
    histories: list[str] = field(default_factory=list)
    """The first part of the cursor (the epoch) of each new connection beside the stream, in their order.

    Up to `POLLS_AT_ONCE` of them were made at the same time, so one may have been answered before the one before it.
    """
    histories_after: list[str] = field(default_factory=list)
    """The same for connections after it, if the first of them met another history."""
    by_header: str = ""
    """The first block for a foreign cursor in the header ``Last-Event-ID``."""
    by_query: str = ""
    """The same for the query, ``last_event_id=``."""
    resumed: FirstBlock | None = None
    """The first block for a client that comes back with the cursor of `first`, after the listening."""
    preflight: Answer | None = None
    http2: Literal["busy", "blocked", "works"] | None = None
    """What became of a stream over HTTP/2, and of a short request on its connection. None: there is no HTTP/2."""
    clock_offset: float | None = None
    """How far the clock of the server's host is ahead of ours."""

    @property
    def marks(self) -> Mapping[str, str]:
        """The headers that say what has answered: of the stream, or else of a short request."""
        checks = [check for check in (self.poll, self.health) if check is not None]
        return self.answer.headers if self.answer is not None else checks[0].headers if checks else {}

    @property
    def heartbeat(self) -> float | None:
        """The time between two heartbeats, as the stream says."""
        value = None if self.first is None else self.first.data.get("heartbeat")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            return None
        return float(min(value, MAX_HEARTBEAT_SECONDS))

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary, which `json.dumps` accepts."""
        return asdict(self)
