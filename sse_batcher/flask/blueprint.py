"""The blueprint: the routes under the prefix.

Views run in request threads. Everything about the request is settled in the view; the stream itself runs without a
context, so that it pins no database connection.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from flask import Blueprint, Response, abort, current_app, has_request_context, jsonify, request
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Response as BaseResponse
from werkzeug.wsgi import ClosingIterator

from ..errors import InvalidEventError
from ..event import DEFAULT_CHANNEL, check_channels
from ..manager import SSEManager
from ..transports.server import inspect_server
from ..wire import HEADERS
from ..wsgi import last_event_id, stream
from .cors import Cors

_log = logging.getLogger("sse_batcher.blueprint")

NAME = "sse_batcher"
_HOST = "sse_host"
"""The variable part of our rules that is any host, for apps with host matching."""
_TICKET = "sse_batcher.ticket"
"""Where a request's environ has it."""


class Extension(Protocol):
    """What the views need of the extension: one app's part of it."""

    manager: SSEManager

    def allowed(self, asked: tuple[str, ...]) -> tuple[str, ...]: ...

    def user(self) -> str | int | None: ...

    def shows_stats(self) -> bool | None: ...

    def snapshot_of(self, channels: tuple[str, ...]) -> Callable[[], Iterable[tuple[str, Any]]] | None: ...


def create_blueprint(extension: Extension, url_prefix: str, cors: Cors, *, told: bool) -> Blueprint:
    """The routes, to be registered once for each app. `url_prefix` has no slash at its end.

    `told`: the config names the backend.
    """

    unchecked = ["the config, which is complete at the first stream"]

    failed_snapshots = itertools.count(1)

    def view() -> Response:
        """``GET ?channel=a&channel=b``: the stream of these channels, of ``default`` where none is named."""
        try:
            asked = check_channels(request.args.getlist("channel") or [DEFAULT_CHANNEL])
        except InvalidEventError as error:
            abort(400, str(error))
        # A view of the app's own that calls this one has no ticket yet.
        ticket = request.environ[_TICKET] if _TICKET in request.environ else extension.manager.ticket()
        channels = extension.allowed(asked)
        if not channels:
            abort(403)
        if unchecked:
            unchecked.clear()
            _warn_of_processes(request.environ, told)
        manager, environ, user = extension.manager, request.environ, extension.user()
        try:
            status, headers, body = stream(
                manager, environ, channels, snapshot=extension.snapshot_of(channels), user=user, ticket=ticket
            )
        except HTTPException:
            raise
        except Exception:
            # No error status for what may pass: a browser would give up for good.
            _log_failure(channels, next(failed_snapshots))
            busy = manager.busy_block("snapshot", last_event_id(environ))
            return current_app.response_class([busy], headers=list(HEADERS))
        # The mark of what is passed on as it is, such as files: functions that would read it leave it out.
        response_class = _endless(current_app.response_class)  # type: ignore[arg-type]  # for mypy, a class has no hash
        return response_class(body, status=status, headers=headers, direct_passthrough=True)

    def health() -> Response:
        """Whether this process can serve streams: 200, or 503 and why not. And when the backend has last answered.

        Anybody may ask, so it must cost no more than any small page: nothing here looks at the clients.
        """
        manager = extension.manager
        manager.reopen(inspect_server(request.environ).is_stopping)
        illness = manager.unhealthy_reason()
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
    routes = [("/", "stream", view), ("/health", "health", health), ("/stats", "stats", stats)]
    _add_routes(blueprint, [("", "stream", view), *routes] if url_prefix else routes)
    _look_for_collisions(blueprint)
    blueprint.url_value_preprocessor(functools.partial(_take_ticket, extension))

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

    return blueprint


def _take_ticket(extension: Extension, endpoint: str | None, values: object) -> None:
    # Called before the app's before-request functions: authorize() may go by a user that they have looked up.
    if endpoint == f"{NAME}.stream":
        request.environ[_TICKET] = extension.manager.ticket()


