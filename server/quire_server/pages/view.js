// The engine: numbers, the page map, requests and plots, all from /engine/stream.
import { events } from "./api.js";
import { colour, compact, number, surface } from "./canvas.js";
import { drawMap } from "./pagemap.js";
import { drawRequests } from "./requests.js";

const $ = (id) => document.getElementById(id);
const KEEP = 120; // points of a plot: a minute
const WINDOW = 20; // updates over which latencies are taken
const history = [];
let last = null, watched = null;

// Shows updates of one model's engine until the stream ends or fails.
export async function watch(signal, model) {
  last = null;
  if (watched !== model) history.length = 0;
  watched = model;
  for await (const view of events(`engine/stream?model=${encodeURIComponent(model)}`, { signal })) take(view);
}

const milliseconds = (seconds) => seconds === null ? "–" : seconds < 0.01 ? `${(1000 * seconds).toFixed(1)} ms` : `${Math.round(1000 * seconds)} ms`;

function take(view) {
  $("engine-error").hidden = !view.error;
  $("state").textContent = view.state;
  $("state").classList.toggle("bad", Boolean(view.error));
  if (view.error) {
    $("engine-error").textContent = view.error;
    last = null;
    return;
  }
  const seconds = last ? view.monotonic - last.monotonic : 0;
  if (last && (view.steps < last.steps || seconds <= 0)) last = null; // another engine process, which counts from 0
  const rise = (name) => (last ? view[name] - last[name] : 0);
  const steps = rise("steps");
  const point = {
    view,
    out: last ? rise("generation_tokens") / seconds : 0,
    read: last ? rise("prompt_tokens") / seconds : 0,
    stepOut: steps ? rise("generation_tokens") / steps : 0,
    stepRead: steps ? Math.max(0, rise("prompt_tokens") - rise("prefix_hits")) / steps : 0, // cached ones are not computed
  };
  history.push(point);
  if (history.length > KEEP) history.shift();
  const before = history[Math.max(0, history.length - 1 - WINDOW)].view;
  for (const name of ["ttft", "itl"]) {
    point[name] = [0.5, 0.95].map((q) => quantile(before[name], view[name], q));
  }
  last = view;
  draw();
}

// Of what was observed between two histograms; null when that is nothing.
function quantile(before, after, q) {
  const same = before.count <= after.count;
  const counts = after.buckets.map(([bound, count], i) => [bound, count - (same ? before.buckets[i][1] : 0)]);
  const total = counts.at(-1)[1];
  if (!total) return null;
  let lower = 0, under = 0;
  for (const [bound, count] of counts) {
    if (count >= q * total) return bound === null ? lower : lower + (bound - lower) * (q * total - under) / Math.max(count - under, 1);
    [lower, under] = [bound, count];
  }
  return lower;
}

function draw() {
  const point = history.at(-1);
  if (!point || document.hidden) return;
  numbers(point);
  drawRequests(point.view);
  drawMap(point.view);
  plot("rate", [["generated", "owned", (p) => p.out], ["prompt", "second", (p) => p.read]]);
  plot("batch", [["generated", "owned", (p) => p.stepOut], ["prompt", "second", (p) => p.stepRead]], { stacked: true });
  plot("queue", [["running", "owned", (p) => p.view.running], ["waiting", "second", (p) => p.view.waiting]]);
  for (const name of ["ttft", "itl"]) {
    const at = (i) => (p) => p[name][i] === null ? null : 1000 * p[name][i];
    plot(name, [["median", "owned", at(0)], ["95th percentile", "second", at(1)]]);
  }
}

function numbers({ view, out, ttft, itl }) {
  const used = view.pages_total - view.pages_free;
  const rows = {
    Running: number(view.running), Waiting: number(view.waiting), "Swapped": number(view.swapped),
    "Tokens/s": number(out), "Step tok/seqs": `${number(view.batch_tokens)} / ${number(view.batch_requests)}`,
    [`Pages of ${number(view.pages_total)}`]: number(used),
    "Prefix hits": view.prefix_queries ? `${Math.round(100 * view.prefix_hits / view.prefix_queries)} %` : "–",
    TTFT: milliseconds(ttft[0]), ITL: milliseconds(itl[0]),
  };
  const list = $("numbers");
  Object.entries(rows).forEach(([name, value], i) => {
    let box = list.children[i];
    if (!box) {
      box = document.createElement("div");
      box.append(document.createElement("dt"), document.createElement("dd"));
      list.append(box);
    }
    if (box.children[1].textContent !== value) box.children[1].textContent = value;
    box.children[0].textContent = name;
  });
}

function ceiling(value) {
  const base = 10 ** Math.floor(Math.log10(Math.max(value, 1e-3)));
  return [1, 2, 5, 10].map((step) => step * base).find((top) => top >= value * 0.9999) || value;
}

function plot(id, series, { stacked = false } = {}) {
  const canvas = $(id), height = 92, floor = height - 18;
  const [context, width] = surface(canvas, height);
  const values = series.map(([, , of]) => history.map(of));
  const sums = stacked ? history.map((_, i) => values.reduce((sum, row) => sum + row[i], 0)) : values.flat();
  const top = ceiling(Math.max(1, ...sums.filter((v) => v !== null)));
  const left = 40, step = (width - left) / (KEEP - 1);
  const x = (i) => width - (history.length - 1 - i) * step;
  const y = (v) => floor - (v / top) * (floor - 6);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.fillStyle = colour("quiet");
  context.strokeStyle = colour("line");
  context.textAlign = "right";
  for (const mark of [0, top / 2, top]) {
    context.fillText(compact(mark), left - 6, y(mark));
    context.beginPath();
    context.moveTo(left, y(mark));
    context.lineTo(width, y(mark));
    context.stroke();
  }
  if (stacked) {
    const base = history.map(() => 0);
    series.forEach(([, name], s) => {
      context.fillStyle = colour(name);
      values[s].forEach((v, i) => {
        context.fillRect(x(i) - step, y(base[i] + v), Math.max(step - 0.4, 1), y(base[i]) - y(base[i] + v));
        base[i] += v;
      });
    });
  } else {
    series.forEach(([, name], s) => {
      context.strokeStyle = context.fillStyle = colour(name);
      context.lineWidth = 1.6;
      context.lineJoin = "round";
      context.beginPath();
      let pen = false;
      values[s].forEach((v, i) => {
        if (v !== null) pen ? context.lineTo(x(i), y(v)) : context.moveTo(x(i), y(v));
        pen = v !== null;
      });
      context.stroke();
    });
  }
  context.lineWidth = 1;
  context.textAlign = "left";
  let at = left;
  const said = series.map(([label, name], s) => {
    const value = values[s].at(-1);
    context.fillStyle = colour(name);
    context.fillRect(at, height - 10, 8, 8);
    const text = `${label} ${value === null ? "–" : number(value)}`;
    context.fillStyle = colour("quiet");
    context.fillText(text, at + 12, height - 5.5);
    at += context.measureText(text).width + 28;
    return text;
  });
  canvas.setAttribute("aria-label", said.join(", "));
}

addEventListener("resize", draw);
document.addEventListener("visibilitychange", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
