"""Streams that a test makes up for a page in Chromium, in place of those of its server."""

from __future__ import annotations

import json
import re
from typing import Any

from playwright.sync_api import Page, Route

from sse_batcher import Text

from .waiting import wait_until


class MadeUpStreams:
    """Answers the page's requests for its stream, from now on. The requests wait until a test answers them."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._requests: list[Route] = []
        self._blocks = 0
        page.route(re.compile(r"/events(\?|$)"), self._keep)

    def answer(self, *events: tuple[str, Any]) -> None:
        """Answer the oldest request, or the next one, with these events. Then the stream ends."""
        wait_until(self._is_asked, "the page asks for its stream")
        body = "".join(self._block(event_type, data) for event_type, data in events)
        self._requests.pop(0).fulfill(body=body, content_type="text/event-stream; charset=utf-8")

    def _keep(self, request: Route) -> None:
        self._requests.append(request)

    def _is_asked(self) -> bool:
        self._page.wait_for_timeout(20)  # lets Playwright call us
        return bool(self._requests)

    def _block(self, event_type: str, data: Any) -> str:
        self._blocks += 1
        text = data if isinstance(data, Text) else json.dumps(data)
        return f"event: {event_type}\ndata: {text}\nid: made-up-{self._blocks}\nretry: 10\n\n"
