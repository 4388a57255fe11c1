// The demo: two live streams, and what the server counted for them.
// Whatever comes from outside is shown through textContent alone.

const TYPES = ["tool_list_changed", "resource_list_changed", "prompt_list_changed"];
const CONTROLS = ["sse_open", "sse_gap", "sse_busy", "sse_bye"];
const MAX_ROWS = 200;

const tab = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const query = `?tab=${tab}`;
const saving = document.getElementById("saving");
const sides = ["batched", "plain"].map(openSide);

for (const button of document.querySelectorAll("button[data-action]")) {
  button.addEventListener("click", () => send("POST", `/fire/${button.dataset.action}`));
}
document.getElementById("clear").addEventListener("click", clear);

function openSide(name) {
  const root = document.getElementById(name);
  const side = { name, events: 0, opened: false, list: root.querySelector("ol"), counts: {} };
  for (const cell of root.querySelectorAll("[data-count]")) side.counts[cell.dataset.count] = cell;

  const state = root.querySelector(".state");
  const show = (text, kind = "") => {
    state.textContent = text;
    state.className = `state ${kind}`;
  };

  const source = new EventSource(`/${name}${query}`);
  for (const type of TYPES) {
    source.addEventListener(type, (event) => received(side, type, JSON.parse(event.data)));
    source.addEventListener(`${type}_batch`, (event) => receivedBatch(side, JSON.parse(event.data)));
  }
  for (const type of CONTROLS) {
    source.addEventListener(type, (event) => {
      const reason = JSON.parse(event.data).reason ?? "";
      if (type === "sse_open" || type === "sse_gap") {
        show("open", "open");
        // The server has counted a new stream from zero: so do both sides, or they would not compare.
        if (side.opened) countFromZero();
        side.opened = true;
      } else {
        show(type === "sse_busy" ? `busy: ${reason}` : `ended: ${reason}`);
      }
      addRow(side, "control", type, line("text", reason));
    });
  }
  // Two things have this name: an event of the hub, which has data, and what the browser says of a lost connection.
  source.addEventListener("error", (event) => {
    if (event.data !== undefined) received(side, "error", JSON.parse(event.data));
    else if (source.readyState === EventSource.CLOSED) show("closed for good", "closed");
    else show("connecting again", "closed");
  });
  return side;
}

function received(side, type, data) {
  side.events += 1;
  const text = type === "error" ? `${data.server}: ${data.message}` : `${data.server} has ${data.count} now`;
  addRow(side, type === "error" ? "error" : "event", type, line("text", text));
  refresh();
}

function receivedBatch(side, batch) {
  side.events += batch.events.length;
  const chips = line("chips");
  for (const data of batch.events) chips.append(line("", data.server));
  const row = addRow(side, "batch", batch.type, chips);
  row.querySelector(".name").append(line("badge", `${batch.events.length} events`));
  refresh();
}

function addRow(side, kind, name, details) {
  const row = document.createElement("li");
  row.className = `${kind} new`;
  const now = new Date();
  const time = document.createElement("time");
  time.textContent = `${now.toLocaleTimeString("en-GB")}.${String(now.getMilliseconds()).padStart(3, "0")}`;
  row.append(line("name", name), time, details);
  side.list.prepend(row);
  while (side.list.children.length > MAX_ROWS) side.list.lastElementChild.remove();
  return row;
}

function line(className, text = "") {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = text;
  return element;
}

// One question at a time, however fast events come: each answer holds all that was sent before it.
let asking = false;
let askAgain = false;

async function refresh() {
  askAgain = true;
  if (asking) return;
  asking = true;
  while (askAgain) {
    await new Promise((resolve) => setTimeout(resolve, 60));
    askAgain = false;
    const answer = await send("GET", `/counts${query}`);
    if (answer) showCounts(await answer.json());
  }
  asking = false;
}

function showCounts(counts) {
  for (const side of sides) {
    const { frames, bytes } = counts[side.name] ?? { frames: 0, bytes: 0 };
    const shown = { frames, bytes, events: side.events };
    for (const [name, cell] of Object.entries(side.counts)) cell.textContent = shown[name].toLocaleString("en");
  }
  const { batched, plain } = counts;
  if (!batched || !plain?.frames) return say("Press a button.");
  const saved = (name) => `${Math.round(100 * (1 - batched[name] / plain[name]))} %`;
  say("Batching saves ", strong(saved("frames")), " of the frames and ", strong(saved("bytes")), " of the bytes.");
}

function say(...parts) {
  saving.className = "";
  saving.replaceChildren(...parts);
}

function strong(text) {
  const element = document.createElement("strong");
  element.textContent = text;
  return element;
}

async function countFromZero() {
  await send("DELETE", `/counts${query}`);
  for (const side of sides) side.events = 0;
  refresh();
}

function clear() {
  for (const side of sides) side.list.replaceChildren();
  countFromZero();
}

async function send(method, path) {
  try {
    // The server takes nothing but questions without this header, and no foreign page can send it.
    const answer = await fetch(path, { method, headers: { "X-Requested-With": "sse_batcher" } });
    if (answer.ok) return answer;
    say(`The server answers ${answer.status}.`);
  } catch {
    say("The server does not answer. The streams come back by themselves when it does.");
  }
  saving.className = "failed";
  return null;
}
