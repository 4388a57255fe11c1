"""Chat: the tokens of a language model go to the page as they come, some at a time and joined, as text.

The model here is a fake one that needs no network. Reload in the middle of an answer, or open a second tab: the answer
is there from its beginning, and goes on. The page gets what is finished from its view, and with it the cursor from
before the answer that is being written. All that came after this cursor comes from the history of the stream.

Run `python examples/chat.py`, and open http://127.0.0.1:5000.
"""

import os
import re
import secrets
import threading
import time
from contextlib import suppress

from flask import Flask, abort, render_template_string, request, session

from sse_batcher import SSE, ClosedError, Text

app = Flask(__name__)
app.config.update(
    # Random, so that it cannot be read here to forge a session. A real app keeps its key outside the code.
    SECRET_KEY=secrets.token_bytes(),
    SESSION_COOKIE_SAMESITE="Lax",
    # Between two tokens comes nothing. The default is a line end.
    SSE_PER_TYPE={"token": {"join": ""}},
    # These come at once, and after the tokens that wait. So the page gets all three types in the order of enqueue.
    SSE_CRITICAL_TYPES={"question", "turn"},
)
sse = SSE(app)


class Chat:
    """The chat of one visitor. A real app keeps it in a database."""

    def __init__(self):
        self.lock = threading.Lock()
        self.turns = []  # those whose answers are finished
        self.cursor = None  # from before the answer that is being written; None if there is none


chats = {}

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Chat</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
  body { max-width: 36rem; margin: 2rem auto; padding: 0 1rem; }
  p { white-space: pre-wrap; overflow-wrap: anywhere; }
  .question { font-weight: bold; }
  input, button { font: inherit; }
</style>
<div id="turns"></div>
<form id="ask"><input name="question" aria-label="Question" maxlength="500" required> <button>Ask</button></form>
<script type="module">
  import { BatchedEventSource } from "{{ sse_script_url() }}";

  const turns = {};  // the elements of each question and answer
  let writing = null;  // the element of the answer that is being written

  function show({number, question, answer}) {
    const texts = [question, answer];
    turns[number] ??= ["question", "answer"].map((kind) => {
      const line = document.createElement("p");
      line.className = kind;
      return document.getElementById("turns").appendChild(line);
    });
    // Never innerHTML: people, and models, write what they like.
    turns[number].forEach((line, i) => { line.textContent = texts[i]; });
  }

  {{ turns|tojson }}.forEach(show);
  const events = new BatchedEventSource("/events", { cursor: "{{ cursor or sse_cursor() }}" });
  events.on("question", ({number, question}) => {
    if (turns[number]) return;  // the view has shown it already, with its answer
    show({number, question, answer: ""});
    writing = turns[number][1];
  });
  events.onText("token", (text) => { if (writing) writing.textContent += text; });
  events.on("turn", (turn) => { show(turn); writing = null; });
  // Some tokens are lost, so what follows cannot be appended. The answer comes as a whole when it is finished.
  events.on("sse_gap", () => { writing = null; });
  events.on("turns", (list) => list.forEach(show));

  const form = document.getElementById("ask");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const answer = await fetch("/ask", {method: "POST", body: new FormData(form)});
    if (answer.ok) form.reset();
  });
</script>
"""


@sse.identify
def visitor():
    return session.get("visitor")


@sse.user_snapshot
def state(user):
    # For a page that has missed something, for example since it was asleep for an hour.
    return ("turns", chats[user].turns) if user in chats else None


@app.get("/")
def page():
    chat = chats.setdefault(session.setdefault("visitor", secrets.token_hex()), Chat())
    with chat.lock:
        return render_template_string(PAGE, turns=chat.turns, cursor=chat.cursor)


@app.post("/ask")
def ask():
    user, question = session.get("visitor"), request.form.get("question", "")[:500]
    chat = chats.get(user)
    if chat is None:
        abort(403)
    with chat.lock:
        if chat.cursor is not None:
            abort(409)  # one answer at a time
        chat.cursor = sse.cursor()  # before the first event of the answer
        number = len(chat.turns) + 1
    threading.Thread(target=answer, args=(chat, user, number, question), daemon=True).start()
    return "", 204


def answer(chat, user, number, question):
    with suppress(ClosedError):  # the process is ending
        sse.enqueue("question", {"number": number, "question": question}, user=user)
        text = ""
        for token in fake_model(question):
            text += token
            sse.enqueue("token", Text(token), user=user)
        turn = {"number": number, "question": question, "answer": text}
        # In one step, so that the events of the next answer come after this one.
        with chat.lock:
            chat.turns.append(turn)
            chat.cursor = None
            sse.enqueue("turn", turn, user=user)


def fake_model(question):
    """Yield the tokens of an answer, each a word or a part of one, with the spaces and line ends that follow it."""
    text = f"You have asked: {question}\n\nI am no real model, so all that I can do is count \N{ABACUS}:\n"
    text += "".join(f"{number} bottles of <b>beer</b> on the wall,\n" for number in range(99, 89, -1)) + "and so on."
    for token in re.findall(r"\w{1,4}\s*|\W\s*", text):
        time.sleep(0.02)
        yield token


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
