// The page of the monitor: asks for overviews, and shows them.

import { count, plural, size, time, visible } from "./format.js";
import { Kick } from "./kick.js";
import { Poll } from "./poll.js";
import { Rows, element, setText, Terms } from "./rows.js";
import { Frames, Streams } from "./tables.js";
import { Tiles } from "./tiles.js";

const SEARCH_PAUSE = 300; // ms without another key before the server is asked
const SAID_FOR = 8_000; // ms for which it stands that a kick was done
const DISCOVER_EVERY = 60_000; // ms
const DISCOVER_AGAIN = 5_000; // ms, until another process has answered: an idle server may let one process do it all
const SHORT = 15; // rows of a short list; the style sheet has the same number
const SEEN_FOR = 30_000; // ms for which a problem stands that has only happened
const MANY_BEHIND = 0.05; // from this share of all streams on, it is said

const ENDS = {
  left: "the client left",
  polled: "a poll got its answer",
  lease: "reached the longest age",
  shutdown: "the server stopped",
  kicked: "kicked",
  revoked: "revalidate said no",
  buffered: "held back on its way",
  threads: "the server needed its thread",
};
const REFUSALS = {
  limit: "too many streams",
  threads: "no thread was free",
  http2: "HTTP/2 ended by the server",
  snapshot: "the snapshot failed",
  backend: "the backend did not answer",
  draining: "the process is ending",
  error: "an error, see the log",
  bad_request: "invalid request (400)",
  unauthorized: "not logged in, bad token (401)",
  forbidden: "no channel granted (403)",
  other: "another status",
};

const byId = (id) => document.getElementById(id);

let overview = null;
let before = null; // the counts of the overview before
let answeredAt = 0; // when the newest overview came, by the clock of the page
let discoverAt = 0; // when other processes are looked for, by the same clock
let failure = "";
const seen = new Map(); // problem -> when it was seen last
const known = new Map(); // id -> process: those that have answered

const tiles = new Tiles(byId("now"));
const terms = Object.fromEntries(
  ["sums", "closed", "refused", "backend-sums"].map((id) => [id, new Terms(byId(id))]),
);
const frames = new Frames(byId("event-rows"));
const poll = new Poll({ received, met, lost, failed });
const kick = new Kick({
  token: () => overview?.kick.token,
  reach: (attempt) => poll.reach(attempt),
  done,
  fallback: byId("search"),
});
const streams = new Streams(byId("stream-rows"), (item, button) => kick.ask(item, overview.backend.is_shared, button));
const channels = new Rows(byId("channel-rows"), makeChannel, updateChannel);

// -- what the server answers --------------------------------------------------------------------------------------------

function received(body) {
  before = overview?.process.id === body.process.id ? overview.counts : null;
  overview = body;
  answeredAt = performance.now();
  failure = "";
  met(body.process);
  if (before === null) {
    tiles.forget();
    seen.clear();
  }
  const now = performance.now();
  if ((body.several || body.backend.processes > 1) && now > discoverAt) {
    discoverAt = now + (known.size > 1 ? DISCOVER_EVERY : DISCOVER_AGAIN);
    poll.discover();
  }
  show();
}

function met(process) {
  known.set(process.id, process);
  const choice = byId("choice");
  if (![...choice.options].some((option) => option.value === process.id)) choice.append(new Option("", process.id));
  for (const option of choice.options) setText(option, named(known.get(option.value)));
  byId("others").hidden = known.size < 2;
  choice.value = overview?.process.id ?? "";
}

function lost(id) {
  const gone = known.get(id);
  known.delete(id);
  for (const option of [...byId("choice").options]) if (option.value === id) option.remove();
  say(`The process ${named(gone)} does not answer any more. Another one is shown.`);
}

function failed(words) {
  failure = words;
  showState();
}

function named({ host, pid }) {
  return `${visible(host)}, ${pid}`;
}

// -- what is shown -------------------------------------------------------------------------------------------------------

