// What the streams bring, as it stands in the body of the answer. The module hides frames, since apps need none, but
// this page counts them. So it reads along: from its import on, each stream passes through here on its way to `fetch`'s
// caller.

const KEPT_BLOCKS = 20_000; // blocks of types that the page does not know are never taken

const blocks = new Map(); // id -> the block
const fetchUnread = globalThis.fetch;

globalThis.fetch = async (...request) => {
  const response = await fetchUnread(...request);
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) return response;
  return new Response(response.body.pipeThrough(new TransformStream(new Reader())), response);
};

/** Returns the block with this id, {name, bytes, reason, at}, and forgets it. `reason` is "" if it is no batch. */
export function takeBlock(id) {
  const block = blocks.get(id);
  blocks.delete(id);
  return block;
}

/** Passes bytes on as they are, and notes each block that carries events. */
class Reader {
  #decoder = new TextDecoder("latin1"); // one character for each byte
  #rest = "";

  transform(chunk, controller) {
    const parts = (this.#rest + this.#decoder.decode(chunk, { stream: true })).split("\n\n");
    this.#rest = parts.pop();
    for (const part of parts) note(part.replace(/^:.*\n/gm, "")); // without heartbeats
    controller.enqueue(chunk);
  }
}

function note(text) {
  const [, name] = text.match(/^event: (.*)$/m) ?? ["", "message"];
  if (name.startsWith("sse_")) return;
  const [, id] = text.match(/^id: (.*)$/m);
  const [, reason] = text.match(/"reason":"([a-z_]+)","timestamp":\d+}$/m) ?? ["", ""];
  blocks.set(id, { name, bytes: text.length + "\n\n".length, reason, at: performance.now() });
  if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
}
