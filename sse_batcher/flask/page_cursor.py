"""`sse_cursor()`: for templates, where the history stood when the request began.

Request threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, has_request_context, request

from ..manager import SSEManager

_log = logging.getLogger("sse_batcher.page")


def add_page_cursor(app: Flask, manager: SSEManager, *, told: bool) -> None:
    """Give the templates of this app an `sse_cursor()`. `told`: its config names the backend.

    The place is noted before any view or before-request function reads a state, so that a page that begins there misses
    nothing of what happens while it is made. All requests pay for that, so it is done around Flask: a before-request
    function alone would cost seven times as much.
    """
    unwarned = ["of several processes"]
    answer = app.wsgi_app
    # The app is part of the name, since an app that calls another one may hand it the same environ.
    key = f"sse_batcher.place.{id(app)}"

    def note_place(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ[key] = manager.place()
        return answer(environ, start_response)

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
        if has_request_context() and key in request.environ:
            return manager.format(request.environ[key])
        return manager.cursor()

    app.wsgi_app = note_place  # type: ignore[method-assign]
    app.context_processor(lambda: {"sse_cursor": sse_cursor})
