"""What an `SSE` has for one app: its manager, and what answers its requests.

Any thread. The app owns its part, which has only a weak reference to it.
"""

from __future__ import annotations

import json
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flask import Flask

from ..encoding import Encode, encode_json, json_encoder
from ..manager import SSEManager
from ..monitor.overview import Monitor
from .access import Access
from .blueprint import SCRIPT_ENDPOINT, STREAM_ENDPOINT
from .config import FlaskConfig, naming_keys
from .hooks import Functions, Hooks, Revalidate
from .monitor import MonitorViews
from .request_notes import RequestNotes
from .response import Responder
from .signing import Tokens


class AppPart:
    """What an `SSE` has for one app. `shared`: the functions that were registered with the `SSE`."""

    def __init__(self, app: Flask, config: FlaskConfig, shared: Functions) -> None:
        own = Functions("an app")
        self._own = own
        self._shared = shared
        self.manager = _create_manager(app, config)
        limits_users = config.clients.max_clients_per_user is not None
        self.access = Access(own, shared, limits_users=limits_users)
        self.responder = Responder(self.manager, self.access, config.cors_origins, names_backend=config.names_backend)
        self.notes = RequestNotes(app, self.manager)
        salt = config.token_salt or app.name
        self.tokens = Tokens(app, self.manager, salt)
        monitor = Monitor(self.manager, content=config.monitor_content, addresses=config.monitor_addresses)
        self.monitor = MonitorViews(app, self.manager, self.access, monitor, salt)
        self.script_endpoint = None if config.url_prefix is None else SCRIPT_ENDPOINT
        self.stream_endpoint = None if config.url_prefix is None else STREAM_ENDPOINT
        self.hooks = Hooks(own, self.pass_on)
        self._passed_on: Revalidate | None = None
        self.pass_on()

    def pass_on(self) -> None:
        """Give the manager the `revalidate` of this app, and note whether the app has an `authorize` of its own."""
        revalidate = self.access.revalidate()
        if revalidate is not self._passed_on:  # otherwise, the app may have set one of the manager itself
            self.manager.revalidate = self._passed_on = revalidate
        if self._own.authorize.function is not None:
            self._shared.is_divided = True


class _AppEncoder:
    """Encodes as the app's JSON provider would (datetime, UUID, Decimal, dataclass ...).

    The provider is looked up at the first event, since apps set their own after their extensions.
    """

    is_trusted = True
    """For `encoding.checked`: all of its text is made by an encoder of ours."""

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
        # A provider of another kind (orjson ...) does everything in its own way.
        return lambda data: encode_json(json.loads(provider.dumps(data)))


def _create_manager(app: Flask, config: FlaskConfig) -> SSEManager:
    app_ref = weakref.ref(app)

    def context() -> AbstractContextManager[object]:
        app = app_ref()
        return nullcontext() if app is None else app.app_context()

    with naming_keys():
        return SSEManager(
            batching=config.batching,
            clients=config.clients,
            backend=config.backend,
            history=config.history,
            encode=_AppEncoder(app_ref),
            context=context,
        )