function show() {
  const { process, counts, shows, kick: kicking } = overview;
  setText(
    byId("process"),
    `Process ${process.pid} on ${visible(process.host)}, running for ${time(process.running)}, ` +
      `sse_batcher ${process.version}.${others()}`,
  );
  document.title = `Monitor: ${visible(process.host)}, ${process.pid}`;
  tiles.show(overview);
  showSums(counts);
  showBackend(counts);
  showChannels();
  if (!kick.isOpen) showStreams(shows, kicking);
  frames.show(overview.events);
  byId("no-events").hidden = overview.events.length > 0;
  showMore();
  const problems = findProblems();
  setText(byId("news"), problems.join(" ") || "All is well.");
  byId("news").classList.toggle("failed", problems.length > 0);
  byId("data").setAttribute("aria-busy", "false");
  showState();
}

function showState() {
  const state = byId("state");
  const name = failure ? "lost" : poll.paused ? "paused" : answeredAt ? "open" : "connecting";
  state.dataset.state = name;
  const ago = time((performance.now() - answeredAt) / 1000);
  const since = answeredAt ? `, ${ago} old` : "";
  setText(state, { lost: `no news${since}`, paused: "paused", open: "live", connecting: "connecting" }[name]);
  byId("data").classList.toggle("stale", Boolean(failure));
  if (failure) {
    const rest = answeredAt ? " What is below is old. It is tried again." : " It is tried again.";
    setText(byId("news"), `No news: ${failure}.${rest}`);
    byId("news").classList.add("failed");
  }
}

/** How many processes there are, as far as it is known. */
function others() {
  const { processes } = overview.backend;
  if (processes > 1 && processes >= known.size) return ` One of ${count(processes)} that read this Redis.`;
  if (known.size > 1) return ` One of ${count(known.size)} that have answered this page.`;
  if (overview.several) return " One of several; no other one has answered yet.";
  return processes === 1 ? " The only one that reads this Redis." : "";
}

/** What needs a look. What has happened stays for a while, so that these words do not come and go. */
function findProblems() {
  const { counts, backend } = overview;
  const now = performance.now();
  const grows = (name, kind) => before !== null && (kind ? counts[name][kind] > before[name][kind] : counts[name] > before[name]);
  const happened = [
    grows("failed") && "Events were lost.",
    grows("refused") && "Calls of enqueue raise errors.",
    grows("gaps") && "Clients have missed something.",
    ...Object.keys(counts.streams_refused).map(
      (reason) => grows("streams_refused", reason) && `Requests get no stream: ${REFUSALS[reason] ?? reason}.`,
    ),
  ];
  for (const problem of happened.filter(Boolean)) seen.set(problem, now);
  for (const [problem, at] of seen) if (now - at > SEEN_FOR) seen.delete(problem);
  return [
    backend.unhealthy === "draining" && "This process is ending.",
    backend.unhealthy === "backend" && `${backend.is_shared ? "Redis" : "The backend"} does not answer.`,
    counts.clients_by_state.behind > Math.max(1, MANY_BEHIND * counts.clients) && "Many streams are behind.",
    ...seen.keys(),
  ].filter(Boolean);
}

function showSums(counts) {
  const of = (numbers, words) =>
    Object.entries(numbers)
      .filter(([, number]) => number > 0)
      .sort(([, a], [, b]) => b - a)
      .map(([reason, number]) => [words[reason] ?? visible(reason), count(number)]);
  terms.sums.show([
    ["streams opened", count(counts.streams_opened)],
    ["came back without a loss", count(counts.replays)],
    ["gaps: missed something", count(counts.gaps), counts.gaps ? "warn" : ""],
    ["fell behind", count(counts.overflows)],
    ["events accepted", count(counts.enqueued)],
    ["events lost", count(counts.failed), counts.failed ? "warn" : ""],
  ]);
  terms.closed.show(orNone(of(counts.streams_closed, ENDS)));
  terms.refused.show(orNone(of(counts.streams_refused, REFUSALS)));
}

const orNone = (rows) => (rows.length ? rows : [["none yet", ""]]);

