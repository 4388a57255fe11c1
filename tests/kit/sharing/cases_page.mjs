// What a page brings along: its options, its functions, and close() in a listener.

import assert from "node:assert/strict";
import { begun, check, polls, publish, streams } from "./checks.mjs";
import { World } from "./world.mjs";

const SLOW_MS = 25_000; // but not too slow
const NO_ANSWER_MS = 30_000;
const never = () => new Promise(() => {});

/** Nothing of the page happens any more. */
async function checkClosed(world, page) {
  const sent = world.server.requests.length;
  publish(world.server, 3);
  await world.run(120_000);
  assert.equal(page.source.state, "closed");
  assert.equal(world.server.requests.length, sent, "requests");
  assert.equal(page.realm.timers.size, 0, "timers");
}

function closeAt(page, ...states) {
  const { source } = page;
  source.addEventListener("statechange", () => states.includes(source.state) && source.close());
}

export const cases = {
  async "a worker by a URL object, and a list that cannot be cloned, are shared"(script) {
    for (const name of ["worker", "channels"]) {
      const world = new World(script);
      const value = name === "worker" ? new URL(world.scriptUrl) : new Proxy(["default"], {});
      const pages = [await world.open({ [name]: value }), await world.open({ [name]: value })];
      await world.run();
      world.server.publish();
      await world.run();
      check(world, pages);
      assert.deepEqual(world.warnings, []);
    }
  },

  async "close() in a statechange after pageshow"(script) {
    for (const hasWorkers of [false, true]) {
      const world = new World(script);
      const page = await world.open({ hasWorkers });
      await world.run();
      page.dispatch("pagehide");
      await world.run(1000);
      closeAt(page, "connecting");
      page.dispatch("pageshow");
      await world.run(); // one request may be on its way
      assert.equal(world.server.streams.size, 0);
      await checkClosed(world, page);
    }
  },

  async "close() in a statechange of a shared tab that was left out"(script) {
    let port;
    const world = new World(script);
    const page = await world.open({ cursor: "e0-0", meet: (end) => (port = end) });
    port.onmessage = () => {};
    await world.run();
    port.postMessage(["joined", { cursor: "e0-0", state: "open", data: "{}" }]);
    await world.run();
    closeAt(page, "connecting");
    port.postMessage(["missed"]);
    await world.run(0);
    await checkClosed(world, page);
    assert.deepEqual(world.server.requests, []);
  },

  async "close() in a statechange of each kind"(script) {
    for (const hasWorkers of [false, true]) {
      for (const state of ["open", "waiting", "connecting"]) {
        const world = new World(script);
        const page = await world.open({ hasWorkers });
        if (state === "open") closeAt(page, state);
        await world.run();
        closeAt(page, state);
        world.server.cut();
        await world.run(3000);
        await checkClosed(world, page);
      }
    }
  },

  async "close() in a statechange when streams are tried again"(script) {
    const world = new World(script);
    const { server } = world;
    const open = server.fetch.bind(server);
    server.fetch = (...values) => {
      server.isSilent = !values[1].searchParams.has("poll"); // something holds streams back
      return open(...values);
    };
    const page = await world.open({ hasWorkers: false });
    await world.run(30_000);
    assert.equal(page.source.state, "polling");
    const [{ at }] = polls(world);
    let after = 0; // requests of the page that is closed
    server.fetch = async (realm, address, { signal }) => {
      if (page.source.state === "closed" && !signal.aborted) after += 1;
      throw new TypeError("down");
    };
    await world.run(240_000);
    page.source.addEventListener("statechange", () => {
      if (page.source.state === "connecting" && world.now > at + 300_000) page.source.close();
    });
    await world.run(70_000);
    await checkClosed(world, page);
    assert.equal(after, 0);
  },

  async "url() may take its time, and is called once"(script) {
    for (const isShared of [false, true]) {
      const world = new World(script);
      const { server } = world;
      let calls = 0;
      server.accepts = (address) => address.searchParams.get("token") === "2";
      const renew = async () => {
        calls += 1;
        await world.pause(SLOW_MS);
        return "/events?token=2";
      };
      const page = await world.open({ url: "/events?token=1", renew, hasWorkers: isShared });
      await world.run(SLOW_MS + 2000);
      server.publish();
      await world.run(60_000);
      check(world, [page]);
      assert.deepEqual([calls, page.errors, server.requests.length], [1, [401], 2]);
      server.cut();
      await world.run(5000);
      check(world, [page]);
      assert.equal(calls, 1, "calls after the stream was lost");
    }
  },

  async "headers() may take its time, and is called once"(script) {
    for (const isShared of [false, true]) {
      const world = new World(script);
      let calls = 0;
      const headers = async () => {
        calls += 1;
        await world.pause(SLOW_MS);
        return {};
      };
      const page = await world.open({ headers, hasWorkers: isShared });
      await world.run(SLOW_MS + 2000);
      world.server.publish();
      await world.run(60_000);
      check(world, [page]);
      assert.deepEqual([calls, page.errors, world.server.requests.length], [1, [], 1]);
    }
  },

  async "url() that rejects with undefined is called again"(script) {
    const unhandled = [];
    const note = (reason) => unhandled.push(reason);
    process.on("unhandledRejection", note);
    for (const hasWorkers of [false, true]) {
      const world = new World(script);
      let calls = 0;
      world.server.accepts = (address) => address.searchParams.get("token") === "2";
      const renew = async () => {
        if ((calls += 1) === 1) throw undefined;
        return "/events?token=2";
      };
      const page = await world.open({ url: "/events?token=1", renew, hasWorkers });
      await world.run(20_000);
      world.server.publish();
      await world.run();
      check(world, [page]);
      assert.equal(calls, 2);
      assert.deepEqual(page.errors, [401, 0]);
      assert.equal(world.server.requests.length, 2, "the URL that was refused is not sent again");
    }
    process.off("unhandledRejection", note);
    assert.deepEqual(unhandled, []);
  },

  async "url() and headers() that never answer are called again"(script) {
    for (const hasWorkers of [false, true]) {
      for (const option of ["renew", "headers"]) {
        const world = new World(script);
        const { server } = world;
        const calls = [];
        server.accepts = (address) => option === "headers" || address.searchParams.get("token") === "2";
        const ask = () => (calls.push(world.now) === 1 ? never() : option === "headers" ? {} : "/events?token=2");
        const page = await world.open({ url: "/events?token=1", [option]: ask, hasWorkers });
        await world.run(NO_ANSWER_MS + 5000);
        server.publish();
        await world.run();
        check(world, [page]);
        assert.equal(calls.length, 2);
        assert.ok(calls[1] - calls[0] >= NO_ANSWER_MS, `after ${calls[1] - calls[0]} ms`);
        assert.deepEqual(page.errors, option === "headers" ? [0] : [401, 0]);
        assert.equal(server.requests.length, option === "headers" ? 1 : 2);
      }
    }
  },

  async "online does not wait for a function that does not answer"(script) {
    for (const hasWorkers of [false, true]) {
      const world = new World(script);
      let calls = 0;
      const headers = () => ((calls += 1) === 1 ? never() : {});
      const page = await world.open({ headers, hasWorkers });
      await world.run(2000);
      page.dispatch("online");
      await world.run();
      world.server.publish();
      await world.run();
      check(world, [page]);
      assert.deepEqual([calls, page.errors], [2, []]);
    }
  },

  async "close() leaves no timer, whether the functions have answered or not"(script) {
    for (const hasWorkers of [false, true]) {
      for (const headers of [never, () => ({})]) {
        const world = new World(script);
        const page = await world.open({ headers, hasWorkers });
        await world.run(1000);
        world.server.cut();
        await world.run(100);
        page.source.close();
        await world.run(0);
        assert.equal(page.realm.timers.size, 0, "timers");
        if (hasWorkers) assert.equal(world.worker().timers.size, 1, "timers of the worker: the beat");
        await checkClosed(world, page);
      }
    }
  },

  async "a URL that is refused again and again is not asked for without a wait"(script) {
    for (const hasWorkers of [false, true]) {
      const world = new World(script);
      world.server.accepts = () => false;
      let calls = 0;
      await world.open({ renew: () => `/events?token=${(calls += 1)}`, hasWorkers });
      await world.run(20_000);
      assert.ok(calls > 2 && calls < 8, `${calls} calls in 20 s`);
      assert.equal(world.server.requests.length, calls + 1);
    }
  },

  async "whether polls pass is asked again if headers() did not answer"(script) {
    const world = new World(script);
    const { server } = world;
    server.isSilent = true;
    let calls = 0;
    const headers = () => ((calls += 1) === 2 ? never() : {}); // the second call is for the poll
    const open = server.fetch.bind(server);
    server.fetch = (...values) => {
      server.isSilent = !values[1].searchParams.has("poll"); // something holds streams back
      return open(...values);
    };
    const page = await world.open({ headers, hasWorkers: false });
    await world.run(120_000);
    assert.equal(page.source.state, "polling");
  },

  async "another tab is asked if one does not answer"(script) {
    const world = new World(script);
    const { server } = world;
    let token = 1;
    server.accepts = (address) => address.searchParams.get("token") === `${token}`;
    let isStuck = false;
    let calls = 0; // of the tab that is stuck, by then
    const renew = () => `/events?token=${token}`;
    const stuck = () => (isStuck ? ((calls += 1), never()) : renew());
    const pages = [];
    for (const each of [stuck, renew, stuck]) {
      pages.push(await world.open({ url: "/events?token=1", cursor: "e0-0", renew: each }));
    }
    await world.run(3000);
    isStuck = true;
    for (token = 2; token < 6; token += 1) {
      server.cut();
      await world.run(2 * NO_ANSWER_MS + 20_000);
      server.publish();
      await world.run();
      check(world, pages);
    }
    assert.ok(calls <= 2, `${calls} calls of those that do not answer`);
  },

  async "a tab that is closed before it has answered holds up no other tab"(script) {
    const world = new World(script);
    let isAsked = false;
    const stuck = () => (isAsked ? never() : {});
    const pages = [await world.open({ headers: stuck, cursor: "e0-0" }), await world.open({ cursor: "e0-0" })];
    await world.run(3000);
    isAsked = true;
    world.server.cut();
    await world.run(3000);
    assert.equal(world.server.streams.size, 0);
    pages.shift().source.close();
    world.server.publish();
    await world.run(1000);
    check(world, pages);
    assert.deepEqual(pages[0].errors, [0]); // the cut
  },

  async "an answer that is late counts, from a tab that shares"(script) {
    const world = new World(script);
    let calls = 0;
    const headers = async () => {
      calls += 1;
      await world.pause(NO_ANSWER_MS + 10_000);
      return {};
    };
    const page = await world.open({ headers });
    await world.run(NO_ANSWER_MS + 12_000);
    world.server.publish();
    await world.run();
    check(world, [page]);
    assert.deepEqual([calls, page.errors], [2, [0]]);
  },

  async "an event that cannot become text again does not hold up those behind it"(script) {
    const world = new World(script);
    const page = await world.open({ hasWorkers: false });
    const seen = [];
    page.source.addEventListener("deep", ({ data }) => seen.push(data));
    await world.run();
    const [stream] = world.server.streams;
    const deep = "[".repeat(100_000) + "]".repeat(100_000); // JSON.parse takes it, and JSON.stringify does not
    stream.write(`event: deep_batch\ndata: {"events":[${deep},2]}\n\n`);
    await world.run();
    world.server.publish();
    await world.run();
    assert.deepEqual([seen, page.fault()], [["2"], ""]);
    assert.equal(world.errors.length, 1);
  },

  async "the ports of the worker's questions are closed"(script) {
    const { world, server, page } = await begun(script);
    const before = world.openPorts.size;
    for (let i = 0; i < 20; i += 1) {
      server.cut();
      await world.run(2000);
    }
    check(world, [page]);
    assert.equal(streams(world).length, 21);
    assert.equal(world.openPorts.size, before);
  },
};
