"""Words that several diagnoses use.

Pure.
"""

from __future__ import annotations

import http

from .facts import Answer, Facts
from .findings import Finding, fault
from .software import UNKNOWN, Setting, Software, recognise

MORE_THREADS = (
    'If `SSE_TRANSPORT` is "attached", leave it out: then a stream leaves its thread. Or give the server more threads '
    "than there are open tabs: `--worker-class gthread --threads 200` for gunicorn, `--threads 200` for uWSGI and "
    "waitress."
)
LEAVE_OUT_OF_COMPRESSION = (
    "Leave `text/event-stream` out of `COMPRESS_MIMETYPES` of Flask-Compress; in Django, leave the view out of "
    "`GZipMiddleware`. And keep the header `Content-Encoding: identity` of the stream, at which compressors leave it "
    "alone: a view of your own returns `sse.response()`, or all headers of `stream()`."
)


def page(title: str) -> str:
    """Name a page, or a section, of the documentation."""
    return f'See "{title}" in the documentation.'


def proxy_of(facts: Facts) -> Software | None:
    """Return the proxy that the answer names, None if it names none."""
    software = recognise(facts.marks)
    return software if software is not None and software.is_proxy else None


def server_of(facts: Facts) -> Software | None:
    """Return the server of the app, if the answer names that and no proxy."""
    software = recognise(facts.marks)
    return software if software is not None and not software.is_proxy else None


def between(facts: Facts) -> str:
    """Say which two places something is between."""
    proxy = proxy_of(facts)
    if proxy is None:
        return "something between this client and the app, most likely a proxy that does not name itself,"
    return f"{proxy.name}, or another proxy between this client and the app,"


def setting(facts: Facts, name: Setting) -> str:
    """Say what to change in the proxy: a sentence without its full stop."""
    proxy = proxy_of(facts)
    if proxy is None:
        return f"Find the proxy, and {UNKNOWN.settings[name]}"
    return f"In the configuration of {proxy.name}: {proxy.settings[name]}"


def status_text(answer: Answer) -> str:
    """Return a status with its usual words, such as ``404 Not Found``."""
    try:
        return f"{answer.status} {http.HTTPStatus(answer.status).phrase}"
    except ValueError:
        return str(answer.status)


def duration(seconds: float) -> str:
    """Return a time in words."""
    for unit, length in [("days", 86_400), ("hours", 3_600), ("minutes", 60)]:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def redis_away() -> Finding:
    """Return the finding for a backend that does not answer the app."""
    return fault(
        "backend",
        "Redis does not answer the app, or does not take its events. Open streams stay open and get nothing, and new "
        "ones are refused with `sse_busy`, `backend`.",
        "Start Redis, and compare `SSE_BACKEND` with its address, password and rights: the log of the app has a line "
        f"with `Redis fails:` and the reason. {page('Several processes and hosts: Redis')}",
    )
