"""`sse_cursor()`: for templates, where the history stood when the request began.

Request threads.
"""

from __future__ import annotations

import logging

from flask import Flask, g, has_request_context, request

from .errors import BackendError
from .manager import SSEManager

_log = logging.getLogger("sse_batcher.page")

_NAME = "_sse_batcher_cursor"


def add_page_cursor(app: Flask, manager: SSEManager, *, told: bool) -> None:
    """Give the templates of this app an `sse_cursor()`. `told`: its config names the backend.

    The place is noted before any view or before-request function reads a state, so that a page that begins there misses
    nothing of what happens while it is made.
    """
    unwarned = ["of several processes"]

    def note() -> None:
        try:
            setattr(g, _NAME, manager.cursor())
        except BackendError:
            setattr(g, _NAME, "")  # the page begins where its stream does

    def sse_cursor() -> str:
        if not told and has_request_context() and request.environ.get("wsgi.multiprocess"):
            # The browser may be served by another process, which has another history: it would be told of a gap.
            if unwarned:
                unwarned.clear()
                _log.warning(
                    "sse_cursor() is empty: this server runs several processes, and each has a history of its own: "
                    'run one process with threads, or set SSE_BACKEND ("memory://" if clients always come back to the '
                    "same process)"
                )
            return ""
        noted: str | None = getattr(g, _NAME, None)
        return manager.cursor() if noted is None else noted

    app.before_request_funcs.setdefault(None, []).insert(0, note)
    app.context_processor(lambda: {"sse_cursor": sse_cursor})
