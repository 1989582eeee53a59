// The page: which view an address stands for. What is not here: the views, and what surrounds them (shell.js).

import { Events } from "./events.js";
import { Job } from "./job.js";
import { Jobs } from "./jobs.js";
import { live } from "./live.js";
import { Model } from "./model.js";
import { Models } from "./models.js";
import { Overview } from "./overview.js";
import { Run, Runs } from "./runs.js";
import { Shell } from "./shell.js";
import { Link, Title } from "./ui.js";
import { html, render, useEffect, useRef, useState } from "./vendor/preact-htm.js";

const VIEWS = { models: [Models, Model], jobs: [Jobs, Job], runs: [Runs, Run], events: [Events] };

/** The words of an address; one that nobody has encoded is none of ours. */
function words(path) {
  try {
    return path.split("/").filter(Boolean).map(decodeURIComponent);
  } catch {
    return ["?"];
  }
}

function view(path) {
  const [section = "", id, ...rest] = words(path);
  const [word, version] = rest;
  if (!section) return html`<${Overview} />`;
  const [List, One] = VIEWS[section] ?? [];
  if (List && id === undefined) return html`<${List} />`;
  if (One && !rest.length) return html`<${One} key=${id} id=${id} />`;
  if (One === Model && word === "versions" && rest.length === 2) return html`<${Model} key=${path} id=${id} version=${version} />`;
  return html`<${Title}>There is no such view</${Title}><p><${Link} to="/">Overview</${Link}></p>`;
}

function App() {
  const [path, setPath] = useState(location.pathname);
  const main = useRef(null);
  const first = useRef(true);
  useEffect(() => {
    const moved = () => setPath(location.pathname);
    addEventListener("popstate", moved);
    return () => removeEventListener("popstate", moved);
  }, []);
  useEffect(() => {
    const title = main.current.querySelector("h1");
    document.title = `${title.textContent} · kapsl-scheduler`;
    if (!first.current) {
      scrollTo(0, 0);
      title.focus({ preventScroll: true }); // which is also how a screen reader hears of the new view
    }
    first.current = false;
  }, [path]);
  return html`<${Shell} path=${path}><main id="main" ref=${main}>${view(path)}</main></${Shell}>`;
}

render(html`<${App} />`, document.getElementById("app"));
live.run();
