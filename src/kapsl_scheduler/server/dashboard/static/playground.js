// One request by hand: what is sent, the answer, and how it came about. What is not here: drawing (digit.js).

import { infer } from "./api.js";
import { Bars } from "./charts.js";
import { DigitPad, SIZE } from "./digit.js";
import { CLASSES, count, duration } from "./format.js";
import { Act, Figure, Panel, Problem } from "./ui.js";
import { html, useState } from "./vendor/preact-htm.js";

const PRIORITY = { latency_critical: 1, throughput: 2, background: 3 }; // of the protocol
const MOST_VALUES = 4096; // of an example: more nobody edits
const MOST_SHOWN = 20_000; // characters of an answer

/** Whether a model takes 8 x 8 pixels and tells ten things apart. */
function takesDigits({ inputs, outputs }) {
  const [input, output] = [inputs[0], outputs[0]];
  return (
    inputs.length === 1 && outputs.length === 1 && input.datatype.startsWith("FP") &&
    input.shape.length === 2 && input.shape[1] === SIZE * SIZE && output.shape.at(-1) === 10
  );
}

function example({ inputs }) {
  return {
    inputs: inputs.map(({ name, datatype, shape }) => {
      const known = shape.map((size) => (size < 0 ? 1 : size));
      const values = known.reduce((product, size) => product * size, 1);
      const one = datatype === "BYTES" ? "" : datatype === "BOOL" ? false : 0;
      return { name, datatype, shape: known, data: Array(Math.min(values, MOST_VALUES)).fill(one) };
    }),
  };
}

function written(request) {
  const tensors = request.inputs.map((tensor) => `    ${JSON.stringify(tensor)}`).join(",\n");
  return `{\n  "inputs": [\n${tensors}\n  ]\n}`;
}

export function Playground({ path, metadata }) {
  const drawn = takesDigits(metadata);
  const [way, setWay] = useState(drawn ? "draw" : "json");
  const [kind, setKind] = useState("");
  const [text, setText] = useState(() => written(example(metadata)));
  const [pixels, setPixels] = useState(null);
  const [reply, setReply] = useState(null);
  const [problem, setProblem] = useState(null);

  const send = async () => {
    let body;
    if (way === "draw") {
      const { name, datatype } = metadata.inputs[0];
      body = { inputs: [{ name, datatype, shape: [1, SIZE * SIZE], data: pixels }] };
    } else {
      try {
        body = JSON.parse(text);
      } catch (error) {
        throw new Error(`This is not JSON: ${error.message}`);
      }
    }
    if (kind) body.parameters = { ...body.parameters, priority: PRIORITY[kind] };
    setReply({ way, ...(await infer(path, body)) });
  };
  const failed = (error) => {
    setProblem(error);
    if (error) setReply(null);
  };
  return html`<${Panel} title="Playground" class="playground">
    ${drawn &&
    html`<fieldset class="choice">
      <legend class="unseen">What to send</legend>
      ${[["draw", "Draw a digit"], ["json", "Write JSON"]].map(
        ([value, label]) => html`<label><input type="radio" name="way" value=${value} checked=${way === value} onChange=${() => setWay(value)} /><span>${label}</span></label>`,
      )}
    </fieldset>`}
    <div class="trial">
      <div class="question">
        ${way === "draw"
          ? html`<${DigitPad} onPixels=${setPixels} />`
          : html`<label>The request, as of the Open Inference Protocol
              <textarea rows="12" spellcheck="false" value=${text} onInput=${(event) => setText(event.target.value)}></textarea></label>`}
        <div class="row">
          <label>Class
            <select value=${kind} onChange=${(event) => setKind(event.target.value)}>
              <option value="">the model's own</option>
              ${Object.entries(CLASSES).map(([value, label]) => html`<option value=${value}>${label}</option>`)}
            </select></label>
          <${Act} class="primary" does=${send} onProblem=${failed} disabled=${way === "draw" && pixels === null}>Send</${Act}>
        </div>
      </div>
      <div class="answer" aria-live="polite">
        <${Problem} error=${problem} />
        ${reply ? html`<${Reply} ...${reply} />` : !problem && html`<p class="quiet">The answer comes here, with the batch that it was computed in and its time in the queue.</p>`}
      </div>
    </div>
  </${Panel}>`;
}

function Reply({ way, answer, rows, queue, compute, total }) {
  return html`<div class="reply">
    ${way === "draw" ? html`<${Guess} values=${answer.outputs[0].data} />` : html`<pre tabindex="0" aria-label="Answer">${shown(answer)}</pre>`}
    <dl class="figures small">
      <${Figure} label="Rows in its batch" value=${count(rows)} />
      <${Figure} label="In the queue" value=${duration(queue)} />
      <${Figure} label="In the engine" value=${duration(compute)} />
      <${Figure} label="There and back" value=${duration(total)} />
    </dl>
  </div>`;
}

function shown(answer) {
  const { outputs, ...rest } = answer;
  const lines = outputs.map((tensor) => `    ${JSON.stringify(tensor)}`).join(",\n");
  const text = `${JSON.stringify(rest, null, 2).replace(/\n}$/, "")},\n  "outputs": [\n${lines}\n  ]\n}`;
  return text.length > MOST_SHOWN ? `${text.slice(0, MOST_SHOWN)}\n… and ${count(text.length - MOST_SHOWN)} characters more` : text;
}

function Guess({ values }) {
  const best = values.indexOf(Math.max(...values));
  const rows = values.map((value, digit) => ({
    label: String(digit),
    value,
    text: `${(value * 100).toFixed(1)} %`,
    best: digit === best,
  }));
  return html`<p class="guess">It is a <strong>${best}</strong></p>
    <${Bars} caption="Probability of each digit" heads=${["Digit", "Probability"]} rows=${rows} />`;
}
