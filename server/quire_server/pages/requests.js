// Who runs and who waits. A row and the cells of the page map that its request holds point at each other.
import { grouped } from "./canvas.js";
import { listen, mark, nameOf } from "./pagemap.js";

const SHOWN = 100;
const body = document.querySelector("#requests tbody");
const rest = document.getElementById("requests-rest");
const age = (seconds) => seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min`;

export function drawRequests({ requests, running, waiting, swapped }) {
  const shown = requests.slice(0, SHOWN);
  while (body.children.length > shown.length) body.lastElementChild.remove();
  shown.forEach((request, i) => {
    const row = body.children[i] || newRow(i);
    const values = [nameOf(request), request.state, grouped.format(request.prompt_tokens),
      grouped.format(request.output_tokens), grouped.format(request.pages), age(request.age)];
    values.forEach((value, k) => {
      if (row.children[k].textContent !== value) row.children[k].textContent = value;
    });
    row.firstElementChild.title = values[0];
  });
  const more = Math.max(0, running + waiting + swapped - shown.length);
  rest.textContent = more ? `and ${grouped.format(more)} more` : shown.length ? "" : "Nothing runs or waits.";
}

function newRow(i) {
  const row = document.createElement("tr");
  for (let k = 0; k < 6; k++) row.append(document.createElement(k ? "td" : "th"));
  row.firstElementChild.scope = "row";
  row.addEventListener("mouseenter", () => mark([i]));
  row.addEventListener("mouseleave", () => mark([]));
  body.append(row);
  return row;
}

listen((indices) => {
  [...body.children].forEach((row, i) => row.classList.toggle("on", indices.includes(i)));
});
