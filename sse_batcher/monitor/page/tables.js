// The two tables: the streams, and the newest frames. On a phone, each row is a card, so each cell has its label.

import { count, plural, size, time, user, visible, visibleLines } from "./format.js";
import { element, Rows, setText } from "./rows.js";

function cell(row, label, className = "") {
  const made = element("td", className);
  made.setAttribute("role", "cell");
  made.dataset.label = label;
  row.append(made);
  return made;
}

function tableRow() {
  const row = element("tr");
  row.setAttribute("role", "row");
  return row;
}

const more = (number) => (number ? [`and ${count(number)} more`] : []);

export class Streams {
  #rows;
  #cells = new WeakMap();
  #items = new WeakMap();

  /** `kick(item, button)`: its button was pressed. */
  constructor(body, kick) {
    this.kick = kick;
    this.#rows = new Rows(body, () => this.#make(), (row, item) => this.#update(row, item));
  }

  show(rows) {
    this.#rows.show(rows.map((row) => [row.id, row]));
  }

  #make() {
    const row = tableRow();
    const cells = {
      user: cell(row, "User", "user"),
      channels: cell(row, "Channels", "channels"),
      lag: cell(row, "Behind", "lag"),
      transport: cell(row, "Transport"),
      age: cell(row, "Open for", "age"),
      address: cell(row, "Address", "address"),
      kick: cell(row, "", "kick"),
    };
    cells.address.dataset.column = "address";
    cells.kick.dataset.column = "kick";
    const button = element("button", "small");
    button.type = "button";
    button.append("Kick", element("span", "heard"));
    button.addEventListener("click", () => this.kick(this.#items.get(row), button));
    cells.kick.append(button);
    this.#cells.set(row, cells);
    return row;
  }

  #update(row, item) {
    this.#items.set(row, item);
    const cells = this.#cells.get(row);
    setText(cells.user, item.user === null ? "no user" : user(item.user));
    cells.user.classList.toggle("none", item.user === null);
    const channels = [...item.channels.map(visible), ...more(item.more_channels)];
    setText(cells.channels, channels.join(", ") || "no channel");
    setText(cells.lag, behind(item));
    row.classList.toggle("late", item.behind);
    setText(cells.transport, item.poll ? `${item.transport}, a poll` : item.transport);
    setText(cells.age, time(item.age));
    setText(cells.address, item.address ? visible(item.address) : "not known");
    const button = cells.kick.firstChild;
    button.hidden = item.user === null;
    setText(button.lastChild, item.user === null ? "" : ` ${user(item.user)}`);
  }
}

function behind({ behind, lag, lag_is_longer }) {
  if (!behind) return "no";
  if (lag === null) return "yes";
  return `${lag_is_longer ? "more than " : ""}${time(lag)}`;
}

export class Frames {
  #rows;
  #ages = new WeakMap();

  constructor(body) {
    this.#rows = new Rows(body, (item) => this.#make(item), (row, item) => setText(this.#ages.get(row), time(item.age)));
  }

  show(rows) {
    this.#rows.show(rows.map((row) => [row.id, row]));
  }

  #make(item) {
    const row = tableRow();
    const types = item.types.map(([type, number]) => (number > 1 ? `${visible(type)} ×${count(number)}` : visible(type)));
    const what = element("div", "what");
    what.append(element("span", "name", [...types, ...more(item.more_types)].join(", ")));
    if (item.content) what.append(content(item));
    cell(row, "Types", "types").append(what);
    cell(row, "For").textContent = audience(item);
    cell(row, "Events", "number").textContent = count(item.count);
    cell(row, "Size", "number").textContent = size(item.bytes);
    cell(row, "Closed by").textContent = item.reason.replaceAll("_", " ");
    this.#ages.set(row, cell(row, "Age", "number"));
    return row;
  }
}

function audience({ channel, users, more_users }) {
  if (channel === "*") return "all streams";
  if (channel !== null) return visible(channel);
  return `user ${[...users.map(user), ...more(more_users)].join(", ")}`;
}

function content(item) {
  const details = element("details");
  details.append(element("summary", "", "Content"));
  for (const body of item.content) details.append(element("pre", "", visibleLines(body)));
  const left = item.count - item.content.length;
  if (left > 0) details.append(element("p", "note", `${plural(left, "event")} more`));
  return details;
}
