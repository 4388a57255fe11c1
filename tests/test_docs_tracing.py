"""The page about tracing: its programs run, with the real packages, and what it says of spans and reports is true."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .kit.documents import files, text_of
from .kit.repository import ROOT
from .kit.services import missing

# The packages keep their settings for the whole process, so each test has one of its own.
BEGIN = """
import json
import logging
from flask import Flask
from sse_batcher import SSE
from sse_batcher.testing import open_stream

logging.disable(logging.INFO)
app = Flask("shop", static_folder=None)
app.secret_key = "secret"
sse = SSE(app)

def say(**found):
    print(json.dumps(found))
"""
OTEL = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)

def names():
    return [span.name for span in spans.get_finished_spans()]
"""
SENTRY = """
import sentry_sdk
from sentry_sdk.transport import Transport

sent = []

class Kept(Transport):
    def capture_envelope(self, envelope):
        sent.extend((item.type, item.payload.json) for item in envelope.items)

init = sentry_sdk.init
sentry_sdk.init = lambda **settings: init(**{**settings, "dsn": "http://key@localhost/1", "transport": Kept})
"""


def run(folder: Path, *parts: str) -> dict[str, Any]:
    """Run this program beside the files of the page. Returns what it has said."""
    for package in ("opentelemetry.instrumentation.flask", "opentelemetry.sdk", "sentry_sdk"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            missing("needs opentelemetry-instrumentation-flask, opentelemetry-sdk and sentry-sdk (pip)")
    for name, text in files(text_of("guides/tracing")).items():
        (folder / name).write_text(text)
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(parts)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    found_values: dict[str, Any] = json.loads(done.stdout)
    return found_values


# -- OpenTelemetry -----------------------------------------------------------------------------------------------------


def test_the_span_of_a_stream_ends_at_once_and_has_the_token(tmp_path: Path) -> None:
    check = """
from opentelemetry.instrumentation.flask import FlaskInstrumentor

FlaskInstrumentor().instrument_app(app)
with app.test_request_context():
    url = sse.sign(["default"])
with open_stream(app.test_client(), "/events?token=" + url):
    while_open = [(span.name, str(dict(span.attributes))) for span in spans.get_finished_spans()]
say(while_open=while_open, token=url, ended=names())
"""
    found = run(tmp_path, OTEL, BEGIN, check)
    [(name, values)] = found["while_open"]
    assert name == "GET /events"
    assert found["token"] in values
    assert found["ended"] == [name]


def test_the_span_of_the_wsgi_middleware_lasts_as_long_as_an_attached_stream(tmp_path: Path) -> None:
    check = """
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

app.wsgi_app = OpenTelemetryMiddleware(app.wsgi_app)
with open_stream(app.test_client(), "/events"):
    while_open = names()
say(while_open=while_open, ended=names())
"""
    found = run(tmp_path, OTEL, BEGIN, check)
    assert (found["while_open"], found["ended"]) == ([], ["GET /events"])


def test_streams_are_left_out_and_recorded_when_they_end(tmp_path: Path) -> None:
    check = """
import telemetry

telemetry.instrument(app)

@app.get("/orders")
def order():
    telemetry.publish(sse, "order", {"id": 7})
    return "ok"

@app.get("/events-of-today")
def today():
    return "ok"

client = app.test_client()
for path in ("/orders", "/events-of-today", "/events/health", "/?next=/events"):
    client.get(path)
with open_stream(client, "/events"):
    pass
sse.manager.shutdown()
finished = {span.name: span for span in spans.get_finished_spans()}
stream, publish = finished["stream"], finished["publish order"]
say(
    names=sorted(finished),
    reason=stream.attributes["sse.reason"],
    channels=stream.attributes["sse.channels"],
    seconds=(stream.end_time - stream.start_time) / 1e9,
    parent=publish.parent.span_id == finished["GET /orders"].context.span_id,
    kind=publish.kind.name,
)
"""
    found = run(tmp_path, OTEL, BEGIN, check)
    assert found.pop("seconds") < 10
    assert found == {
        # The last request has the path in its query: the expression is searched for in the whole URL.
        "names": ["GET /events-of-today", "GET /orders", "publish order", "stream"],
        "reason": "left",
        "channels": ["default"],
        "parent": True,
        "kind": "PRODUCER",
    }


# -- Sentry ------------------------------------------------------------------------------------------------------------


def test_the_transaction_of_a_stream_ends_at_once(tmp_path: Path) -> None:
    check = """
sentry_sdk.init(traces_sample_rate=1.0)
with open_stream(app.test_client(), "/events"):
    while_open = [(kind, item["transaction"]) for kind, item in sent]
say(while_open=while_open, after=len(sent))
"""
    found = run(tmp_path, SENTRY, BEGIN, check)
    assert found == {"while_open": [["transaction", "sse_batcher.stream"]], "after": 1}


def test_streams_are_no_traces_and_tokens_are_left_out(tmp_path: Path) -> None:
    check = """
import errors
import publishing

errors.traces_sampler.__globals__["sentry_sdk"] = sentry_sdk
options = sentry_sdk.get_client().options
assert options["traces_sampler"]({"wsgi_environ": {"PATH_INFO": "/orders"}}) == 0.1
sentry_sdk.get_client().options["traces_sampler"] = lambda context: bool(errors.traces_sampler(context))

@sse.snapshot("default")
def fail():
    raise RuntimeError("a fault of the app")

@app.get("/orders")
def order():
    publishing.publish(sse, "order", {"id": 7})
    return "ok"

@app.get("/gone")
def gone():
    raise BrokenPipeError("the client has left")

with app.test_request_context():
    token = sse.sign(["default"])
client = app.test_client()
client.get("/orders")
client.get("/gone")
client.get("/events?token=" + token)
client.get("/events", headers={"Authorization": "Bearer " + token})
say(
    token=token,
    transactions={item["transaction"]: [span["description"] for span in item["spans"]]
                  for kind, item in sent if kind == "transaction"},
    codes=[item["extra"]["sse_code"] for kind, item in sent if kind == "event"],
    queries=[item["request"]["query_string"] for kind, item in sent if kind == "event"],
    errors=[item["exception"]["values"][-1]["type"] for kind, item in sent if kind == "event"],
    all=str(sent),
)
"""
    found = run(tmp_path, SENTRY, BEGIN, check)
    assert found["transactions"] == {"order": ["order"], "gone": []}
    assert found["codes"] == ["snapshot_failed", "snapshot_failed"]
    assert found["queries"] == ["token=sse1...", ""]
    assert found["errors"] == ["RuntimeError", "RuntimeError"]
    assert found["token"][5:40] not in found["all"]
