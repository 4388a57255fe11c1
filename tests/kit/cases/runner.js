// Runs cases, as many at a time as there are origins: each in a frame of its own, with its own module, clock and document. Each frame has one of
// the origins for itself, since a browser has at most six connections to one.
window.run = (origins, names) => {
  const waiting = [...names], results = {};
  const next = async (origin) => {
    while (waiting.length) {
      const name = waiting.shift();
      results[name] = await runOne(origin, name);
    }
  };
  window.finished = Promise.all(origins.map(next)).then(() => results);
};

const runOne = (origin, name) => new Promise((resolve) => {
  const frame = document.createElement("iframe");
  const began = Date.now();
  const done = (error) => {
    clearTimeout(timer);
    removeEventListener("message", hear);
    frame.remove();
    resolve({error, seconds: (Date.now() - began) / 1000});
  };
  const hear = (event) => {
    if (event.source === frame.contentWindow) done(event.data);
  };
  const timer = setTimeout(done, 100_000, "takes too long");
  addEventListener("message", hear);
  frame.src = `${origin}/case.html#${encodeURIComponent(name)}`;
  document.body.append(frame);
});
