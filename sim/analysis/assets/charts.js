// Small line charts, drawn from the rows that the page holds.
const SVG = "http://www.w3.org/2000/svg";
// Rings of one round stand inside each other.
const RADII = { sustained: 9.5, naive: 7, confirmed: 4.5, true: 4.5 };

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) {
    found.push(Number(at.toPrecision(12)));
  }
  return found;
}

// A line through the values that there are: between evaluations nothing was measured.
function pathOf(xs, ys, x, y) {
  let path = "";
  xs.forEach((at, i) => {
    if (ys[i] === null) return;
    path += (path ? "L" : "M") + x(at).toFixed(1) + " " + y(ys[i]).toFixed(1);
  });
  return path;
}

/* spec: { lines: [{x, y, name, k, thin}], xLabel, yLabel, low, high, limit, band: {x, low, high},
   bracket: [left, right], marks: [{x, y, kind, words}], small, alt } */
function chart(spec) {
  const [width, height] = spec.small ? [200, 84] : [520, 250];
  const edge = spec.small ? { l: 22, r: 6, t: 5, b: 15 } : { l: 46, r: 14, t: 10, b: 38 };
  const every = spec.lines.flatMap((line) => line.x.filter((_, i) => line.y[i] !== null));
  const values = spec.lines.flatMap((line) => line.y).filter((v) => v !== null);
  const reduce = (list, pick, start) => list.reduce((a, b) => pick(a, b), start);
  const xLow = spec.xLow ?? reduce(every, Math.min, Infinity);
  const xHigh = Math.max(spec.xHigh ?? reduce(every, Math.max, -Infinity), xLow + 1e-9);
  let low = spec.low ?? reduce(values, Math.min, Infinity);
  let high = spec.high ?? reduce(values, Math.max, -Infinity);
  if (spec.low === undefined || spec.high === undefined) {
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    if (spec.low === undefined) low -= room;
    if (spec.high === undefined) high += room;
  }
  const x = (v) => edge.l + ((v - xLow) / (xHigh - xLow)) * (width - edge.l - edge.r);
  const y = (v) => height - edge.b - ((Math.min(v, high) - low) / (high - low)) *
    (height - edge.t - edge.b);
  const made = shape("svg", {
    viewBox: "0 0 " + width + " " + height, class: "chart", role: "img", "aria-label": spec.alt,
  });
  const add = (tag, attributes, text) => made.append(shape(tag, attributes, text));
  if (spec.limit !== undefined) {
    add("rect", { class: "outside", x: x(xLow), y: y(high), width: x(xHigh) - x(xLow),
      height: Math.max(0, y(spec.limit) - y(high)) });
  }
  if (spec.bracket) {
    add("rect", { class: "bracket", x: x(spec.bracket[0]), y: y(high),
      width: Math.max(1, x(spec.bracket[1]) - x(spec.bracket[0])), height: y(low) - y(high) });
  }
  for (const at of spec.small ? [0, 1] : ticks(low, high, 4)) {
    if (!spec.small) add("path", { class: "grid", d: "M" + x(xLow) + " " + y(at) + "H" + x(xHigh) });
    add("text", { x: edge.l - 5, y: y(at) + 4, "text-anchor": "end" }, String(at));
  }
  for (const at of spec.small ? [xLow, xHigh] : ticks(xLow, xHigh, 6)) {
    const anchor = spec.small && at === xHigh ? "end" : spec.small ? "start" : "middle";
    add("text", { x: x(at), y: height - edge.b + 13, "text-anchor": anchor }, String(at));
  }
  add("path", { class: "axis", d: "M" + x(xLow) + " " + y(high) + "V" + y(low) + "H" + x(xHigh) });
  if (spec.band) {
    const known = spec.band.x.map((_, i) => i).filter((i) => spec.band.low[i] !== null);
    const up = known.map((i) => x(spec.band.x[i]) + " " + y(spec.band.high[i]));
    const down = known.reverse().map((i) => x(spec.band.x[i]) + " " + y(spec.band.low[i]));
    if (up.length) add("path", { class: "band", d: "M" + [...up, ...down].join("L") + "Z" });
  }
  if (spec.limit !== undefined) {
    add("path", { class: "limit", d: "M" + x(xLow) + " " + y(spec.limit) + "H" + x(xHigh) });
  }
  for (const line of spec.lines) {
    add("path", { class: "line k" + (line.k || 0) + (line.thin ? " thin" : ""),
      d: pathOf(line.x, line.y, x, y) });
  }
  for (const mark of spec.marks || []) {
    const ring = shape("circle", { class: "exit " + mark.kind, cx: x(mark.x), cy: y(mark.y),
      r: spec.small ? 3 : RADII[mark.kind] });
    ring.append(shape("title", {}, mark.words));
    made.append(ring);
  }
  if (spec.xLabel) {
    add("text", { x: (x(xLow) + x(xHigh)) / 2, y: height - 4, "text-anchor": "middle" }, spec.xLabel);
  }
  return made;
}

// A key in words under a chart: one entry per line.
function key(lines) {
  const made = node("p", "quiet");
  lines.forEach((line, i) => {
    const swatch = shape("svg", { width: 22, height: 8, "aria-hidden": "true" });
    swatch.append(shape("path", { class: "line key k" + (line.k || 0), d: "M0 5H20" }));
    made.append(i ? "   " : "", swatch, " " + line.name);
  });
  return made;
}

function figureOf(title, svg, ...more) {
  return node("figure", "", node("h3", "", title), svg, ...more);
}
