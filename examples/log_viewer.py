"""Log viewer: a `logging.Handler` that shows the log of the app in the browser.

Records come in batches, twice a second. An ERROR is of a critical type: it comes at once, after what was logged before
it. Every visitor sees the log here. A real app decides in `@sse.authorize` which visitors may see it.

Run `python examples/log_viewer.py`, and open http://127.0.0.1:5000.
"""

import itertools
import logging
import os
import random
import threading
import time

from flask import Flask

from sse_batcher import SSE, BacklogFullError, ClosedError

app = Flask(__name__)
app.config.update(
    # A log is no state: no line replaces another one.
    SSE_PER_TYPE={"log": {"batch_window": 0.5, "dedup_key": None}},
    SSE_CRITICAL_TYPES={"log_error"},
)
sse = SSE(app)
log = logging.getLogger("job")


class EventHandler(logging.Handler):
    """Sends each record as an event, from whichever thread logs it. `enqueue` never waits, so logging stays fast."""

    def __init__(self):
        super().__init__()
        self.sending = False
        self.dropped = 0

    def emit(self, record):
        # `logging` holds this handler's lock here. So if this is set, the same thread is inside the enqueue() below:
        # sse_batcher, or a receiver of its signals, logs about the sending. Sending that, too, might go on forever.
        # The record is not lost: the other handlers have it.
        if self.sending:
            return
        self.sending = True
        try:
            self.send(record)
        except ClosedError:
            pass  # the process is ending
        except BacklogFullError:
            # The backend takes no events. handleError() would print a traceback for each record: count the records
            # instead, and let the page show the number.
            self.dropped += 1
        except Exception:
            self.handleError(record)  # a mistake in this one log call, as for any other handler
        finally:
            self.sending = False

    def send(self, record):
        data = {
            "time": record.created * 1000,
            "level": record.levelname,
            "levelno": record.levelno,
            "name": record.name,
            "text": self.format(record)[:10_000],
            "dropped": self.dropped,
        }
        sse.enqueue("log_error" if record.levelno >= logging.ERROR else "log", data)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Log viewer</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
  body { margin: 0; display: flex; flex-direction: column; height: 100dvh; }
  header { padding: .5rem 1rem; display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
  #lines { flex: 1; overflow: auto; padding: .5rem 1rem; font: .85rem/1.5 monospace; border-top: 1px solid #8886; }
  #lines div { white-space: pre-wrap; overflow-wrap: anywhere; }
  [data-level=DEBUG] { opacity: .6; }
  [data-level=WARNING] { color: light-dark(#850, #fc5); }
  [data-level=ERROR], [data-level=CRITICAL] { color: light-dark(#b00, #f88); font-weight: bold; }
</style>
<header>
  <label>From <select id="level">
    <option value="10">DEBUG<option value="20" selected>INFO<option value="30">WARNING<option value="40">ERROR
  </select></label>
  <label><input type="checkbox" id="follow" checked> Follow the end</label>
  <span id="dropped"></span>
</header>
<div id="lines"></div>
<script type="module">
  import { BatchedEventSource } from "/events/sse-batcher.js";

  const [level, follow, dropped, lines] = document.querySelectorAll("#level, #follow, #dropped, #lines");
  const scroll = () => { if (follow.checked) lines.scrollTop = lines.scrollHeight; };
  const filter = (line) => { line.hidden = Number(line.dataset.levelno) < Number(level.value); };

  function text(value) {
    const line = document.createElement("div");
    line.textContent = value;  // never innerHTML: logs hold what strangers have sent
    return lines.appendChild(line);
  }

  function show(data) {
    const time = new Date(data.time).toLocaleTimeString();
    const line = text(`${time} ${data.level.padEnd(8)} ${data.name}: ${data.text}`);
    Object.assign(line.dataset, {level: data.level, levelno: data.levelno});
    filter(line);
    if (lines.childElementCount > 2000) lines.firstElementChild.remove();
    if (data.dropped) dropped.textContent = `${data.dropped} lines were dropped`;
  }

  // It scrolls once a batch, not once a line.
  const showAll = (list) => { list.forEach(show); scroll(); };
  const events = new BatchedEventSource("/events");
  events.onBatch("log", showAll);
  events.onBatch("log_error", showAll);
  events.on("sse_gap", () => text("... some lines are missing here ..."));
  level.addEventListener("change", () => { [...lines.children].forEach(filter); scroll(); });
  follow.addEventListener("change", scroll);
</script>
"""


@app.get("/")
def page():
    return PAGE


def work():
    for number in itertools.count(1):
        for step in range(1, 31):
            level = random.choice([logging.DEBUG, logging.INFO, logging.INFO, logging.WARNING])
            log.log(level, "job %d is at step %d", number, step)
        if number % 2 == 0:
            log.error("job %d failed", number)
        time.sleep(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    log.setLevel(logging.DEBUG)
    # To the root logger, so that it gets what Flask, its server and sse_batcher log, too.
    logging.getLogger().addHandler(EventHandler())
    threading.Thread(target=work, daemon=True).start()
    app.run(port=int(os.environ.get("PORT", "5000")))
