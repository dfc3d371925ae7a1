// Prune: a question and passages, the scores of one model run, and decisions over them at once.

import { announce, copy, count, h, percent, problem, show } from "./dom.js";
import { decide, parsePassages, pieces, ranked } from "./decide.js";
import { api } from "./net.js";
import { storedPicker } from "./stored.js";

const EXAMPLE = {
  question: "Who wrote Emma?",
  passages: [
    "Emma is a novel about youthful hubris and romantic misunderstandings. It was written by Jane Austen and published in December 1815. The story takes place in the fictional village of Highbury.",
    "It rained all day. The streets were wet, and nobody went out.",
    "Jane Austen was an English novelist. She finished six novels. Emma is the fourth that was published.",
  ].join("\n\n"),
};
const REASONS = {
  above_threshold: "above the threshold", among_best: "among the best of its passage",
  best_of_empty: "the best of a passage with nothing else", whole_passage: "its passage is kept whole",
  title: "title of a kept passage", below_threshold: "below the threshold",
  title_alone: "title of a passage with nothing kept", over_budget: "over the token budget",
};
const DEFAULTS = { threshold: 0.1, max_tokens: null, min_sentences: 0, keep_title: true, top_k: null, on_empty: "empty" };
const PRICE = 3;

// What was last asked stays when another view is looked at.
const held = { question: "", text: "", first: false, model: null, run: null, options: null, price: PRICE };

export async function pruneView(place, { query, signal }) {
  const form = h("form", { class: "ask", autocomplete: "off" });
  const result = h("section", { id: "result", "aria-label": "Result" });
  show(place, h("h1", {}, "Prune retrieved passages"),
    h("p", { class: "soft" }, "A question and the passages found for it go through the model once. After that every threshold and budget is decided here, at once."),
    form, result);
  const asked = optionsFrom(query);
  if (asked.options) held.options = { ...DEFAULTS, ...held.options, ...asked.options };
  if (asked.price !== null) held.price = asked.price;
  drawForm(form, result, signal);
  if (query.get("run") && query.get("q")) await showStored(result, query.get("run"), query.get("q"), signal, Boolean(asked.options));
  else if (held.run) drawResult(result);
}

function drawForm(form, result, signal) {
  const question = h("input", { id: "question", required: true, placeholder: "Who wrote Emma?" });
  const passages = h("textarea", { id: "passages", rows: 8, required: true, spellcheck: "false", "aria-describedby": "passages-help" });
  const first = h("input", { type: "checkbox", id: "first" });
  const model = h("select", { id: "model" });
  const button = h("button", { type: "submit", id: "run" }, "Prune");
  question.value = held.question;
  passages.value = held.text;
  first.checked = held.first;
  api("/v1/models", { signal }).then(({ models }) => {
    show(model, models.map((one) => h("option", { value: one.name }, one.name)));
    if (held.model) model.value = held.model;
    model.closest("p").hidden = models.length < 2;
  }, () => { model.closest("p").hidden = true; });
  show(form,
    h("p", { class: "field" }, h("label", { for: "question" }, "Question"), question),
    h("p", { class: "field" }, h("label", { for: "passages" }, "Passages"), passages,
      h("span", { class: "soft", id: "passages-help" }, "Blank lines between passages, or JSON lines: strings, or objects with text and title.")),
    h("div", { class: "line" },
      button,
      h("button", { type: "button", class: "quiet", onclick: () => { question.value = EXAMPLE.question; passages.value = EXAMPLE.passages; form.requestSubmit(); } }, "Try an example"),
      h("label", { class: "check" }, first, " The first sentence of each passage is its title"),
      h("p", { class: "inline", hidden: true }, h("label", { for: "model" }, "Model "), model)),
    storedPicker(signal, (run, id) => { location.hash = linkTo({ run, q: id }); }));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const given = parsePassages(passages.value);
    Object.assign(held, { question: question.value, text: passages.value, first: first.checked, model: model.value || null });
    if (!given.length) {
      show(result, problem("There is no passage. Paste at least one."));
      return;
    }
    button.disabled = true;
    show(result, h("p", { class: "soft" }, `Scoring ${count(given.length)} passages …`));
    announce("Scoring");
    try {
      held.run = await score(question.value, given, first.checked, held.model, signal);
      held.options ??= { ...DEFAULTS, threshold: held.run.threshold };
      if (location.hash.includes("run=")) history.replaceState(null, "", linkTo({}));
      drawResult(result);
    } catch (error) {
      if (error.name !== "AbortError") show(result, problem(error));
    } finally {
      button.disabled = false;
    }
  });
}

