// The object itself: it can replace an EventSource, its options, and its end.
import {batch, event, open} from "/context.js";
import {test} from "/registry.js";

const held = (...body) => [{body, end: "hold", beat: 5000}];
const query = (request) => request.query;

test("the properties of an EventSource", async (t) => {
  const {BatchedEventSource} = await import("/sse-batcher.js");
  const stream = await t.stream(held(open("c-0"), event("n", 1, "c-1")));
  const source = await t.open(stream.url);
  t.equal([source.url, source.withCredentials, source.readyState], [location.origin + stream.url, false, 0], "at first");
  t.equal([source.CONNECTING, source.OPEN, source.CLOSED], [0, 1, 2], "constants of an object");
  t.equal([BatchedEventSource.CONNECTING, BatchedEventSource.OPEN, BatchedEventSource.CLOSED], [0, 1, 2], "of the class");
  t.equal([source.onopen, source.onmessage, source.onerror], [null, null, null], "handlers");
  t.ok(source instanceof EventTarget, "an EventTarget");
  const got = await new Promise((resolve) => source.addEventListener("n", resolve));
  t.equal([got.constructor.name, got.data, got.lastEventId, got.origin], ["MessageEvent", "1", "c-1", location.origin], "event");
  t.equal([source.readyState, source.state], [1, "open"], "open");
  source.close();
  t.equal([source.readyState, source.state], [2, "closed"], "closed");
  t.equal((await t.open(stream.url, {withCredentials: true})).withCredentials, true, "withCredentials");
});

test("the states, one after the other", async (t) => {
  const stream = await t.stream([{body: [open("c-0")], end: "close"}, {status: 503}, ...held(open("c-0"))]);
  const source = await t.open(stream.url), states = t.states(source), types = [];
  for (const type of ["open", "error"]) source.addEventListener(type, ({status, message}) => types.push([type, status, typeof message]));
  await t.until(() => states.filter((state) => state === "open").length === 2, "open again");
  source.close();
  t.equal(
    states.filter((state, k) => state !== states[k - 1]),
    ["connecting", "open", "waiting", "connecting", "waiting", "connecting", "open", "closed"], "states",
  );
  t.equal(types, [
    ["open", undefined, "undefined"], ["error", 0, "string"], ["error", 503, "string"], ["open", undefined, "undefined"],
  ], "events");
});

test("the URL keeps its query, and channels and the cursor are added", async (t) => {
  const stream = await t.stream(held(open("c-0")));
  const absolute = new URL(`${stream.url}?channel=a&x=%26#fragment`, location.href);
  for (const [url, options] of [
    [stream.url, {}],
    [absolute, {}],
    [`${stream.url}?x=1`, {channels: ["b", "c&d"], cursor: "c-9"}],
    [stream.url.slice(1), {cursor: "c-9"}],
  ]) await t.open(url, options);
  const requests = await t.until(async () => {
    const all = await stream.requests();
    return all.length === 4 && all;
  }, "four requests");
  const found = requests.map(query).map(({channel, x, last_event_id}) => [channel, x, last_event_id]);
  const expected = [
    [undefined, undefined, undefined], [["a"], ["&"], undefined],
    [["b", "c&d"], ["1"], ["c-9"]], [undefined, undefined, ["c-9"]],
  ];
  t.equal(found.map(JSON.stringify).sort(), expected.map(JSON.stringify).sort(), "queries");
  t.ok(requests.every(({headers}) => !headers["last-event-id"]), "no header that needs a preflight");
});

test("headers() is asked for each request", async (t) => {
  const stream = await t.stream([{body: [open("c-0")]}, ...held(open("c-0"))]);
  let calls = 0;
  const source = await t.open(stream.url, {headers: async () => ({Authorization: `Bearer ${++calls}`})});
  await t.until(() => source.state === "open" && calls === 2, "the second");
  t.equal((await stream.requests()).map(({headers}) => headers.authorization), ["Bearer 1", "Bearer 2"], "headers");
});

