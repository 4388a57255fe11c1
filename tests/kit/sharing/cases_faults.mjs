// What goes wrong between tabs, their worker and the server, one interleaving a case.

import assert from "node:assert/strict";
import { begun, check, limited, publish, streams } from "./checks.mjs";
import { World } from "./world.mjs";

const MOST_UNANSWERED = 1000;

export const cases = {
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
    const third = await world.open(); // polls, and gets sse_busy, too
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

  async "a 401 reaches all tabs, and one fresh URL is asked for, from a tab that is not frozen"(script) {
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
    assert.deepEqual(world.warnings, []);
  },

  async "two users share nothing"(script) {
    const world = new World(script);
    const pages = [];
    for (const user of [1, 2, 1]) pages.push(await world.open({ url: `/events?user=${user}`, share: `u${user}` }));
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

  async "what a tab got before it polled again does not come twice"(script) {
    // The worker leaves the tab out while the tab asks to join: the tab gets "missed" and "joined".
    for (let seed = 0; seed < 20; seed += 1) {
      const world = new World(limited(script, { MANY: 8 }), { seed, isRandom: true });
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
