// An answer's tokens, each with its probability and what else was likely: by pointer, by touch or with the arrow keys.
import { hideTip, showTip } from "./tip.js";

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob < -4.6 ? 2 : 1)} %`;
const shown = (token) => JSON.stringify(token).slice(1, -1).replaceAll(" ", "␣");

function show(node, entry) {
  const rows = entry.top_logprobs.some((other) => other.token === entry.token) ? entry.top_logprobs : [entry, ...entry.top_logprobs];
  showTip(rows.map((row) => {
    const line = document.createElement("div");
    line.className = row.token === entry.token ? "chosen" : "";
    line.textContent = `${percent(row.logprob).padStart(8)}  ${shown(row.token)}`;
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${100 * Math.exp(row.logprob)}%`;
    line.append(bar);
    return line;
  }), node);
}

// entries: logprobs.content of the API.
export function tokenView(entries) {
  const view = document.createElement("div");
  view.className = "tokens";
  view.setAttribute("role", "group");
  view.setAttribute("aria-label", "Tokens with their probabilities; arrow keys go from one to the next");
  entries.forEach((entry, i) => {
    const p = Math.exp(entry.logprob);
    const node = document.createElement("span");
    node.className = `token ${p < 0.2 ? "p0" : p < 0.5 ? "p1" : p < 0.9 ? "p2" : "p3"}`;
    node.textContent = entry.token;
    node.tabIndex = i === 0 ? 0 : -1;
    node.setAttribute("role", "note");
    node.setAttribute("aria-label", `${shown(entry.token)}, ${percent(entry.logprob)}`);
    for (const kind of ["mouseenter", "focus", "click"]) node.addEventListener(kind, () => show(node, entry));
    for (const kind of ["mouseleave", "blur"]) node.addEventListener(kind, hideTip);
    view.append(node);
  });
  view.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const nodes = [...view.children];
    const next = step && nodes[nodes.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return view;
}
