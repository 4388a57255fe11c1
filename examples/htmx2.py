"""htmx 2: the server renders a list of seats. A change is sent as HTML, and replaces the seat with its id.

The page needs no JavaScript of its own but two lines: they let htmx read the stream with `BatchedEventSource`, which
comes back with its cursor also after an error status, such as a proxy's 502. htmx alone comes back without it.

Run `python examples/htmx2.py`, and open http://127.0.0.1:5000 in several windows.
"""

import os
import threading

from flask import Flask, abort, render_template_string, request
from markupsafe import Markup

from sse_batcher import SSE, Text

app = Flask(__name__)
app.config["CDN"] = "https://cdn.jsdelivr.net"
app.config.from_prefixed_env()  # for example FLASK_CDN, a server of your own, and FLASK_SSE_BACKEND, a Redis
sse = SSE(app)

# A real app has them in its database.
seats = {1: "Ada", 2: "Grace", 3: "<img src=x onerror=alert(1)>", 4: "Alan"}
lock = threading.Lock()  # guards the seats, and the order of their events

# Text is sent as it is, so the templates have to escape what people write. render_template_string() does, and so does
# render_template() if the name of the file ends in .html.
SEATS = """{% for seat, name in seats %}<li id="seat-{{ seat }}" hx-swap-oob="true">{{ name }}</li>{% endfor %}"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Seats</title><link rel="icon" href="data:,">
<script src="{{ config.CDN }}/npm/htmx.org@2/dist/htmx.min.js"></script>
<script src="{{ config.CDN }}/npm/htmx-ext-sse@2/dist/sse.min.js"></script>
<script type="module">
  import { BatchedEventSource } from "{{ sse_script_url() }}";
  htmx.createEventSource = (url) => new BatchedEventSource(url);
</script>
<ol hx-ext="sse" sse-connect="/events" sse-swap="message" hx-swap="none">{{ seats }}</ol>
<form hx-post="/seats" hx-swap="none">
  Seat <input name="seat" type="number" min="1" max="4" value="1" required>
  is for <input name="name" maxlength="100" required> <button>Change</button>
</form>
<button hx-post="/rotation" hx-swap="none">Everybody moves</button>
"""


def render(template, numbers):
    # As Markup, which a template does not escape again.
    return Markup(render_template_string(template, seats=[(number, seats[number]) for number in numbers]))


def as_text(numbers):
    return Text(render(SEATS, numbers))


@sse.snapshot("default")
def all_seats():
    # For a page that is new, and for one that comes back and has missed something.
    with lock:
        return "message", as_text(seats)


def change(names):
    # Called with the lock held.
    seats.update(names)
    for number in names:
        # The changes of a moment reach the page as one text, which is one swap. With a key, the newest change of a seat
        # replaces the older ones in it.
        sse.enqueue("message", as_text([number]), key=number)


@app.get("/")
def page():
    with lock:
        return render_template_string(PAGE, seats=render(SEATS, seats))


@app.post("/seats")
def take():
    number = request.form.get("seat", type=int)
    if number not in seats:
        abort(400)
    with lock:
        change({number: request.form.get("name", "")[:100]})
    return "", 204


@app.post("/rotation")
def rotate():
    with lock:
        names = list(seats.values())
        change(dict(zip(seats, [names[-1], *names[:-1]], strict=True)))
    return "", 204


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