function showBackend(counts) {
  const { is_shared, is_known, unhealthy, unread } = overview.backend;
  const silent = counts.backend_silent;
  const state = unhealthy === "backend" ? "does not answer" : is_known ? "answers" : "not known yet";
  terms["backend-sums"].show([
    ["kind", is_shared ? "Redis, shared by processes" : "memory of this process"],
    ...(is_shared
      ? [
          ["state", state, unhealthy === "backend" ? "warn" : ""],
          ["silent for", silent ? time(silent) : "no time", silent > 1 ? "warn" : ""],
          ["last answer", counts.backend_answered ? `${time(counts.backend_answered)} ago` : "none is due"],
          ["batches on their way back", count(unread)],
          ["entries ignored", count(counts.ignored), counts.ignored ? "warn" : ""],
        ]
      : []),
    ["events that wait", count(counts.pending_events)],
    ["history", `${plural(counts.history_frames, "frame")}, ${size(counts.history_bytes)}`],
    ["it reaches back", counts.history_frames ? time(counts.history_age) : "nowhere"],
  ]);
}

function showChannels() {
  const { total, rows } = overview.channels;
  setText(byId("channel-count"), total > rows.length ? `the largest of ${count(total)}` : count(total));
  channels.show(rows.map(([name, number]) => [name, { name, number, most: rows[0][1] }]));
}

function makeChannel({ name }) {
  const row = element("div");
  row.append(element("dt", "", visible(name)), element("dd"));
  return row;
}

function updateChannel(row, { number, most }) {
  setText(row.lastChild, count(number));
  row.style.setProperty("--share", `${(100 * number) / most}%`);
}

function showStreams({ addresses }, { allowed, token }) {
  const { found, late, rows } = overview.streams;
  const list = byId("streams");
  list.classList.toggle("without-address", !addresses);
  list.classList.toggle("without-kick", !(allowed && token));
  streams.show(rows);
  byId("no-streams").hidden = rows.length > 0;
  const which = poll.search ? `${plural(found, "stream")} found` : plural(found, "stream");
  const part = found > rows.length ? `, ${count(rows.length)} of them listed` : "";
  const order = rows.length > 1 ? (late ? ", the longest behind first" : ", the newest first") : "";
  const keyless = allowed && !token ? " Kicks need the app's SECRET_KEY." : "";
  setText(byId("found"), `${which}${part}${order}.${keyless}`);
}

/** The buttons below the tables, if there are more rows than a short list has. */
function showMore() {
  for (const button of document.querySelectorAll(".more")) {
    const rows = byId(button.getAttribute("aria-controls")).childElementCount;
    const isShort = button.parentElement.classList.contains("short");
    button.hidden = rows <= SHORT;
    setText(button, isShort ? `Show all ${count(rows)}` : `Show only ${count(SHORT)}`);
  }
}

// -- what people do ------------------------------------------------------------------------------------------------------

let saidTimer = 0;

function say(words) {
  clearTimeout(saidTimer);
  setText(byId("said"), words);
  saidTimer = setTimeout(() => setText(byId("said"), ""), SAID_FOR);
}

function done(words) {
  say(words);
  poll.now();
}

for (const button of document.querySelectorAll(".more")) {
  button.addEventListener("click", () => {
    const isShort = button.parentElement.classList.toggle("short");
    button.setAttribute("aria-expanded", String(!isShort));
    showMore();
  });
}

let searchTimer = 0;
byId("search").addEventListener("input", (event) => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(() => {
    poll.search = event.target.value.trim();
    poll.now();
  }, SEARCH_PAUSE);
});

byId("pause").addEventListener("click", (event) => {
  poll.paused = !poll.paused;
  event.target.setAttribute("aria-pressed", String(poll.paused));
  tiles.forget();
  showState();
});

byId("choice").addEventListener("change", (event) => {
  poll.process = event.target.value;
  poll.now();
});

setInterval(() => failure && document.visibilityState === "visible" && showState(), 1000);
poll.now();
