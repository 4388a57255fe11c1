// Cases that measure, so that each has the page for itself.
import {batch, open} from "/context.js";
import {test} from "/registry.js";

const EVENTS = 10_000;
const numbers = (from, to) => Array.from({length: to - from}, (_, k) => from + k);

// Some work. Not until a certain time, since clocks are too coarse in some browsers.
let sum = 0;
const work = () => {
  for (let k = 0; k < 40_000; k += 1) sum = (sum + k) % 1e9;
};

// The longest task, in ms, while so many events come at once. Other programs use the CPU, too, so the time that has
// passed says little: it is the most events between two turns of the page, by the time that one takes at its best.
const longestTask = async (t, size) => {
  const body = numbers(0, EVENTS / size).map((k) => batch("n", numbers(k * size, (k + 1) * size), `c-${k}`));
  const stream = await t.stream([{body: [open("b"), body.join("")], end: "hold"}]);
  const {port1, port2} = new MessageChannel();
  const turns = [{events: 0, began: 0, ended: 0}];
  let turn = 0, current = -1, next = 0;
  port1.onmessage = () => {
    turn += 1;
    port2.postMessage(0);
  };
  port2.postMessage(0);
  const source = await t.open(stream.url);
  source.on("n", (data) => {
    if (current !== turn) {
      current = turn;
      turns.push({events: 0, began: clock.now()});
    }
    work();
    turns.at(-1).events += 1;
    turns.at(-1).ended = clock.now();
    if (data === next) next += 1;
  });
  await t.until(() => next === EVENTS, "all events in order");
  source.close();
  port1.close();
  const whole = turns.filter(({began, ended}) => ended - began >= 10);
  const one = Math.min(...whole.map(({events, began, ended}) => (ended - began) / events));
  const found = one * Math.max(...turns.map(({events}) => events));
  t.ok(whole.length > 3 && one > 0.001, `there is work enough: ${JSON.stringify(turns)}`);
  return found;
};

// The tasks that the browser itself calls long: they show also what is between the turns, such as the parser's work.
const observe = () => {
  const tasks = [];
  const observer = new PerformanceObserver((list) => tasks.push(...list.getEntries().map(({duration}) => duration)));
  if (PerformanceObserver.supportedEntryTypes.includes("longtask")) observer.observe({type: "longtask"});
  return {tasks, end: () => observer.disconnect()};
};

const hasNoLongTask = async (t, size) => {
  const all = [];
  for (let k = 0; k < 5; k += 1) {
    const {tasks, end} = observe();
    const found = await longestTask(t, size);
    t.ok(found <= 50, `the longest task takes ${found} ms`);
    await t.pause(100);
    end();
    if (tasks.every((duration) => duration <= 200)) return;
    all.push(tasks); // other programs have interrupted them, or they are too long each time
  }
  throw new Error(`long tasks: ${JSON.stringify(all)}`);
};

test("ten thousand events in small batches make no long task", async (t) => hasNoLongTask(t, 50));
test("ten thousand events in one batch make no long task", async (t) => hasNoLongTask(t, EVENTS));
