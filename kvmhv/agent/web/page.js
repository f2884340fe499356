// The live page: what /web/live sends is put into the page in place, so that focus and reading position stay.

import { History, draw, left, size } from "./plot.js";

const $ = (id) => document.getElementById(id);
const histories = new Map();
const phases = new Map();
let stream = null;

// --- small things

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function put(parent, selector, text) {
  const found = parent.querySelector(selector);
  if (found.textContent !== text) found.textContent = text;
}

function seconds(value) {
  if (value === null || value === undefined) return "-";
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(value % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const milliseconds = (value) => value === null || value === undefined ? "-"
  : value < 10000 ? `${Math.round(value)} ms` : seconds(value / 1000);

// Keep one child for each item, by key and in order; a child that stays is changed, not replaced.
function keep(parent, items, keyOf, create, change) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, place) => {
    const key = keyOf(item);
    const child = known.get(key) ?? create(item);
    child.dataset.key = key;
    known.delete(key);
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
    change(child, item);
  });
  for (const gone of known.values()) gone.remove();
}

// For screen readers: each is said once, also when several things happen at once.
function tell(text) {
  $("told").append(make("p", {}, text));
  while ($("told").children.length > 5) $("told").firstChild.remove();
}

// --- what did not have to be sent

// A line for each thing that travels: its size, what was sent of it, and why the rest was not.
function savings(move) {
  const disks = (move.savings ?? []).map((one) => saving(one.disk, one.size_bytes, one.sent_bytes, {
    "the target has the base": one.base_bytes, "never stored": one.unallocated_bytes, "zeros": one.zero_bytes }));
  // What a guest's pages come to depends on how often they were sent: there is no size to hold it against.
  const memory = move.memory_zero_bytes
    ? [saving("memory", null, move.memory_bytes, { "pages of zeros": move.memory_zero_bytes })] : [];
  return [...disks, ...memory];
}

function saving(of, size_bytes, sent_bytes, reasons) {
  const known = Object.entries(reasons).filter(([, bytes]) => bytes);
  return { of, size_bytes, sent_bytes, not_bytes: known.reduce((sum, [, bytes]) => sum + bytes, 0),
    why: known.map(([why, bytes]) => `${size(bytes)}: ${why}`).join(", ") };
}

const notSent = (lines) => lines.length ? size(lines.reduce((sum, one) => sum + one.not_bytes, 0)) : "-";

// --- running moves

const DISKS = [["left", "Time left"], ["remain", "Remaining"], ["rate", "Sent"]];
const FIGURES = [...DISKS, ["pass", "Pass"], ["dirty", "Dirtied"], ["blackout", "Blackout expected"]];

// A storage move goes from one location to another of its host.
function ends(move) {
  if (move.mode !== "storage") return [move.source, move.target];
  const places = (layers) => [...new Set(move.disks.map((copy) => copy[layers][0].location))].join(", ");
  return [`${move.source}/${places("source_layers")}`, `${move.target}/${places("target_layers")}`];
}

