"""Hello: who has the page open sees every further visit. Lines (1), (2) and (3) are all that the app needs for it.

Run `python examples/hello.py`, and open http://127.0.0.1:5000 in several windows.
"""

import os

from flask import Flask, request

from sse_batcher import SSE  # (1)

app = Flask(__name__)
sse = SSE(app)  # (2)
PAGE = """<!doctype html><title>Hello</title><p>Visits since you came:</p><ol id="visits"></ol><script>
  const show = (data) => { visits.appendChild(document.createElement("li")).textContent = data.browser; };
  const source = new EventSource("/events");
  source.addEventListener("visit", (event) => show(JSON.parse(event.data)));
  source.addEventListener("visit_batch", (event) => JSON.parse(event.data).events.forEach(show));</script>"""


@app.get("/")
def page():
    sse.enqueue("visit", {"browser": request.user_agent.string})  # (3)
    return PAGE


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
