// One box beside what is pointed at, touched or focused.

const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);
let anchor = null;
addEventListener("scroll", (event) => { if (event.target.contains(anchor)) hideTip(); }, true);

export function hideTip() {
  tip.hidden = true;
}

// lines: nodes. node: what they are about, or what it is drawn on. box: where that is in the window.
export function showTip(lines, node, box = node.getBoundingClientRect()) {
  anchor = node;
  tip.replaceChildren(...lines);
  tip.hidden = false;
  tip.style.left = "0"; // there it has its full width
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = box.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : Math.max(4, box.top - tip.offsetHeight - 6)}px`;
}
