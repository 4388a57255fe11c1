// The browser's side of sse_batcher: a stream that unpacks batches, recovers, and can be shared by the tabs of a
// browser. The interface is described in sse-batcher.d.ts. This file is also the script of the shared worker.
//
// A Reader reads the stream. A page has one of its own, or a Tab, which gets the same from the Shared of the worker.

const SLICE_MS = 20; // of work; then the page has its turn
const MANY = 1000; // blocks that wait for the page, or messages that a tab has not answered
const SWITCH_MS = 5000; // without a byte: perhaps something holds streams back
const POLL_MS = 60_000; // longer than a poll waits by default
const ANSWER_MS = 30_000; // for url() and headers(), which may have to ask the user, and may never answer
const SHARED_FRAMES = 256; // kept for tabs that join
const BEAT_MS = 2000;
const DEAD_MS = 6500; // without a message
const WORKER = "sse_batcher "; // another, once the messages change: tabs and worker may be of two versions

const OWN_EVENTS = ["open", "error", "statechange"]; // of the connection
const BEGINNING = /^sse_(open|gap)$/;

/** Resolved in the next task, so that the page has its turn. Not by a timer: those of hidden tabs are slow. */
function nextTask() {
  const { port1, port2 } = new MessageChannel();
  port2.postMessage(0);
  return new Promise((resolve) => {
    port1.onmessage = () => resolve(port1.close());
  });
}

/** Resolved after this time, or as soon as the signal says so. */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, Math.min(ms, 1e9)); // a longer one would end at once
    signal.onabort = () => resolve(clearTimeout(timer));
  });
}

function parse(json) {
  try {
    return JSON.parse(json);
  } catch {
    return undefined; // no JSON has this value
  }
}

/** Negative if cursor `a` is before `b`, positive if it is after `b`, NaN if they are of two histories. */
function compare(a, b) {
  const [epoch, i = 0, j = 0, k = 0] = a.split("-");
  const [other, l = 0, m = 0, n = 0] = b.split("-");
  return epoch === other ? i - l || j - m || k - n : NaN;
}

/** Splits text into blocks: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream */
class Parser {
  #rest = []; // the pieces of a line that is not complete
  #isAfterCR = false;
  #block = { lines: [] };

  *read(text) {
    const start = this.#isAfterCR && text[0] === "\n" ? 1 : 0;
    if (text) this.#isAfterCR = text.endsWith("\r");
    const lines = text.slice(start).split(/\r\n?|\n/);
    this.#rest.push(lines[0]);
    if (lines.length < 2) return; // joined once: a long line takes no quadratic time
    lines[0] = this.#rest.join("");
    this.#rest = [lines.pop()];
    for (const line of lines) {
      const [, name, value] = /^([^:]*):? ?(.*)/s.exec(line);
      if (name === "data") this.#block.lines.push(value);
      else if (name === "event" || (name === "id" && !value.includes("\0"))) this.#block[name] = value;
      else if (name === "retry" && /^\d+$/.test(value)) this.#block.retry = +value;
      if (line) continue;
      const { lines, event, id, retry } = this.#block;
      this.#block = { lines: [] };
      // Without data it is no event, but its id and retry count.
      if ((lines[0] ?? id ?? retry) !== undefined)
        yield { type: lines.length ? event || "message" : "", data: lines.join("\n"), id, retry };
    }
  }
}

/**
 * Reads a stream, or polls, until it is closed, and comes back whatever happens. Asks its `owner` what to fetch by
 * `prepare(isRefused)`, which gives a `message` if it fails. Calls its `take(block)` and `show(state, error)`, and
 * `polled()` after each poll.
 */
