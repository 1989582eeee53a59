// All jobs: when each fires, how it went, and what can be done at once. What is not here: one of them (job.js).

import { get, post } from "./api.js";
import { count } from "./format.js";
import { useLive } from "./live.js";
import { useRuns } from "./runs.js";
import { Firings } from "./timeline.js";
import { Act, Badge, JobLink, Missing, Moment, Panel, Problem, Table, Title, jobApi, useFetched } from "./ui.js";
import { html, useState } from "./vendor/preact-htm.js";

const SPAN = 600; // seconds of the timeline

/** The word for how a job stands. */
export function standing(job) {
  if (!job.enabled) return "paused";
  if (job.waiting_for) return "waiting";
  return job.running ? "running" : job.next_firing ? "active" : "finished";
}

/** Buttons that a job has everywhere. `changed` is called when something was done. */
export function JobActions({ job, changed, onProblem }) {
  const act = (what, body = {}) => async () => {
    await post(`${jobApi(job.id)}/${what}`, body);
    await changed();
  };
  return html`<span class="acts">
    <${Act} does=${act("trigger")} onProblem=${onProblem} aria-label=${`Run ${job.id} now`}>Run now</${Act}>
    ${job.enabled
      ? html`<${Act} key="pause" does=${act("pause", { reason: "from the dashboard" })} onProblem=${onProblem} aria-label=${`Pause ${job.id}`}>Pause</${Act}>`
      : html`<${Act} key="resume" does=${act("resume")} onProblem=${onProblem} aria-label=${`Resume ${job.id}`}>Resume</${Act}>`}
  </span>`;
}

export function Jobs() {
  useLive(); // "in 3 s" goes on
  const [problem, setProblem] = useState(null);
  const [more, setMore] = useState([]);
  const first = useFetched("/v2/cron/jobs?limit=100", () => true);
  const { runs } = useRuns("", 500);
  if (!first.data) return html`<${Title}>Jobs</${Title}><${Missing} of=${first} what="jobs" />`;
  const jobs = [...first.data.jobs, ...more.flatMap((page) => page.jobs)];
  const next = more.length ? more.at(-1).next : first.data.next;
  const lanes = first.data.jobs.map((job) => ({
    id: job.id,
    runs: (runs ?? []).filter((run) => run.job === job.id),
    next: job.enabled && job.next_firing ? [job.next_firing] : [],
  }));
  const columns = [
    { name: "Job", of: (job) => html`<${JobLink} id=${job.id} /><small class="under wide">${job.description}</small>` },
    { name: "State", of: (job) => html`<${Badge} state=${standing(job)} />` },
    { name: "Model", wide: true, of: (job) => job.model ?? "–" },
    { name: "Next", of: (job) => html`<${Moment} iso=${job.enabled ? job.next_firing : null} />` },
    { name: "Last", wide: true, of: (job) => (job.last_outcome ? html`<${Badge} state=${job.last_outcome} />` : "–") },
    { name: "Fired", right: true, wide: true, of: (job) => count(job.fired_count) },
    { name: "Missed", right: true, wide: true, of: (job) => count(job.missed_count) },
    { name: "Actions", of: (job) => html`<${JobActions} job=${job} changed=${first.reload} onProblem=${setProblem} />` },
  ];
  return html`<${Title}>Jobs</${Title}>
    <${Problem} error=${problem} />
    <${Panel} title="All jobs">
      <${Table} caption="Jobs" columns=${columns} rows=${jobs} keyOf=${(job) => job.id} empty="There are no jobs. They come with a package, or by PUT /v2/cron/jobs/ID." />
      ${next && html`<${Act} onProblem=${setProblem} does=${async () => setMore([...more, await get(`/v2/cron/jobs?limit=100&after=${encodeURIComponent(next)}`)])}>More</${Act}>`}
    </${Panel}>
    ${lanes.length > 0 && html`<${Firings} lanes=${lanes} span=${SPAN} />`}`;
}
