// Runs on the Prefect server: start, follow, cancel.

import { announce, count, duration, h, moment, problem, show, table } from "./dom.js";
import { api, follow } from "./net.js";

const ENDED = new Set(["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]);
const AGAIN = 5000; // milliseconds between looks at the list, and before a lost stream is opened again

export async function runsView(place, { words, signal }) {
  if (words.length) return runView(place, words[0], signal);
  const list = h("div");
  const [{ deployments }, first] = await Promise.all([api("/v1/deployments", { signal }), api("/v1/runs?limit=50", { signal })]);
  show(place, h("h1", {}, "Runs"), startForm(deployments, signal), h("h2", {}, "Latest runs"), list);
  drawList(list, first.runs);
  for (;;) {
    await pause(AGAIN, signal);
    drawList(list, (await api("/v1/runs?limit=50", { signal })).runs);
  }
}

function drawList(list, runs) {
  const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  show(list, table("Latest runs", [
    { name: "Run", text: (one) => h("a", { href: `#/runs/${one.id}` }, one.name) },
    { name: "Deployment", text: (one) => one.deployment ?? "" },
    { name: "State", text: (one) => state(one.state, one.state_type) },
    { name: "Begun", text: (one) => moment(one.started ?? one.expected), short: true },
    { name: "Took", text: (one) => duration(one.seconds), number: true },
  ], runs, "nothing has run yet"));
  if (focused) list.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
}

function state(name, type) {
  return h("span", { class: `state ${String(type).toLowerCase()}` }, name ?? "unknown");
}

function startForm(deployments, signal) {
  if (!deployments.length) return h("p", { class: "card" }, "No recipe is deployed. Deploy one with ", h("code", {}, "prunery deploy rag"), ", then start it here.");
  const choice = h("select", { id: "deployment" }, deployments.map((one) => h("option", { value: one.id }, `${one.name}${one.paused ? " (paused)" : ""}`)));
  const about = h("p", { class: "soft", id: "deployment-about" });
  const settings = h("textarea", { id: "settings", rows: 3, spellcheck: "false", placeholder: "prune.threshold = 0.2", "aria-describedby": "settings-help" });
  const said = h("div");
  const button = h("button", { type: "submit" }, "Start a run");
  const tell = () => {
    const one = deployments.find((item) => item.id === choice.value);
    const when = one.schedules.length ? `On schedule: ${one.schedules.join("; ")}.` : "Runs only when asked to.";
    const ready = one.status === "READY" ? "" : " Nothing serves it just now: the run waits until something does.";
    about.textContent = [one.description, when + ready].filter(Boolean).join(" ");
  };
  choice.addEventListener("change", tell);
  tell();
  return h("form", { class: "card", onsubmit: async (event) => {
    event.preventDefault();
    button.disabled = true;
    try {
      const made = await api("/v1/runs", { method: "POST", body: { deployment: choice.value, parameters: parseSettings(settings.value) }, signal });
      location.hash = `#/runs/${made.id}`;
    } catch (error) {
      if (error.name !== "AbortError") show(said, problem(error));
    } finally {
      button.disabled = false;
    }
  } },
  h("p", { class: "field" }, h("label", { for: "deployment" }, "Start a deployed recipe"), choice), about,
  h("details", {}, h("summary", {}, "With other options"), h("p", { class: "field" }, h("label", { for: "settings" }, "One a line: step.option = value"), settings,
    h("span", { class: "soft", id: "settings-help" }, "Numbers, true, false and names of methods; never paths or models."))),
  button, said);
}

/** {"step.option": value} from lines of `step.option = value`. */
export function parseSettings(text) {
  const made = {};
  for (const line of text.split("\n").map((one) => one.trim()).filter(Boolean)) {
    const at = line.indexOf("=");
    if (at < 1) throw new Error(`"${line}" is no setting; write step.option = value.`);
    const word = line.slice(at + 1).trim();
    let value = word;
    try { value = JSON.parse(word); } catch { /* a bare word is a text */ }
    made[line.slice(0, at).trim()] = value;
  }
  return made;
}

async function runView(place, id, signal) {
  const path = `/v1/runs/${encodeURIComponent(id)}`;
  const body = h("div");
  const trouble = h("div");
  const draw = (run) => drawRun(body, run, path, trouble, signal);
  const first = await api(path, { signal });
  show(place, h("h1", {}, `Run ${first.name}`), h("p", {}, h("a", { href: "#/runs" }, "All runs")), body, trouble);
  draw(first);
  if (ENDED.has(first.state_type)) return;
  for (let ended = false; !ended;) {
    try {
      await follow(`${path}/events`, (event, data) => {
        if (event === "problem") show(trouble, problem(data.message));
        else if (event === "end") ended = true;
        else if (event === "run") announce(`Run is ${data.state}`);
        scheduleDraw(path, draw, signal);
      }, signal);
      show(trouble);
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      show(trouble, problem(error));
    }
    if (!ended) await pause(AGAIN, signal);
  }
  draw(await api(path, { signal }));
}

let waiting = false;
/** Read the run again, at most twice a second. */
function scheduleDraw(path, draw, signal) {
  if (waiting) return;
  waiting = true;
  setTimeout(async () => {
    waiting = false;
    if (signal.aborted) return;
    try { draw(await api(path, { signal })); } catch { /* the stream tells what is wrong */ }
  }, 500);
}

function drawRun(body, run, path, trouble, signal) {
  const ended = ENDED.has(run.state_type);
  const total = run.steps_total ?? Math.max(run.steps.length, 1);
  const done = run.steps.filter((one) => one.state_type === "COMPLETED").length;
  const bar = h("progress", { max: total, "aria-label": "Steps done" });
  bar.value = run.state_type === "COMPLETED" ? total : done;
  const cancel = h("button", { type: "button", class: "quiet", onclick: async () => {
    cancel.disabled = true;
    try { await api(`${path}/cancel`, { method: "POST", signal }); } catch (error) { if (error.name !== "AbortError") show(trouble, problem(error)); }
  } }, "Cancel this run");
  show(body, h("p", {}, state(run.state, run.state_type), " ", run.deployment ?? "", run.seconds ? `, ${duration(run.seconds)}` : ""),
    run.message ? h("p", { class: run.state_type === "COMPLETED" ? "soft" : "problem" }, run.message) : null,
    h("p", { class: "line" }, bar, h("span", {}, `${count(done)} of ${count(total)} steps`)),
    table("Steps", [
      { name: "Step", text: (one) => one.name },
      { name: "State", text: (one) => state(one.state, one.state_type) },
      { name: "Progress", text: (one) => (one.progress === null ? "" : `${Math.round(one.progress)} %`), number: true },
      { name: "Tries", text: (one) => one.tries, number: true },
      { name: "Took", text: (one) => duration(one.seconds), number: true },
      { name: "Table", text: (one) => (one.table ? h("a", { href: `#/tables/${one.table}` }, one.table.slice(0, 12)) : "") },
    ], run.steps, ended ? "no step was begun" : "no step has begun yet"),
    ended ? null : cancel);
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(new DOMException("left", "AbortError"));
    if (signal.aborted) { stop(); return; }
    const timer = setTimeout(() => { signal.removeEventListener("abort", left); resolve(); }, milliseconds);
    const left = () => { clearTimeout(timer); stop(); };
    signal.addEventListener("abort", left, { once: true });
  });
}
