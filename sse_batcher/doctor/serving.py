"""Diagnoses of what serves the stream: threads, processes, the backend, and clients that come back.

Pure. Each function returns None if the facts do not show its fault.
"""

from __future__ import annotations

from itertools import pairwise

from .facts import POLLS_AT_ONCE, Facts
from .findings import Finding, fault, warning
from .words import MORE_THREADS, page, redis_away


def threads_taken(facts: Facts) -> Finding | None:
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


def limit_reached(facts: Facts) -> Finding | None:
    """A further stream beside the open ones is refused, because as many are open as the app allows."""
    if facts.busy_beside != "limit":
        return None
    return warning(
        "busy",
        f"With {facts.streams_beside} streams of this program open, the app has refused a further one (`sse_busy`, "
        "`limit`): as many are open as it allows. Its client tries again.",
        "Raise `SSE_MAX_CLIENTS`, `SSE_MAX_CLIENTS_PER_USER` or the limit of file descriptors (`ulimit -n`), or run "
        f"more processes. {page('Scaling')}",
    )


def separate_processes(facts: Facts) -> Finding | None:
    """New connections meet several histories: those of processes that share no backend."""
    met = [*facts.histories, *facts.histories_after]
    if len(set(met)) < 2 or _has_restarted(facts):
        return None
    return fault(
        "separate_processes",
        f"{len(met)} connections met {len(set(met))} different histories: several processes serve this "
        "URL, and each has its own clients. An event reaches only the clients of the process that enqueues it, and a "
        "client that comes back to another process gets `sse_gap`.",
        "Set `SSE_BACKEND` to a `redis://` URL, the same in all processes; or run one process with threads (gunicorn: "
        "`--workers 1 --threads 16`). " + page("Several processes and hosts: Redis"),
    )


def _has_restarted(facts: Facts) -> bool:
    """Whether there is one process after the other: no history is met again long after another one."""
    met = [*facts.histories, *facts.histories_after]
    first = {history: met.index(history) for history in met}  # in the order of their first places
    last = {history: place for place, history in enumerate(met)}
    follow = all(last[one] < first[other] + POLLS_AT_ONCE for one, other in pairwise(first))
    # A second history while the stream of the first is open is a second process.
    is_first_over = (facts.listened is not None and facts.listened.end is not None) or len(set(facts.histories)) == 1
    return is_first_over and follow


def http2_blocks(facts: Facts) -> Finding | None:
    """A stream over HTTP/2 is refused, or keeps the other requests of its connection waiting."""
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


def unhealthy(facts: Facts) -> Finding | None:
    """The health check says that a thread of the library does not work."""
    if facts.live is None or facts.live.word != "thread":
        return None
    return fault(
        "unhealthy",
        "The health check `/health/live` says `thread`: a thread of the library in this process has died, or has done "
        "nothing for 30 s. Events do not go out.",
        "Restart the process, and look in its log for the error before. " + page("Monitoring"),
    )


def backend_silent(facts: Facts) -> Finding | None:
    """The health check says that the backend does not answer."""
    if facts.health is None or facts.health.word != "backend":
        return None
    return redis_away()


def cursor_removed(facts: Facts) -> Finding | None:
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
        "misses what was sent meanwhile, and gets no sign of it.",
        "Let the proxy, and each middleware of the app, pass `Last-Event-ID` and the query on: look for "
        '`proxy_set_header Last-Event-ID ""` or `proxy_pass_request_headers off` in nginx, `RequestHeader unset` in '
        "Apache, an allow-list of headers or query strings in a CDN, and for code that changes "
        "`HTTP_LAST_EVENT_ID` in the environ. " + page("Wire format"),
    )


def history_too_short(facts: Facts) -> Finding | None:
    """The cursor of the first block is not good any more."""
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
