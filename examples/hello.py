"""Hello: each open page shows every further visit. The app needs only (1), (2) and (3) for it.

Run `python examples/hello.py`, and open http://127.0.0.1:5000 in several windows.
"""

import os

from flask import Flask, request

from sse_batcher import SSE  # (1)

app = Flask(__name__)
sse = SSE(app)  # (2)
PAGE = """<!doctype html><title>Hello</title><p>Visits since you came:</p><ol id="visits"></ol><script type="module">
  import { BatchedEventSource } from "/events/sse-batcher.js";
  const show = (data) => { visits.appendChild(document.createElement("li")).textContent = data.browser; };
  const events = new BatchedEventSource("/events");
  events.on("visit", show);
</script>"""


@app.get("/")
def page():
    sse.enqueue("visit", {"browser": request.user_agent.string})  # (3)
    return PAGE


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
