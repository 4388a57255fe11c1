"""Live table: the server renders a table with Jinja, and each page shows the newest one.

A thread adds thirty goals in a moment, once a second. All of these tables have the same `key`, so that the newest one
replaces the others within the window: thirty changes are one event, and one swap. For a table with many rows, send
single rows: `sse.enqueue("row", Text(row), key=row_id)`. Those of one window come as one text, with a line end between
two of them.

Run `python examples/live_table.py`, and open http://127.0.0.1:5000.
"""

import os
import random
import threading
import time
from contextlib import suppress

from flask import Flask, render_template_string

from sse_batcher import SSE, ClosedError, Text

GOALS = 30

app = Flask(__name__)
app.config["SSE_BATCH_WINDOW"] = 0.5
sse = SSE(app)

goals = {  # players choose their names themselves
    "Ann": 0,
    "Bob <b>the Builder</b>": 0,
    "<img src=x onerror=\"document.title = 'owned'\">": 0,
    "</table><script>document.title = 'owned'</script>": 0,
    "Zoë & \N{SMILING FACE WITH SUNGLASSES}": 0,
}

# Text is sent as it is, so the template has to escape: Jinja does this in Flask by itself.
TABLE = """
<table>
  <caption>Goals: {{ goals.values()|sum }}</caption>
  {% for name, count in goals|dictsort(by="value", reverse=true) %}
    <tr><th>{{ name }}</th><td>{{ count }}</td></tr>
  {% endfor %}
</table>
"""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Live table</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
  body { max-width: 36rem; margin: 2rem auto; padding: 0 1rem; }
  table { width: 100%; border-collapse: collapse; }
  th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid #8886; }
</style>
<div id="table"></div>
<p>Swaps: <span id="swaps">0</span></p>
<script type="module">
  import { BatchedEventSource } from "/events/sse-batcher.js";

  const [table, swaps] = document.querySelectorAll("#table, #swaps");
  const events = new BatchedEventSource("/events");
  events.onText("message", (html) => {
    table.innerHTML = html;  // from a template that escapes
    swaps.textContent = Number(swaps.textContent) + 1;
  });
</script>
"""


@sse.snapshot("default")
def table():
    # Called in the view for each page that is new, or has missed something. So a page needs no table of its own.
    return "message", Text(render_template_string(TABLE, goals=goals))


@app.get("/")
def page():
    return PAGE


def shoot():
    goals[random.choice(list(goals))] += 1
    # If several threads change the numbers, they have to hold one lock over the change and the enqueue, or an older
    # table may come second and replace the newer one.
    event_type, html = table()
    sse.enqueue(event_type, html, key="table")


def work():
    with suppress(ClosedError):  # the process is ending
        while True:
            time.sleep(1)
            for _ in range(GOALS):
                with app.app_context():  # for the template; enqueue() itself needs none
                    shoot()


if __name__ == "__main__":
    threading.Thread(target=work, daemon=True).start()
    app.run(port=int(os.environ.get("PORT", "5000")))
