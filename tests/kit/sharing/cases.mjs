// What can happen between tabs, their worker and the server, one interleaving a case.

import assert from "node:assert/strict";
import { World } from "./world.mjs";

const MOST_SHARED = 256;
const MOST_UNANSWERED = 1000;

/** Each page has all, once and in order, and one stream is open. */
function check(world, pages, streams = 1) {
  assert.deepEqual(pages.map((page) => page.fault()), pages.map(() => ""));
  assert.deepEqual(world.errors, []);
  assert.equal([...world.server.streams].filter(({ isPoll }) => !isPoll).length, streams);
  assert.ok(world.server.mostStreams <= Math.max(streams, 1), "never more streams than tabs need");
}

const polls = ({ server }) => server.requests.filter(({ poll }) => poll);
const streams = ({ server }) => server.requests.filter(({ poll }) => !poll);
const numbers = (first, last) => Array.from({ length: last - first + 1 }, (_, index) => first + index);

function publish(server, frames, events = 1) {
  for (let i = 0; i < frames; i += 1) server.publish(events);
}

/** A world in which a tab reads, and three frames have come. */
async function begun(script, options) {
  const world = new World(script, options);
  const page = await world.open();
  await world.run();
  publish(world.server, 3, 2);
  await world.run();
  return { world, server: world.server, page };
}

