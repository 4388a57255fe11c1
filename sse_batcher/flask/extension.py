"""`SSE`: the Flask extension.

Any thread. An app owns its manager; the extension knows its apps weakly.
"""

from __future__ import annotations

import difflib
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from flask import Flask, current_app, has_app_context
from werkzeug.local import LocalProxy

from ..errors import ConfigurationError
from ..event import DEFAULT_CHANNEL, NOT_GIVEN, Encode, NotGiven, encode_json, json_encoder
from ..manager import SSEManager
from ..options import (
    BATCH_OPTION_NAMES,
    CLIENT_OPTION_NAMES,
    HISTORY_OPTION_NAMES,
    BatchOptions,
    ClientOptions,
    HistoryOptions,
    batch_options,
)
from ..runtime.process import require_threads
from .blueprint import NAME, create_blueprint
from .cli import create_commands
from .cors import Cors
from .hooks import AppHooks, Hooks
from .page_cursor import add_page_cursor

_log = logging.getLogger("sse_batcher.extension")

F = TypeVar("F", bound=Callable[..., Any])

PREFIX = "SSE_"
_OWN = ("batching", "backend", "url_prefix", "cors_origins")
KEYS = tuple(
    PREFIX + name.upper() for name in (*BATCH_OPTION_NAMES, *CLIENT_OPTION_NAMES, *HISTORY_OPTION_NAMES, *_OWN)
)
"""Those of all options, and `SSE_BATCHING`, `SSE_BACKEND`, `SSE_URL_PREFIX`, `SSE_CORS_ORIGINS`."""
_UNKNOWN_KEY = "the config key %s is none of sse_batcher's and is ignored"


class SSE(Hooks):
    """Server-Sent Events for a Flask app.

    ``sse = SSE(app)``, or ``sse = SSE()`` and later ``sse.init_app(app)``; both read the config once and register the
    blueprint. After that `enqueue` may be called from any thread, with or without an app context.

    Inside an app context it means that app's manager; outside, the only app's. With more than one app alive, a thread
    takes `manager` inside a context and keeps it.

    Its decorators register functions for all apps that have this SSE, those that come later, too. `for_app` has the
    same decorators for one app.
    """

    _one_for = (
        "all apps of this SSE. If each app has its own, as in an application factory, register it with "
        "@sse.for_app(app)"
    )

    def __init__(self, app: Flask | None = None) -> None:
        super().__init__()
        # An app keeps its hooks alive, through its routes. Here they are known weakly: the functions may know the app,
        # and so it would never be collected.
        self._apps: weakref.WeakKeyDictionary[Flask, weakref.ref[AppHooks]] = weakref.WeakKeyDictionary()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give the app a manager, configured by its `SSE_` keys, and the stream at `SSE_URL_PREFIX` (``/events``).

        The keys are read here, and not later: if one has changed by the app's first request, the log says so.

        Raises `ConfigurationError` naming the key for a value that cannot be meant and for a key that looks like a
        misspelling, and `RuntimeError` where the app has an `SSE` already.
        """
        app = _real(app)
        if NAME in app.extensions:
            raise RuntimeError("this app has an SSE already: create one SSE and call init_app() once for each app")
        require_threads()
        prefix = _url_prefix(app.config)
        with _naming_keys():
            cors = Cors(app.config.get("SSE_CORS_ORIGINS", ()))
        limits_users = app.config.get("SSE_MAX_CLIENTS_PER_USER") is not None
        hooks = AppHooks(self, _manager(app), limits_users=limits_users)
        keys = _KeysRead(app.config)
        self._apps[app] = weakref.ref(hooks)
        app.extensions[NAME] = self
        app.register_blueprint(create_blueprint(hooks, prefix, cors, told="SSE_BACKEND" in keys))
        app.cli.add_command(create_commands(hooks, keys.compare_once))
        add_page_cursor(app, hooks.manager, told="SSE_BACKEND" in keys)
        _at_first_request(app, keys.compare_once)

    def for_app(self, app: Flask) -> Hooks:
        """Return the decorators for one app that `init_app` has seen, such as ``@sse.for_app(app).authorize``.

        Its functions count for this app alone, and before those of the SSE. If an app has its own `authorize`, every
        other app of this SSE needs one, too, or its streams are a `RuntimeError`.
        """
        return self._hooks_of(_real(app))

    @property
    def manager(self) -> SSEManager:
        """The `SSEManager` of the current app, or of the only one. `RuntimeError` where that is not clear."""
        if has_app_context():
            return self._hooks_of(_real(current_app)).manager
        alive = self._alive()
        if not alive:
            raise RuntimeError("no app has this SSE: call sse.init_app(app) first")
        if len(alive) != 1:
            raise RuntimeError(
                f"there is no app context, and {len(alive)} apps have this SSE: take sse.manager inside an app "
                f"context and pass it on to the thread"
            )
        return alive[0].manager

    def enqueue(self, event_type: str, data: Any, *, channel: str = DEFAULT_CHANNEL) -> None:
        """Send an event to the clients of one channel. See `SSEManager.enqueue`."""
        self.manager.enqueue(event_type, data, channel=channel)

    def broadcast(self, event_type: str, data: Any) -> None:
        """Send an event to all clients. See `SSEManager.broadcast`."""
        self.manager.broadcast(event_type, data)

    def cursor(self) -> str:
        """Where the history of the current app's manager stands. See `SSEManager.cursor`."""
        return self.manager.cursor()

    def kick(self, *, user: str | int | NotGiven = NOT_GIVEN, channel: str | NotGiven = NOT_GIVEN) -> int:
        """End the streams of a user, or of a channel, or of a user in a channel. See `SSEManager.kick`.

        Returns how many streams of this process end by it.
        """
        return self.manager.kick(user=user, channel=channel)

    def revalidate(self, function: F) -> F:
        """Register the function that says whether a user may keep the open streams. See `Hooks.revalidate`."""
        super().revalidate(function)
        for hooks in self._alive():
            hooks.pass_on_revalidate()
        return function

    def _alive(self) -> list[AppHooks]:
        return [hooks for reference in list(self._apps.values()) if (hooks := reference()) is not None]

    def _hooks_of(self, app: Flask) -> AppHooks:
        reference = self._apps.get(app)
        hooks = None if reference is None else reference()
        if hooks is None:
            raise RuntimeError(
                f"the app {app.name!r} does not know this SSE: call sse.init_app(app) when it is created"
            )
        return hooks


