"""Set-ups for `doctor` that need no proxy: which path or origin is examined, and what has to be found."""

from __future__ import annotations

from typing import NamedTuple

ORIGIN = "https://example.com"


class SetUp(NamedTuple):
    """One app of `faultyapps`, and what is found there."""

    app: str
    code: str | None
    """None: nothing."""
    level: str = "fault"
    names: tuple[str, ...] = ()
    """Words that its text must have: the setting to change."""
    path: str = "events"
    origin: str | None = None
    seconds: float | None = None


SETUPS = {
    "healthy": SetUp("healthy", None),
    "healthy, other origin": SetUp("with_cors", None, origin=ORIGIN),
    "wrong path": SetUp("healthy", "not_found", names=("/healthy/events", "SSE_URL_PREFIX"), path="event"),
    "path without an app": SetUp("nothing", "not_found", names=("SSE_URL_PREFIX",)),
    "401": SetUp("unauthorized", "unauthorized", names=("--header", "--token")),
    "403": SetUp("forbidden", "forbidden", names=("@sse.authorize", "?channel=")),
    "channel without authorize": SetUp("healthy", "forbidden", names=("@sse.authorize",), path="events?channel=team-7"),
    "redirect to a login page": SetUp("login", "redirected", names=("/login/login", "before_request", "401")),
    "redirect to the stream": SetUp("moved", "redirected", "warning", names=("/moved/events",), path="old"),
    "a page at all paths": SetUp("single_page", "not_a_stream", names=("text/html", "SSE_URL_PREFIX")),
    "an after_request function that reads": SetUp(
        "reading_function", "not_a_stream", names=("500", "after_request", "direct_passthrough")
    ),
    "a middleware that reads": SetUp("reading_middleware", "read_whole", names=("app.wsgi_app", "text/event-stream")),
    "Flask-Compress": SetUp("compressing", "compressed", names=("COMPRESS_MIMETYPES", "gunicorn"), seconds=2.0),
    "no Last-Event-ID": SetUp("without_cursor", "no_resume", names=("`Last-Event-ID`", "HTTP_LAST_EVENT_ID")),
    "a short history": SetUp("short_history", "no_resume", names=("SSE_HISTORY_FRAMES", "too_old")),
    "headers removed": SetUp(
        "without_headers", "headers", "warning", names=("X-Accel-Buffering: no", "no-transform", "after_request")
    ),
    # The loop may look at a new stream only after two of its rounds.
    "a short lease": SetUp("short_lease", "ends_early", "warning", names=("SSE_MAX_STREAM_AGE",), seconds=6.0),
    "few clients": SetUp("few_clients", "busy", "warning", names=("SSE_MAX_CLIENTS",)),
    "a snapshot that fails": SetUp("failing_snapshot", "busy", names=("@sse.snapshot", "log")),
    "a long heartbeat": SetUp("long_heartbeat", "idle_timeout", "warning", names=("SSE_HEARTBEAT",), seconds=1.0),
    "another origin": SetUp("healthy", "cors", names=("SSE_CORS_ORIGINS", ORIGIN), origin=ORIGIN),
}
"""By what is wrong."""
