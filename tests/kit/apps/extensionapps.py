"""Many small apps in one process, each below a path of its own, with an extension that works on each request.

``/NAME/events`` is the stream of the app that the function `NAME` makes, and ``/NAME/seen`` says what its extension has
seen. Sentry sees the requests of all of them.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

import patience  # noqa: F401
import sentry_sdk
from cachelib import FileSystemCache
from flask import Flask, session
from flask_compress import Compress
from flask_cors import CORS
from flask_debugtoolbar import DebugToolbarExtension
from flask_limiter import Limiter
from flask_login import LoginManager, UserMixin, current_user, login_user
from flask_session import Session
from flask_talisman import Talisman
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sentry_sdk.transport import Transport
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from sse_batcher import SSE

logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(name)s: %(message)s")
reported: Counter[str] = Counter()


class Kept(Transport):
    """Sends nothing, and counts the requests that it gets reports of."""

    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            reported[(item.payload.json or {}).get("transaction", item.type)] += 1


sentry_sdk.init(dsn="http://key@localhost/1", transport=Kept, traces_sample_rate=1.0)


def make(name: str, **config: Any) -> tuple[Flask, SSE]:
    made = Flask(__name__, static_folder=None)
    made.config.update(SECRET_KEY="secret", SSE_HEARTBEAT=0.3, SSE_BATCH_WINDOW=0.01, **config)
    made.add_url_rule("/page", "page", view_func=lambda: f"<html><body>{'page ' * 1000}</body></html>")
    sse = SSE(made)

    @made.post("/enqueue")
    def enqueue() -> str:
        sse.enqueue("item", name)
        return ""

    @made.get("/stats")
    def stats() -> dict[str, Any]:
        return sse.manager.get_stats().as_dict()

    return made, sse


def login() -> Flask:
    made, sse = make("login")
    manager = LoginManager(made)

    class User(UserMixin):  # type: ignore[misc]
        id = "ada"

    manager.user_loader(lambda _: User())
    sse.authorize(lambda channels: channels if current_user.is_authenticated else [])
    sse.identify(lambda: current_user.id)

    @made.post("/enter")
    def enter() -> str:
        login_user(User())
        return ""

    made.add_url_rule("/seen", "seen", view_func=lambda: current_user.id)
    return made


def server_session() -> Flask:
    made, sse = make("server_session", SESSION_TYPE="cachelib", SESSION_CACHELIB=FileSystemCache("sessions"))
    Session(made)

    @sse.authorize
    def authorize(channels: tuple[str, ...]) -> tuple[str, ...]:
        session["streams"] = session.get("streams", 0) + 1
        return channels

    made.add_url_rule("/enter", "enter", view_func=lambda: session.setdefault("name", ""), methods=["POST"])
    made.add_url_rule("/seen", "seen", view_func=lambda: str(session["streams"]))
    return made


def cors() -> Flask:
    made, _ = make("cors")
    CORS(made, origins=["https://example.com"])
    return made


def talisman() -> Flask:
    made, _ = make("talisman")
    Talisman(made, force_https=False)
    return made


def compress() -> Flask:
    made, _ = make("compress")
    Compress(made)
    return made


def limiter() -> Flask:
    made, _ = make("limiter", RATELIMIT_HEADERS_ENABLED=True)
    limits = Limiter(lambda: "all", app=made, storage_uri="memory://")
    made.view_functions["sse_batcher.stream"] = limits.limit("6 per hour")(made.view_functions["sse_batcher.stream"])
    return made


def debug_toolbar() -> Flask:
    made, _ = make("debug_toolbar", DEBUG_TB_ENABLED=True, DEBUG_TB_PROFILER_ENABLED=True)
    made.debug = True
    DebugToolbarExtension(made)
    return made


def sentry() -> Flask:
    made, _ = make("sentry")
    made.add_url_rule("/seen", "seen", view_func=lambda: str(reported["sse_batcher.stream"]))
    return made


def opentelemetry() -> Flask:
    made, _ = make("opentelemetry")
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    FlaskInstrumentor().instrument_app(made, tracer_provider=provider)

    @made.get("/seen")
    def seen() -> str:
        return str(sum("/events" in span.name for span in exporter.get_finished_spans()))

    return made


def chatty() -> Flask:
    """No extension: a middleware that adds a comment to each block, which a take-over does not allow."""
    made, _ = make("chatty")
    app = made.wsgi_app

    def speak(body: Iterable[bytes]) -> Iterator[bytes]:
        with closing(body):  # type: ignore[type-var]
            for block in body:
                yield block + b":hello\n"

    def middleware(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = app(environ, start_response)
        return speak(body) if environ["PATH_INFO"] == "/events" else body

    made.wsgi_app = middleware  # type: ignore[method-assign]
    return made


MAKERS = [login, server_session, cors, talisman, compress, limiter, debug_toolbar, sentry, opentelemetry, chatty]
names = os.environ["APPS"].split()
apps = {f"/{maker.__name__}": maker() for maker in MAKERS if maker.__name__ in names}
app = DispatcherMiddleware(lambda *_: [], apps)  # type: ignore[arg-type, return-value]
