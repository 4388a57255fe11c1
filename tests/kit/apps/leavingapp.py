"""The app that the tests of clients that leave serve: streams, set up from outside, and routes that look inside it."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import patience  # noqa: F401
from flask import Flask, Response, request

from sse_batcher import SSE

logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(name)s: %(message)s")

app = Flask(__name__)
# Heartbeats that are an hour apart do not notice a client that leaves.
app.config.update({"SSE_HEARTBEAT": 3600} | json.loads(os.environ.get("CONFIG", "{}")))
sse = SSE(app)
sse.enqueue("hub_state", "imported")  # starts a thread, which a worker that is forked after this does not have


opening, kicked = threading.Event(), threading.Event()


@sse.authorize
def authorize(channels: tuple[str, ...]) -> tuple[str, ...]:
    if "slow" in channels:  # whose streams are kicked before they are open
        opening.set()
        kicked.wait(10)
    return channels


@app.post("/kick-slow")
def kick_slow() -> str:
    """How many streams that were open ended."""
    assert opening.wait(10)
    ended = sse.kick(channel="slow")
    kicked.set()
    return str(ended)


@app.after_request
def say_who(response: Response) -> Response:
    response.headers["X-Pid"] = str(os.getpid())
    response.headers["X-N"] = request.args.get("n", "")
    if "head" in request.args:
        response.headers["X-Long"] = "x" * int(request.args["head"])
    return response


@app.post("/enqueue")
def enqueue() -> str:
    """Which process it was."""
    for event_type, data in request.get_json():
        sse.enqueue(event_type, data)
    return str(os.getpid())


@app.get("/echo")
def echo() -> str:
    return request.args["n"]


@app.get("/large")
def large() -> str:
    return "x" * int(request.args["n"])


@app.post("/kick")
def kick() -> tuple[str, int]:
    sse.kick(channel=request.get_json())
    return "", 204


@app.get("/stats")
def stats() -> dict[str, Any]:
    return sse.manager.get_stats().as_dict()


@app.get("/process")
def process() -> dict[str, Any]:
    # When its client has reset, werkzeug leaves a selector, which has a descriptor, to the garbage collector.
    gc.collect()
    threads = sorted(thread.name for thread in threading.enumerate())
    return {"pid": os.getpid(), "threads": threads, "descriptors": sorted(_descriptors())}


def _descriptors() -> Iterator[str]:
    """What each stands for."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield re.sub(r"\d+", "", os.readlink(f"/proc/self/fd/{number}"))


class Flood:
    """Events, one right after the other, until it is stopped."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._manager = sse.manager
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._over.wait(0.002):
            number += 1
            self._manager.enqueue("item", number)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


floods: list[Flood] = []


@app.post("/flood")
def start_flood() -> tuple[str, int]:
    floods.append(Flood())
    return "", 204


@app.delete("/flood")
def stop_flood() -> tuple[str, int]:
    floods.pop().stop()
    return "", 204


@app.post("/fill")
def fill() -> tuple[str, int]:
    """More than the buffers of any kernel or server take."""
    for number in range(150):
        sse.enqueue("item", str(number) + "x" * 200_000)
    return "", 204
