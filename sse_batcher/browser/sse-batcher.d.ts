/** What is known about one event. */
export interface EventInfo {
  /** Its type, as it was enqueued. */
  readonly type: string;
  /**
   * The cursor behind this event: a page that comes back with it gets what follows. The k-th event of a batch has
   * `<id>.<k>`, and the last one the plain id.
   */
  readonly id: string;
}

/**
 * What the connection does now. `polling`: it is open, but by polls, since something holds streams back, or for the
 * moment in which a tab joins a shared stream.
 */
export type State = "connecting" | "open" | "polling" | "waiting" | "closed";

/** The data of the stream's own events. */
export interface ControlEvents {
  /** The stream begins, or goes on without loss. `heartbeat` is in seconds. */
  sse_open: { heartbeat: number; channels?: string[] };
  /** Something may have been missed: load the state again. */
  sse_gap: {
    reason: "epoch" | "malformed" | "too_old" | "overflow" | "publish_failed";
    heartbeat: number;
    channels?: string[];
  };
  /** The stream cannot be opened now. The module comes back by itself. */
  sse_busy: { reason: "limit" | "threads" | "http2" | "snapshot" | "backend" | "draining" | "error" };
  /** The server ends the stream in good order. The module comes back by itself. */
  sse_bye: { reason: "shutdown" | "lease" | "kicked" | "revoked" | "buffered" | "threads" };
}

/** The event `error`: the connection is lost, or could not be opened. The module tries again by itself. */
export interface ConnectionErrorEvent extends Event {
  /** The status of the answer; 0 if there was none, or if a stream ended that was open. */
  readonly status: number;
  /** What happened, in words. */
  readonly message: string;
}

export interface Options {
  /** The channels of the stream. Default: those of the URL, or else `default`. */
  channels?: readonly string[];
  /** Where the page's state stands, from `sse_cursor()`. Default: "", so the stream begins now. */
  cursor?: string;
  /**
   * Share one connection with all tabs that give the same name. Derive it from the user, such as "u7", because tabs
   * that share see the same stream. Default: each tab has a connection of its own. Without SharedWorker, too.
   */
  share?: string;
  /** The URL of this module, for the shared worker. Needed only if a bundler has renamed or merged the module. */
  worker?: string | URL;
  /** "auto" (default): poll if something on the way holds streams back. true: always. false: only to join others. */
  poll?: "auto" | boolean;
  /** Returns a fresh URL, within 30 s. Called after 401 or 403. For signed URLs. */
  url?: () => string | URL | Promise<string | URL>;
  /**
   * Returns the headers of each request, such as `Authorization`. Another origin then sees a CORS preflight. It may
   * take at most 30 s.
   */
  headers?: () => Record<string, string> | Promise<Record<string, string>>;
  /** Send cookies to another origin, too. Default: false. */
  withCredentials?: boolean;
  /** The shortest and the longest wait between two attempts, in milliseconds. Default: [1000, 30000]. */
  backoff?: readonly [number, number];
}

/**
 * A stream of sse_batcher. Unpacks batches, recovers from what can pass, and can replace an `EventSource`.
 *
 * `Types` maps types to their data: `new BatchedEventSource<{ tools: Tool }>(...)`.
 */
export class BatchedEventSource<Types extends object = Record<string, any>> extends EventTarget {
  static readonly CONNECTING: 0;
  static readonly OPEN: 1;
  static readonly CLOSED: 2;

  /** `url`: the URL of the stream. It opens at once. Throws if it is no URL, or if there is no such option. */
  constructor(url: string | URL, options?: Options);

  readonly CONNECTING: 0;
  readonly OPEN: 1;
  readonly CLOSED: 2;
  readonly url: string;
  readonly withCredentials: boolean;
  /** CLOSED only after `close()`: everything else is tried again. */
  readonly readyState: 0 | 1 | 2;
  readonly state: State;
  onopen: ((event: Event) => void) | null;
  onmessage: ((event: MessageEvent<string>) => void) | null;
  // Read as a handler of any Event, so that the whole object can be assigned to an `EventSource`.
  get onerror(): ((event: Event) => void) | null;
  set onerror(handle: ((event: ConnectionErrorEvent) => void) | null);

  /**
   * Call with the parsed JSON of each event of this type, alone or out of a batch, in order. Returns a function that
   * removes the handler.
   */
  on<K extends string>(type: K, handle: (data: DataOf<Types, K>, info: EventInfo) => void): () => void;
  /**
   * Call with the text of each event of this type, as it came. Texts of one window are one. An event out of a batch of
   * JSON has its JSON, made again from its value. Returns a function that removes the handler.
   */
  onText(type: string, handle: (text: string, info: EventInfo) => void): () => void;
  /**
   * Call once for each frame, with the parsed JSON of all its events of this type. Returns a function that removes the
   * handler.
   */
  onBatch<K extends string>(type: K, handle: (list: DataOf<Types, K>[], info: EventInfo) => void): () => void;

  /** `open`, `error` and `statechange` are the connection's. Others get each event by itself, as an `EventSource` would. */
  addEventListener(
    type: "error",
    listener: ((event: ConnectionErrorEvent) => void) | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: "open" | "statechange",
    listener: ((event: Event) => void) | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: ((event: MessageEvent<string>) => void) | EventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;

  removeEventListener(
    type: string,
    listener: ((event: any) => void) | EventListenerObject | null,
    options?: boolean | EventListenerOptions,
  ): void;

  /** End at once, also in the middle of a batch. Nothing goes on. */
  close(): void;
}

type DataOf<Types, K> = K extends keyof ControlEvents ? ControlEvents[K] : K extends keyof Types ? Types[K] : any;
