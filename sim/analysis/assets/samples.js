// The browser of samples: filters over columns, a page at a time.
const sampled = JSON.parse(byId("sample-data").textContent);
const total = sampled.round.length;
const PER_PAGE = 25;
let kept = [];
let shownPage = 0;
let samplesOf = () => {};

function sampleOf(i) {
  const row = {};
  for (const name of Object.keys(sampled)) row[name] = sampled[name][i];
  return row;
}

function sampleFilters() {
  const box = byId("filters");
  const label = (text, control, id) => {
    control.id = id;
    box.append(node("label", "", text, control));
    return control;
  };
  const select = (id, text, values) => {
    const made = node("select");
    made.append(new Option("all", ""));
    for (const [value, words] of values) made.append(new Option(words, value));
    return label(text, made, id);
  };
  const unique = (name) => [...new Set(sampled[name])].sort((a, b) => (a > b) - (a < b));
  const plain = (values) => values.map((value) => [String(value), String(value)]);
  const present = unique("run");
  const inArm = (arm) => present.filter((place) => !arm || runs[place].arm === arm);
  const known = [...new Set(present.map((place) => runs[place].arm))];
  const several = present.length > 1;
  const arm = several && known.length > 1 ? select("by-arm", "arm", plain(known)) : null;
  const run = several ? select("by-run", "run", []) : null;
  const listRuns = () => {
    if (!run) return;
    const options = inArm(arm && arm.value).map((place) => new Option(
      arm && arm.value ? runs[place].replicate : runs[place].title, String(place)));
    run.replaceChildren(new Option("all", ""), ...options);
  };
  listRuns();
  const round = select("by-round", "round", plain(unique("round")));
  const stratum = select("by-stratum", "prompt", plain(unique("stratum")));
  const voter = select("by-voter", "asker or annotator",
    [["honest", "honest"], ["adversarial", "adversarial"]]);
  const vote = select("by-vote", "vote",
    [["same", "as an honest voter"], ["flipped", "flipped"]]);
  const exit = select("by-exit", "policy", [["before", "before its confirmed exit"],
    ["after", "from its exit on"], ["never", "of a run without an exit"]]);
  const search = node("input");
  search.type = "search";
  label("text has", search, "by-text");

  const texts = [];
  const text = (i) => (texts[i] ??= (sampled.prompt[i] + "\n" + sampled.answer_a[i] + "\n" +
    sampled.answer_b[i]).toLowerCase());
  const side = (i) => {
    const left = runs[sampled.run[i]].exits.confirmed;
    return left === null ? "never" : sampled.round[i] >= left ? "after" : "before";
  };
  const filter = () => {
    const words = search.value.toLowerCase();
    const tests = [
      arm && arm.value && ((i) => runs[sampled.run[i]].arm === arm.value),
      run && run.value && ((i) => sampled.run[i] === Number(run.value)),
      round.value && ((i) => sampled.round[i] === Number(round.value)),
      stratum.value && ((i) => sampled.stratum[i] === stratum.value),
      voter.value && ((i) => sampled.adversarial[i] === (voter.value === "adversarial")),
      vote.value && ((i) =>
        (sampled.vote[i] !== sampled.honest_vote[i]) === (vote.value === "flipped")),
      exit.value && ((i) => side(i) === exit.value),
      words && ((i) => text(i).includes(words)),
    ].filter(Boolean);
    kept = [];
    for (let i = 0; i < total; i++) if (tests.every((test) => test(i))) kept.push(i);
    drawPage(0);
  };
  if (arm) arm.addEventListener("change", listRuns);
  for (const control of box.querySelectorAll("select, input")) {
    control.addEventListener(control === search ? "input" : "change", filter);
  }
  const step = (by) => {
    const most = round.options.length - 1;
    round.selectedIndex = Math.min(most, Math.max(1, round.selectedIndex + by));
    filter();
  };
  for (const [words, by] of [["← earlier round", -1], ["later round →", 1]]) {
    const button = node("button", "", words);
    button.type = "button";
    button.addEventListener("click", () => step(by));
    box.append(button);
  }
  const clear = node("button", "", "clear");
  clear.type = "button";
  clear.addEventListener("click", () => {
    for (const control of box.querySelectorAll("select, input")) control.value = "";
    listRuns();
    filter();
  });
  box.append(clear);
  samplesOf = (place) => {
    clear.click();
    if (run) run.value = String(place);
    filter();
  };
  filter();
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

function sampleCard(row) {
  const who = row.adversarial
    ? node("span", "bad", "adversarial") : node("span", "good", "honest");
  const vote = { a: "voted A", b: "voted B", tie: "called a tie", skip: "skipped, as worth the same" }[row.vote];
  const line = node("div", "quiet", "annotator " + row.annotator + ", ", who, ", " + vote);
  if (row.vote !== row.honest_vote) {
    const honest = { a: "A", b: "B", tie: "a tie", skip: "a skip" }[row.honest_vote];
    line.append("; ", node("span", "bad", "flipped"), " (honestly: " + honest + ")");
  }
  const head = node("div", "quiet", "round " + row.round + " · " + row.stratum + " prompt");
  if (runs.length > 1) {
    const link = node("a", "", runs[row.run].title);
    link.href = "#run-" + row.run;
    head.append(" · ", link);
  }
  return node("div", "said" + (row.adversarial ? " adversarial" : ""), head,
    node("div", "prompt", row.prompt),
    node("div", "answers", answer(row, "a"), answer(row, "b")), line);
}

function drawPage(page) {
  const last = Math.max(0, Math.ceil(kept.length / PER_PAGE) - 1);
  shownPage = Math.min(last, Math.max(0, page));
  const from = shownPage * PER_PAGE;
  const rows = kept.slice(from, from + PER_PAGE);
  byId("cards").replaceChildren(...rows.map((i) => sampleCard(sampleOf(i))));
  byId("shown").textContent = kept.length.toLocaleString("en") + " of " +
    total.toLocaleString("en") + " comparisons";
  const button = (words, to, off) => {
    const made = node("button", "", words);
    made.type = "button";
    made.disabled = off;
    made.addEventListener("click", () => { drawPage(to); byId("shown").scrollIntoView(); });
    return made;
  };
  byId("pager").replaceChildren(
    button("← previous", shownPage - 1, shownPage === 0),
    node("span", "quiet", "page " + (shownPage + 1) + " of " + (last + 1)),
    button("next →", shownPage + 1, shownPage === last));
}
if (byId("samples")) sampleFilters();
route();
