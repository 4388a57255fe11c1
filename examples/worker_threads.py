"""Worker threads: any thread may call `sse.enqueue`, and a burst arrives as a few batches.

Two threads report a step now and then, and a third one finds a hundred files at once every three seconds. None of them
has a request or an app context. The page shows how events arrived, alone or in a batch.

Run `python examples/worker_threads.py`, and open http://127.0.0.1:5000.
"""

import os
import threading
import time

from flask import Flask

from sse_batcher import SSE, ClosedError

app = Flask(__name__)
sse = SSE(app)

PAGE = """<!doctype html>
<title>Worker threads</title>
<link rel="icon" href="data:,">
<ul id="list"></ul>
<script type="module">
  import { BatchedEventSource } from "/events/sse-batcher.js";

  function line(text) {
    const item = document.createElement("li");
    item.textContent = text;  // never innerHTML: data may hold anything
    document.getElementById("list").prepend(item);
  }

  const describe = (list) => (list.length === 1 ? "alone: " : "batch of " + list.length + ": ");
  const events = new BatchedEventSource("/events");
  // onBatch gets a list: what came together. With on(), the page would get one after the other.
  events.onBatch("step", (list) =>
    line(describe(list) + list.map((data) => data.worker + " is at step " + data.step).join(", ")));
  events.onBatch("file", (list) => line(describe(list) + list[0].name + " to " + list.at(-1).name));
</script>
"""


@app.get("/")
def page():
    return PAGE


def step(worker, number):
    sse.enqueue("step", {"worker": worker, "step": number})


def find_files(number):
    for name in range(100):
        sse.enqueue("file", {"name": f"{number}/{name}.txt"})


def repeat(seconds, function, *arguments):
    number = 0
    try:
        while True:
            number += 1
            function(*arguments, number)
            time.sleep(seconds)
    except ClosedError:
        pass  # the process is ending


if __name__ == "__main__":
    for job in [(1, step, "Ann"), (1.7, step, "Bob"), (3, find_files)]:
        threading.Thread(target=repeat, args=job, daemon=True).start()
    app.run(port=int(os.environ.get("PORT", "5000")))
