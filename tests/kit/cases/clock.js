// Time that a case moves, by leaps: `clock.install()` before the module is loaded, then `clock.skip(ms)`. Between two
// leaps it goes on as usual. `clock.now()` and `clock.setTimeout()` are those of the browser.
window.clock = (() => {
  const now = performance.now.bind(performance), date = Date.now;
  const set = window.setTimeout.bind(window), clear = window.clearTimeout.bind(window);
  const timers = new Map();
  let ahead = 0, last = 0;
  const arm = (id) => {
    const timer = timers.get(id);
    timer.handle = set(() => {
      if (timer.every === undefined) timers.delete(id);
      else {
        timer.due = now() + ahead + timer.every;
        arm(id);
      }
      timer.call();
    }, Math.max(0, timer.due - now() - ahead));
  };
  const add = (call, ms = 0, every = undefined) => {
    timers.set(++last, {due: now() + ahead + Number(ms), call, every});
    arm(last);
    return last;
  };
  const remove = (id) => {
    clear(timers.get(id)?.handle);
    timers.delete(id);
  };
  return {
    install() {
      Date.now = () => date() + Math.round(ahead);
      performance.now = () => now() + ahead;
      window.setTimeout = (call, ms, ...values) => add(() => call(...values), ms);
      window.setInterval = (call, ms, ...values) => add(() => call(...values), ms, ms);
      window.clearTimeout = window.clearInterval = remove;
    },
    skip(ms) {
      ahead += ms;
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
