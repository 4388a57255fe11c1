"""The blueprint: the routes below `SSE_URL_PREFIX`.

Request threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

from flask import Blueprint, Response, abort, current_app, has_request_context, jsonify, request
from flask.blueprints import BlueprintSetupState
from werkzeug.routing import Map, Rule

from ..browser import SCRIPT_NAME
from ..errors import BackendError, InvalidEventError
from ..event import DEFAULT_CHANNEL, check_channels
from ..manager import SSEManager
from ..manager_state import process_of
from ..reasons import RefusalReason
from ..runtime.log_fields import log_fields
from ..wsgi import health
from .access import Access
from .monitor import MonitorViews
from .request_notes import RequestNotes
from .response import Responder, abort_unless, script_response
from .signing import Tokens

_log = logging.getLogger("sse_batcher.blueprint")

NAME = "sse_batcher"
SCRIPT_ENDPOINT = f"{NAME}.script"
STREAM_ENDPOINT = f"{NAME}.stream"
_REFUSALS: dict[int, RefusalReason] = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.UNAUTHORIZED: "unauthorized",
    HTTPStatus.FORBIDDEN: "forbidden",
}
_HOST = "sse_host"
"""The variable part of our rules that stands for any host, in apps with host matching."""


class Route(NamedTuple):
    """A route below the prefix."""

    path: str
    endpoint: str
    """Its name in the blueprint."""
    view: Callable[..., Response]
    methods: tuple[str, ...] = ("GET",)


class Views:
    """The views of one app, without those of the monitor."""

    def __init__(
        self, manager: SSEManager, access: Access, responder: Responder, notes: RequestNotes, tokens: Tokens
    ) -> None:
        self._manager = manager
        self._access = access
        self._responder = responder
        self._notes = notes
        self._tokens = tokens

    def stream(self) -> Response:
        """The stream of the channels in the query, ``?channel=a&channel=b``; of ``default`` if it names none.

        ``?token=`` is a signed token, which stands for `authorize` and `identify`.
        """
        try:
            # Parsing takes 5 µs also if there is nothing to parse.
            named = request.args.getlist("channel") if request.environ.get("QUERY_STRING") else ()
            asked = check_channels(named, may_be_none=True)
        except InvalidEventError as error:
            abort(400, str(error))
        ticket = self._notes.ticket()
        try:
            grant = self._tokens.of_request()
        except BackendError:
            return self._responder.busy("backend")
        if grant is not None:
            return self._responder.respond(grant.granted(asked), grant.user, ticket)
        channels = self._access.granted(asked or (DEFAULT_CHANNEL,))
        if not channels:
            abort(403)
        return self._responder.respond(channels, self._access.user(), ticket)

    def script(self) -> Response:
        """The module for browsers, for any client, also from other origins. ``?v=`` names its version."""
        return script_response()

    def health(self) -> Response:
        """JSON that says whether this process can serve streams: 200, or 503 with the reason. For monitoring.

        Any client may ask for the health, so each answer must cost no more than a small page.
        """
        return self._health(None)

    def live(self) -> Response:
        """JSON that says whether the threads of the library work: 200, or 503. Then only a restart helps."""
        return self._health("live")

    def ready(self) -> Response:
        """JSON that says whether this process should get new requests: 200, also without Redis, or 503."""
        return self._health("ready")

    def stats(self) -> Response:
        """The counters of this process, as JSON, if `allow_stats` lets this request see them."""
        abort_unless(self._access.shows_stats())
        return _uncached(jsonify(self._manager.get_stats().as_dict()))

    def _health(self, check: Literal["live", "ready"] | None) -> Response:
        status, headers, body = health(self._manager, request.environ, check)
        return current_app.response_class(body, status=status, headers=headers)

    def note_ticket(self, endpoint: str | None, values: object) -> None:
        """Called before the app's before-request functions: `authorize` may go by a user that they look up."""
        if endpoint == STREAM_ENDPOINT:
            self._notes.wait_for_ticket()

    def allow_origin(self, response: Response) -> Response:
        """Called after each request for a stream. Refusals of a stream can be read by other origins, too."""
        self._count_refusal(response.status_code)
        return self._responder.allow_origin(response)

    def _count_refusal(self, status: int) -> None:
        """Count a request that got no stream. With 200, there is a stream, or ``sse_busy``, which is counted."""
        # Here, and not in the view: functions of the app may have answered before it.
        if status >= HTTPStatus.MULTIPLE_CHOICES:
            process_of(self._manager).refusals.add(_REFUSALS.get(status, "other"))


