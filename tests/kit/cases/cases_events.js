// What arrives is what the page gets: blocks, batches, types, and whatever their contents.
import {batch, block, event, gap, open} from "/context.js";
import {test} from "/registry.js";

const held = (...body) => [{body, end: "hold", beat: 5000}];

// Listens in each way for these types. Each entry is [way, type, value, id].
const listen = (source, ...types) => {
  const seen = [];
  for (const type of types) {
    source.on(type, (data, info) => seen.push(["on", info.type, data, info.id]));
    source.addEventListener(type, (event) => seen.push(["listener", event.type, event.data, event.lastEventId]));
  }
  return seen;
};

test("every block that the server writes", async (t) => {
  for (const sample of await (await fetch("/samples.json")).json()) {
    const source = await t.open((await t.stream(held(sample.text))).url);
    const seen = [];
    for (const type of new Set(sample.events.map((each) => each.type))) {
      const isText = sample.events.some((each) => each.type === type && "text" in each);
      if (isText) source.onText(type, (value, info) => seen.push({type, text: value, id: info.id}));
      else source.on(type, (data, info) => seen.push({type, data, id: info.id}));
    }
    await t.same(seen, sample.events, sample.name, 1);
    source.close();
  }
});

test("a batch is unpacked in order, with the id of each event", async (t) => {
  const {url} = await t.stream(held(open("c-0"), batch("n", [1, 2, 3], "c-1"), event("n", 4, "c-2"), batch("n", [5], "c-3")));
  const seen = listen(await t.open(url), "n");
  const expected = [[1, "c-1.1"], [2, "c-1.2"], [3, "c-1"], [4, "c-2"], [5, "c-3"]];
  await t.same(seen, expected.flatMap(([n, id]) => [["on", "n", n, id], ["listener", "n", String(n), id]]), "events");
});

test("onBatch is called once for each frame", async (t) => {
  const {url} = await t.stream(held(
    open("c-0"), batch("n", [1, 2, 3], "c-1"), event("n", 4, "c-2"), batch("other", [0, 0], "c-3"), batch("n", [5, 6], "c-4"),
  ));
  const source = await t.open(url), seen = [];
  source.onBatch("n", (list, {type, id}) => seen.push([list, type, id]));
  await t.same(seen, [[[1, 2, 3], "n", "c-1"], [[4], "n", "c-2"], [[5, 6], "n", "c-4"]], "frames");
});

test("a mixed batch has events of several types, in order", async (t) => {
  const mixed = [
    {type: "a", data: 1}, {type: "b", text: "<b>\ntwo"}, {type: "a", data: "3"}, {type: "message", data: {n: 4}},
  ];
  const {url} = await t.stream(held(open("c-0"), batch("mixed", mixed, "c-1")));
  const source = await t.open(url), seen = [];
  source.onBatch("a", (list, {id}) => seen.push(["frame", list, id]));
  for (const type of ["a", "message"]) source.on(type, (data, info) => seen.push([info.type, data, info.id]));
  source.onText("b", (value, info) => seen.push([info.type, value, info.id]));
  source.addEventListener("b", (event) => seen.push(["listener", event.data, event.lastEventId]));
  source.onmessage = (event) => seen.push(["onmessage", event.data, event.lastEventId]);
  await t.until(() => seen.length >= 7, "all");
  const frames = seen.filter(([way]) => way === "frame");
  t.equal(frames.map(([, list]) => list), [[1, "3"]], "one call for the frame");
  const others = seen.filter(([way]) => way !== "frame" && way !== "listener" && way !== "onmessage");
  t.equal(
    others, [["a", 1, "c-1.1"], ["b", "<b>\ntwo", "c-1.2"], ["a", "3", "c-1.3"], ["message", {n: 4}, "c-1"]], "events",
  );
  t.equal(seen.filter(([way]) => way === "listener"), [["listener", "<b>\ntwo", "c-1.2"]], "a text for a listener");
  t.equal(seen.filter(([way]) => way === "onmessage"), [["onmessage", '{"n":4}', "c-1"]], "a message for onmessage");
});

test("onmessage gets the type message alone", async (t) => {
  const {url} = await t.stream(held(
    open("c-0"), block("message", "plain\ntext", "c-1"), batch("message", [1, "two"], "c-2"), event("n", 3, "c-3"),
  ));
  const source = await t.open(url), seen = [], texts = [];
  source.onmessage = (event) => seen.push([event.data, event.lastEventId]);
  source.onText("message", (text, {id}) => texts.push([text, id]));
  const expected = [["plain\ntext", "c-1"], ["1", "c-2.1"], ['"two"', "c-2"]];
  await t.same(seen, expected, "onmessage");
  t.equal(texts, expected, "onText");
});

