// The dashboard: reads the feed, one JSON object a line, and shows it. Text goes into the page by textContent alone.

import { drawChart, SPAN_S } from "./chart.js";
import { BlockMap, USES } from "./pool.js";

const KEY = "jpaged-key";
const SHOWN = ["private", "shared", "pinned", "cached", "free", "reserved"];
const RETRY_S = 2;
const HEALTH = { ok: "good", compiling: "warn", draining: "warn" };

const find = (id) => document.getElementById(id);
const tell = (id, text) => { find(id).textContent = text; };
const count = (number) => Math.round(number).toLocaleString("en");
const blocks = (number) => `${count(number)} ${number === 1 ? "block" : "blocks"}`;
const short = (id) => (id.length > 28 ? `${id.slice(0, 16)}…${id.slice(-10)}` : id);
const percent = (number) => `${number.toFixed(number < 10 ? 1 : 0)} %`;

function seconds(value) {
  if (value === null) return "–";
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  return value < 0.9995 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit += 1) value /= 1024;
  return `${value.toFixed(value < 10 && unit ? 1 : 0)} ${units[unit]}`;
}

function make(tag, { className = "", text = "" } = {}) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// State --------------------------------------------------------------------------------------------------------------

let frame = null; // the newest
let pool = null; // of the newest frame that has one
let holders = null; // block -> the requests that hold it, made when first needed
let chosen = null; // id of a request
const history = [];
const rows = new Map();
const tip = find("tip");

function holdersOf(block) {
  if (holders === null) {
    holders = new Map();
    const add = (held, name) => {
      if (!holders.has(held)) holders.set(held, new Set());
      holders.get(held).add(name);
    };
    for (const request of pool.requests) for (const table of request.tables) for (const held of table) add(held, request.id);
    for (const [id, table] of Object.entries(pool.pins)) for (const held of table) add(held, `pinned prefix ${id}`);
  }
  return [...(holders.get(block) ?? [])];
}

function about(block) {
  const names = holdersOf(block);
  const list = names.slice(0, 6).join("\n") + (names.length > 6 ? `\nand ${names.length - 6} more` : "");
  return `Block ${block}: ${USES[pool.blocks[block]]}${list ? `\n${list}` : ""}`;
}

const device = new BlockMap(find("device"), tip, about, { height: 380 });
const host = new BlockMap(find("host"), tip, (i) => `Host block ${i}: ${USES[pool.host[i]]}`, { height: 90, mostCell: 11 });

find("device").addEventListener("click", (event) => {
  const block = device.at(event);
  const ids = new Set(pool.requests.map((request) => request.id));
  choose(block < 0 ? null : holdersOf(block).find((id) => ids.has(id)) ?? null);
});

// What is shown ------------------------------------------------------------------------------------------------------

function remember() {
  const stats = frame.stats;
  const before = history.findLast((point) => point.time < frame.time - 1.4) ?? history[0];
  const gained = before ? stats.num_output_tokens - before.tokens : 0;
  const rate = before && gained >= 0 ? gained / (frame.time - before.time) : null;
  history.push({ time: frame.time, tokens: stats.num_output_tokens, rate, ttft: frame.ttft, itl: frame.itl });
  while (history[0].time < frame.time - SPAN_S) history.shift();
}

function showNow() {
  const stats = frame.stats;
  const rate = history.at(-1).rate;
  tell("model", frame.model);
  tell("version", frame.version === "unknown" ? "" : `version ${frame.version}`);
  showHealth(frame.health, HEALTH[frame.health] ?? "bad");
  tell("rate", rate === null ? "–" : count(rate));
  tell("running", count(stats.num_running));
  const numWaiting = stats.num_waiting + frame.queued;
  tell("waiting", numWaiting ? `${count(numWaiting)} waiting` : "none waiting");
  tell("ttft", seconds(frame.ttft[0]));
  tell("ttft-high", `p99 ${seconds(frame.ttft[1])}`);
  tell("itl", seconds(frame.itl[0]));
  tell("itl-high", `p99 ${seconds(frame.itl[1])}`);
  tell("used", percent((100 * stats.num_used_blocks) / Math.max(stats.num_blocks, 1)));
  tell("used-of", `${count(stats.num_used_blocks)} of ${count(stats.num_blocks)} blocks`);
  tell("hits", percent(100 * stats.prefix_cache_hit_rate));
  tell("saved", percent(stats.saved_by_sharing_percent));
  tell("preemptions", count(stats.num_preemptions));
  tell("swaps", `${count(stats.num_swaps_out)} swapped out`);
}

