// Something on the way that holds streams back until their end: the page polls instead. A slow server is no such thing.
import {batch, event, open} from "/context.js";
import {test} from "/registry.js";

const held = (...body) => [{body, end: "hold", beat: 5000}];
const kinds = async (stream) => (await stream.requests()).map(({query}) => ("poll" in query ? "poll" : "stream"));
const has = (stream, kind, number) => async () => (await kinds(stream)).filter((each) => each === kind).length >= number;
const FIVE_MINUTES = 300_000;

// Counts what the page asks for, as it asks: the server hears of it later.
const count = () => {
  const asked = {stream: 0, poll: 0}, {fetch} = window;
  window.fetch = (address, ...more) => {
    if (address instanceof URL) asked[address.searchParams.has("poll") ? "poll" : "stream"] += 1;
    return fetch(address, ...more);
  };
  return asked;
};

// Fifty seconds pass, less than what makes a poll too old. Then the next poll is asked. If it is time to try a stream
// again, the page has asked for that before. No more time may pass then: it gives that stream a few seconds.
const leap = async (t, asked) => {
  const before = asked.poll;
  clock.skip(50_000);
  await t.until(() => asked.poll > before, "the next poll");
};

test("poll: true polls from the first request on", async (t) => {
  const stream = await t.stream([], [
    {body: [open("c-0"), event("n", 1, "c-1")]}, {body: [open("c-1"), batch("n", [2, 3], "c-2")], after: 50},
    {body: [open("c-2")], end: "hold"},
  ]);
  const source = await t.open(stream.url, {poll: true}), states = t.states(source), errors = [];
  const openings = t.record(source, "sse_open");
  source.onerror = () => errors.push(source.state);
  await t.same(t.record(source, "n"), [["n", 1, "c-1"], ["n", 2, "c-2.1"], ["n", 3, "c-2"]], "events");
  t.equal([source.state, source.readyState, errors], ["polling", 1, []], "state");
  t.equal(openings.map(([, , id]) => id), ["c-0"], "the page sees one stream");
  const requests = await stream.requests();
  t.equal(requests.map(({query}) => [query.poll, query.last_event_id]), [
    [["1"], undefined], [["1"], ["c-1"]], [["1"], ["c-2"]],
  ], "requests");
  t.equal(states.filter((state, k) => state !== states[k - 1]), ["connecting", "polling"], "states");
});

test("poll: false waits for a stream that is held back", async (t) => {
  const stream = await t.stream([{after: null}], [{body: [open("c-0")]}]);
  const source = await t.open(stream.url, {poll: false});
  await t.until(has(stream, "stream", 1), "the request");
  for (const ms of [4000, 4000, 4000]) {
    clock.skip(ms);
    await t.pause(50);
  }
  t.equal((await kinds(stream)).includes("poll"), false, "no poll");
  t.equal(source.readyState, 0, "readyState");
});

