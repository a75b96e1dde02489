// Arms at a glance, and the page of one run, which the address #run-3 shows.
const arms = new Map();
runs.forEach((run, place) => {
  if (!arms.has(run.arm)) arms.set(run.arm, []);
  arms.get(run.arm).push(place);
});
const asked = runs.reduce((most, run) => run.round.reduce((a, b) => Math.max(a, b), most), 1);
const harmOf = (run) => run.columns["harm"] || run.round.map(() => null);
const at = (run, round) => {
  const harm = harmOf(run);
  const place = run.round.findLastIndex((r, i) => r <= round && harm[i] !== null);
  return place < 0 ? run.limit : harm[place];
};

function armCard(arm, places) {
  const members = places.map((place) => runs[place]);
  const left = members.filter((run) => run.exits.confirmed !== null);
  const words = left.length + " of " + members.length + " left the safe set";
  const links = node("p", "quiet");
  places.forEach((place, i) => {
    const link = node("a", "", runs[place].replicate);
    link.href = "#run-" + place;
    links.append(i ? " · " : "", link);
  });
  const picture = chart({
    small: true, low: 0, high: 1, xLow: 0, xHigh: asked, limit: members[0].limit,
    alt: "Harm over rounds of " + arm + ": " + words,
    lines: members.map((run) => ({ x: run.round, y: harmOf(run), thin: true })),
    marks: left.map((run) => ({ x: run.exits.confirmed, y: at(run, run.exits.confirmed),
      kind: "confirmed", words: run.replicate + ": round " + run.exits.confirmed })),
  });
  const card = node("div", "panel", node("h3", "", arm), picture,
    node("p", left.length ? "bad" : "", words), links);
  return { card, text: arm.toLowerCase() };
}
if (byId("glance-cards")) {
  const cards = [...arms].map(([arm, places]) => armCard(arm, places));
  const input = byId("glance-filter");
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/);
    const kept = cards.filter(({ text }) => words.every((word) => text.includes(word)));
    byId("glance-cards").replaceChildren(...kept.map(({ card }) => card));
    byId("glance-count").textContent = kept.length + " of " + cards.length + " arms";
  };
  input.addEventListener("input", filter);
  filter();
}

function flat(tree, prefix = "") {
  return Object.entries(tree || {}).flatMap(([name, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value)
      ? flat(value, prefix + name + ".") : [[prefix + name, JSON.stringify(value)]]);
}
function manifestOf(run) {
  try { return JSON.parse(run.manifest); } catch { return {}; } // NaN is not JSON
}
let differing = null;
function settings(run) {
  if (!differing) {
    const seen = new Map();
    for (const other of runs) {
      for (const [name, value] of flat(manifestOf(other).config)) {
        if (!seen.has(name)) seen.set(name, new Set());
        seen.get(name).add(value);
      }
    }
    differing = new Set([...seen].filter(([, values]) => values.size > 1).map(([name]) => name));
  }
  const all = flat(manifestOf(run).config);
  const first = all.filter(([name]) => differing.has(name));
  return first.length ? first : all;
}

function tableOf(heads, rows) {
  const head = node("tr", "", ...heads.map((name) => node("th", "n", name)));
  const body = node("tbody");
  for (const row of rows) body.append(node("tr", "", ...row.map((v) => node("td", "n", v))));
  const box = node("div", "wide", node("table", "", node("thead", "", head), body));
  box.tabIndex = 0;
  return box;
}

function harmChart(run) {
  const marks = Object.entries(run.exits).filter(([, round]) => round !== null).map(
    ([kind, round]) => ({ kind, x: round, y: kind === "true" ? run.limit : at(run, round),
      words: kind + " exit, round " + round }));
  const band = run.columns["harm, low"]
    ? { x: run.round, low: run.columns["harm, low"], high: run.columns["harm, high"] } : null;
  const told = marks.map((mark) => mark.words).join(", ");
  return figureOf("Harm on harmful prompts", chart({
    low: 0, high: 1, xLow: 0, limit: run.limit, bracket: run.bracket, band, marks,
    lines: [{ x: run.round, y: harmOf(run) }], xLabel: "round", alt: run.words,
  }), node("p", "quiet", "Line: mean harm; band: its betting interval; dashed: the limit " +
    run.limit + (run.bracket ? "; grey: where the exit is certified to lie" : "") +
    (told ? ". Rings: " + told : "") + "."));
}

function charts(run) {
  const made = [harmChart(run)];
  const columns = run.columns;
  const plain = (whole, names, more) => {
    const lines = names.map((name, k) => ({ x: run.round, y: columns[name], k, name }))
      .filter((line) => line.y);
    if (!lines.length) return;
    const title = names.length > 1 && lines.length === 1
      ? lines[0].name[0].toUpperCase() + lines[0].name.slice(1) : whole;
    made.push(figureOf(title, chart({ lines, xLabel: "round", alt: title + " over rounds", ...more }),
      ...(lines.length > 1 ? [key(lines)] : [])));
  };
  if (columns["log e-value"]) {
    const powers = columns["log e-value"].map((v) => (v === null ? null : v / Math.LN10));
    const needed = Math.log10(run.needed);
    made.push(figureOf("Evidence of an exit", chart({
      lines: [{ x: run.round, y: powers }], limit: needed, low: -2, high: 3 * needed, xLow: 0,
      xLabel: "round", alt: "Power of ten of the e-value over rounds",
    }), node("p", "quiet", "Power of ten of the e-value, cut off at the top. Dashed: " +
      Number(run.needed.toPrecision(3)) + ", from where an exit is confirmed.")));
  }
  plain("Help and refusals", ["help", "refuses harmful", "refuses harmless"],
    { low: 0, high: 1, xLow: 0 });
  plain("Five meanings of ρ", ["ρ people", "ρ votes", "ρ flipped", "ρ flipped at risk",
    "ρ trained wrong"], { low: 0, high: 1, xLow: 0 });
  plain("Reward and utility", ["reward", "utility"], { xLow: 0 });
  plain("Distance from the start", ["KL"], { xLow: 0 });
  return node("div", "charts", ...made);
}

const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\"'\"'") + "'");
function commandLine(...words) {
  const code = node("code", "", words.join(" "));
  code.tabIndex = 0;
  return node("p", "command", code);
}

