"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const FACETS = ["family", "from", "made"], MOST_CHOSEN = 8;
const SHAPES = ["m-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "m-4,-4h8v8h-8z", "m0,-5l5,5l-5,5l-5,-5z", "m0,-5l5,9h-10z"];
const FIVE = [1, 2, 5, 10, 30], MINUTE = 60, HOUR = 3600, DAY = 86400;
const TIMES = [...FIVE, ...FIVE.map(v => v * MINUTE), ...FIVE.slice(0, 4).map(v => v * HOUR), ...FIVE.map(v => v * DAY)];
const COUNTS = [...Array(20).keys()].map(e => 2 ** e);

let chosen = null;  // places of the models in colour; null: those that `leaders` gives
let order = null;  // of the table by steps: { column, up }; null: as the page was made

function make(parent, name, attributes = {}, text) {
  const node = document.createElementNS(parent.namespaceURI, name);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}
function mark(parent, place) {  // the symbol of a chosen model
  const svg = parent.insertBefore(document.createElementNS("http://www.w3.org/2000/svg", "svg"), parent.firstChild);
  svg.setAttribute("viewBox", "-6 -6 12 12");
  svg.setAttribute("aria-hidden", "true");
  if (place >= 0) make(svg, "path", { d: "M0,0" + shape(place), fill: colour(place) });
}
const colour = place => `var(--c${place % 8})`;
const shape = place => SHAPES[(place + Math.floor(place / 8)) % 4];
const stepsText = n => n === null ? "pictures" : `${n} step${n > 1 ? "s" : ""}`;
const duration = s => s < 60 ? `${+s.toPrecision(2)} s` : s < HOUR ? `${Math.round(s / 6) / 10} min`
  : s < DAY ? `${Math.round(s / 360) / 10} h` : `${Math.round(s / 8640) / 10} d`;
const cost = (metric, v) => metric.best.startsWith("lower") ? v : metric.best.startsWith("higher") ? -v : Math.abs(v - 1);
const scoreText = (metric, s) => s.value.toFixed(metric.digits) + (s.sd === null ? "" : ` ± ${s.sd.toFixed(metric.digits)}`);

// One filter for everything on the page.
function shows(place, steps) {
  const model = data.models[place], words = $("words").value.toLowerCase().split(/\s+/);
  return FACETS.every(f => !$(f).value || model[f] === $(f).value)
    && words.every(w => model.words.toLowerCase().includes(w))
    && (!$("steps").value || (steps === undefined ? model.points.some(p => String(p.steps) === $("steps").value) : String(steps) === $("steps").value));
}
function filter() {
  for (const node of document.querySelectorAll("[data-model]")) node.hidden = !shows(Number(node.dataset.model), node.dataset.steps);
  for (const group of document.querySelectorAll(".group")) group.hidden = !group.querySelector(".strip:not([hidden])");
  const shown = data.models.filter((_, i) => shows(i)).length;
  $("count").textContent = shown === data.models.length ? `${shown} models` : `${shown} of ${data.models.length} models`;
}
const points = (metric, place) => data.models[place].points.filter(p => p.scores[metric.key] && shows(place, String(p.steps)));

// In colour until the reader chooses: all where they are few, else of each family the one that ranks highest among
// points of as many steps.
function leaders(metric) {
  const all = data.models.flatMap((m, i) => points(metric, i).map(p => ({ i, family: m.family, steps: p.steps, c: cost(metric, p.scores[metric.key].value) })));
  const shown = [...new Set(all.map(p => p.i))];
  if (shown.length <= MOST_CHOSEN) return shown;
  const best = new Map(), rank = p => all.filter(q => q.steps === p.steps && q.c < p.c).length;
  for (const p of all) if (!best.has(p.family) || rank(p) < rank(best.get(p.family))) best.set(p.family, p);
  return [...best.values()].map(p => p.i).slice(0, MOST_CHOSEN);
}
function choose(place) {
  const list = inColour(metricNow());
  chosen = list.includes(place) ? list.filter(i => i !== place) : [...list, place];
  draw();
}
const inColour = metric => chosen ?? leaders(metric);
const metricNow = () => data.metrics.find(m => m.key === $("metric").value);

function tabulate(metric, coloured) {
  const table = $("by-steps"), shown = data.models.map((_, i) => i).filter(i => points(metric, i).length);
  const steps = [...new Set(shown.flatMap(i => points(metric, i).map(p => p.steps)))].sort((a, b) => a - b);
  const score = (i, n) => points(metric, i).find(p => p.steps === n)?.scores[metric.key];
  const best = steps.map(n => {
    const costs = shown.map(i => score(i, n)).filter(Boolean).map(s => cost(metric, s.value));
    return costs.length > 1 ? Math.min(...costs) : null;
  });
  if (order && order.column > steps.length) order = null;
  const value = i => order.column ? score(i, steps[order.column - 1])?.value : data.models[i].name;
  const compared = (a, b) => a < b ? -1 : a > b ? 1 : 0, gap = i => value(i) === undefined;
  if (order) shown.sort((a, b) => gap(a) - gap(b) || compared(value(a), value(b)) * (order.up ? 1 : -1));
  const focused = table.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  table.replaceChildren();
  make(table, "caption", {}, `${metric.title} by number of steps, ${metric.best}`);
  const head = make(make(table, "thead"), "tr");
  ["model", ...steps.map(stepsText)].forEach((title, column) => {
    const cell = make(head, "th", { scope: "col", ...(column && { class: "number" }) });
    if (column === order?.column) cell.setAttribute("aria-sort", order.up ? "ascending" : "descending");
    make(cell, "button", { type: "button", "data-focus": `column ${column}` }, title)
      .addEventListener("click", () => { order = { column, up: order?.column === column ? !order.up : true }; draw(); });
  });
  const body = make(table, "tbody");
  for (const i of shown) {
    const row = make(body, "tr"), place = coloured.indexOf(i), cell = make(row, "th", { scope: "row" });
    const button = make(cell, "button", { type: "button", class: "choose", "aria-pressed": place >= 0, "data-focus": `model ${i}` }, data.models[i].name);
    mark(button, place);
    button.addEventListener("click", () => choose(i));
    steps.forEach((n, k) => {
      const s = score(i, n), isBest = s && cost(metric, s.value) === best[k];
      const td = make(row, "td", { class: isBest ? "number best" : "number" });
      if (!s) return;
      make(td, isBest ? "b" : "span", {}, s.value.toFixed(metric.digits));
      if (s.sd !== null) make(td, "span", { class: "sd" }, ` ± ${s.sd.toFixed(metric.digits)}`);
    });
  }
  if (focused) table.querySelector(`[data-focus="${focused}"]`)?.focus();
}

// Ticks of a score's axis: 1, 2, 5 of each power of ten, more where few of those fit, even ones on a linear axis.
function scoreTicks(low, high, log) {
  for (const digits of log ? [[1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]] : []) {
    const out = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const m of digits) out.push(Number((m * 10 ** e).toPrecision(1)));
    const inside = out.filter(v => v >= low && v <= high);
    if (inside.length > 3) return inside;
  }
  const raw = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(raw)), step = unit * [1, 2, 5, 10].find(m => m * unit >= raw);
  return [...Array(12).keys()].map(k => Number(((Math.ceil(low / step) + k) * step).toPrecision(6))).filter(v => v <= high);
}
// Heights at least `gap` apart and within [top, bottom], each near the one wanted.
function spread(wanted, gap, top, bottom) {
  const rank = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]), out = [];
  rank.forEach((i, k) => { out[i] = Math.max(wanted[i], k ? out[rank[k - 1]] + gap : top); });
  for (let k = rank.length - 1, limit = bottom; k >= 0; k--, limit -= gap) out[rank[k]] = Math.min(out[rank[k]], limit);
  return out;
}

