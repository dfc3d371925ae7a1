// Tables of the store: list, rows, rejects, explanations, lineage and reports.

import { count, duration, fixed, h, moment, pager, problem, show, table } from "./dom.js";
import { lineageView } from "./lineage.js";
import { api, file, hasKey } from "./net.js";

const LIST = 50;
const ROWS = 20;

export async function tablesView(place, { words, query, signal }) {
  if (!words.length) return listView(place, query, signal);
  const [ref, tab = "rows", row] = words;
  const path = `/v1/tables/${encodeURIComponent(ref)}`;
  const told = await api(path, { signal });
  const body = h("div");
  const tabs = [["rows", "Rows"], ["rejects", `Rejects (${count(told.rejected)})`], ["lineage", "Lineage"], ["about", "About"]];
  if (told.report) tabs.push(["report", "Report"]);
  show(place, h("h1", {}, `Table ${told.name}`),
    h("p", { class: "soft" }, "step ", h("code", {}, told.step), ", key ", h("code", {}, told.key.slice(0, 12)), `, ${count(told.rows)} rows, ${count(told.kept)} kept`, dropped(told), told.created ? `, made ${moment(told.created)}` : ""),
    h("nav", { class: "tabs", "aria-label": "Parts of the table" }, tabs.map(([name, text]) => h("a", { href: `#/tables/${ref}/${name}`, "aria-current": tab === name || (tab === "explain" && name === "rows") ? "page" : undefined }, text))),
    body);
  const views = { rows: rowsView, rejects: rejectsView, lineage: lineageView, about: aboutView, report: reportView, explain: explainView };
  return (views[tab] ?? rowsView)(body, { ref, path, told, row, signal, query });
}

function dropped(told) {
  const reasons = Object.entries(told.dropped ?? {}).map(([why, n]) => `${count(n)} ${why}`);
  return reasons.length ? `, dropped: ${reasons.join(", ")}` : "";
}

async function listView(place, query, signal) {
  const step = query.get("step") ?? "";
  const offset = Number(query.get("offset")) || 0;
  const found = await api(`/v1/tables?limit=${LIST}&offset=${offset}${step ? `&step=${encodeURIComponent(step)}` : ""}`, { signal });
  const go = (more) => { location.hash = `#/tables?${new URLSearchParams(more)}`; };
  const filter = h("select", { id: "step", onchange: () => go({ step: filter.value }) }, h("option", { value: "" }, "all steps"), found.steps.map((one) => h("option", { value: one, selected: one === step }, one)));
  show(place, h("h1", {}, "Tables"), h("p", { class: "field" }, h("label", { for: "step" }, "Made by the step"), filter),
    table("Tables, newest first", [
      { name: "Name", text: (one) => h("a", { href: `#/tables/${one.key.slice(0, 16)}` }, one.names.join(", ") || one.name) },
      { name: "Step", text: (one) => one.step },
      { name: "Key", text: (one) => h("code", {}, one.key.slice(0, 12)) },
      { name: "Rows", text: (one) => count(one.rows), number: true },
      { name: "Kept", text: (one) => count(one.kept), number: true },
      { name: "Dropped", text: (one) => count(one.dropped), number: true },
      { name: "Rejected", text: (one) => count(one.rejected), number: true },
      { name: "Took", text: (one) => duration(one.seconds), number: true },
      { name: "Made", text: (one) => moment(one.created), short: true },
    ], found.tables, "the store holds no such table"),
    pager(offset, LIST, found.tables.length, found.total, found.next_offset, (next) => go({ step, offset: next })));
}

async function rowsView(body, { ref, path, told, signal, query }) {
  const offset = Number(query.get("offset")) || 0;
  if (!told.rows) {
    show(body, h("p", { class: "soft" }, told.kind === "report" ? "A report has no rows." : "This table has no rows."));
    return;
  }
  const page = await api(`${path}/rows?offset=${offset}&limit=${ROWS}`, { signal });
  const cut = new Map(page.shortened.map((one) => [`${one.row} ${one.column}`, `${count(one.size)} ${one.unit}`]));
  const columns = page.columns.map(({ name, type }) => ({
    name, number: /int|float|double|decimal/.test(type) && name !== "id" && !/list/.test(type),
    text: (row) => {
      const size = cut.get(`${page.rows.indexOf(row)} ${name}`);
      if (name === "id") return h("a", { href: `#/tables/${ref}/explain/${row.id}` }, row.id);
      return [cell(row[name], type), size ? h("span", { class: "soft" }, ` (${size} in all)`) : null];
    },
  }));
  show(body, table(`Rows of ${told.name}`, columns, page.rows),
    pager(offset, ROWS, page.rows.length, page.total, page.next_offset, (next) => { location.hash = `#/tables/${ref}/rows?offset=${next}`; }));
}

function cell(value, type) {
  if (value === null) return h("span", { class: "soft" }, "none");
  if (typeof value === "number" && /float|double/.test(type)) return fixed(value, 4).replace(/\.?0+$/, "");
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "object" ? h("code", { class: "json" }, JSON.stringify(value)) : String(value);
}

