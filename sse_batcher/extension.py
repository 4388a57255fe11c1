"""`SSE`: the Flask extension.

Any thread. An app owns its manager; the extension knows its apps weakly.
"""

from __future__ import annotations

import difflib
import json
import logging
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from flask import Flask, current_app, has_app_context

from .blueprint import NAME, create_blueprint
from .commands import create_commands
from .cors import Cors
from .errors import ConfigurationError
from .event import DEFAULT_CHANNEL, Encode, check_channel, encode_json, json_encoder
from .manager import SSEManager
from .options import (
    BATCH_OPTION_NAMES,
    CLIENT_OPTION_NAMES,
    HISTORY_OPTION_NAMES,
    BatchOptions,
    ClientOptions,
    HistoryOptions,
    batch_options,
)
from .page import add_page_cursor
from .process import require_threads
from .rights import Ask

_log = logging.getLogger("sse_batcher.extension")

Authorize = Callable[[tuple[str, ...]], "Iterable[str] | None"]
A = TypeVar("A", bound=Authorize)
TakeState = Callable[[], "tuple[str, Any]"]
S = TypeVar("S", bound=TakeState)
F = TypeVar("F", bound=Callable[..., Any])

PREFIX = "SSE_"
_OWN = ("batching", "backend", "url_prefix", "cors_origins")
KEYS = tuple(
    PREFIX + name.upper() for name in (*BATCH_OPTION_NAMES, *CLIENT_OPTION_NAMES, *HISTORY_OPTION_NAMES, *_OWN)
)
"""Those of all options, and `SSE_BATCHING`, `SSE_BACKEND`, `SSE_URL_PREFIX`, `SSE_CORS_ORIGINS`."""


