"""Many small apps in one process, each below a path of its own and with one fault, for the tests of `doctor`.

``/NAME/events`` is the stream of the app that the function `NAME` makes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, Response, abort, redirect, request
from flask_compress import Compress
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from sse_batcher import SSE, stream

HEARTBEAT = 0.25
Made = tuple[Flask, SSE]


def make(name: str, **config: Any) -> Made:
    made = Flask(name, static_folder=None)
    made.config.update({"SSE_HEARTBEAT": HEARTBEAT, "SSE_BATCH_WINDOW": 0.01, **config})
    return made, SSE(made)


def healthy() -> Made:
    return make("healthy", SECRET_KEY="secret")


def unauthorized() -> Made:
    made, sse = make("unauthorized", SECRET_KEY="secret")

    @sse.authorize
    def authorize(channels: tuple[str, ...]) -> tuple[str, ...]:
        abort(401)

    return made, sse


def forbidden() -> Made:
    made, sse = make("forbidden")

    @sse.authorize
    def authorize(channels: tuple[str, ...]) -> tuple[str, ...]:
        return ()

    return made, sse


def login() -> Made:
    made, sse = make("login")

    @made.get("/login")
    def page() -> str:
        return "<form>"

    @made.before_request
    def must_log_in() -> Response | None:
        return redirect("/login/login") if request.path != "/login" else None  # type: ignore[return-value]

    return made, sse


def moved() -> Made:
    made, sse = make("moved")

    @made.get("/old")
    def old() -> Any:
        return redirect("/moved/events")

    return made, sse


def single_page() -> Made:
    """The page of the browser's app answers all paths, and the stream is elsewhere."""
    made, sse = make("single_page", SSE_URL_PREFIX="/push")

    @made.get("/<path:path>")
    def page(path: str) -> str:
        return "<!doctype html>"

    return made, sse


def reading_function() -> Made:
    made, sse = make("reading_function")

    @made.after_request
    def add_etag(response: Response) -> Response:
        response.direct_passthrough = False
        response.add_etag()
        return response

    return made, sse


class ReadsWhole:
    """Middleware that collects each response."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return [b"".join(self.app(environ, start_response))]


def reading_middleware() -> Made:
    made, sse = make("reading_middleware")
    made.wsgi_app = ReadsWhole(made.wsgi_app)  # type: ignore[method-assign]
    return made, sse


def compressing() -> Made:
    """A view of its own makes a response of its own, without the headers of the stream, and Flask-Compress finds it."""
    made, sse = make("compressing", SSE_URL_PREFIX=None, COMPRESS_MIMETYPES=["text/html", "text/event-stream"])
    Compress(made)

    @made.get("/events")
    def events() -> Response:
        _, headers, body = stream(sse.manager, request.environ)
        kept = [(name, value) for name, value in headers if name != "Content-Encoding"]
        return Response(body, headers=kept)

    return made, sse


class ForgetsCursor:
    """Middleware that lets only some headers pass."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ.pop("HTTP_LAST_EVENT_ID", None)
        return self.app(environ, start_response)


def without_cursor() -> Made:
    made, sse = make("without_cursor")
    made.wsgi_app = ForgetsCursor(made.wsgi_app)  # type: ignore[method-assign]
    return made, sse


def short_history() -> Made:
    made, sse = make("short_history", SSE_HISTORY_FRAMES=3, SSE_BATCHING=False)

    def tick() -> None:
        while not stopping.wait(0.1):
            sse.enqueue("tick", None)

    stopping = threading.Event()
    threading.Thread(target=tick, daemon=True).start()
    return made, sse


def without_headers() -> Made:
    made, sse = make("without_headers")

    @made.after_request
    def change(response: Response) -> Response:
        del response.headers["X-Accel-Buffering"]
        response.headers["Cache-Control"] = "private"
        return response

    return made, sse


def short_lease() -> Made:
    return make("short_lease", SSE_MAX_STREAM_AGE=0.5)


def few_clients() -> Made:
    return make("few_clients", SSE_MAX_CLIENTS=2)


def failing_snapshot() -> Made:
    made, sse = make("failing_snapshot")

    @sse.snapshot("default")
    def state() -> tuple[str, object]:
        raise LookupError("no state")

    return made, sse


def long_heartbeat() -> Made:
    return make("long_heartbeat", SSE_HEARTBEAT=120.0)


def with_cors() -> Made:
    return make("with_cors", SSE_CORS_ORIGINS=["https://example.com"])


MAKERS: tuple[Callable[[], Made], ...] = (
    *(healthy, unauthorized, forbidden, login, moved, single_page, reading_function, reading_middleware, compressing),
    *(without_cursor, short_history, without_headers, short_lease, few_clients, failing_snapshot, long_heartbeat),
    with_cors,
)
made_apps = {maker.__name__: maker() for maker in MAKERS}
apps = {name: made for name, (made, _) in made_apps.items()}
extensions = [sse for _, sse in made_apps.values()]


def nothing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("404 Not Found", [("Content-Type", "text/plain")])
    return [b"nothing here\n"]


app = DispatcherMiddleware(nothing, {f"/{name}": made for name, made in apps.items()})
