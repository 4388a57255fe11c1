// The chart: what batching adds to each event's way, over the last twenty seconds. Drawn only while something moves.

const SPAN = 20_000; // milliseconds
const STEPS = [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000];
const MARGIN = { left: 46, right: 10, top: 18, bottom: 20 };

export class Chart {
  #canvas;
  #columns = []; // {at, delays}: one frame's events, drawn above each other
  #windows = []; // {at, ms}: the window from then on
  #drawn = -Infinity; // when
  #scheduled = false;
  #calm = matchMedia("(prefers-reduced-motion: reduce)");

  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.#draw(performance.now())).observe(canvas);
    for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) {
      matchMedia(query).addEventListener("change", () => this.#draw(performance.now()));
    }
  }

  add(at, delays) {
    this.#columns.push({ at, delays });
    this.#schedule();
  }

  setWindow(ms) {
    if (this.#windows.at(-1)?.ms === ms) return;
    this.#windows.push({ at: performance.now(), ms });
    this.#schedule();
  }

  clear() {
    this.#columns = [];
    this.#windows = this.#windows.slice(-1);
    this.#schedule();
  }

  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    const draw = () => requestAnimationFrame((now) => this.#turn(now));
    // With reduced motion, it moves once a second, and only if there is news.
    if (this.#calm.matches) setTimeout(draw, Math.max(0, 1000 - (performance.now() - this.#drawn)));
    else draw();
  }

  #turn(now) {
    this.#scheduled = false;
    const shift = ((now - this.#drawn) / SPAN) * this.#canvas.width;
    if (shift >= 1) this.#draw(now); // not before it has moved by a pixel
    if (shift < 1 || (this.#columns.length && !this.#calm.matches)) this.#schedule();
  }

  #draw(now) {
    this.#drawn = now;
    while (this.#columns.length && this.#columns[0].at < now - SPAN) this.#columns.shift();
    while (this.#windows.length > 1 && this.#windows[1].at < now - SPAN) this.#windows.shift();

    const canvas = this.#canvas;
    const ratio = devicePixelRatio;
    const { clientWidth: width, clientHeight: height } = canvas;
    const [pixelWidth, pixelHeight] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== pixelWidth || canvas.height !== pixelHeight) {
      Object.assign(canvas, { width: pixelWidth, height: pixelHeight });
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const color = (name) => style.getPropertyValue(name).trim();
    context.font = `12px ${style.fontFamily}`;

    const [left, right, bottom] = [MARGIN.left, width - MARGIN.right, height - MARGIN.bottom];
    let highest = 10;
    for (const { ms } of this.#windows) highest = Math.max(highest, ms);
    for (const { delays } of this.#columns) for (const delay of delays) highest = Math.max(highest, delay);
    const top = highest * 1.1;
    const x = (at) => right - ((now - at) / SPAN) * (right - left);
    const y = (delay) => bottom - (delay / top) * (bottom - MARGIN.top);

    this.#axes(context, color, { left, right, bottom, top, y });

    context.save();
    context.beginPath();
    context.rect(left, 0, right - left + 5, height);
    context.clip();
    this.#windowLine(context, color, { x, y, right }); // below the dots, so that it hides none
    const accent = color("--batched");
    context.strokeStyle = context.fillStyle = accent;
    context.lineWidth = 2;
    for (const { at, delays } of this.#columns) {
      const [low, high] = [Math.min(...delays), Math.max(...delays)];
      context.globalAlpha = 0.3;
      context.beginPath();
      context.moveTo(x(at), y(low));
      context.lineTo(x(at), y(high));
      context.stroke();
      context.globalAlpha = 1;
      context.beginPath();
      for (const delay of new Set(delays.map(Math.round))) {
        context.moveTo(x(at) + 2.5, y(delay));
        context.arc(x(at), y(delay), 2.5, 0, 2 * Math.PI);
      }
      context.fill();
    }
    context.restore();
  }

  #axes(context, color, { left, right, bottom, top, y }) {
    context.fillStyle = color("--soft");
    context.strokeStyle = color("--line");
    context.lineWidth = 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const step = STEPS.find((candidate) => top / candidate < 4) ?? top;
    for (let delay = 0; delay <= top; delay += step) {
      const level = Math.round(y(delay)) + 0.5;
      context.beginPath();
      context.moveTo(left, level);
      context.lineTo(right, level);
      context.stroke();
      context.fillText(delay ? delay.toLocaleString("en") : "0 ms", left - 6, level);
    }
    context.textBaseline = "alphabetic";
    context.fillText("now", right, bottom + 16);
    context.textAlign = "center";
    context.fillText("10 s ago", (left + right) / 2, bottom + 16);
    context.textAlign = "left";
    context.fillText("20 s ago", left, bottom + 16);
  }

  #windowLine(context, color, { x, y, right }) {
    if (!this.#windows.length) return;
    context.strokeStyle = color("--soft");
    context.lineWidth = 1.5;
    context.setLineDash([5, 4]);
    context.beginPath();
    this.#windows.forEach(({ at, ms }, index) => {
      const until = this.#windows[index + 1]?.at;
      if (index === 0) context.moveTo(0, y(ms));
      else context.lineTo(x(at), y(ms));
      context.lineTo(until === undefined ? right : x(until), y(ms));
    });
    context.stroke();
    context.setLineDash([]);
    const { ms } = this.#windows.at(-1);
    context.textAlign = "right";
    context.textBaseline = "bottom";
    const label = `the window: ${ms.toLocaleString("en")} ms`;
    context.fillStyle = color("--text");
    context.fillText(label, right - 2, y(ms) - 3);
  }
}
