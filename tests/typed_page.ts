// A sample page that uses the whole public interface of the module for browsers: `tsc --strict` passes.
//
// `same` says what a caller gets. Each line that must be refused has a `@ts-expect-error` above it: a compiler that
// accepts the line reports that the comment is not needed. Nothing runs this file.

import {
  BatchedEventSource,
  type ConnectionErrorEvent,
  type ControlEvents,
  type EventInfo,
  type Options,
  type State,
} from "../sse_batcher/browser/sse-batcher.js";

type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;

/** Refuses to compile unless both types are the same. */
function same<A, B>(_: Same<A, B>): void {}

interface Tool {
  name: string;
  version?: number;
}

interface Types {
  tools: Tool;
  count: number;
}

declare function sign(): Promise<string>;

// -- make one ---------------------------------------------------------------------------------------------------------

const events = new BatchedEventSource<Types>("/events", {
  channels: ["default", "team-7"],
  cursor: "5f3a9c1e-42",
  share: "u7",
  worker: new URL("./sse-batcher.js", "https://example.com/assets/"),
  poll: "auto",
  url: sign,
  headers: async () => ({ Authorization: `Bearer ${await sign()}` }),
  withCredentials: true,
  backoff: [1000, 30_000],
});
new BatchedEventSource(new URL("https://example.com/events"));
new BatchedEventSource("/events", { poll: true, headers: () => ({}), worker: "/static/sse-batcher.js" });
new BatchedEventSource("/events", { poll: false, url: () => "/events" });
new BatchedEventSource("/events", { url: async () => new URL("https://example.com/events") });

const channels = ["default"] as const;
const backoff = [500, 5000] as const;
const options: Options = { channels, backoff };
new BatchedEventSource("/events", options);

// -- the app's events -------------------------------------------------------------------------------------------------

const stop = events.on("tools", (data, info) => {
  same<typeof data, Tool>(true);
  same<typeof info, EventInfo>(true);
  same<typeof info.type, string>(true);
  same<typeof info.id, string>(true);
});
same<typeof stop, () => void>(true);
stop();

events.on("count", (data) => same<typeof data, number>(true));
events.on("another", (data) => same<typeof data, any>(true));
events.on("tools", async (tool) => console.log(tool.name));

const stopText: () => void = events.onText("row", (text, { id }) => {
  same<typeof text, string>(true);
  same<typeof id, string>(true);
});
const stopBatch: () => void = events.onBatch("tools", (list, { id }) => {
  same<typeof list, Tool[]>(true);
  same<typeof id, string>(true);
});
stopText();
stopBatch();

const untyped = new BatchedEventSource("/events");
untyped.on("tools", (data) => same<typeof data, any>(true));
untyped.onBatch("tools", (list) => same<typeof list, any[]>(true));

// -- the stream's own events ------------------------------------------------------------------------------------------

events.on("sse_open", ({ heartbeat, channels }) => {
  same<typeof heartbeat, number>(true);
  same<typeof channels, string[] | undefined>(true);
});
events.on("sse_gap", (gap) => {
  same<typeof gap, ControlEvents["sse_gap"]>(true);
  same<typeof gap.reason, "epoch" | "malformed" | "too_old" | "overflow" | "publish_failed">(true);
});
untyped.on("sse_busy", ({ reason }) => {
  same<typeof reason, "limit" | "threads" | "http2" | "snapshot" | "backend" | "draining" | "error">(true);
});
untyped.on("sse_bye", ({ reason }) => {
  same<typeof reason, "shutdown" | "lease" | "kicked" | "revoked" | "buffered" | "threads">(true);
});

// -- the connection ---------------------------------------------------------------------------------------------------

