// Runs the case that the URL names, and gives the page that has made this frame its error, or null.
import {cases} from "/cases.js";
import {close, context} from "/context.js";

const name = decodeURIComponent(location.hash.slice(1));
const uncaught = new Promise((_, reject) => {
  const fail = (event) => {
    if (!context.expectsErrors) reject(event.reason ?? event.error ?? event.message);
  };
  addEventListener("error", fail);
  addEventListener("unhandledrejection", fail);
});
document.addEventListener("securitypolicyviolation", (event) => {
  context.violations.push(event.violatedDirective);
});
const run = async () => {
  await cases.get(name)(context);
  if (context.violations.length) throw new Error(`violates ${context.violations}`);
};
const error = await Promise.race([run(), uncaught]).then(() => null, (reason) => `${reason}\n${reason?.stack}`);
close();
parent.postMessage(error && `${error}\n${context.notes.join("\n")}`, "*");
