// One model: its load over the last minutes, what it takes and gives, and a place to try it. What is not here: the trial
// itself (playground.js).

import { Bars, CLASS_COLORS, Chart } from "./charts.js";
import { CLASSES, count, duration, percent, short } from "./format.js";
import { live, useLive } from "./live.js";
import { Playground } from "./playground.js";
import { Badge, Figure, Link, Missing, Panel, Table, Title, modelPath, useFetched } from "./ui.js";
import { html, useMemo } from "./vendor/preact-htm.js";

/** From a sample to what it says of a version of a model, of the latest without one. */
const picked = (name, version) => (sample) =>
  sample.models.find((model) => model.name === name && (version ? model.version === version : model.latest));

function lines(of) {
  const each = Object.entries(CLASSES);
  return {
    latencies: each.flatMap(([key, label]) => [
      { label: `${label} p50`, color: CLASS_COLORS[key], dashed: true, of: (sample) => of(sample)?.classes[key].p50 },
      { label: `${label} p99`, color: CLASS_COLORS[key], of: (sample) => of(sample)?.classes[key].p99 },
    ]),
    queues: each.map(([key, label]) => ({ label, color: CLASS_COLORS[key], of: (sample) => of(sample)?.classes[key].queued })),
    rates: each.map(([key, label]) => ({ label, color: CLASS_COLORS[key], of: (sample) => of(sample)?.classes[key].rate })),
    busy: [{ label: "busy", color: "--line-1", of: (sample) => of(sample)?.busy }],
  };
}

export function Model({ id: name, version = "" }) {
  const { history, latest } = useLive();
  const path = `/v2${modelPath(name, version)}`;
  const metadata = useFetched(path);
  const of = useMemo(() => picked(name, version), [name, version]);
  const { latencies, queues, rates, busy } = useMemo(() => lines(of), [of]);
  const model = latest && of(latest);
  const versions = latest?.models.filter((model) => model.name === name) ?? [];
  const beside = model && html`${model.version && html`<span class="quiet">version ${model.version}</span>`}<${Badge} state=${model.status} />`;
  return html`<${Title} above=${html`<${Link} to="/models">Models</${Link}>`} beside=${beside}>${name}</${Title}>
    ${versions.length > 1 && html`<${Versions} of=${versions} shown=${model} />`}
    ${!metadata.data && html`<${Missing} of=${metadata} what="the model" />`}
    ${model &&
    html`<dl class="figures">
        <${Figure} label="Requests" value=${short(model.requests)} note="/s" />
        <${Figure} label="Rows" value=${short(model.rows)} note="/s" />
        <${Figure} label="Live p99" value=${duration(model.classes.latency_critical.p99)} />
        <${Figure} label="Queued" value=${count(model.queued + model.waiting)} />
        <${Figure} label="Calls running" value=${count(model.calls_in_flight)} note=${` of ${model.slots}`} />
        <${Figure} label="Engine busy" value=${percent(model.busy)} />
        <${Figure} label="Refused" value=${short(model.refused)} note="/s" alarming=${model.refused > 0} />
        <${Figure} label="Failed" value=${short(model.failed)} note="/s" alarming=${model.failed > 0} />
        <${Figure} label="Answered in all" value=${short(model.succeeded)} />
      </dl>
      <div class="charts">
        <${Chart} title="Latency by class" history=${history} series=${latencies} form=${duration} />
        <${Chart} title="Answers per second by class" history=${history} series=${rates} form=${short} />
        <${Chart} title="Queue depth by class" history=${history} series=${queues} form=${short} />
        <${Chart} title="Engine busy" history=${history} series=${busy} form=${percent} ceiling=${1} />
      </div>`}
    ${metadata.data &&
    html`<div class="columns">
      <${Playground} path=${path} metadata=${metadata.data} />
      <div>
        <${Panel} title="Batch sizes"><${BatchSizes} of=${of} history=${history} /></${Panel}>
        <${Panel} title="Inputs and outputs"><${Tensors} metadata=${metadata.data} /></${Panel}>
      </div>
    </div>`}`;
}

/** The way to the versions side by side. The latest is the one that answers where a request names none. */
function Versions({ of, shown }) {
  return html`<nav class="versions" aria-label="Versions">
    ${of.map(
      (model) => html`<${Link} key=${model.version} to=${modelPath(model.name, model.latest ? "" : model.version)} aria-current=${model === shown ? "page" : undefined}>
        ${model.version}${model.latest && html` <small>latest</small>`}</${Link}>`,
    )}
  </nav>`;
}

function BatchSizes({ of, history }) {
  const sizes = {};
  for (const sample of history) {
    for (const [size, calls] of Object.entries(of(sample)?.batches ?? {})) sizes[size] = (sizes[size] ?? 0) + calls;
  }
  const rows = Object.entries(sizes).map(([size, calls]) => ({ label: size, value: calls, text: count(calls) }));
  if (!rows.length) return html`<p class="quiet">Nothing has been asked of it in the last five minutes.</p>`;
  const most = of(live.latest)?.max_batch_size;
  return html`<p class="quiet">Calls of the last five minutes by their rows${most ? `; at most ${most}` : ""}</p>
    <${Bars} caption="Calls by rows" heads=${["Rows", "Calls"]} rows=${merged(rows)} />`;
}

/** No more than a dozen bars: neighbours are put together. */
function merged(rows) {
  const width = Math.ceil(rows.length / 12);
  if (width === 1) return rows;
  return Array.from({ length: Math.ceil(rows.length / width) }, (_, number) => {
    const some = rows.slice(number * width, (number + 1) * width);
    const value = some.reduce((sum, row) => sum + row.value, 0);
    const label = some.length > 1 ? `${some[0].label}–${some.at(-1).label}` : some[0].label;
    return { label, value, text: count(value) };
  });
}

function Tensors({ metadata }) {
  const rows = ["input", "output"].flatMap((kind) => metadata[`${kind}s`].map((tensor) => ({ kind, ...tensor })));
  const columns = [
    { name: "Name", of: (tensor) => tensor.name },
    { name: "Kind", of: (tensor) => html`<span class="quiet">${tensor.kind}</span>` },
    { name: "Type", of: (tensor) => tensor.datatype },
    { name: "Shape", of: (tensor) => `[${tensor.shape.map((size) => (size < 0 ? "?" : size)).join(", ")}]` },
  ];
  return html`<${Table} caption="Inputs and outputs" columns=${columns} rows=${rows} keyOf=${(tensor) => tensor.kind + tensor.name} empty="The model does not say." />`;
}