class Reader {
  #owner;
  #options;
  #isPolling;
  #abort; // of the attempt, or of the sleep
  #probe; // the abort of a probe
  #isAsleep = false;
  #isEnded; // we have ended the attempt, and try again at once
  #isSilent; // no byte has come in this attempt
  #isOpened; // the stream has begun in this attempt
  #isRefused = false;
  #heard = Infinity; // when the last byte came, while one is waited for. Wall-clock time, which goes on while a laptop sleeps
  #heartbeat = 15; // seconds
  #began; // the attempt
  #tries = 0;
  #retry;
  #sleepUntil;
  #notBefore = 0;
  #tried = 0; // to change from streams to polls, or back
  #timer = setInterval(() => this.#watch(), 1000);
  state = "connecting";
  isClosed = false;

  constructor(options, cursor, owner) {
    this.#options = options;
    this.#owner = owner;
    this.cursor = cursor;
    this.#isPolling = options.poll === true;
    this.#retry = options.backoff[0] * (1 + Math.random());
    this.#run();
  }

  close() {
    this.isClosed = true;
    clearInterval(this.#timer);
    this.#probe?.abort();
    this.restart();
  }

  /** Try again now, from the cursor. */
  restart() {
    this.#isEnded = true;
    this.#abort?.abort();
  }

  /** Try now, if it waits; `force`: also if it seems to be open. Not before the server allows it. */
  wake(force) {
    this.#sleepUntil = 0;
    // Each of the tabs that share it calls this, at the same time.
    if (this.#isAsleep || (force && Date.now() > this.#began + 1000)) this.restart();
    else this.#watch();
  }

  async #run() {
    await undefined; // the owner has to know its reader before it is called
    while (!this.isClosed) {
      this.#isEnded = false;
      // WebKit rejects with an error of its own, not with the reason.
      const error = await this.#attempt().catch((error) => this.#abort.signal.reason ?? error);
      this.#heard = Infinity;
      if (this.isClosed) return;
      if (this.#isPolling && this.#isOpened && (this.#isEnded || !error)) {
        this.#sleepUntil = performance.now() + this.#retry;
        await this.#owner.polled?.();
      } else if (!this.#isEnded) {
        this.#failed(error ?? { message: "the stream ended" });
      }
      await this.#sleep();
    }
  }

  async #attempt() {
    const abort = (this.#abort = new AbortController());
    this.#began = Date.now();
    this.#sleepUntil = 0;
    this.#isSilent = true;
    this.#isOpened = false;
    if (this.#isPolling && this.#began > this.#tried + 300_000) this.#tryOther(); // every five minutes
    if (this.state !== "polling") this.#show("connecting"); // the page may close it here
    const body = await this.#fetch(this.#isPolling, this.cursor, abort);
    const decoder = new TextDecoder();
    const parser = new Parser();
    for (;;) {
      const { value } = await body.read();
      if (!value || abort.signal.aborted) return; // what came too late comes again, after the cursor
      this.#isSilent = false;
      this.#heard = Infinity; // while the page is busy, no byte is waited for
      for (const block of parser.read(decoder.decode(value, { stream: true }))) {
        await this.#receive(block);
        if (abort.signal.aborted) return;
      }
      await nextTask();
      this.#heard = Date.now();
    }
  }

  async #fetch(poll, cursor, abort) {
    const { signal } = abort;
    const answer = await Promise.race([
      this.#owner.prepare(this.#isRefused),
      pause(ANSWER_MS, signal).then(() => ({ message: "no answer" })),
    ]);
    const { url, headers, renews } = answer;
    signal.onabort(); // ends the pause, too
    if (!url) throw answer;
    const address = new URL(url);
    this.#isRefused = false;
    this.#heard = Date.now(); // from now on, a byte is waited for
    if (cursor) address.searchParams.set("last_event_id", cursor);
    if (poll) address.searchParams.set("poll", "1");
    const response = await fetch(address, {
      headers: { Accept: "text/event-stream", ...headers },
      credentials: this.#options.withCredentials ? "include" : "same-origin",
      cache: "no-store",
      signal,
    });
    const { status } = response;
    const type = response.headers.get("Content-Type");
    if (status === 200 && /^text\/event-stream/i.test(type)) return response.body.getReader();
    const after = response.headers.get("Retry-After"); // seconds, or a date
    // Leaves the body unread, and even untouched: WebKit would report a rejection that has no handler.
    abort.abort({
      status,
      message: `status ${status}, ${type}`,
      renews,
      after: after * 1000 || Date.parse(after) - Date.now(),
    });
    throw signal.reason;
  }

  #receive(block) {
    const { type, data, id, retry } = block;
    this.#retry = retry ?? this.#retry;
    this.cursor = id ?? this.cursor;
    if (type === "sse_busy") {
      this.#notBefore = performance.now() + this.#retry;
    } else {
      if (BEGINNING.test(type)) this.#heartbeat = parse(data)?.heartbeat || 15;
      const isFirst = !this.#isOpened;
      const state = this.#isPolling ? "polling" : "open";
      this.#isOpened = true;
      this.#tries = 0;
      // Each poll begins, but the page is to see one stream.
      if (isFirst && type === "sse_open" && state === "polling" && state === this.state) return;
      if (isFirst) this.#show(state);
    }
    return this.#owner.take(block);
  }

