"""A site with a monitor, for real browsers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, Response, request

from sse_batcher import SSE, Client
from sse_batcher.cli import serving
from sse_batcher.manager_state import process_of
from sse_batcher.streams.opening import StreamRequest

from .waiting import TIMEOUT


class Site:
    """An app whose monitor all may see and use: nothing but its own protection is in the way."""

    def __init__(self) -> None:
        self.app = Flask("site", static_folder=None)
        self.app.config.update(SECRET_KEY="secret", SSE_MONITOR_CONTENT=True, SSE_BATCHING=False)
        self.sse = SSE(self.app)
        self.manager = self.sse.manager
        self.sse.allow_monitor(lambda: True)
        self.sse.allow_kick(lambda: self.may_kick)
        self.may_kick = True
        self.kicks: list[int] = []
        """The statuses of the answers to kicks."""
        self.data = 0
        """How often a page has asked for data."""
        self.port = 0
        self.app.after_request(self._note)

    def _note(self, response: Response) -> Response:
        if request.path == "/events/monitor/kick" and request.method != "OPTIONS":
            self.kicks.append(response.status_code)
        self.data += request.path == "/events/monitor/data"
        return response

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/events/monitor"

    def open(self, user: Any = None, *channels: str, address: str = "10.0.0.7") -> Client:
        """A stream that has begun."""
        process = process_of(self.manager)
        stream = process.subscribe(StreamRequest(channels or ("default",), user=user, address=address))
        next(stream)
        return stream


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr("sse_batcher.monitor.overview.MIN_SECONDS", 0.1)
    monkeypatch.setattr("sse_batcher.monitor.overview.SHARED_SECONDS", 0.0)
    monkeypatch.setattr("sse_batcher.monitor.overview.REST", 1)
    site = Site()
    with serving(site.app) as (_, port):
        site.port = port
        yield site
    assert site.manager.shutdown(TIMEOUT)