function newMove(move) {
  const figures = make("dl", { class: "figures" });
  const [from, to] = ends(move);
  for (const [key, name] of move.mode === "storage" ? DISKS : FIGURES) figures.append(make("div", {}, make("dt", {}, name), make("dd", { class: `f-${key}` })));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("role", "img");
  const card = make("article", { class: "move", "aria-label": `${move.vm}, ${from} to ${to}` },
    make("header", {}, make("h2", {}, `${move.vm} `, make("span", { class: "way" }, `${from} → ${to}`)),
      make("span", { class: "phase" })),
    make("div", { class: "bar", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100", "aria-label": `Progress of ${move.vm}` },
      make("div")),
    figures, make("p", { class: "expectation" }), make("ul", { class: "saved", "aria-label": `What of ${move.vm} is not sent` }));
  card.append(svg);
  card.dataset.vm = move.vm;
  card.dataset.alone = move.mode === "storage" ? "yes" : "";
  return card;
}

function changeMove(card, move) {
  const now = performance.now() / 1000;
  if (!histories.has(move.id)) histories.set(move.id, new History(move, now));
  const history = histories.get(move.id);
  if (move.phase === "storage" || move.phase === "memory") history.add(move, now);
  const percent = Math.round(move.progress * 100);
  const bar = card.querySelector(".bar");
  bar.setAttribute("aria-valuenow", String(percent));
  bar.setAttribute("aria-valuetext", `${percent} percent, ${move.phase}`);
  bar.firstChild.style.width = `${move.progress * 100}%`;
  bar.firstChild.className = move.phase;
  const running = move.phase === "memory" && !move.switchover;
  const stands = move.outcome === "needs-operator";
  card.classList.toggle("stands", stands);
  put(card, ".phase", stands ? "needs the operator" : `${move.phase}, ${percent} %`);
  const seen = move.estimate;
  put(card, ".f-left", seen ? `about ${seconds(seen.seconds_likely)}` : "-");
  put(card, ".f-remain", size(left(move)));
  put(card, ".f-rate", `${size(move.throughput_bytes_per_s)}/s`);
  const alone = move.mode === "storage";
  if (!alone) {
    put(card, ".f-pass", running ? `${move.passes.length + 1}` : move.passes.length ? `${move.passes.length} complete` : "-");
    put(card, ".f-dirty", `${size(move.dirty_bytes_per_s)}/s`);
    put(card, ".f-blackout", seen ? milliseconds(seen.blackout_ms) : "-");
  }
  const limit = seen !== null && seen.switchover === "pass-limit";
  const expectation = card.querySelector(".expectation");
  expectation.classList.toggle("limit", limit);
  const low = seen ? `between ${seconds(seen.seconds_low)} and ${seconds(seen.seconds_high)} left` : "";
  const todo = move.error?.todo ? ` What to do: ${move.error.todo}` : "";
  const lacks = move.phase === "pages" && move.pages
    ? `it runs on ${move.target}, pages that it lacks follow from ${move.source}: ${size(move.pages.sent_bytes)} so far` : "";
  put(card, ".expectation", lacks && !move.reason ? lacks : move.reason ? `${move.reason}.${todo}` : (seen && !alone
    ? `${low}; ${limit ? "the guest dirties too fast: the pass limit" : "the threshold"} will end the passes after pass ${seen.passes}`
    : low));
  const lines = savings(move).filter((one) => one.not_bytes);
  card.querySelector(".saved").hidden = lines.length === 0;
  keep(card.querySelector(".saved"), lines, (one) => one.of, () => make("li"), (item, one) => {
    const whole = one.size_bytes === null ? "" : ` of ${size(one.size_bytes)}`;
    const text = `${one.of}: ${size(one.not_bytes)}${whole} did not have to be sent (${one.why})`;
    if (item.textContent !== text) item.textContent = text;
  });
  const svg = card.querySelector("svg");
  svg.classList.toggle("empty", stands || history.samples.length < 2);
  if (history.samples.length > 1) draw(svg, history, move.vm, alone);
  const nowIn = stands ? "needs the operator" : `${move.phase} phase`;
  if (phases.get(move.id) !== nowIn) {
    phases.set(move.id, nowIn);
    if (move.phase !== "cleanup" || stands) tell(`${move.vm}: ${nowIn}`); // its end is told at once after that
  }
}

// --- moves that wait

function changeQueued(line, move) {
  const [from, to] = ends(move);
  const why = move.queue.reason || "being tried";
  put(line, ".who", `${move.vm} `);
  put(line, ".way", `${from} → ${to}`);
  put(line, ".why", `${why}; until ${new Date(move.queue.until * 1000).toLocaleTimeString()} at most`);
}

const newQueued = () => make("li", {}, make("strong", { class: "who" }), make("span", { class: "way" }), make("p", { class: "why soft" }));

// --- hosts, VMs, last moves

function newHost(host) { return make("article", { class: "host", "aria-label": host.name }, make("h3"), make("p", { class: "what" }), make("p", { class: "more" })); }

function changeHost(card, host) {
  card.className = `host ${host.problem ? "away" : host.view ? "" : "unknown"}`;
  put(card, "h3", host.own ? `${host.name} (this host)` : host.name);
  const view = host.view;
  const running = view ? view.vms.filter((vm) => vm.state === "running").length : 0;
  put(card, ".what", host.problem ? `cannot be reached: ${host.problem}` : !view ? "not asked yet"
    : `${running} of ${view.vms.length} VMs run`);
  const open = (direction) => view.moves.filter((move) => move.direction === direction).length;
  put(card, ".more", !view ? host.address : !view.enabled ? "takes no part in moves"
    : `moves out ${open("out")} of ${view.slots_out}, in ${open("in")} of ${view.slots_in}; kvmhv ${view.version}`);
}

function row(count, figures) {
  return () => make("tr", {}, ...Array.from({ length: count }, (_, place) =>
    place === 0 ? make("th", { scope: "row" }) : make("td", figures.includes(place) ? { class: "figure" } : {})));
}

function cells(line, values) {
  values.forEach((value, place) => {
    const cell = line.children[place];
    if (Array.isArray(value)) {
      const [text, kind] = value;
      if (cell.textContent !== text) cell.replaceChildren(make("span", { class: `badge ${kind}` }, text));
    } else if (cell.textContent !== value) cell.textContent = value;
  });
}

function show(page) {
  const views = page.hosts.filter((host) => host.view).map((host) => host.view);
  put(document, "#own-host", `on ${page.hosts[0].name}`);
  document.title = `kvmhv on ${page.hosts[0].name}`;
  const moves = once(views.flatMap((view) => view.moves));
  $("no-moves").hidden = moves.length > 0;
  for (const id of histories.keys()) {
    if (!moves.some((move) => move.id === id)) { histories.delete(id); phases.delete(id); }
  }
  keep($("moves"), moves, (move) => move.id, newMove, changeMove);
  const queued = views.flatMap((view) => view.queued ?? []);
  $("queue-part").hidden = queued.length === 0;
  keep($("queue"), queued, (move) => move.id, newQueued, changeQueued);
  keep($("hosts"), page.hosts, (host) => host.name, newHost, changeHost);
  const vms = views.flatMap((view) => view.vms).sort((a, b) => a.name.localeCompare(b.name) || a.host.localeCompare(b.host));
  keep($("vms"), vms, (vm) => `${vm.host}/${vm.id}`, row(5, [3, 4]), (line, vm) =>
    cells(line, [vm.name, [vm.state, vm.state], vm.host, size(vm.memory_bytes), String(vm.cpus)]));
  const last = once(views.flatMap((view) => view.last)).sort((a, b) => b.started_at - a.started_at).slice(0, 20);
  keep($("last"), last, (move) => move.id, row(11, [4, 5, 6, 7, 8, 9]), (line, move) => {
    if (!line.dataset.told) { line.dataset.told = "yes"; if (shownBefore) tell(`${move.vm}: move ${move.outcome}`); }
    cells(line, [move.vm, ...ends(move), [move.outcome, move.outcome], milliseconds(move.blackout_ms),
      milliseconds(move.network_gap_ms), milliseconds(move.answer_gap_ms), String(move.passes.length), notSent(savings(move)),
      seconds(move.ended_at === null ? null : move.ended_at - move.started_at), new Date(move.started_at * 1000).toLocaleString()]);
  });
  const saved = last.flatMap((move) => savings(move).map((one) => ({ ...one, move })));
  $("saved-part").hidden = saved.length === 0;
  keep($("saved"), saved, (one) => `${one.move.id}/${one.of}`, row(7, [2, 3, 4]), (line, one) =>
    cells(line, [one.move.vm, one.of, one.size_bytes === null ? "-" : size(one.size_bytes), one.sent_bytes === null ? "-" : size(one.sent_bytes),
      size(one.not_bytes), one.why || "-", new Date(one.move.started_at * 1000).toLocaleString()]));
  shownBefore = true;
}

let shownBefore = false;

// A move is seen by both hosts. The source knows more while it runs; after it the one that knows the network gap. The
// source alone knows what did not have to be sent, and the guest's first answer.
function once(moves) {
  const found = new Map();
  for (const move of moves) {
    const known = found.get(move.id);
    const better = !known || (move.ended_at === null ? move.direction === "out" : known.network_gap_ms === null);
    const [one, other] = better ? [{ ...move }, known] : [known, move];
    one.answer_gap_ms ??= other?.answer_gap_ms;
    if (!one.savings?.length) one.savings = other?.savings;
    one.memory_zero_bytes ??= other?.memory_zero_bytes;
    found.set(move.id, one);
  }
  return [...found.values()];
}

// The plots are as wide as their cards: turned telephones and pulled windows get new ones at once.
let drawnWidth = 0;
new ResizeObserver(() => {
  if ($("moves").clientWidth === drawnWidth) return;
  drawnWidth = $("moves").clientWidth;
  for (const card of $("moves").children) {
    const history = histories.get(card.dataset.key);
    if (history && history.samples.length > 1) draw(card.querySelector("svg"), history, card.dataset.vm, card.dataset.alone === "yes");
  }
}).observe($("moves"));

// --- the connection

function state(kind, text) {
  $("state").className = kind;
  put(document, "#state", text);
}

function askToken() {
  stream?.close();
  stream = null;
  state("", "not signed in");
  $("page").hidden = true;
  $("logout").hidden = true;
  $("login").hidden = false;
  $("token").focus();
}

async function begin() {
  const answer = await fetch("/web/page").catch(() => null);
  if (answer === null || answer.status >= 500) {
    state("lost", "the agent does not answer");
    setTimeout(begin, 2000);
    return;
  }
  if (!answer.ok) { askToken(); return; }
  $("login").hidden = true;
  $("page").hidden = false;
  const page = await answer.json();
  $("logout").hidden = !page.by_cookie;
  show(page);
  listen();
}

function listen() {
  stream?.close();
  stream = new EventSource("/web/live");
  stream.addEventListener("page", (event) => { state("live", "live"); show(JSON.parse(event.data)); });
  stream.addEventListener("open", () => state("live", "live"));
  stream.addEventListener("error", () => {
    state("lost", "connection lost, trying again");
    if (stream.readyState === EventSource.CLOSED) setTimeout(begin, 1000);
  });
}

$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  put(document, "#login-problem", "");
  const body = JSON.stringify({ token: $("token").value });
  const answer = await fetch("/web/session", { method: "POST", headers: { "Content-Type": "application/json" }, body }).catch(() => null);
  if (answer === null) { put(document, "#login-problem", "The agent does not answer."); return; }
  if (!answer.ok) { put(document, "#login-problem", "This token is not valid here."); $("token").select(); return; }
  $("token").value = "";
  await begin();
  $("content").focus({ preventScroll: true });
});

$("logout").addEventListener("click", async () => {
  await fetch("/web/session", { method: "DELETE" }).catch(() => null);
  askToken();
});

begin();
