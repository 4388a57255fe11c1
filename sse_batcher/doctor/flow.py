"""Diagnoses of how a stream flows: what came, when, and how it ended.

Pure. Each function returns None if the facts do not show its fault.
"""

from __future__ import annotations

from .facts import Facts
from .findings import Finding, fault, warning
from .words import MORE_THREADS, between, page, proxy_of, setting

LATE_SECONDS = 2.0
"""A first block later than this after its head is held back by something."""
USUAL_IDLE_SECONDS = 55
"""The shortest idle time-out of the proxies that people use is about this. Heartbeats must come more often."""


def nothing_came(facts: Facts) -> Finding | None:
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
            f"{MORE_THREADS} {page('Choose and set up a server')}",
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


def blocks_late(facts: Facts) -> Finding | None:
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


def read_whole(facts: Facts) -> Finding | None:
    """The app says that its response is read as a whole before it is passed on."""
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


def ends_early(facts: Facts) -> Finding | None:
    """The stream has ended, with or without a reason."""
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
        return None  # `threads_taken` says more
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


def idle_timeout(facts: Facts) -> Finding | None:
    """The connection was closed while the app had nothing to send, before its first heartbeat."""
    listened, heartbeat = facts.listened, facts.heartbeat
    if listened is None or heartbeat is None or listened.end is None or listened.bye:
        return None
    # The first heartbeat may come early, as it is that of all streams. No other silence has lasted as long as the last.
    shortest = listened.silence if listened.heartbeats else 0.8 * listened.silence
    if listened.heartbeats > 1 or not max(0.3, shortest) <= listened.silence_at_end:
        return None
    return fault(
        "idle_timeout",
        f"The connection was closed after {listened.silence_at_end:.1f} s without a byte, and the app sends a "
        f"heartbeat every {heartbeat:g} s: {between(facts)} has a time-out that is shorter than the heartbeat. Each "
        "quiet stream breaks, and its browser comes back again and again.",
        f"Either {_lower_first(setting(facts, 'timeout'))}. Or set `SSE_HEARTBEAT` to less than "
        f"{listened.silence_at_end:.1f} seconds. {page('Behind a proxy')}",
    )


def long_heartbeat(facts: Facts) -> Finding | None:
    """The stream says that its heartbeats come seldom."""
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


def heartbeats_missing(facts: Facts) -> Finding | None:
    """The stream stays open, and nothing comes when a heartbeat is due."""
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


def heartbeat_limit(heartbeat: float) -> float:
    """Return after how many seconds of silence a heartbeat is missing."""
    return 1.25 * heartbeat + 1.5


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
