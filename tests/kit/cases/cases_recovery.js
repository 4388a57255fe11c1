// What can pass: statuses, ends, cuts, silence, a laptop's sleep, a page that is hidden, offline or in a cache.
import {batch, block, event, open} from "/context.js";
import {test} from "/registry.js";

const held = (...body) => [{body, end: "hold", beat: 5000}];
const cursors = async (stream) => (await stream.requests()).map(({query}) => query.last_event_id?.[0]);
const count = async (stream) => (await stream.requests()).length;
const busy = (reason, retry) => block("sse_busy", JSON.stringify({reason}), undefined, `retry: ${retry}`);
const bye = (id, reason, retry) => block("sse_bye", JSON.stringify({reason}), id, `retry: ${retry}`);

test("it goes on from its cursor after each kind of end", async (t) => {
  const history = Array.from({length: 6}, (_, n) => [`c-${n}`, batch("n", [2 * n, 2 * n + 1], `c-${n}`)]);
  const through = (n, more) => ({body: [open(n ? `c-${n - 1}` : "b")], history: history.slice(0, n + 1), ...more});
  const stream = await t.stream([
    through(0), through(1, {end: "reset"}), through(2, {chunked: true}), through(3, {chunked: true, end: "reset"}),
    through(4, {last: [bye("c-4", "shutdown", 10)]}), {body: [busy("limit", 10)]},
    {body: [open("c-4")], history, end: "hold"},
  ]);
  const source = await t.open(stream.url, {cursor: "b"});
  const seen = t.record(source, "n", "sse_gap");
  const expected = history.flatMap(([id], n) => [["n", 2 * n, `${id}.1`], ["n", 2 * n + 1, id]]);
  await t.same(seen, expected, "events");
  t.equal((await cursors(stream))[0], "b", "the first cursor");
});

test("an id within a batch is a cursor, too", async (t) => {
  const stream = await t.stream(held(open("c-1.2"), event("n", 3, "c-1")));
  const source = await t.open(stream.url, {cursor: "c-1.2"});
  await t.same(t.record(source, "n"), [["n", 3, "c-1"]], "events");
  t.equal(await cursors(stream), ["c-1.2"], "cursors");
});

// Each answer ends one byte later than the one before.
const cutEverywhere = async (t, more) => {
  const first = open("c-0", 15, 1);
  const history = [["c-0", ""], ["c-1", batch("n", ["ä€𝄞", 2, {three: "\\"}], "c-1")], ["c-2", event("n", 4, "c-2")]];
  const bytes = new TextEncoder().encode(history[1][1]).length;
  const before = new TextEncoder().encode(first).length;
  const answers = Array.from({length: bytes + 1}, (_, k) => ({body: [first], history, cut: before + k, ...more}));
  const stream = await t.stream([...answers, {body: [first], history, end: "hold"}]);
  const source = await t.open(stream.url, {cursor: "c-0", backoff: [1, 5]});
  const seen = t.record(source, "n");
  await t.until(() => seen.length >= 4, "all events");
  const expected = [["n", "ä€𝄞", "c-1.1"], ["n", 2, "c-1.2"], ["n", {three: "\\"}, "c-1"], ["n", 4, "c-2"]];
  await t.same(seen, expected, "events");
  const all = await cursors(stream);
  t.ok(all.slice(0, bytes).every((cursor) => cursor === "c-0"), "cursors before the batch is complete");
  t.ok(all.length >= bytes + 1, `each byte: ${all.length}`);
};

test("a cut at every byte of a batch", async (t) => cutEverywhere(t, {}));
test("a reset at every byte of a batch", async (t) => cutEverywhere(t, {end: "reset"}));
test("chunks that end at every byte of a batch", async (t) => cutEverywhere(t, {chunked: true}));

test("statuses that pass are tried again", async (t) => {
  const statuses = [500, 502, 503, 504, 429, 408, 404, 403, 401];
  const stream = await t.stream([...statuses.map((status) => ({status})), ...held(open("c-0"), event("n", 1, "c-1"))]);
  const source = await t.open(stream.url), seen = t.record(source, "n"), errors = [], states = new Set();
  source.onerror = ({status, message}) => {
    errors.push(status);
    states.add(source.readyState);
    t.ok(message, "it says what happened");
  };
  await t.same(seen, [["n", 1, "c-1"]], "events");
  t.equal([errors, [...states]], [statuses, [0]], "errors, and readyState meanwhile");
});

test("a page of another kind is no stream", async (t) => {
  const page = {headers: {"Content-Type": "text/html"}, body: ["<p>Log in\n\nevent: n\ndata: 0\nid: x\n\n"]};
  const stream = await t.stream([page, ...held(open("c-0"), event("n", 1, "c-1"))]);
  const source = await t.open(stream.url), opens = [];
  source.onopen = () => opens.push(source.state);
  await t.same(t.record(source, "n"), [["n", 1, "c-1"]], "events");
  t.equal([await cursors(stream), opens], [[undefined, undefined], ["open"]], "cursors, and when it opens");
});

