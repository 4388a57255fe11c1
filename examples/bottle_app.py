"""Bottle: a route returns the stream, and a decorator of Bottle decides which requests may see it.

A thread reads five sensors fifty times a second. `dedup_key` keeps only the latest reading of each sensor in a batch,
five times a second.

Run `pip install bottle` and `python examples/bottle_app.py`, open http://127.0.0.1:5000, and log in as it says.
"""

import hmac
import math
import os
import secrets
import threading
import time
from contextlib import suppress
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer

from bottle import HTTPResponse, auth_basic, get, request, run

from sse_batcher import BatchOptions, ClosedError, SSEManager, script, stream

PASSWORD = secrets.token_urlsafe(6)


def latest_of(event_type, data):
    """Within a batch, which events are news of the same thing, so that the latest one is enough."""
    return data.get("sensor", event_type)


manager = SSEManager(batching=BatchOptions(batch_window=0.2, dedup_key=latest_of))

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Bottle</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
  body { max-width: 36rem; margin: 2rem auto; padding: 0 1rem; }
  meter { width: 100%; height: 1.5rem; }
</style>
<h1>Sensors</h1>
<div id="sensors"></div>
<p><b id="windows">?</b> windows look on.</p>
<script type="module">
  import { BatchedEventSource } from "/events/sse-batcher.js";

  const meters = new Map();

  function meter(name) {
    if (!meters.has(name)) {
      const label = document.getElementById("sensors").appendChild(document.createElement("label"));
      label.textContent = name;
      meters.set(name, label.appendChild(document.createElement("meter")));
    }
    return meters.get(name);
  }

  const events = new BatchedEventSource("/events");
  events.on("reading", (data) => { meter(data.sensor).value = data.value; });
  events.on("windows", (data) => { document.getElementById("windows").textContent = data.count; });
</script>
"""


def knows_password(user, password):
    return hmac.compare_digest(password.encode(), PASSWORD.encode())


@get("/")
@auth_basic(knows_password)
def page():
    return PAGE


# The browser asks for the password once, for the page, and sends it with the stream, too. Bottle asks the view for HEAD
# as well, and `stream()` answers it.
@get("/events")
@auth_basic(knows_password)
def events():
    # Bottle takes the first block before it sends the headers, which costs nothing, since that block is there at once.
    # It closes the body when the client leaves.
    status, headers, body = stream(manager, request.environ, ["default"])
    return HTTPResponse(body, status, headers)


@get("/events/sse-batcher.js")
def module():
    status, headers, body = script(request.environ)
    return HTTPResponse(body, status, headers)


def work():
    with suppress(ClosedError):  # the process is ending
        while True:
            for number in range(1, 6):
                value = (1 + math.sin(number * time.monotonic())) / 2
                manager.enqueue("reading", {"sensor": f"sensor {number}", "value": round(value, 3)})
            manager.enqueue("windows", {"count": manager.get_stats().clients})
            time.sleep(0.02)


class Server(ThreadingMixIn, WSGIServer):
    """One thread for each request, since a stream holds its thread for as long as it is open under this server."""

    daemon_threads = True


if __name__ == "__main__":
    threading.Thread(target=work, daemon=True).start()
    print(f"Log in with any name and the password {PASSWORD}", flush=True)
    run(host="127.0.0.1", port=int(os.environ.get("PORT", "5000")), server_class=Server)
    manager.shutdown()