  #failed({ status = 0, message, renews, after }) {
    const [least, most] = this.#options.backoff;
    const now = performance.now();
    this.#isRefused ||= status === 401 || status === 403;
    // The first time, the wait is the one by which the server spreads its clients.
    const wait = this.#tries ? Math.min(most, least * 2 ** this.#tries) * (0.5 + Math.random() / 2) : this.#retry;
    this.#sleepUntil = this.#isRefused && renews ? 0 : now + wait;
    if (after > 0) this.#notBefore = now + after + Math.random() * least;
    this.#tries += 1;
    this.#show("waiting", { status, message });
  }

  async #sleep() {
    let wait;
    this.#isAsleep = true;
    while (!this.isClosed && (wait = Math.max(this.#sleepUntil, this.#notBefore) - performance.now()) > 0) {
      this.#abort = new AbortController();
      await pause(wait, this.#abort.signal);
    }
    this.#isAsleep = false;
  }

  #show(state, error) {
    this.state = state;
    this.#owner.show(state, error);
  }

  #watch() {
    const quiet = Date.now() - this.#heard;
    if (quiet > 2000 * this.#heartbeat + (this.#isPolling ? POLL_MS : 0)) {
      this.#abort.abort({ message: "the stream is silent" });
    } else if (this.#isSilent && quiet > SWITCH_MS && !this.#isPolling && this.#tried < this.#began) {
      this.#tryOther();
    } else if (this.#isOpened && quiet > 1000 && this.#options.isJoining) {
      this.restart(); // the poll waits, so nothing follows the cursor
    }
  }

  /** Change from streams to polls, or back, if a byte comes that way. */
  async #tryOther() {
    if (this.#options.poll !== "auto" || this.#probe) return;
    const began = this.#began;
    const isPolling = !this.#isPolling;
    this.#tried = Date.now();
    this.#probe = new AbortController();
    const timer = setTimeout(() => this.#probe.abort(), isPolling ? POLL_MS : SWITCH_MS);
    const { value } = await this.#fetch(isPolling, "", this.#probe)
      .then((body) => body.read())
      .catch(() => ({}));
    clearTimeout(timer);
    // A server that was only slow answers the stream, too, about now.
    if (value && isPolling) await pause(1000, this.#probe.signal);
    this.#probe.abort();
    this.#probe = undefined;
    if (!value || (isPolling && !(this.#isSilent && this.#began === began))) return;
    this.#isPolling = isPolling;
    this.restart(); // else a poll would end as a stream
  }
}

/**
 * A tab that shares a stream. Its messages, and those of the worker, are pairs: the name of a method, and a value. As
 * long as the worker does not have what follows the tab's cursor, the tab polls for itself.
 */
class Tab {
  #options;
  #owner;
  #cursor;
  #port; // undefined: the tab reads alone
  #reader; // of its own
  #heard;
  #timer = setInterval(() => this.#watch(), BEAT_MS);
  #tries = 0; // of workers, in a row
  #isOpened = false; // the page knows that the stream has begun
  #polledFrom;
  #next; // polls again

  constructor(options, cursor, owner) {
    this.#options = options;
    this.#cursor = cursor;
    this.#owner = owner;
    this.prepare = owner.prepare;
    this.show = owner.show;
    this.#meet();
  }

  close() {
    clearInterval(this.#timer);
    this.#leave();
  }

  wake(force) {
    this.#watch();
    this.#reader?.wake(force);
    this.#say("wake", force);
  }

  #say(kind, value) {
    this.#port?.postMessage([kind, value]);
  }

  #leave() {
    this.#say("bye");
    this.#port?.close();
    this.#port = undefined;
    this.#reader?.close();
    this.#reader = undefined;
  }

  #meet() {
    this.#leave();
    this.#heard = Date.now();
    try {
      const { worker, name } = this.#options;
      const shared = new SharedWorker(worker, { type: "module", name });
      const { port } = shared;
      shared.onerror = () => this.#port === port && this.#readAlone("no script");
      port.onmessage = async ({ data: [kind, value] }) => {
        if (this.#port !== port) return;
        this.#heard = Date.now();
        this.#tries = 0;
        await this[kind](value);
        port.postMessage(["ack"]);
      };
      this.#port = port;
      this.#join();
    } catch (error) {
      this.#readAlone(error.message);
    }
  }

  #readAlone(reason) {
    console.warn(`sse_batcher: the stream is not shared: ${reason}`);
    this.#tries += 1;
    this.#leave();
    this.#reader = new Reader(this.#options, this.#cursor, this);
  }

  #join(isNear) {
    const { poll, withCredentials, backoff } = this.#options;
    const options = { poll, withCredentials, backoff }; // functions cannot be sent
    this.#say("join", { cursor: this.#cursor, isNear, options });
  }

  /** Called each beat, and when the tab is seen again. */
  #watch() {
    if (!this.#port) {
      // Perhaps the site was not there to give us the script.
      if (this.#tries < 3 && this.#reader.state === "open") this.#meet();
    } else if (Date.now() - this.#heard > DEAD_MS) {
      this.#tries += 1;
      if (this.#tries < 3) this.#meet();
      else this.#readAlone("no answer");
    }
  }

  // -- what the worker says ----------------------------------------------------------------------------------------

  beat() {}

  /** All at once: the cursor is after the whole frame, or before it. Returns what to wait for before the answer. */
  frame(blocks) {
    if (this.#reader) return; // these follow an older cursor
    return blocks.map((block) => this.take(block)).at(-1);
  }

  state({ state, error }) {
    if (!this.#reader) this.show(state, error);
  }

  joined({ cursor, state, data }) {
    if (cursor !== this.#cursor) return this.missed(); // the tab has gone on since it asked
    this.#reader?.close();
    this.#reader = undefined;
    this.show(state);
    if (data && !this.#isOpened) return this.take({ type: "sse_open", data, id: this.#cursor });
  }

  missed() {
    this.#polledFrom = this.#cursor;
    this.#next?.();
    this.#reader ??= new Reader({ ...this.#options, poll: true, isJoining: true }, this.#cursor, this);
  }

  async ask(isRefused) {
    this.#say("answer", await this.prepare(isRefused));
  }

  // -- what the tab's own reader, or the worker, says ----------------------------------------------------------------

  take(block) {
    this.#cursor = block.id ?? this.#cursor;
    if (BEGINNING.test(block.type)) this.#isOpened = true;
    return this.#owner.take(block);
  }

  /** Join again. Resolved if that fails. A poll without anything shows that nothing follows the cursor. */
  polled() {
    if (!this.#port) return;
    this.#join(this.#cursor === this.#polledFrom);
    return new Promise((resolve) => (this.#next = resolve));
  }
}

/** What the worker does: it reads one stream for all tabs that share it. */
class Shared {
  #tabs = new Set(); // {port, cursor, isJoined, isWaiting, after, unanswered}
  #reader;
  #frames = []; // the newest ones, each {id, blocks}
  #since; // the cursor that they reach back to
  #blocks = []; // of the next frame
  #opening; // the data of sse_open; undefined before it has come
  #asked = []; // what to call with an answer

  constructor() {
    setInterval(() => this.#tell("beat"), BEAT_MS);
  }

  add(port) {
    const tab = { port, unanswered: 0 };
    port.onmessage = ({ data: [kind, value] }) => this[kind](tab, value);
  }

  // -- what a tab says -----------------------------------------------------------------------------------------------

  join(tab, { cursor, isNear, options }) {
    this.#tabs.add(Object.assign(tab, { cursor }));
    if (!this.#reader) {
      this.#since = cursor;
      this.#frames = [];
      this.#opening = undefined;
      this.#reader = new Reader(options, cursor, this);
    }
    this.#admit(tab, isNear);
  }

  ack(tab) {
    tab.unanswered -= 1;
  }

  wake(tab, force) {
    this.#reader?.wake(force);
  }

  /** A late answer is as good as the one that is waited for. */
  answer(tab, value) {
    for (const resolve of this.#asked.splice(0)) resolve(value);
  }

  bye(tab) {
    this.#tabs.delete(tab);
    if (this.#tabs.size) return this.#asked[0] && tab.unanswered && this.#reader.restart(); // asks another one
    this.#reader?.close();
    this.#reader = undefined;
  }

  // -- what the reader says ------------------------------------------------------------------------------------------

  /** What to fetch. Only tabs have the page's functions: ask one that answers. */
  prepare(isRefused) {
    const [tab] = [...this.#tabs].sort((a, b) => a.unanswered - b.unanswered);
    this.#say(tab, "ask", isRefused);
    return new Promise((resolve) => this.#asked.push(resolve));
  }

  take(block) {
    const { type, data, id } = block;
    if (type === "sse_busy") return this.#tell("frame", [{ type, data }]); // its id is not the tab's
    if (BEGINNING.test(type)) {
      this.#opening = { ...this.#opening, ...parse(data), reason: undefined };
      this.#blocks = []; // of a snapshot that was cut
    }
    this.#blocks.push(block);
    if (id === undefined) return; // the blocks of a snapshot are one frame
    const frame = { id: id.split(".")[0], blocks: this.#blocks }; // a part of a batch belongs to it
    this.#blocks = [];
    if (!(compare(frame.id, this.#since) >= 0)) {
      this.#frames = [];
      this.#since = frame.id;
    }
    this.#frames.push(frame);
    if (this.#frames.length > SHARED_FRAMES) this.#since = this.#frames.shift().id;
    for (const tab of this.#tabs) {
      if (tab.isJoined) this.#pass(tab, frame);
      else if (tab.isWaiting) this.#admit(tab);
    }
  }

  show(state, error) {
    this.#tell("state", { state, error });
  }

  /** Let a tab have what follows its cursor, if that is here or, for a tab that `isNear`, can be read again. */
  #admit(tab, isNear) {
    const { cursor } = tab;
    const reader = this.#reader;
    // In the middle of a batch, the server has the rest.
    const distance = (cursor + reader.cursor).includes(".") ? NaN : compare(cursor, this.#since);
    tab.isJoined = false;
    tab.isWaiting = distance !== 0 && !this.#opening;
    if (tab.isWaiting) return this.#say(tab, "state", { state: reader.state });
    if (distance < 0 && isNear) {
      // Read again from there. The other tabs leave out what they have.
      for (const other of this.#tabs) other.after ||= reader.cursor;
      this.#frames = [];
      this.#since = reader.cursor = cursor;
      reader.restart();
    } else if (!(distance >= 0)) return this.#say(tab, "missed");
    tab.isJoined = true;
    tab.after = this.#opening && cursor;
    this.#say(tab, "joined", { cursor, state: reader.state, data: cursor && JSON.stringify(this.#opening) });
    for (const frame of this.#frames) this.#pass(tab, frame);
  }

  #pass(tab, { id, blocks }) {
    if (tab.after && compare(id, tab.after) <= 0) return; // the tab has it
    tab.after = undefined;
    this.#say(tab, "frame", blocks);
  }

  #tell(kind, value) {
    for (const tab of this.#tabs) this.#say(tab, kind, value);
  }

  #say(tab, kind, value) {
    tab.unanswered += 1;
    const isGone = tab.unanswered > MANY; // or frozen
    tab.port.postMessage(isGone ? ["missed"] : [kind, value]);
    if (isGone) this.bye(tab);
  }
}

if (globalThis.SharedWorkerGlobalScope && self.name.startsWith(WORKER)) {
  const shared = new Shared();
  self.onconnect = ({ ports }) => shared.add(ports[0]);
}

/** The events of a block, each with `data` or, as it came, with `text`. */
function unpack({ type, data: text }, id) {
  const list = type.endsWith("_batch") && parse(text)?.events;
  if (!Array.isArray(list)) return type ? [{ type, id, text }] : [];
  return list.map((entry, index) => ({
    ...(type === "mixed_batch" ? entry : { type: type.slice(0, -6), data: entry }),
    id: index + 1 < list.length ? `${id}.${index + 1}` : id,
  }));
}

export class BatchedEventSource extends EventTarget {
  state = "connecting";
  readyState = 0;
  onopen = (this.onmessage = this.onerror = null);
  #options;
  #link; // a Reader or a Tab; undefined while the page is in the back/forward cache
  #life = new AbortController();
  #cursor; // of what has come
  #lastId = ""; // of what was dispatched
  #blocks = []; // that wait for the page
  #drained; // a promise
  #sliceEnd = 0; // also that of small blocks, one after the other
  #handlers = new Map(); // "json", "text" or "batch", and the type -> a set of {handle}
  #listened = new Set(); // types

  constructor(url, options) {
    super();
    const { channels = [], cursor = "", poll = "auto", withCredentials = false, ...rest } = options ?? {};
    const { backoff = [1000, 30_000], share, worker = import.meta.url, url: renew, headers, ...unknown } = rest;
    for (const name in unknown) throw new TypeError(`unknown option ${name}`);
    if (!Array.isArray(channels) || share === true) throw new TypeError("channels must be a list, share a name");
    this.#options = { channels, poll, withCredentials, backoff, share, worker, renew, headers };
    this.#cursor = cursor;
    this.withCredentials = withCredentials;
    this.#setUrl(url);
    for (const type of ["open", "message", "error"]) super.addEventListener(type, (event) => this[`on${type}`]?.(event));
    const on = (target, type, listener) => target?.addEventListener(type, listener, { signal: this.#life.signal });
    on(self, "online", () => this.#link?.wake(true));
    on(self.document, "visibilitychange", () => document.hidden || this.#link?.wake());
    on(self, "pagehide", () => (this.#link = this.#link?.close()));
    on(self, "pageshow", () => this.#link || this.#open());
    this.#open();
  }

  on(type, handle) {
    return this.#add("json", type, handle);
  }

  onText(type, handle) {
    return this.#add("text", type, handle);
  }

  onBatch(type, handle) {
    return this.#add("batch", type, handle);
  }

  addEventListener(type, listener, options) {
    this.#listened.add(type);
    super.addEventListener(type, listener, options);
  }

  close() {
    this.#life.abort();
    this.#link?.close();
    this.#show("closed");
  }

  #setUrl(url) {
    const address = new URL(url, self.document?.baseURI ?? location.href);
    const { channels } = this.#options;
    if (channels.length) address.searchParams.delete("channel");
    for (const channel of channels) address.searchParams.append("channel", channel);
    this.url = address.href;
  }

  #open() {
    const { share, withCredentials } = this.#options;
    const owner = {
      prepare: (isRefused) => this.#prepare(isRefused).catch((error) => ({ message: `${error}` })),
      take: (block) => this.#take(block),
      show: (state, error) => this.#show(state, error),
    };
    const address = new URL(this.url);
    address.searchParams.delete("token"); // each tab has its own
    const name = WORKER + JSON.stringify([share, address, withCredentials]);
    const Link = share && self.SharedWorker ? Tab : Reader;
    this.#link = new Link({ ...this.#options, name }, this.#cursor, owner);
  }

  async #prepare(isRefused) {
    const { renew, headers } = this.#options;
    if (isRefused && renew) this.#setUrl(await renew());
    return { url: this.url, headers: await headers?.(), renews: !isRefused && !!(renew || headers) };
  }

  #show(state, error) {
    if (this.state === "closed") return;
    const { state: before, readyState } = this;
    this.state = state;
    this.readyState = { open: 1, polling: 1, closed: 2 }[state] ?? 0;
    if (readyState === 0 && this.readyState === 1) this.dispatchEvent(new Event("open"));
    // Each of them may close this.
    if (state !== before && this.state === state) this.dispatchEvent(new Event("statechange"));
    if (error && this.state === state) this.dispatchEvent(Object.assign(new Event("error"), error));
  }

  #add(kind, type, handle) {
    if (typeof handle !== "function") throw new TypeError(`${handle} is not a function`);
    const entry = { handle }; // a function may be added twice
    const handlers = this.#handlers.get(kind + type) ?? new Set();
    this.#handlers.set(kind + type, handlers.add(entry));
    return () => handlers.delete(entry);
  }

  /** Returns what to wait for before more is read. */
  #take(block) {
    this.#cursor = block.id ?? this.#cursor;
    if (this.#blocks.push(block) === 1) this.#drained = this.#drain();
    return this.#blocks.length > MANY && this.#drained;
  }

  async #drain() {
    // A block stays first until it is done, since #take() begins this if there is none.
    for (; this.#blocks.length; this.#blocks.shift()) {
      const [block] = this.#blocks;
      const lists = new Map();
      this.#lastId = block.id ?? this.#lastId;
      for (const event of unpack(block, this.#lastId)) {
        if (performance.now() > this.#sliceEnd) {
          await nextTask();
          this.#sliceEnd = performance.now() + SLICE_MS;
        }
        if (this.state === "closed") return;
        try {
          this.#dispatch(event, lists);
        } catch (error) {
          reportError(error); // such as JSON that is too deep to become text again; and go on
        }
      }
      for (const [type, list] of lists) this.#call("batch", type, list, this.#lastId);
    }
  }

  #dispatch({ type, id, text, data }, lists) {
    const has = (kind) => this.#handlers.get(kind + type)?.size;
    if (has("json") || has("batch")) {
      if (text !== undefined) data = parse(text);
      if (data === undefined) {
        reportError(new SyntaxError(`${type} ${id} is not JSON: use onText`));
      } else {
        this.#call("json", type, data, id);
        if (has("batch")) lists.set(type, lists.get(type) ?? []).get(type).push(data);
      }
    }
    const isListened = this.#listened.has(type) || (type === "message" && this.onmessage);
    if (!isListened && !has("text")) return;
    text ??= JSON.stringify(data);
    this.#call("text", type, text, id);
    if (!isListened || OWN_EVENTS.includes(type) || this.state === "closed") return;
    this.dispatchEvent(new MessageEvent(type, { data: text, lastEventId: id, origin: new URL(this.url).origin }));
  }

  #call(kind, type, value, id) {
    for (const { handle } of this.#handlers.get(kind + type) ?? []) {
      if (this.state === "closed") return;
      try {
        handle(value, { type, id });
      } catch (error) {
        reportError(error); // and go on
      }
    }
  }
}

// Of the class, and of each object.
Object.assign(BatchedEventSource, Object.assign(BatchedEventSource.prototype, { CONNECTING: 0, OPEN: 1, CLOSED: 2 }));
