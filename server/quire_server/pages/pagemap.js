// The KV pages as a map. A cell tells what it is and who holds it: by pointer, by touch or with the arrow keys.
import { colour, grouped, surface } from "./canvas.js";
import { hideTip, showTip } from "./tip.js";

const STATES = [["free", "1"], ["cached", "2"], ["owned", "3"], ["shared", "4"]];
const MEANS = { free: "holds nothing", cached: "held by nobody; its prefix can be used again" };
const canvas = document.getElementById("pages");
let grid = { groups: [], requests: [], columns: 1, size: 1, tops: [] };
let chosen = null; // [group, cell] that is told about
let marked = new Set(); // indices of requests whose cells are outlined
let onChoice = () => {};

export const nameOf = (request) => request.index ? `${request.id} #${request.index}` : request.id;

// listen: called with the indices of the requests that hold the cell that was chosen.
export function listen(callback) { onChoice = callback; }

export function mark(indices) {
  marked = new Set(indices);
  paint();
}

export function drawMap({ page_map: groups, requests }) {
  const width = canvas.clientWidth;
  const cells = groups.reduce((sum, group) => sum + group.cells.length, 0);
  const size = Math.max(5, Math.min(16, Math.floor(Math.sqrt(width * 240 / Math.max(cells, 1)))));
  const columns = Math.max(1, Math.floor(width / size));
  const tops = [];
  let height = 0;
  for (const group of groups) {
    tops.push(height);
    height += Math.ceil(group.cells.length / columns) * size + 6;
  }
  grid = { groups, requests, columns, size, tops, height: Math.max(height, size) };
  paint();
  const sums = STATES.map(([name]) => [name, groups.reduce((sum, group) => sum + group[name], 0)]);
  canvas.setAttribute("aria-label", `Map of the KV cache pages: ${sums.map(([name, n]) => `${n} ${name}`).join(", ")}. Arrow keys go from cell to cell.`);
  document.getElementById("legend").replaceChildren(...sums.map(([name, n]) => {
    const item = document.createElement("li"), swatch = document.createElement("span");
    swatch.className = `swatch ${name}`;
    item.append(swatch, `${name} ${grouped.format(n)}`);
    return item;
  }));
  if (chosen) choose(...chosen); // it may have changed hands
}

const place = (g, i) => [(i % grid.columns) * grid.size, grid.tops[g] + Math.floor(i / grid.columns) * grid.size];

function paint() {
  const { groups, size, height } = grid;
  const [context] = surface(canvas, height || size);
  const colours = Object.fromEntries(STATES.map(([name, digit]) => [digit, colour(name)]));
  context.strokeStyle = colour("text");
  context.lineWidth = 1.5;
  groups.forEach((group, g) => {
    for (let i = 0; i < group.cells.length; i++) {
      const [x, y] = place(g, i);
      context.fillStyle = colours[group.cells[i]];
      context.fillRect(x, y, size - 1, size - 1);
    }
    for (const [first, count, who] of group.owners) {
      if (!who.some((index) => marked.has(index))) continue;
      for (let i = first; i < first + count; i++) outline(context, g, i);
    }
  });
  if (chosen) {
    context.strokeStyle = colour("bad");
    outline(context, ...chosen);
  }
}

function outline(context, g, i) {
  const [x, y] = place(g, i);
  context.strokeRect(x + 0.75, y + 0.75, grid.size - 2.5, grid.size - 2.5);
}

function holders(group, i) {
  const run = group.owners.find(([first, count]) => first <= i && i < first + count);
  return run ? [run[2], run[3]] : [[], 0];
}

function describe(g, i) {
  const group = grid.groups[g], several = group.pages_per_cell > 1;
  const state = STATES.find(([, digit]) => digit === group.cells[i])[0];
  const first = i * group.pages_per_cell + 1, end = Math.min(first + group.pages_per_cell - 1, group.pages);
  const where = first === end ? `Page ${first}` : `Pages ${first} to ${end}`;
  const lines = [`${where}${grid.groups.length > 1 ? ` of group ${g}` : ""}: ${several ? "mostly " : ""}${state}`];
  const [who, more] = holders(group, i);
  for (const index of who) {
    const request = grid.requests[index];
    lines.push(`${nameOf(request)}\n  ${request.state}, ${grouped.format(request.computed_tokens)} tokens in ${grouped.format(request.pages)} pages`);
  }
  if (more) lines.push(`and ${more} more`);
  if (!who.length) lines.push(MEANS[state] || "held by a request that is not listed");
  return lines;
}

function choose(g, i) {
  const group = grid.groups[g];
  if (!group || i < 0 || i >= group.cells.length) return leave();
  chosen = [g, i];
  const lines = describe(g, i), said = lines.join("; ");
  marked = new Set(holders(group, i)[0]);
  paint();
  const live = document.getElementById("cell");
  if (live.textContent !== said) live.textContent = said;
  const box = canvas.getBoundingClientRect(), [x, y] = place(g, i);
  showTip(lines.map((text, k) => {
    const line = document.createElement("div");
    line.className = k ? "" : "chosen";
    line.textContent = text;
    return line;
  }), canvas, { left: box.left + x, top: box.top + y, bottom: box.top + y + grid.size });
  onChoice([...marked]);
}

function leave() {
  if (!chosen) return;
  chosen = null;
  document.getElementById("cell").textContent = "";
  hideTip();
  mark([]);
  onChoice([]);
}

function point(event) {
  const { columns, size, tops } = grid;
  for (let g = tops.length - 1; g >= 0; g--) {
    if (event.offsetY < tops[g]) continue;
    const column = Math.floor(event.offsetX / size);
    if (column < columns) choose(g, Math.floor((event.offsetY - tops[g]) / size) * columns + column);
    else leave();
    return;
  }
}

canvas.addEventListener("mousemove", point);
canvas.addEventListener("click", point);
canvas.addEventListener("mouseleave", leave);
canvas.addEventListener("blur", leave);
addEventListener("scroll", (event) => { if (event.target.contains(canvas)) leave(); }, true);
canvas.addEventListener("focus", () => { if (!chosen && canvas.matches(":focus-visible")) choose(0, 0); });
canvas.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen) {
    event.stopPropagation(); // elsewhere it stops the answer
    return leave();
  }
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: grid.columns, ArrowUp: -grid.columns, Home: -Infinity, End: Infinity }[event.key];
  if (!step) return;
  event.preventDefault();
  let [g, i] = chosen || [0, 0];
  const last = (group) => grid.groups[group].cells.length - 1;
  i = step === -Infinity ? 0 : step === Infinity ? last(g) : i + step;
  if (i > last(g)) g + 1 < grid.groups.length ? [g, i] = [g + 1, 0] : i = last(g);
  if (i < 0) g > 0 ? [g, i] = [g - 1, last(g - 1)] : i = 0;
  choose(g, i);
});
