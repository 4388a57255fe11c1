"""`SSE`: the Flask extension.

Any thread. An app owns its manager; the extension has weak references to its apps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, current_app, has_app_context, has_request_context, request
from werkzeug.local import LocalProxy

from ..after_commit import AfterCommit, Send
from ..errors import UsageError
from ..event import DEFAULT_CHANNEL, NOT_GIVEN, NotGiven, User, check_channels, check_user
from ..manager import SSEManager
from ..runtime.process import require_threads
from .app_part import AppPart
from .blueprint import NAME, Collisions, Views, create_blueprint
from .cli import create_commands
from .config import KeysAtStart, read_config
from .hooks import Functions, Hooks
from .page_functions import add_page_functions, script_url, stream_url
from .signing import DEFAULT_TTL

if TYPE_CHECKING:
    from ..after_commit import AnySession


class SSE(Hooks):
    """Server-Sent Events for a Flask app.

    ``sse = SSE(app)``, or ``sse = SSE()`` and later ``sse.init_app(app)``. Both read the config once and register the
    blueprint. After that, `enqueue` may be called from any thread, with or without an app context.

    Inside an app context, the methods use that app's manager; outside, the manager of the only app. If several apps
    are alive, a thread needs a `manager` that was taken inside a context.

    Its decorators register functions for all apps of this SSE, also for apps that come later. `for_app` has the same
    decorators for one app. Each decorator returns the function as it is. It raises `InvalidFunctionError` for what
    cannot be called or is async, and `UsageError` for a second function: which of two decides must not depend on the
    order of imports. The same function again changes nothing.

    All methods are thread-safe.
    """

    def __init__(self, app: Flask | None = None) -> None:
        functions = Functions(
            "all apps of this SSE. If each app has its own, as in an application factory, register it with "
            "@sse.for_app(app)"
        )
        super().__init__(functions, self._pass_on_all)
        # Weak references: the app keeps its part alive. With strong ones, an app that its part refers to would stay
        # alive as long as this object.
        self._parts: weakref.WeakKeyDictionary[Flask, weakref.ref[AppPart]] = weakref.WeakKeyDictionary()
        if app is not None:
            self.init_app(app)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} apps={[app.name for app in list(self._parts)]}>"

    def init_app(self, app: Flask) -> None:
        """Give the app a manager and the stream at `SSE_URL_PREFIX` (``/events``). Reads the app's `SSE_` keys.

        They are not read again. If one has changed by the app's first request, the log says so. If `SSE_URL_PREFIX` is
        None, the app gets no routes; views of its own return `response`.

        Raises `ConfigurationError`, which names the key, for an invalid value and for a key that looks misspelled, and
        `UsageError` if the app has an `SSE` already.
        """
        app = _real(app)
        if NAME in app.extensions:
            raise UsageError("this app has an SSE already: create one SSE and call init_app() once for each app")
        require_threads()
        config = read_config(app.config)
        part = AppPart(app, config, self._functions)
        self._parts[app] = weakref.ref(part)
        app.extensions[NAME] = self
        app.extensions[f"{NAME}.part"] = part  # keeps it alive
        keys = KeysAtStart(app.config)
        if config.url_prefix is not None:
            views = Views(part.manager, part.access, part.responder, part.notes, part.tokens)
            app.register_blueprint(create_blueprint(views, part.monitor, config.url_prefix))
            collisions = Collisions()
            collisions.log(app.url_map)
            _at_first_request(app, lambda: collisions.log(current_app.url_map))  # then all routes are there
        app.cli.add_command(create_commands(part.manager, part.tokens, lambda: keys.compare_once(current_app.config)))
        add_page_functions(
            app,
            part.notes,
            part.tokens,
            names_backend=config.names_backend,
            script_endpoint=part.script_endpoint,
            stream_endpoint=part.stream_endpoint,
        )
        _at_first_request(app, lambda: keys.compare_once(current_app.config))

    def for_app(self, app: Flask) -> Hooks:
        """Return the decorators for one app that `init_app` has seen, such as ``@sse.for_app(app).authorize``.

        Functions that they register are for this app alone, and are called instead of those of the SSE. If an app has
        its own `authorize`, every other app of this SSE needs one, too, or its streams are a `UsageError`.
        """
        return self._part_of(_real(app)).hooks

    @property
    def manager(self) -> SSEManager:
        """The `SSEManager` of the current app, or of the only one. `UsageError` if that is not clear."""
        return self._current_part().manager

    def enqueue(
        self,
        event_type: str,
        data: Any,
        *,
        channel: str | NotGiven = NOT_GIVEN,
        key: str | int | None = None,
        user: User | Sequence[User] | AbstractSet[User] | NotGiven = NOT_GIVEN,
    ) -> None:
        """Send an event to the clients of one channel, or to all streams of a user. See `SSEManager.enqueue`.

        `user` is a user as `identify` returns it, or several.
        """
        self.manager.enqueue(event_type, data, channel=channel, key=key, user=user)

    def broadcast(self, event_type: str, data: Any, *, key: str | int | None = None) -> None:
        """Send an event to all clients. See `SSEManager.broadcast`."""
        self.manager.broadcast(event_type, data, key=key)

    def after_commit(self, session: AnySession) -> AfterCommit:
        """Return what sends events when the transaction of a SQLAlchemy session commits. See `AfterCommit`.

        `session` is a ``Session``, or a ``scoped_session`` such as ``db.session`` of Flask-SQLAlchemy. The app is that
        of each call of `enqueue`; the commit needs no app context.

        >>> order.state = "paid"
        >>> sse.after_commit(db.session).enqueue("order", {"id": order.id, "state": "paid"}, key=order.id)
        >>> db.session.commit()
        """

        def hold(event_type: str, data: Any, **options: Any) -> Send:  # looks for the manager now, in the app's context
            return self.manager._hold(event_type, data, **options)

        return AfterCommit(session, hold)

    def cursor(self) -> str:
        """Return where the history of the current app's manager stands. See `SSEManager.cursor`."""
        return self.manager.cursor()

    def script_url(self) -> str:
        """Return the URL of the module for browsers, ``sse-batcher.js``, with its version.

        `sse_script_url()` does the same in templates. The URL is made by `url_for`, so this needs an app context, and
        outside a request the config key `SERVER_NAME`, too. Raises `UsageError` if `SSE_URL_PREFIX` is None, because
        the app then has no such route.
        """
        return script_url(self._part_of(_real(current_app)).script_endpoint)

    def sign(
        self,
        channels: Iterable[str] = (DEFAULT_CHANNEL,),
        *,
        user: str | int | NotGiven = NOT_GIVEN,
        ttl: float = DEFAULT_TTL,
    ) -> str:
        """Return a token that grants the stream of these channels, and of this user, to any client that has it.

        The token begins with ``sse1.`` and comes with a request as ``?token=`` or in the header ``Authorization:
        Bearer``. It replaces `authorize` and `identify`, which are not called. A client that names channels must name
        some of the token's; one that names none gets all of them. `revalidate` is asked at each opening.

        `channels`
            1 to 100 channels. A token with a user may have none.
        `user`
            Whose stream it is, as `identify` returns it. If it is left out, the stream belongs to no user, and the
            token cannot be revoked. `kick` with this user refuses all tokens that were made for this user before.
        `ttl`
            Seconds in which the token opens streams, at most a week.

        The token is signed with the app's `SECRET_KEY`. Those that were signed with a key of `SECRET_KEY_FALLBACKS` are
        valid, too. With the memory backend, a token with a user is not valid after a restart, because kicks are
        forgotten then. May wait for Redis, a few seconds at most.

        Raises `InvalidEventError` for invalid channels or an invalid user, such as None, and `UsageError` for an
        invalid `ttl`, and if there is no `SECRET_KEY`.

        >>> token = sse.sign(["team-7"], user=7, ttl=60)
        """
        return self._current_part().tokens.sign(channels, user, ttl)

    def url(
        self,
        channels: Iterable[str] = (DEFAULT_CHANNEL,),
        *,
        user: str | int | NotGiven = NOT_GIVEN,
        ttl: float = DEFAULT_TTL,
        external: bool = False,
    ) -> str:
        """Return the URL of the stream with a token. The other arguments, and the errors, are those of `sign`.

        `sse_url()` does the same in templates. The URL is made by `url_for`; `external`: with scheme and host. Raises
        `UsageError` if `SSE_URL_PREFIX` is None, because the app then has no such route.
        """
        part = self._part_of(_real(current_app))
        return stream_url(part.stream_endpoint, part.tokens, channels, user=user, ttl=ttl, external=external)

    def kick(self, *, user: str | int | NotGiven = NOT_GIVEN, channel: str | NotGiven = NOT_GIVEN) -> int:
        """End the streams of a user, or of a channel, or of a user in a channel. See `SSEManager.kick`.

        With a user, all tokens that were made for this user before are refused from now on, in all processes, also if a
        channel is named. Returns how many streams of this process end by it.
        """
        return self.manager.kick(user=user, channel=channel)

    def response(
        self,
        channels: Iterable[str] = (DEFAULT_CHANNEL,),
        *,
        user: str | int | NotGiven | None = NOT_GIVEN,
    ) -> Response:
        """Return the stream of these channels from a view of your own, which has decided that the request may have it.

        `authorize` is not called. `user` says whose stream it is; None: it belongs to no user. If it is left out,
        `identify` is called, except for OPTIONS. All else is as in the view at ``/events``: the client says in the
        header ``Last-Event-ID``, or in the query, where it was, and ``batch=0`` if it knows no batches; snapshots,
        limits and `SSE_CORS_ORIGINS` apply. A kick ends the stream if it comes after the request has begun. GET and
        HEAD are answered; another method is 405.

        Raises `InvalidEventError` for invalid channels or an invalid user, and `UsageError` outside a request.

        >>> @app.get("/teams/<team>/events")
        ... def team_events(team):
        ...     if team not in my_teams():
        ...         abort(403)
        ...     return sse.response([team])
        """
        if not has_request_context():
            raise UsageError("sse.response() answers a request, and there is none: return it from a view")
        part = self._part_of(_real(current_app))
        ticket = part.notes.ticket()
        is_preflight = request.method == "OPTIONS"
        if is_preflight:
            user = None  # a preflight comes without cookies, so `identify` might refuse it
        elif user is NOT_GIVEN:
            user = part.access.user()
        elif user is not None:
            user = check_user(user)
        names = check_channels(channels, may_be_none=is_preflight or user is not None)
        return part.responder.allow_origin(part.responder.respond(names, user, ticket))

    def _pass_on_all(self) -> None:
        for part in self._alive():
            part.pass_on()

    def _managers(self) -> list[SSEManager]:
        """Return the managers of all apps that have this SSE, and are alive. For the testing kit."""
        return [part.manager for part in self._alive()]

    def _alive(self) -> list[AppPart]:
        return [part for reference in list(self._parts.values()) if (part := reference()) is not None]

    def _current_part(self) -> AppPart:
        if has_app_context():
            return self._part_of(_real(current_app))
        alive = self._alive()
        if not alive:
            raise UsageError("no app has this SSE: call sse.init_app(app) first")
        if len(alive) != 1:
            raise UsageError(
                f"there is no app context, and {len(alive)} apps have this SSE: take sse.manager inside an app "
                f"context and pass it on to the thread"
            )
        return alive[0]

    def _part_of(self, app: Flask) -> AppPart:
        reference = self._parts.get(app)
        part = None if reference is None else reference()
        if part is None:
            raise UsageError(f"the app {app.name!r} does not know this SSE: call sse.init_app(app) when it is created")
        return part


def _at_first_request(app: Flask, function: Callable[[], None]) -> None:
    """Call this in the app's first request, for any page: with a late SSE_URL_PREFIX, the stream's URL is a 404."""

    def call() -> None:
        function()
        # No later request pays for it. A list of its own, since other requests may be iterating over this one.
        functions = current_app.before_request_funcs
        functions[None] = [each for each in functions[None] if each is not call]

    app.before_request_funcs.setdefault(None, []).insert(0, call)


def _real(app: Flask) -> Flask:
    """The app itself, if this is `current_app`."""
    return app._get_current_object() if isinstance(app, LocalProxy) else app
