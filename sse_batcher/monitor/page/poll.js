// Asks the server for overviews while the page is seen, and goes on by itself after an error.
//
// The page shows one process. If the server runs several, any of them may answer: then it is asked again, until the one
// that is shown answers.

const ANSWER_SECONDS = 8; // after so long without an answer, the server counts as away
const TRIES = 16; // how often it is asked in a row for the process that is shown
const AT_ONCE = 4; // how many questions are asked at the same time to meet other processes
const TRY_PAUSE = 40; // ms
const GIVE_UP = 3; // after so many rows in vain, another process is shown
const PAUSES = [1, 2, 4, 8]; // seconds after an error, then after the next one, ...

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Why there is no overview, in words. */
export class Trouble extends Error {}

/** Returns the JSON of an answer. Throws a Trouble for everything else. */
export async function ask(url, options = {}) {
  let response;
  try {
    // A redirect leads to a login page, most likely.
    const signal = AbortSignal.timeout(1000 * ANSWER_SECONDS);
    response = await fetch(url, { cache: "no-store", redirect: "manual", signal, ...options });
  } catch {
    throw new Trouble("the server does not answer");
  }
  const { status } = response;
  if (response.type === "opaqueredirect" || status === 401) throw new Trouble("you are not logged in any more");
  const isJson = response.headers.get("Content-Type")?.startsWith("application/json");
  if (status === 403 && !isJson) throw new Trouble("you may not see this, or not any more");
  if (!isJson) throw new Trouble(`the server answers with the status ${status}`);
  try {
    return { status, body: await response.json() };
  } catch {
    throw new Trouble("the answer of the server was cut off");
  }
}

export class Poll {
  search = "";
  /** The id of the process that is shown; "" is any. */
  process = "";
  #timer = 0;
  #paused = false;
  #failures = 0;
  #misses = 0;
  #round = 0; // an answer of an older one is not used

  /** `received(overview)`, `met(process)`: one that is not shown has answered, `lost(process)`, `failed(words)`. */
  constructor({ received, met, lost, failed }) {
    Object.assign(this, { received, met, lost, failed });
    document.addEventListener("visibilitychange", () => this.#begin());
    addEventListener("pageshow", (event) => event.persisted && this.#begin());
    addEventListener("online", () => this.#begin());
  }

  get paused() {
    return this.#paused;
  }

  set paused(paused) {
    this.#paused = paused;
    this.#begin();
  }

  /** Asks at once, for example because `search` has changed. */
  now() {
    this.#begin(true);
  }

  /** Calls `attempt(process)` until the process that is shown answers; null if it does not. */
  async reach(attempt) {
    for (let left = TRIES; left > 0; left--) {
      const { status, body } = await attempt(this.process);
      if (body.process === undefined || !this.process || body.process.id === this.process) return { status, body };
      this.met(body.process);
      await wait(TRY_PAUSE);
    }
    return null;
  }

  /** Meets other processes: each that answers ends the connection, so that another one may answer the next time. */
  async discover() {
    const once = async () => {
      const { body } = await ask("monitor/data?process=any");
      if (body.process) this.met(body.process);
    };
    try {
      for (let left = TRIES; left > 0; left -= AT_ONCE) {
        await Promise.all(Array.from({ length: AT_ONCE }, once)); // over as many connections
        await wait(TRY_PAUSE);
      }
    } catch (error) {
      if (!(error instanceof Trouble)) throw error; // the next poll says it
    }
  }

  #begin(always = false) {
    clearTimeout(this.#timer);
    this.#round++;
    if (document.visibilityState === "visible" && (always || !this.#paused)) this.#turn(this.#round);
  }

  async #turn(round) {
    let seconds;
    try {
      seconds = await this.#once(round);
      this.#failures = 0;
    } catch (error) {
      if (round !== this.#round) return;
      if (!(error instanceof Trouble)) throw error;
      this.failed(error.message);
      seconds = PAUSES[Math.min(this.#failures++, PAUSES.length - 1)];
    }
    if (round !== this.#round || this.#paused) return;
    this.#timer = setTimeout(() => this.#turn(round), 1000 * seconds);
  }

  /** Returns after how many seconds to ask again. */
  async #once(round) {
    const found = await this.reach((process) => {
      const query = new URLSearchParams();
      if (this.search) query.set("search", this.search);
      if (process) query.set("process", process);
      return ask(`monitor/data?${query}`);
    });
    if (round !== this.#round) return 0;
    if (found === null) {
      if (++this.#misses < GIVE_UP) return 1;
      this.#misses = 0;
      this.lost(this.process);
      this.process = "";
      return 0;
    }
    const { body, status } = found;
    if (status !== 200 || body.counts === undefined) throw new Trouble(`the server answers with the status ${status}`);
    this.#misses = 0;
    this.process = body.process.id;
    this.received(body);
    return body.next;
  }
}
