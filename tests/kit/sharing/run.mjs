// Runs the cases, or walks at random: `node run.mjs SCRIPT cases [NAME...]` or `node run.mjs SCRIPT random SEED...`.
// Prints a line of JSON for each: [name, what is wrong or null].

import { readFileSync } from "node:fs";
import { cases as faults } from "./cases_faults.mjs";
import { cases as joining } from "./cases_joining.mjs";
import { cases as ofPage } from "./cases_page.mjs";
import { cases as silence } from "./cases_silence.mjs";
import { wander } from "./random.mjs";

const [path, what, ...names] = process.argv.slice(2);
const script = readFileSync(path, "utf8");

async function report(name, run) {
  const error = await run().catch((error) => error);
  console.log(JSON.stringify([name, error ? error.stack : null]));
}

if (what === "cases") {
  for (const [name, run] of Object.entries({ ...joining, ...faults, ...ofPage, ...silence })) {
    if (!names.length || names.includes(name)) await report(name, () => run(script));
  }
} else {
  for (const seed of names) await report(seed, () => wander(script, Number(seed)));
}
