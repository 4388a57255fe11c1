"""Diagnoses: from the facts that were seen from outside to findings.

Pure. Each function knows one fault, or a few that look alike. It returns None if the facts do not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .facts import Answer, Facts
from .findings import Finding, fault, warning
from .refusals import diagnose_refusal
from .software import UNKNOWN
from .words import (
    LEAVE_OUT_OF_COMPRESSION,
    MORE_THREADS,
    between,
    duration,
    page,
    proxy_of,
    redis_away,
    server_of,
    setting,
    status_text,
)

LATE_SECONDS = 2.0
"""A first block later than this after its head is held back by something."""
USUAL_IDLE_SECONDS = 55
"""The shortest idle time-out of the proxies that people use is about this. Heartbeats must come more often."""
CLOCK_SECONDS = 10
"""How far two clocks may be apart: a signed token that seems to be made later than this is refused."""

Diagnose = Callable[[Facts], Finding | None]


def diagnose(facts: Facts) -> list[Finding]:
    """Return what is wrong, faults first. A fault that explains others stands for them."""
    refusal = diagnose_refusal(facts) or _one_of(facts, [_silent])
    found = [*refusal, *_each(facts, [_clock])] if refusal else [*_each(facts, _ALWAYS), *_first_of(facts)]
    return sorted(found, key=lambda finding: finding.level != "fault")


def heartbeat_limit(heartbeat: float) -> float:
    """Return after how many seconds of silence a heartbeat is missing."""
    return 1.25 * heartbeat + 1.5


def _one_of(facts: Facts, functions: Iterable[Diagnose]) -> list[Finding]:
    """Return the first finding of these functions."""
    return [finding for finding in (function(facts) for function in functions) if finding is not None][:1]


def _each(facts: Facts, functions: Iterable[Diagnose]) -> Iterator[Finding]:
    for function in functions:
        finding = function(facts)
        if finding is not None:
            yield finding


def _first_of(facts: Facts) -> Iterator[Finding]:
    """For each group of faults that follow from each other, yield the first one that is found."""
    for group in _GROUPS:
        yield from _one_of(facts, group)


# -- the stream --------------------------------------------------------------------------------------------------------


def _silent(facts: Facts) -> Finding | None:
    """No answer, or no first block, in time."""
    is_silent = facts.stage == "silent" or (facts.answer is not None and facts.answer.is_stream and facts.first is None)
    if not is_silent:
        return None
    others = [check for check in (facts.poll, facts.health, facts.live) if check is not None]
    if not others:
        return fault(
            "threads",
            f"The server accepts connections, and answers nothing within {facts.patience:g} s: no stream, no poll and "
            "no health check. Most likely, open streams hold all of its threads, one each, and the site hangs.",
            'Set `SSE_TRANSPORT = "auto"`, with which a stream leaves its thread, or give the server more threads '
            "than there are open tabs (gunicorn: `--worker-class gthread --threads 200`). "
            + page("Choose and set up a server"),
        )
    head = "no byte of it" if facts.answer is None else "its headers, and no block,"
    works = "A poll, which ends at once, is answered" if facts.poll else "The health check is answered"
    app = (
        ""
        if proxy_of(facts)
        else " If there is no proxy, a middleware of the app reads the whole response: let it leave out "
        "`text/event-stream`."
    )
    return fault(
        "buffered",
        f"The stream is held back: {head} came within {facts.patience:g} s. {works}, so {between(facts)} waits for "
        "the end of the response, which a stream does not have. Browsers get no event.",
        f"{setting(facts, 'buffering')}.{app} {page('Behind a proxy')}",
    )


def _late(facts: Facts) -> Finding | None:
    """The first block, or heartbeats, that come late and together."""
    first, listened = facts.first, facts.listened
    if first is not None and first.after > LATE_SECONDS:
        seen = f"The first block came {first.after:.1f} s after the headers. The app sends both at once"
    elif listened is not None and _is_missing(facts) and listened.together > 1:
        seen = f"{listened.together} heartbeats came together, after {listened.silence:.1f} s without a byte"
    else:
        return None
    return fault(
        "buffered",
        f"{seen}, so {between(facts)} collects what comes, and passes it on late. Events come late, too.",
        f"{setting(facts, 'buffering')}. {page('Behind a proxy')}",
    )


def _read_whole(facts: Facts) -> Finding | None:
    listened = facts.listened
    if listened is None or listened.bye != "buffered":
        return None
    return fault(
        "read_whole",
        "The app has ended the stream with `sse_bye`, `buffered`: between the app and its server, a WSGI middleware or "
        "a function of the app reads the whole response before it passes anything on. Browsers get events only in "
        "bursts, each with a new request.",
        "Find the middleware that wraps `app.wsgi_app`, and let it pass a response with `Content-Type: "
        "text/event-stream` on block by block. `flask sse doctor` tries the app alone. "
        + page("Compression, and functions that read responses"),
    )


def _ends_early(facts: Facts) -> Finding | None:
    listened = facts.listened
    if listened is None or (listened.end is None and not listened.bye):
        return None
    seconds = f"after {listened.seconds:.1f} s"
    if listened.bye in {"kicked", "revoked"}:
        return warning(
            "ends_early",
            f"The app has ended the stream {seconds}: `sse_bye`, `{listened.bye}`. The user of this request was "
            "kicked, or `revalidate` returns False for them.",
            "Try another user, or look at what `revalidate` returns.",
        )
    if listened.bye == "lease":
        return warning(
            "ends_early",
            f"The stream has reached its largest age {seconds}. Its client comes back, and misses nothing, but each "
            "return costs a request.",
            "Raise `SSE_MAX_STREAM_AGE`; the default is 1800.",
        )
    if listened.bye == "threads":
        return None  # `_few_threads` says more
    if listened.bye:
        return fault(
            "ends_early",
            f"The server has ended the stream {seconds}, and says that it is stopping: `sse_bye`, `{listened.bye}`. If "
            "it was not restarted by hand just now, it restarts its processes by itself, and each time all streams "
            "end.",
            "Leave `--max-requests` (`max_requests`) out of gunicorn's settings, `max-requests` and "
            "`reload-on-rss` out of uWSGI's, and look for `--reload`, or a supervisor that restarts the process. "
            + page("Choose and set up a server"),
        )
    return fault(
        "ends_early",
        f"The stream was cut {seconds}, without an `sse_bye`, and {listened.silence_at_end:.1f} s after its last byte. "
        "The app says goodbye when it ends a stream, so something between this client and the app has closed the "
        "connection: a proxy with a limit for whole responses, or a server that was killed.",
        "Look in the server's log for a worker that was killed at this time: `WORKER TIMEOUT` of gunicorn (raise "
        "`--timeout`), `HARAKIRI` of uWSGI (leave it out). Otherwise raise the limit of the proxy for a whole "
        f"response, such as the backend service timeout of Google Cloud. {page('Behind a proxy')}",
    )


def _idle_timeout(facts: Facts) -> Finding | None:
    listened, heartbeat = facts.listened, facts.heartbeat
    if listened is None or heartbeat is None or listened.end is None or listened.bye:
        return None
    is_idle = listened.silence_at_end > 0.3 and listened.silence_at_end >= 0.8 * listened.silence
    if not is_idle or listened.heartbeats:
        return None
    return fault(
        "idle_timeout",
        f"The connection was closed after {listened.silence_at_end:.1f} s without a byte, and the app sends a "
        f"heartbeat every {heartbeat:g} s: {between(facts)} has a time-out that is shorter than the heartbeat. Each "
        "quiet stream breaks, and its browser comes back again and again.",
        f"Either {_lower_first(setting(facts, 'timeout'))}. Or set `SSE_HEARTBEAT` to less than "
        f"{listened.silence_at_end:.1f} seconds. {page('Behind a proxy')}",
    )


def _long_heartbeat(facts: Facts) -> Finding | None:
    return None if facts.heartbeat is None else diagnose_heartbeat(facts.heartbeat)


def diagnose_heartbeat(heartbeat: float) -> Finding | None:
    """Return a warning if a heartbeat comes too seldom for the usual proxies."""
    if heartbeat < USUAL_IDLE_SECONDS:
        return None
    return warning(
        "idle_timeout",
        f"The app sends a heartbeat every {heartbeat:g} s. Many proxies and load balancers close a connection after "
        "60 s without a byte, some earlier.",
        f"Set `SSE_HEARTBEAT` to less than {USUAL_IDLE_SECONDS} seconds; the default is 15. {page('Behind a proxy')}",
    )


def _heartbeats_missing(facts: Facts) -> Finding | None:
    if not _is_missing(facts) or facts.listened is None:
        return None
    return fault(
        "heartbeats_missing",
        f"The first block came at once, and then nothing for {facts.listened.silence:.1f} s, although the app sends a "
        f"heartbeat every {facts.heartbeat:g} s: {between(facts)} holds back small pieces, or removes comment lines. "
        "Browsers take the stream for dead, and single events may come late.",
        f"{setting(facts, 'buffering')}. {page('Behind a proxy')}",
    )


def _is_missing(facts: Facts) -> bool:
    listened, heartbeat = facts.listened, facts.heartbeat
    return listened is not None and heartbeat is not None and listened.silence > heartbeat_limit(heartbeat)


# -- threads and processes ---------------------------------------------------------------------------------------------


def _few_threads(facts: Facts) -> Finding | None:
    """The server has no thread for another request while streams are open."""
    is_asked = facts.answers_beside is not None
    is_held = facts.ready is not None and facts.ready.word == "threads"
    said = facts.busy_beside == "threads" or (facts.listened is not None and facts.listened.bye == "threads")
    if is_asked and not facts.answers_beside and facts.streams_beside <= 1:
        return fault(
            "one_thread",
            "While one stream is open, the server answers no other request: it serves one at a time. One open tab "
            "stops the whole site.",
            f"{MORE_THREADS} {page('Choose and set up a server')}",
        )
    if (is_asked and not facts.answers_beside) or is_held or said:
        held = f"With {facts.streams_beside} streams of this program open, the server"
        seen = "says that open streams hold its threads" if facts.answers_beside else "answers no other request"
        return fault(
            "threads",
            f"{held} {seen}. Each stream holds a thread for as long as it is open, so a few open tabs stop the site.",
            f"{MORE_THREADS} {page('Choose and set up a server')}",
        )
    return None


def _limit(facts: Facts) -> Finding | None:
    if facts.busy_beside != "limit":
        return None
    return warning(
        "busy",
        f"With {facts.streams_beside} streams of this program open, the app has refused a further one (`sse_busy`, "
        "`limit`): as many are open as it allows. Its client tries again.",
        "Raise `SSE_MAX_CLIENTS`, `SSE_MAX_CLIENTS_PER_USER` or the limit of file descriptors (`ulimit -n`), or run "
        f"more processes. {page('Scaling')}",
    )


def _separate_processes(facts: Facts) -> Finding | None:
    histories = list(dict.fromkeys(facts.histories))
    if len(histories) < 2 or _has_restarted(facts):
        return None
    return fault(
        "separate_processes",
        f"{len(facts.histories)} connections met {len(histories)} different histories: several processes serve this "
        "URL, and each has its own clients. An event reaches only the clients of the process that enqueues it, and a "
        "client that comes back to another process gets `sse_gap`.",
        "Set `SSE_BACKEND` to a `redis://` URL, the same in all processes; or run one process with threads (gunicorn: "
        "`--workers 1 --threads 16`). " + page("Several processes and hosts: Redis"),
    )


def _has_restarted(facts: Facts) -> bool:
    """Whether there is one process after the other: no history is met again after another one."""
    changes = sum(one != other for one, other in zip(facts.histories, facts.histories[1:], strict=False))
    ended = facts.listened is not None and facts.listened.end is not None
    return ended and changes < len(set(facts.histories))


def _http2(facts: Facts) -> Finding | None:
    if facts.http2 not in {"busy", "blocked"}:
        return None
    seen = (
        "it answers a stream over HTTP/2 with `sse_busy`, `http2`, so browsers get no event"
        if facts.http2 == "busy"
        else "while a stream is open, no other request on the same connection is answered, so an open page blocks its "
        "browser"
    )
    return fault(
        "http2",
        "The server of the app itself speaks HTTP/2, and serves the requests of a connection one after the other: "
        f"{seen}.",
        "Leave `h2` out of gunicorn's `--http-protocols`, and let a proxy such as nginx speak HTTP/2 with browsers. "
        + page("Choose and set up a server"),
    )


# -- coming back -------------------------------------------------------------------------------------------------------


def _cursor_removed(facts: Facts) -> Finding | None:
    """A cursor of another history, and the server does not say so: it has not got the cursor."""
    lost = [
        name
        for name, got in [
            ("the header `Last-Event-ID`", facts.by_header),
            ("the query `last_event_id=`", facts.by_query),
        ]
        if got == "sse_open"
    ]
    if not lost:
        return None
    clients = "An `EventSource` sends" if len(lost) == 2 or "header" in lost[0] else "The module for browsers sends"
    return fault(
        "no_resume",
        f"The app does not get {' and '.join(lost)}: a made-up cursor was answered with `sse_open`, not `sse_gap`. "
        f"Something between this client and the app removes it. {clients} it when it comes back, so such a client "
        "misses what was sent meanwhile, and nothing tells it.",
        "Let the proxy, and each middleware of the app, pass `Last-Event-ID` and the query on: look for "
        '`proxy_set_header Last-Event-ID ""` or `proxy_pass_request_headers off` in nginx, `RequestHeader unset` in '
        "Apache, an allow-list of headers or query strings in a CDN, and for code that changes "
        "`HTTP_LAST_EVENT_ID` in the environ. " + page("Wire format"),
    )


def _history_too_short(facts: Facts) -> Finding | None:
    resumed = facts.resumed
    if resumed is None or resumed.type != "sse_gap":
        return None
    if resumed.reason == "epoch" and facts.listened is not None and facts.listened.end is not None:
        return None  # the server was restarted: that is another finding
    if resumed.reason in {"too_old", "overflow"}:
        return fault(
            "no_resume",
            "A client that was away for as long as this program has listened has lost events: `sse_gap`, "
            f"`{resumed.reason}`. The history is too short for what is sent, so each client that comes back loads its "
            "state again.",
            "Raise `SSE_HISTORY_FRAMES` (10,000 by default), `SSE_HISTORY_BYTES` and `SSE_HISTORY_AGE`. With Redis, "
            "look whether another program trims the stream. " + page("The promise, and what happens in each fault"),
        )
    if resumed.reason == "publish_failed":
        cause = "A batch could not be delivered or read meanwhile"
    else:
        cause = "The server was restarted meanwhile, or Redis has lost its data, or another process answered"
    return fault(
        "no_resume",
        f"A client that comes back with a cursor of some seconds ago gets `sse_gap`, `{resumed.reason}`: it may have "
        f"missed something. {cause}.",
        "Run the doctor again. If it says the same, set `SSE_BACKEND` to a `redis://` URL, the same in all processes, "
        "and look at `maxmemory-policy` and at the log of the app. "
        + page("The promise, and what happens in each fault"),
    )


# -- single answers ----------------------------------------------------------------------------------------------------


def _compressed(facts: Facts) -> Finding | None:
    if facts.coding in {"", "identity"}:
        return None
    server, proxy = server_of(facts), proxy_of(facts)
    # Apache lets the name of the app's server pass, and compresses what says that it is not to be compressed.
    ignores_header = facts.plain is not None and facts.plain.header("content-encoding") == "identity"
    if server is not None and not ignores_header:
        by = f"the app compresses it, since its server, {server.name}, does not"
        do = f"{LEAVE_OUT_OF_COMPRESSION} {page('Compression, and functions that read responses')}"
    elif proxy is None and ignores_header:
        by = (
            "a proxy compresses it although the app says `Content-Encoding: identity`, most likely Apache with "
            "mod_deflate"
        )
        do = (
            f"{setting(facts, 'compression')}. If there is no proxy, it is the app: {LEAVE_OUT_OF_COMPRESSION} "
            f"{page('Behind a proxy')}"
        )
    else:
        by = f"{proxy.name if proxy else 'a proxy that does not name itself'}, or the app behind it, compresses it"
        do = f"{setting(facts, 'compression')}. If it is the app: {LEAVE_OUT_OF_COMPRESSION} {page('Behind a proxy')}"
    what = (
        f"The stream arrives with `Content-Encoding: {facts.coding}` at a client that accepts it, as browsers do: {by}."
    )
    if facts.coded_block is False:
        late = (
            "The compressor waits for more before it passes anything on: no block came, or the app has noticed that "
            "and has ended the stream. Browsers get no event, or get it late."
        )
        return fault("compressed", f"{what} {late}", do)
    if facts.coded_block is None:
        more = "This program cannot read it, so it is not known whether blocks come at once."
    else:
        more = "The first block came at once, so events arrive, but each costs time, and hardly gets smaller."
    return warning("compressed", f"{what} {more}", do)


def _http_1_0(facts: Facts) -> Finding | None:
    if facts.answer is None or facts.answer.version != "HTTP/1.0":
        return None
    return warning(
        "http_1_0",
        "The answer to a request of HTTP/1.1 is HTTP/1.0. There, only the end of the connection ends a response: a "
        "client cannot tell the end of a stream from a broken one, no connection is used again, and some proxies hold "
        "such a response back.",
        f"{setting(facts, 'http11')}. A server of the app should speak HTTP/1.1, too: gunicorn, waitress, cheroot and "
        f"`flask run` do. {page('Behind a proxy')}",
    )


def _headers(facts: Facts) -> Finding | None:
    answer = facts.plain or facts.answer
    if answer is None or not answer.is_stream:
        return None
    missing = [
        f"`Cache-Control: {word}`"
        for word in ("no-cache", "no-transform")
        if word not in answer.header("cache-control")
    ]
    if facts.coding in {"", "identity"} and answer.header("content-encoding") != "identity":
        missing.append("`Content-Encoding: identity`")
    if answer.header("x-content-type-options") != "nosniff":
        missing.append("`X-Content-Type-Options: nosniff`")
    server = server_of(facts)
    # nginx reads this one and does not pass it on, so it is missing behind each nginx.
    if server is not None and answer.header("x-accel-buffering") != "no":
        missing.append("`X-Accel-Buffering: no`")
    if not missing:
        return None
    if server is not None:
        where = "an `after_request` function or a middleware of the app, or a proxy that does not name itself,"
        do = (
            "Look for code that sets or deletes these headers, and let it leave out `text/event-stream`. A view of "
            f"your own must return all headers of `stream()`. If there is a proxy, {UNKNOWN.settings['headers']}"
        )
    else:
        where, do = between(facts), setting(facts, "headers")
    return warning(
        "headers",
        f"The library sends {', '.join(missing)} with each stream, and it did not arrive: {where} removes or replaces "
        "it. Caches, compressors and buffers on the way go by these headers.",
        f"{do}. {page('Wire format')}",
    )


def _clock(facts: Facts) -> Finding | None:
    return diagnose_clock(facts.clock_offset, "that answers")


def diagnose_clock(offset: float | None, host: str) -> Finding | None:
    """Return a fault if the clock of a host is `offset` seconds ahead of ours, or behind. `host`: which one it is."""
    if offset is None or abs(offset) <= CLOCK_SECONDS:
        return None
    ahead = "ahead of" if offset > 0 else "behind"
    return fault(
        "clock",
        f"The clock of the host {host} is {duration(abs(offset))} {ahead} that of this host. Signed tokens are refused "
        "if their time is over or in the future, and the logs of the two cannot be compared.",
        "Let NTP set both clocks (`timedatectl set-ntp true`; `chronyc tracking` shows which one is wrong), and look "
        f"at the host of Redis, too. {page('Signed URLs')}",
    )


def _cors(facts: Facts) -> Finding | None:
    origin = facts.origin
    answer = facts.plain or facts.answer
    if origin is None or answer is None:
        return None
    allowed = answer.header("access-control-allow-origin")
    if allowed not in {"*", origin.lower()}:
        got = f"`Access-Control-Allow-Origin: {allowed}`" if allowed else "no header `Access-Control-Allow-Origin`"
        more = " Two of them come if the app and a proxy each add one." if "," in allowed else ""
        return fault(
            "cors",
            f'A page of {origin} may not read the stream: the answer has {got}.{more} The browser says "blocked by '
            'CORS policy", and the page gets no event.',
            f'Set `SSE_CORS_ORIGINS = ["{origin}"]`; if a proxy adds such headers, remove them there. '
            + page("Authentication"),
        )
    if facts.preflight is not None and not _allows(facts.preflight, origin):
        status = status_text(facts.preflight)
        return warning(
            "cors",
            f"A page of {origin} may read the stream, but not with headers such as `Authorization`: the browser asks "
            f"first (a preflight, OPTIONS), and the answer is {status}, without leave for them. The module for "
            "browsers sends its cursor in the query, and needs no preflight.",
            "Let OPTIONS requests to the path of the stream pass: they come without cookies, so a login check must "
            "leave them out, and a proxy must not answer them itself. " + page("Authentication"),
        )
    return None


def _allows(preflight: Answer, origin: str) -> bool:
    headers = preflight.header("access-control-allow-headers")
    is_allowed = preflight.header("access-control-allow-origin") in {"*", origin.lower()}
    return 200 <= preflight.status < 300 and is_allowed and ("authorization" in headers)


def _unhealthy(facts: Facts) -> Finding | None:
    if facts.live is None or facts.live.word != "thread":
        return None
    return fault(
        "unhealthy",
        "The health check `/health/live` says `thread`: a thread of the library in this process has died, or has done "
        "nothing for 30 s. Events do not go out.",
        "Restart the process, and look in its log for the error before. " + page("Monitoring"),
    )


def _backend(facts: Facts) -> Finding | None:
    if facts.health is None or facts.health.word != "backend":
        return None
    return redis_away()


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


_ALWAYS: tuple[Diagnose, ...] = (
    _compressed,
    _http_1_0,
    _headers,
    _clock,
    _cors,
    _http2,
    _unhealthy,
    _limit,
)
_GROUPS: tuple[tuple[Diagnose, ...], ...] = (
    (_read_whole, _idle_timeout, _ends_early, _late, _heartbeats_missing, _long_heartbeat),
    (_backend, _few_threads),
    (_separate_processes, _cursor_removed, _history_too_short),
)
