// The time of a page. A case moves it by leaps: `clock.skip(ms)`. Between two leaps it goes on as usual, or stands still
// from `clock.stop()` to `clock.start()`. `clock.now()` and `clock.setTimeout()` are those of the browser.
window.clock = (() => {
  const now = performance.now.bind(performance), date = Date.now();
  const set = window.setTimeout.bind(window), clear = window.clearTimeout.bind(window);
  const timers = new Map();
  const began = now();
  let time = began, seen = began, isStopped = false, last = 0;
  // A machine that stands still for some seconds is no server that is silent: what it has sent waits to be read.
  const passed = () => {
    const before = seen;
    seen = now();
    if (!isStopped) time += Math.min(seen - before, 250);
    return time;
  };
  window.setInterval(passed, 50);
  const arm = (id) => {
    const timer = timers.get(id);
    timer.handle = set(() => {
      if (passed() < timer.due - 1) {
        arm(id);
        return;
      }
      if (timer.every === undefined) timers.delete(id);
      else {
        timer.due = passed() + timer.every;
        arm(id);
      }
      timer.call();
    }, Math.max(0, timer.due - passed()));
  };
  const add = (call, ms = 0, every = undefined) => {
    timers.set(++last, {due: passed() + Number(ms), call, every});
    arm(last);
    return last;
  };
  const remove = (id) => {
    clear(timers.get(id)?.handle);
    timers.delete(id);
  };
  Date.now = () => Math.round(date + passed() - began);
  performance.now = passed;
  window.setTimeout = (call, ms, ...values) => add(() => call(...values), ms);
  window.setInterval = (call, ms, ...values) => add(() => call(...values), ms, ms);
  window.clearTimeout = window.clearInterval = remove;
  return {
    stop() {
      passed();
      isStopped = true;
    },
    start() {
      passed();
      isStopped = false;
    },
    skip(ms) {
      time += ms;
      for (const [id, timer] of [...timers].sort(([, a], [, b]) => a.due - b.due)) {
        clear(timer.handle);
        arm(id);
      }
    },
    now,
    setTimeout: set,
    timers,
  };
})();