async function score(question, given, first, model, signal) {
  const body = { question, passages: given, return_scores: true, aggregation: "mean" };
  const titled = given.some((one) => typeof one === "object");
  if (first && !titled) body.titles = "first_sentence";
  if (model) body.model = model;
  const answer = await api("/v1/prune", { method: "POST", body, signal });
  const source = (index) => (typeof given[index] === "string" ? { text: given[index] } : given[index]);
  const passages = answer.results.filter((one) => !one.error).map((one) => ({
    ...source(one.index), index: one.index, relevance: one.relevance, relevance_logit: one.relevance_logit,
    title_tokens: one.title_tokens ?? 0, title_score: one.title_score ?? 0, title_first: Boolean(body.titles),
    sentences: one.sentences,
  }));
  const failed = answer.results.filter((one) => one.error).map((one) => ({ ...source(one.index), ...one }));
  for (const one of failed) one.passage = source(one.index).text;
  return { question, passages, failed, threshold: answer.threshold, stored: null };
}

async function showStored(result, run, id, signal, asked) {
  const place = `${run} ${id}`;
  if (held.run?.place !== place) {
    show(result, h("p", { class: "soft" }, "Reading the stored scores …"));
    const path = `/v1/tables/${encodeURIComponent(run)}/contexts?question=${encodeURIComponent(id)}`;
    const found = await api(path, { signal });
    const own = found.decision?.method === "provence" ? found.decision.options : {};
    const threshold = own.threshold ?? found.threshold ?? DEFAULTS.threshold;
    held.run = {
      question: found.question.question, failed: [], threshold, place, run, id, stored: found,
      passages: found.results.map((one) => ({ ...one, title_tokens: 0, title_first: false, title_score: 0 })),
    };
    if (!asked || !held.options) {
      const { min_sentences = 0, on_empty = "empty" } = own;
      held.options = { ...DEFAULTS, threshold, min_sentences, on_empty };
    }
  }
  drawResult(result);
}

