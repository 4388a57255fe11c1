// Numbers, sizes, times and users as people read them. Pure.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const count = (number) => whole.format(number);

/** A number for each second: with a digit after the point while it is small. */
export const rate = (number) => (number < 10 ? short.format(number) : whole.format(number));

export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; Math.abs(bytes) >= 1000 && unit < units.length - 1; unit++) bytes /= 1000;
  return `${unit === 0 ? whole.format(bytes) : short.format(bytes)} ${units[unit]}`;
}

export function time(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${short.format(seconds)} s`;
  if (seconds < 120) return `${whole.format(seconds)} s`;
  if (seconds < 7200) return `${whole.format(seconds / 60)} min`;
  return seconds < 172_800 ? `${whole.format(seconds / 3600)} h` : `${whole.format(seconds / 86_400)} days`;
}

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

// Characters that are not seen, are seen as a space, or turn others round.
const HIDDEN =
  /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u00a0\u115f\u1160\u1680\u2000-\u200a\u202f\u205f\u2800\u3000\u3164\uffa0]/gu;

/**
 * A user, which comes as JSON. No two users look the same: 7 and "7" are two, so a text is shown without its quotes only
 * if it could not be taken for a number, for JSON, or for a text with characters that are written out.
 */
export function user(json) {
  if (!json.startsWith('"')) return json;
  const text = JSON.parse(json);
  const isPlain = /^[^\s"\\]([^\\]*[^\s\\])?$/u.test(text) && !/^-?\d+$/.test(text) && text === visible(text);
  return isPlain ? text : visible(JSON.stringify(text));
}

/** A text with such characters written out. */
export function visible(text) {
  return text.replace(HIDDEN, (character) =>
    `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** The same for several lines: their ends stay. */
export const visibleLines = (text) => text.split("\n").map(visible).join("\n");
