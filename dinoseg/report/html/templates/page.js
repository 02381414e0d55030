"use strict";
const root = document.documentElement;
const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});

function sortBy(head) {
  const body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[head.cellIndex].dataset.value;
  const numbers = head.dataset.kind === "number";
  const order = (a, b) => (numbers ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  const known = [...body.rows].filter((row) => value(row) !== "");
  const unknown = [...body.rows].filter((row) => value(row) === "");
  known.sort((a, b) => (down ? -1 : 1) * order(value(a), value(b)));
  body.append(...known, ...unknown);
  for (const row of body.rows) row.classList.remove("group");
}
for (const head of document.querySelectorAll("th[data-kind]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => sortBy(head));
}

for (const heat of document.querySelectorAll("svg.heat")) {
  const { names, counts } = JSON.parse(document.getElementById(heat.dataset.counts).textContent);
  const said = heat.parentElement.querySelector("output");
  const mark = heat.querySelector(".mark");
  let [row, column] = [0, 0];
  const tell = () => {
    const total = counts[row].reduce((sum, count) => sum + count, 0);
    const share = total ? `${(100 * counts[row][column] / total).toFixed(2)} % of it` : "not in the reference";
    said.textContent = `reference ${names[row]}, predicted ${names[column]}: ` +
      `${counts[row][column].toLocaleString("en")} pixels, ${share}`;
    mark.setAttribute("x", column);
    mark.setAttribute("y", row);
    mark.removeAttribute("visibility");
  };
  const point = (event) => {
    const cells = heat.querySelector("image").getBoundingClientRect();
    const at = [(event.clientY - cells.top) / cells.height, (event.clientX - cells.left) / cells.width];
    if (at.some((share) => share < 0 || share >= 1)) return;
    [row, column] = at.map((share) => Math.floor(share * names.length));
    tell();
  };
  heat.addEventListener("pointermove", point);
  heat.addEventListener("pointerdown", point);
  heat.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const inside = (value) => Math.min(names.length - 1, Math.max(0, value));
    [row, column] = [inside(row + step[0]), inside(column + step[1])];
    tell();
  });
}
