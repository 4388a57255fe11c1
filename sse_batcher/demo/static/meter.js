// What the streams bring, as it stands in the bodies of the answers. The module hides frames, since an app needs none,
// but this page counts them. So from the import of this file on, each stream that is fetched passes through here.

const KEPT_BLOCKS = 20_000; // those of types that the page does not know are never taken

const blocks = new Map(); // id -> the block
const fetchUnread = globalThis.fetch;

globalThis.fetch = async (...request) => {
  const response = await fetchUnread(...request);
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) return response;
  return new Response(response.body.pipeThrough(new TransformStream(new Meter())), response);
};

/** Returns the block with this id, and forgets it: {name, bytes, reason, at}. `reason` is "" if it is no batch. */
export function takeBlock(id) {
  const block = blocks.get(id);
  blocks.delete(id);
  return block;
}

/** Passes bytes on as they are, and notes each block with an event. Those of the stream itself, `sse_...`, it leaves out. */
export class Meter {
  #decoder = new TextDecoder("latin1"); // makes one character of each byte
  #rest = "";

  transform(chunk, controller) {
    const parts = (this.#rest + this.#decoder.decode(chunk, { stream: true })).split("\n\n");
    this.#rest = parts.pop();
    for (const part of parts) note(part.replace(/^:.*\n/gm, "")); // without heartbeats
    controller.enqueue(chunk);
  }
}

function note(text) {
  const name = /^event: (.*)$/m.exec(text)?.[1] ?? "message";
  const id = /^id: (.*)$/m.exec(text)?.[1];
  if (id === undefined || name.startsWith("sse_")) return;
  const reason = /"reason":"([a-z_]+)","timestamp":\d+}$/m.exec(text)?.[1] ?? "";
  blocks.set(id, { name, bytes: text.length + "\n\n".length, reason, at: performance.now() });
  if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
}
