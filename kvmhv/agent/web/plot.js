// The moving plot of one running move: what remains, and how fast memory is sent and dirtied.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH_MIN = 280, LEFT = 78, RIGHT = 8, HEIGHT = 92, TOP = 22, GAP = 40;
const SAMPLES_MAX = 1200;
const WINDOW_S = 120;

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes >= 100 || Number.isInteger(bytes) ? Math.round(bytes) : bytes.toFixed(1)} ${UNITS[unit]}`;
}

function roundUp(value) {
  let unit = 1;
  while (value / unit >= 1024) unit *= 1024;
  for (const step of [1, 2, 5, 10, 20, 50, 100, 200, 500, 1024]) if (value <= step * unit) return step * unit;
  return value;
}

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// What the running phase has still to send, of disks or of memory.
export function left(move) {
  const bytes = move.phase === "storage" ? move.storage_total_bytes - move.storage_copied_bytes : move.remaining_bytes;
  return Math.max(0, bytes);
}

// What is known of a move over time. The passes that were complete before the page was opened are drawn from their
// figures, the rest from what the page has seen itself.
export class History {
  constructor(move, now) {
    this.samples = [];
    this.marks = [];
    this.passes = 0;
    let at = now - move.passes.reduce((sum, pass) => sum + pass.seconds, 0);
    let left = move.passes.length ? move.passes[0].sent_bytes : 0;
    for (const pass of move.passes) {
      this.samples.push({ at, left, sent: pass.bytes_per_second, dirty: pass.dirty_bytes_per_second });
      at += pass.seconds;
      this.samples.push({ at, left: 0, sent: pass.bytes_per_second, dirty: pass.dirty_bytes_per_second });
      this.marks.push(at);
      left = pass.remaining_bytes;
    }
    this.passes = move.passes.length;
  }

  add(move, now) {
    if (move.passes.length > this.passes) { this.marks.push(now); this.passes = move.passes.length; }
    this.samples.push({ at: now, left: left(move), sent: move.throughput_bytes_per_s, dirty: move.dirty_bytes_per_s });
    while (this.samples.length > SAMPLES_MAX || this.samples[0].at < now - WINDOW_S) this.samples.shift();
    while (this.marks.length && this.marks[0] < this.samples[0].at) this.marks.shift();
  }
}

// `alone`: disks move without the guest's memory, so nothing is dirtied.
export function draw(svg, history, name, alone) {
  const samples = history.samples;
  const width = Math.max(WIDTH_MIN, svg.clientWidth);
  const first = samples[0].at, last = samples[samples.length - 1].at;
  const span = Math.max(last - first, 1);
  const lower = TOP + HEIGHT + GAP;
  const topLeft = roundUp(Math.max(1, ...samples.map((one) => one.left)));
  const topRate = roundUp(Math.max(1, ...samples.map((one) => Math.max(one.sent, one.dirty))));
  const x = (at) => LEFT + (width - LEFT - RIGHT) * (at - first) / span;
  const line = (key, top, y) => samples.map((one, index) =>
    `${index ? "L" : "M"}${x(one.at).toFixed(1)} ${(y + HEIGHT * (1 - Math.min(1, one[key] / top))).toFixed(1)}`).join(" ");
  const remains = line("left", topLeft, TOP);
  const title = element("title", {}, `${name}: what remains and the rates, over the last ${Math.round(span)} seconds`);
  const parts = [];
  for (const [y, top, unit] of [[TOP, topLeft, ""], [lower, topRate, "/s"]]) {
    for (const share of [0, 0.5, 1]) {
      const at = y + HEIGHT * share;
      parts.push(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
      parts.push(element("text", { class: "end", x: LEFT - 8, y: at + 4 }, size(top * (1 - share)) + unit));
    }
  }
  for (const mark of history.marks) {
    parts.push(element("line", { class: "pass", x1: x(mark), x2: x(mark), y1: TOP, y2: lower + HEIGHT }));
  }
  parts.push(element("path", { class: "area", d: `${remains} L${x(last).toFixed(1)} ${TOP + HEIGHT} L${LEFT} ${TOP + HEIGHT} Z` }));
  parts.push(element("path", { class: "left", d: remains }));
  parts.push(element("path", { class: "sent", d: line("sent", topRate, lower) }));
  if (!alone) parts.push(element("path", { class: "dirty", d: line("dirty", topRate, lower) }));
  parts.push(element("text", { x: LEFT, y: 12 }, "remaining"));
  parts.push(element("text", { class: "key-sent", x: LEFT, y: lower - 12 }, "■ sent"));
  if (!alone) parts.push(element("text", { class: "key-dirty", x: LEFT + 66, y: lower - 12 }, "■ dirtied by the guest"));
  svg.setAttribute("height", lower + HEIGHT + 8);
  svg.setAttribute("viewBox", `0 0 ${width} ${lower + HEIGHT + 8}`);
  const drawn = element("g", { "aria-hidden": "true" }); // the title is the picture's name, the figures stand beside it
  drawn.append(...parts);
  svg.replaceChildren(title, drawn);
}
