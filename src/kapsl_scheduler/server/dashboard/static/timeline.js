// Firings of jobs on a line of time, a lane a job: what ran, for how long, how it ended, and what is due next. What is
// not here: where runs come from (runs.js).

import { clock, duration, seconds } from "./format.js";
import { live, useLive } from "./live.js";
import { Link, Panel, go, jobPath } from "./ui.js";
import { html, useState } from "./vendor/preact-htm.js";

const MOST_LANES = 12;
const HEIGHT = 22;
const SPANS = [120, 600, 3_600, 6 * 3_600, 86_400, 7 * 86_400, 30 * 86_400]; // seconds

/** The span in which some two dozen firings fall that are so far apart. */
export const spanFor = (apart) => SPANS.find((span) => span >= 24 * apart) ?? SPANS.at(-1);

/** A timeline with a choice of how far it reaches. */
export function Firings({ lanes, span: given, beside }) {
  const [span, setSpan] = useState(null);
  const shown = span ?? given;
  const choice = html`<label class="filter">The last
    <select value=${shown} onChange=${(event) => setSpan(Number(event.target.value))}>
      ${SPANS.map((seconds) => html`<option value=${seconds}>${duration(seconds)}</option>`)}
    </select></label>`;
  return html`<${Panel} title="Firings" beside=${html`<div class="row">${choice}${beside}</div>`}>
    ${lanes.length ? html`<${Timeline} lanes=${lanes} span=${shown} />` : html`<p class="quiet">There are no jobs.</p>`}
  </${Panel}>`;
}

/** `lanes` are `{id, runs, next}`: runs as the server tells them, and times that are due (ISO). `span` seconds back and
 * a quarter of that ahead are shown. */
function Timeline({ lanes, span }) {
  useLive();
  const now = live.now();
  const start = now - span;
  const whole = span * 1.25;
  const at = (moment) => ((moment - start) / whole) * 100;
  const shown = lanes.slice(0, MOST_LANES);
  const step = span / 5;
  const first = Math.ceil(start / step) * step;
  const ticks = Array.from({ length: 6 }, (_, number) => first + number * step).filter((tick) => at(tick) > 3 && at(tick) < 97);
  return html`<div class="timeline">
    ${shown.map(
      (lane) => html`<div class="lane" key=${lane.id}>
        <${Link} to=${jobPath(lane.id)} class="lane-name">${lane.id}</${Link}>
        <svg height=${HEIGHT} width="100%" role="img" aria-label=${said(lane, start)}>
          <line class="axis" x1="0" x2="100%" y1=${HEIGHT / 2} y2=${HEIGHT / 2} />
          ${lane.runs.map((run) => mark(run, at, now))}
          ${lane.next.map((iso) => {
            const x = at(seconds(iso));
            return x >= 0 && x <= 100 && html`<circle class="due" cx=${`${x}%`} cy=${HEIGHT / 2} r="4"><title>due ${clock(iso)}</title></circle>`;
          })}
          <line class="now" x1=${`${at(now)}%`} x2=${`${at(now)}%`} y1="0" y2=${HEIGHT} />
        </svg>
      </div>`,
    )}
    <div class="lane ticks" aria-hidden="true">
      <span class="lane-name"></span>
      <svg height="16" width="100%">
        ${ticks.map((tick) => html`<text key=${tick} x=${`${at(tick)}%`} y="12">${clock(new Date(tick * 1e3).toISOString())}</text>`)}
      </svg>
    </div>
    ${lanes.length > shown.length && html`<p class="quiet">and ${lanes.length - shown.length} jobs more</p>`}
  </div>`;
}

function mark(run, at, now) {
  const from = seconds(run.started ?? run.due);
  const to = seconds(run.ended) ?? (run.started ? now : from);
  const [left, right] = [at(from), at(to)];
  if (right < 0 || left > 100) return null;
  const width = Math.max(right - Math.max(0, left), 0.35);
  const title = `run ${run.number}: ${run.state}${run.reason ? ` (${run.reason})` : ""}, ${clock(run.started ?? run.due)}${run.duration === null ? "" : `, ${duration(run.duration)}`}`;
  return html`<rect key=${run.number} class=${`mark ${run.state}`} x=${`${Math.max(0, left)}%`} width=${`${width}%`} y="4" height=${HEIGHT - 8} rx="2" onClick=${() => go(`/runs/${run.number}`)}><title>${title}</title></rect>`;
}

function said(lane, start) {
  const counts = {};
  for (const run of lane.runs) if (seconds(run.started ?? run.due) >= start) counts[run.state] = (counts[run.state] ?? 0) + 1;
  const what = Object.entries(counts).map(([state, number]) => `${number} ${state}`).join(", ") || "no runs";
  return `Firings of ${lane.id}: ${what}${lane.next.length ? `, next ${clock(lane.next[0])}` : ""}`;
}
