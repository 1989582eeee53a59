// One job: its schedule in words, when it is due, how its runs went, and what can be done with it.

import { post } from "./api.js";
import { count, duration, seconds } from "./format.js";
import { useLive } from "./live.js";
import { JobActions, standing } from "./jobs.js";
import { RunList, useRuns } from "./runs.js";
import { Firings, spanFor } from "./timeline.js";
import { Act, Badge, Figure, Link, Missing, Moment, Panel, Problem, Title, jobApi, modelPath, useFetched } from "./ui.js";
import { html, useState } from "./vendor/preact-htm.js";

export function Job({ id }) {
  useLive(); // "in 3 s" goes on
  const [problem, setProblem] = useState(null);
  const ours = (event) => event.job === id;
  const fetched = useFetched(jobApi(id), ours);
  const preview = useFetched(`${jobApi(id)}/preview?n=5`, ours);
  const above = html`<${Link} to="/jobs">Jobs</${Link}>`;
  const job = fetched.data;
  if (!job) return html`<${Title} above=${above}>${id}</${Title}><${Missing} of=${fetched} what="the job" />`;
  const changed = () => Promise.all([fetched.reload(), preview.reload()]);
  const beside = html`<${Badge} state=${standing(job)} /><${JobActions} job=${job} changed=${changed} onProblem=${setProblem} />`;
  const next = job.enabled ? (preview.data?.next ?? []) : [];
  return html`<${Title} above=${above} beside=${beside}>${id}</${Title}>
    <${Problem} error=${problem} />
    ${!job.enabled && html`<p class="banner">Paused${job.paused ? `: ${job.paused}` : ""}</p>`}
    ${job.waiting_for && html`<p class="banner bad">It cannot fire here: ${job.waiting_for}</p>`}
    <p class="explained">${job.description}</p>
    <dl class="figures">
      <${Figure} label="Fired" value=${count(job.fired_count)} />
      <${Figure} label="Succeeded" value=${count(job.succeeded)} />
      <${Figure} label="Failed" value=${count(job.failed)} alarming=${job.failures_in_a_row > 0} note=${job.failures_in_a_row > 0 ? `, ${count(job.failures_in_a_row)} in a row` : ""} />
      <${Figure} label="Skipped, missed" value=${count(job.missed_count)} />
      <${Figure} label="Cancelled, cut short" value=${count(job.cancelled + job.interrupted)} />
      <${Figure} label="Running" value=${count(job.running)} note=${job.pending > job.running ? `, ${count(job.pending - job.running)} wait` : ""} />
      <${Figure} label="The last took" value=${duration(job.last_duration)} />
    </dl>
    <${Lane} id=${id} next=${next} />
    <div class="columns">
      <${Panel} title="Next five firings">
        ${next.length
          ? html`<ol class="next">${next.map((iso) => html`<li key=${iso}><${Moment} iso=${iso} /></li>`)}</ol>`
          : html`<p class="quiet">${job.enabled ? "It will not fire again." : "It is paused."}</p>`}
        <${Backfill} id=${id} changed=${changed} />
      </${Panel}>
      <${Panel} title="Definition">
        <dl class="facts">
          <dt>Schedule</dt><dd><code>${job.schedule}</code> ${job.tz !== "UTC" && job.tz}</dd>
          <dt>Model</dt><dd>${job.model ? html`<${Link} to=${modelPath(job.model)}>${job.model}</${Link}>` : "–"}</dd>
          <dt>Class</dt><dd>${job.priority.replace("_", " ")}${job.force_cpu ? ", on the CPU" : ""}</dd>
          <dt>When it is busy</dt><dd>${job.overflow_policy.replaceAll("_", " ")}</dd>
          ${job.package && html`<dt>Came with</dt><dd>${job.package}</dd>`}
        </dl>
        <details><summary>As JSON</summary><pre tabindex="0" aria-label="Definition">${shortened(job.definition)}</pre></details>
      </${Panel}>
    </div>
    <${Panel} title="History"><${RunList} job=${id} /></${Panel}>`;
}

function Lane({ id, next }) {
  const { runs } = useRuns(id, 300);
  const apart = next.length > 1 ? seconds(next[1]) - seconds(next[0]) : 60;
  return html`<${Firings} lanes=${[{ id, runs: runs ?? [], next }]} span=${spanFor(apart)} />`;
}

/** The definition, without the numbers of its inputs: they are long, and say nothing to a reader. */
function shortened(definition) {
  const short = (key, value) => (typeof value === "string" && value.length > 200 ? `${value.slice(0, 60)}… (${count(value.length)} characters)` : value);
  return JSON.stringify(definition, short, 2);
}

function Backfill({ id, changed }) {
  const [problem, setProblem] = useState(null);
  const [made, setMade] = useState(null);
  const [form, setForm] = useState({ start: local(-3600), end: local(0), concurrency: 1 });
  const set = (key) => (event) => setForm((before) => ({ ...before, [key]: event.target.value }));
  const send = async () => {
    setMade(null);
    const [start, end] = [form.start, form.end].map((text) => {
      const moment = new Date(text);
      if (Number.isNaN(moment.getTime())) throw new Error("Both times are needed.");
      return moment.toISOString();
    });
    setMade(await post(`${jobApi(id)}/backfill`, { start, end, concurrency: Number(form.concurrency) }));
    await changed();
  };
  return html`<details class="backfill">
    <summary>Backfill: run it for a range of the past</summary>
    <div class="form">
      <label>From <input type="datetime-local" step="1" value=${form.start} onInput=${set("start")} /></label>
      <label>To <input type="datetime-local" step="1" value=${form.end} onInput=${set("end")} /></label>
      <label>At a time <input type="number" min="1" max="10000" value=${form.concurrency} onInput=${set("concurrency")} /></label>
      <${Act} does=${send} onProblem=${setProblem}>Backfill</${Act}>
    </div>
    <${Problem} error=${problem} />
    <p role="status">${made && `${count(made.runs)} runs, asked by ${made.origin}`}</p>
  </details>`;
}

/** A moment from now, in whole minutes, as inputs of this kind have it: on this browser's clock. */
function local(away) {
  const date = new Date(Math.floor(Date.now() / 60_000) * 60_000 + away * 1e3);
  return new Date(date.getTime() - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 19);
}