test("it polls if a stream is held back and a poll is not, and tries the stream again", async (t) => {
  const history = [["c-0", ""], ["c-1", batch("n", [1, 2], "c-1")], ["c-2", event("n", 3, "c-2")]];
  const stream = await t.stream(
    [{after: null}, {body: [open("c-2", 1000)], history: [["c-2", ""], ["c-3", event("n", 4, "c-3")]], end: "hold", beat: 5000}],
    [
      {body: [open("c-0")]}, {body: [open("c-0")], history: history.slice(0, 2)}, {body: [open("c-1")], history},
      {body: [open("c-2")]},
    ],
  );
  const asked = count();
  const source = await t.open(stream.url), seen = t.record(source, "n", "sse_gap"), states = t.states(source);
  source.onerror = ({message}) => states.push(message);
  await t.until(has(stream, "stream", 1), "the stream");
  clock.skip(2000);
  await t.pause(50);
  t.equal([await kinds(stream), source.state], [["stream"], "connecting"], "after two seconds");
  clock.skip(3100);
  await t.until(() => source.state === "polling", "it polls");
  await t.until(() => seen.length === 3, "three events");
  await t.until(async () => (await stream.requests()).some(({query, left}) => !query.poll && left !== null), "the held one ends");
  const began = performance.now();
  while (asked.stream < 2) await leap(t, asked);
  await t.until(() => source.state === "open", "the stream is open");
  const passed = performance.now() - began;
  t.ok(passed > FIVE_MINUTES - 60_000 && passed < FIVE_MINUTES + 120_000, `a stream again, after ${passed} ms`);
  await t.same(seen, [["n", 1, "c-1.1"], ["n", 2, "c-1"], ["n", 3, "c-2"], ["n", 4, "c-3"]], "events");
  t.equal(states.filter((state, k) => state !== states[k - 1]), ["connecting", "polling", "open"], "states");
  const polls = (await kinds(stream)).filter((kind) => kind === "poll").length;
  clock.skip(60_000);
  await t.pause(100);
  t.equal((await kinds(stream)).filter((kind) => kind === "poll").length, polls, "no further poll");
});

test("an answer that comes while it changes from polls to the stream is no part of the stream", async (t) => {
  const asked = {stream: [], poll: []};
  window.fetch = async (address, {signal}) => {
    const kind = new URL(address).searchParams.has("poll") ? "poll" : "stream", request = {signal, reads: []};
    asked[kind].push(request);
    const read = () => new Promise((resolve, reject) => {
      request.reads.push(resolve);
      // As if a piece of the poll had arrived just before the poll was given up.
      if (kind === "stream") signal.addEventListener("abort", reject);
    });
    const headers = new Headers({"Content-Type": "text/event-stream"});
    return {status: 200, headers, body: {getReader: () => ({read})}};
  };
  const next = async (kind, number) => {
    await t.until(() => asked[kind][number]?.reads.length, `${kind} ${number} waits`);
    return asked[kind][number];
  };
  const answer = (request, text) => request.reads.pop()({value: text && new TextEncoder().encode(text)});
  const source = await t.open("/events"), seen = t.record(source, "n"), states = t.states(source);
  await next("stream", 0);
  clock.skip(5100); // nothing comes, so it asks whether a poll is answered
  answer(await next("poll", 0), open("c-0", 1000));
  const first = await next("poll", 1);
  answer(first, open("c-0", 1000));
  clock.skip(300_001);
  answer(await next("poll", 1));
  const second = await next("poll", 2);
  answer(await next("stream", 1), open("c-0", 1000)); // so streams are not held back any more
  await t.until(() => second.signal.aborted, "it gives the poll up");
  answer(second, open("c-0", 1000) + event("n", 1, "c-1"));
  answer(await next("stream", 2), open("c-0", 1000) + event("n", 1, "c-1"));
  await t.until(() => source.state === "open", "the stream is open");
  await t.same(seen, [["n", 1, "c-1"]], "events");
  t.equal(states.filter((state, k) => state !== states[k - 1]), ["connecting", "polling", "open"], "states");
});

test("it keeps polling while streams are held back", async (t) => {
  const history = [["c-0", ""], ["c-1", event("n", 1, "c-1")], ["c-2", event("n", 2, "c-2")]];
  const body = [open()];
  const stream = await t.stream([{after: null}], [{body: [open("c-0")]}, {body, history: history.slice(0, 2)}]);
  const asked = count();
  const source = await t.open(stream.url), seen = t.record(source, "n"), states = t.states(source);
  await t.until(has(stream, "stream", 1), "the stream");
  clock.skip(5100);
  await t.until(() => seen.length === 1, "the first event");
  while (asked.stream < 2) await leap(t, asked);
  await t.until(has(stream, "stream", 2), "a stream again");
  await leap(t, asked);
  await t.until(async () => (await stream.requests()).every(({query, left}) => query.poll || left !== null), "it gives up");
  await stream.script([{after: null}], [{body, history}]);
  await t.same(seen, [["n", 1, "c-1"], ["n", 2, "c-2"]], "events");
  t.equal(states.filter((state, k) => state !== states[k - 1]), ["connecting", "polling"], "states");
});

