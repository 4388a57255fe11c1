// Servers and streams that say nothing, or nothing but comments; and a stream whose beginning is on its way.

import assert from "node:assert/strict";
import { begun, check } from "./checks.mjs";
import { World } from "./world.mjs";

export const cases = {
  async "a server that accepts and says nothing gets fewer and fewer requests"(script) {
    for (const hasWorkers of [false, true]) {
      const world = new World(script, { heartbeat: 1 });
      const { server } = world;
      const page = await world.open({ hasWorkers, poll: false });
      await world.run(3000);
      server.isSilent = true;
      server.cut();
      await world.run(300_000);
      const { length } = server.requests;
      assert.ok(length > 8 && length < 30, `${length} requests in five minutes`);
      const last = server.requests[length - 1].at - server.requests[length - 2].at;
      assert.ok(last > 10_000, `the last two within ${last} ms`);
      const isPending = page.source.state === "connecting"; // the last one
      assert.deepEqual(page.errors, Array(length - isPending).fill(0), "an error for each, and one for the cut");
    }
  },

  async "a stream that goes silent is one error"(script) {
    for (const hasWorkers of [false, true]) {
      const world = new World(script);
      const { server } = world;
      const page = await world.open({ hasWorkers });
      const messages = [];
      page.source.addEventListener("error", ({ message }) => messages.push(message));
      await world.run();
      const [stream] = server.streams;
      stream.write = () => {};
      await world.run(40_000);
      server.publish();
      await world.run();
      check(world, [page]);
      assert.deepEqual([page.errors, messages], [[0], ["the stream is silent"]]);
      assert.deepEqual(page.states, ["open", "waiting", "connecting", "open"]);
    }
  },

  async "pages whose streams go silent together come back one after the other"(script) {
    const world = new World(script, { spread: 3000 });
    const { server } = world;
    const pages = [];
    for (let i = 0; i < 30; i += 1) pages.push(await world.open({ hasWorkers: false }));
    await world.run(3000);
    const sent = server.requests.length;
    for (const stream of server.streams) stream.write = () => {};
    await world.run(40_000);
    const times = server.requests.slice(sent).map(({ at }) => at);
    assert.equal(times.length, 30);
    assert.ok(new Set(times).size > 20, `at ${times}`);
    assert.ok(Math.max(...times) - Math.min(...times) > 1500, `at ${times}`);
    server.publish();
    await world.run();
    check(world, pages, 30);
  },

  async "heartbeats and comments with an empty line do not pile up in the worker"(script) {
    const { world, server, page } = await begun(script);
    const [stream] = server.streams;
    let most = 0;
    world.onMessage = (message) => {
      if (message?.[0] === "frame") most = Math.max(most, message[1].length);
    };
    await world.run(3_600_000); // with 240 heartbeats
    for (let i = 0; i < 10; i += 1) stream.write(": a comment\n\nevent: n\n\n\n");
    await world.run();
    server.publish();
    await world.run();
    check(world, [page]);
    assert.equal(most, 1);
  },

  async "retry counts without data, too"(script) {
    const world = new World(script);
    const { server } = world;
    const page = await world.open({ hasWorkers: false });
    await world.run();
    for (const stream of server.streams) stream.write("retry: 20000\n\n");
    await world.run();
    const cut = world.now;
    server.cut();
    await world.run(30_000);
    assert.equal(server.requests.at(-1).at - cut, 20_000);
    server.publish();
    await world.run();
    check(world, [page]);
  },

  async "a long line takes no quadratic time"(script) {
    const world = new World(script);
    const page = await world.open({ hasWorkers: false });
    let length = 0;
    page.source.onText("long", (text) => (length += text.length));
    await world.run();
    const [stream] = world.server.streams;
    const before = process.cpuUsage();
    stream.write("event: long\ndata: ");
    for (let i = 0; i < 24 * 16; i += 1) stream.write("x".repeat(65_536)); // 24 MB
    stream.write("\n\n");
    await world.run();
    const { user, system } = process.cpuUsage(before);
    assert.equal(length, 24 * 16 * 65_536);
    // To search the whole line for each piece takes many seconds.
    assert.ok(user + system < 1_500_000, `${(user + system) / 1e6} s`);
  },

  async "a tab that joins in the middle of the first snapshot gets one sse_open"(script) {
    const world = new World(script, { snapshot: 4 });
    const { server } = world;
    server.publish();
    const open = server.fetch.bind(server);
    let goOn;
    const gate = new Promise((resolve) => (goOn = resolve));
    server.fetch = async (...values) => {
      const response = await open(...values);
      const reader = response.body.getReader();
      let reads = 0;
      const read = async () => {
        if ((reads += 1) === 3) await gate; // after sse_open and one block of the state
        return reader.read();
      };
      return { ...response, body: { ...response.body, getReader: () => ({ read }) } };
    };
    const pages = [await world.open()];
    await world.run(300);
    pages.push(await world.open());
    await world.run(300);
    goOn();
    await world.run(2000);
    server.publish();
    await world.run();
    check(world, pages);
    for (const page of pages) {
      assert.equal(page.own("sse_open").length, 1);
      assert.deepEqual(page.own("state").map(([, part]) => part), [0, 1, 2, 3]);
    }
  },
};