class _Endless(BaseResponse):
    """A response that may be passed on, and not read, since it has no end."""

    def get_app_iter(self, environ: dict[str, Any]) -> Iterable[bytes]:
        """As usual, functions for its end are called, which werkzeug leaves out for what is passed on as it is."""
        body = super().get_app_iter(environ)
        return ClosingIterator(body, self.close) if body is self.response else body

    def _ensure_sequence(self, mutable: bool = False) -> None:
        """Called by all that needs the whole body. Werkzeug would refuse it, too, but not say why."""
        if not self.is_sequence:
            raise RuntimeError(
                "this response streams events and has no end, so its body cannot be read: let the function that wants "
                "to, an after_request function or that of an extension, leave out responses with direct_passthrough, "
                "as it must for files"
            )
        super()._ensure_sequence(mutable)


@functools.lru_cache
def _endless(response_class: type[Response]) -> type[Response]:
    """The app's own class of responses, for one that has no end."""
    return type("StreamResponse", (_Endless, response_class), {})


def _log_failure(channels: tuple[str, ...], failures: int) -> None:
    """In the handler of what a snapshot has raised. Seldom: every open page comes back, again and again."""
    if failures & (failures - 1) == 0:  # 1, 2, 4, 8 ...
        _log.exception(
            "a snapshot for the channels %r failed; failures so far: %d. Clients get sse_busy and come back",
            channels,
            failures,
        )


def _uncached(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response


def _add_routes(blueprint: Blueprint, routes: list[tuple[str, str, Callable[[], Response]]]) -> None:
    """Add these routes when the blueprint is registered: each a path, an endpoint and a view.

    If the app matches hosts, a rule without a host matches no request at all. So they get any host, as a variable part
    that the views do not see and that `url_for` takes from the request.
    """

    @blueprint.record
    def add(state: BlueprintSetupState) -> None:
        host = f"<{_HOST}>" if state.app.url_map.host_matching else None
        for path, endpoint, view in routes:
            state.add_url_rule(path, endpoint, view, host=host)

    @blueprint.url_value_preprocessor
    def take_host_out(endpoint: str | None, values: dict[str, Any] | None) -> None:
        if values:
            values.pop(_HOST, None)

    @blueprint.url_defaults
    def put_host_in(endpoint: str, values: dict[str, Any]) -> None:
        if current_app.url_map.host_matching:
            values.setdefault(_HOST, request.host if has_request_context() else current_app.config["SERVER_NAME"])


def _look_for_collisions(blueprint: Blueprint) -> None:
    """Look at the app's routes when the blueprint is registered, and again at the first request: then all are there."""
    told: set[str] = set()
    unseen = ["routes that are added later"]
    blueprint.record(lambda state: _warn_of_collisions(state.app.url_map, told))

    @blueprint.app_url_value_preprocessor
    def look_again(endpoint: str | None, values: dict[str, Any] | None) -> None:
        if unseen:
            unseen.clear()
            _warn_of_collisions(current_app.url_map, told)


def _warn_of_collisions(routes: Map, told: set[str]) -> None:
    """Warn of each endpoint of the app that has a path of ours, except those in `told`, and add it there."""

    def place(rule: Rule) -> tuple[str | None, str]:
        return rule.subdomain, rule.rule.rstrip("/")

    rules = [rule for rule in routes.iter_rules() if rule.methods is None or "GET" in rule.methods]
    ours = {place(rule) for rule in rules if rule.endpoint.startswith(f"{NAME}.")}
    for rule in rules:
        if place(rule) in ours and not rule.endpoint.startswith(f"{NAME}.") and rule.endpoint not in told:
            told.add(rule.endpoint)
            _log.warning(
                "GET %s is a path of sse_batcher, and your endpoint %r has it, too: the one that was registered first "
                "answers. Set SSE_URL_PREFIX to another path, or move yours.",
                rule.rule,
                rule.endpoint,
            )


def _warn_of_processes(environ: Mapping[str, Any], told: bool) -> None:
    if environ.get("wsgi.multiprocess") and not told:
        _log.warning(
            "this server runs several processes, and each reaches its own clients only: run one process with threads, "
            'or set SSE_BACKEND ("redis://..." for all of them, "memory://" if that is what you want)'
        )
