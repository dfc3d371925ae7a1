// Start, views by the address's hash, and the key.

import { h, problem, show } from "./dom.js";
import { hasKey, onKeyWanted, setKey } from "./net.js";
import { pruneView } from "./prune.js";
import { runsView } from "./runs.js";
import { reportsView, tablesView } from "./tables.js";
import { methodsView } from "./methods.js";

const VIEWS = { prune: pruneView, runs: runsView, tables: tablesView, reports: reportsView, methods: methodsView };
const TITLES = { prune: "Prune", runs: "Runs", tables: "Tables", reports: "Reports", methods: "Methods" };

const main = document.getElementById("main");
const form = document.getElementById("key-form");
const field = document.getElementById("key");
let leaving = null; // aborts what the view before still waits for
let before = "";

function parts() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const words = path.split("/").filter(Boolean).map(decoded);
  return { name: words[0] in VIEWS ? words[0] : "prune", words: words.slice(1), query: new URLSearchParams(query ?? "") };
}

function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

async function render() {
  if (location.hash === "#main") return; // the link past the navigation
  const { name, words, query } = parts();
  leaving?.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  document.title = `${TITLES[name]} – Prunery`;
  for (const link of document.querySelectorAll("#nav a")) {
    if (link.getAttribute("href") === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const place = h("div");
  show(main, place);
  const path = `${name}/${words.join("/")}`;
  // After the first view a reader is brought to the new one, as a new page would.
  if (before && before !== path) main.focus({ preventScroll: true });
  before = path;
  try {
    await VIEWS[name](place, { words, query, signal });
  } catch (error) {
    if (error.name !== "AbortError" && !signal.aborted) show(place, h("h1", {}, TITLES[name]), problem(error));
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
document.getElementById("key-button").addEventListener("click", () => {
  form.hidden = !form.hidden;
  if (!form.hidden) field.focus();
});
document.getElementById("key-forget").addEventListener("click", () => {
  setKey("");
  field.value = "";
  form.hidden = true;
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(field.value.trim());
  field.value = "";
  form.hidden = true;
  render();
});
onKeyWanted((given) => {
  document.getElementById("key-why").textContent = given
    ? "This key is not known here. Try another; it is kept in this page's memory alone."
    : "This service asks for an API key. It is kept in this page's memory alone, until you close it.";
  if (form.hidden) {
    form.hidden = false;
    if (!hasKey()) field.focus();
  }
});
addEventListener("hashchange", render);
render();