function drawResult(result) {
  const { run } = held;
  const views = new Map(run.passages.map((one) => [one.index, passageView(one)]));
  const total = run.passages.reduce((sum, one) => sum + one.sentences.reduce((all, s) => all + s.tokens, 0), 0);
  const list = h("ol", { class: "passages" });
  const cards = h("div", { class: "cards", id: "totals" });
  const said = h("p", { class: "soft", id: "copied", role: "status" });
  const scored = run.passages.every((one) => one.sentences.every((s) => typeof s.score === "number"));
  const settle = () => {
    const decided = scored ? decide(run.passages, held.options) : asStored(run.passages);
    const places = new Set();
    decided.forEach((one, place) => {
      places.add(one.passage.index);
      views.get(one.passage.index).update(one, place);
    });
    for (const [index, view] of views) if (!places.has(index)) view.leaveOut();
    drawTotals(cards, decided, run, total);
    run.decided = decided;
  };
  const order = decide(run.passages, { ...DEFAULTS, top_k: null }).map((one) => views.get(one.passage.index).node);
  show(list, order);
  show(result,
    h("h2", {}, run.stored ? `Stored question: ${run.question}` : "Result"),
    run.stored ? storedNote(run) : null,
    scored ? controls(total, settle) : h("p", { class: "problem" }, "This run stored no keep probabilities, so it cannot be decided again here; what it decided is marked at each sentence."),
    cards,
    h("div", { class: "line" },
      h("button", { type: "button", id: "copy", onclick: async () => { said.textContent = (await copy(resultText(run.decided))) ? "The kept text was copied." : "This browser does not let a page copy; select the text instead."; } }, "Copy the kept text"),
      h("button", { type: "button", class: "quiet", id: "link", onclick: async () => {
        history.replaceState(null, "", linkTo(run.stored ? { run: run.run, q: run.id } : {}));
        said.textContent = (await copy(location.href)) ? "A link with these options was copied; it holds no text of yours." : `The address bar holds the link.`;
      } }, "Link with these options"), said),
    h("p", { class: "legend" }, h("span", { class: "s h1" }, "low score"), " ", h("span", { class: "s h5" }, "middle"), " ", h("span", { class: "s h9" }, "high score"), " ", h("span", { class: "s pruned" }, "pruned")),
    list,
    run.failed.length ? [h("h3", {}, `${run.failed.length} without a score`), h("ul", { class: "failed" }, run.failed.map((one) => h("li", {}, h("strong", {}, `Passage ${one.index + 1}: ${one.error.message}`), h("p", { class: "text soft" }, one.passage.slice(0, 300)))))] : null);
  if (!run.passages.length && !run.failed.length) list.replaceWith(h("p", { class: "soft" }, "No passage was found for this question."));
  settle();
}

/** What a run decided, where it kept no scores to decide again from. */
function asStored(passages) {
  return ranked(passages).map((passage) => {
    const sum = (list) => list.reduce((all, one) => all + one.tokens, 0);
    return {
      passage, title_kept: true, tokens_in: sum(passage.sentences), tokens_out: sum(passage.sentences.filter((one) => one.stored_kept)),
      sentences: passage.sentences.map((one) => ({ kept: Boolean(one.stored_kept), reason: one.stored_reason ?? "not decided" })),
    };
  });
}

function storedNote(run) {
  const { decision } = run.stored;
  if (!decision) return h("p", { class: "soft" }, "The store holds scores but no decision about them.");
  const settings = Object.entries(decision.options).map(([name, value]) => `${name} = ${value}`).join(", ");
  const how = decision.method === "provence" && decision.options.aggregation !== "vote"
    ? "The sliders start where the run stood."
    : "The sliders decide by mean keep probability; what the run decided otherwise is marked below each passage.";
  return h("p", { class: "soft" }, "Decided in the run by ", h("code", {}, decision.method), settings ? ` with ${settings}` : "", `. ${how} `,
    h("a", { href: `#/tables/${decision.key.slice(0, 16)}` }, "The decision's table"));
}

