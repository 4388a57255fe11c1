// A model of the server: one channel of many, its history, streams and polls, as sse_batcher answers them.

import { Source } from "./world.mjs";

const POLL_WAIT_MS = 25_000;
const SLICE = 256;

const block = (type, data, { id, retry } = {}) =>
  `event: ${type}\n${retry === undefined ? "" : `retry: ${retry}\n`}data: ${JSON.stringify(data)}\n` +
  `${id === undefined ? "" : `id: ${id}\n`}\n`;

/** One answer that is open. Its chunks arrive as tasks of their own. */
class Stream {
  isOpen = true;
  #chunks = [];
  #wanted;
  #end;

  constructor(server, realm, address, signal) {
    this.server = server;
    this.realm = realm;
    this.isPoll = address.searchParams.get("poll") === "1";
    this.batches = address.searchParams.get("batch") !== "0";
    this.user = address.searchParams.get("user");
    this.source = new Source(server.world, realm);
    signal.addEventListener("abort", () => this.fail(signal.reason));
  }

  write(text) {
    const { world } = this.server;
    let bytes = new TextEncoder().encode(text);
    while (bytes.length) {
      const size = world.isRandom ? 1 + Math.floor(world.choose() * bytes.length) : bytes.length;
      const piece = bytes.slice(0, size);
      this.source.post(() => {
        this.#chunks.push(piece);
        this.#answer();
      });
      bytes = bytes.slice(size);
    }
  }

  end() {
    this.server.streams.delete(this);
    this.source.post(() => this.#finish({ done: true }));
  }

  /** Cut at once: what is on its way is lost. */
  fail(error = new TypeError("network error")) {
    this.server.streams.delete(this);
    this.source.drop();
    this.#chunks = [];
    this.#finish({ error });
  }

  #finish(end) {
    this.isOpen = false;
    this.#end ??= end;
    this.#answer();
  }

