// What happens now: numbers for each second, which are differences between two overviews, each with a line of its past.

import { count, plural, rate, size } from "./format.js";
import { setText } from "./rows.js";

const KEPT = 60; // points of a line
const SVG = "http://www.w3.org/2000/svg";

export class Tiles {
  #before = null;
  #lines = new Map();

  constructor(root) {
    this.root = root;
    for (const tile of root.querySelectorAll("[data-tile]")) {
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", `0 0 ${KEPT - 1} 20`);
      svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("aria-hidden", "true");
      const line = document.createElementNS(SVG, "polyline");
      svg.append(line);
      tile.parentElement.append(svg);
      this.#lines.set(tile.dataset.tile, { line, values: [] });
    }
  }

  /** Another process is shown, or the same one after a pause: differences to the old overview would be wrong. */
  forget() {
    this.#before = null;
    for (const each of this.#lines.values()) each.values = [];
  }

  show({ at, counts, users }) {
    const before = this.#before;
    this.#before = { at, counts };
    const { behind } = counts.clients_by_state;
    const { attached, detached } = counts.clients_by_transport;
    this.#set("streams", counts.clients, count(counts.clients), [
      users && plural(users, "user"),
      behind && `${count(behind)} behind`,
      attached && detached && `${count(attached)} attached`,
    ]);
    if (!before || at <= before.at) return;
    const seconds = at - before.at;
    const per = (name) => Math.max(0, (counts[name] - before.counts[name]) / seconds);
    const frames = per("frames");
    const saved = per("saved_frames");
    const savedBytes = (counts.saved_bytes - before.counts.saved_bytes) / seconds;
    this.#set("events", per("enqueued"), rate(per("enqueued")), [
      per("replaced") > 0 && `${rate(per("replaced"))} replaced`,
      counts.pending_events > 0 && `${count(counts.pending_events)} wait`,
    ]);
    this.#set("frames", frames, rate(frames), [per("batches") > 0 && `${rate(per("batches"))} batches made`]);
    this.#set("bytes", per("bytes"), size(per("bytes")), [savedBytes !== 0 && `${size(savedBytes)} saved`]);
    const share = frames + saved > 0 ? Math.round((100 * saved) / (frames + saved)) : null;
    this.#set("saved", saved, rate(saved), [share !== null && `${share} % of all`]);
  }

  #set(name, value, text, notes) {
    setText(this.root.querySelector(`[data-tile=${name}]`), text);
    setText(this.root.querySelector(`[data-note=${name}]`), notes.filter(Boolean).join(", "));
    const { line, values } = this.#lines.get(name);
    values.push(value);
    if (values.length > KEPT) values.shift();
    const most = Math.max(...values, 1e-9);
    const first = KEPT - values.length;
    line.setAttribute("points", values.map((each, index) => `${first + index},${(19 - (18 * each) / most).toFixed(1)}`).join(" "));
  }
}
