// Lists that are drawn again and again. The row of a thing stays the same element, so that it keeps focus and what is
// open in it. Everything is shown by textContent.

/** Returns a new element with a class, or "", and a text. */
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** Changes the text only if it is another one: so nothing is read aloud again, and no selection is lost. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export class Rows {
  #body;
  #make;
  #update;
  #rows = new Map(); // key -> element

  /** `make(item)` returns an element, and `update(element, item)` writes into it what may have changed. */
  constructor(body, make, update) {
    this.#body = body;
    this.#make = make;
    this.#update = update;
  }

  /** Shows these items in this order: each is [key, item]. */
  show(items) {
    const focused = this.#body.contains(document.activeElement) ? document.activeElement : null;
    const placeOfFocus = [...this.#body.children].findIndex((row) => row.contains(focused));
    const keys = new Set(items.map(([key]) => key));
    for (const [key, row] of this.#rows) {
      if (keys.has(key)) continue;
      row.remove();
      this.#rows.delete(key);
    }
    let place = this.#body.firstElementChild;
    for (const [key, item] of items) {
      let row = this.#rows.get(key);
      if (!row) this.#rows.set(key, (row = this.#make(item)));
      this.#update(row, item);
      if (row === place) place = place.nextElementSibling;
      else this.#body.insertBefore(row, place);
    }
    if (!focused || focused === document.activeElement) return;
    // Its row has moved, which loses the focus; or it is gone, and then the row in its place gets it.
    const near = this.#body.children[Math.min(placeOfFocus, this.#body.childElementCount - 1)];
    const next = focused.isConnected ? focused : near?.querySelector("button:not([hidden]), summary");
    next?.focus({ preventScroll: true });
  }
}

/** Shows [name, value, className] in a <dl>. */
export class Terms {
  #rows;

  constructor(list) {
    this.#rows = new Rows(list, make, update);
    function make([name]) {
      const row = document.createElement("div");
      row.append(element("dt", "", name), element("dd"));
      return row;
    }
    function update(row, [, value, className = ""]) {
      setText(row.lastChild, value);
      row.className = className;
    }
  }

  show(items) {
    this.#rows.show(items.map((item) => [item[0], item]));
  }
}
