// One side of the page: its stream, and what it shows of it.

import { BatchedEventSource } from "/events/sse-batcher.js";
import { Cards } from "./cards.js";
import { takeBlock } from "./meter.js";
import { Rows } from "./rows.js";

export const TYPES = [
  "tool_list_changed",
  "resource_list_changed",
  "prompt_list_changed",
  "config_changed",
  "log",
  "error",
];

export class Side {
  state = "connecting"; // or open, or lost
  #events = null;
  #reason = ""; // why the server ended the stream, or did not open it
  #shown;

  /**
   * `opened(gap)`: open, or open again; `gap` says why something was missed, "" if nothing was.
   * `changed()`: `state` is another.
   * `received(frame)`: {type, events, name, batch, bytes, reason, at}.
   */
  constructor(name, { opened, changed, received }) {
    const root = document.getElementById(name);
    Object.assign(this, { name, opened, changed, received });
    this.rows = new Rows(root.querySelector("ol"));
    this.cards = new Cards(root);
    this.counts = root.querySelectorAll("[data-count]");
    this.#shown = root.querySelector(".state");
  }

  open(url) {
    this.#events?.close();
    this.#set("connecting");
    this.#reason = "";
    const events = new BatchedEventSource(url);
    this.#events = events;
    for (const type of TYPES) {
      events.onBatch(type, (list, { id }) => {
        const block = takeBlock(id);
        this.received({ type, events: list, batch: block.name !== type, ...block });
      });
    }
    events.on("sse_open", () => this.#open(""));
    events.on("sse_gap", ({ reason }) => this.#open(reason));
    events.on("sse_busy", ({ reason }) => (this.#reason = `busy (${reason})`));
    events.on("sse_bye", ({ reason }) => (this.#reason = `ended (${reason})`));
    events.addEventListener("statechange", () => events.state === "waiting" && this.#lost());
  }

  #open(gap) {
    if (this.state === "open" && !gap) return; // a poll: each of them opens
    this.#reason = "";
    this.#set("open");
    this.opened(gap);
  }

  #lost() {
    this.#set("lost", `${this.#reason || "connection lost"}, trying again`);
  }

  #set(state, why = state) {
    this.state = state;
    this.#shown.textContent = why;
    this.#shown.dataset.state = state;
    this.changed();
  }
}
