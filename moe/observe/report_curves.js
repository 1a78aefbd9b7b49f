// The curves of the report: one figure a chart. Follows report.js in one script.
function linesOf(spec) {
  return D.runs.flatMap((run, r) => spec.lines.flatMap(([key, label], i) => {
    const layered = key.endsWith("layer_");
    const name = layered ? Object.keys(run.series).find((k) => k.startsWith(key) && +k.slice(key.length) === state.layer) : key;
    const data = run.series[name];
    if (!data || !data[0].length) return [];
    const text = layered ? `layer ${state.layer}` : label;
    return [{ name: many ? `${run.name}: ${text}` : text, x: data[0], y: data[1], colour: colour(many ? r : i), dash: DASHES[i % 5] }];
  }));
}

function ticks(low, high, log, most) {
  if (log && high > 4 * low) {
    const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const every = Math.max(1, Math.ceil((to - from) / most));
    const parts = to - from <= 2 ? [1, 2, 5] : [1];
    const found = [];
    for (let e = from; e <= to; e += every) for (const p of parts) found.push(p * 10 ** e);
    return found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
  }
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / size) * size; v <= high + size * 1e-9; v += size) found.push(Math.abs(v) < size * 1e-9 ? 0 : v);
  return found;
}

function limits(values, log) {
  let [low, high] = [Infinity, -Infinity];
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  const pad = log ? 0 : (high - low) * 0.04;
  return [low - pad, high + pad];
}

function plot(lines, floors, logX, logY, width, title, unit) {
  const height = 250, left = 52, right = 10, top = 16, bottom = 26;
  const all = (axis) => lines.flatMap((line) => line[axis]);
  const [x0, x1] = lines.length && all("x").length > 1 && logX ? limits(all("x"), true) : limits(all("x"), false);
  const [y0, y1] = limits([...all("y"), ...floors], logY);
  const place = (v, a, b, log) => (log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a));
  const px = (v) => left + place(v, x0, x1, logX) * (width - left - right);
  const py = (v) => height - bottom - place(v, y0, y1, logY) * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img" });
  for (const v of ticks(y0, y1, logY, 5))
    picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py(v), y2: py(v) }),
      svg("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, show(v)));
  for (const v of ticks(x0, x1, logX, Math.max(3, Math.floor(width / 110))))
    picture.append(svg("line", { class: "grid", x1: px(v), x2: px(v), y1: top, y2: height - bottom }),
      svg("text", { x: clamp(px(v), left, width - right - 12), y: height - 10, "text-anchor": "middle" }, show(v)));
  picture.append(svg("text", { x: left, y: 10 }, unit));
  for (const v of floors) picture.append(svg("line", { class: "floor", x1: left, x2: width - right, y1: py(v), y2: py(v) }));
  for (const line of lines) {
    const path = line.x.map((x, i) => `${line.begins[i] ? "M" : "L"}${px(x).toFixed(1)} ${py(line.y[i]).toFixed(1)}`).join("");
    picture.append(svg("path", { class: "curve", d: path, stroke: line.colour, "stroke-dasharray": line.dash || null }));
    if (line.x.length < 25 || line.begins.filter(Boolean).length > 1)
      for (const [i, x] of line.x.entries()) picture.append(svg("circle", { cx: px(x), cy: py(line.y[i]), r: 2.6, fill: line.colour }));
  }
  const ends = lines.map((line) => `${line.name} ${show(line.y[0])} to ${show(line.y.at(-1))}`).join("; ");
  picture.setAttribute("aria-label", `${title}: ${ends}. Arrow keys read the values.`);
  readable(picture, lines, px, width, top, height - bottom);
  return picture;
}