function runPage(place) {
  const run = runs[place];
  const link = (text, to) => { const a = node("a", "", text); a.href = to; return a; };
  const heading = node("h2", "", run.title);
  heading.tabIndex = -1;
  const ways = node("p", "", link("← all runs", "#" + (byId("runs") ? "runs" : "answer")));
  if (place > 0) ways.append(" · ", link("previous run", "#run-" + (place - 1)));
  if (place + 1 < runs.length) ways.append(" · ", link("next run", "#run-" + (place + 1)));
  if (byId("samples")) {
    const button = node("button", "", "what was said in it");
    button.type = "button";
    button.addEventListener("click", () => { location.hash = "#samples"; samplesOf(place); });
    ways.append(" ", button);
  }
  const names = Object.keys(run.columns);
  const evaluated = run.round.map((_, i) => i).filter((i) => harmOf(run)[i] !== null);
  const rows = evaluated.map((i) => [run.round[i], ...names.map((name) => run.columns[name][i])]
    .map((v) => (v === null ? "–" : String(v))));
  const raw = JSON.stringify(manifestOf(run), null, 1);
  const picture = ["cost_trace", "reward_vs_harm", "rho"].map((name) =>
    commandLine("poisonloop report", quoted(run.path), "--figure", name, "--out", name + ".svg"));
  return [ways, heading, node("p", "lead", run.words), charts(run),
    node("details", "", node("summary", "", "These pictures as files"), ...picture),
    node("h3", "", runs.length > 1 ? "Settings that differ between the runs here" : "Settings"),
    settingsTable(run),
    node("h3", "", "Its evaluations"), tableOf(["round", ...names], rows),
    node("details", "", node("summary", "", "Manifest"),
      node("p", "quiet", run.path + "/manifest.json"),
      node("pre", "", raw === "{}" ? run.manifest : raw))];
}

function settingsTable(run) {
  const body = node("tbody");
  for (const [name, value] of settings(run)) {
    body.append(node("tr", "", node("td", "", name), node("td", "", value)));
  }
  const box = node("div", "wide", node("table", "", body));
  box.tabIndex = 0;
  return box;
}

function route() {
  const found = /^#run-(\d+)$/.exec(location.hash);
  const place = found ? Number(found[1]) : -1;
  const alone = place >= 0 && place < runs.length;
  byId("overview").hidden = alone;
  byId("run").hidden = !alone;
  byId("run").replaceChildren(...(alone ? runPage(place) : []));
  if (alone) {
    for (const table of byId("run").querySelectorAll("thead")) sortable(table.parentElement);
    byId("run").querySelector("h2").focus({ preventScroll: true });
    window.scrollTo(0, 0);
  } else if (location.hash.length > 1) {
    byId(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  }
}
window.addEventListener("hashchange", route);
