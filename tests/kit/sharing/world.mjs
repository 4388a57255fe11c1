// Tabs, their shared worker, and a server, in one Node process. Time and the order of all messages belong to the test.
//
// Each tab, and each worker, is a realm: a `vm` context with its own copy of the module, and with timers, ports and a
// `fetch` that are made here. Nothing happens but by `World.run`, one task after the other; between two tasks, promises
// settle. Tasks of one source (a port, a stream) keep their order. With `isRandom`, sources overtake each other.

import { types } from "node:util";
import vm from "node:vm";
import { Server } from "./server.mjs";

/** Random numbers from a seed: mulberry32. */
export function randomOf(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let value = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value;
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** What has tasks, in order. They run while its realm is alive and not frozen. */
export class Source {
  #tasks = [];

  constructor(world, realm) {
    this.world = world;
    this.realm = realm;
    this.isStarted = true;
    world.sources.add(this);
  }

  post(run) {
    this.#tasks.push({ order: (this.world.posted += 1), run });
  }

  get order() {
    const { realm, isStarted } = this;
    return isStarted && this.#tasks.length && (!realm || realm.isRunning) ? this.#tasks[0].order : Infinity;
  }

  get size() {
    return this.#tasks.length;
  }

  runFirst() {
    this.#tasks.shift().run();
  }

  drop() {
    this.#tasks = [];
    this.world.sources.delete(this);
  }
}

class Port {
  #onmessage;

  constructor(world, realm) {
    this.inbox = new Source(world, realm);
    this.inbox.isStarted = false;
    world.openPorts.add(this);
  }

  set onmessage(handle) {
    this.#onmessage = handle;
    this.inbox.isStarted = true;
  }

  postMessage(value) {
    const { other } = this;
    const data = copied(value, other.inbox.realm);
    this.inbox.world.onMessage?.(data);
    other.inbox.post(() => !other.isClosed && other.#onmessage({ data }));
  }

  close() {
    this.isClosed = true;
    this.inbox.drop();
    for (const port of [this, this.other]) this.inbox.world.openPorts.delete(port);
  }
}

/** A structured clone. Ports go over to the realm. */
function copied(value, realm) {
  if (value instanceof Port) value.inbox.realm = realm;
  if (typeof value === "function") throw new Error("a function cannot be cloned");
  if (value === null || typeof value !== "object" || value instanceof Port) return value;
  const isPlain = /^\[object (Object|Array)\]$/.test(Object.prototype.toString.call(value));
  if (!isPlain || types.isProxy(value)) throw new Error("this object cannot be cloned");
  if (Array.isArray(value)) return value.map((entry) => copied(entry, realm));
  return Object.fromEntries(Object.entries(value).map(([name, entry]) => [name, copied(entry, realm)]));
}

function channelOf(world, realm, otherRealm = realm) {
  const port1 = new Port(world, realm);
  const port2 = new Port(world, otherRealm);
  port1.other = port2;
  port2.other = port1;
  return { port1, port2 };
}

class Realm {
  isAlive = true;
  isFrozen = false;

  constructor(world, globals) {
    this.world = world;
    const target = new EventTarget();
    const timers = new Map();
    this.timers = timers;
    let last = 0;
    const every = (period) => (run, wait = 0, ...values) => {
      timers.set((last += 1), { at: world.now + wait, period: period && wait, run: () => run(...values) });
      return last;
    };
    const realm = this;
    const made = {
      console: { warn: (text) => world.warnings.push(text) },
      reportError: (error) => world.errors.push(error),
      setTimeout: every(false),
      setInterval: every(true),
      clearTimeout: (number) => timers.delete(number),
      clearInterval: (number) => timers.delete(number),
      Date: { now: () => world.now, parse: Date.parse },
      performance: { now: () => world.now },
      fetch: (address, options) => world.server.fetch(realm, address, options),
      MessageChannel: function () {
        return channelOf(world, realm);
      },
      addEventListener: target.addEventListener.bind(target),
      dispatchEvent: target.dispatchEvent.bind(target),
      ...{ AbortController, Event, EventTarget, MessageEvent, TextDecoder, URL },
      ...globals,
    };
    this.context = vm.createContext(made);
    this.context.self = this.context;
    vm.runInContext("Math", this.context).random = world.random;
  }

  get isRunning() {
    return this.isAlive && !this.isFrozen;
  }

  async load() {
    const options = { context: this.context, initializeImportMeta: (meta) => (meta.url = this.world.scriptUrl) };
    const module = new vm.SourceTextModule(this.world.script, options);
    await module.link(() => {});
    await module.evaluate();
    return module.namespace;
  }

  /** The process dies: nothing of it runs any more, and the server sees its connections end. */
  kill() {
    this.isAlive = false;
    this.timers.clear();
    this.world.server.hangUp(this);
    for (const source of this.world.sources) if (source.realm === this) source.drop();
    for (const worker of this.world.workers.values()) {
      if (worker.isAlive && ![...worker.users].some(({ isAlive }) => isAlive)) worker.kill();
    }
  }
}

/** A page with one source, and what it has seen. */
export class Page {
  events = []; // the numbers of what has come
  log = []; // the numbers, and between them [type, data, id] of the stream's own events
  states = [];
  errors = []; // statuses

  constructor(world, realm) {
    this.world = world;
    this.realm = realm;
  }

  begin(BatchedEventSource, url, options) {
    this.cursor = options.cursor ?? "";
    this.source = new BatchedEventSource(url, { share: "u1", ...options });
    this.source.on("n", (number) => {
      this.events.push(number);
      this.log.push(number);
    });
    for (const type of ["sse_open", "sse_gap", "sse_busy", "sse_bye", "state"]) {
      this.source.on(type, (data, { id }) => this.log.push([type, data, id]));
    }
    this.source.addEventListener("statechange", () => this.states.push(this.source.state));
    this.source.addEventListener("error", ({ status }) => this.errors.push(status));
  }

  own(type) {
    return this.log.filter((entry) => entry[0] === type);
  }

  /** What is wrong with all that it has seen: each event once and in order, unless an sse_gap says so. */
  fault() {
    const { server } = this.world;
    const counts = (id) => (server.snapshot ? undefined : server.count(id));
    let count = this.cursor ? server.count(this.cursor) : undefined;
    for (const entry of this.log) {
      const [type, data, id] = Array.isArray(entry) ? entry : ["n", entry];
      if (type === "n" && data !== (count += 1)) return `${data} after ${count - 1}`;
      if (type === "state" && data + 1 === server.snapshot) count = server.count(id);
      if (type === "sse_gap" && server.count(id) >= (count ?? 0)) count = server.count(id);
      if (type === "sse_open" || type === "sse_bye") {
        const there = counts(id);
        if (count !== undefined && there !== undefined && there !== count) return `${type} at ${there} after ${count}`;
        count ??= there;
      }
    }
    return count === server.published ? "" : `${server.published - count} are missing`;
  }

  /** The page goes away in good order. What it has still sent arrives. */
  close() {
    this.dispatch("pagehide");
    this.realm.kill();
  }

  kill() {
    this.realm.kill();
  }

  freeze() {
    this.realm.isFrozen = true;
  }

  thaw() {
    this.realm.isFrozen = false;
  }

  /** Into the back/forward cache, or back from there. */
  dispatch(type) {
    this.realm.context.dispatchEvent(new Event(type));
  }

  /** Shown again, as by a click on its tab. */
  show() {
    this.realm.context.document.dispatchEvent(new Event("visibilitychange"));
  }
}

export class World {
  now = 1_000_000;
  posted = 0;
  sources = new Set();
  realms = new Set();
  workers = new Map(); // by name
  warnings = [];
  errors = [];
  openPorts = new Set(); // whose other end is open, too
  onMessage; // called with each message between two realms
  canLoad = true; // the worker's script
  scriptUrl = "https://site.test/events/sse-batcher.js";

  constructor(script, { seed = 1, isRandom = false, ...options } = {}) {
    this.script = script;
    this.random = randomOf(seed);
    this.choose = randomOf(seed + 1); // apart from the module's, so that a change of it does not change the test
    this.isRandom = isRandom;
    this.server = new Server(this, options);
  }

  /** A tab whose page opens a stream. `renew`: the option `url`. `meet`: gets the worker's end of the port. */
  async open({ url = "/events", hasWorkers = true, renew, meet, ...options } = {}) {
    const document = Object.assign(new EventTarget(), { hidden: false, baseURI: "https://site.test/page" });
    const globals = { document, location: { href: document.baseURI } };
    const realm = new Realm(this, globals);
    const world = this;
    if (hasWorkers) {
      realm.context.SharedWorker = function (script, { name }) {
        if (!meet) return world.#share(realm, name);
        const { port1, port2 } = channelOf(world, realm, undefined);
        meet(port2);
        return { port: port1 };
      };
    }
    this.realms.add(realm);
    const { BatchedEventSource } = await realm.load();
    const page = new Page(this, realm);
    page.begin(BatchedEventSource, url, renew ? { ...options, url: renew } : options);
    return page;
  }

  #share(realm, name) {
    const shared = {};
    let worker = this.workers.get(name);
    if (!worker?.isAlive) {
      worker = new Realm(this, { name, SharedWorkerGlobalScope: class {}, location: { href: this.scriptUrl } });
      worker.users = new Set();
      this.workers.set(name, worker);
      this.realms.add(worker);
      worker.loading = this.canLoad ? worker.load() : Promise.reject(new Error("no script"));
    }
    worker.users.add(realm);
    const { port1, port2 } = channelOf(this, realm, worker);
    shared.port = port1;
    realm.ways = { toWorker: port2.inbox, toTab: port1.inbox };
    const [here, there] = [new Source(this, realm), new Source(this, worker)];
    worker.loading.then(
      () => there.post(() => worker.context.onconnect({ ports: [port2] })),
      () => {
        worker.kill();
        here.post(() => shared.onerror?.({}));
      },
    );
    return shared;
  }

  worker(share = "u1") {
    return [...this.workers].find(([name]) => name.includes(JSON.stringify(share)))[1];
  }

  /** Resolved after this time. For the functions of a page. */
  pause(milliseconds) {
    return new Promise((run) => this.server.timers.set({}, { at: this.now + milliseconds, run }));
  }

  /** Let this many milliseconds pass, with all that happens in them. */
  async run(milliseconds = 50) {
    const end = this.now + milliseconds;
    await settled();
    while (this.#runOne(end)) await settled();
    this.now = end;
  }

  #runOne(end) {
    const ready = [...this.sources].filter(({ order }) => order < Infinity).sort((a, b) => a.order - b.order);
    const timer = this.#nextTimer();
    // Now and then, time passes while messages are on their way.
    const isLate = this.isRandom && timer?.at <= this.now + 300 && this.choose() < 0.03;
    if (ready.length && !isLate) {
      ready[this.isRandom ? Math.floor(this.choose() * ready.length) : 0].runFirst();
    } else if (timer && timer.at <= end) {
      this.now = Math.max(this.now, timer.at);
      if (timer.period) timer.at = this.now + timer.period;
      else timer.timers.delete(timer.number);
      timer.run();
    } else {
      return ready.length > 0 && this.isRandom;
    }
    return true;
  }

  #nextTimer() {
    let next;
    for (const { timers, isRunning } of [...this.realms, { timers: this.server.timers, isRunning: true }]) {
      if (!isRunning) continue;
      for (const [number, timer] of timers) {
        if (!next || timer.at < next.at) next = Object.assign(timer, { number, timers });
      }
    }
    return next;
  }
}

function settled() {
  return new Promise(setImmediate);
}