async function rejectsView(body, { ref, path, told, signal, query }) {
  const offset = Number(query.get("offset")) || 0;
  const page = await api(`${path}/rejects?offset=${offset}&limit=${ROWS}`, { signal });
  show(body, table(`Rejected rows of ${told.name}`, [
    { name: "Reason", text: (row) => row.reason }, { name: "Row", text: (row) => h("code", { class: "json" }, row.row) }, { name: "Shard", text: (row) => row.shard, number: true },
  ], page.rows, "no row was rejected"),
  pager(offset, ROWS, page.rows.length, page.total, page.next_offset, (next) => { location.hash = `#/tables/${ref}/rejects?offset=${next}`; }));
}

async function explainView(body, { path, row, signal }) {
  const made = await api(`${path}/explain/${encodeURIComponent(row ?? "")}`, { signal });
  const verdicts = (list) => table("Decisions", [
    { name: "Verdict", text: (one) => (one.kept ? "kept" : h("strong", { class: "lost" }, "dropped")) },
    { name: "By", text: (one) => h("a", { href: `#/tables/${one.key.slice(0, 16)}` }, `${one.table} (${one.method})`) },
    { name: "Reason", text: (one) => one.reason },
    { name: "Score", text: (one) => fixed(one.score), number: true },
    { name: "Threshold", text: (one) => (one.threshold === null ? "none" : fixed(one.threshold)), number: true },
    { name: "Text or rival", text: (one) => (one.rival === null ? one.text : `lost to row ${one.rival}: ${one.rival_text}`) },
  ], list);
  show(body, h("h2", {}, `Row ${made.row.id}`), made.place ? h("p", {}, made.place) : null,
    made.text ? h("blockquote", { class: "text" }, made.text) : null,
    made.verdicts.length ? [h("h3", {}, "Decisions about it"), verdicts(made.verdicts)] : null,
    made.parts.length ? [h("h3", {}, `${made.parts.filter((one) => one.kept).length} of its ${made.parts.length} sentences were kept`), verdicts(made.parts)] : null,
    h("h3", {}, "In words"), h("pre", { class: "words", tabindex: 0 }, made.lines.join("\n")));
}

function aboutView(body, { told }) {
  const rows = [
    ["Key", h("code", {}, told.key)], ["Names", told.names.join(", ") || "none"], ["Kind", told.kind], ["Seed", told.seed],
    ["Made from", told.parents.length ? told.parents.map((key, place) => [place ? ", " : "", h("a", { href: `#/tables/${key.slice(0, 16)}` }, key.slice(0, 12))]) : "nothing: a source"],
    ["Size", `${count(told.bytes)} bytes in ${count(told.parts)} parts`], ["Took", duration(told.seconds)],
    ["Memory at most", `${count(Math.round(told.peak_memory_bytes / 2 ** 20))} MiB`],
    ["Models", Object.entries(told.models).map(([name, digest]) => `${name} ${digest.slice(0, 12)}`).join(", ") || "none"],
    ["Libraries", Object.entries(told.libraries).map((pair) => pair.join(" ")).join(", ")],
    ["Digest of the rows", h("code", {}, told.logical_digest)],
  ];
  show(body, h("dl", { class: "about" }, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("h3", {}, "Options"), h("pre", { tabindex: 0 }, JSON.stringify(told.options, null, 2)), h("h3", {}, "Notes"), h("pre", { tabindex: 0 }, JSON.stringify(told.notes, null, 2)));
}

function reportView(body, { told }) {
  const path = `/v1/reports/${told.key}`;
  if (!hasKey()) {
    show(body, h("p", {}, h("a", { href: path, target: "_blank", rel: "noopener" }, "Open in a new tab")),
      h("iframe", { class: "report", src: path, sandbox: "", title: `Report ${told.name}`, loading: "lazy" }));
    return;
  }
  // A frame cannot send the key, so the page fetches the file and hands it over.
  const save = async () => {
    try {
      const address = URL.createObjectURL(await file(path));
      const link = h("a", { href: address, download: `${told.name}-${told.key.slice(0, 12)}.html` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(address), 10000);
    } catch (error) {
      show(body, problem(error));
    }
  };
  show(body, h("p", {}, "With an API key a report cannot be shown in place; it opens off line once saved."), h("button", { type: "button", onclick: save }, "Save the report"));
}

export async function reportsView(place, { signal }) {
  const { tables } = await api("/v1/tables?limit=200", { signal });
  const found = tables.filter((one) => one.report);
  show(place, h("h1", {}, "Reports"), table("Reports, newest first", [
    { name: "Report", text: (one) => h("a", { href: `#/tables/${one.key.slice(0, 16)}/report` }, one.names.join(", ") || one.name) },
    { name: "Step", text: (one) => one.step }, { name: "Made", text: (one) => moment(one.created), short: true },
    { name: "Key", text: (one) => h("code", {}, one.key.slice(0, 12)) },
  ], found, "no run has written a report yet"));
}
