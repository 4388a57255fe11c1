"""A site whose pages share one stream, and what its streams were: served by a thread of this process.

The counters are written by request threads and by the threads that end streams, under a lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flask import Flask, render_template_string, request

from sse_batcher import SSE
from sse_batcher.cli import serving
from sse_batcher.signals import client_connected, client_disconnected
from sse_batcher.streams.open_stream import ClientInfo

from .waiting import TIMEOUT, wait_until

# `got` has the numbers of all events, and between them the reason of each gap. The first number is at most `first`.
_PAGE = """<!doctype html><title>shared</title><script type="module">
  if ({{ alone | tojson }}) delete globalThis.SharedWorker;
  const { BatchedEventSource } = await import({{ sse_script_url() | tojson }});
  window.got = [];
  window.first = {{ first | tojson }};
  window.source = new BatchedEventSource("/events", { share: {{ share | tojson }}, cursor: {{ cursor | tojson }} });
  for (const type of ["n", "private"]) source.on(type, (number) => got.push(number));
  source.on("sse_gap", ({ reason }) => got.push(reason));
</script>"""


class SharedSite:
    """The app, and counters of its streams. Polls are not counted."""

    def __init__(self) -> None:
        self.app = Flask(__name__)
        self.app.config.update(SSE_BATCH_WINDOW=0.05, SSE_HEARTBEAT=2.0)
        self.sse = SSE(self.app)
        self.url = ""
        self.published = 0
        """The number of the newest event."""
        self.open = 0
        self.most = 0
        """The most streams that were open at the same time."""
        self._lock = threading.Lock()  # guards `open` and `most`
        self._stopped = threading.Event()
        self.app.add_url_rule("/", view_func=self._page)
        self.sse.identify(lambda: request.cookies.get("user"))
        with self.app.app_context():
            self.manager = self.sse.manager

    def _page(self) -> str:
        """``?share=u1``, ``?cursor=1``: with the page's cursor, ``?alone=1``: in a browser without SharedWorker."""
        cursor = self.sse.cursor() if "cursor" in request.args else ""
        return render_template_string(
            _PAGE,
            share=request.args.get("share", "u1"),
            cursor=cursor,
            first=self.published + 1 if cursor else None,
            alone="alone" in request.args,
        )

    def publish(self, events: int = 1, seconds: float = 0.0) -> threading.Thread:
        """Start to enqueue so many events, evenly over this time. Returns the thread, which ends with the last one."""
        thread = threading.Thread(target=self._publish, args=(events, seconds))
        thread.start()
        return thread

    def _publish(self, events: int, seconds: float) -> None:
        start = time.monotonic()
        for number in range(events):
            self._stopped.wait(max(0.0, start + number * seconds / events - time.monotonic()))
            self.published += 1
            self.sse.enqueue("n", self.published)

    def wait_for_streams(self, number: int) -> None:
        """Wait until so many streams are open. A signal comes a moment after what it tells of."""
        wait_until(lambda: self.open == number, f"{number} open streams")

    def connected(self, sender: object, client: ClientInfo, **more: object) -> None:
        with self._lock:
            self.open += 1
            self.most = max(self.most, self.open)

    def disconnected(self, sender: object, client: ClientInfo, **more: object) -> None:
        with self._lock:
            self.open -= 1

    def stop(self) -> None:
        self._stopped.set()
        assert self.manager.shutdown(TIMEOUT)


@contextmanager
def shared_site() -> Iterator[SharedSite]:
    """Serve such a site. At the end, all its streams end."""
    site = SharedSite()
    with (
        client_connected.connected_to(site.connected, site.manager),
        client_disconnected.connected_to(site.disconnected, site.manager),
        serving(site.app) as (host, port),
    ):
        site.url = f"http://{host}:{port}"
        try:
            yield site
        finally:
            site.stop()