test("a slow server is not taken for a proxy that holds streams back", async (t) => {
  const answer = {body: [open("c-0"), event("n", 1, "c-1")], after: 700, end: "hold", beat: 5000};
  const stream = await t.stream([answer], [{after: null}]);
  const source = await t.open(stream.url), seen = t.record(source, "n"), states = t.states(source);
  await t.until(has(stream, "stream", 1), "the stream");
  for (const ms of [5100, 5100, 5100]) {
    clock.skip(ms);
    await t.pause(70);
  }
  await t.same(seen, [["n", 1, "c-1"]], "events");
  clock.skip(6000);
  await t.pause(100);
  t.equal([states.includes("polling"), source.state], [false, "open"], "states");
});

test("a server that was slow may answer a poll before the stream", async (t) => {
  const answer = {body: [open("c-0"), event("n", 1, "c-1")], polls: 1, after: 200, end: "hold", beat: 5000};
  const stream = await t.stream([answer], [{body: [open("c-0")]}]);
  const source = await t.open(stream.url), seen = t.record(source, "n"), states = t.states(source);
  await t.until(has(stream, "stream", 1), "the stream");
  clock.skip(5100);
  clock.stop(); // for the server, 200 ms may become seconds
  await t.until(has(stream, "poll", 1), "the poll");
  await t.same(seen, [["n", 1, "c-1"]], "events");
  clock.start();
  await t.pause(1200);
  t.equal([states.includes("polling"), source.state], [false, "open"], "states");
});

test("a server that answers polls with an error is not polled", async (t) => {
  const stream = await t.stream([{after: 500, body: [open("c-0")], end: "hold", beat: 5000}], [{status: 503}]);
  const source = await t.open(stream.url), states = t.states(source);
  await t.until(has(stream, "stream", 1), "the stream");
  clock.skip(5100);
  await t.until(() => source.state === "open", "it opens");
  await t.pause(100);
  t.equal(states.includes("polling"), false, "states");
});

test("a quiet stream that has begun is not held back", async (t) => {
  const stream = await t.stream([{body: [open("c-0", 1000)], end: "hold"}], [{body: [open("c-0")]}]);
  const source = await t.open(stream.url);
  await t.until(() => source.state === "open", "it opens");
  clock.skip(60_000);
  await t.pause(100);
  t.equal([source.state, await kinds(stream)], ["open", ["stream"]], "requests");
});

test("401 while it polls asks for a fresh URL", async (t) => {
  const stream = await t.stream([], [
    {body: [open("c-0")]}, {status: 401}, {body: [open("c-0"), event("n", 1, "c-1")]}, {after: null},
  ]);
  let calls = 0;
  const source = await t.open(stream.url, {poll: true, url: () => `${stream.url}?token=${++calls}`});
  await t.same(t.record(source, "n"), [["n", 1, "c-1"]], "events");
  t.equal(calls, 1, "calls");
});

test("a poll that is lost is asked again, with growing waits", async (t) => {
  const stream = await t.stream([], [
    {body: [open("c-0")]}, {status: 502}, {end: "reset"}, {body: [open("c-0"), event("n", 1, "c-1")], cut: open("c-0").length + 12},
    {body: [open("c-0"), batch("n", [1, 2], "c-1")]}, {after: null},
  ]);
  const source = await t.open(stream.url, {poll: true}), seen = t.record(source, "n"), errors = [];
  source.onerror = ({status}) => errors.push(status);
  await t.same(seen, [["n", 1, "c-1.1"], ["n", 2, "c-1"]], "events");
  t.equal(errors[0], 502, "errors");
});