function showHealth(state, className) {
  const badge = find("health");
  badge.className = `badge ${className}`;
  badge.textContent = state;
}

function showCharts() {
  const line = (read) => history.map((point) => [point.time, read(point)]);
  drawChart(find("rate-chart"), frame.time, { p50: line((point) => point.rate) }, count, { isFilled: true, least: 10 });
  for (const name of ["ttft", "itl"]) {
    const lines = { p99: line((point) => point[name][1]), p50: line((point) => point[name][0]) };
    drawChart(find(`${name}-chart`), frame.time, lines, seconds);
  }
}

function showPool() {
  const numbers = USES.map(() => 0);
  for (const use of pool.blocks) numbers[use] += 1;
  const legend = SHOWN.map((name) => {
    const use = USES.indexOf(name);
    const item = make("li");
    item.append(make("span", { className: `swatch use-${use}` }), make("span", { text: name }));
    item.append(make("b", { text: count(numbers[use]) }));
    return item;
  });
  find("legend").replaceChildren(...legend);
  const { num_blocks: numBlocks, num_copies_on_write: copies, num_host_blocks: numHost } = frame.stats;
  const size = `${count(numBlocks)} blocks of ${frame.block_size} tokens, ${bytes(frame.block_bytes)} each`;
  const waste = `${percent(frame.stats.internal_waste_percent)} of used slots empty`;
  tell("pool-note", `${size} · ${waste} · ${count(copies)} copied on write`);
  const request = pool.requests.find((each) => each.id === chosen);
  const own = request && new Set(request.tables.flat());
  device.draw(pool.blocks, own ? (i) => own.has(i) : null);
  find("device").setAttribute("aria-label", SHOWN.map((name) => `${numbers[USES.indexOf(name)]} ${name}`).join(", "));
  find("host-part").hidden = !numHost;
  if (numHost) {
    const { num_host_used_blocks: used, num_host_cached_blocks: cached } = frame.stats;
    tell("host-note", `${count(used)} used and ${count(cached)} cached of ${count(numHost)} blocks`);
    host.draw(pool.host);
  }
}

function showRequests() {
  const { requests, num_requests: total } = pool;
  const kept = new Set(requests.map((request) => request.id));
  for (const id of [...rows.keys()]) if (!kept.has(id)) rows.delete(id);
  const shown = requests.map((request) => {
    const row = rows.get(request.id) ?? makeRow(request.id);
    const held = new Set(request.tables.flat());
    const shared = [...held].filter((block) => pool.blocks[block] >= "4").length;
    const cached = request.cached === null ? "–" : count(request.cached);
    const numbers = [count(request.prompt), cached, count(request.output), count(held.size), count(shared)];
    const badge = row.children[1].firstChild;
    badge.textContent = request.state;
    badge.className = `badge ${request.state === "running" ? "good" : request.state === "preempted" ? "warn" : ""}`;
    [...numbers, count(request.preemptions)].forEach((text, i) => { row.children[i + 2].textContent = text; });
    row.className = request.id === chosen ? "chosen" : "";
    row.setAttribute("aria-selected", String(request.id === chosen));
    return row;
  });
  const body = find("rows");
  if (shown.length !== body.children.length || shown.some((row, i) => row !== body.children[i])) {
    const focused = document.activeElement;
    body.replaceChildren(...shown);
    if (body.contains(focused)) focused.focus();
  }
  find("idle").hidden = total > 0;
  const inEngine = total > requests.length ? `the first ${count(requests.length)} of ${count(total)}` : count(total);
  tell("requests-note", frame.queued ? `${inEngine} in the engine, ${count(frame.queued)} more queue` : inEngine);
}

function makeRow(id) {
  const row = make("tr");
  row.tabIndex = 0;
  const name = make("td", { text: short(id) });
  name.title = id;
  const state = make("td");
  state.append(make("span", { className: "badge" }));
  row.append(name, state, ...Array.from({ length: 6 }, () => make("td", { className: "number" })));
  row.addEventListener("click", () => choose(chosen === id ? null : id));
  row.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(chosen === id ? null : id);
    }
  });
  rows.set(id, row);
  return row;
}

let maps = []; // of the sequences of the chosen request

