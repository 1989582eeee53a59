// Everything that goes to the server: JSON both ways, the token, the errors. What is not here: the live stream's
// reconnecting (live.js).

const TOKEN = "kapsl-token"; // of sessionStorage: it goes with the tab
const PATIENCE = 15_000; // ms

/** An answer that is not 2xx, or none at all (`status` 0). `body` is what the server said. */
export class ApiError extends Error {
  constructor(message, status = 0, body = {}) {
    super(message);
    this.status = status;
    this.body = body;
  }
}

/** The token, and who asks for it: the shell sets `ask` to a function (of why, and whether there is a way back) that
 * resolves when there is an answer. It is kept where nobody but this tab's pages can read it, and sent in a header only. */
export const access = {
  ask: null,
  asking: null,
  /** For what the one that is used may not do. */
  another() {
    access.asking ??= access.ask("", true).finally(() => (access.asking = null));
    return access.asking;
  },
  get token() {
    return sessionStorage.getItem(TOKEN);
  },
  set token(value) {
    if (value) sessionStorage.setItem(TOKEN, value);
    else sessionStorage.removeItem(TOKEN);
  },
};

/** `fetch` with the token; where the server wants one, the user is asked for it, once for all requests that wait. */
export async function request(path, options = {}) {
  for (;;) {
    const sent = access.token;
    const headers = { ...options.headers };
    if (sent) headers.authorization = `Bearer ${sent}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted && options.signal.reason?.name !== "TimeoutError") throw error;
      throw new ApiError("The server does not answer.");
    }
    if (response.status !== 401 || access.ask === null) return response;
    if (sent === access.token) {
      const problem = sent ? (await said(response)).message : "";
      access.asking ??= access.ask(problem, false).finally(() => (access.asking = null));
      await access.asking;
    } else if (access.asking) {
      await access.asking;
    }
  }
}

async function said(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // not ours: a proxy between us, perhaps
  }
  const faults = Array.isArray(body.faults) ? body.faults : [];
  const message = faults.length > 1 ? faults.join("\n") : body.error || `The server answered ${response.status}.`;
  return new ApiError(message, response.status, body);
}

async function call(path, options) {
  const response = await request(path, options);
  if (!response.ok) throw await said(response);
  return response;
}

export async function get(path) {
  const response = await call(path, { signal: AbortSignal.timeout(PATIENCE) });
  return response.json();
}

export async function post(path, body) {
  const response = await call(path, {
    method: "POST",
    body: body === undefined ? "" : JSON.stringify(body),
    headers: { "content-type": "application/json" },
  });
  return response.json();
}

/** One inference on the model at that path, with what the server says of how it came about: rows of its batch, seconds. */
export async function infer(path, body) {
  const begun = performance.now();
  const response = await call(`${path}/infer`, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json", "kapsl-timing": "1" },
  });
  const answer = await response.json();
  const number = (name, unit = 1) => (response.headers.has(name) ? Number(response.headers.get(name)) * unit : null);
  return {
    answer,
    rows: number("kapsl-batch-rows"),
    queue: number("kapsl-queue-time-us", 1e-6),
    compute: number("kapsl-compute-time-us", 1e-6),
    total: (performance.now() - begun) / 1e3,
  };
}

/** Calls `on(kind, data)` for each server-sent event until the stream ends. Raises `ApiError`. */
export async function follow(path, signal, on) {
  const response = await call(path, { signal, headers: { accept: "text/event-stream" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let kind = "message";
      const data = [];
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) kind = line.slice(7);
        else if (line.startsWith("data: ")) data.push(line.slice(6));
      }
      if (data.length) on(kind, JSON.parse(data.join("\n")));
    }
  }
}
