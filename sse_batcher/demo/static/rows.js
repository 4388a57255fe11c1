// The rows of one side: what came, newest first, each to be opened. Text from outside goes through textContent alone.

const MAX_ROWS = 200;
const PREVIEW = 160; // characters

export class Rows {
  #list;
  #waiting = [];
  #fill = new WeakMap(); // <details> -> what makes its content, when it is first opened
  #reading = false;
  #held = false; // by a pointer that is pressed: nothing may move away below it, or it would click on nothing

  constructor(list) {
    this.#list = list;
    // "toggle" does not bubble.
    list.addEventListener("toggle", ({ target }) => target.open && this.#opened(target), true);
    list.addEventListener("click", () => (this.#reading = true));
    list.addEventListener("pointerdown", () => (this.#held = true));
    for (const end of ["pointerup", "pointercancel"]) {
      addEventListener(end, () => {
        if (!this.#held) return;
        this.#held = false;
        setTimeout(() => this.paint()); // the click comes first
      });
    }
  }

  /** A frame. `delays` maps the numbers of its events to what batching added to them, if that is known. */
  addFrame(frame, delays) {
    this.#add(() => this.#frame(frame, delays));
  }

  /** A line about the stream itself. A second one at once takes the place of the first. */
  addNote(text) {
    if (this.#waiting.length === 0 && this.#list.firstElementChild?.matches(".note")) {
      this.#list.firstElementChild.remove();
    }
    const at = clock();
    this.#add(() => {
      const row = element("li", "note");
      row.append(element("span", "name", text), time(at));
      return row;
    });
  }

  clear() {
    this.#waiting = [];
    this.#list.replaceChildren();
    this.#reading = false;
  }

  /** Show what comes next, whatever was read before. */
  follow() {
    this.#reading = false;
    this.#list.scrollTop = 0;
  }

  /** Put the new rows into the page. They glow for a moment, if asked to. */
  paint(glowing) {
    if (!this.#waiting.length || this.#held) return;
    const list = this.#list;
    const rows = this.#waiting.reverse().map((make) => make());
    this.#waiting = [];
    if (glowing) for (const row of rows) row.classList.add("new");
    // A reader further down the list, or in a row, keeps their place.
    const height = this.#reading || list.scrollTop > 0 ? list.scrollHeight : null;
    list.prepend(...rows);
    if (height !== null) list.scrollTop += list.scrollHeight - height;
    let last = list.lastElementChild;
    for (let excess = list.childElementCount - MAX_ROWS; excess > 0 && last; excess -= 1) {
      const before = last.previousElementSibling;
      if (!last.matches(":focus-within, :has(> [open])")) last.remove();
      last = before;
    }
  }

  #add(make) {
    this.#waiting.push(make);
    if (this.#waiting.length > MAX_ROWS) this.#waiting.shift(); // a page in the background paints nothing
  }

  #opened(details) {
    this.#fill.get(details)?.();
    this.#fill.delete(details);
  }

  #frame(frame, delays) {
    const { name, type, batch, events } = frame;
    const row = element("li", batch ? "batch" : type === "error" ? "error" : "event");
    const title = element("span", "title");
    title.append(element("span", "name", name));
    if (batch) title.append(element("span", "badge", `${events.length} events`));
    const summary = element("summary");
    summary.append(title, time(frame.clock), element("span", "text", preview(frame)));
    const details = this.#details(summary, () => [
      element("p", "facts", facts(frame, delays)),
      ...(batch ? [table(type, events, delays)] : []),
      ...(batch ? [this.#details(element("summary", "", "JSON"), () => [json(events)])] : [json(events[0])]),
    ]);
    row.append(details);
    return row;
  }

  #details(summary, content) {
    const details = element("details");
    details.append(summary);
    this.#fill.set(details, () => details.append(...content()));
    return details;
  }
}

const REASONS = {
  time_window: "its time was over",
  size_limit: "it was full",
  critical: "something came that cannot wait",
  leading: "nothing had come for a while",
  manual: "it was flushed",
  shutdown: "the server ended",
};

function facts({ batch, reason, bytes, events }, delays) {
  const size = `${bytes.toLocaleString("en")} bytes`;
  if (batch) return `${events.length} events in ${size}, sent because ${REASONS[reason] ?? "of"} (${reason}).`;
  const delay = delays?.get(events[0].n);
  return `One event in ${size}${delay === undefined ? "" : `, ${ms(delay)} later than without batching`}.`;
}

function preview({ type, batch, events, reason }) {
  if (!batch) return visible(describe(type, events[0])).slice(0, PREVIEW);
  const names = events.map((data) => plainText(data.server ?? data.message ?? data.n));
  return visible(`${reason}: ${names.join(", ").slice(0, PREVIEW)}`);
}

function table(type, events, delays) {
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const title of ["server", "what changed", "delay"]) {
    const cell = element("th", "", title);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const data of events) {
    const delay = delays?.get(data.n);
    const row = body.insertRow();
    row.append(
      element("td", "", visible(plainText(data.server))),
      element("td", "", visible(changed(type, data))),
      element("td", "number", delay === undefined ? "" : ms(delay)),
    );
  }
  return table;
}

function describe(type, data) {
  const server = plainText(data.server);
  return `${server}${server && ": "}${changed(type, data)}`;
}

/** What an event says, in words. */
function changed(type, data) {
  if (data.message !== undefined) return plainText(data.message);
  if (type.endsWith("_list_changed")) {
    const some = (names) => (Array.isArray(names) && names.length ? names.map(plainText).join(", ") : "nothing");
    return `${plainText(data.count)} now; added ${some(data.added)}; removed ${some(data.removed)}`;
  }
  if (data.timeout_s !== undefined) return `its timeout is ${plainText(data.timeout_s)} s now`;
  return JSON.stringify(data);
}

function plainText(value) {
  return typeof value === "string" ? value : (JSON.stringify(value) ?? "");
}

function json(value) {
  return element("pre", "", visible(JSON.stringify(value, null, 2)));
}

/** Text with its invisible characters shown: some hide things, and some turn around what stands after them. */
function visible(text) {
  return text.replace(
    /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu,
    (character) => (character === "\n" ? character : `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`),
  );
}

export function ms(milliseconds) {
  return `${Math.round(milliseconds).toLocaleString("en")} ms`;
}

/** The time of the day, to the millisecond. */
export function clock() {
  const now = new Date();
  const two = (number) => String(number).padStart(2, "0");
  const seconds = `${two(now.getSeconds())}.${String(now.getMilliseconds()).padStart(3, "0")}`;
  return `${two(now.getHours())}:${two(now.getMinutes())}:${seconds}`;
}

function time(text) {
  return element("time", "", text);
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
