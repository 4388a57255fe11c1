// Takes {"node": {"urls": ..., ...}, "eventsource2": ...} from its input, and prints what `collect` reports of each.
import {readFileSync} from "node:fs";
import {collect} from "./collect.mjs";

const jobs = Object.entries(JSON.parse(readFileSync(0)));
const alive = setInterval(() => {}, 1000);  // while Node's own waits to return, nothing else keeps the process running
await Promise.all(jobs.map(async ([name, job]) => {
  const found = name === "node" ? globalThis : await import(name);
  const report = (url, event) => process.stdout.write(JSON.stringify([name, url, event]) + "\n");
  await collect(found.EventSource ?? found.default, job, report);
}));
clearInterval(alive);
process.exit();  // whatever connection is left