  #answer() {
    if (!this.#wanted || !(this.#chunks.length || this.#end)) return;
    const { resolve, reject } = this.#wanted;
    this.#wanted = undefined;
    if (this.#chunks.length) resolve({ done: false, value: this.#chunks.shift() });
    else if (this.#end.error) reject(this.#end.error);
    else resolve({ done: true });
  }

  response() {
    return {
      status: 200,
      headers: new Headers({ "Content-Type": "text/event-stream; charset=utf-8" }),
      body: {
        cancel: () => {},
        getReader: () => ({
          read: () =>
            new Promise((resolve, reject) => {
              this.#wanted = { resolve, reject };
              this.#answer();
            }),
        }),
      },
    };
  }
}

export class Server {
  streams = new Set();
  timers = new Map();
  requests = []; // {poll, cursor, user, at}
  mostStreams = 0;
  isUp = true;
  isSilent = false; // takes requests, and answers them when `answer` is called
  busy = false;
  accepts = () => true; // a request, by its address
  #waiting = [];
  #epoch = 0;
  #head = 0;
  #floor = 0;
  #frames = []; // {position, numbers}
  #published = 0;
  #counts = new Map(); // by cursor: how many events had been published up to it

  constructor(world, { history = 1000, snapshot = 0, heartbeat = 15, spread = 0 } = {}) {
    this.world = world;
    this.history = history;
    this.snapshot = snapshot; // blocks of the state that begins a stream
    this.heartbeat = heartbeat; // seconds
    this.spread = spread; // ms by which the retry of a stream may be longer
    this.#note();
    const period = 1000 * heartbeat;
    const beat = { at: world.now + period, period, run: () => this.#beat() };
    this.timers.set("beat", beat);
  }

  /** Is no longer silent. */
  answer() {
    this.isSilent = false;
    for (const respond of this.#waiting.splice(0)) respond();
  }

  get head() {
    return this.#id(this.#head);
  }

  get published() {
    return this.#published;
  }

  /** How many events came up to this cursor. */
  count(cursor) {
    const [id, part] = cursor.split(".");
    if (part === undefined) return this.#counts.get(id);
    const before = id.replace(/\d+$/, (number) => number - 1);
    return this.#counts.get(before) + Number(part);
  }

  /** One frame with this many events. */
  publish(events = 1) {
    this.#head += 1;
    const numbers = Array.from({ length: events }, () => (this.#published += 1));
    this.#note();
    const frame = { position: this.#head, numbers };
    this.#frames.push(frame);
    if (this.#frames.length > this.history) this.#floor = this.#frames.shift().position;
    for (const stream of [...this.streams]) {
      stream.write(this.#text(stream, frame));
      if (stream.isPoll) stream.end();
    }
  }

  /** Frames of channels that these pages do not have. */
  publishElsewhere(frames = 1) {
    for (let i = 0; i < frames; i += 1) {
      this.#head += 1;
      this.#note();
    }
  }

  /** An event that cannot be delivered. */
  lose() {
    this.#head += 1;
    this.#published += 1;
    this.#note();
    this.#floor = this.#head;
    this.#frames = [];
    for (const stream of [...this.streams]) {
      if (stream.isPoll) {
        stream.end();
      } else {
        stream.write(block("sse_gap", { reason: "publish_failed", heartbeat: 15 }, { id: this.head }));
      }
    }
  }

  forget() {
    this.#floor = this.#head;
    this.#frames = [];
  }

  /** Another process: its history begins. */
  restart() {
    this.cut();
    this.#epoch += 1;
    this.#head = this.#floor = Math.floor(this.world.choose() * 20);
    this.#frames = [];
    this.#note();
  }

  cut(error) {
    for (const stream of [...this.streams]) stream.fail(error);
  }

  bye() {
    for (const stream of [...this.streams]) {
      if (!stream.isPoll) stream.write(block("sse_bye", { reason: "lease" }, { id: this.head, retry: 100 }));
      stream.end();
    }
  }

  hangUp(realm) {
    for (const stream of [...this.streams]) if (stream.realm === realm) stream.fail();
  }

  fetch(realm, address, { signal }) {
    const cursor = address.searchParams.get("last_event_id") ?? "";
    const poll = address.searchParams.get("poll") === "1";
    if (signal.aborted) return Promise.reject(signal.reason); // and no request
    const request = new Source(this.world, realm);
    this.requests.push({ poll, cursor, address: address.href, at: this.world.now });
    return new Promise((resolve, reject) => {
      const stop = () => reject(signal.reason);
      signal.addEventListener("abort", stop);
      const respond = () => {
        if (this.isSilent) return void this.#waiting.push(() => request.post(respond));
        request.drop();
        if (signal.aborted) return;
        if (!this.isUp) reject(new TypeError("Failed to fetch"));
        else if (this.accepts(address)) resolve(this.#open(realm, address, signal, cursor));
        else resolve({ status: 401, headers: new Headers(), body: null });
      };
      request.post(respond);
    });
  }

  #open(realm, address, signal, cursor) {
    const stream = new Stream(this, realm, address, signal);
    if (this.busy) {
      stream.write(block("sse_busy", { reason: "limit" }, { id: cursor || undefined, retry: 3000 }));
      stream.end();
      return stream.response();
    }
    const [id, part = 0] = cursor.split(".");
    const position = Number(id.split("-")[1]);
    const missed = cursor ? this.#missed(id, position, part) : undefined;
    const isResumed = cursor && !missed;
    const own = isResumed ? undefined : this.#state();
    const data = { heartbeat: this.heartbeat, channels: ["default"], ...(missed && { reason: missed }) };
    const retry = stream.isPoll ? 500 : 1000 + (this.spread && Math.floor(this.world.choose() * this.spread));
    const first = isResumed ? cursor : own.length ? undefined : this.head;
    stream.write(block(missed ? "sse_gap" : "sse_open", data, { id: first, retry }));
    for (const text of own ?? []) stream.write(text);
    if (isResumed) this.#resume(stream, position, Number(part));
    else if (stream.isPoll) stream.end();
    else this.#add(stream);
    return stream.response();
  }

  #resume(stream, position, part) {
    const news = this.#frames.filter((frame) => frame.position > position || (part && frame.position === position));
    const slice = stream.isPoll ? news.slice(0, SLICE) : news;
    for (const frame of slice) {
      const isPart = part && frame.position === position;
      stream.write(isPart ? this.#parts(frame, part) : this.#text(stream, frame));
    }
    if (stream.isPoll && news.length) return stream.end();
    this.#add(stream);
    if (stream.isPoll) {
      const at = this.world.now + POLL_WAIT_MS;
      this.timers.set(stream, { at, run: () => this.streams.has(stream) && stream.end() });
    }
  }

  #add(stream) {
    this.streams.add(stream);
    this.mostStreams = Math.max(this.mostStreams, [...this.streams].filter(({ isPoll }) => !isPoll).length);
  }

  #missed(id, position, part) {
    const [epoch] = id.split("-");
    if (epoch !== `e${this.#epoch}`) return "epoch";
    if (position > this.#head) return "malformed";
    return position < this.#floor + (part ? 1 : 0) ? "too_old" : undefined;
  }

  #state() {
    return Array.from({ length: this.snapshot }, (_, index) =>
      block("state", index, { id: index + 1 === this.snapshot ? this.head : undefined }),
    );
  }

  #text(stream, frame) {
    const { numbers } = frame;
    if (numbers.length === 1) return block("n", numbers[0], { id: this.#id(frame.position) });
    if (!stream.batches) return this.#parts(frame, 0);
    const data = { type: "n_batch", batchSize: numbers.length, events: numbers };
    return block("n_batch", data, { id: this.#id(frame.position) });
  }

  #parts({ position, numbers }, part) {
    const id = this.#id(position);
    const ids = numbers.map((_, index) => (index + 1 < numbers.length ? `${id}.${index + 1}` : id));
    return numbers
      .map((number, index) => block("n", number, { id: ids[index] }))
      .slice(part)
      .join("");
  }

  #id(position) {
    return `e${this.#epoch}-${position}`;
  }

  #note() {
    this.#counts.set(this.head, this.#published);
  }

  #beat() {
    for (const stream of this.streams) stream.write(":\n\n");
  }
}
