"""The functions for templates: `sse_cursor()`, `sse_script_url()` and `sse_url()`.

Request threads. The backend makes and parses cursors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flask import Flask, has_request_context, request, url_for

from ..browser import VERSION
from ..errors import UsageError
from ..event import DEFAULT_CHANNEL, NOT_GIVEN, NotGiven, User
from ..runtime.log_fields import log_fields
from ..runtime.log_once import LogOnce
from .request_notes import RequestNotes
from .signing import DEFAULT_TTL, Tokens

_log = logging.getLogger("sse_batcher.page")


def add_page_functions(
    app: Flask,
    notes: RequestNotes,
    tokens: Tokens,
    *,
    names_backend: bool,
    script_endpoint: str | None,
    stream_endpoint: str | None,
) -> None:
    """Give the templates of this app an `sse_cursor()`, an `sse_script_url()` and an `sse_url()`.

    `names_backend`: the config has a key `SSE_BACKEND`. `script_endpoint`: see `script_url`. `stream_endpoint`: see
    `stream_url`.
    """
    once = LogOnce(_log)

    def sse_cursor() -> str:
        """Return the cursor of the place where the history stood when the request began."""
        if not names_backend and has_request_context() and request.environ.get("wsgi.multiprocess"):
            # Another process may serve the stream. It has another history, so the client would get sse_gap.
            once.log(
                logging.WARNING,
                "sse_cursor() is empty: this server runs several processes, and each has a history of its own: run one "
                'process with threads, or set SSE_BACKEND ("memory://" if clients always come back to the same '
                "process)",
                extra=log_fields("cursor_empty"),
            )
            return ""
        return notes.cursor()

    def sse_script_url() -> str:
        return script_url(script_endpoint)

    def sse_url(
        channels: Iterable[str] = (DEFAULT_CHANNEL,),
        *,
        user: User | NotGiven = NOT_GIVEN,
        ttl: float = DEFAULT_TTL,
        external: bool = False,
    ) -> str:
        return stream_url(stream_endpoint, tokens, channels, user=user, ttl=ttl, external=external)

    functions = {"sse_cursor": sse_cursor, "sse_script_url": sse_script_url, "sse_url": sse_url}
    app.context_processor(functions.copy)


def script_url(endpoint: str | None) -> str:
    """Return the URL of the module for browsers, with its version, as `url_for` makes it.

    `endpoint`: that of its route. None: the app has no such route, which is a `UsageError`.
    """
    if endpoint is None:
        raise UsageError(
            "there is no URL of sse-batcher.js, since SSE_URL_PREFIX = None adds no routes: set SSE_URL_PREFIX to a "
            "path, or add a route of your own that returns sse_batcher.script(request.environ), or write the file "
            "into your static folder with 'flask sse client FOLDER'"
        )
    return url_for(endpoint, v=VERSION)


def stream_url(
    endpoint: str | None,
    tokens: Tokens,
    channels: Iterable[str],
    *,
    user: User | NotGiven,
    ttl: float,
    external: bool,
) -> str:
    """Return the URL of the stream with a token, as `url_for` makes it. See `SSE.url`."""
    if endpoint is None:
        raise UsageError(
            "there is no URL of the stream, since SSE_URL_PREFIX = None adds no routes: set SSE_URL_PREFIX to a path. "
            "Tokens are for that route; views of your own decide for themselves"
        )
    return url_for(endpoint, token=tokens.sign(channels, user, ttl), _external=external or None)