function controls(total, settle) {
  const o = held.options;
  const changed = () => { settle(); };
  const budget = o.max_tokens ?? total;
  const sliders = [
    slider("threshold", "Threshold", 0, 1, 0.01, o.threshold, "A sentence stays when its score is above.", (v) => { o.threshold = v; changed(); }),
    slider("budget", "Token budget", 0, Math.max(total, 1), 1, Math.min(budget, total), "At the right end there is no budget.", (v) => { o.max_tokens = v >= total ? null : v; changed(); }),
  ];
  const number = (id, label, value, low, set) => {
    const input = h("input", { id, type: "number", min: low, step: 1, inputmode: "numeric" });
    input.value = value ?? "";
    input.addEventListener("input", () => { if (input.checkValidity()) { set(input.value === "" ? null : Number(input.value)); changed(); } });
    return h("p", { class: "field small" }, h("label", { for: id }, label), input);
  };
  const title = h("input", { type: "checkbox", id: "keep-title", checked: o.keep_title });
  title.addEventListener("change", () => { o.keep_title = title.checked; changed(); });
  const empty = h("select", { id: "on-empty" }, [["empty", "leave it empty"], ["top1", "keep its best sentence"], ["original", "keep all of it"]].map(([value, text]) => h("option", { value, selected: o.on_empty === value }, text)));
  empty.addEventListener("change", () => { o.on_empty = empty.value; changed(); });
  const price = h("input", { id: "price", type: "number", min: 0, step: "any", inputmode: "decimal" });
  price.value = held.price;
  price.addEventListener("input", () => { held.price = Math.max(0, Number(price.value) || 0); changed(); });
  return h("fieldset", { class: "card controls" }, h("legend", {}, "Decide"), h("div", { class: "sliders" }, sliders),
    h("div", { class: "line wrap" },
      number("min-sentences", "Least sentences a passage", o.min_sentences, 0, (v) => { o.min_sentences = v ?? 0; }),
      number("top-k", "Best passages only", o.top_k, 1, (v) => { o.top_k = v; }),
      h("p", { class: "field small" }, h("label", { for: "on-empty" }, "A passage with nothing left"), empty),
      h("p", { class: "field small" }, h("label", { for: "price" }, "Price of a million tokens, $"), price),
      h("label", { class: "check" }, title, " Keep titles of kept passages")));
}

function slider(id, label, low, high, step, value, help, set) {
  const range = h("input", { type: "range", id, min: low, max: high, step, "aria-describedby": `${id}-help` });
  const number = h("input", { type: "number", id: `${id}-number`, min: low, max: high, step: step < 1 ? "any" : step, "aria-label": `${label} as a number` });
  range.value = value;
  number.value = value;
  range.addEventListener("input", () => { number.value = range.value; set(Number(range.value)); });
  number.addEventListener("input", () => {
    if (number.value === "" || !number.checkValidity()) return;
    range.value = number.value;
    set(Number(number.value));
  });
  return h("div", { class: "slider" }, h("label", { for: id }, label), range, number, h("span", { class: "soft", id: `${id}-help` }, help));
}

