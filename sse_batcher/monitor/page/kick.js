// The dialog that asks before a user is kicked, and the kick itself.

import { plural, user as shown } from "./format.js";
import { ask, Trouble } from "./poll.js";
import { setText } from "./rows.js";

const byId = (id) => document.getElementById(id);

export class Kick {
  #dialog = byId("kick");
  #user = "";
  #opener = null;

  /** `token()` returns the newest one. `reach` is that of the poll. `done(words)`: it has happened. */
  constructor({ token, reach, done, fallback }) {
    Object.assign(this, { token, reach, done, fallback });
    byId("kick-do").addEventListener("click", () => this.#do());
    this.#dialog.addEventListener("close", () => this.#return());
  }

  get isOpen() {
    return this.#dialog.open;
  }

  /** Asks. `stream`: a row of the overview. `everywhere`: other processes are reached, too. */
  ask(stream, everywhere, opener) {
    this.#user = stream.user;
    this.#opener = opener;
    const number = stream.streams_of_user;
    const streams = number === 1 ? "the one stream" : `the ${plural(number, "stream")}`;
    setText(byId("kick-user"), shown(stream.user));
    setText(
      byId("kick-text"),
      `This ends ${streams} of this user in this process` +
        (everywhere ? ", and those in all other processes" : "") +
        ", and refuses tokens that were made for this user before now. Their pages try to come back after a moment, " +
        "and the app then decides again whether they may.",
    );
    setText(byId("kick-error"), "");
    byId("kick-do").disabled = false;
    this.#dialog.showModal();
    byId("kick-cancel").focus();
  }

  async #do() {
    const user = this.#user;
    byId("kick-do").disabled = true;
    try {
      const found = await this.reach((process) =>
        ask("monitor/kick", {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ user, process, token: this.token() }),
        }),
      );
      if (found === null) throw new Trouble("the process that is shown does not answer");
      const { status, body } = found;
      if (status !== 200) throw new Trouble(body.error ?? `the server answers with the status ${status}`);
      this.done(
        // With Redis, another process may have answered, so its number says nothing about the one that is shown.
        body.everywhere
          ? `${shown(user)} was kicked in all processes.`
          : `${shown(user)} was kicked: ${plural(body.ended, "stream")} ended.`,
      );
      this.#dialog.close();
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      setText(byId("kick-error"), `It did not work: ${error.message}.`);
      byId("kick-do").disabled = false;
    }
  }

  /** The row of the button may be gone by now. */
  #return() {
    // The dialog was opened again before this event came; or it was closed twice, and the focus is back already.
    if (this.#dialog.open || !this.#opener) return;
    const opener = this.#opener.isConnected ? this.#opener : this.fallback;
    opener.focus();
    this.#opener = null;
  }
}