export const cases = {
  async "two tabs that begin together wait for one stream"(script) {
    const world = new World(script);
    const pages = [await world.open(), await world.open()];
    await world.run();
    world.server.publish(3);
    await world.run();
    check(world, pages);
    assert.deepEqual(pages.map((page) => page.own("sse_open").length), [1, 1]);
    assert.deepEqual([streams(world).length, polls(world).length], [1, 0]);
  },

  async "a tab that comes before the first frame waits until it is known what follows"(script) {
    const world = new World(script);
    publish(world.server, 5);
    world.server.isSilent = true;
    const pages = [];
    for (const cursor of ["e0-3", "e0-4", "e0-2", "", "e0-3"]) pages.push(await world.open({ cursor }));
    await world.run(1000);
    assert.deepEqual(polls(world), []);
    world.server.answer();
    await world.run(5000);
    world.server.publish();
    await world.run(5000);
    check(world, pages);
    assert.deepEqual(pages.map((page) => page.own("sse_open").length), [1, 1, 1, 1, 1]);
    assert.deepEqual(polls(world).map(({ cursor }) => cursor).sort(), ["", "e0-2"]);
  },

  async "a tab without a cursor polls for its beginning, and joins with that"(script) {
    const { world, server, page } = await begun(script);
    const other = await world.open();
    await world.run(2000);
    assert.equal(other.source.state, "open");
    assert.deepEqual(polls(world).map(({ cursor }) => cursor), [""]);
    server.publish(2);
    await world.run();
    check(world, [page, other]);
    assert.deepEqual(other.events, [7, 8]);
    assert.equal(other.own("sse_open").length, 1);
  },

  async "a tab whose cursor the worker has gets what follows, and asks the server nothing"(script) {
    const { world, server, page } = await begun(script);
    const other = await world.open({ cursor: "e0-1" });
    await world.run();
    server.publish();
    await world.run();
    check(world, [page, other]);
    assert.deepEqual(other.events, numbers(3, 7));
    assert.equal(other.own("sse_open").length, 1);
    assert.equal(server.requests.length, 1);
  },

  async "a tab with an older cursor than the worker's frames polls first"(script) {
    const { world, server, page } = await begun(script);
    publish(server, MOST_SHARED + 50);
    await world.run();
    const other = await world.open({ cursor: "e0-2" });
    await world.run(5000);
    server.publish();
    await world.run(50);
    check(world, [page, other]);
    assert.deepEqual(polls(world).map(({ cursor }) => cursor), ["e0-2"]);
    assert.equal(other.source.state, "open");
  },

  async "a tab that is ahead of the worker gets only what it has not"(script) {
    const { world, server, page } = await begun(script);
    const [worker] = [...world.workers.values()];
    worker.isFrozen = true;
    publish(server, 3, 2);
    const other = await world.open({ cursor: "e0-5" });
    await world.run();
    worker.isFrozen = false;
    await world.run();
    server.publish();
    await world.run();
    check(world, [page, other]);
    assert.deepEqual(other.events, [11, 12, 13]);
    assert.deepEqual(polls(world), []);
  },

  async "a tab with a cursor of another history is told so"(script) {
    const { world, server, page } = await begun(script);
    server.restart();
    await world.run(3000);
    const other = await world.open({ cursor: "e0-2" });
    await world.run(3000);
    server.publish();
    await world.run();
    check(world, [page, other]);
    assert.deepEqual([page, other].map((page) => page.own("sse_gap").map(([, { reason }]) => reason)), [["epoch"], ["epoch"]]);
  },

  async "a tab in the middle of a batch gets the rest of it by a poll"(script) {
    const { world, server, page } = await begun(script);
    const other = await world.open({ cursor: "e0-2.1" });
    await world.run(2000);
    server.publish();
    await world.run();
    check(world, [page, other]);
    assert.deepEqual(other.events, [4, 5, 6, 7]);
    assert.equal(polls(world)[0].cursor, "e0-2.1");
  },

  async "the first tab may be in the middle of a batch, too"(script) {
    const world = new World(script);
    publish(world.server, 3, 3);
    const pages = [await world.open({ cursor: "e0-2.1" }), await world.open({ cursor: "e0-2" })];
    await world.run(2000);
    world.server.publish(2);
    await world.run(4000);
    check(world, pages);
  },

  async "parts of a batch belong to it if the URL asks for no batches"(script) {
    const world = new World(script);
    const url = "/events?batch=0";
    const pages = [await world.open({ url })];
    await world.run();
    const worker = world.worker();
    worker.isFrozen = true;
    publish(world.server, 2, 3);
    pages.push(await world.open({ url, cursor: "e0-1" }));
    worker.isFrozen = false;
    await world.run();
    pages.push(await world.open({ url, cursor: "e0-1" }), await world.open({ url, cursor: "e0-1.2" }));
    await world.run(3000);
    check(world, pages);
    assert.deepEqual(pages.map(({ events }) => events.length), [6, 3, 3, 4]);
  },

  async "the blocks of a state come all or not at all"(script) {
    const world = new World(script, { snapshot: 4 });
    publish(world.server, 2);
    world.isRandom = true; // cuts the stream into pieces
    const pages = [await world.open(), await world.open()];
    for (let i = 0; i < 12; i += 1) await world.run(2);
    const [stream] = world.server.streams;
    stream.fail();
    pages.push(await world.open());
    await world.run(5000);
    world.isRandom = false;
    world.server.publish();
    await world.run(5000);
    check(world, pages);
    for (const page of pages) assert.deepEqual(page.own("state").map(([, part]) => part), [0, 1, 2, 3]);
  },

  async "a state that is cut after some blocks is forgotten"(script) {
    const world = new World(script, { snapshot: 4 });
    let left = 3; // blocks until the first stream is cut
    const { server } = world;
    const open = server.fetch.bind(server);
    server.fetch = async (...values) => {
      const response = await open(...values);
      const reader = response.body.getReader();
      const read = () => {
        if ((left -= 1) === -1) server.cut();
        return reader.read();
      };
      return { ...response, body: { ...response.body, getReader: () => ({ read }) } };
    };
    const pages = [await world.open(), await world.open()];
    await world.run(500);
    assert.deepEqual(pages.map(({ log }) => log), [[], []]);
    pages.push(await world.open());
    await world.run(5000);
    server.publish();
    await world.run();
    check(world, pages);
    for (const page of pages) assert.deepEqual(page.own("state").map(([, part]) => part), [0, 1, 2, 3]);
  },

  async "a gap reaches all tabs, also in the middle of a stream"(script) {
    const { world, server, page } = await begun(script);
    const other = await world.open({ cursor: "e0-3" });
    await world.run();
    server.lose();
    server.publish();
    await world.run();
    server.forget();
    server.cut();
    publish(server, 3);
    server.forget();
    await world.run(5000);
    server.publish();
    const third = await world.open({ cursor: "e0-3" });
    await world.run(5000);
    check(world, [page, other, third]);
    for (const { log } of [page, other]) {
      const gaps = log.filter((entry) => entry[0] === "sse_gap");
      assert.deepEqual(gaps.map(([, { reason }]) => reason), ["publish_failed", "too_old"]);
    }
  },

  async "a quiet channel: the worker reads again from an older cursor, and others get nothing twice"(script) {
    const world = new World(script);
    const { server } = world;
    server.publish();
    server.publishElsewhere(5);
    const pages = [await world.open(), await world.open({ cursor: "e0-6" })];
    await world.run();
    pages.push(await world.open({ cursor: "e0-2" }), await world.open({ cursor: "e0-4" }));
    await world.run(1000);
    server.publishElsewhere(3);
    await world.run(6000);
    assert.deepEqual(pages.map(({ source }) => source.state), ["open", "open", "open", "open"]);
    assert.equal(server.streams.size, 1);
    server.publish(3);
    await world.run();
    check(world, pages);
    for (const page of pages) assert.equal(page.own("sse_open").length, 1);
  },

  async "events that come while the worker reads again reach each tab once"(script) {
    for (let at = 0; at < 20; at += 1) {
      const world = new World(script, { seed: at, isRandom: true });
      const { server } = world;
      server.publishElsewhere(5);
      const pages = [await world.open()];
      await world.run();
      pages.push(await world.open({ cursor: "e0-2" }), await world.open({ cursor: "e0-2" }));
      await world.run(1500);
      for (let i = 0; i < 100; i += 1) {
        if (world.choose() < 0.1) server.publish(1 + Math.floor(2 * world.choose()));
        await world.run(50);
      }
      await world.run(40_000);
      check(world, pages);
    }
  },

  async "the worker reads again only once for a tab that then has a gap"(script) {
    const world = new World(script);
    const { server } = world;
    server.publishElsewhere(5);
    const page = await world.open();
    await world.run();
    const other = await world.open({ cursor: "e0-2" });
    await world.run(1000);
    // Between its poll and the stream of the worker: what follows its cursor is gone.
    const open = server.fetch.bind(server);
    server.fetch = (...values) => {
      if (streams(world).length === 1 && !values[1].searchParams.has("poll")) server.lose();
      return open(...values);
    };
    await world.run(8000);
    assert.equal(streams(world).length, 2);
    server.publish();
    await world.run(3000);
    check(world, [page, other]);
    assert.equal(other.own("sse_gap").length, 1);
  },

  async "a worker that polls reads again, too"(script) {
    const world = new World(script);
    const { server } = world;
    server.publishElsewhere(5);
    const page = await world.open({ poll: true });
    await world.run(1000);
    const other = await world.open({ poll: true, cursor: "e0-2" });
    await world.run(8000);
    const sent = server.requests.length;
    publish(server, 3);
    await world.run(3000);
    assert.ok(server.requests.length < sent + 12, `${server.requests.length - sent} polls for 3 events`);
    assert.deepEqual(other.events, [1, 2, 3]);
    check(world, [page, other], 0);
    assert.deepEqual([page, other].map(({ source }) => source.state), ["polling", "polling"]);
  },

  async "sse_busy reaches joined tabs, and moves no cursor"(script) {
    const { world, server, page } = await begun(script);
    const worker = world.worker();
    worker.isFrozen = true;
    publish(server, 2);
    const other = await world.open({ cursor: "e0-5" }); // ahead of the worker
    await world.run();
    server.busy = true;
    server.cut();
    worker.isFrozen = false;
    const third = await world.open(); // polls, and is told the same
    await world.run(2500);
    assert.ok(page.own("sse_busy").length > 0 && other.own("sse_busy").length > 0);
    server.busy = false;
    worker.kill();
    await world.run(20_000);
    server.publish();
    await world.run(5000);
    check(world, [page, other, third]);
    assert.deepEqual(other.events, [9]);
  },

  async "a 401 reaches all tabs, and one fresh URL is asked for, from the tab that was heard last"(script) {
    const world = new World(script);
    const { server } = world;
    const asked = [];
    let token = 1;
    server.accepts = (address) => address.searchParams.get("token") === `${token}`;
    const open = (name) => {
      const url = async () => `/events?token=${asked.push(name) && token}`;
      return world.open({ url: "/events?token=1", cursor: "e0-0", renew: url });
    };
    const pages = [await open("a"), await open("b"), await open("c")];
    await world.run(3000);
    pages[2].freeze();
    await world.run(3000);
    token = 2;
    server.cut();
    server.publish();
    await world.run(1200); // the server's retry, and no wait after that
    assert.equal(pages[0].source.state, "open");
    pages[2].thaw();
    await world.run(3000);
    check(world, pages);
    for (const { errors } of pages) assert.ok(errors.includes(401));
    assert.equal(asked.length, 1);
    assert.notEqual(asked[0], "c");
  },

  async "a tab that does not answer is left out, and joins again when it answers"(script) {
    const { world, server, page } = await begun(script);
    const other = await world.open({ cursor: "e0-3" });
    await world.run();
    other.freeze();
    for (let i = 0; i < MOST_UNANSWERED + 400; i += 50) {
      publish(server, 50);
      await world.run(20);
    }
    assert.equal(other.realm.ways.toTab.size, MOST_UNANSWERED + 1);
    other.thaw();
    await world.run(10_000);
    server.publish();
    await world.run();
    check(world, [page, other]);
    assert.equal(other.source.state, "open");
    assert.equal(world.server.requests.filter(({ poll }) => !poll).length, 1);
  },

  async "a tab whose functions are slow makes no storm of messages or requests"(script) {
    const world = new World(script);
    const { server } = world;
    const page = await world.open();
    await world.run();
    // Each event takes 30 ms of the page's time.
    page.source.on("n", () => (world.now += 30));
    for (let i = 0; i < 60; i += 1) {
      publish(server, 50);
      await world.run(10);
    }
    await world.run(300_000);
    check(world, [page]);
    assert.ok(server.requests.length < 100, `${server.requests.length} requests`);
    assert.ok(world.posted < 40_000, `${world.posted} messages`);
  },

  async "the last tab says goodbye and the stream ends; another comes"(script) {
    const { world, server, page } = await begun(script);
    const other = await world.open({ cursor: "e0-3" });
    await world.run();
    page.close();
    await world.run();
    assert.equal(server.streams.size, 1);
    other.source.close();
    await world.run();
    assert.equal(server.streams.size, 0);
    publish(server, 2);
    const third = await world.open({ cursor: "e0-3" });
    const fourth = await world.open({ cursor: "e0-4" });
    await world.run(3000);
    server.publish();
    await world.run();
    check(world, [third, fourth]);
    third.source.close();
    fourth.source.close();
    await world.run();
    const fifth = await world.open();
    await world.run();
    server.publish();
    await world.run();
    check(world, [fifth]);
    assert.deepEqual([third, fourth, fifth].map((page) => page.own("sse_open").length), [1, 1, 1]);
  },

  async "the worker dies, and the tabs make another and go on from their cursors"(script) {
    const { world, server, page } = await begun(script);
    const other = await world.open({ cursor: "e0-2" });
    await world.run();
    world.worker().kill();
    publish(server, 5, 2);
    await world.run(10_000);
    server.publish();
    await world.run();
    check(world, [page, other]);
    assert.deepEqual(world.warnings, []);
    assert.equal(streams(world).length, 2);
  },

  async "a worker that hangs: each tab reads alone after three tries"(script) {
    const { world, server, page } = await begun(script);
    const other = await world.open({ cursor: "e0-2" });
    await world.run();
    world.worker().isFrozen = true;
    server.publish();
    await world.run(30_000);
    server.publish();
    await world.run(5000);
    assert.deepEqual([page, other].map((page) => page.fault()), ["", ""]);
    assert.deepEqual(world.warnings.map((text) => /no answer/.test(text)), [true, true]);
  },

  async "without its script each tab reads alone, and tries again when the site is back"(script) {
    const world = new World(script);
    world.canLoad = false;
    world.server.isUp = false;
    const pages = [await world.open(), await world.open({ cursor: "e0-0" })];
    await world.run(5000);
    assert.equal(world.warnings.length, 2);
    world.canLoad = world.server.isUp = true;
    await world.run(40_000);
    world.server.publish();
    await world.run(5000);
    check({ ...world, server: Object.assign(world.server, { mostStreams: 1 }) }, pages);
    assert.equal(world.warnings.length, 2);
  },

  async "a script that never loads is tried three times"(script) {
    const world = new World(script);
    world.canLoad = false;
    const page = await world.open();
    await world.run(60_000);
    world.server.publish();
    await world.run();
    check(world, [page]);
    assert.equal(world.warnings.length, 3);
  },

  async "without SharedWorker each tab reads for itself"(script) {
    const world = new World(script);
    const pages = [await world.open({ hasWorkers: false }), await world.open({ hasWorkers: false })];
    await world.run();
    world.server.publish();
    await world.run();
    check(world, pages, 2);
  },

  async "two users share nothing"(script) {
    const world = new World(script);
    const options = { url: "/events?user=1", share: "u1" };
    const pages = [await world.open(options), await world.open({ url: "/events?user=2", share: "u2" }), await world.open(options)];
    await world.run(2000);
    world.server.publish();
    await world.run();
    check(world, pages, 2);
    assert.equal(world.workers.size, 2);
  },

  async "tabs whose URLs differ by their token alone share a stream"(script) {
    const world = new World(script);
    const pages = [await world.open({ url: "/events?token=a" }), await world.open({ url: "/events?token=b" })];
    await world.run();
    world.server.publish();
    await world.run();
    check(world, pages);
  },

  async "a tab cannot have the worker read again in the middle of a batch"(script) {
    const world = new World(script);
    const { server } = world;
    const url = "/events?batch=0";
    server.publishElsewhere(5);
    const page = await world.open({ url });
    await world.run();
    const other = await world.open({ url, cursor: "e0-2" });
    await world.run(1000);
    other.realm.ways.toWorker.isStarted = false; // what it says comes later than the first part of a batch
    await world.run(4000);
    const [stream] = server.streams;
    const { write } = stream;
    stream.write = (text) => write.call(stream, text.slice(0, text.indexOf("\n\n") + 2));
    server.publish(3);
    await world.run();
    assert.deepEqual(page.events, [1]);
    other.realm.ways.toWorker.isStarted = true;
    await world.run();
    server.cut();
    await world.run(5000);
    server.publish();
    await world.run();
    check(world, [page, other]);
  },

  async "an answer to an older question is not taken for the newest"(script) {
    const world = new World(script);
    const { server } = world;
    const joins = [];
    let port;
    const meet = (end) => {
      port = end;
      port.onmessage = ({ data: [kind, value] }) => kind === "join" && joins.push(value.cursor);
    };
    const say = async (kind, value) => {
      port.postMessage([kind, value]);
      await world.run();
    };
    const block = (number) => ({ type: "n", data: `${number}`, id: `e0-${number}` });
    const page = await world.open({ cursor: "e0-0", meet });
    await world.run();
    await say("missed");
    server.publish();
    await world.run(1000); // by a poll
    assert.deepEqual(joins, ["e0-0", "e0-1"]);
    await say("missed"); // of a worker that has left it out
    server.publish();
    await world.run(1000); // by a poll again
    assert.deepEqual(joins, ["e0-0", "e0-1", "e0-2"]);
    await say("joined", { cursor: "e0-1", state: "open", data: "{}" });
    await say("frame", [block(2)]);
    assert.deepEqual(page.events, [1, 2]);
    await world.run(1000);
    assert.deepEqual(joins.slice(3), [], "it polls, and waits for the answer to its last question");
    await say("joined", { cursor: "e0-2", state: "open", data: "{}" });
    server.publish();
    await say("frame", [block(3)]);
    assert.equal(page.fault(), "");
    assert.equal(page.source.state, "open");
  },

  async "what a tab was told before it polled on does not come twice"(script) {
    // The worker leaves the tab out while the tab asks to join: the tab is told both.
    for (let seed = 0; seed < 20; seed += 1) {
      const world = new World(script.replace("MANY = 1000", "MANY = 8"), { seed, isRandom: true });
      const { server } = world;
      const pages = [await world.open(), await world.open()];
      for (let i = 0; i < 150; i += 1) {
        if (world.choose() < 0.4) server.publish();
        if (world.choose() < 0.05) pages[1].realm.isFrozen = !pages[1].realm.isFrozen;
        await world.run(40);
      }
      pages[1].thaw();
      await world.run(60_000);
      check(world, pages);
    }
  },
};