test("url() gives a fresh URL after 401 and 403", async (t) => {
  const stream = await t.stream([
    {body: [open("c-0"), event("n", 1, "c-1")]}, {status: 401}, {body: [open("c-1"), event("n", 2, "c-2")]}, {status: 403},
    ...held(open("c-2"), event("n", 3, "c-3")),
  ]);
  let calls = 0;
  const source = await t.open(`${stream.url}?token=0`, {url: async () => `${stream.url}?token=${++calls}`});
  const seen = t.record(source, "n");
  await t.same(seen, [["n", 1, "c-1"], ["n", 2, "c-2"], ["n", 3, "c-3"]], "events");
  t.equal((await stream.requests()).map(query).map(({token, last_event_id}) => [token, last_event_id]), [
    [["0"], undefined], [["0"], ["c-1"]], [["1"], ["c-1"]], [["1"], ["c-2"]], [["2"], ["c-2"]],
  ], "requests");
});

test("url() and headers() that fail are tried again", async (t) => {
  const stream = await t.stream([{status: 403}, ...held(open("c-0"), event("n", 1, "c-1"))]);
  let urls = 0, headers = 0;
  const source = await t.open(stream.url, {
    url: () => {
      if (++urls === 1) throw new Error("no url");
      return stream.url;
    },
    headers: async () => {
      if (++headers === 1) throw new Error("no headers");
      return {};
    },
  });
  const seen = t.record(source, "n"), errors = [];
  source.onerror = ({status}) => errors.push(status);
  await t.same(seen, [["n", 1, "c-1"]], "events");
  // What was refused is not sent again before there is another URL.
  t.equal([errors, urls, (await stream.requests()).length], [[0, 403, 0], 2, 2], "errors, calls of url(), requests");
});

// What is left of the object some time after its end, on a clock that has been put forward.
const check = async (t, stream, requests, calls) => {
  await t.until(async () => (await stream.requests()).every(({left}) => left !== null), "the server sees it leave");
  const before = [calls(), (await stream.requests()).length, clock.timers.size];
  for (const event of [new Event("online"), new PageTransitionEvent("pageshow", {persisted: true})]) dispatchEvent(event);
  document.dispatchEvent(new Event("visibilitychange"));
  clock.skip(600_000);
  await t.pause(150);
  t.equal(before, [calls(), (await stream.requests()).length, 0], "before and after: calls, requests, timers");
  t.equal(before[1], requests, "requests");
};

test("close() while it is open leaves nothing running", async (t) => {
  const stream = await t.stream([{body: [open("c-0"), event("n", 1, "c-1")], end: "hold", beat: 50}]);
  const source = await t.open(stream.url), seen = t.record(source, "n");
  await t.until(() => seen.length === 1, "the event");
  source.close();
  source.close();
  await stream.say(event("n", 2, "c-2"));
  await check(t, stream, 1, () => seen.length);
});

test("close() in the middle of a batch stops at once", async (t) => {
  const stream = await t.stream(held(open("c-0"), batch("n", [1, 2, 3], "c-1"), event("n", 4, "c-2")));
  const source = await t.open(stream.url), seen = [];
  source.on("n", (data) => {
    seen.push(data);
    if (data === 2) source.close();
  });
  source.on("n", (data) => seen.push([data]));
  source.addEventListener("n", () => seen.push("listener"));
  source.onBatch("n", () => seen.push("batch"));
  await t.until(() => seen.includes(2), "the second event");
  const behind = seen.slice(seen.indexOf(2) + 1);
  await check(t, stream, 1, () => seen.length);
  t.equal(behind, [], "calls after close()");
});

test("close() while it connects leaves nothing running", async (t) => {
  const stream = await t.stream([{after: null}]);
  const source = await t.open(stream.url), states = t.states(source);
  await t.until(async () => (await stream.requests()).length === 1, "the request");
  source.close();
  await check(t, stream, 1, () => states.length);
  t.equal(states, ["connecting", "closed"], "states");
});

