// What cases use: streams of the scripted server, objects of the module, and checks.

const opened = [];
let streams = 0;

export const close = () => opened.forEach((source) => source.close());

const put = async (method, path, body) => {
  const response = await fetch(path, {method, body});
  if (!response.ok) throw new Error(`${method} ${path}: ${response.status}`);
  return response;
};

const text = (value) => JSON.stringify(value, (_, each) => (each === undefined ? "(undefined)" : each));

export const context = {
  notes: [],
  violations: [],
  expectsErrors: false, // errors that nothing catches

  // A new stream of the server. `answers`: see scripted.py; `polls` likewise for requests with poll=1.
  async stream(answers, polls = []) {
    const name = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}-${++streams}`;
    await put("PUT", `/script/${name}`, JSON.stringify({stream: answers, poll: polls}));
    return {
      url: `/stream/${name}`,
      say: (body) => put("POST", `/say/${name}`, body),
      requests: async () => (await put("GET", `/requests/${name}`)).json(),
      script: (stream, poll = []) => put("PUT", `/script/${name}`, JSON.stringify({stream, poll})),
    };
  },

  // An object of the module. It is closed when the case ends.
  async open(url, options = {}) {
    const {BatchedEventSource} = await import("/sse-batcher.js");
    const source = new BatchedEventSource(url, {backoff: [10, 50], ...options});
    opened.push(source);
    return source;
  },

  // The events of these types that `on` gets, as [type, data, id]; and the states.
  record(source, ...types) {
    const seen = [];
    for (const type of types) source.on(type, (data, info) => seen.push([info.type, data, info.id]));
    return seen;
  },
  states(source) {
    const states = [source.state];
    source.addEventListener("statechange", () => states.push(source.state));
    return states;
  },

  pause: (ms) => new Promise((resolve) => clock.setTimeout(resolve, ms)),
  async until(condition, what, ms = 40_000) {
    const deadline = clock.now() + ms;
    for (;;) {
      const value = await condition();
      if (value) return value;
      if (clock.now() > deadline) throw new Error(`not within ${ms} ms: ${what}`);
      await context.pause(10);
    }
  },
  equal(actual, expected, what) {
    if (text(actual) !== text(expected)) throw new Error(`${what}: ${text(actual)} is not ${text(expected)}`);
  },
  ok(value, what) {
    if (!value) throw new Error(what);
  },
  // Waits until there are as many events as expected, and a moment more, for those that should not come.
  async same(seen, expected, what, moment = 50) {
    try {
      await context.until(() => seen.length >= expected.length, "all events");
    } catch (error) {
      context.notes.push(String(error));
    }
    await context.pause(moment);
    context.equal(seen, expected, what);
  },
};

// -- the wire format, as the server writes it -------------------------------------------------------------------------

export const block = (type, data, id, ...lines) => [
  ...(type === "message" ? [] : [`event: ${type}`]),
  ...lines,
  ...data.split("\n").map((line) => `data: ${line}`),
  ...(id === undefined ? [] : [`id: ${id}`]),
  "\n",
].join("\n");
export const event = (type, data, id) => block(type, JSON.stringify(data), id);
export const batch = (type, list, id) => block(
  `${type}_batch`,
  `{"type":"${type}_batch","batchSize":${list.length},"events":[${list.map((each) => JSON.stringify(each))}],`
    + '"reason":"time_window","timestamp":1700000000000}',
  id,
);
export const open = (id, heartbeat = 15, retry = 10) =>
  block("sse_open", JSON.stringify({heartbeat, channels: ["default"]}), id, `retry: ${retry}`);
export const gap = (id, reason = "too_old") =>
  block("sse_gap", JSON.stringify({heartbeat: 15, reason}), id, "retry: 10");
