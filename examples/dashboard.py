"""Dashboard: the page loads the state from the database, and follows the stream from there on.

A thread changes six orders thirty times in a moment. `SSE_DEDUP_KEY="id"` keeps only the latest state of each order in
a batch, so that a page draws six rows and not thirty.

Run `pip install Flask-SQLAlchemy` and `python examples/dashboard.py`, and open http://127.0.0.1:5000.
"""

import os
import random
import tempfile
import threading

from flask import Flask, render_template_string
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sse_batcher import SSE

ORDERS, CHANGES = 6, 30
STATES = ["new", "paid", "packed", "sent"]

# A file, not `:memory:`, which all threads would share as one connection, and so as one transaction.
folder = tempfile.TemporaryDirectory()
app = Flask(__name__)
app.config.update(
    SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder.name}/orders.db",
    SSE_DEDUP_KEY="id",
    SSE_BATCH_WINDOW=0.5,
)


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(app, model_class=Base)
sse = SSE(app)


class Order(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012  # SQLAlchemy adds one with each change

    def as_dict(self):
        return {"id": self.id, "state": self.state, "version": self.version}


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Dashboard</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
  body { max-width: 36rem; margin: 2rem auto; padding: 0 1rem; }
  table { width: 100%; border-collapse: collapse; }
  th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid #8886; }
</style>
<h1>Orders</h1>
<table><thead><tr><th>Order<th>State<th>Version</thead><tbody id="rows"></tbody></table>
<p id="counts"></p>
<script type="module">
  import { BatchedEventSource } from "{{ sse_script_url() }}";

  let rows = {}, changes = 0, drawn = 0;

  function show({id, state, version}) {
    const row = rows[id] ??= document.getElementById("rows").insertRow();
    if (row.version >= version) return;  // an event has overtaken the state that was being loaded
    if (row.version) {
      changes += version - row.version;
      drawn += 1;
      row.animate([{background: "#fc08"}, {}], 1000);
    }
    row.version = version;
    row.replaceChildren();
    for (const value of [id, state, version]) row.insertCell().textContent = value;
    document.getElementById("counts").textContent = `${changes} changes, of which ${drawn} had to be drawn`;
  }

  async function load() {
    (await (await fetch("/orders")).json()).forEach(show);
  }

  // The stream goes on from the place where it was when this page was made. The state is loaded after that, so there
  // is no change that is in neither.
  const events = new BatchedEventSource("/events", { cursor: "{{ sse_cursor() }}" });
  events.on("order", show);
  // Something was missed, or this is another database after a restart: start again.
  events.on("sse_gap", () => {
    rows = {};
    document.getElementById("rows").replaceChildren();
    load();
  });
  load();
</script>
"""


@app.get("/")
def page():
    return render_template_string(PAGE)


@app.get("/orders")
def orders():
    return [order.as_dict() for order in db.session.scalars(db.select(Order).order_by(Order.id))]


def advance(order_id):
    order = db.session.get(Order, order_id)
    order.state = STATES[(STATES.index(order.state) + 1) % len(STATES)]
    db.session.flush()  # writes the row, which sets its version
    # Sent after the commit, so that a page that gets the event and asks at once finds the new state. Two threads that
    # change the same order may send in another order than they commit: the page goes by the version.
    sse.after_commit(db.session).enqueue("order", order.as_dict())
    db.session.commit()


def work(stop):
    while not stop.wait(1):
        for _ in range(CHANGES):
            # A context for each piece of work: at its end the connection goes back. enqueue() itself needs none.
            with app.app_context():
                advance(random.randint(1, ORDERS))


if __name__ == "__main__":
    with app.app_context():
        db.create_all()
        db.session.add_all(Order(state="new") for _ in range(ORDERS))
        db.session.commit()
    stop = threading.Event()
    worker = threading.Thread(target=work, args=(stop,), daemon=True)
    worker.start()
    app.run(port=int(os.environ.get("PORT", "5000")))
    # First the thread, then the file that it writes to.
    stop.set()
    worker.join()
    folder.cleanup()
