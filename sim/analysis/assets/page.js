"use strict";
// Everything on this page that came from a run enters as text nodes only.
const runs = JSON.parse(document.getElementById("run-data").textContent);
const byId = (id) => document.getElementById(id);

function node(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Light and dark. Pictures are drawn once, for light; on dark their greys and hues are exchanged.
// One with other colours than these, where a scale says something, stays on a white card instead.
const EXCHANGED = {
  "#222222": "#e6e8eb", "#5f5f5f": "#a2aab5", "#d9d9d9": "#454b55", "#000000": "#e6e8eb",
  "#ffffff": "#16191d", "#0072b2": "#6cb8ee", "#d55e00": "#ff9a57", "#009e73": "#4ccba4",
  "#b4619a": "#e09aca", "#c78500": "#e5b04a", "#bbbbbb": "#6b727c", "#808080": "#8d959f",
  "#56b4e9": "#9ad4f7", "#b0b0b0": "#59606a",
};
const KIND = "data:image/svg+xml;base64,";
const pictures = [...document.querySelectorAll("img.picture")]
  .map((image) => ({ image, light: image.src, dark: null }));

function darkened(picture) {
  const drawn = atob(picture.light.slice(KIND.length));
  const hues = drawn.match(/#[0-9a-f]{6}\b/gi) || [];
  if (hues.some((hue) => !(hue.toLowerCase() in EXCHANGED))) {
    picture.image.classList.add("fixed");
    return picture.light;
  }
  // Paths without a fill of their own are black, which on dark is the ink.
  return KIND + btoa(drawn.replace(/#[0-9a-f]{6}\b/gi, (hue) => EXCHANGED[hue.toLowerCase()])
    .replace("<svg ", '<svg fill="#e6e8eb" '));
}

function show(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "light" : "dark";
  byId("theme").setAttribute("aria-label", "switch to " + byId("theme").textContent + " colours");
  for (const picture of pictures) {
    if (theme === "dark" && !picture.dark) picture.dark = darkened(picture);
    picture.image.src = theme === "dark" ? picture.dark : picture.light;
  }
}
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
prefersDark.addEventListener("change", () => show(prefersDark.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () =>
  show(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
let beforePrint = "light";
window.addEventListener("beforeprint", () => {
  beforePrint = document.documentElement.dataset.theme;
  show("light");
});
window.addEventListener("afterprint", () => show(beforePrint));
show(prefersDark.matches ? "dark" : "light");

// Tables: sorted by a click on a heading; long ones can be searched.
const LONG = 15;
const numeric = (text) => {
  const found = text.replace("×", "").replace("−", "-").match(/-?\d+(\.\d+)?/);
  return found ? Number(found[0]) : null;
};

function sort(table, column, falling) {
  const body = table.tBodies[0];
  const isNumber = table.tHead.rows[0].cells[column].classList.contains("n");
  const value = (row) => {
    const text = row.cells[column].textContent;
    return isNumber ? numeric(text) : text;
  };
  const sign = falling ? -1 : 1;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null); // unknown last, always
    return sign * (isNumber ? x - y : x.localeCompare(y, undefined, { numeric: true }));
  });
  body.append(...rows);
}

function sortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = node("button", "", head.textContent);
    button.type = "button";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const falling = head.ariaSort === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      sort(table, column, falling);
    });
  });
}

function searchable(table) {
  const rows = [...table.tBodies[0].rows];
  const input = node("input");
  input.type = "search";
  const count = node("span", "quiet");
  count.setAttribute("role", "status");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const left = rows.filter((row) => !row.hidden).length;
    count.textContent = left === rows.length ? "" : left + " of " + rows.length + " rows";
  });
  table.parentElement.before(
    node("div", "filters", node("label", "", "rows with ", input), count));
}
for (const table of document.querySelectorAll("table")) {
  sortable(table);
  if (table.tBodies[0].rows.length > LONG) searchable(table);
}
