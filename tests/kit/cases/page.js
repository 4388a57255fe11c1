// A page as an app has it. Its query says what it opens: `url`, `cursor`, `credentials`, and `backoff` in ms.
// `page.seen` has the data of its events, `page.count` how many there were and `page.sum` of what.
import {BatchedEventSource} from "/sse-batcher.js";

const query = new URLSearchParams(location.search);
const backoff = Number(query.get("backoff") ?? 300);
const source = new BatchedEventSource(query.get("url") ?? "/events", {
  cursor: query.get("cursor") ?? "",
  withCredentials: query.has("credentials"),
  backoff: [backoff, 3 * backoff],
});
const page = window.page = {source, seen: [], states: [], errors: [], restored: [], count: 0, sum: 0};
source.on("n", (data) => page.seen.push(data));
source.on("sse_gap", ({reason}) => page.seen.push(`gap: ${reason}`));
source.on("counted", (data) => { page.sum += data; });
source.addEventListener("counted", () => { page.count += 1; });
source.addEventListener("statechange", () => page.states.push(source.state));
source.onerror = ({status}) => page.errors.push(status);
addEventListener("pageshow", ({persisted}) => page.restored.push(persisted));
