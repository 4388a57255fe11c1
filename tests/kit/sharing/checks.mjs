// What the cases have in common.

import assert from "node:assert/strict";
import { World } from "./world.mjs";

/** Each page has all, once and in order, and one stream is open. */
export function check(world, pages, streams = 1) {
  assert.deepEqual(pages.map((page) => page.fault()), pages.map(() => ""));
  assert.deepEqual(world.errors, []);
  assert.equal([...world.server.streams].filter(({ isPoll }) => !isPoll).length, streams);
  assert.ok(world.server.mostStreams <= Math.max(streams, 1), "never more streams than tabs need");
}

export const polls = ({ server }) => server.requests.filter(({ poll }) => poll);
export const streams = ({ server }) => server.requests.filter(({ poll }) => !poll);
export const numbers = (first, last) => Array.from({ length: last - first + 1 }, (_, index) => first + index);

export function publish(server, frames, events = 1) {
  for (let i = 0; i < frames; i += 1) server.publish(events);
}

/** A world in which a tab reads, and three frames have come. */
export async function begun(script, options) {
  const world = new World(script, options);
  const page = await world.open();
  await world.run();
  publish(world.server, 3, 2);
  await world.run();
  return { world, server: world.server, page };
}

/** The module with other limits than its own. */
export function limited(script, limits) {
  return Object.entries(limits).reduce((before, [name, value]) => {
    const after = before.replace(new RegExp(`const ${name} ?= ?\\d+`), `const ${name} = ${value}`);
    assert.notEqual(after, before, `the module has no ${name}`);
    return after;
  }, script);
}
