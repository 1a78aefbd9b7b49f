"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const many = D.runs.length > 1;
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "1 5"];
const state = { run: 0, layer: null };
const byId = (id) => document.getElementById(id);

// -- small helpers ----------------------------------------------------------------------------------------------------

function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes = {}, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);
const colour = (index) => `var(--c${index % 8})`;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

function show(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size < 1e-3) return value.toExponential(1).replace("-", "−").replace("e-", "e−");
  return String(+value.toPrecision(4)).replace("-", "−");
}

function tip(text, x, y) {
  const box = byId("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const left = clamp(x + 14, 4, window.innerWidth - box.offsetWidth - 8);
  const below = y + 18 + box.offsetHeight < window.innerHeight;
  box.style.left = `${left + window.scrollX}px`;
  box.style.top = `${(below ? y + 18 : y - box.offsetHeight - 12) + window.scrollY}px`;
}

// Arrow keys move within a group of which one member is in the tab order.
function arrows(group, choose) {
  group.addEventListener("keydown", (event) => {
    const items = [...group.children];
    const at = items.indexOf(document.activeElement);
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = event.key === "Home" ? 0 : event.key === "End" ? items.length - 1 : at + move;
    if (at < 0 || Number.isNaN(next)) return;
    event.preventDefault();
    const index = (next + items.length) % items.length;
    choose(index);
    group.children[index].focus();
  });
}

// -- strips -----------------------------------------------------------------------------------------------------------

const decoded = new Map();
async function pixels(url) {
  if (!decoded.has(url)) {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = el("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    decoded.set(url, context.getImageData(0, 0, image.width, image.height));
  }
  return decoded.get(url);
}
const indexOf = new Map(D.palette.map((rgb, index) => [rgb.join(), index]));
function cell(image, column, row) {
  const at = 4 * (row * image.width + column);
  return indexOf.get([...image.data.slice(at, at + 3)].join());
}

function loadText(index) {
  const value = D.load_values[index];
  if (index === 0) return "idle: no token";
  if (value === null) return "unknown";
  return `${index === D.palette.length - 1 ? "≥ " : "≈ "}${value.toFixed(2)} × the mean load`;
}
function biasText(limit) {
  return (index) => (index === 1 ? "unknown" : `bias ≈ ${show(((index - D.first - D.half) / D.half) * limit)}`);
}

function stripFigure(title, url, strips, layer, text) {
  const { steps, experts } = strips;
  const image = el("img", { src: url, alt: "" });
  const cursor = el("div", { class: "cursor" });
  const height = clamp(experts * 5, 96, 330);
  const cells = el("div", { class: "cells", tabindex: 0, role: "img", style: `height:${height}px`,
    "aria-label": `${title}: ${experts} experts, steps ${steps[0][0]} to ${steps.at(-1)[1]}. Arrow keys read the cells.` }, image, cursor);
  const at = { column: 0, row: 0 };
  async function point(column, row) {
    at.column = clamp(column, 0, steps.length - 1);
    at.row = clamp(row, 0, experts - 1);
    const found = text(cell(await pixels(url), at.column, at.row));
    const [first, last] = steps[at.column];
    const box = cells.getBoundingClientRect();
    const [w, h] = [cells.clientWidth / steps.length, cells.clientHeight / experts];
    Object.assign(cursor.style, { display: "block", left: `${at.column * w - 2}px`, top: `${at.row * h - 2}px`,
      width: `${w + 4}px`, height: `${h + 4}px` });
    const when = first === last ? `step ${first}` : `steps ${first}–${last}`;
    tip(`layer ${layer}, expert ${at.row}, ${when}\n${found}`, box.left + (at.column + 0.5) * w, box.top + (at.row + 0.5) * h);
  }
  const leave = () => { cursor.style.display = "none"; tip(""); };
  cells.addEventListener("pointermove", (event) => {
    const box = cells.getBoundingClientRect();
    point(Math.floor(((event.clientX - box.left) / box.width) * steps.length),
      Math.floor(((event.clientY - box.top) / box.height) * experts));
  });
  cells.addEventListener("pointerleave", leave);
  cells.addEventListener("blur", leave);
  cells.addEventListener("keydown", (event) => {
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    point(at.column + move[0], at.row + move[1]);
  });
  const middle = steps[Math.floor(steps.length / 2)][1];
  return el("div", { class: "strip" }, el("h3", {}, title),
    el("div", { class: "experts", "aria-hidden": "true" }, el("span", {}, "0"), el("span", {}, String(experts - 1))), cells,
    el("div", { class: "steps", "aria-hidden": "true" }, el("span", {}, `step ${steps[0][0]}`),
      ...(steps.length > 2 ? [el("span", {}, `${middle}`)] : []), el("span", {}, `${steps.at(-1)[1]}`)));
}

function loadScale() {
  const [from, to] = [D.first, D.palette.length];
  const stops = D.palette.slice(from, to).map((rgb) => `rgb(${rgb.join()})`).join();
  const marks = [0, 0.5, 1, 2, 16].map((value) => {
    const at = D.load_values.findIndex((v, index) => index >= from && v >= value - 1e-9) - from;
    return el("span", { style: `left:${(100 * at) / (to - from - 1)}%` }, `${value}${value ? "×" : ""}`);
  });
  return el("div", { class: "scale", "aria-hidden": "true" }, el("i", {}, "idle"),
    el("div", { style: `background:linear-gradient(90deg,${stops})` }, ...marks));
}

function layersOf(run) {
  const names = Object.keys(run.series).filter((key) => /\/layer_\d+$/.test(key)).map((key) => +key.match(/\d+$/)[0]);
  return [...new Set([...run.layers, ...names])].sort((a, b) => a - b);
}

function drawTabs() {
  const tabs = byId("run-tabs");
  const choose = (index) => { state.run = index; drawTabs(); drawLayers(); drawLayer(); };
  if (!tabs.dataset.ready) arrows(tabs, choose);
  tabs.dataset.ready = "yes";
  tabs.replaceChildren(...(many ? D.runs : []).map((run, index) => {
    const tab = el("button", { type: "button", role: "tab", "aria-selected": index === state.run, "aria-controls": "strip-panel",
      tabindex: index === state.run ? 0 : -1 }, run.name);
    tab.addEventListener("click", () => choose(index));
    return tab;
  }));
  tabs.hidden = !many;
}

function drawLayers() {
  const run = D.runs[state.run];
  const layers = layersOf(run);
  if (!layers.includes(state.layer)) state.layer = layers[0] ?? null;
  const group = byId("layers");
  const choose = (index) => { state.layer = layersOf(D.runs[state.run])[index]; mark(); drawLayer(); };
  const mark = () => [...group.children].forEach((item) => {
    const on = +item.dataset.layer === state.layer;
    item.setAttribute("aria-checked", on);
    item.tabIndex = on ? 0 : -1;
  });
  if (!group.dataset.ready) arrows(group, choose);
  group.dataset.ready = "yes";
  group.replaceChildren(...layers.map((layer, index) => {
    const place = run.layers.indexOf(layer);
    const picture = run.strips && place >= 0 ? [el("img", { src: run.strips.load[place], alt: "", loading: "lazy" })] : [];
    const item = el("div", { role: "radio", "data-layer": layer }, ...picture, `layer ${layer}`);
    item.addEventListener("click", () => { choose(index); item.focus(); });
    return item;
  }));
  mark();
}

function stripsOf(kind, text, title) {
  return D.runs.map((run) => {
    const place = run.layers.indexOf(state.layer);
    const name = many ? `${run.name}: ` : "";
    if (run.dense) return el("p", { class: "empty" }, `${name}no layer of this model has experts`);
    if (!run.strips) return el("p", { class: "empty" }, `${name}no loads to draw yet: loads.npz is written with each checkpoint`);
    if (place < 0) return el("p", { class: "empty" }, `${name}has no layer ${state.layer}`);
    if (!run.strips[kind]) return el("p", { class: "empty" }, `${name}loads.npz holds no ${kind}: an older version wrote it`);
    return stripFigure(`${name}${title(run, place)}`, run.strips[kind][place], run.strips, state.layer, text(run, place));
  });
}

function drawLayer() {
  const layer = state.layer;
  byId("strip-panel").replaceChildren(...stripsOf("load", () => loadText, () => `layer ${layer}, load of each expert`),
    ...(D.runs.some((run) => run.strips) ? [loadScale()] : []));
  const band = bandLines();
  byId("bias-panel").replaceChildren(
    ...(band.length ? [chart({ title: `Bias of layer ${layer}, over its experts`, unit: "score", lines: band })] : []),
    ...stripsOf("bias", (run, place) => biasText(run.strips.bias_limit[place]),
      (run, place) => `layer ${layer}, bias of each expert, −${show(run.strips.bias_limit[place])} (blue) to ${show(run.strips.bias_limit[place])} (orange)`));
  for (const figure of document.querySelectorAll("[data-per-layer], #bias-panel figure")) figure.redraw();
}

function bandLines() {
  const labels = ["lowest", "10 %", "median", "90 %", "highest"];
  return D.runs.flatMap((run, index) => {
    const place = run.layers.indexOf(state.layer);
    const band = run.strips && run.strips.band && place >= 0 ? run.strips.band[place] : [];
    return band.map((y, i) => ({ name: `${many ? `${run.name}: ` : ""}${labels[i]}`, x: run.strips.band_steps, y,
      colour: colour(many ? index : [1, 3, 0, 3, 1][i]), dash: DASHES[[2, 1, 0, 1, 2][i]] }));
  });
}

// -- the rest ---------------------------------------------------------------------------------------------------------

function table(head, rows, label) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((text) => el("td", {}, text)))))));
}
const list = (pairs) => el("dl", {}, ...pairs.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]));