test("each way to listen can be stopped", async (t) => {
  const stream = await t.stream(held(open("c-0"), event("n", 1, "c-1")));
  const source = await t.open(stream.url), seen = [];
  const listener = (event) => seen.push(["listener", event.data]);
  const stops = [
    source.on("n", (data) => seen.push(["on", data])),
    source.onText("n", (data) => seen.push(["onText", data])),
    source.onBatch("n", (data) => seen.push(["onBatch", data])),
  ];
  source.addEventListener("n", listener);
  source.addEventListener("n", (event) => seen.push(["once", event.data]), {once: true});
  source.addEventListener("n", {handleEvent: (event) => seen.push(["object", event.data])});
  await t.until(() => seen.length === 6, "the first event in each way");
  stops.forEach((stop) => stop());
  source.removeEventListener("n", listener);
  await stream.say(event("n", 2, "c-2"));
  await t.until(() => seen.length > 6, "the second event");
  await t.pause(50);
  t.equal(seen.slice(6), [["object", "2"]], "after the stop");
});

test("the connection's event types can be types of the app", async (t) => {
  const types = ["error", "open", "statechange"];
  const stream = await t.stream(held(open("c-0"), ...types.map((type) => batch(type, [type, 2], `c-${type}`))));
  const source = await t.open(stream.url);
  const connection = [], seen = t.record(source, ...types);
  for (const type of types) source.addEventListener(type, (event) => connection.push([type, event instanceof MessageEvent]));
  source.onerror = () => connection.push(["onerror", false]);
  source.onopen = (event) => connection.push(["onopen", event instanceof MessageEvent]);
  await t.same(seen, types.flatMap((type) => [[type, type, `c-${type}.1`], [type, 2, `c-${type}`]]), "events of the app");
  t.ok(connection.every(([type, isMessage]) => !isMessage && type !== "error" && type !== "onerror"), "no event of the app");
  t.equal(connection.filter(([type]) => type === "onopen").length, 1, "onopen");
});

test("sse_gap and sse_open are events too", async (t) => {
  const {url} = await t.stream(held(gap("c-7"), event("n", 1, "c-8"), gap("c-9", "overflow")));
  const seen = t.record(await t.open(url, {cursor: "c-1"}), "sse_open", "sse_gap", "n");
  await t.until(() => seen.length >= 3, "all");
  t.equal(seen.map(([type, data, id]) => [type, data.reason, id]), [
    ["sse_gap", "too_old", "c-7"], ["n", undefined, "c-8"], ["sse_gap", "overflow", "c-9"],
  ], "events");
});

test("bytes that come one by one", async (t) => {
  const body = [open("c-0"), batch("n", ["ä€𝄞", "\u2028"], "c-1"), ":\n", block("text", "a\n\n ü\n", "c-2"), event("n", 9, "c-3")];
  const {url} = await t.stream([{body, slice: 1, end: "hold"}]);
  const source = await t.open(url), seen = t.record(source, "n");
  source.onText("text", (text, {type, id}) => seen.push([type, text, id]));
  await t.same(seen, [["n", "ä€𝄞", "c-1.1"], ["n", "\u2028", "c-1"], ["text", "a\n\n ü\n", "c-2"], ["n", 9, "c-3"]], "events");
});

test("line ends, a byte order mark, comments and unknown fields, as the standard says", async (t) => {
  const body = ": comment\r\nevent: n\r\ndata:1\r\nid: c-1\r\n\r\nfoo: bar\ndata\nevent:n\n\n\n\nevent: n\nid: c-2\n\n"
    + "event: n\ndata: z\nid: x\0y\n\nevent: n\ndata:  \ndata: 2\nid: c-3\n\n";
  for (const slice of [1, 1000]) {
    const first = `\ufeff${open("c-0").replaceAll("\n", "\r\n")}`;
    const {url} = await t.stream([{body: [first, body], slice, end: "hold"}]);
    const source = await t.open(url), seen = [];
    source.onText("n", (text, {id}) => seen.push([text, id]));
    await t.until(() => seen.at(-1)?.[1] === "c-3", "the last");
    const expected = [["1", "c-1"], ["", "c-1"], ["z", "c-2"], [" \n2", "c-3"]];
    t.equal(seen, expected, `in slices of ${slice}`);
    source.close();
  }
});

