"""The app that the tests of servers and clients serve: streams, and two routes to drive them from outside."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import patience  # noqa: F401
from flask import Flask, request

from sse_batcher import SSE

logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(name)s: %(message)s")

app = Flask(__name__)
app.config.update(
    SSE_TRANSPORT=os.environ.get("TRANSPORT", "auto"),
    SSE_HEARTBEAT=float(os.environ.get("HEARTBEAT", "0.3")),
    SSE_BATCH_WINDOW=float(os.environ.get("BATCH_WINDOW", "0.3")),
    SSE_MAX_BATCH_SIZE=10,
    SSE_COMPRESS=os.environ.get("COMPRESS", "").split(),
    SSE_POLL_WAIT=float(os.environ.get("POLL_WAIT", "25")),
)
if "BACKEND" in os.environ:
    app.config["SSE_BACKEND"] = os.environ["BACKEND"]
sse = SSE(app)
sse.enqueue("hub_state", "imported")  # starts a thread, which a worker that is forked after this does not have


@app.post("/enqueue")
def enqueue() -> tuple[str, int]:
    for event_type, data in request.get_json():
        sse.enqueue(event_type, data)
    return "", 204


@app.post("/publish")
def publish() -> tuple[str, int]:
    """Enqueue events evenly over some seconds, each with its number and the time in ms since 1970."""
    events, seconds = request.get_json()
    threading.Thread(target=enqueue_evenly, args=(events, seconds), daemon=True).start()
    return "", 204


def enqueue_evenly(events: int, seconds: float) -> None:
    start = time.monotonic()
    for number in range(events):
        time.sleep(max(0.0, start + number * seconds / events - time.monotonic()))
        sse.enqueue("n", [number, time.time() * 1000])


@app.get("/stats")
def stats() -> dict[str, Any]:
    return sse.manager.get_stats().as_dict()
