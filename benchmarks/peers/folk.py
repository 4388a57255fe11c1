"""What most tutorials show: a queue for each client, and a generator that waits for it. With threads, or gevent."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator

from flask import Flask, Response, request

from peers.event import event, publish


def create_app() -> Flask:
    app = Flask(__name__)
    clients: list[queue.Queue[str]] = []

    @app.get("/events")
    def events() -> Response:
        def stream() -> Iterator[str]:
            messages: queue.Queue[str] = queue.Queue()
            clients.append(messages)
            try:
                yield ": hello\n\n"
                while True:
                    yield messages.get()
            finally:
                clients.remove(messages)

        return Response(stream(), mimetype="text/event-stream")

    @app.post("/publish")
    def publish_bursts() -> dict[str, float]:
        def burst(numbers: range) -> None:
            for number in numbers:
                message = f"event: tick\ndata: {json.dumps(event(number), separators=(',', ':'))}\n\n"
                for messages in clients:
                    messages.put(message)

        return publish(request.args.to_dict(), burst)

    @app.get("/ping")
    def ping() -> str:
        return "pong"

    return app