// The cross-hair: pointer or arrow keys, values of every curve at the nearest step.
function readable(picture, lines, px, width, top, bottom) {
  const hair = svg("line", { class: "hair", y1: top, y2: bottom });
  picture.append(hair);
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  let at = 0;
  const nearest = (xs, x) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0);
  function point(index) {
    at = clamp(index, 0, steps.length - 1);
    const box = picture.getBoundingClientRect();
    const x = px(steps[at]);
    hair.setAttribute("x1", x);
    hair.setAttribute("x2", x);
    hair.style.visibility = "visible";
    const values = lines.map((line) => {
      const i = nearest(line.x, steps[at]);
      return `${line.name}: ${show(line.y[i])}${line.x[i] === steps[at] ? "" : ` (step ${line.x[i]})`}`;
    });
    tip(`step ${steps[at]}\n${values.join("\n")}`, box.left + (x / width) * box.width, box.top + box.height * 0.3);
  }
  const leave = () => { hair.style.visibility = "hidden"; tip(""); };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    point(steps.reduce((best, step, i) => (Math.abs(px(step) - x) < Math.abs(px(steps[best]) - x) ? i : best), 0));
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20 }[event.key];
    if (!move) return;
    event.preventDefault();
    point(at + move);
  });
}

function legendItem(line, hidden, redraw) {
  const sample = svg("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: line.colour, "stroke-width": 2.4, "stroke-dasharray": line.dash || null }));
  const item = el("button", { type: "button", "aria-pressed": !hidden.has(line.name) }, sample, line.name);
  item.addEventListener("click", () => {
    if (!hidden.delete(line.name)) hidden.add(line.name);
    redraw();
  });
  return item;
}

function chart(spec) {
  const shape = { x: Boolean(spec.log_x), y: Boolean(spec.log_y) };
  const hidden = new Set();
  const heading = el("h3", {}, spec.title);
  const axes = el("div", { class: "axes" }, ...["x", "y"].map((axis) => {
    const button = el("button", { type: "button", "aria-pressed": shape[axis], "aria-label": `${spec.title}: logarithmic ${axis} axis` }, `log ${axis}`);
    button.addEventListener("click", () => {
      shape[axis] = !shape[axis];
      button.setAttribute("aria-pressed", shape[axis]);
      figure.redraw();
    });
    return button;
  }));
  const body = el("div");
  const figure = el("figure", { "aria-label": spec.title }, el("header", {}, heading, axes), body);
  if (spec.lines.some((line) => Array.isArray(line) && line[0].endsWith("layer_"))) figure.dataset.perLayer = "yes";
  figure.redraw = () => {
    const everything = Array.isArray(spec.lines[0]) ? linesOf(spec) : spec.lines;
    const notes = [spec.note, ...boundNotes(spec, everything)].filter(Boolean);
    const floors = spec.floor ? [...new Set(D.runs.map((run) => run.floor).filter((v) => v > 0))] : [];
    let dropped = 0;
    const lines = everything.filter((line) => !hidden.has(line.name)).map((line) => {
      const keep = line.x.map((x, i) => (!shape.x || x > 0) && (!shape.y || line.y[i] > 0));
      dropped += keep.filter((k) => !k).length;
      const kept = [...keep.keys()].filter((i) => keep[i]);
      const begins = kept.map((i) => i === 0 || !keep[i - 1]); // no line over what is left out
      return { ...line, x: kept.map((i) => line.x[i]), y: kept.map((i) => line.y[i]), begins };
    }).filter((line) => line.x.length);
    if (dropped) notes.push(`${dropped} value${dropped > 1 ? "s" : ""} at or below 0 ${dropped > 1 ? "have" : "has"} no place on a logarithmic axis: switch it off to see ${dropped > 1 ? "them" : "it"}.`);
    if (floors.length) notes.push(`Dotted: sampling floor ${floors.map(show).join(", ")}.`);
    const width = Math.max(300, Math.round(figure.clientWidth || 560) - 26);
    body.replaceChildren(
      lines.length ? plot(lines, floors, shape.x, shape.y, width, spec.title, spec.unit)
        : el("p", { class: "empty" }, everything.length ? "nothing to draw on this axis" : "not in the metrics of this run"),
      el("div", { class: "legend" }, ...everything.map((line) => legendItem(line, hidden, figure.redraw))),
      ...notes.map((note) => el("p", { class: "note" }, note)));
  };
  return figure;
}

function boundNotes(spec, lines) {
  if (!lines.length || !spec.lines.some((line) => line[0] === "regret/bound/max")) return [];
  return D.runs.filter((run) => run.covered === 0)
    .map((run) => `No bound covers balance.method = ${run.method ?? "?"}${many ? ` (${run.name})` : ""}: the theory has none for this rule or rate.`);
}

start();
