// One live stream: an EventSource that comes back by itself, and its blocks as frames.

export const TYPES = [
  "tool_list_changed",
  "resource_list_changed",
  "prompt_list_changed",
  "config_changed",
  "log",
  "error",
];

const RETRY_MS = 2000;

export class Stream {
  #source = null;
  #reason = "";

  /**
   * `opened(gap)`: open, or open again; `gap` says why something was missed, "" where nothing was.
   * `changed()`: `state` is another: connecting, open or lost, with `why` in words.
   * `received(frame)`: {name, type, batch, events, bytes, at, reason}.
   */
  constructor({ opened, changed, received }) {
    Object.assign(this, { opened, changed, received, state: "connecting", why: "" });
  }

  open(url) {
    this.#source?.close();
    this.#set("connecting");
    this.#reason = "";
    const source = new EventSource(url);
    this.#source = source;
    for (const type of TYPES) {
      source.addEventListener(type, (event) => {
        // Two things are named "error": an event of the hub, which has data, and what the browser says of a loss.
        if (event.data === undefined) this.#lost(source, url);
        else this.received(frameOf(event, type, [JSON.parse(event.data)]));
      });
      source.addEventListener(`${type}_batch`, (event) => {
        const { events, reason } = JSON.parse(event.data);
        this.received({ ...frameOf(event, type, events), batch: true, reason });
      });
    }
    source.addEventListener("sse_open", () => this.#open(""));
    source.addEventListener("sse_gap", (event) => this.#open(JSON.parse(event.data).reason));
    source.addEventListener("sse_busy", (event) => (this.#reason = `busy (${JSON.parse(event.data).reason})`));
    source.addEventListener("sse_bye", (event) => (this.#reason = `ended (${JSON.parse(event.data).reason})`));
  }

  #open(gap) {
    this.#reason = "";
    this.#set("open");
    this.opened(gap);
  }

  #lost(source, url) {
    this.#set("lost", `${this.#reason || "connection lost"}, trying again`);
    if (source.readyState !== EventSource.CLOSED) return;
    // The browser has given up, as after any answer that is no stream.
    setTimeout(() => this.#source === source && this.open(url), RETRY_MS);
  }

  #set(state, why = state) {
    this.state = state;
    this.why = why;
    this.changed();
  }
}

function frameOf({ type: name, data, lastEventId, timeStamp }, type, events) {
  // What the block took on the wire. All of it is ASCII, and each line is there once.
  const bytes = `event: ${name}\ndata: ${data}\nid: ${lastEventId}\n\n`.length;
  return { name, type, events, bytes, at: timeStamp, batch: false, reason: "" };
}
