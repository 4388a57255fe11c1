// Two streams of the same events, compared: what each brought, and how much later the batched one did.
// Pure: no page, no network, no clock.

const KEPT_DELAYS = 20_000;

export class Comparison {
  #newest = 0; // the highest number on the plain stream, counted or not
  #base; // what came before the count began: up to this number

  constructor() {
    this.start();
    this.stop();
  }

  /** Count from zero. What the plain stream has brought before is left out on both sides, or they would not compare. */
  start() {
    this.running = true;
    this.#base = this.#newest;
    this.plain = { frames: 0, bytes: 0, events: 0 };
    this.batched = { frames: 0, bytes: 0, events: 0 };
    this.replaced = 0;
    // What the plain stream took for those events that are done with: arrived on the batched stream, or replaced there.
    this.settled = { frames: 0, bytes: 0 };
    this.delays = [];
    this.waiting = new Map(); // number -> {at, bytes, key}: still in a window
    this.early = new Set(); // numbers that the batched stream brought first, by a hair
    this.latest = new Map(); // key -> the number of its newest state on the batched stream
  }

  /** The plain stream is open again, perhaps to a new server, which numbers from one again. */
  renumber() {
    this.stop();
    this.#newest = 0;
  }

  /** Count nothing, until the next start: one of the streams is not open. */
  stop() {
    this.running = false;
  }

  /** One frame of the plain stream. Returns the delays that are known by it: [number, milliseconds]. */
  addPlain({ type, events: [data], bytes, at }) {
    const { n } = data;
    this.#newest = Math.max(this.#newest, n);
    if (!this.running || n <= this.#base) return [];
    add(this.plain, bytes, 1);
    const key = keyOf(type, data);
    if (this.early.delete(n)) return [this.#arrived(n, bytes, 0)];
    if (n < this.latest.get(key)) this.#replace(bytes);
    else this.waiting.set(n, { at, bytes, key });
    return [];
  }

  /** One frame of the batched stream. Returns as above. */
  addBatched({ type, events, bytes, at }) {
    const fresh = events.filter(({ n }) => n > this.#base);
    if (!this.running || !fresh.length) return [];
    add(this.batched, bytes, fresh.length);
    const delays = [];
    for (const data of fresh) {
      const plain = this.waiting.get(data.n);
      if (plain) delays.push(this.#arrived(data.n, plain.bytes, Math.max(0, at - plain.at)));
      else this.early.add(data.n);
      const key = keyOf(type, data);
      if (key !== null) this.latest.set(key, Math.max(data.n, this.latest.get(key) ?? 0));
    }
    // Events of one type keep their order. So what has not come before a newer state of its key never will.
    for (const [n, { key, bytes }] of this.waiting) {
      if (n < this.latest.get(key)) {
        this.waiting.delete(n);
        this.#replace(bytes);
      }
    }
    return delays;
  }

  /** Give up on what came before this moment: sent before the batched stream was open, and received after that. */
  forget(before) {
    for (const [n, { at }] of this.waiting) if (at < before) this.waiting.delete(n);
  }

  #arrived(n, bytes, delay) {
    this.waiting.delete(n);
    add(this.settled, bytes);
    this.delays.push(delay);
    if (this.delays.length > KEPT_DELAYS) this.delays.shift();
    return [n, delay];
  }

  #replace(bytes) {
    add(this.settled, bytes);
    this.replaced += 1;
  }
}

function add(counts, bytes, events) {
  counts.frames += 1;
  counts.bytes += bytes;
  if (events) counts.events += events;
}

/** What the server replaces by: events of one type and one server. Null if nothing is replaced. */
function keyOf(type, data) {
  return Object.hasOwn(data, "server") && data.server !== null ? JSON.stringify([type, data.server]) : null;
}
