"""Hello: each open page shows every further visit. The app needs no more for it than (1), (2) and (3).

Run `python examples/hello.py`, and open http://127.0.0.1:5000 in several windows.
"""

import os

from flask import Flask, request

from sse_batcher import SSE  # (1)

app = Flask(__name__)
sse = SSE(app)  # (2)
PAGE = """<!doctype html><title>Hello</title><p>Visits since you came:</p><ol id="visits"></ol><script>
  const show = (data) => { visits.appendChild(document.createElement("li")).textContent = data.browser; };
  let last = "", tries = 0;
  function connect() {
    const source = new EventSource("/events?last_event_id=" + last);
    const on = (type, handle) => source.addEventListener(type, (event) => {
      [last, tries] = [event.lastEventId, 0];
      handle(JSON.parse(event.data));
    });
    on("visit", show);
    on("visit_batch", (batch) => batch.events.forEach(show));
    source.onerror = () => {  // a browser comes back by itself, but not after an error status, such as a proxy's 502
      if (source.readyState !== EventSource.CLOSED) return;
      setTimeout(connect, Math.random() * Math.min(30_000, 2_000 * 2 ** tries++));
    };
  }
  connect();</script>"""


@app.get("/")
def page():
    sse.enqueue("visit", {"browser": request.user_agent.string})  # (3)
    return PAGE


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
