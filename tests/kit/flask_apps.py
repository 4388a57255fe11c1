"""Flask apps with the extension, what they answer, and the name of the extension's logger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from werkzeug.test import TestResponse

from sse_batcher import SSE

from .sse_parser import ServerEvent, take_events
from .waiting import TIMEOUT

LOGGER = "sse_batcher.extension"
MakeApp = Callable[..., tuple[Flask, SSE]]


def apps_fixture() -> Any:
    """A fixture for a test module: makes an app and its extension, or adds an app to one.

    All managers are shut down at the end.
    """

    @pytest.fixture
    def make_app() -> Iterator[MakeApp]:
        managers = []

        def make(sse: SSE | None = None, name: str = "app", **config: Any) -> tuple[Flask, SSE]:
            app = Flask(name, static_folder=None)
            app.config.update(config)
            sse = sse or SSE()
            sse.init_app(app)
            with app.app_context():
                managers.append(sse.manager)
            return app, sse

        yield make
        for manager in managers:
            assert manager.shutdown(TIMEOUT)

    return make_app


def get(app: Flask, path: str = "/events", **options: Any) -> TestResponse:
    return app.test_client().get(path, **options)


def status(app: Flask, path: str = "/events", **options: Any) -> int:
    with get(app, path, **options) as response:
        return response.status_code


def read(response: TestResponse, count: int) -> list[ServerEvent]:
    """The next events of a stream."""
    return take_events(response.response, count)