def _at_first_request(app: Flask, function: Callable[[], None]) -> None:
    """Call this in the first request of the app, for whatever page: a late SSE_URL_PREFIX makes the stream's a 404."""

    def call() -> None:
        function()
        # Then no request pays for it. Another list, since other requests may be walking through this one.
        functions = current_app.before_request_funcs
        functions[None] = [each for each in functions[None] if each is not call]

    app.before_request_funcs.setdefault(None, []).insert(0, call)


def _real(app: Flask) -> Flask:
    """The app itself, if this is `current_app`."""
    return app._get_current_object() if isinstance(app, LocalProxy) else app


class _KeysRead:
    """The `SSE_` keys that an app had when they were read, and whether they are the same at its first request."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._read: dict[str, Any] = _own_keys(config)
        self._compared = False

    def __contains__(self, key: str) -> bool:
        return key in self._read

    def compare_once(self) -> None:
        """Say in the log what has changed in the current app; only the first call does."""
        if not self._compared:
            self._compared = True  # by two threads at once twice: a harmless race
            self._compare(_own_keys(current_app.config))

    def _compare(self, now: Mapping[str, Any]) -> None:
        for key in sorted(self._read.keys() | now.keys()):
            if key in self._read and key in now and (key not in KEYS or _same(self._read[key], now[key])):
                continue
            close = [] if key in KEYS else difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
            if key in KEYS or close:
                _log.error(
                    "the config key %s was %s after SSE(app) or init_app(app) had read the config, and that has no "
                    "effect: set %s before",
                    key,
                    "removed" if key not in now else "changed" if key in self._read else "set",
                    close[0] if close else "it",
                )
            elif key in now:
                _log.warning(_UNKNOWN_KEY, key)


class _AppEncoder:
    """Encodes as the app's JSON provider would (datetime, UUID, Decimal, dataclass ...).

    The provider is asked for at the first event, since apps set their own after their extensions.
    """

    is_trusted = True
    """For `event.checked`: all of its text is made by an encoder of ours."""

    def __init__(self, app: weakref.ref[Flask]) -> None:
        self._app = app
        self._encode: Encode | None = None

    def __call__(self, data: Any) -> str:
        if self._encode is None:
            self._encode = self._find()
        return self._encode(data)

    def _find(self) -> Encode:
        app = self._app()
        if app is None:
            return encode_json
        provider = app.json
        default = getattr(provider, "default", None)
        if default is not None:
            return json_encoder(default)
        # A provider of another kind (orjson ...) has its own idea of everything.
        return lambda data: encode_json(json.loads(provider.dumps(data)))


def _manager(app: Flask) -> SSEManager:
    config = app.config
    _check_keys(config)
    app_ref = weakref.ref(app)

    def context() -> AbstractContextManager[object]:
        app = app_ref()
        return nullcontext() if app is None else app.app_context()

    with _naming_keys():
        return SSEManager(
            _batching(config),
            ClientOptions(**_set_options(CLIENT_OPTION_NAMES, config)),
            config.get("SSE_BACKEND", "memory://"),
            history=HistoryOptions(**_set_options(HISTORY_OPTION_NAMES, config)),
            encode=_AppEncoder(app_ref),
            context=context,
        )


def _batching(config: Mapping[str, Any]) -> BatchOptions:
    given = _set_options(BATCH_OPTION_NAMES, config)
    batching = config.get("SSE_BATCHING", True)
    if isinstance(batching, BatchOptions):
        both = given
    elif isinstance(batching, Mapping):
        both = {name: value for name, value in given.items() if name in {"batch_window", "max_batch_size"}}
    else:
        both = {}
    for name in both:
        raise ConfigurationError(f"SSE_BATCHING and {_key(name)} both say how to batch: keep one of them")
    return batch_options(batching, BatchOptions(**given))


def _key(option: str) -> str:
    return PREFIX + option.upper()


def _set_options(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[_key(name)] for name in names if _key(name) in config}


@contextmanager
def _naming_keys() -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        if error.option is None:
            raise
        raise ConfigurationError(f"{_key(error.option)}: {error}", option=error.option) from error


def _check_keys(config: Mapping[str, Any]) -> None:
    for key in config:
        if key.startswith(PREFIX) and key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
            if close:
                raise ConfigurationError(f"there is no config key {key}: did you mean {close[0]}?")
            _log.warning(_UNKNOWN_KEY, key)


def _own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with our prefix. Containers are copied, so that a change inside of one shows."""
    return {key: _copied(value) for key, value in list(config.items()) if key.startswith(PREFIX)}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return type(value)(value) if type(value) in (list, set) else value


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


def _url_prefix(config: Mapping[str, Any]) -> str:
    prefix = config.get("SSE_URL_PREFIX", "/events")
    if not isinstance(prefix, str) or not prefix.startswith("/"):
        raise ConfigurationError(
            f"SSE_URL_PREFIX must be a path that begins with /, not {prefix!r}", option="url_prefix"
        )
    return prefix.rstrip("/")
