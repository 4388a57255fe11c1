// The picture: a card for each server. All of them are drawn again for each frame that has news of the servers.

const SERVERS = Array.from({ length: 10 }, (_, index) => `server-${String(index + 1).padStart(2, "0")}`);
const FIELDS = {
  tool_list_changed: { of: "count", what: "tools" },
  resource_list_changed: { of: "count", what: "resources" },
  prompt_list_changed: { of: "count", what: "prompts" },
  config_changed: { of: "timeout_s", what: "seconds of timeout" },
};
const UNKNOWN = "–";
const FULL_TALLY = 30; // drawings
const HOTTEST = 40; // per cent of the accent: the text stays readable

export class Cards {
  drawn = 0; // since the count began
  #list;
  #tally;
  #label;
  #servers = new Map();
  #fresh = 0; // drawings since the last picture of the screen

  constructor(root) {
    [this.#list, this.#tally, this.#label] = ["ul", ".tally", ".drawn strong"].map((name) => root.querySelector(name));
    for (const name of SERVERS) this.#add(name);
  }

  /** One frame: if it has news of the servers, all cards are drawn, once. */
  addFrame({ type, events }) {
    if (!Object.hasOwn(FIELDS, type) && type !== "error") return;
    for (const data of events) this.#note(type, data);
    this.#draw();
    this.#fresh += 1;
    this.drawn += 1;
  }

  /** Forget what came, and count from zero. */
  clear() {
    this.drawn = this.#fresh = 0;
    for (const server of this.#servers.values()) Object.assign(server, { state: {}, failed: false });
    this.#draw();
  }

  /** Show how often they were drawn, of `most` times, and that they were drawn just now: hotter, if many times. */
  paint(most) {
    this.#label.textContent = `drawn ${this.drawn.toLocaleString("en")} time${this.drawn === 1 ? "" : "s"}`;
    this.#tally.style.setProperty("--drawn", this.drawn);
    this.#tally.style.setProperty("--most", Math.max(FULL_TALLY, most));
    if (!this.#fresh) return;
    this.#list.style.setProperty("--heat", `${Math.min(HOTTEST, 14 + this.#fresh)}%`);
    this.#list.dataset.flash = this.#list.dataset.flash === "a" ? "b" : "a"; // another animation, so that it starts
    this.#fresh = 0;
  }

  #add(name) {
    const card = document.createElement("li");
    const title = element("b", "");
    title.append(heard("server-"), name.slice("server-".length));
    card.append(title, " ");
    const values = {};
    for (const [type, { what }] of Object.entries(FIELDS)) {
      const value = element("span", UNKNOWN);
      values[type] = value.firstChild;
      value.append(heard(` ${what}`));
      card.append(value, " ");
    }
    this.#list.append(card);
    this.#servers.set(name, { card, values, state: {}, failed: false });
  }

  #draw() {
    for (const { card, values, state, failed } of this.#servers.values()) {
      card.classList.toggle("failed", failed);
      for (const [type, text] of Object.entries(values)) text.data = state[type] ?? UNKNOWN;
    }
  }

  #note(type, data) {
    const server = this.#servers.get(data.server);
    if (!server) return;
    server.failed = type === "error";
    if (server.failed) return;
    const value = data[FIELDS[type].of];
    server.state[type] = Number.isFinite(value) ? value : "?";
  }
}

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

/** For screen readers. The style sheet shows it only if there is room. */
function heard(text) {
  const made = element("span", text);
  made.className = "unit";
  return made;
}