test("a connection that ends without an answer is tried again", async (t) => {
  const stream = await t.stream([{status: 0}, {status: 0, end: "reset"}, ...held(open("c-0"), event("n", 1, "c-1"))]);
  const source = await t.open(stream.url), seen = t.record(source, "n"), errors = [];
  source.onerror = ({status}) => errors.push([status, source.readyState]);
  await t.same(seen, [["n", 1, "c-1"]], "events");
  // Firefox has asked again by itself.
  t.ok(errors.every(([status, readyState]) => status === 0 && readyState === 0), `errors: ${errors}`);
});

test("a socket that goes silent is given up after two heartbeats", async (t) => {
  const stream = await t.stream([
    {body: [open("c-0", 15), event("n", 1, "c-1")], end: "hold"}, ...held(open("c-1"), event("n", 2, "c-2")),
  ]);
  const source = await t.open(stream.url), seen = t.record(source, "n"), errors = [];
  source.onerror = ({status}) => errors.push(status);
  await t.until(() => seen.length === 1, "the first event");
  const began = performance.now();
  await t.until(() => clock.skip(1000) || errors.length, "an error");
  const passed = performance.now() - began;
  await t.same(seen, [["n", 1, "c-1"], ["n", 2, "c-2"]], "events");
  const requests = await stream.requests();
  t.equal([await cursors(stream), errors], [[undefined, "c-1"], [0]], "cursors and errors");
  t.ok(passed > 29_000 && passed < 40_000, `after ${passed} ms`);
  t.ok(requests[0].left !== null, "the silent one is closed");
});

test("silence is an error like others: it waits as long as the server asks for", async (t) => {
  const stream = await t.stream([{body: [open("c-0", 15, 60_000)], end: "hold"}, {after: null}]);
  const source = await t.open(stream.url, {poll: false}), errors = [];
  source.onerror = ({status, message}) => errors.push([status, message, source.state]);
  await t.until(() => source.state === "open", "it opens");
  await t.pause(50);
  clock.skip(31_000);
  await t.until(() => errors.length, "an error");
  await t.pause(100);
  t.equal([errors, await count(stream)], [[[0, "the stream is silent", "waiting"]], 1], "errors and requests");
  clock.skip(30_000);
  await t.pause(100);
  t.equal([errors.length, await count(stream)], [1, 1], "errors and requests before it is time");
  clock.skip(31_000);
  await t.until(async () => await count(stream) === 2, "another request");
  clock.skip(31_000);
  await t.until(() => errors.length === 2, "a second error");
});

test("heartbeats keep a quiet stream open", async (t) => {
  let pieces = 0;
  const {prototype} = ReadableStreamDefaultReader, {read} = prototype;
  prototype.read = function readAndCount() {
    const result = read.call(this);
    result.then(() => { pieces += 1; }, () => {});
    return result;
  };
  const stream = await t.stream([{body: [open("c-0", 15)], end: "hold", beat: 100}]);
  const source = await t.open(stream.url);
  await t.until(() => source.state === "open", "it opens");
  for (let k = 0; k < 4; k += 1) {
    const before = pieces;
    await t.until(() => pieces > before + 1, "heartbeats");
    clock.skip(25_000);
  }
  await t.pause(100);
  t.equal([await count(stream), source.state], [1, "open"], "requests");
});

test("a stream that has slept with the laptop is opened again", async (t) => {
  const stream = await t.stream([
    {body: [open("c-0", 15), event("n", 1, "c-1")], end: "hold"}, ...held(open("c-1"), event("n", 2, "c-2")),
  ]);
  const source = await t.open(stream.url), seen = t.record(source, "n");
  await t.until(() => seen.length === 1, "the first event");
  await t.pause(50);
  clock.skip(3_600_000);
  await t.same(seen, [["n", 1, "c-1"], ["n", 2, "c-2"]], "events");
});

test("Retry-After is a floor", async (t) => {
  const stream = await t.stream([{status: 503, headers: {"Retry-After": "60"}}, ...held(open("c-0"))]);
  const source = await t.open(stream.url);
  await t.until(() => source.state === "waiting", "it waits");
  clock.skip(40_000);
  await t.pause(100);
  t.equal(await count(stream), 1, "requests before");
  clock.skip(25_000);
  await t.until(() => source.state === "open", "it opens");
});

