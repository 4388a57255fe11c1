// How tabs with any cursor join the worker, one interleaving a case.

import assert from "node:assert/strict";
import { begun, check, numbers, polls, publish, streams } from "./checks.mjs";
import { World } from "./world.mjs";

const MOST_SHARED = 256;

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

  async "a tab that is ahead of the worker gets only the events that it does not have"(script) {
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

  async "a tab with a cursor of another history gets an sse_gap"(script) {
    const { world, server, page } = await begun(script);
    server.restart();
    await world.run(3000);
    const other = await world.open({ cursor: "e0-2" });
    await world.run(3000);
    server.publish();
    await world.run();
    check(world, [page, other]);
    const gaps = [page, other].map((page) => page.own("sse_gap").map(([, { reason }]) => reason));
    assert.deepEqual(gaps, [["epoch"], ["epoch"]]);
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
};
