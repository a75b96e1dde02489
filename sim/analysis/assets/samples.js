"use strict";
// Samples are untrusted text: they reach the page as text nodes only.
const rows = JSON.parse(document.getElementById("samples").textContent);
const LIMIT = 100;
const shown = document.getElementById("shown");
const cards = document.getElementById("cards");

function node(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function filter(id, label, values, test) {
  const select = node("select", "");
  select.id = id;
  select.append(new Option("all", ""));
  for (const value of values) select.append(new Option(String(value), String(value)));
  const wrapped = node("label", "", label);
  wrapped.append(select);
  document.getElementById("filters").append(wrapped);
  select.addEventListener("change", draw);
  return { select, test };
}

const unique = (name) => [...new Set(rows.map((row) => row[name]))];
const flipped = (row) => row.vote !== row.honest_vote;
const filters = [
  filter("round", "round", unique("round").sort((a, b) => a - b),
    (row, value) => String(row.round) === value),
  filter("stratum", "prompt", unique("stratum"), (row, value) => row.stratum === value),
  filter("voter", "voter", ["honest", "adversarial"],
    (row, value) => row.adversarial === (value === "adversarial")),
  filter("flip", "vote", ["as an honest voter", "flipped"],
    (row, value) => flipped(row) === (value === "flipped")),
];
const runs = unique("run");
if (runs.length > 1) {
  filters.unshift(filter("run", "run", runs, (row, value) => row.run === value));
}

function step(by) {
  const select = document.getElementById("round");
  select.selectedIndex = Math.min(
    select.options.length - 1, Math.max(1, select.selectedIndex + by));
  draw();
}
for (const [text, by] of [["← earlier", -1], ["later →", 1]]) {
  const button = node("button", "", text);
  button.type = "button";
  button.addEventListener("click", () => step(by));
  document.getElementById("filters").append(button);
}

function answer(row, side) {
  const chosen = row.vote === side;
  const words = row["answer_" + side];
  const harm = row["cost_" + side];
  const tag = node("span", "tag");
  if (chosen) tag.append(node("b", "", "chosen"), " · ");
  tag.append(side.toUpperCase());
  if (harm !== null) {
    tag.append(" · ", node("span", harm > 0.5 ? "bad" : "", "harm " + harm.toFixed(2)));
  }
  return node("div", "answer" + (chosen ? " chosen" : "") + (words.trim() ? "" : " empty-text"),
    tag, words.trim() ? words : "(empty)");
}

function card(row) {
  const who = row.adversarial
    ? node("span", "bad", "adversarial") : node("span", "good", "honest");
  const vote = { a: "voted A", b: "voted B", tie: "called a tie", skip: "skipped" }[row.vote];
  const line = node("div", "quiet", "annotator " + row.annotator + ", ", who, ", " + vote);
  if (flipped(row)) {
    const honest = { a: "A", b: "B", tie: "a tie", skip: "a skip" }[row.honest_vote];
    line.append("; ", node("span", "bad", "flipped"), " (honestly: " + honest + ")");
  }
  const head = "round " + row.round + " · " + row.stratum + " prompt" +
    (runs.length > 1 ? " · " + row.run : "");
  return node("div", "card" + (row.adversarial ? " adversarial" : ""),
    node("div", "quiet", head),
    node("div", "prompt", row.prompt),
    node("div", "answers", answer(row, "a"), answer(row, "b")),
    line);
}

function draw() {
  const kept = rows.filter((row) =>
    filters.every(({ select, test }) => !select.value || test(row, select.value)));
  cards.replaceChildren(...kept.slice(0, LIMIT).map(card));
  const rest = kept.length > LIMIT ? ", the first " + LIMIT + " shown" : "";
  shown.textContent = kept.length + " of " + rows.length + " recorded comparisons" + rest;
}
draw();
