// The server at a glance. What is not here: one model (model.js), one job (job.js).

import { CLASS_COLORS, Chart } from "./charts.js";
import { CLASSES, count, duration, percent, short } from "./format.js";
import { useLive } from "./live.js";
import { ModelTable } from "./models.js";
import { useRuns } from "./runs.js";
import { Firings } from "./timeline.js";
import { EventList } from "./events.js";
import { Figure, Link, Missing, Panel, Title, useFetched } from "./ui.js";
import { html } from "./vendor/preact-htm.js";

const SPAN = 120; // seconds of the timeline

const total = (sample, of) => {
  const values = sample.models.map(of).filter((value) => value !== null);
  return values.length ? values.reduce((sum, value) => sum + value, 0) : null;
};
const most = (sample, of) => {
  const values = sample.models.map(of).filter((value) => value !== null);
  return values.length ? Math.max(...values) : null;
};

const QUEUES = Object.entries(CLASSES).map(([name, label]) => ({
  label,
  color: CLASS_COLORS[name],
  of: (sample) => total(sample, (model) => model.classes[name].queued),
}));
const LATENCIES = Object.entries(CLASSES).map(([name, label]) => ({
  label,
  color: CLASS_COLORS[name],
  of: (sample) => most(sample, (model) => model.classes[name].p99),
}));
const RATES = [
  { label: "rows", color: "--line-1", of: (sample) => total(sample, (model) => model.rows) },
  { label: "requests", color: "--line-2", of: (sample) => total(sample, (model) => model.requests), dashed: true },
];
const BUSY = [{ label: "the busiest", color: "--line-1", of: (sample) => most(sample, (model) => model.busy) }];

export function Overview() {
  const { history, latest } = useLive();
  const live99 = latest && most(latest, (model) => model.classes.latency_critical.p99);
  const lost = latest && total(latest, (model) => (model.refused === null ? null : model.refused + model.failed));
  return html`<${Title}>Overview</${Title}>
    <dl class="figures">
      <${Figure} label="Requests" value=${short(latest && total(latest, (model) => model.requests))} note="/s" />
      <${Figure} label="Rows" value=${short(latest && total(latest, (model) => model.rows))} note="/s" />
      <${Figure} label="Live p99" value=${duration(live99)} />
      <${Figure} label="Queued" value=${count(latest && total(latest, (model) => model.queued + model.waiting))} />
      <${Figure} label="Engine busy" value=${percent(latest && most(latest, (model) => model.busy))} />
      <${Figure} label="Refused, failed" value=${short(lost)} note="/s" alarming=${lost > 0} />
      ${latest?.cron && html`<${Figure} label="Jobs running" value=${count(latest.cron.running)} note=${` of ${count(latest.cron.jobs)}`} />`}
      ${latest?.cron?.overdue > 0 && html`<${Figure} label="Jobs overdue" value=${count(latest.cron.overdue)} alarming=${true} />`}
    </dl>
    <div class="charts">
      <${Chart} title="Answers per second" history=${history} series=${RATES} form=${short} />
      <${Chart} title="Latency by class, p99 of the slowest model" history=${history} series=${LATENCIES} form=${duration} />
      <${Chart} title="Queue depth by class" history=${history} series=${QUEUES} form=${short} />
      <${Chart} title="Engine busy" history=${history} series=${BUSY} form=${percent} ceiling=${1} />
    </div>
    <${Panel} title="Models"><${ModelTable} /></${Panel}>
    ${latest?.cron && html`<${JobFirings} />`}
    ${latest?.cron && html`<${Panel} title="Events" beside=${html`<${Link} to="/events">All</${Link}>`}><${EventList} most=${8} /></${Panel}>`}`;
}

function JobFirings() {
  const jobs = useFetched("/v2/cron/jobs?limit=100", (event) => event.kind !== "started");
  const { runs } = useRuns("", 300);
  if (!jobs.data) return html`<${Panel} title="Firings"><${Missing} of=${jobs} what="jobs" /></${Panel}>`;
  const lanes = jobs.data.jobs.map((job) => ({
    id: job.id,
    runs: (runs ?? []).filter((run) => run.job === job.id),
    next: job.enabled && job.next_firing ? [job.next_firing] : [],
  }));
  return html`<${Firings} lanes=${lanes} span=${SPAN} beside=${html`<${Link} to="/jobs">Jobs</${Link}>`} />`;
}
