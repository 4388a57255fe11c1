// Reads each URL by an EventSource of its own, and reports its events as [type, data, lastEventId] until the type `last`.
export async function collect(EventSource, {urls, types, last, atOnce}, report) {
  const read = (url) => new Promise((done) => {
    const source = new EventSource(url);
    for (const type of types) {
      source.addEventListener(type, (event) => {
        if (event.data === undefined) {  // its own "open" or "error", not one of ours
          setTimeout(() => source.readyState === 2 && done());  // the oldest says so before it is so
          return;
        }
        report(url, [event.type, event.data, event.lastEventId]);
        if (type === last) {
          source.close();
          done();
        }
      });
    }
  });
  const waiting = [...urls];
  const worker = async () => {
    while (waiting.length) await read(waiting.shift());
  };
  await Promise.all(Array.from({length: atOnce}, worker));
}
