"""The blueprint: the routes under the prefix.

Views run in request threads. Everything about the request is settled in the view; the stream itself runs without a
context, so that it pins no database connection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from flask import Blueprint, Response, abort, current_app, request
from werkzeug.exceptions import HTTPException

from .errors import InvalidEventError
from .event import DEFAULT_CHANNEL, check_channels
from .manager import SSEManager
from .wire import HEADERS
from .wsgi import last_event_id, stream

_log = logging.getLogger("sse_batcher.blueprint")

NAME = "sse_batcher"


class Extension(Protocol):
    """What the views need of the extension."""

    @property
    def manager(self) -> SSEManager: ...

    def allowed(self, asked: tuple[str, ...]) -> tuple[str, ...]: ...

    def snapshot_of(self, channels: tuple[str, ...]) -> Callable[[], Iterable[tuple[str, Any]]] | None: ...


def create_blueprint(extension: Extension, url_prefix: str) -> Blueprint:
    """The routes, to be registered once for each app. `url_prefix` has no slash at its end."""

    unchecked = ["the config, which is complete at the first stream"]

    def view() -> Response:
        """``GET ?channel=a&channel=b``: the stream of these channels, of ``default`` where none is named."""
        try:
            asked = check_channels(request.args.getlist("channel") or [DEFAULT_CHANNEL])
        except InvalidEventError as error:
            abort(400, str(error))
        channels = extension.allowed(asked)
        if not channels:
            abort(403)
        if unchecked:
            unchecked.clear()
            _warn_of_compression()
        manager, environ = extension.manager, request.environ
        try:
            status, headers, body = stream(manager, environ, channels, snapshot=extension.snapshot_of(channels))
        except HTTPException:
            raise
        except Exception:
            # No error status for what may pass: a browser would give up for good.
            _log.exception("the snapshot failed; the client is told to come back")
            busy = manager.busy_block("backend", last_event_id(environ))
            return current_app.response_class([busy], headers=list(HEADERS))
        return current_app.response_class(body, status=status, headers=headers)

    blueprint = Blueprint(NAME, __name__, url_prefix=url_prefix or None)
    if url_prefix:
        blueprint.add_url_rule("", "stream", view)
    blueprint.add_url_rule("/", "stream", view)
    return blueprint


def _warn_of_compression() -> None:
    if "text/event-stream" in current_app.config.get("COMPRESS_MIMETYPES", ()):
        _log.warning(
            "COMPRESS_MIMETYPES names text/event-stream: Flask-Compress would hold events back until its buffer is "
            "full. Take it out."
        )