function showDetail() {
  const request = pool.requests.find((each) => each.id === chosen);
  find("close").hidden = find("detail-body").hidden = request === undefined;
  find("detail-hint").hidden = request !== undefined;
  tell("detail-title", request ? request.id : "One request");
  if (!request) {
    tell("detail-hint", chosen === null ? "Choose a request to see its blocks, and with whom it shares them." :
      "The request has ended. Choose another to see its blocks.");
    return;
  }
  tell("detail-facts", `${request.state} · ${count(request.prompt)} prompt tokens, ${count(request.cached ?? 0)} of ` +
    `them from the prefix cache · ${count(request.output)} output tokens · priority ${request.priority}`);
  while (maps.length > request.tables.length) maps.pop();
  while (maps.length < request.tables.length) maps.push(makeTable(maps.length));
  find("tables").replaceChildren(...maps.map((each) => each.part));
  request.tables.forEach((table, i) => {
    maps[i].table = table;
    const private_ = table.filter((block) => pool.blocks[block] === "3").length;
    maps[i].title.textContent = `Sequence ${i}: ${blocks(table.length)}, ${count(private_)} of them its own`;
    maps[i].map.draw(table.map((block) => pool.blocks[block]).join(""));
  });
  showSharers(request);
}

function makeTable(i) {
  const entry = { part: make("div"), title: make("h3"), table: [] };
  const frame_ = make("div", { className: "map" });
  const canvas = make("canvas");
  frame_.append(canvas);
  entry.part.append(entry.title, frame_);
  entry.map = new BlockMap(canvas, tip, (at) => `Logical block ${at}\n${about(entry.table[at])}`, { height: 150 });
  return entry;
}

function showSharers(request) {
  const numbers = new Map();
  for (const block of new Set(request.tables.flat())) {
    for (const name of holdersOf(block)) if (name !== request.id) numbers.set(name, (numbers.get(name) ?? 0) + 1);
  }
  const ids = new Set(pool.requests.map((each) => each.id));
  const sharers = [...numbers].sort((a, b) => b[1] - a[1]).map(([name, number]) => {
    const item = make("li");
    const button = make("button");
    button.type = "button";
    button.append(make("span", { text: short(name) }), make("span", { className: "muted", text: blocks(number) }));
    button.title = name;
    button.disabled = !ids.has(name);
    button.addEventListener("click", () => choose(name));
    item.append(button);
    return item;
  });
  find("sharers").replaceChildren(...sharers);
  find("alone").hidden = sharers.length > 0;
}

function choose(id) {
  chosen = id;
  maps = [];
  if (pool) show();
}

function show() {
  showNow();
  showCharts();
  if (!pool) return;
  showPool();
  showRequests();
  showDetail();
}

function take(line) {
  frame = JSON.parse(line);
  if (frame.pool) {
    pool = frame.pool;
    holders = null;
  }
  remember();
  find("main").hidden = false;
  show();
}

// The feed -----------------------------------------------------------------------------------------------------------

class Refused extends Error {}

// A server that loads its model has no feed yet, but health that tells how far it is.
async function showProgress(status, headers) {
  const health = await (await fetch("/health", { headers })).json();
  const isLoading = health.state === "loading" || health.state === "compiling";
  showHealth(health.state ?? `status ${status}`, isLoading ? "warn" : "bad");
  const unit = health.state === "loading" ? (number) => bytes(number) : count;
  tell("progress", isLoading && health.of ? `${unit(health.done)} of ${unit(health.of)}` : "");
}

async function readFeed() {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch("/dashboard/feed", { headers });
  if (response.status === 401 || response.status === 403) throw new Refused();
  find("key-form").hidden = true;
  find("forget").hidden = !key;
  if (!response.ok) return showProgress(response.status, headers);
  tell("progress", "");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    const newest = lines.at(-1);
    if (newest) take(newest);
  }
}

async function follow() {
  for (;;) {
    try {
      await readFeed();
    } catch (error) {
      if (error instanceof Refused) return askForKey();
      showHealth("unreachable", "bad");
    }
    await new Promise((resolve) => { setTimeout(resolve, RETRY_S * 1000); });
  }
}

function askForKey() {
  tell("key-error", sessionStorage.getItem(KEY) ? "The server does not know this key." : "");
  sessionStorage.removeItem(KEY);
  showHealth("locked", "warn");
  find("main").hidden = find("forget").hidden = true;
  find("key-form").hidden = false;
  find("key").focus();
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("key").value);
  find("key").value = "";
  follow();
});
find("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
find("close").addEventListener("click", () => choose(null));
window.addEventListener("resize", () => { if (frame) show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (frame) show(); });
follow();
