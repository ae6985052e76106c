"use strict";
// One handler for all maps: the cell under the pointer, and what is known of its expert.
const known = JSON.parse(document.getElementById("values").textContent);
const tip = document.getElementById("tip");
function describe(event) {
  const map = event.target.closest("svg.map");
  tip.hidden = true;
  if (!map) return;
  const box = map.getBoundingClientRect(), at = map.dataset;
  const expert = Math.floor((event.clientX - box.left - at.left) / at.width);
  const layer = Math.floor((event.clientY - box.top - at.top) / at.height);
  const bits = known.widths[layer] && known.widths[layer][expert];
  if (expert < 0 || !bits) return;
  const lines = [`layer ${known.layers[layer]}, expert ${expert}: ${bits} bit${bits === 1 ? "" : "s"}`];
  for (const [title, unit, values] of known.grids) {
    const value = values[layer][expert];
    if (value !== null) lines.push(`${title}  ${value} ${unit}`);
  }
  lines.push(...(known.notes[`${layer} ${expert}`] || []));
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)) + "px";
}
document.addEventListener("pointermove", describe);
document.addEventListener("pointerleave", () => { tip.hidden = true; });
