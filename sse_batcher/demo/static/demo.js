// The demo: the same events on two live streams, one batched as the sliders say, and what that saves and costs.

import { Chart } from "./chart.js";
import { Comparison } from "./comparison.js";
import { clock, ms } from "./rows.js";
import { Side } from "./side.js";

const APPLY_AFTER_MS = 100; // a slider at rest
const PAINT_EVERY_MS = 100;
const GLOW_AFTER_MS = 250;
const SETTLE_MS = 150; // a burst is one sentence
const SPEAK_EVERY_MS = 1000; // and a stream of events one a second
const GIVE_UP_MS = 5000;

const $ = (id) => document.getElementById(id);
const sliders = { window: $("window"), size: $("size") };
const saving = $("saving");
const chart = new Chart($("chart"));
const comparison = new Comparison();
let begun = false; // both streams were open once
let missed = ""; // why events were, before the count began
let failure = ""; // what went wrong with the last button

// -- the streams -----------------------------------------------------------------------------------------------------

// The plain stream is opened first: then whatever the batched one brings was brought by the plain one, too.
const plain = side("plain", (gap) => {
  missed = gap;
  comparison.renumber();
  openBatched();
});
const batched = side("batched", (gap) => {
  missed ||= gap;
  if (plain.state === "open") begin();
});

function side(name, opened) {
  const made = new Side(name, {
    opened,
    changed() {
      if (made.state !== "open") comparison.stop();
      speak();
    },
    received(frame) {
      frame.clock = clock();
      const before = comparison[name].frames;
      const known = name === "plain" ? comparison.addPlain(frame) : comparison.addBatched(frame);
      const delays = new Map(known);
      if (delays.size) chart.add(frame.at, [...delays.values()]);
      made.rows.addFrame(frame, name === "plain" ? null : delays);
      if (comparison[name].frames > before) made.cards.addFrame(frame); // they show what is counted
      changed();
    },
  });
  return made;
}

function openBatched() {
  batched.open(`/events?window=${sliders.window.value}&size=${sliders.size.value}`);
}

/** Both are open: the count begins, on both sides, for the setting of now. */
function begin() {
  startCount();
  chart.setWindow(sliders.window.valueAsNumber);
  const before = missed && `; something was missed before (${missed})`;
  for (const { rows } of [batched, plain]) rows.addNote(`Counted from here: ${setting()}${before}`);
  begun = true;
  missed = failure = "";
  changed();
}

/** Count from zero, and forget what the servers reported before: the other side may have missed it. */
function startCount() {
  comparison.start();
  for (const { cards } of [batched, plain]) cards.clear();
}

// -- what is shown ---------------------------------------------------------------------------------------------------

let painting = false;
let painted = -Infinity;

/** Show the numbers and rows, ten times a second at most, and then say it in words. */
function changed() {
  speak();
  if (painting) return;
  painting = true;
  setTimeout(() => requestAnimationFrame(paint), Math.max(0, painted + PAINT_EVERY_MS - performance.now()));
}

function paint(now) {
  painting = false;
  // What comes without pause would glow without pause.
  const glowing = now - painted > GLOW_AFTER_MS;
  painted = now;
  const most = Math.max(batched.cards.drawn, plain.cards.drawn);
  for (const { name, rows, cards, counts } of [batched, plain]) {
    rows.paint(glowing);
    cards.paint(most);
    const shown = { ...comparison[name], replaced: comparison.replaced };
    for (const cell of counts) cell.textContent = number(shown[cell.dataset.count]);
  }
}

let speaking = false;
let spoke = -Infinity;

/** Say it in words, once a second at most: screen readers read it out. */
function speak() {
  if (speaking) return;
  speaking = true;
  setTimeout(sayNow, Math.max(SETTLE_MS, spoke + SPEAK_EVERY_MS - performance.now()));
}

function sayNow() {
  speaking = false;
  spoke = performance.now();
  comparison.forget(spoke - sliders.window.valueAsNumber - GIVE_UP_MS);
  const parts = problem() ? [problem()] : summary();
  if (saving.textContent !== parts.join("")) {
    saving.replaceChildren(...parts.map((part, index) => (index % 2 ? strong(part) : part)));
  }
  saving.classList.toggle("failed", Boolean(problem()));
  const delays = delaysInWords();
  $("delay").textContent = delays;
  $("chart").setAttribute("aria-label", `Delay of each event in the last 20 seconds. ${delays}`);
}

