"""Plain WSGI: `SSEManager`, `stream()` and `script()` without Flask, here under the server of the standard library.

A thread enqueues a tick every second. `stream()` answers a request with the stream; the app decides first which
requests may have it, and with which channels. `script()` answers with the module for browsers.

Run `python examples/plain_wsgi.py`, and open http://127.0.0.1:5000.
"""

import os
import threading
import time
from contextlib import suppress
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server

from sse_batcher import ClosedError, SSEManager, script, stream

manager = SSEManager()

PAGE = b"""<!doctype html>
<title>Plain WSGI</title>
<link rel="icon" href="data:,">
<p>The server has been up for <b id="seconds">?</b> seconds.</p>
<script type="module">
  import { BatchedEventSource } from "/events/sse-batcher.js";

  const events = new BatchedEventSource("/events");
  events.on("tick", (data) => { document.getElementById("seconds").textContent = data.seconds; });
</script>
"""


def app(environ, start_response):
    if environ["PATH_INFO"] == "/events":
        status, headers, body = stream(manager, environ, ["default"])
    elif environ["PATH_INFO"] == "/events/sse-batcher.js":
        status, headers, body = script(environ)
    else:
        status, headers, body = "200 OK", [("Content-Type", "text/html; charset=utf-8")], [PAGE]
    start_response(status, headers)
    return body


def tick():
    start = time.monotonic()
    with suppress(ClosedError):  # the process is ending
        while True:
            manager.enqueue("tick", {"seconds": round(time.monotonic() - start)})
            time.sleep(1)


class Server(ThreadingMixIn, WSGIServer):
    """One thread for each request, since a stream holds its thread for as long as it is open under this server."""

    daemon_threads = True


if __name__ == "__main__":
    threading.Thread(target=tick, daemon=True).start()
    port = int(os.environ.get("PORT", "5000"))
    with suppress(KeyboardInterrupt), make_server("127.0.0.1", port, app, Server) as server:
        server.serve_forever()
    manager.shutdown()
