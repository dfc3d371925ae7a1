// Asking the service. The key lives in this module's memory and nowhere else.

let key = "";
let asked = null; // tells the page that a key is wanted

export function setKey(value) { key = value; }
export function hasKey() { return key !== ""; }
export function onKeyWanted(callback) { asked = callback; }

/** An answer that is an error, in the service's own words. */
export class ServiceError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method, headers, signal, credentials: "omit", cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && asked) asked(hasKey());
  let message = `${answer.status} ${answer.statusText}`;
  try {
    const told = await answer.json();
    message = told?.error?.message ?? told?.message ?? told?.detail ?? message;
  } catch { /* an answer that is no JSON: its status has to do */ }
  throw new ServiceError(answer.status, String(message));
}

/** The JSON at a path of the service. */
export async function api(path, options) { return (await send(path, options)).json(); }

/** The bytes at a path of the service. */
export async function file(path) { return (await send(path)).blob(); }

/** Follow server-sent events until they end; `heard(event, data)` for each. */
export async function follow(path, heard, signal) {
  const answer = await send(path, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const block = held.slice(0, end);
      held = held.slice(end + 2);
      let name = "message";
      const data = [];
      for (const line of block.split("\n")) {
        if (line.startsWith("event:")) name = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      }
      if (data.length) heard(name, JSON.parse(data.join("\n")));
    }
  }
}
