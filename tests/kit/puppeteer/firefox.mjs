// Starts the Firefox of its argument. Each line of its input is [page, expression] or [page, null, url]: evaluates the
// expression in this page and prints the JSON of [value, error], or opens the page and prints [null, null].
import {createInterface} from "node:readline";
import puppeteer from "puppeteer-core";

const browser = await puppeteer.launch({browser: "firefox", executablePath: process.argv[2], headless: true});
const pages = [];
const run = async ([number, expression, url]) => {
  if (expression !== null) return (await pages[number].evaluate(expression)) ?? null;
  pages[number] = await browser.newPage();
  await pages[number].goto(url, {waitUntil: "load"});
  return null;
};
const lines = createInterface({input: process.stdin});
lines.on("close", async () => {  // also while an expression is evaluated that does not end
  await browser.close();
  process.exit();
});
for await (const line of lines) {
  const answer = await run(JSON.parse(line)).then((value) => [value, null], (error) => [null, String(error)]);
  console.log(JSON.stringify(answer));
}
