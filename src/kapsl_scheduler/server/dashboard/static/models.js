// The models that are served, and how each is doing. What is not here: one of them (model.js).

import { CLASSES, count, duration, percent, short } from "./format.js";
import { useLive } from "./live.js";
import { Badge, Link, Panel, Table, Title, modelPath } from "./ui.js";
import { html } from "./vendor/preact-htm.js";

const COLUMNS = [
  { name: "Model", of: (model) => html`<${Link} to=${modelPath(model.name, model.latest ? "" : model.version)}>${model.name}</${Link}> <small class="under">${model.version}${model.latest && !model.alone && ", latest"}</small>` },
  { name: "State", of: (model) => html`<${Badge} state=${model.status} />` },
  { name: "Requests/s", right: true, of: (model) => short(model.requests) },
  { name: "Rows/s", right: true, wide: true, of: (model) => short(model.rows) },
  { name: "Queued", right: true, of: (model) => count(model.queued + model.waiting) },
  ...Object.entries(CLASSES).slice(0, 2).map(([name, label]) => ({
    name: `p99 ${label}`,
    right: true,
    wide: true,
    of: (model) => duration(model.classes[name].p99),
  })),
  { name: "Rows a batch", right: true, wide: true, of: (model) => short(rowsOf(model)) },
  { name: "Busy", right: true, of: (model) => percent(model.busy) },
];

function rowsOf(model) {
  const calls = Object.values(model.batches).reduce((sum, value) => sum + value, 0);
  return calls ? Object.entries(model.batches).reduce((sum, [size, value]) => sum + size * value, 0) / calls : null;
}

export function ModelTable() {
  const { latest } = useLive();
  if (!latest) return html`<p class="quiet" role="status">Waiting for the server…</p>`;
  const names = latest.models.map((model) => model.name);
  const rows = latest.models.map((model) => ({ ...model, alone: names.indexOf(model.name) === names.lastIndexOf(model.name) }));
  return html`<${Table} caption="Models" columns=${COLUMNS} rows=${rows} keyOf=${(model) => `${model.name} ${model.version}`} empty="No model is loaded." />`;
}

export function Models() {
  return html`<${Title}>Models</${Title}><${Panel} title="Served"><${ModelTable} /></${Panel}>`;
}