test("the retry of sse_busy is not undercut by online", async (t) => {
  const stream = await t.stream([{body: [busy("limit", 60_000)]}, ...held(open("c-0"))]);
  const source = await t.open(stream.url), seen = t.record(source, "sse_busy");
  await t.until(() => source.state === "waiting", "it waits");
  await t.same(seen, [["sse_busy", {reason: "limit"}, ""]], "the reason");
  for (const skip of [0, 20_000, 20_000]) {
    clock.skip(skip);
    dispatchEvent(new Event("online"));
    document.dispatchEvent(new Event("visibilitychange"));
    dispatchEvent(new PageTransitionEvent("pageshow", {persisted: true}));
    await t.pause(70);
    t.equal(await count(stream), 1, `requests after ${skip}`);
  }
  clock.skip(30_000);
  await t.until(() => source.state === "open", "it opens");
});

test("online and visibilitychange make it try at once", async (t) => {
  const stream = await t.stream([{status: 502}, {status: 502}, ...held(open("c-0"))]);
  const source = await t.open(stream.url, {backoff: [600_000, 600_000]});
  await t.until(() => source.state === "waiting", "it waits");
  t.equal(await count(stream), 1, "requests at first");
  clock.skip(2000);
  dispatchEvent(new Event("online"));
  await t.until(async () => await count(stream) === 2 && source.state === "waiting", "a second request");
  clock.skip(2000);
  document.dispatchEvent(new Event("visibilitychange"));
  await t.until(() => source.state === "open", "it opens");
  clock.skip(2000);
  dispatchEvent(new Event("online")); // the stream may be dead
  await t.until(async () => await count(stream) === 4 && source.state === "open", "it opens again");
});

test("the waits grow, and are spread", async (t) => {
  const stream = await t.stream([{status: 502}]);
  const delays = [], set = window.setTimeout;
  window.setTimeout = (call, ms, ...more) => {
    delays.push(ms);
    return set(call, ms, ...more);
  };
  const source = await t.open(stream.url, {poll: false, backoff: [1000, 20_000]});
  const waits = () => delays.filter((ms) => ms > 100 && ms !== 30_000); // which url() has to answer in
  const leap = () => {
    clock.skip(5000);
    return waits().length >= 16;
  };
  await t.until(leap, "sixteen waits");
  source.close();
  t.ok(waits().every((ms) => ms <= 20_000), `at most 20 s: ${waits()}`);
  t.ok(Math.max(...waits().slice(7)) > 5000, `they grow: ${waits()}`);
  t.ok(waits().slice(7).some((ms) => ms < 19_000), `they are spread: ${waits()}`);
});

test("a page in the back/forward cache has no stream, and goes on from its cursor", async (t) => {
  const stream = await t.stream([
    {body: [open("c-0"), event("n", 1, "c-1")], end: "hold"}, ...held(open("c-1"), event("n", 2, "c-2")),
  ]);
  const source = await t.open(stream.url), seen = t.record(source, "n");
  await t.until(() => seen.length === 1, "the first event");
  dispatchEvent(new PageTransitionEvent("pagehide", {persisted: true}));
  await t.until(async () => (await stream.requests())[0].left !== null, "it leaves");
  await t.pause(150);
  t.equal(await count(stream), 1, "requests");
  dispatchEvent(new PageTransitionEvent("pageshow", {persisted: true}));
  await t.same(seen, [["n", 1, "c-1"], ["n", 2, "c-2"]], "events");
  t.equal(await cursors(stream), [undefined, "c-1"], "cursors");
});

test("what waits to be dispatched survives a lost connection", async (t) => {
  const numbers = (from, to) => Array.from({length: to - from}, (_, k) => from + k);
  const history = [["c-0", ""], ["c-1", batch("n", numbers(0, 3000), "c-1")], ["c-2", batch("n", numbers(3000, 3100), "c-2")]];
  const first = open("c-0", 15, 1);
  const stream = await t.stream([
    {body: [first], history: history.slice(0, 2), end: "close"}, {status: 502}, {body: [first], history, end: "hold"},
  ]);
  const source = await t.open(stream.url, {cursor: "c-0", backoff: [1, 5]}), seen = [];
  let work = 0;
  source.on("n", (data) => {
    seen.push(data);
    for (let k = 0; k < 20_000; k += 1) work = (work + k) % 1e9;
  });
  await t.same(seen, numbers(0, 3100), "events");
  t.ok((await cursors(stream)).slice(1).every((cursor) => cursor === "c-1"), "the newest block that was received");
});

test("an event that comes while the page is hidden is there at once", async (t) => {
  const stream = await t.stream(held(open("c-0")));
  const source = await t.open(stream.url), seen = t.record(source, "n");
  await t.until(() => source.state === "open", "it opens");
  Object.defineProperty(document, "visibilityState", {configurable: true, value: "hidden"});
  document.dispatchEvent(new Event("visibilitychange"));
  await stream.say(event("n", 1, "c-1"));
  await t.same(seen, [["n", 1, "c-1"]], "events");
  t.equal(await count(stream), 1, "requests");
});
