// Small elements that several views share, and how they get what they show. What is not here: views, charts.

import { access, get } from "./api.js";
import { clock, relative, seconds } from "./format.js";
import { live, useLive } from "./live.js";
import { html, useCallback, useEffect, useRef, useState } from "./vendor/preact-htm.js";

// ------------------------------------------------------------------------------------------------ fetching

/** What a route answers: `{data, error, reload}`. It is asked again after every new connection to the server, and
 * when something happens that `concerns` (a function of an event) says it concerns. A null path asks for nothing. */
export function useFetched(path, concerns = null) {
  const [state, setState] = useState({ path: null, data: null, error: null });
  const current = useRef(path);
  current.current = path;
  const { epoch } = useLive();

  const reload = useCallback(async () => {
    if (path === null) return;
    try {
      const data = await get(path);
      if (current.current === path) setState({ path, data, error: null });
    } catch (error) {
      if (current.current === path) setState((before) => ({ path, data: before.path === path ? before.data : null, error }));
    }
  }, [path]);

  useEffect(() => {
    reload();
  }, [reload, epoch]);
  const concerned = useRef(concerns);
  concerned.current = concerns;
  useEffect(
    () => live.onEvents((events) => concerned.current && events.some((event) => concerned.current(event)) && reload()),
    [reload],
  );
  return { ...(state.path === path ? state : { data: null, error: null }), reload };
}

/** What stands where there are no data: why, and what to do about it. */
export function Missing({ of: { error, reload }, what }) {
  if (!error) return html`<p class="quiet" role="status">Asking for ${what}…</p>`;
  return html`<div class="problem" role="alert">
    <p>${error.message}</p>
    <button type="button" onClick=${reload}>Ask again</button>
  </div>`;
}

// ---------------------------------------------------------------------------------------------- navigation

export function go(path) {
  history.pushState(null, "", path);
  dispatchEvent(new PopStateEvent("popstate"));
}

/** A link to another view. Anything but a plain click is the browser's. */
export function Link({ to, children, ...rest }) {
  const follow = (event) => {
    if (event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    go(to);
  };
  return html`<a href=${to} onClick=${follow} ...${rest}>${children}</a>`;
}

/** Where a model is shown: the latest version of it, without one. The protocol's routes for it have `/v2` before this. */
export const modelPath = (name, version = "") => `/models/${encodeURIComponent(name)}${version && `/versions/${encodeURIComponent(version)}`}`;
export const jobPath = (id) => `/jobs/${encodeURIComponent(id)}`;
export const jobApi = (id) => `/v2/cron/jobs/${encodeURIComponent(id)}`;

/** A job's id, which is broken at its marks where there is no room for it. */
export const JobLink = ({ id }) => html`<${Link} to=${jobPath(id)} class="id">${id.split(/(?<=[^\p{L}\p{N}])/u).flatMap((part) => [part, html`<wbr />`])}</${Link}>`;

// ------------------------------------------------------------------------------------------------ elements

export function Title({ children, above, beside }) {
  return html`<div class="title">
    <div>${above && html`<p class="above">${above}</p>`}<h1 tabindex="-1">${children}</h1></div>
    ${beside && html`<div class="beside">${beside}</div>`}
  </div>`;
}

export function Panel({ title, beside, children, class: name = "" }) {
  return html`<section class=${`panel ${name}`} aria-label=${title}>
    <div class="panel-head"><h2>${title}</h2>${beside}</div>
    ${children}
  </section>`;
}

export function Figure({ label, value, note, alarming = false }) {
  return html`<div class=${`figure${alarming ? " alarming" : ""}`}>
    <dt>${label}</dt>
    <dd>${value}${note && html`<small>${note}</small>`}</dd>
  </div>`;
}

export const Badge = ({ state }) => html`<span class=${`badge ${state}`}>${state}</span>`;

/** A moment on the clock, with its distance from now beside it. */
export function Moment({ iso, distance = true }) {
  if (!iso) return html`<span class="quiet">–</span>`;
  const near = distance && html`<small>${relative(seconds(iso), live.now())}</small>`;
  return html`<time datetime=${iso} title=${`${iso} (UTC)`}>${clock(iso)} ${near}</time>`;
}

/** A table of rows: `columns` are `{name, of, wide, right}`, `wide` ones are not shown on a phone. */
export function Table({ caption, columns, rows, keyOf, empty }) {
  if (!rows.length) return html`<p class="quiet">${empty}</p>`;
  const kind = (column) => `${column.wide ? "wide " : ""}${column.right ? "right" : ""}`.trim() || undefined;
  return html`<table>
    <caption class="unseen">${caption}</caption>
    <thead>
      <tr>${columns.map((column) => html`<th scope="col" class=${kind(column)}>${column.name}</th>`)}</tr>
    </thead>
    <tbody>
      ${rows.map(
        (row) =>
          html`<tr key=${keyOf(row)}>
            ${columns.map((column, index) =>
              index
                ? html`<td class=${kind(column)}>${column.of(row)}</td>`
                : html`<th scope="row" class=${kind(column)}>${column.of(row)}</th>`,
            )}
          </tr>`,
      )}
    </tbody>
  </table>`;
}

/** A button for something that takes a while: it cannot be pressed twice, and what went wrong is said beside it by
 * whoever has `onProblem`. */
export function Act({ does, children, onProblem, ...rest }) {
  const [busy, setBusy] = useState(false);
  const press = async () => {
    setBusy(true);
    try {
      onProblem?.(null);
      await does();
    } catch (error) {
      onProblem?.(error);
    } finally {
      setBusy(false);
    }
  };
  return html`<button type="button" disabled=${busy} onClick=${press} ...${rest}>${children}</button>`;
}

/** What went wrong with what somebody did. Who may not do it can do it as somebody else. */
export function Problem({ error }) {
  if (!error) return null;
  return html`<div class="problem" role="alert">
    <p>${error.message}</p>
    ${error.status === 403 && access.token && html`<button type="button" onClick=${() => access.another()}>Use another token</button>`}
  </div>`;
}
