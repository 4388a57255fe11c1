// Tabs that come, go, crash and freeze, a worker that dies, and a server with faults, all at random, from a seed.

import { limited } from "./checks.mjs";
import { World } from "./world.mjs";

const STEPS = 120;
const MOST_TABS = 6;

// The module's limits, so low that a short walk meets them.
const LIMITS = { MANY: 12, SHARED_FRAMES: 6 };

/** Take a walk, then let all faults end, and check each page that is open. */
export async function wander(script, seed) {
  const world = new World(limited(script, LIMITS), { seed, isRandom: true, history: 20, snapshot: seed % 4 ? 0 : 3 });
  const { server } = world;
  const chance = (share) => world.choose() < share;
  const below = (number) => Math.floor(world.choose() * number);
  const pages = [];
  const one = () => pages[below(pages.length)];
  const remove = (end) => pages.length && end(pages.splice(below(pages.length), 1)[0]);
  const cursors = [server.head];
  const url = seed % 5 ? "/events" : "/events?batch=0";

  const cursorOf = () => {
    if (chance(0.3)) return "";
    const cursor = chance(0.5) ? server.head : cursors[below(cursors.length)];
    return cursor.endsWith("+") ? `${cursor.slice(0, -1)}.${1 + below(2)}` : cursor.replace("+", "");
  };
  const publish = () => {
    const events = 1 + below(3);
    server.publish(events);
    cursors.push(server.head + (events === 3 ? "+" : ""));
    if (cursors.length > 30) cursors.shift();
  };
  const open = async () => {
    if (pages.length === MOST_TABS) return;
    pages.push(await world.open({ url, cursor: cursorOf(), poll: chance(0.2) || "auto" }));
  };
  const worker = () => [...world.workers.values()].find(({ isAlive }) => isAlive);
  const actions = [
    [30, publish],
    [6, () => server.publishElsewhere(1 + below(3))],
    [12, open],
    [4, () => remove((page) => page.close())],
    [3, () => remove((page) => page.kill())],
    [3, () => one()?.freeze()],
    [6, () => one()?.thaw()],
    [3, () => one()?.show()],
    [2, () => worker()?.kill()],
    [4, () => server.cut()],
    [2, () => server.bye()],
    [1, () => server.lose()],
    [1, () => server.forget()],
    [1, () => server.restart()],
    [1, () => (server.isUp = !server.isUp)],
    [1, () => (server.busy = !server.busy)],
    [1, () => (world.canLoad = !world.canLoad)],
  ];
  const total = actions.reduce((sum, [weight]) => sum + weight, 0);

  for (let step = 0; step < STEPS; step += 1) {
    let at = world.choose() * total;
    await actions.find(([weight]) => (at -= weight) < 0)[1]();
    await world.run(chance(0.1) ? 10_000 * world.choose() : 300 * world.choose() ** 2);
  }
  Object.assign(server, { isUp: true, busy: false });
  world.canLoad = true;
  for (const page of pages) page.thaw();
  await world.run(90_000);
  publish();
  await world.run(60_000);
  const faults = pages.map((page) => page.fault()).filter(Boolean);
  if (faults.length || world.errors.length) throw new Error([...faults, ...world.errors].join("; "));
  const streams = [...server.streams].filter(({ isPoll }) => !isPoll).length;
  const alone = world.warnings.length;
  if (!alone && (server.mostStreams > 1 || streams > 1)) throw new Error(`${server.mostStreams} streams at once`);
  return undefined;
}
