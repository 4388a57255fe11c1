"""The blueprint: the routes under the prefix.

Views run in request threads. Everything about the request is settled in the view; the stream itself runs without a
context, so that it pins no database connection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

from flask import Blueprint, Response, abort, current_app, jsonify, request
from werkzeug.exceptions import HTTPException

from .cors import Cors
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

    def user(self) -> Hashable: ...

    def shows_stats(self) -> bool | None: ...

    def snapshot_of(self, channels: tuple[str, ...]) -> Callable[[], Iterable[tuple[str, Any]]] | None: ...


def create_blueprint(extension: Extension, url_prefix: str, cors: Cors) -> Blueprint:
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
            _warn_of_processes(request.environ)
        manager, environ, user = extension.manager, request.environ, extension.user()
        try:
            status, headers, body = stream(
                manager, environ, channels, snapshot=extension.snapshot_of(channels), user=user
            )
        except HTTPException:
            raise
        except Exception:
            # No error status for what may pass: a browser would give up for good.
            _log.exception("the snapshot failed; the client is told to come back")
            busy = manager.busy_block("backend", last_event_id(environ))
            return current_app.response_class([busy], headers=list(HEADERS))
        return current_app.response_class(body, status=status, headers=headers)

    def health() -> Response:
        """Whether this process can serve streams: 200, or 503 and why not. And when the backend has last answered.

        Anybody may ask, so it must cost no more than any small page: nothing here looks at the clients.
        """
        manager = extension.manager
        illness = manager.ill()
        answer = jsonify(status=illness or "ok", backend_answered=round(manager.backend_answered, 3))
        answer.status_code = 503 if illness else 200
        return _uncached(answer)

    def stats() -> Response:
        """The counters of this process, for whom the app allows it."""
        allowed = extension.shows_stats()
        if not allowed:
            abort(404 if allowed is None else 403)
        return _uncached(jsonify(extension.manager.get_stats().as_dict()))

    blueprint = Blueprint(NAME, __name__, url_prefix=url_prefix or None)
    blueprint.add_url_rule("/health", "health", health)
    blueprint.add_url_rule("/stats", "stats", stats)

    @blueprint.after_request
    def allow_origins(response: Response) -> Response:
        if request.endpoint == f"{NAME}.stream":
            headers = cors.headers(request.headers.get("Origin"), preflight=request.method == "OPTIONS")
            for name, value in headers:
                if name == "Vary":
                    response.vary.add(value)
                else:
                    response.headers[name] = value
        return response

    if url_prefix:
        blueprint.add_url_rule("", "stream", view)
    blueprint.add_url_rule("/", "stream", view)
    return blueprint


def _uncached(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response


def _warn_of_processes(environ: Mapping[str, Any]) -> None:
    if environ.get("wsgi.multiprocess") and "SSE_BACKEND" not in current_app.config:
        _log.warning(
            "this server runs several processes, and each reaches its own clients only: run one process with threads, "
            'or set SSE_BACKEND ("redis://..." for all of them, "memory://" if that is what you want)'
        )


def _warn_of_compression() -> None:
    if "text/event-stream" in current_app.config.get("COMPRESS_MIMETYPES", ()):
        _log.warning(
            "COMPRESS_MIMETYPES names text/event-stream: Flask-Compress would hold events back until its buffer is "
            "full. Take it out."
        )
