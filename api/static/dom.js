// Building the page: elements from text alone, so that markup in data stays text.

/** An element with properties, attributes ("aria-…", "data-…" and others) and children. */
export function h(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else if (value === true) made.setAttribute(name, "");
    else made.setAttribute(name, String(value));
  }
  fill(made, children);
  return made;
}

/** Put children into an element: elements as they are, anything else as text. */
export function fill(parent, children) {
  for (const child of children.flat(3)) {
    if (child === undefined || child === null || child === false) continue;
    parent.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return parent;
}

/** The children of an element, replaced. */
export function show(parent, ...children) {
  parent.replaceChildren();
  return fill(parent, children);
}

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(value);
export const percent = (part, total) => (total ? `${Math.round((100 * part) / total)} %` : "0 %");
export const fixed = (value, digits = 3) => (typeof value === "number" ? value.toFixed(digits) : String(value ?? ""));
export const moment = (text) => (text ? String(text).slice(0, 19).replace("T", " ") : "");

/** Seconds in words. */
export function duration(seconds) {
  if (typeof seconds !== "number") return ""; // a run that has not begun
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

let timer = 0;
/** Tell a screen reader, once things have come to rest. */
export function announce(text) {
  clearTimeout(timer);
  timer = setTimeout(() => { document.getElementById("live").textContent = text; }, 400);
}

/** A table; columns are {name, text(row) -> text or node, number, short}; short ones are not broken. */
export function table(caption, columns, rows, empty = "nothing here") {
  if (!rows.length) return h("p", { class: "soft" }, empty);
  const head = columns.map((one) => h("th", { scope: "col", class: one.number ? "n" : undefined }, one.name));
  const body = rows.map((row) => h("tr", {}, columns.map((one) => h("td", { class: one.number ? "n" : one.short ? "short" : undefined }, one.text(row)))));
  return h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption },
    h("table", {}, h("caption", { class: "hidden" }, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

/** A message about something that went wrong. */
export function problem(error) {
  const text = error instanceof Error ? error.message : String(error);
  return h("div", { class: "problem", role: "alert" }, h("strong", {}, "That did not work. "), text);
}

/** A button that copies text, with a way that works without a secure origin. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "hidden", "aria-hidden": "true", tabindex: -1 });
    const before = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    let done = false;
    try { done = document.execCommand("copy"); } catch { done = false; }
    area.remove();
    if (before instanceof HTMLElement) before.focus();
    return done;
  }
}

/** Links to the pages before and after; `go(offset)` shows one. */
export function pager(offset, limit, shown, total, next, go) {
  if (!total) return null;
  const places = `${count(offset + 1)} to ${count(offset + shown)} of ${count(total)}`;
  return h("div", { class: "line pager" },
    h("button", { type: "button", class: "quiet", disabled: offset === 0, onclick: () => go(Math.max(0, offset - limit)) }, "Before"),
    h("span", { class: "soft" }, shown ? places : `nothing past row ${count(offset)}`),
    h("button", { type: "button", class: "quiet", disabled: next === null, onclick: () => go(next) }, "After"));
}
