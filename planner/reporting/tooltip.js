// One handler for all maps. A pointer, a finger or the arrow keys choose a cell; the tip shows what is known of its expert.
const known = JSON.parse(document.getElementById("values").textContent);
const [tip, what, said] = ["tip", "what", "said"].map((name) => document.getElementById(name));
const cursor = Object.assign(document.createElement("div"), { id: "cursor" });
const MOVES = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
  Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0],
};
// The chosen cell. It stays the same from one map to the next, so that all of an expert's values are close by.
const cell = { map: null, layer: 0, expert: 0 };

function describe(layer, expert) {
  const bits = known.widths[layer][expert];
  const scheme = known.schemes ? `, ${known.schemes[layer][expert]}` : "";
  const lines = [`layer ${known.layers[layer]}, expert ${expert}: ${bits} bit${bits === 1 ? "" : "s"}${scheme}`];
  for (const [title, unit, values] of known.grids) {
    const value = values[layer][expert];
    if (value !== null) lines.push(`${title}  ${value} ${unit}`);
  }
  return [...lines, ...(known.notes[`${layer} ${expert}`] || [])].join("\n");
}

function hide() {
  tip.hidden = true;
  cursor.remove();
}

// Under the box or, where that leaves the window, above it; never on it. A phone has a place of its own (style.css).
function place(box) {
  const { clientWidth: wide, clientHeight: high } = document.documentElement, below = box.bottom + 12;
  tip.className = box.bottom > high / 2 ? "top" : "";
  tip.style.left = `${Math.max(4, Math.min(box.left, wide - tip.offsetWidth - 4))}px`;
  tip.style.top = `${below + tip.offsetHeight <= high ? below : Math.max(4, box.top - 12 - tip.offsetHeight)}px`;
}

function show(map, layer, expert) {
  const { width: columns, height: rows } = map.querySelector(".cells").viewBox.baseVal;
  Object.assign(cell, { map, layer, expert });
  what.textContent = describe(layer, expert);
  tip.hidden = false;
  for (const [side, part, all] of [["left", expert, columns], ["top", layer, rows], ["width", 1, columns], ["height", 1, rows]])
    cursor.style[side] = `${(100 * part) / all}%`;
  map.querySelector(".grid").append(cursor);
}

function go([down, along]) {
  const clamp = (value, most) => Math.max(0, Math.min(value, most));
  const layer = clamp(cell.layer + down, known.widths.length - 1);
  show(cell.map, layer, clamp(cell.expert + along, known.widths[layer].length - 1));
  cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
  place(cursor.getBoundingClientRect());
  said.textContent = what.textContent;
}

function follow(event) {
  const { clientX: x, clientY: y, target } = event;
  if (target.closest("#tip")) return;
  const map = target.closest(".map");
  if (!map) return hide();
  const box = map.querySelector(".cells").getBoundingClientRect();
  const layer = Math.floor(((y - box.top) / box.height) * known.widths.length);
  const row = known.widths[layer] || [], columns = map.querySelector(".cells").viewBox.baseVal.width;
  const expert = Math.floor(((x - box.left) / box.width) * columns);
  if (!row[expert]) return hide();
  show(map, layer, expert);
  place(event.pointerType === "touch" ? cursor.getBoundingClientRect() : new DOMRect(x + 12, y));
}

for (const map of document.querySelectorAll(".map")) {
  map.tabIndex = 0;
  map.setAttribute("role", "application");
  map.setAttribute("aria-roledescription", "heat map");
  map.setAttribute("aria-describedby", "what");
  map.addEventListener("focus", () => {
    if (!map.matches(":focus-visible")) return;
    cell.map = map;
    go([0, 0]);
  });
  map.addEventListener("blur", hide);
  map.addEventListener("keydown", (event) => {
    const move = MOVES[event.key];
    if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    cell.map = map;
    go(move);
  });
}
document.getElementById("hint").hidden = false;
tip.addEventListener("mousedown", (event) => event.preventDefault()); // the map keeps the focus
tip.addEventListener("click", (event) => event.target.dataset.key && go(MOVES[event.target.dataset.key]));
document.addEventListener("pointermove", follow);
document.addEventListener("pointerdown", follow);
document.addEventListener("pointerleave", (event) => event.pointerType === "touch" || hide());
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
