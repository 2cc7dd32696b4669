"""How the report looks, and what its tables and its matrix do: CSS and JavaScript."""

from __future__ import annotations

STYLE = """
:root{--ink:#222;--soft:#666;--paper:#fff;--line:#ddd;--track:#e8e8e8;--good:#0b7a4b;--poor:#c8641e;--accent:#1f6fb2}
@media (prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#a0a0a0;--paper:#17191c;--line:#3a3d42;--track:#33363b;
--good:#3fb37f;--poor:#e08a4a;--accent:#6db3ee}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:0 auto;
padding:16px}
h1{font-size:22px;margin:8px 0;overflow-wrap:anywhere}h2{font-size:18px;margin:32px 0 8px}
header p{color:var(--soft);margin:0 0 12px}nav a{margin-right:16px;color:var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:12px 0}
.tiles div{border:1px solid var(--line);border-radius:6px;padding:10px;font-size:12px;color:var(--soft)}
.tiles b{display:block;font-size:24px;color:var(--ink)}
.scroll{overflow:auto;max-height:640px;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%}td,th{padding:4px 10px;text-align:left;border-bottom:1px solid var(--line)}
td{overflow-wrap:anywhere}td.number{white-space:nowrap}
thead th{position:sticky;top:0;background:var(--paper)}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer}
th[aria-sort=ascending] button::after{content:" \\25b2"}th[aria-sort=descending] button::after{content:" \\25bc"}
.bar{display:inline-block;width:120px;height:9px;background:var(--track);margin-right:8px;vertical-align:middle}
.bar i{display:block;height:100%;background:var(--accent)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(480px,1fr));gap:14px}
figure{margin:0;border:1px solid var(--line);border-radius:6px;padding:8px}figure img{max-width:100%;display:block}
figcaption{margin-top:6px}small{color:var(--soft);overflow-wrap:anywhere}
#matrix{width:100%;display:block;margin:8px 0}#matrix image{image-rendering:pixelated}
#matrix text{font-size:.65px;fill:var(--ink)}#cell{font-weight:600;height:1.5em;overflow:hidden;white-space:nowrap;
text-overflow:ellipsis}
.frame{fill:none;stroke:var(--line);stroke-width:.1}
.cursor{fill:none;stroke:var(--accent);stroke-width:.12;visibility:hidden;pointer-events:none}
.chart{width:100%;max-width:640px}.chart text{font-size:12px;fill:var(--ink)}.axis{fill:none;stroke:var(--soft)}
.good{fill:var(--good)}.poor{fill:var(--poor)}.chart circle{fill:var(--ink)}
.ideal{stroke:var(--soft);stroke-dasharray:5 4}
@media (max-width:560px){.gallery{grid-template-columns:1fr}}
"""

SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th"), body = button.closest("table").tBodies[0];
    const column = header.cellIndex, rows = [...body.rows];
    const values = new Map(rows.map(row => [row, row.cells[column].dataset.value]));
    const numeric = rows.every(row => values.get(row) !== "" && isFinite(values.get(row)));
    const known = header.getAttribute("aria-sort");
    const ascending = known ? known === "descending" : !numeric;  // numbers: the highest first
    const compare = (a, b) => numeric ? values.get(a) - values.get(b)
      : values.get(a).localeCompare(values.get(b), undefined, {numeric: true});
    rows.sort((a, b) => ascending ? compare(a, b) : compare(b, a));
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    body.append(...rows);
  });
}
const matrix = document.getElementById("matrix"), cell = document.getElementById("cell");  // null: too large to draw
const confusions = matrix && JSON.parse(document.getElementById("matrix-data").textContent);
const image = matrix?.querySelector("image"), count = confusions?.names.length;
matrix?.addEventListener("pointermove", event => {
  const place = image.getBoundingClientRect();
  const column = Math.floor((event.clientX - place.left) / place.width * count);
  const row = Math.floor((event.clientY - place.top) / place.height * count);
  const inside = column >= 0 && row >= 0 && column < count && row < count;
  for (const [name, axis, value] of [["row", "y", row], ["column", "x", column]]) {
    const line = document.getElementById(name);
    line.style.visibility = inside ? "visible" : "hidden";
    line.setAttribute(axis, value);
  }
  if (!inside) return;
  const found = confusions.rows[row].find(entry => entry[0] === column);
  const total = confusions.rows[row].reduce((sum, entry) => sum + entry[1], 0);
  const [truth, prediction] = [confusions.names[row], confusions.names[column]];
  cell.textContent = `${truth} taken for ${prediction}: ${found ? found[1] : 0} of ${total}`;
});
"""