function passageView(one) {
  const texts = pieces(one.text, one.sentences);
  const spans = one.sentences.map((sentence, place) => h("span", { class: "s", title: "" }, texts[place]));
  const head = h("p", { class: "soft where" });
  const rows = one.sentences.map((sentence, place) => h("tr", {}, h("td", { class: "n" }, place + 1), h("td", { class: "n" }, typeof sentence.score === "number" ? sentence.score.toFixed(3) : ""), h("td", { class: "n" }, sentence.tokens), h("td"), h("td", {}, texts[place].trim().slice(0, 80))));
  const stored = h("p", { class: "soft stored" });
  const title = one.title ? h("p", { class: "title" }, one.title) : null;
  const node = h("li", { class: "card passage" }, head, title, h("p", { class: "text" }, spans), stored,
    h("details", {}, h("summary", {}, "Scores and reasons"),
      h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": `Scores of passage ${one.index + 1}` }, h("table", {}, h("thead", {}, h("tr", {}, ["Sentence", "Score", "Tokens", "Verdict", "Text"].map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows)))));
  const relevance = typeof one.relevance === "number" ? `relevance ${one.relevance.toFixed(3)}` : "no relevance";
  const paint = (decided) => {
    spans.forEach((span, place) => {
      const { score } = one.sentences[place];
      const { kept, reason } = decided.sentences[place];
      span.className = `s h${Math.min(9, Math.max(0, Math.floor((score ?? 0) * 10)))}${kept ? "" : " pruned"}`;
      if (kept) span.removeAttribute("role");
      else span.setAttribute("role", "deletion");
      const verdict = `${kept ? "kept" : "pruned"}: ${REASONS[reason] ?? reason}`;
      span.title = `score ${typeof score === "number" ? score.toFixed(3) : "unknown"}, ${verdict}`;
      rows[place].children[3].textContent = verdict;
    });
    const other = one.sentences.filter((s, place) => s.stored_kept !== undefined && s.stored_kept !== decided.sentences[place].kept);
    stored.textContent = other.length ? `The run decided otherwise about sentence ${other.map((s) => one.sentences.indexOf(s) + 1).join(", ")}.` : "";
    if (title) title.classList.toggle("pruned", one.title_tokens > 0 && !decided.title_kept);
  };
  return {
    node,
    update(decided, place) {
      node.classList.remove("out");
      const kept = decided.sentences.filter((s) => s.kept).length;
      head.textContent = `Place ${place + 1}, was ${one.index + 1}; ${relevance}; ${kept} of ${spans.length} sentences kept, ${count(decided.tokens_out)} of ${count(decided.tokens_in)} tokens`;
      paint(decided);
    },
    leaveOut() {
      node.classList.add("out");
      head.textContent = `Left out: not among the best passages; was ${one.index + 1}; ${relevance}`;
      paint({ sentences: spans.map(() => ({ kept: false, reason: "not among the best passages" })), title_kept: false });
    },
  };
}

function drawTotals(cards, decided, run, total) {
  const out = decided.reduce((sum, one) => sum + one.tokens_out, 0);
  const sentences = run.passages.reduce((sum, one) => sum + one.sentences.length, 0);
  const kept = decided.reduce((sum, one) => sum + one.sentences.filter((s) => s.kept).length, 0);
  const saved = ((total - out) * held.price) / 1e6;
  const card = (id, label, value, note) => h("div", { class: "card", id }, h("span", { class: "soft" }, label), h("b", {}, value), h("span", { class: "soft" }, note));
  show(cards,
    card("total-tokens", "Tokens", `${count(total)} → ${count(out)}`, `${percent(total - out, total)} removed`),
    card("total-sentences", "Sentences kept", `${count(kept)} of ${count(sentences)}`, `in ${count(decided.filter((one) => one.tokens_out > 0).length)} of ${count(run.passages.length)} passages`),
    card("total-money", "Saved", `$${(1000 * saved).toFixed(2)}`, `for 1,000 such questions at $${held.price} a million tokens`));
  announce(`${kept} of ${sentences} sentences kept, ${out} of ${total} tokens.`);
}

function resultText(decided) {
  return decided.map(({ passage, sentences, title_kept: kept }) => {
    const text = pieces(passage.text, passage.sentences).filter((_, place) => sentences[place].kept).join("").trim();
    return text && passage.title && (kept || !passage.title_tokens) ? `${passage.title}\n${text}` : text;
  }).filter(Boolean).join("\n\n");
}

function linkTo(more) {
  const query = new URLSearchParams(more);
  const o = held.options;
  if (o) {
    for (const [name, value] of Object.entries(o)) if (value !== null && value !== DEFAULTS[name]) query.set(name, String(value));
    if (!query.has("threshold") && !("q" in more && held.run?.place !== `${more.run} ${more.q}`)) query.set("threshold", String(o.threshold));
    if (held.price !== PRICE) query.set("price", String(held.price));
  }
  return `#/prune?${query}`;
}

/** Options that a link holds; what is out of range is left out. */
function optionsFrom(query) {
  const found = {};
  const number = (name, low, high, whole) => {
    const value = Number(query.get(name));
    if (query.get(name) !== null && query.get(name) !== "" && value >= low && value <= high && (!whole || Number.isInteger(value))) found[name] = value;
  };
  number("threshold", 0, 1, false);
  number("max_tokens", 0, 1e9, true);
  number("min_sentences", 0, 1e6, true);
  number("top_k", 1, 1e6, true);
  if (["true", "false"].includes(query.get("keep_title"))) found.keep_title = query.get("keep_title") === "true";
  if (["empty", "top1", "original"].includes(query.get("on_empty"))) found.on_empty = query.get("on_empty");
  const price = Number(query.get("price"));
  return { options: Object.keys(found).length ? found : null, price: query.get("price") && price >= 0 ? price : null };
}
