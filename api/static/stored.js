// Picking a question of a stored run.

import { h, moment, problem, show } from "./dom.js";
import { api } from "./net.js";

/** A closed box that lists runs and their questions once it is opened; `pick(run, question)`. */
export function storedPicker(signal, pick) {
  const body = h("div", { class: "picker" });
  const box = h("details", { id: "stored" }, h("summary", {}, "Or take a question of a stored run"), body);
  let opened = false;
  box.addEventListener("toggle", async () => {
    if (!box.open || opened) return;
    opened = true;
    try {
      await fillIn(body, signal, pick);
    } catch (error) {
      opened = false;
      if (error.name !== "AbortError") show(body, problem(error));
    }
  });
  return box;
}

async function fillIn(body, signal, pick) {
  const { tables } = await api("/v1/tables?step=context_signals&limit=100", { signal });
  if (!tables.length) {
    show(body, h("p", { class: "soft" }, "The store holds no pruned contexts yet. Run a recipe such as rag."));
    return;
  }
  const run = h("select", { id: "stored-run" }, tables.map((one) => h("option", { value: one.key }, `${one.names.join(", ") || one.name}, ${one.rows} sentences, ${moment(one.created)}`)));
  const question = h("select", { id: "stored-question" });
  const button = h("button", { type: "button", id: "stored-show", onclick: () => question.value && pick(run.value.slice(0, 16), question.value) }, "Show it");
  const list = async () => {
    button.disabled = true;
    const found = await api(`/v1/tables/${run.value}/questions?limit=200`, { signal });
    show(question, found.questions.map((one) => h("option", { value: one.id }, `${one.name}: ${one.question}`.slice(0, 140))));
    button.disabled = !found.questions.length;
  };
  run.addEventListener("change", () => list().catch((error) => show(body, problem(error))));
  show(body, h("p", { class: "field" }, h("label", { for: "stored-run" }, "Run"), run),
    h("p", { class: "field" }, h("label", { for: "stored-question" }, "Question"), question), button);
  await list();
}
