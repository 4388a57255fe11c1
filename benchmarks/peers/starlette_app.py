"""sse-starlette: the same with asyncio's queue, for uvicorn."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from peers.event import bursts, event

clients: set[asyncio.Queue[dict[str, str]]] = set()


async def events(_: Request) -> EventSourceResponse:
    async def stream() -> AsyncIterator[dict[str, str]]:
        messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        clients.add(messages)
        try:
            yield {"comment": "hello"}
            while True:
                yield await messages.get()
        finally:
            clients.discard(messages)

    return EventSourceResponse(stream(), sep="\n")


async def publish(request: Request) -> JSONResponse:
    took = []
    for pause, numbers in bursts(dict(request.query_params)):
        await asyncio.sleep(pause)
        began = time.perf_counter_ns()
        for number in numbers:
            message = {"event": "tick", "data": json.dumps(event(number), separators=(",", ":"))}
            for messages in clients:
                messages.put_nowait(message)
        took.append((time.perf_counter_ns() - began) / 1e3)
    return JSONResponse({"took_us": statistics.median(took)})


async def ping(_: Request) -> PlainTextResponse:
    return PlainTextResponse("pong")


app = Starlette(
    routes=[Route("/events", events), Route("/publish", publish, methods=["POST"]), Route("/ping", ping)],
)
