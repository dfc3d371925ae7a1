// The decision of Provence over scores that are already there, as the service takes it
// (pruners/context/result.py, provence.py and budget.py): the same options give the same verdict.

const KEPT = new Set(["above_threshold", "among_best", "best_of_empty", "whole_passage", "title"]);

/** Passages by relevance, best first, ties by their place in the request. */
export function ranked(passages) {
  return [...passages].sort((a, b) => (b.relevance_logit ?? 0) - (a.relevance_logit ?? 0) || a.index - b.index);
}

/**
 * Decide about one question's passages.
 *
 * A passage: index, relevance_logit, sentences [{score, tokens}], title_score and title_tokens
 * where a title was given apart, title_first where the first sentence is the title.
 * Options: threshold, max_tokens (null: no budget), min_sentences, keep_title, top_k (null: all),
 * on_empty ("empty", "top1", "original").
 * Gives one entry a passage of the best top_k, by relevance: {passage, sentences: [{kept,
 * reason}], title_kept, tokens_in, tokens_out}.
 */
export function decide(passages, options) {
  const chosen = ranked(passages).slice(0, options.top_k ?? undefined);
  const groups = chosen.map(rowsOf);
  const rows = groups.flat();
  rows.forEach((row, id) => { row.id = id; });
  for (const group of groups) judge(group, options);
  for (const row of rows) row.kept = KEPT.has(row.reason);
  if (options.max_tokens !== null && options.max_tokens !== undefined) fit(rows, options.max_tokens);
  return chosen.map((passage, place) => {
    const group = groups[place];
    const body = group.filter((row) => !row.apart);
    return {
      passage,
      sentences: body.map((row) => ({ kept: row.kept, reason: row.reason })),
      title_kept: group.some((row) => row.title && row.kept),
      tokens_in: body.reduce((sum, row) => sum + row.tokens, 0),
      tokens_out: body.reduce((sum, row) => sum + (row.kept ? row.tokens : 0), 0),
    };
  });
}

function rowsOf(passage) {
  const rows = [];
  if (passage.title_tokens > 0 && passage.sentences.length) {
    rows.push({ passage, score: passage.title_score, tokens: passage.title_tokens, title: true, apart: true });
  }
  passage.sentences.forEach((one, place) => rows.push({
    passage, score: one.score, tokens: one.tokens, apart: false, title: Boolean(passage.title_first) && place === 0,
  }));
  return rows;
}

const best = (a, b) => b.score - a.score || a.id - b.id;

function judge(group, options) {
  const threshold = Math.fround(options.threshold);
  // A title is one only where the passage holds something else.
  const any = group.some((row) => !row.title);
  const isTitle = (row) => row.title && any;
  const body = group.filter((row) => !isTitle(row)).sort(best);
  for (const row of group) row.reason = "below_threshold";
  for (const row of body.slice(0, options.min_sentences)) row.reason = "among_best";
  for (const row of group) if (Math.fround(row.score) > threshold) row.reason = "above_threshold";
  const filled = () => body.some((row) => KEPT.has(row.reason));
  if (!filled()) {
    if (options.on_empty === "top1" && body.length) body[0].reason = "best_of_empty";
    else if (options.on_empty === "original") {
      for (const row of group) if (row.reason === "below_threshold") row.reason = "whole_passage";
    }
  }
  if (options.keep_title) {
    const follows = filled();
    for (const row of group) if (isTitle(row)) row.reason = follows ? "title" : "title_alone";
  }
}

function fit(rows, limit) {
  const wanted = new Set(rows.filter((row) => row.kept && !row.title).map((row) => row.passage));
  const unpaid = new Map();
  for (const row of rows) if (row.kept && row.title && wanted.has(row.passage)) unpaid.set(row.passage, row);
  const following = new Set(unpaid.values());
  const out = new Set();
  let left = limit;
  for (const row of [...rows].sort(best)) {
    if (!row.kept || following.has(row)) continue;
    const head = row.title ? undefined : unpaid.get(row.passage);
    const cost = row.tokens + (head ? head.tokens : 0);
    if (cost > left) continue;
    left -= cost;
    out.add(row);
    if (head) {
      out.add(head);
      unpaid.delete(row.passage);
    }
  }
  for (const row of rows) {
    if (row.kept && !out.has(row)) {
      row.kept = false;
      row.reason = "over_budget";
    }
  }
}

/** Cut a text at borders counted in code points, as the service counts characters. */
export function pieces(text, spans) {
  const points = Array.from(text);
  return spans.map(({ start, end }) => points.slice(start, end).join(""));
}

/** Passages from what was pasted: JSON lines, or texts with blank lines between. */
export function parsePassages(text) {
  const lines = text.split(/\r?\n/).filter((line) => line.trim());
  if (lines.length && lines.every((line) => /^\s*["{]/.test(line))) {
    const made = lines.map(oneJson);
    if (made.every((one) => one !== null)) return made;
  }
  return text.split(/\r?\n[ \t]*(?:\r?\n[ \t]*)+/).map((part) => part.trim()).filter(Boolean);
}

function oneJson(line) {
  let value;
  try { value = JSON.parse(line); } catch { return null; }
  if (typeof value === "string") return value;
  if (value && typeof value.text === "string") {
    return typeof value.title === "string" && value.title ? { text: value.text, title: value.title } : value.text;
  }
  return null;
}