same<typeof events.state, State>(true);
same<State, "connecting" | "open" | "polling" | "waiting" | "closed">(true);
same<typeof events.readyState, 0 | 1 | 2>(true);
same<typeof events.url, string>(true);
same<typeof events.withCredentials, boolean>(true);
if (events.readyState !== BatchedEventSource.CLOSED) events.close();
same<[typeof BatchedEventSource.CONNECTING, typeof BatchedEventSource.OPEN, typeof BatchedEventSource.CLOSED], [0, 1, 2]>(true);
same<[typeof events.CONNECTING, typeof events.OPEN, typeof events.CLOSED], [0, 1, 2]>(true);

events.onopen = (event) => same<typeof event, Event>(true);
events.onmessage = ({ data, lastEventId }) => {
  same<typeof data, string>(true);
  same<typeof lastEventId, string>(true);
};
events.onerror = (error) => {
  same<typeof error, ConnectionErrorEvent>(true);
  same<typeof error.status, number>(true);
  same<typeof error.message, string>(true);
};
events.onopen = events.onmessage = events.onerror = null;

// -- in the place of an EventSource -----------------------------------------------------------------------------------

const show = (event: MessageEvent<string>): void => console.log(event.data);
const lost = (error: ConnectionErrorEvent): void => console.log(error.status);
const changed = (event: Event): void => console.log(event.type);
const handler: EventListenerObject = { handleEvent: changed };

events.addEventListener("tools", (event) => same<typeof event, MessageEvent<string>>(true));
events.addEventListener("message", show, { once: true });
events.addEventListener("error", (event) => same<typeof event, ConnectionErrorEvent>(true));
events.addEventListener("error", lost);
events.addEventListener("open", (event) => same<typeof event, Event>(true), { passive: true });
events.addEventListener("statechange", changed, false);
events.addEventListener("statechange", handler);
events.addEventListener("tools", handler);
events.addEventListener("tools", null);

events.removeEventListener("message", show);
events.removeEventListener("error", lost);
events.removeEventListener("statechange", changed);
events.removeEventListener("statechange", handler);
events.removeEventListener("tools", null);

const target: EventTarget = events;
const source: EventSource = events;
target.removeEventListener("statechange", changed);
source.close();

// -- what a compiler must refuse --------------------------------------------------------------------------------------

// @ts-expect-error: a URL is needed
new BatchedEventSource();
// @ts-expect-error: a function is an option
new BatchedEventSource(sign);
// @ts-expect-error: several channels are an array
new BatchedEventSource("/events", { channels: "default" });
// @ts-expect-error: there is no such option
new BatchedEventSource("/events", { channel: ["default"] });
// @ts-expect-error: "auto", true or false
new BatchedEventSource("/events", { poll: "always" });
// @ts-expect-error: the shortest and the longest wait
new BatchedEventSource("/events", { backoff: [1000] });
// @ts-expect-error: a function
new BatchedEventSource("/events", { headers: { Authorization: "Bearer" } });
// @ts-expect-error: the name is a string
new BatchedEventSource("/events", { share: 7 });
// @ts-expect-error: it has no types without data
new BatchedEventSource<string>("/events");
// @ts-expect-error: not a Tool
events.on("tools", (data: number) => data);
// @ts-expect-error: a Tool has no such field
events.on("tools", ({ server }) => server);
// @ts-expect-error: a list
events.onBatch("tools", (tool: Tool) => tool.name);
// @ts-expect-error: text is a string
events.onText("row", (row: Tool) => row);
// @ts-expect-error: there is no such reason
events.on("sse_gap", ({ reason }) => reason === "lease");
// @ts-expect-error: a function is needed
events.on("tools");
// @ts-expect-error: it changes by itself
events.state = "open";
// @ts-expect-error: it changes by itself
events.readyState = 2;
// @ts-expect-error: there is no such state
events.state === "failed";
// @ts-expect-error: an EventSource has no such event
events.addEventListener("tools", (event: KeyboardEvent) => event.key);
// @ts-expect-error: an open connection has no status
events.addEventListener("open", (event) => event.status);