function problem() {
  const lost = [batched, plain].some(({ state }) => state === "lost");
  return lost ? "The connection is lost. The streams come back by themselves when the server does." : failure;
}

/** The sentence, in parts. Each second one is strong. */
function summary() {
  if (!begun) return ["Connecting."];
  const { batched: sent, settled, replaced } = comparison;
  if (!settled.frames) return ["Press a button. Both sides get the same events: one side batched, the other not."];
  if (sent.frames === settled.frames) {
    return [`Nothing saved: each event had a frame of its own, ${count(sent.frames, "frame")} on both sides.`];
  }
  const instead = (name) => ` (${number(sent[name])} instead of ${number(settled[name])})`;
  return [
    "Batching: ",
    fewer(sent.frames, settled.frames, "frames"),
    `${instead("frames")} and `,
    fewer(sent.bytes, settled.bytes, "bytes"),
    `${instead("bytes")}.`,
    replaced ? ` ${count(replaced, "event")}` : "",
    replaced ? " gave way to newer ones." : "",
  ];
}

function fewer(now, before, what) {
  const saved = Math.trunc(100 * (1 - now / before));
  return `${Math.abs(saved)} % ${saved < 0 ? "more" : "fewer"} ${what}`;
}

function delaysInWords() {
  const { delays } = comparison;
  if (!delays.length) return "No event yet.";
  const sorted = Float64Array.from(delays).sort();
  return `${count(sorted.length, "event")}: median ${ms(sorted[sorted.length >> 1])}, longest ${ms(sorted.at(-1))}.`;
}

function count(many, what) {
  return `${number(many)} ${what}${many === 1 ? "" : "s"}`;
}

function number(value) {
  return value.toLocaleString("en");
}

function strong(text) {
  const made = document.createElement("strong");
  made.textContent = text;
  return made;
}

// -- what can be pressed and moved -----------------------------------------------------------------------------------

for (const button of document.querySelectorAll("button[data-action]")) {
  let playing = 0;
  button.addEventListener("click", async () => {
    for (const { rows } of [batched, plain]) rows.follow();
    playing += 1;
    button.setAttribute("aria-busy", "true");
    failure = await play(button.dataset.action);
    playing -= 1;
    if (!playing) button.removeAttribute("aria-busy");
    speak();
  });
}

/** Returns what went wrong, "" if nothing did. */
async function play(scenario) {
  try {
    // The server takes nothing but questions without this header, and no foreign page can send it.
    const headers = { "X-Requested-With": "sse_batcher" };
    const answer = await fetch(`/play/${scenario}`, { method: "POST", headers });
    return answer.ok ? "" : `This was not played: the server answers ${answer.status}.`;
  } catch {
    return "This was not played: the server does not answer.";
  }
}

$("clear").addEventListener("click", () => {
  for (const { rows } of [batched, plain]) rows.clear();
  chart.clear();
  failure = "";
  if (comparison.running) startCount();
  changed();
});

for (const button of document.querySelectorAll("button.skip")) {
  button.addEventListener("click", () => $(button.dataset.to).focus());
}

let applying = 0;

for (const slider of Object.values(sliders)) {
  slider.addEventListener("input", () => {
    showSetting();
    clearTimeout(applying);
    applying = setTimeout(apply, APPLY_AFTER_MS);
  });
}

$("reset").addEventListener("click", () => {
  for (const slider of Object.values(sliders)) slider.value = slider.defaultValue;
  showSetting();
  apply();
});

/** Open the batched stream as the sliders say now. If the plain one is not open, that will do it when it opens. */
function apply() {
  if (plain.state === "open") openBatched();
}

function setting() {
  const size = sliders.size.valueAsNumber;
  return size === 1 ? "no batching" : `${ms(sliders.window.valueAsNumber)}, at most ${count(size, "event")}`;
}

function showSetting() {
  const size = sliders.size.valueAsNumber;
  const window = sliders.window.valueAsNumber;
  sliders.window.setAttribute("aria-valuetext", `${window} milliseconds`);
  sliders.size.setAttribute("aria-valuetext", size === 1 ? "1 event, no batching" : `${size} events`);
  $("window-shown").textContent = ms(window);
  $("size-shown").textContent = size === 1 ? "off" : count(size, "event");
  $("setting").textContent = setting();
}

showSetting();
plain.open("/events?window=1&size=1");