function plot(figure, metric, coloured, x, what, format, ticks) {
  const svg = figure.querySelector("svg"), W = svg.clientWidth || 560, H = 380, T = 14, B = 42, L = 48, R = Math.min(162, W * 0.3);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  const all = data.models.flatMap((m, i) => points(metric, i).filter(p => p[x]).map(p => ({ i, name: m.name, steps: p.steps, x: p[x], s: p.scores[metric.key], c: cost(metric, p.scores[metric.key].value) })));
  const log = metric.best.startsWith("lower") && all.every(p => p.s.value > 0);
  figure.querySelector("figcaption").textContent = `${metric.title} (${metric.best}${log ? ", log axis" : ""}) against ${what}. Dashed: nothing shown is better for as little.` + (x === "trained" ? " A number is that of the steps." : "");
  const front = [];
  for (const p of [...all].sort((a, b) => a.x - b.x || a.c - b.c)) if (!front.length || p.c < front.at(-1).c) front.push(p);
  svg.setAttribute("aria-label", `${metric.title} against ${what}. ` + (front.length ? "The best for as little: " + front.map(p => `${p.name} at ${stepsText(p.steps)}, ${format(p.x)}, ${scoreText(metric, p.s)}`).join("; ") : "No model shown has this."));
  listed(figure.querySelector("table"), metric, [...all].sort((a, b) => a.x - b.x || a.c - b.c), front, what, format);
  if (!all.length) { make(svg, "text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, "no model shown has this"); return; }

  const left = Math.min(...all.map(p => p.x)) / 1.15, right = Math.max(...all.map(p => p.x)) * 1.15;
  const scale = log ? Math.log : v => v, values = all.map(p => scale(p.s.value));
  const pad = (Math.max(...values) - Math.min(...values) || Math.abs(values[0]) || 1) * 0.06, low = Math.min(...values) - pad, high = Math.max(...values) + pad;
  const px = v => L + (W - L - R) * Math.log(v / left) / Math.log(right / left);
  const py = v => Math.min(H - B, Math.max(T, T + (H - T - B) * (high - scale(v)) / (high - low)));
  const back = log ? Math.exp : v => v;
  for (const v of scoreTicks(back(low), back(high), log)) {
    make(svg, "line", { class: "axis", x1: L, x2: W - R, y1: py(v), y2: py(v) });
    make(svg, "text", { x: L - 6, y: py(v) + 4, "text-anchor": "end" }, v);
  }
  let inside = ticks.filter(v => v >= left && v <= right), edge = -Infinity;
  if (inside.length < 2) inside = [...new Set(all.map(p => p.x))].sort((a, b) => a - b);
  for (const v of inside) {
    make(svg, "line", { class: "axis", x1: px(v), x2: px(v), y1: H - B, y2: H - B + 4 });
    if (px(v) - edge < 44) continue;
    make(svg, "text", { x: px(v), y: H - B + 18, "text-anchor": "middle" }, format(v));
    edge = px(v);
  }
  make(svg, "text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, what);
  make(svg, "path", { class: "pareto", d: front.map((p, k) => k ? `H${px(p.x)}V${py(p.s.value)}` : `M${px(p.x)},${py(p.s.value)}`).join("") + `H${W - R}` });

  const places = [...new Set(all.map(p => p.i))].sort((a, b) => coloured.includes(a) - coloured.includes(b)), ends = [];
  for (const i of places) {
    const place = coloured.indexOf(i), grey = place < 0, own = all.filter(p => p.i === i).sort((a, b) => a.x - b.x || a.steps - b.steps);
    const group = make(svg, "g", { stroke: grey ? "var(--rest)" : colour(place), fill: grey ? "var(--rest)" : colour(place), "stroke-width": grey ? 1 : 2, opacity: grey ? .45 : 1 });
    make(group, "polyline", { points: own.map(p => `${px(p.x)},${py(p.s.value)}`).join(" "), fill: "none" });
    for (const p of own) {
      const { value, sd } = p.s, down = log ? Math.max(value - (sd || 0), back(low)) : value - (sd || 0);
      if (!grey && sd) make(group, "path", { "stroke-width": 1.5, d: `M${px(p.x)},${py(down)}V${py(value + sd)}m-4,0h8M${px(p.x) - 4},${py(down)}h8` });
      const dot = make(group, "path", { class: "dot", d: `M${px(p.x)},${py(value)}` + (grey ? SHAPES[0].replaceAll("4", "2.5").replaceAll("8", "5") : shape(place)) });
      dot.addEventListener("click", () => choose(i));
      if (!grey && x === "trained") make(svg, "text", { x: px(p.x) + 8, y: py(value) + 4 }, p.steps);
      make(dot, "title", {}, `${p.name}, ${stepsText(p.steps)}, ${format(p.x)}: ${metric.title} ${scoreText(metric, p.s)}`);
    }
    if (!grey) ends.push({ place, name: own[0].name, x: px(own.at(-1).x), y: py(own.at(-1).s.value) });
  }
  const heights = spread(ends.map(e => e.y), 15, T, H - B), letters = Math.floor((R - 18) / 7.4);
  ends.forEach((e, k) => {
    make(svg, "path", { d: `M${e.x + 7},${e.y}L${W - R + 2},${heights[k]}h8`, fill: "none", stroke: colour(e.place), opacity: .45 });
    const text = make(svg, "text", { class: "name", x: W - R + 13, y: heights[k] + 4, style: `fill: ${colour(e.place)}` });
    text.textContent = e.name.length > letters ? e.name.slice(0, letters - 1) + "…" : e.name;
  });
}
function listed(table, metric, all, front, what, format) {
  table.replaceChildren();
  make(table, "caption", {}, `${metric.title} against ${what}, ${metric.best}`);
  const head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
  for (const title of ["model", "steps", what, metric.title, "best for as little"]) make(head, "th", { scope: "col" }, title);
  for (const p of all) {
    const row = make(body, "tr");
    make(row, "th", { scope: "row" }, p.name);
    for (const text of [stepsText(p.steps), format(p.x), scoreText(metric, p.s), front.includes(p) ? "yes" : ""]) make(row, "td", {}, text);
  }
}

function draw() {
  const metric = metricNow(), coloured = inColour(metric);
  filter();
  $("meaning").textContent = `${metric.meaning}; ${metric.best}`;
  tabulate(metric, coloured);
  plot($("by-nfe"), metric, coloured, "nfe", "network evaluations per image", String, COUNTS);
  plot($("by-training"), metric, coloured, "trained", "time of training or search", duration, TIMES);
}

function options(id, values, shown = v => v) {
  const select = $(id);
  select.add(new Option("all", ""));
  for (const v of values) select.add(new Option(shown(v), v));
  select.parentElement.hidden = values.length < 2;
}
const NAMED = { none: "none (a teacher, or not said)", neither: "neither" };
for (const f of FACETS) options(f, [...new Set(data.models.map(m => m[f]))], v => f === "from" ? v : NAMED[v] ?? v);
options("steps", [...new Set(data.models.flatMap(m => m.points.map(p => p.steps)))].filter(n => n !== null).sort((a, b) => a - b), stepsText);
for (const m of data.metrics) $("metric").add(new Option(m.title, m.key));
$("metric").addEventListener("change", draw);
$("filter").addEventListener("input", draw);
$("filter").addEventListener("submit", event => event.preventDefault());
$("filter").addEventListener("reset", () => { chosen = order = null; setTimeout(draw); });
let width = 0;
new ResizeObserver(([entry]) => { if (Math.abs(entry.contentRect.width - width) > 1) { width = entry.contentRect.width; draw(); } }).observe(document.querySelector(".plots"));
draw();

// Sorting of all scores: gaps stand last.
const heads = [...document.querySelectorAll("#scores thead th")], rows = document.querySelector("#scores tbody");
heads.forEach((th, column) => th.firstChild.addEventListener("click", () => {
  const up = th.getAttribute("aria-sort") !== "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => { const cell = row.cells[column]; return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value); };
  const gap = row => row.cells[column].textContent === "-";
  rows.append(...[...rows.rows].sort((a, b) => gap(a) - gap(b) || (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0) * (up ? 1 : -1)));
}));