class SSE:
    """Server-Sent Events for a Flask app.

    ``sse = SSE(app)``, or ``sse = SSE()`` and later ``sse.init_app(app)``; both read the config once and register the
    blueprint. After that `enqueue` may be called from any thread, with or without an app context.

    Inside an app context it means that app's manager; outside, the only app's. With more than one app alive, a thread
    takes `manager` inside a context and keeps it.
    """

    def __init__(self, app: Flask | None = None) -> None:
        self._managers: weakref.WeakKeyDictionary[Flask, SSEManager] = weakref.WeakKeyDictionary()
        self._functions: dict[str, Callable[..., Any]] = {}  # what the app has registered, by the decorator's name
        self._snapshots: dict[str, TakeState] = {}
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give the app a manager, configured by its `SSE_` keys, and the stream at `SSE_URL_PREFIX` (``/events``).

        Raises `ConfigurationError` naming the key for a value that cannot be meant and for a key that looks like a
        misspelling, and `RuntimeError` where the app has an `SSE` already.
        """
        if NAME in app.extensions:
            raise RuntimeError("this app has an SSE already: create one SSE and call init_app() once for each app")
        require_threads()
        prefix = _url_prefix(app.config)
        with _naming_keys():
            cors = Cors(app.config.get("SSE_CORS_ORIGINS", ()))
        self._managers[app] = _manager(app, self._functions.get("revalidate"))
        app.extensions[NAME] = self
        app.register_blueprint(create_blueprint(self, prefix, cors))
        app.cli.add_command(create_commands(self))
        add_page_cursor(app, self._managers[app], told="SSE_BACKEND" in app.config)

    @property
    def manager(self) -> SSEManager:
        """The `SSEManager` of the current app, or of the only one. `RuntimeError` where that is not clear."""
        if has_app_context():
            manager = self._managers.get(current_app._get_current_object())  # type: ignore[attr-defined]
            if manager is None:
                raise RuntimeError("the current app does not know this SSE: call sse.init_app(app) when it is created")
            return manager
        managers = list(self._managers.values())
        if len(managers) != 1:
            raise RuntimeError(
                f"there is no app context, and {len(managers)} apps have this SSE: take sse.manager inside an app "
                f"context and pass it on to the thread"
            )
        return managers[0]

    def enqueue(self, event_type: str, data: Any, *, channel: str = DEFAULT_CHANNEL) -> None:
        """Send an event to the clients of one channel. See `SSEManager.enqueue`."""
        self.manager.enqueue(event_type, data, channel=channel)

    def broadcast(self, event_type: str, data: Any) -> None:
        """Send an event to all clients. See `SSEManager.broadcast`."""
        self.manager.broadcast(event_type, data)

    def cursor(self) -> str:
        """Where the history of the current app's manager stands. See `SSEManager.cursor`."""
        return self.manager.cursor()

    def kick(self, *, user: Hashable = None, channel: str | None = None) -> None:
        """End the streams of a user, or of a channel, or of both at once. See `SSEManager.kick`."""
        self.manager.kick(user=user, channel=channel)

    def snapshot(self, channel: str) -> Callable[[S], S]:
        """Register the function that gives the state of a channel. A decorator.

        ``function()`` returns ``(event_type, data)``. It is called in the view when a client begins anew on this
        channel, or returns after it has missed something; the client gets this event first, and then everything that
        was delivered since just before the call. If it raises, that is logged and the client told to come back;
        ``abort()`` refuses it for good.
        """
        name = check_channel(channel)

        def register(function: S) -> S:
            if name in self._snapshots:
                raise RuntimeError(f"{self._snapshots[name]!r} gives the state of channel {name!r} already")
            self._snapshots[name] = function
            return function

        return register

    def authorize(self, function: A) -> A:
        """Register the function that says who may see which channels. A decorator.

        ``function(channels)`` is asked in the view, at every connect, with the names asked for, ``default`` included.
        It returns those that this request may have, or aborts. A subset is served, none (or None) is 403, and a name
        that was not asked for is a `RuntimeError`. Without a function only ``default`` is served, to everybody.
        """
        return self._register("authorize", function)

    def identify(self, function: F) -> F:
        """Register the function that says whose stream it is. A decorator.

        ``function()`` is asked in the view, at every connect, and returns a name or a number, None for nobody. It is
        what `kick` and `revalidate` go by, and ``SSE_MAX_CLIENTS_PER_USER``.
        """
        return self._register("identify", function)

    def revalidate(self, function: F) -> F:
        """Register the function that says whether a user may keep his streams. A decorator.

        ``function(user)`` is asked every ``SSE_REVALIDATE_EVERY`` seconds about each user with a stream, one at a time,
        on a thread of its own in an app context without a request. It returns True or False; False ends his streams,
        and `authorize` decides when they come back. If it raises, that is logged, and he keeps them until then.
        """
        self._register("revalidate", function)
        for manager in self._managers.values():
            manager.revalidate = function
        return function

    def allow_stats(self, function: F) -> F:
        """Register the function that says who may see the counters, at ``/events/stats``. A decorator.

        ``function()`` is asked in the view, and returns True or False. Without one there is no such page.
        """
        return self._register("allow_stats", function)

    def _register(self, name: str, function: F) -> F:
        # A second one is refused: which of two decides must not depend on the order of imports.
        if name in self._functions:
            raise RuntimeError(f"{self._functions[name]!r} is registered as {name} already: there can be only one")
        self._functions[name] = function
        return function

    def snapshot_of(self, channels: tuple[str, ...]) -> Callable[[], list[tuple[str, Any]]] | None:
        """What takes the state of these channels, None where no function is registered. For the blueprint."""
        functions = [self._snapshots[channel] for channel in channels if channel in self._snapshots]
        return (lambda: [function() for function in functions]) if functions else None

    def allowed(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Which of these channels the current request may have. For the blueprint."""
        authorize: Authorize | None = self._functions.get("authorize")
        if authorize is None:
            return asked if asked == (DEFAULT_CHANNEL,) else ()
        answer = tuple(authorize(asked) or ())
        foreign = [name for name in answer if name not in asked]
        if foreign:
            raise RuntimeError(f"authorize() returned {foreign!r}, which was not asked for: return some of {asked!r}")
        return answer

    def user(self) -> Hashable:
        """Whose the current request is. For the blueprint."""
        identify = self._functions.get("identify")
        if identify is not None:
            return identify()  # type: ignore[no-any-return]
        if "revalidate" in self._functions or current_app.config.get("SSE_MAX_CLIENTS_PER_USER"):
            raise RuntimeError("revalidate and SSE_MAX_CLIENTS_PER_USER need to know the users: register @sse.identify")
        return None

    def shows_stats(self) -> bool | None:
        """Whether the current request may see the counters; None: nobody may. For the blueprint."""
        allow = self._functions.get("allow_stats")
        return None if allow is None else bool(allow())


class _AppEncoder:
    """Encodes as the app's JSON provider would (datetime, UUID, Decimal, dataclass ...).

    The provider is asked for at the first event, since apps set their own after their extensions.
    """

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


def _manager(app: Flask, revalidate: Ask | None) -> SSEManager:
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
            revalidate=revalidate,
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
            _log.warning("the config key %s is none of sse_batcher's and is ignored", key)


def _url_prefix(config: Mapping[str, Any]) -> str:
    prefix = config.get("SSE_URL_PREFIX", "/events")
    if not isinstance(prefix, str) or not prefix.startswith("/"):
        raise ConfigurationError(
            f"SSE_URL_PREFIX must be a path that begins with /, not {prefix!r}", option="url_prefix"
        )
    return prefix.rstrip("/")
