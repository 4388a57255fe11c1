"""The functions for templates: `sse_cursor()` and `sse_script_url()`.

Request threads. The backend makes and parses cursors.
"""

from __future__ import annotations

import logging

from flask import Flask, has_request_context, request, url_for

from ..browser import VERSION
from ..errors import UsageError
from ..runtime.log_once import LogOnce
from .request_notes import RequestNotes

_log = logging.getLogger("sse_batcher.page")


def add_page_functions(app: Flask, notes: RequestNotes, *, names_backend: bool, script_endpoint: str | None) -> None:
    """Give the templates of this app an `sse_cursor()` and an `sse_script_url()`.

    `names_backend`: the config has a key `SSE_BACKEND`. `script_endpoint`: see `script_url`.
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
            )
            return ""
        return notes.cursor()

    def sse_script_url() -> str:
        return script_url(script_endpoint)

    app.context_processor(lambda: {"sse_cursor": sse_cursor, "sse_script_url": sse_script_url})


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
