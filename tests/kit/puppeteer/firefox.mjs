// Starts the Firefox of its argument, and prints the id of its process. Then each line of its input is [tab, what, value]:
// does this in the tab, and prints the JSON of [value, error].
import {createInterface} from "node:readline";
import puppeteer from "puppeteer-core";

const browser = await puppeteer.launch({browser: "firefox", executablePath: process.argv[2], headless: true});
const tabs = [];
const actions = {
  evaluate: (tab, expression) => tab.evaluate(expression),
  goto: (tab, url) => tab.goto(url, {waitUntil: "load"}).then(() => null),
  back: (tab) => tab.goBack({waitUntil: []}).then(() => null),
  front: (tab) => tab.bringToFront(),
  offline: (tab, value) => tab.setOfflineMode(value),
  close: (tab) => tab.close(),
};
const run = async ([number, action, value]) => {
  tabs[number] ??= await browser.newPage();
  return (await actions[action](tabs[number], value)) ?? null;
};
const lines = createInterface({input: process.stdin});
lines.on("close", async () => {  // also while an expression is evaluated that does not end
  await browser.close();
  process.exit();
});
console.log(browser.process().pid);
for await (const line of lines) {
  const answer = await run(JSON.parse(line)).then((value) => [value, null], (error) => [null, String(error)]);
  console.log(JSON.stringify(answer));
}
