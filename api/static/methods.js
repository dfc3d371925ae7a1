// The models that are served, and the library's methods.

import { h, show, table } from "./dom.js";
import { api } from "./net.js";

export async function methodsView(place, { signal }) {
  const [{ models }, { methods }] = await Promise.all([api("/v1/models", { signal }), api("/v1/methods", { signal })]);
  const input = h("input", { id: "method-filter", type: "search", autocomplete: "off" });
  const list = h("div");
  const draw = () => {
    const word = input.value.trim().toLowerCase();
    const found = methods.filter((one) => !word || Object.values(one).join(" ").toLowerCase().includes(word));
    show(list, table("Methods", [
      { name: "Method", text: (one) => h("code", {}, one.name) },
      { name: "Prunes", text: (one) => one.unit },
      { name: "Budget", text: (one) => `${one.budget} = ${one.default}` },
      { name: "Signals", text: (one) => one.needs.join(", ") || "none" },
      { name: "What it does", text: (one) => one.about },
    ], found, "no method has that word"));
  };
  input.addEventListener("input", draw);
  draw();
  show(place, h("h1", {}, "Models and methods"), h("h2", {}, "Models served here"),
    table("Models", [
      { name: "Name", text: (one) => one.name },
      { name: "State", text: (one) => (one.loaded ? "loaded" : "not loaded") },
      { name: "Threshold", text: (one) => one.threshold ?? "", number: true },
      { name: "Window, tokens", text: (one) => one.max_length ?? "", number: true },
      { name: "Licence", text: (one) => one.licence ?? "" },
      { name: "SHA-256", text: (one) => h("code", {}, (one.digest ?? "").slice(0, 16)) },
    ], models),
    h("h2", {}, `All ${methods.length} methods of the library`),
    h("p", { class: "field" }, h("label", { for: "method-filter" }, "Show those with the word"), input), list);
}
