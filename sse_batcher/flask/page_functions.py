"""`sse_cursor()`: for templates, the cursor of the place where the history stood when the request began.

Request threads. The backend makes and parses cursors.
"""

from __future__ import annotations

import logging

from flask import Flask, has_request_context, request

from ..runtime.log_once import LogOnce
from .request_notes import RequestNotes

_log = logging.getLogger("sse_batcher.page")


def add_page_functions(app: Flask, notes: RequestNotes, *, names_backend: bool) -> None:
    """Give the templates of this app an `sse_cursor()`. `names_backend`: the config has a key `SSE_BACKEND`."""
    once = LogOnce(_log)

    def sse_cursor() -> str:
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

    app.context_processor(lambda: {"sse_cursor": sse_cursor})
