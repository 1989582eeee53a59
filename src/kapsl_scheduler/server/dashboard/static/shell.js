// What surrounds every view: the way to the others, the colours, how the connection is, the question for a token.

import { access } from "./api.js";
import { useLive } from "./live.js";
import { Link } from "./ui.js";
import { html, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";

const VIEWS = [["/", "Overview"], ["/models", "Models"], ["/jobs", "Jobs"], ["/runs", "Runs"], ["/events", "Events"]];

export function Shell({ path, children }) {
  const current = (to) => (to === "/" ? path === "/" : path === to || path.startsWith(`${to}/`));
  return html`<a class="skip" href="#main">Skip to the content</a>
    <header>
      <${Link} to="/" class="brand"><span class="mark" aria-hidden="true"></span>kapsl-scheduler</${Link}>
      <nav aria-label="Views">
        ${VIEWS.map(([to, name]) => html`<${Link} key=${to} to=${to} aria-current=${current(to) ? "page" : undefined}>${name}</${Link}>`)}
      </nav>
      <div class="tools"><${Connection} /><${Colours} /></div>
    </header>
    <${Banner} />
    ${children}
    <${TokenDialog} />`;
}

function Connection() {
  const { state, latest, version } = useLive();
  const word = state === "live" && latest?.draining ? "closing" : { connecting: "connecting", live: "live", lost: "no connection" }[state];
  const forget = () => {
    access.token = null;
    location.reload();
  };
  return html`${access.token && html`<button type="button" onClick=${forget}>Forget token</button>`}
    <span class=${`connection ${state}`} title=${version && `version ${version}`}>${word}</span>`;
}

function Banner() {
  const { state, error, retryAt, outdated, latest } = useLive();
  const left = Math.max(0, Math.round((retryAt - Date.now()) / 1e3));
  return html`<div role="status" class="banners">
    ${state === "lost" && html`<p class="banner bad">${error} What is shown may be old. Trying again${left ? ` in ${left} s` : ""}.</p>`}
    ${state === "live" && outdated && html`<p class="banner">The server has a newer dashboard. <button type="button" onClick=${() => location.reload()}>Reload</button></p>`}
    ${state === "live" && latest?.cron?.store_failing && html`<p class="banner bad">Jobs do not fire: their store cannot be written to. ${latest.cron.store_failing}</p>`}
  </div>`;
}

function Colours() {
  const [chosen, setChosen] = useState(document.documentElement.dataset.theme ?? "system");
  const choose = (event) => {
    const { value } = event.target;
    if (value === "system") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("kapsl-theme");
    } else {
      document.documentElement.dataset.theme = value;
      localStorage.setItem("kapsl-theme", value);
    }
    setChosen(value);
    dispatchEvent(new Event("kapsl-theme"));
  };
  return html`<select aria-label="Colours" value=${chosen} onChange=${choose}>
    <option value="system">Auto</option><option value="light">Light</option><option value="dark">Dark</option>
  </select>`;
}

/** Asks for a token when the server wants one. Where there is none yet it stays: without it there is nothing to see. */
function TokenDialog() {
  const dialog = useRef(null);
  const answer = useRef(null);
  const [problem, setProblem] = useState("");
  const [leaving, setLeaving] = useState(false); // whether one may go without
  useLayoutEffect(() => {
    // Before anything is asked of the server: an answer may come sooner than the page is painted.
    access.ask = (why, mayLeave) =>
      new Promise((resolve) => {
        setProblem(why);
        setLeaving(mayLeave);
        answer.current = resolve;
        dialog.current.showModal();
      });
    return () => (access.ask = null);
  }, []);
  const submit = (event) => {
    access.token = new FormData(event.target).get("token").trim();
    event.target.reset();
  };
  return html`<dialog ref=${dialog} aria-labelledby="token-title" onClose=${() => answer.current?.()} onCancel=${(event) => leaving || event.preventDefault()}>
    <form method="dialog" onSubmit=${submit}>
      <h2 id="token-title">${leaving ? "Another token" : "This server wants a token"}</h2>
      ${problem && html`<p class="problem" role="alert">${problem}</p>`}
      <label>Token <input name="token" type="password" required autocomplete="off" spellcheck="false" /></label>
      <p class="quiet">It is kept until this tab is closed.</p>
      <div class="row">
        <button class="primary">Use it</button>
        ${leaving && html`<button type="button" onClick=${() => dialog.current.close()}>Cancel</button>`}
      </div>
    </form>
  </dialog>`;
}
