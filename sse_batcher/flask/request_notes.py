"""What is noted when a request begins: where the history stands, and which kick was the newest.

Request threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, has_request_context, request

from ..manager import SSEManager
from ..manager_state import process_of
from ..wire import Position


class RequestNotes:
    """Makes the notes for the requests to one app, and reads those of the current request.

    They are made before any view or before-request function. A page whose stream goes on from there misses nothing that
    happens while it is made, and a kick counts for a stream that the request is then given. All requests pay for that,
    so it is done in a WSGI layer around Flask: a before-request function alone would cost seven times as much. Nothing
    is started for it: with Redis, the reader begins with the first stream or cursor.
    """

    def __init__(self, app: Flask, manager: SSEManager) -> None:
        self._manager = manager
        # The app is part of the name, since an app that calls another one may hand it the same environ.
        self._key = key = f"sse_batcher.noted.{id(app)}"
        answer = app.wsgi_app

        def note(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ[key] = process_of(manager).moment()
            return answer(environ, start_response)

        app.wsgi_app = note  # type: ignore[method-assign]

    def cursor(self) -> str:
        """Return the cursor that stands for the beginning of the request; without a request, for now.

        If the place was not known then, it is found out from now on, for later requests.
        """
        noted = self._noted()
        if noted is None:
            return self._manager.cursor()
        process = process_of(self._manager)
        if noted[0] is None:
            process.place()
        return process.format(noted[0])

    def ticket(self) -> int:
        """Return the number after which kicks count for a stream of this request. See `SSEManager.ticket`.

        If the history of Redis was not known yet, kicks count that were made long ago: such a stream ends with its
        first step, and the client comes back at once. `wait_for_ticket` avoids that.
        """
        noted = self._noted()
        return self._manager.ticket() if noted is None else noted[1]

    def wait_for_ticket(self) -> None:
        """Take the ticket of this request now, when the history is known. May wait for Redis."""
        place, _ = self._noted() or process_of(self._manager).moment()
        request.environ[self._key] = place, self._manager.ticket()

    def _noted(self) -> tuple[Position | None, int] | None:
        """None without a request, and for one that did not come through `app.wsgi_app`, as in a test."""
        return request.environ.get(self._key) if has_request_context() else None
