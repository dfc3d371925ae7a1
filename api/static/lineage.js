// What was made from what, as a layered graph of links: inputs above, results below.

import { count, h, show, table } from "./dom.js";
import { api } from "./net.js";

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 172;
const HEIGHT = 48;
const THIN = 18; // of an edge that passes a layer
const GAP = 16;
const LAYER = 40; // between layers
const SWEEPS = 6;

export async function lineageView(body, { path, told, signal }) {
  const all = h("input", { type: "checkbox", id: "descendants", checked: true });
  const place = h("div");
  const draw = async () => {
    const graph = await api(`${path}/lineage?descendants=${all.checked}`, { signal });
    const frame = h("div", { class: "wide graph", tabindex: 0, role: "region", "aria-label": "Lineage as a graph; the same as a table below" }, picture(graph));
    show(place, frame,
      graph.left_out ? h("p", { class: "soft" }, `${count(graph.left_out)} more tables are not shown.`) : null,
      h("details", { class: "alternative" }, h("summary", {}, "The same as a table"), words(graph)));
    const here = frame.querySelector(".here").getBoundingClientRect();
    const box = frame.getBoundingClientRect();
    frame.scrollLeft += here.left + here.width / 2 - box.left - box.width / 2;
  };
  all.addEventListener("change", draw);
  show(body, h("p", {}, h("label", { class: "check" }, all, ` Show what was made from ${told.name}, too`)), place);
  await draw();
}

function words(graph) {
  const names = new Map(graph.nodes.map((one) => [one.key, one.name]));
  const inputs = (key) => graph.edges.filter((edge) => edge.to === key).map((edge) => names.get(edge.from)).join(", ") || "nothing: a source";
  return table("Tables and their inputs", [
    { name: "Table", text: (one) => h("a", { href: `#/tables/${one.key.slice(0, 16)}` }, one.name) },
    { name: "Step", text: (one) => one.step ?? "missing" },
    { name: "Made from", text: (one) => inputs(one.key) },
    { name: "Rows", text: (one) => count(one.rows ?? 0), number: true },
    { name: "Kept", text: (one) => count(one.kept ?? 0), number: true },
  ], [...graph.nodes].sort((a, b) => a.depth - b.depth));
}

/** Layers of boxes, and of thin places where an edge passes a layer (Sugiyama's method). */
export function layout(graph) {
  const boxes = new Map(graph.nodes.map((one) => [one.key, { ...one, width: WIDTH, up: [], down: [] }]));
  const layers = [];
  const put = (box, depth) => (layers[depth] ??= []).push(box);
  for (const box of boxes.values()) put(box, box.depth);
  // Edges of one source share their way past a layer, so that many of them stay readable.
  const thins = new Map();
  const through = (from, depth) => {
    const name = `${from.key} ${depth}`;
    if (!thins.has(name)) {
      thins.set(name, { width: THIN, depth, up: [], down: [], thin: true });
      put(thins.get(name), depth);
    }
    return thins.get(name);
  };
  const lines = [];
  const join = (above, below) => {
    if (above.down.includes(below)) return;
    above.down.push(below);
    below.up.push(above);
    lines.push([above, below]);
  };
  for (const { from, to } of graph.edges) {
    const source = boxes.get(from);
    let last = source;
    for (let depth = source.depth + 1; depth < boxes.get(to).depth; depth += 1) {
      const thin = through(source, depth);
      join(last, thin);
      last = thin;
    }
    join(last, boxes.get(to));
  }
  const rank = () => layers.forEach((layer) => layer.forEach((box, place) => { box.place = place; }));
  const mean = (list, fallback) => (list.length ? list.reduce((sum, one) => sum + one.place, 0) / list.length : fallback);
  rank();
  for (let sweep = 0; sweep < SWEEPS; sweep += 1) {
    const side = sweep % 2 ? "down" : "up";
    for (const layer of sweep % 2 ? [...layers].reverse() : layers) {
      for (const box of layer) box.wish = mean(box[side], box.place);
      layer.sort((a, b) => a.wish - b.wish);
      layer.forEach((box, place) => { box.place = place; });
    }
  }
  const widths = layers.map((layer) => layer.reduce((sum, box) => sum + box.width + GAP, -GAP));
  const width = Math.max(...widths, WIDTH);
  layers.forEach((layer, depth) => {
    let x = (width - widths[depth]) / 2;
    for (const box of layer) {
      box.x = x;
      box.y = depth * (HEIGHT + LAYER);
      x += box.width + GAP;
    }
  });
  return { boxes: [...boxes.values()], lines, width, height: layers.length * (HEIGHT + LAYER) - LAYER };
}

function s(tag, attributes, ...children) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

function picture(graph) {
  const { boxes, lines, width, height } = layout(graph);
  const pad = 8;
  const title = s("title", {}, document.createTextNode(`${boxes.length} tables and ${graph.edges.length} links between them, sources at the top`));
  const view = `${-pad} ${-pad} ${width + 2 * pad} ${height + 2 * pad}`;
  const svg = s("svg", { viewBox: view, width: width + 2 * pad, height: height + 2 * pad, role: "group", "aria-label": title.textContent }, title);
  for (const line of lines) svg.append(s("path", { class: "edge", d: curve(line) }));
  for (const box of boxes.sort((a, b) => a.depth - b.depth || a.x - b.x)) svg.append(node(box, box.key === graph.key));
  return svg;
}

function curve([above, below]) {
  const from = above.x + above.width / 2;
  const to = below.x + below.width / 2;
  const middle = above.y + HEIGHT + LAYER / 2;
  return `M${from} ${above.y + HEIGHT}C${from} ${middle} ${to} ${middle} ${to} ${below.y}${below.thin ? `V${below.y + HEIGHT}` : ""}`;
}

function node(box, here) {
  const label = box.missing ? "missing" : `${box.step}, ${count(box.rows)} rows`;
  const cut = (text) => (text.length > 22 ? `${text.slice(0, 21)}…` : text);
  const text = (y, name, words) => s("text", { x: box.x + 10, y: box.y + y, class: name }, document.createTextNode(cut(words)));
  const inside = [
    s("title", {}, document.createTextNode(`${box.name}: ${label}`)),
    s("rect", { x: box.x, y: box.y, width: WIDTH, height: HEIGHT, rx: 7 }),
    text(20, "name", box.name), text(38, "note", box.missing ? label : `${box.step} · ${count(box.rows)}`),
  ];
  if (box.missing) return s("g", { class: "node missing" }, ...inside);
  const link = s("a", { class: here ? "node here" : "node", href: `#/tables/${box.key.slice(0, 16)}`, "aria-label": `${box.name}, ${label}${here ? ", this table" : ""}` }, ...inside);
  if (here) link.setAttribute("aria-current", "true");
  return link;
}