function drawText() {
  const names = D.runs.map((run) => run.name);
  document.title = `${names.join(", ")} – alf-moe`;
  byId("title").textContent = many ? `Comparison of ${names.length} runs` : names[0];
  byId("made").textContent = `alf-moe report, ${D.made}${many ? `: ${names.join(", ")}` : ""}`;
  const verdict = byId("verdict");
  verdict.hidden = !many;
  verdict.classList.toggle("bad", D.comparability.length > 0);
  const fine = "Comparable: the same data in the same order, initial weights, tokens and active FLOPs.";
  verdict.replaceChildren(...(D.comparability.length ? D.comparability : [fine]).map((text) => el("p", {}, text)));
  const notes = D.runs.flatMap((run) => run.problems.map((text) => (many ? `${run.name}: ${text}` : text)));
  byId("notes").hidden = !notes.length;
  byId("notes").replaceChildren(...notes.map((text) => el("p", {}, text)));
  byId("facts").replaceChildren(...D.runs.map((run) => el("div", {}, ...(many ? [el("h3", {}, run.name)] : []), list(run.facts))));
  drawConfiguration();
  byId("event-list").replaceChildren(...D.runs.flatMap((run) => [
    ...(many ? [el("h3", {}, run.name)] : []),
    ...(run.events_left_out ? [el("p", { class: "muted" }, `${run.events_left_out} earlier events are in events.jsonl.`)] : []),
    run.events.length ? table(["time", "event", "step", "what"], run.events, `Events of ${run.name}`) : el("p", { class: "empty" }, "no events")]));
}

