// Requests to the server, with the key where it asks for one, and streams of server-sent events.

const STORED = "tinyllm-key";
let askForKey = null; // set by the page: returns a promise of a key

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function onKeyWanted(ask) {
  askForKey = ask;
}

function storedKey() {
  try {
    return sessionStorage.getItem(STORED);
  } catch {
    return null;
  }
}

function keep(key) {
  try {
    sessionStorage.setItem(STORED, key);
  } catch { /* it is asked for again */ }
  lastKey = key;
}

let lastKey = storedKey();
let asking = null;

// A response that is not an error. Throws ApiError, or TypeError without a connection.
export async function send(path, { body, signal } = {}) {
  for (;;) {
    const headers = {}, used = lastKey;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (used) headers.Authorization = `Bearer ${used}`;
    const response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
    if (response.ok) return response;
    if (response.status === 401 && askForKey) {
      if (lastKey === used) {
        asking ??= askForKey(Boolean(used)).finally(() => { asking = null; });
        keep(await asking);
      }
      continue;
    }
    throw new ApiError(response.status, await reasonOf(response));
  }
}

async function reasonOf(response) {
  let message = "";
  try {
    const { error, detail } = await response.json();
    message = error?.message ?? (typeof detail === "string" ? detail : "");
  } catch { /* not JSON */ }
  const after = response.headers.get("Retry-After");
  message ||= `the server answered ${response.status} ${response.statusText}`.trim();
  return after ? `${message} (try again in ${after} s)` : message;
}

// The events of a response, as {event, data}; data is text.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const parts = rest.split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        let event = "message", data = null;
        for (const line of part.split(/\r?\n/)) {
          if (line.startsWith("data:")) data = (data === null ? "" : `${data}\n`) + line.slice(5).replace(/^ /, "");
          else if (line.startsWith("event:")) event = line.slice(6).trim();
        }
        if (data !== null) yield { event, data };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
