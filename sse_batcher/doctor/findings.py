"""Findings: what the doctor says, and the list of all that it can say.

Pure.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["fault", "warning"]
"""``fault``: streams do not work, or lose something. ``warning``: they work now, and something may harm them."""

CODES: dict[str, str] = {
    "unreachable": "There is no server, or a proxy answers that there is none behind it.",
    "not_found": "404: the stream has another path (`SSE_URL_PREFIX`).",
    "unauthorized": "401: the app does not know who asks, or a token is not valid.",
    "forbidden": "403: `authorize` grants none of the channels.",
    "redirected": "The answer is a redirect, such as to a login page.",
    "not_a_stream": "The answer is an error of the app, or a page.",
    "buffered": "A proxy holds blocks back.",
    "read_whole": "A middleware or function of the app reads the whole response.",
    "compressed": "A proxy or the app compresses the stream.",
    "http_1_0": "A server or proxy answers with HTTP/1.0.",
    "idle_timeout": "A proxy closes a quiet stream before the next heartbeat, or most proxies would.",
    "heartbeats_missing": "Blocks come, and heartbeats do not.",
    "threads": "Open streams hold all threads of the server.",
    "one_thread": "The server serves one request at a time.",
    "separate_processes": "Several processes share no backend: an event reaches the clients of one of them.",
    "backend": "Redis does not answer the app.",
    "http2": "gunicorn itself speaks HTTP/2, and a stream blocks the other requests of its browser.",
    "ends_early": "The server or a proxy ends streams after a short time.",
    "clock": "The clocks of two hosts differ.",
    "no_resume": "A client that comes back does not get what it has missed.",
    "cors": "The pages of another origin may not read the stream.",
    "headers": "A header that the library sends has been removed or changed.",
    "busy": "The server refuses further streams for now.",
    "unhealthy": "A thread of the library has died, or does nothing.",
    "secret_key": "The app has no `SECRET_KEY` for a token, or not that of the server. `flask sse doctor URL` only.",
    "eviction": "Redis may evict the keys of the library. Inside only.",
}
"""What each code means, in one sentence. ``Inside only``: `flask sse doctor` finds it, without a URL, too."""


class Finding(NamedTuple):
    """One thing that is wrong. The form of ``--json``."""

    code: str
    """One of `CODES`."""
    level: Level
    what: str
    """What is wrong, between which two places, and what that does."""
    do: str
    """What to change."""


def fault(code: str, what: str, do: str) -> Finding:
    """Return a finding of the level ``fault``."""
    return Finding(code, "fault", what, do)


def warning(code: str, what: str, do: str) -> Finding:
    """Return a finding of the level ``warning``."""
    return Finding(code, "warning", what, do)