function drawConfiguration() {
  const parts = [];
  const changed = Object.entries(D.differences);
  if (many) parts.push(el("h3", {}, "What differs"), changed.length
    ? table(["setting", ...D.runs.map((run) => run.name)], changed.map(([key, values]) => [key, ...values.map((v) => (v === null ? "–" : String(v)))]), "Settings that differ")
    : el("p", { class: "muted" }, "no setting"));
  for (const run of D.runs) {
    const sections = Object.groupBy ? Object.groupBy(Object.entries(run.config), ([key]) => key.split(".")[0]) : { settings: Object.entries(run.config) };
    const blocks = [...Object.entries(sections), ["run.json", Object.entries(run.about)]].filter(([, pairs]) => pairs.length)
      .map(([name, pairs]) => el("dl", {}, el("dt", {}, el("b", {}, `[${name}]`)), el("dd"),
        ...pairs.flatMap(([key, value]) => [el("dt", {}, key.replace(`${name}.`, "")), el("dd", {}, value)])));
    const details = el("details", {}, el("summary", {}, many ? `Everything of ${run.name}` : "Every setting"),
      blocks.length ? el("div", { class: "columns" }, ...blocks) : el("p", { class: "empty" }, "no configuration to read"));
    details.open = !many;
    parts.push(details);
  }
  byId("config").replaceChildren(...parts);
}

function theme() {
  const button = byId("theme");
  const kinds = ["system", "light", "dark"];
  let at = 0;
  button.addEventListener("click", () => {
    at = (at + 1) % 3;
    if (at) document.documentElement.dataset.theme = kinds[at];
    else delete document.documentElement.dataset.theme;
    button.textContent = `◐ ${kinds[at]}`;
    button.setAttribute("aria-label", `Colours: ${at ? kinds[at] : "as the system"}`);
  });
}

function redrawAll() {
  for (const figure of document.querySelectorAll("figure")) figure.redraw();
}

function start() {
  theme();
  drawText();
  byId("charts").replaceChildren(...D.charts.map(chart));
  drawTabs();
  drawLayers();
  drawLayer();
  redrawAll();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; redrawAll(); }
  });
  window.addEventListener("keydown", (event) => { if (event.key === "Escape") tip(""); });
}
