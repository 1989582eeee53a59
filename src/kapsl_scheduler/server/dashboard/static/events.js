// What happens to jobs, as it happens. What is not here: history (runs.js).

import { clock, count, duration } from "./format.js";
import { useLive } from "./live.js";
import { Badge, JobLink, Link, Panel, Table, Title } from "./ui.js";
import { html, useState } from "./vendor/preact-htm.js";

const KINDS = ["registered", "updated", "paused", "resumed", "unregistered", "started", "ended"];

const COLUMNS = [
  { name: "Time", of: (event) => html`<time datetime=${event.at}>${clock(event.at)}</time>` },
  { name: "Job", of: (event) => html`<${JobLink} id=${event.job} />` },
  { name: "What", of: (event) => event.kind },
  { name: "Run", of: ({ run }) => run && html`<${Link} to=${`/runs/${run.number}`}>${run.number}</${Link}>` },
  { name: "State", of: ({ run }) => run && html`<${Badge} state=${run.state} />` },
  { name: "Took", right: true, wide: true, of: ({ run }) => (run?.ended ? duration(run.duration) : "") },
  { name: "Why", wide: true, of: ({ run }) => run && html`<span class="clip">${run.error || run.reason}</span>` },
];

/** The newest events since the page was opened: `most` of them, of one kind or all; `held` shows these instead. */
export function EventList({ most, kind = "", held = null }) {
  const { events } = useLive();
  const shown = (held ?? events).filter((event) => !kind || event.kind === kind).slice(0, most);
  return html`<${Table} caption="Events, the newest first" columns=${COLUMNS} rows=${shown} keyOf=${(event) => `${event.at} ${event.kind} ${event.job} ${event.run?.number}`} empty="Nothing has happened since this page was opened." />`;
}

export function Events() {
  const { events, latest, lostEvents } = useLive();
  const [kind, setKind] = useState("");
  const [held, setHeld] = useState(null);
  return html`<${Title}>Events</${Title}>
    <${Panel} title="Since this page was opened">
      ${latest?.cron === null && html`<p class="banner">This server runs no jobs.</p>`}
      <div class="row">
        <label class="filter">Kind
          <select value=${kind} onChange=${(event) => setKind(event.target.value)}>
            <option value="">all</option>${KINDS.map((name) => html`<option>${name}</option>`)}
          </select></label>
        <button type="button" aria-pressed=${held !== null} onClick=${() => setHeld(held === null ? events : null)}>Hold still</button>
        ${lostEvents > 0 && html`<span class="quiet">${count(lostEvents)} came too fast to be shown</span>`}
      </div>
      <${EventList} most=${200} kind=${kind} held=${held} />
    </${Panel}>`;
}
