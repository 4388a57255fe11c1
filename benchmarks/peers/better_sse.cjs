// better-sse, with its batch(): events are joined 50 at a time into one write a client. node better_sse.cjs PORT
"use strict";
const { createEventBuffer, createSession } = require("better-sse");
const http = require("node:http");
const { setImmediate, setTimeout } = require("node:timers/promises");

const BATCH = 50;
const PAD = "x".repeat(130);
const sessions = new Set();

// A nanosecond count has more digits than a number of JavaScript keeps, so it is put into the JSON by hand.
const event = (n) => `{"n":${n},"t":${process.hrtime.bigint()},"text":"${PAD}"}`;

async function publish(query) {
  const [first, n, bursts, every] = ["first", "n", "bursts", "every"].map((name) => Number(query.get(name)));
  const began = performance.now();
  const took = [];
  for (let burst = 0; burst < bursts; burst++) {
    await setTimeout(Math.max(0, began + burst * every * 1000 - performance.now()));
    let inCalls = 0;
    for (let start = 0; start < n; start += BATCH) {
      const before = performance.now();
      const buffer = createEventBuffer({ serializer: (data) => data });
      for (let i = start; i < Math.min(start + BATCH, n); i++) buffer.push(event(first + burst * n + i), "tick");
      for (const session of sessions) session.batch(buffer);
      inCalls += performance.now() - before;
      await setImmediate();
    }
    took.push(inCalls * 1000);
  }
  took.sort((a, b) => a - b);
  return JSON.stringify({ took_us: took[took.length >> 1] });
}

http
  .createServer(async (request, response) => {
    const url = new URL(request.url, "http://localhost");
    if (url.pathname === "/events") {
      const session = await createSession(request, response);
      sessions.add(session);
      session.once("disconnected", () => sessions.delete(session));
    } else if (url.pathname === "/publish") {
      response.end(await publish(url.searchParams));
    } else {
      response.end("pong");
    }
  })
  .listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: 4096 });