test("close() while url() or headers() is awaited sends no request", async (t) => {
  const stream = await t.stream(held(open("c-0"))), refused = await t.stream([{status: 401}]);
  for (const option of ["url", "headers"]) {
    let release;
    const gate = new Promise((resolve) => { release = resolve; });
    let isAsked = false;
    const ask = (value) => {
      isAsked = true;
      return gate.then(() => value);
    };
    const source = option === "url"
      ? await t.open(refused.url, {url: () => ask(stream.url)})
      : await t.open(stream.url, {headers: () => ask({})});
    await t.until(() => isAsked, `${option} is called`);
    source.close();
    release();
  }
  await t.pause(50);
  await check(t, stream, 0, () => 0);
});

test("close() while it waits leaves nothing running", async (t) => {
  const stream = await t.stream([{status: 502}]);
  const source = await t.open(stream.url, {backoff: [60_000, 60_000]});
  await t.until(() => source.state === "waiting", "it waits");
  source.close();
  t.equal(clock.timers.size, 0, "timers");
  const calls = (await stream.requests()).length;
  dispatchEvent(new Event("online"));
  clock.skip(600_000);
  await t.pause(150);
  t.equal([calls, (await stream.requests()).length], [1, 1], "requests");
});

test("close() while it polls leaves nothing running", async (t) => {
  const stream = await t.stream([], [{body: [open("c-0")]}, {body: [open("c-0")], end: "hold"}]);
  const source = await t.open(stream.url, {poll: true});
  await t.until(async () => (await stream.requests()).length === 2, "the second poll");
  source.close();
  await t.until(async () => (await stream.requests())[1].left !== null, "the server sees it leave");
  t.equal(clock.timers.size, 0, "timers");
  clock.skip(600_000);
  await t.pause(150);
  t.equal((await stream.requests()).length, 2, "requests");
});

test("close() while it asks whether polls pass leaves nothing running", async (t) => {
  const stream = await t.stream([{after: null}], [{after: null}]);
  const source = await t.open(stream.url);
  await t.until(async () => (await stream.requests()).length === 1, "the stream");
  clock.skip(5100);
  await t.until(async () => (await stream.requests()).length === 2, "the poll");
  source.close();
  await check(t, stream, 2, () => 0);
});

test("close() in a handler of the connection is the last that happens", async (t) => {
  for (const type of ["open", "statechange", "error"]) {
    const answer = type === "error" ? {status: 500} : {body: [open("c-0"), event("n", 1, "c-1")], end: "hold"};
    const source = await t.open((await t.stream([answer])).url), behind = [];
    let last = null;
    for (const other of ["open", "statechange", "error", "n"]) {
      source.addEventListener(other, (event) => last && last !== event && behind.push(other));
    }
    for (const other of ["n", "sse_open"]) source.on(other, () => last && behind.push(other));
    source.addEventListener(type, (event) => {
      source.close();
      last = event;
    }, {once: true});
    await t.until(() => last, type);
    await t.pause(100);
    t.equal([behind, source.state], [[], "closed"], `after close() in ${type}`);
  }
});

test("wrong arguments are refused", async (t) => {
  for (const [url, options] of [["http://[", {}], ["/x", {channel: ["a"]}], ["/x", {channels: "a"}], ["/x", {polls: true}]]) {
    const error = await t.open(url, options).then(() => null, (reason) => reason);
    t.ok(error instanceof TypeError, `${url} ${JSON.stringify(options)}: ${error}`);
  }
  const source = await t.open((await t.stream(held(open("c-0")))).url);
  for (const method of ["on", "onText", "onBatch"]) {
    let error = null;
    try {
      source[method]("n", "no function");
    } catch (reason) {
      error = reason;
    }
    t.ok(error instanceof TypeError, `${method}: ${error}`);
  }
});

