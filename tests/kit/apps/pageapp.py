"""The app behind the pages of the browser's module: each of its events has the number that it was asked to publish."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from flask import Flask, Response, abort, request

from sse_batcher import SSE

CASES = Path(__file__).parents[1] / "cases"
RETRY_AFTER = 3
asked: dict[str, list[float]] = {}
"""When each browser has asked for the limited channel, in seconds. Its first request is answered with 429."""

app = Flask(__name__)
app.config.update(SSE_HEARTBEAT=1.0, SSE_BATCH_WINDOW=0.05)
if "BACKEND" in os.environ:
    app.config["SSE_BACKEND"] = os.environ["BACKEND"]
if "ORIGINS" in os.environ:
    app.config["SSE_CORS_ORIGINS"] = os.environ["ORIGINS"].split()
sse = SSE(app)


@sse.authorize
def authorize(channels: tuple[str, ...]) -> tuple[str, ...]:
    """Let those who have the cookie read the private channel, and those who come back the limited one."""
    if "private" in channels and request.cookies.get("pageapp") != "known":
        abort(403)
    if "limited" in channels:
        times = asked.setdefault(request.headers["User-Agent"], [])
        times.append(time.monotonic())
        if len(times) == 1:
            abort(Response("slow down", 429, {"Retry-After": str(RETRY_AFTER)}))
    return channels


@app.get("/page.html")
def page() -> Response:
    return Response((CASES / "page.html").read_text(), content_type="text/html; charset=utf-8")


@app.get("/page.js")
def script() -> Response:
    text = (CASES / "page.js").read_text().replace("/sse-batcher.js", "/events/sse-batcher.js")
    return Response(text, content_type="text/javascript; charset=utf-8")


@app.post("/publish")
def publish() -> tuple[str, int]:
    """Publish the numbers of a JSON list, on the channel that the query names."""
    for number in request.get_json():
        sse.enqueue("n", number, channel=request.args.get("channel", "default"))
    return "", 204


@app.get("/cursor")
def cursor() -> str:
    return sse.cursor()


@app.get("/asked")
def times_asked() -> dict[str, list[float]]:
    return asked


@app.get("/stats")
def stats() -> dict[str, Any]:
    return sse.manager.get_stats().as_dict()
