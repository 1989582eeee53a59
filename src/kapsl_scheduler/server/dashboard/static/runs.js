// Runs of jobs: lists of them, kept current, and one of them. What is not here: jobs (jobs.js, job.js).

import { get } from "./api.js";
import { bytes, count, duration, percent, seconds } from "./format.js";
import { live, useLive } from "./live.js";
import { Badge, Figure, JobLink, Link, Missing, Moment, Panel, Problem, Table, Title, jobApi, useFetched } from "./ui.js";
import { html, useEffect, useMemo, useState } from "./vendor/preact-htm.js";

const STATES = ["pending", "running", "succeeded", "failed", "skipped", "missed", "cancelled", "interrupted"];
const PAGE = 25;

/** The last runs of a job (of all jobs for ""), the newest first, with what has happened since they were asked for. */
export function useRuns(job, limit, state = "") {
  const path = `${job ? jobApi(job) : "/v2/cron"}/runs?limit=${limit}${state ? `&state=${state}` : ""}`;
  const fetched = useFetched(path);
  const [told, setTold] = useState(new Map());
  useEffect(() => {
    setTold(new Map());
    return live.onEvents((events) => {
      const ours = events.filter(({ run }) => run && (!job || run.job === job));
      if (ours.length) setTold((before) => new Map([...[...before].slice(-limit), ...ours.map(({ run }) => [run.number, run])]));
    });
  }, [path]);
  const runs = useMemo(() => {
    if (!fetched.data) return null;
    const all = new Map(fetched.data.runs.map((run) => [run.number, run]));
    for (const [number, run] of told) {
      const before = all.get(number);
      if (!before || !before.ended) all.set(number, run);
    }
    return [...all.values()].filter((run) => !state || run.state === state).sort((one, other) => other.number - one.number).slice(0, limit);
  }, [fetched.data, told]);
  return { runs, next: fetched.data?.next ?? null, fetched };
}

const lateness = (run) => (run.started ? Math.max(0, seconds(run.started) - seconds(run.due)) : null);
const why = (run) => run.error || run.reason || run.callback_error;

const COLUMNS = [
  { name: "Run", of: (run) => html`<${Link} to=${`/runs/${run.number}`}>${run.number}</${Link}>` },
  { name: "Job", job: true, of: (run) => html`<${JobLink} id=${run.job} />` },
  { name: "State", of: (run) => html`<${Badge} state=${run.state} />${run.count > 1 ? ` × ${count(run.count)}` : ""}` },
  { name: "Due", of: (run) => html`<${Moment} iso=${run.nominal} distance=${false} />` },
  { name: "Late", right: true, wide: true, of: (run) => duration(lateness(run)) },
  { name: "Took", right: true, of: (run) => duration(run.duration) },
  { name: "Rows", right: true, wide: true, of: (run) => count(run.rows) },
  { name: "Asked by", wide: true, of: (run) => run.origin },
  { name: "Why", wide: true, of: (run) => html`<span class="clip" title=${why(run)}>${why(run)}</span>` },
];

/** Runs with a choice of states, the newest first; older ones on demand. */
export function RunList({ job = "" }) {
  const [state, setState] = useState("");
  const { runs, next, fetched } = useRuns(job, PAGE, state);
  const [older, setOlder] = useState({ runs: [], next: null, error: null });
  useEffect(() => setOlder({ runs: [], next: null, error: null }), [state, job]);
  const more = async () => {
    const last = (older.runs.at(-1) ?? runs.at(-1)).number;
    const path = `${job ? jobApi(job) : "/v2/cron"}/runs?limit=${PAGE}&before=${last}${state ? `&state=${state}` : ""}`;
    try {
      const page = await get(path);
      setOlder((before) => ({ runs: [...before.runs, ...page.runs], next: page.next, error: null }));
    } catch (error) {
      setOlder((before) => ({ ...before, error }));
    }
  };
  if (!runs) return html`<${Missing} of=${fetched} what="runs" />`;
  const shown = new Set(runs.map((run) => run.number));
  const all = [...runs, ...older.runs.filter((run) => !shown.has(run.number))];
  const isMore = older.runs.length ? older.next !== null : next !== null || runs.length === PAGE;
  return html`<label class="filter">State
      <select value=${state} onChange=${(event) => setState(event.target.value)}>
        <option value="">all</option>${STATES.map((name) => html`<option>${name}</option>`)}
      </select></label>
    <${Table} caption="Runs, the newest first" columns=${COLUMNS.filter((column) => !job || !column.job)} rows=${all} keyOf=${(run) => run.number} empty="There are none." />
    <${Problem} error=${older.error} />
    ${isMore && html`<button type="button" onClick=${more}>Older</button>`}`;
}

export function Runs() {
  return html`<${Title}>Runs</${Title}><${Panel} title="History"><${RunList} /></${Panel}>`;
}

export function Run({ id }) {
  useLive();
  const fetched = useFetched(`/v2/cron/runs/${encodeURIComponent(id)}`, ({ run }) => String(run?.number) === id);
  const run = fetched.data;
  const open = run !== null && !run.ended;
  useEffect(() => {
    if (!open) return;
    const timer = setInterval(fetched.reload, 1_000); // how far it is, nobody tells
    return () => clearInterval(timer);
  }, [open, fetched.reload]);
  const above = html`<${Link} to="/runs">Runs</${Link}>`;
  return html`<${Title} above=${above} beside=${run && html`<${Badge} state=${run.state} />`}>Run ${id}</${Title}>
    ${run ? html`<${Detail} run=${run} />` : html`<${Missing} of=${fetched} what="the run" />`}`;
}

function Detail({ run }) {
  const texts = [["Error", run.error], ["Error of on_result", run.callback_error]].filter(([, text]) => text);
  return html`<dl class="figures">
      <${Figure} label="Late" value=${duration(lateness(run))} />
      <${Figure} label="Took" value=${duration(run.duration)} />
      <${Figure} label="Requests" value=${count(run.requests)} note=${run.failed_requests ? `, ${count(run.failed_requests)} failed` : ""} alarming=${run.failed_requests > 0} />
      <${Figure} label="Rows" value=${count(run.rows)} />
      <${Figure} label="In" value=${bytes(run.input_bytes)} />
      <${Figure} label="Out" value=${bytes(run.output_bytes)} />
    </dl>
    ${run.progress !== null &&
    html`<p><label>Done <progress max="1" value=${run.progress}></progress> ${percent(run.progress)}</label></p>`}
    <${Panel} title="Course">
      <dl class="facts">
        <dt>Job</dt><dd><${JobLink} id=${run.job} /></dd>
        <dt>On the schedule</dt><dd><${Moment} iso=${run.nominal} /></dd>
        <dt>Due</dt><dd><${Moment} iso=${run.due} /></dd>
        <dt>Started</dt><dd><${Moment} iso=${run.started} /></dd>
        <dt>Ended</dt><dd><${Moment} iso=${run.ended} /></dd>
        <dt>Asked by</dt><dd>${run.origin}</dd>
        <dt>Attempt</dt><dd>${count(run.attempt)}</dd>
        ${run.count > 1 && html`<dt>Stands for</dt><dd>${count(run.count)} occurrences from <${Moment} iso=${run.first} /></dd>`}
        ${run.reason && html`<dt>Reason</dt><dd>${run.reason}</dd>`}
      </dl>
    </${Panel}>
    ${texts.map(([title, text]) => html`<${Panel} title=${title}><pre tabindex="0" aria-label=${title}>${text}</pre></${Panel}>`)}`;
}
