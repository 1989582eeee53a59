// Lines over the last minutes, and bars. What is not here: where the numbers come from; firings of jobs (timeline.js).

import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";

/** The colours of the classes of requests: properties of the style sheet. */
export const CLASS_COLORS = { latency_critical: "--live", throughput: "--throughput", background: "--background" };

const MOST = 300; // seconds that a chart shows
const LEAST = 60;
const HEIGHT = 150;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function options(series, form, ceiling, onHover) {
  const axis = {
    stroke: () => color("--quiet"),
    grid: { stroke: () => color("--grid"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
  return {
    width: 300,
    height: HEIGHT,
    padding: [8, 22, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { setScale: false, x: false, y: false }, points: { size: 6 } },
    scales: {
      x: { time: true, range: (plot) => span(plot.data[0]) },
      y: { range: (plot, least, most) => [0, ceiling ?? (most > 0 ? most * 1.1 : 1)] },
    },
    axes: [
      { ...axis, size: 24, space: 70, values: (plot, times) => times.map((time) => minute(time)) },
      { ...axis, size: 54, space: 32, values: (plot, values) => values.map((value) => form(value)) },
    ],
    series: [
      {},
      ...series.map((line) => ({
        label: line.label,
        stroke: () => color(line.color),
        width: 1.75,
        dash: line.dashed ? [4, 3] : undefined,
        points: { show: (plot, number) => alone(plot.data[number]), size: 4 },
      })),
    ],
    hooks: { setCursor: [(plot) => onHover(plot.cursor.idx ?? null)] },
  };
}

const span = (times) => {
  const end = times.at(-1) ?? 0;
  return [Math.max(end - MOST, Math.min(times[0] ?? 0, end - LEAST)), end];
};

/** Whether a line has so few values that it would not be seen. */
const alone = (values) => values.filter((value) => value !== null).length < 3;

const minute = (time) =>
  new Date(time * 1e3).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/** Lines over the history: `series` are `{label, color, dashed, of}`, `of` a function from a sample to a number or null.
 * `ceiling` is where the axis ends, without it above the highest. The legend has the value under the pointer, else the
 * latest. */
export function Chart({ title, history, series, form, ceiling }) {
  const [hovered, setHovered] = useState(null);
  const place = useRef(null);
  const plot = useRef(null);
  const data = [history.map((sample) => sample.at), ...series.map((line) => history.map((sample) => line.of(sample) ?? null))];
  const known = useRef(form);
  known.current = form;

  useLayoutEffect(() => {
    const drawn = new window.uPlot(options(series, (value) => known.current(value), ceiling, setHovered), data, place.current);
    plot.current = drawn;
    const resized = new ResizeObserver(([{ contentRect }]) => drawn.setSize({ width: contentRect.width, height: HEIGHT }));
    resized.observe(place.current);
    const redraw = () => drawn.redraw(false);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", redraw);
    addEventListener("kapsl-theme", redraw);
    return () => {
      resized.disconnect();
      dark.removeEventListener("change", redraw);
      removeEventListener("kapsl-theme", redraw);
      drawn.destroy();
    };
  }, [series.map((line) => line.label).join()]);
  useEffect(() => {
    if (history.length) plot.current.setData(data);
  }, [history]);

  const shown = history[hovered ?? history.length - 1];
  const values = series.map((line) => ({ ...line, text: form(shown && line.of(shown)) }));
  const said = values.map(({ label, text }) => `${label} ${text}`).join(", ");
  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    <div class="legend" aria-hidden="true">
      ${values.map(
        (line) => html`<span key=${line.label}><i class=${line.dashed ? "dashed" : ""} style=${{ borderColor: `var(${line.color})` }}></i>${line.label} <b>${line.text}</b></span>`,
      )}
    </div>
    <div class="plot" ref=${place} role="img" aria-label=${`${title} over the last five minutes; now ${said}`}></div>
  </figure>`;
}

/** Bars with their labels and values: `rows` are `{label, value, text, best}`. It is a table to those who do not see. */
export function Bars({ caption, heads, rows }) {
  const most = Math.max(...rows.map((row) => row.value), Number.MIN_VALUE);
  return html`<table class="bars">
    <caption class="unseen">${caption}</caption>
    <thead class="unseen"><tr>${heads.map((head) => html`<th scope="col">${head}</th>`)}</tr></thead>
    <tbody>
      ${rows.map(
        (row) => html`<tr key=${row.label} class=${row.best ? "best" : ""}>
          <th scope="row">${row.label}</th>
          <td><span class="bar" style=${{ width: `${Math.max(0, (row.value / most) * 100)}%` }}></span><span>${row.text}</span></td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}