def create_blueprint(views: Views, monitor: MonitorViews, url_prefix: str) -> Blueprint:
    """Make the blueprint of one app. `url_prefix` has no slash at its end, and is empty for the root."""
    blueprint = Blueprint(NAME, __name__, url_prefix=url_prefix or None)
    routes = [
        Route("/", "stream", views.stream),
        Route(f"/{SCRIPT_NAME}", "script", views.script),
        Route("/health", "health", views.health),
        Route("/health/live", "live", views.live),
        Route("/health/ready", "ready", views.ready),
        Route("/stats", "stats", views.stats),
        Route("/monitor", "monitor", monitor.monitor),
        Route("/monitor/data", "monitor_data", monitor.monitor_data),
        Route("/monitor/kick", "monitor_kick", monitor.monitor_kick, ("POST",)),
        Route("/monitor/<name>", "monitor_file", monitor.monitor_file),
    ]
    _add_routes(blueprint, [Route("", "stream", views.stream), *routes] if url_prefix else routes)
    blueprint.url_value_preprocessor(views.note_ticket)

    @blueprint.after_request
    def finish(response: Response) -> Response:
        endpoint = request.endpoint or ""
        if endpoint == STREAM_ENDPOINT:
            return views.allow_origin(response)
        return monitor.secure(response) if endpoint.startswith(f"{NAME}.monitor") else response

    return blueprint


def _uncached(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response


def _add_routes(blueprint: Blueprint, routes: list[Route]) -> None:
    """Add these routes when the blueprint is registered.

    In an app that matches hosts, a rule without a host matches no request at all. There, our rules get any host, as a
    variable part that the views do not see and that `url_for` takes from the request.
    """

    @blueprint.record
    def add(state: BlueprintSetupState) -> None:
        host = f"<{_HOST}>" if state.app.url_map.host_matching else None
        for route in routes:
            state.add_url_rule(route.path, route.endpoint, route.view, methods=route.methods, host=host)

    @blueprint.url_value_preprocessor
    def take_host_out(endpoint: str | None, values: dict[str, Any] | None) -> None:
        if values:
            values.pop(_HOST, None)

    @blueprint.url_defaults
    def put_host_in(endpoint: str, values: dict[str, Any]) -> None:
        if current_app.url_map.host_matching:
            values.setdefault(_HOST, request.host if has_request_context() else current_app.config["SERVER_NAME"])


class Collisions:
    """Finds endpoints of the app that have a path of ours: only one of the two can answer."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def log(self, routes: Map) -> None:
        """Warn of each endpoint that collides, once."""
        rules = [rule for rule in routes.iter_rules() if rule.methods is None or "GET" in rule.methods]
        ours = {_place(rule) for rule in rules if rule.endpoint.startswith(f"{NAME}.")}
        for rule in rules:
            if rule.endpoint.startswith(f"{NAME}.") or _place(rule) not in ours or rule.endpoint in self._logged:
                continue
            self._logged.add(rule.endpoint)
            _log.warning(
                "GET %s is a path of sse_batcher, and your endpoint %r has it, too: the one that was registered first "
                "answers. Set SSE_URL_PREFIX to another path, or move yours.",
                rule.rule,
                rule.endpoint,
                extra=log_fields("path_taken", path=rule.rule, endpoint=rule.endpoint),
            )


def _place(rule: Rule) -> tuple[str | None, str]:
    return rule.subdomain, rule.rule.rstrip("/")