test("hostile contents", async (t) => {
  const html = "<img src=x onerror='parent.hacked = window.hacked = 1'><script>window.hacked = 1</script>";
  const values = [
    html, "</script>", "\u2028\u2029", "data: forged\n\nevent: n", "\0", 1e308, -0, 12345678901234567890, [], {}, null,
    {constructor: {prototype: {polluted: 1}}}, "x".repeat(100_000), "\ud83d", [[[[[]]]]],
  ];
  const raw = '{"__proto__":{"polluted":1},"events":[1],"type":"n"}';
  const blocks = [
    batch("n", values, "c-1"),
    block("n", raw, "c-2"),
    block("n_batch", `{"type":"n_batch","batchSize":2,"events":[${raw},1e400],"reason":"manual","timestamp":1}`, "c-3"),
  ];
  const {url} = await t.stream(held(open("c-0"), ...blocks));
  const seen = t.record(await t.open(url), "n");
  await t.until(() => seen.length >= values.length + 3, "all");
  t.equal(seen.slice(0, values.length).map(([, data]) => data), JSON.parse(JSON.stringify(values)), "the values");
  t.equal(seen.slice(values.length).map(([, data]) => typeof data), ["object", "object", "number"], "the raw ones");
  t.ok(Object.hasOwn(seen[values.length][1], "__proto__"), "__proto__ is a key like others");
  t.equal([({}).polluted, window.hacked, [].polluted], [undefined, undefined, undefined], "nothing is polluted");
});

test("types with the names of properties", async (t) => {
  const types = ["constructor", "__proto__", "toString", "hasOwnProperty", "close", "on", "onmessage", "prototype", "ä b", "0"];
  const mixed = types.map((type) => ({type, data: type}));
  const blocks = types.flatMap((type, k) => [event(type, 1, `c-${k}`), batch(type, [2, 3], `d-${k}`)]);
  const {url} = await t.stream(held(open("c-0"), ...blocks, batch("mixed", mixed, "e"), event("last", 1, "f")));
  const source = await t.open(url), last = t.record(source, "last");
  await t.until(() => last.length, "the last; the others have no handlers");
  const again = await t.open(url), seen = t.record(again, ...types);
  await t.same(seen, [
    ...types.flatMap((type, k) => [[type, 1, `c-${k}`], [type, 2, `d-${k}.1`], [type, 3, `d-${k}`]]),
    ...types.map((type, k) => [type, type, k === types.length - 1 ? "e" : `e.${k + 1}`]),
  ], "events");
});

test("a batch of another shape does not stop the stream", async (t) => {
  t.expectsErrors = true;
  const bad = ["{", "1", "null", '{"events":1}', '{"type":"n_batch"}', '[{"type":"n"}]', '{"events":[null,{"type":1}]}'];
  const blocks = bad.flatMap((data, k) => [block("n_batch", data, `c-${k}`), block("mixed_batch", data, `d-${k}`)]);
  const stream = await t.stream(held(open("c-0"), ...blocks, block("n", "{", "e"), event("last", 1, "f")));
  const source = await t.open(stream.url), seen = t.record(source, "n", "last");
  await t.until(() => seen.some(([type]) => type === "last"), "the event behind");
  t.equal([(await stream.requests()).length, source.state], [1, "open"], "the same connection");
});

test("a handler that fails does not stop the others", async (t) => {
  t.expectsErrors = true;
  const errors = [];
  addEventListener("error", (event) => errors.push(event.error?.message));
  addEventListener("unhandledrejection", (event) => errors.push(event.reason?.message));
  const {url} = await t.stream(held(open("c-0"), batch("n", [1, 2], "c-1"), event("n", 3, "c-2")));
  const source = await t.open(url);
  source.on("n", (data) => { throw new Error(`fails ${data}`); });
  source.onBatch("n", () => { throw new Error("fails"); });
  source.addEventListener("n", () => { throw new Error("fails"); });
  const seen = t.record(source, "n");
  await t.same(seen, [["n", 1, "c-1.1"], ["n", 2, "c-1"], ["n", 3, "c-2"]], "events");
  await t.until(() => errors.includes("fails 1") && errors.includes("fails 3"), `the errors are reported: ${errors}`);
});

test("handlers that come and go while a batch is dispatched", async (t) => {
  const {url} = await t.stream(held(open("c-0"), batch("n", [1, 2, 3, 4], "c-1")));
  const source = await t.open(url), first = [], second = [];
  const stop = source.on("n", (data) => {
    first.push(data);
    if (data === 2) {
      stop();
      source.on("n", (each) => second.push(each));
    }
  });
  await t.until(() => second.includes(4), "the last");
  t.equal([first, second.filter((n) => n > 2)], [[1, 2], [3, 4]], "each from then on");
});
