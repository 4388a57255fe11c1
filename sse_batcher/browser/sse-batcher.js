// The browser's side of sse_batcher.
export class BatchedEventSource extends EventTarget {}
