"""Notes: `user=` sends an event to one user, in all of the user's tabs and windows, and to no other user.

Log in as one user here, in two tabs, and as another one in a private window. `@sse.identify` says whose stream it is,
and `@sse.user_snapshot` gives a new page the notes that came before it was open.

Run `python examples/notes.py`, and open http://127.0.0.1:5000.
"""

import itertools
import os
import secrets
from collections import deque

from flask import Flask, abort, redirect, render_template_string, request, session

from sse_batcher import SSE

# By the number of each user. Users choose their names themselves, so the numbers are what identifies them.
NAMES = {1: "Ann", 2: "Bob <img src=x onerror=\"document.title = 'owned'\">", 3: "</script>Cleo & \N{OWL}"}

app = Flask(__name__)
app.config.update(
    # Random, so that it cannot be read here to forge a session. A real app keeps its key outside the code.
    SECRET_KEY=secrets.token_bytes(),
    # A form on another site is sent without this cookie. That is enough, since only POST requests change anything.
    SESSION_COOKIE_SAMESITE="Lax",
)
sse = SSE(app)
notes = {user: deque(maxlen=20) for user in NAMES}
numbers = itertools.count(1)

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Notes</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
  body { max-width: 36rem; margin: 2rem auto; padding: 0 1rem; }
  input, button, select { font: inherit; margin: .2rem 0; }
  ul { list-style: none; padding: 0; overflow-wrap: anywhere; }
</style>
{% macro users(field, label) %}
  <select name="{{ field }}" aria-label="{{ label }}">
    {% for number, name in names.items() %}<option value="{{ number }}">{{ name }}</option>{% endfor %}
  </select>
{% endmacro %}
{% if user %}
  <h1>{{ names[user] }}</h1>
  <form id="write">To {{ users("to", "To") }}: <input name="text" aria-label="Note" maxlength="500" required>
    <button>Send</button></form>
  <form method="post" action="/logout"><button>Log out</button></form>
  <ul id="list"></ul>
  <script type="module">
    import { BatchedEventSource } from "{{ sse_script_url() }}";

    function show({number, from, text}) {
      if (document.getElementById("note-" + number)) return;  // it was in the state already
      const item = document.createElement("li");
      item.id = "note-" + number;
      item.textContent = from + ": " + text;  // never innerHTML: people write what they like
      document.getElementById("list").prepend(item);
    }

    // All tabs of this user have one connection. The name is the user's, since tabs that share see the same stream.
    const events = new BatchedEventSource("/events?user={{ user }}", { share: "user-{{ user }}" });
    events.on("notes", (list) => list.forEach(show));
    events.on("note", show);
    events.on("sse_gap", ({ channels }) => channels || location.reload());  // inside the stream, no state follows a gap
    events.onerror = ({ status }) => { if (status === 403) location.reload(); };  // another user is logged in, or none

    const form = document.getElementById("write");
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const answer = await fetch("/notes", {method: "POST", body: new FormData(form)});
      if (answer.ok) form.elements.text.value = "";
    });
  </script>
{% else %}
  <h1>Who are you?</h1>
  <form method="post" action="/login">{{ users("user", "User") }} <button>Log in</button></form>
{% endif %}
"""


@sse.authorize
def may_listen(channels):
    # A page stays open while its user logs out and another one logs in. It must not get the notes of the other one.
    if request.args.get("user", type=int) != session.get("user"):
        abort(403)
    return [name for name in channels if name == "default"]


@sse.identify
def my_user():
    # Called at every connect, in the view, so the session is there. None: this stream belongs to no user.
    return session.get("user")


@sse.user_snapshot
def my_notes(user):
    return "notes", list(notes[user])


@app.get("/")
def page():
    return render_template_string(PAGE, user=session.get("user"), names=NAMES)


def chosen(field):
    user = request.form.get(field, type=int)
    if user not in NAMES:
        abort(400)
    return user


@app.post("/login")
def login():
    session["user"] = chosen("user")  # a real app checks a password first
    return redirect("/")


@app.post("/logout")
def logout():
    user = session.pop("user", None)
    if user is not None:
        # The streams of this user end. Their pages come back, and those that are still logged in are the user's again.
        sse.kick(user=user)
    return redirect("/")


@app.post("/notes")
def write():
    if "user" not in session:
        abort(403)
    to = chosen("to")
    # The author comes from the session, never from the form.
    note = {"number": next(numbers), "from": NAMES[session["user"]], "text": request.form.get("text", "")[:500]}
    notes[to].append(note)  # first the state, so that it is either in the snapshot of a new page, or comes after it
    sse.enqueue("note", note, user=to)
    return "", 204


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
