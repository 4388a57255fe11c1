"""Channels: each team has one of its own, and `@sse.authorize` says which of them a visitor may read.

Log in as one member here and as another in a private window: what a member writes reaches this member's team only.
Visitors who are not logged in see the notices in the channel `default`.

Run `python examples/channels.py`, and open http://127.0.0.1:5000.
"""

import os
import secrets

from flask import Flask, abort, redirect, render_template_string, request, session

from sse_batcher import SSE

TEAM_OF = {"red keeper": "red", "red striker": "red", "blue keeper": "blue", "blue striker": "blue"}

app = Flask(__name__)
app.config.update(
    # Random, so that it cannot be read here to forge a session. A real app keeps its key outside the code.
    SECRET_KEY=secrets.token_bytes(),
    # A form on another site is sent without this cookie. That is enough, since only POST requests change anything.
    SESSION_COOKIE_SAMESITE="Lax",
)
sse = SSE(app)

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Channels</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; accent-color: {{ team or "gray" }}; }
  body { max-width: 36rem; margin: 2rem auto; padding: 0 1rem; }
  input, button, select { font: inherit; margin: .2rem 0; }
  h1, li.message { border-left: .4rem solid {{ team or "gray" }}; padding-left: .6rem; }
  ul { list-style: none; padding: 0; overflow-wrap: anywhere; }
  li.notice { opacity: .7; }
</style>
{% if member %}
  <h1>{{ member }}</h1>
  <form id="write"><input name="text" aria-label="Message" maxlength="500" required> <button>To my team</button></form>
  <form method="post" action="/logout"><button>Log out</button></form>
{% else %}
  <h1>Who are you?</h1>
  <form method="post" action="/login">
    <select name="member" aria-label="Member">{% for name in members %}<option>{{ name }}</option>{% endfor %}</select>
    <button>Log in</button>
  </form>
{% endif %}
<ul id="list"></ul>
<script type="module">
  import { BatchedEventSource } from "{{ sse_script_url() }}";

  function line(kind, text) {
    const item = document.createElement("li");
    item.className = kind;
    item.textContent = text;  // never innerHTML: people write what they like
    document.getElementById("list").prepend(item);
  }

  const events = new BatchedEventSource("/events", { channels: {{ channels|tojson }} });
  events.on("notice", (data) => line("notice", data.text));
  events.on("message", (data) => line("message", data.from + ": " + data.text));

  const form = document.getElementById("write");
  if (form) form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const answer = await fetch("/messages", {method: "POST", body: new FormData(form)});
    if (answer.ok) form.reset();
  });
</script>
"""


@sse.authorize
def allowed(channels):
    # Called at every connect, in the view, so the session is there. The names are what the visitor asked for: return
    # those that this visitor may read. If none is left, the answer is 403. It is not called again for an open stream.
    return [name for name in channels if name in {"default", my_team()}]


def my_team():
    return TEAM_OF.get(session.get("member"))


@app.get("/")
def page():
    team = my_team()
    channels = ["default", team] if team else ["default"]
    return render_template_string(PAGE, member=session.get("member"), team=team, channels=channels, members=TEAM_OF)


@app.post("/login")
def login():
    member = request.form.get("member")
    if member not in TEAM_OF:
        abort(400)
    session["member"] = member  # a real app checks a password first
    sse.enqueue("notice", {"text": f"The {member} came in."})
    return redirect("/")


@app.post("/logout")
def logout():
    session.clear()
    return redirect("/")


@app.post("/messages")
def write():
    team = my_team()
    if team is None:
        abort(403)
    text = request.form.get("text", "")[:500]
    # The author and the channel come from the session, never from the form.
    sse.enqueue("message", {"from": session["member"], "text": text}, channel=team)
    return "", 204


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
