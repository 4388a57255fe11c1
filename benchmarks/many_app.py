"""The app that `many.py` measures: ours, attached or detached. `gunicorn 'many_app:create_app()'`.

`MANY_TRANSPORT` is the value of `SSE_TRANSPORT`, ``attached`` by default. `MANY_POLL_WAIT` is that of `SSE_POLL_WAIT`,
`MANY_BACKEND` that of `SSE_BACKEND`. Everything else has its default. A stream with ``user=NUMBER`` in its query
belongs to this user.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from flask import Flask, request
from peers.event import event
from peers.event import publish as publish_bursts

from sse_batcher import SSE, Text

GROUP = 100  # calls of enqueue that are timed together, so that the clock costs nothing
dumps = json.JSONEncoder(separators=(",", ":")).encode


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SSE_TRANSPORT"] = os.environ.get("MANY_TRANSPORT", "attached")
    if "MANY_POLL_WAIT" in os.environ:
        app.config["SSE_POLL_WAIT"] = float(os.environ["MANY_POLL_WAIT"])
    if "MANY_BACKEND" in os.environ:
        app.config["SSE_BACKEND"] = os.environ["MANY_BACKEND"]
    sse = SSE(app)

    @sse.authorize
    def everything(channels: tuple[str, ...]) -> tuple[str, ...]:
        return channels

    @sse.identify
    def user() -> int | None:
        return request.args.get("user", None, int)

    @app.get("/ping")
    def ping() -> str:
        return "pong"

    @app.post("/publish")
    def publish() -> dict[str, float]:
        """Bursts, as `peers.event` says.

        With `sort=critical` of events that wait for no window, with `sort=text` of texts with the same bytes, and with
        `sort=broadcast` for all streams.
        """
        query = request.args.to_dict()
        sort = query.get("sort")
        enqueue = sse.broadcast if sort == "broadcast" else sse.enqueue
        kind = "hub_state" if sort == "critical" else "tick"

        def burst(numbers: range) -> None:
            for number in numbers:
                enqueue(kind, event(number))

        def burst_of_texts(numbers: range) -> None:
            for number in numbers:
                sse.enqueue("row", Text(dumps(event(number))))

        return publish_bursts(query, burst_of_texts if sort == "text" else burst)

    @app.post("/notes")
    def notes() -> dict[str, float]:
        """One event for each of `n` users, all with the number `first`; every `every`-th of them may have a stream.

        Returns the seconds that the loop takes.
        """
        first, count = request.args.get("first", 0, int), request.args.get("n", 1, int)
        every = request.args.get("every", 1, int)
        began = time.perf_counter()
        for number in range(count):
            user = number // every if number % every == 0 else -number
            sse.enqueue("note", event(first), user=user)
        return {"seconds": time.perf_counter() - began}

    @app.get("/cursor")
    def cursor() -> str:
        return sse.cursor()

    @app.get("/stats")
    def stats() -> dict[str, object]:
        return sse.manager.get_stats().as_dict()

    @app.post("/enqueue")
    def enqueue() -> dict[str, float]:
        """`n` calls back to back, and as many of `json.dumps`: microseconds a call, as the median of groups."""
        first, count = request.args.get("first", 0, int), request.args.get("n", 1, int)
        events = [event(number) for number in range(first, first + count)]
        groups = [events[start : start + GROUP] for start in range(0, count, GROUP)]
        took = [microseconds(lambda data: sse.enqueue("tick", data), group) for group in groups]
        return {
            "median_us": statistics.median(took),
            "dumps_us": statistics.median(microseconds(json.dumps, group) for group in groups),
        }

    @app.get("/threads")
    def threads() -> dict[int, str]:
        """The names of all threads, by the system's number."""
        return {thread.native_id or 0: thread.name for thread in threading.enumerate()}

    @app.get("/burn")
    def burn() -> str:
        """Compute without pause for so many seconds, as a request that renders something large does."""
        end, number = time.monotonic() + request.args.get("seconds", 1.0, float), 0
        while time.monotonic() < end:
            for _ in range(10_000):
                number += 1
        return str(number)

    return app


def microseconds(call: Callable[[object], object], group: list[dict[str, Any]]) -> float:
    """Microseconds a call with each of these events."""
    began = time.perf_counter_ns()
    for data in group:
        call(data)
    return (time.perf_counter_ns() - began) / 1e3 / len(group)