test("an unusual policy is not needed", async (t) => {
  const response = await fetch(location.href);
  t.ok(response.headers.get("content-security-policy").includes("default-src 'none'"), "the policy of this page");
  const stream = await t.stream(held(open("c-0"), batch("n", [1, 2], "c-1")));
  await t.same(t.record(await t.open(stream.url), "n"), [["n", 1, "c-1.1"], ["n", 2, "c-1"]], "events");
  t.equal(t.violations, [], "violations");
});

test("close() in a statechange after pageshow leaves nothing running", async (t) => {
  const stream = await t.stream(held(open("c-0")));
  const source = await t.open(stream.url);
  await t.until(() => source.state === "open", "it opens");
  dispatchEvent(new PageTransitionEvent("pagehide", {persisted: true}));
  await t.until(async () => (await stream.requests())[0].left !== null, "it leaves");
  source.addEventListener("statechange", () => source.close());
  dispatchEvent(new PageTransitionEvent("pageshow", {persisted: true}));
  await t.pause(100);
  await check(t, stream, 1, () => 0);
  t.equal(source.state, "closed", "state");
});

test("url() and headers() may take their time, and are called once", async (t) => {
  for (const option of ["url", "headers"]) {
    const stream = await t.stream(held(open("c-0"))), refused = await t.stream([{status: 401}]), errors = [];
    let release, calls = 0;
    const gate = new Promise((resolve) => { release = resolve; });
    const ask = (value) => {
      calls += 1;
      return gate.then(() => value);
    };
    const source = option === "url"
      ? await t.open(refused.url, {url: () => ask(stream.url)})
      : await t.open(stream.url, {headers: () => ask({})});
    source.onerror = ({status}) => errors.push(status);
    await t.until(() => calls, `${option} is called`);
    for (let k = 0; k < 4; k += 1) {
      clock.skip(6000); // together, less than is too long
      await t.pause(30);
    }
    release();
    await t.until(() => source.state === "open", `it opens after ${option}`);
    t.equal([calls, errors, (await stream.requests()).length], [1, option === "url" ? [401] : [], 1], option);
  }
});

test("url() and headers() that never answer are called again", async (t) => {
  for (const option of ["url", "headers"]) {
    const stream = await t.stream(held(open("c-0"))), refused = await t.stream([{status: 401}]), errors = [];
    let calls = 0;
    const ask = (value) => (++calls === 1 ? new Promise(() => {}) : value);
    const source = option === "url"
      ? await t.open(refused.url, {url: () => ask(stream.url)})
      : await t.open(stream.url, {headers: () => ask({})});
    source.onerror = ({status, message}) => errors.push(status || message);
    await t.until(() => calls, `${option} is called`);
    clock.skip(31_000);
    await t.until(() => source.state === "open", `it opens after ${option}`);
    t.equal([calls, errors], [2, option === "url" ? [401, "no answer"] : ["no answer"]], option);
    t.equal((await refused.requests()).length, option === "url" ? 1 : 0, "requests with the URL that was refused");
  }
});

test("a worker by a URL object, and a list that cannot be cloned, are shared", async (t) => {
  const warnings = [], {warn} = console;
  console.warn = (text) => warnings.push(text);
  for (const options of [{worker: new URL("/sse-batcher.js", location)}, {channels: new Proxy(["default"], {})}]) {
    const stream = await t.stream(held(open("c-0"), event("n", 1, "c-1")));
    const seen = [1, 2].map(() => []);
    for (const each of seen) {
      const source = await t.open(stream.url, {share: stream.url, cursor: "c-0", ...options});
      source.on("n", (data) => each.push(data));
    }
    await t.until(() => seen.every(({length}) => length), "both have the event");
    await t.pause(100);
    t.equal([seen, warnings, (await stream.requests()).length], [[[1], [1]], [], 1], "events, warnings, requests");
  }
  console.warn = warn;
});
