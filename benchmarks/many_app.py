"""The app that `many.py` measures: ours, attached or detached. `gunicorn 'many_app:create_app()'`.

`MANY_TRANSPORT` is the value of `SSE_TRANSPORT`; ``attached`` sets nothing. Everything else has its default.
"""

from __future__ import annotations

import os
import statistics
import time

from flask import Flask, request
from peers.event import event
from peers.event import publish as publish_bursts

from sse_batcher import SSE

GROUP = 100  # calls of enqueue that are timed together, so that the clock costs nothing


def create_app() -> Flask:
    app = Flask(__name__)
    transport = os.environ.get("MANY_TRANSPORT", "attached")
    if transport != "attached":
        app.config["SSE_TRANSPORT"] = transport
    sse = SSE(app)

    @sse.authorize
    def everything(channels: tuple[str, ...]) -> tuple[str, ...]:
        return channels

    @app.get("/ping")
    def ping() -> str:
        return "pong"

    @app.post("/publish")
    def publish() -> dict[str, float]:
        """Bursts, as `peers.event` says; with `at_once=1` of critical events, which wait for no window."""
        query = request.args.to_dict()
        kind = "hub_state" if query.get("at_once") == "1" else "tick"

        def burst(numbers: range) -> None:
            for number in numbers:
                sse.enqueue(kind, event(number))

        return publish_bursts(query, burst)

    @app.post("/enqueue")
    def enqueue() -> dict[str, float]:
        """`n` calls back to back: microseconds a call, as the median of groups and in all."""
        first, count = request.args.get("first", 0, int), request.args.get("n", 1, int)
        events = [event(number) for number in range(first, first + count)]
        took = []
        for start in range(0, count, GROUP):
            group = events[start : start + GROUP]
            began = time.perf_counter_ns()
            for data in group:
                sse.enqueue("tick", data)
            took.append((time.perf_counter_ns() - began) / 1e3 / len(group))
        return {"median_us": statistics.median(took), "mean_us": statistics.fmean(took)}

    @app.get("/burn")
    def burn() -> str:
        """Compute without pause for so many seconds, as a request that renders something large does."""
        end, number = time.monotonic() + request.args.get("seconds", 1.0, float), 0
        while time.monotonic() < end:
            for _ in range(10_000):
                number += 1
        return str(number)

    return app
