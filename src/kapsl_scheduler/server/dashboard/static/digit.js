// A pad to draw a digit on, and its pixels as in scikit-learn's digits: the drawing fills a square of 32 x 32 points, and
// each of 8 x 8 pixels counts those of its 4 x 4 points that are inked, 0 to 16. What is not here: what becomes of them.

import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";

export const SIZE = 8;
const CELL = 4;
const POINTS = SIZE * CELL;
const PEN = 2; // the pen's radius in points
const PAD = 224; // side of the pad in CSS pixels; strokes are kept in shares of it
const STEP = 1 / 16; // of the keyboard's pen

/** Pixels of strokes (each a list of [x, y], 0 to 1), null of none. */
export function rasterized(strokes) {
  const all = strokes.flat();
  if (!all.length) return null;
  const [left, right] = [Math.min(...all.map(([x]) => x)), Math.max(...all.map(([x]) => x))];
  const [top, bottom] = [Math.min(...all.map(([, y]) => y)), Math.max(...all.map(([, y]) => y))];
  const room = POINTS - 2 * PEN - 1;
  const scale = room / Math.max(right - left, bottom - top, 0.1);
  const placed = ([x, y]) => [(x - (left + right) / 2) * scale + POINTS / 2, (y - (top + bottom) / 2) * scale + POINTS / 2];
  const pixels = Array(SIZE * SIZE).fill(0);
  const lines = strokes.map((stroke) => stroke.map(placed)).flatMap((stroke) => stroke.map((point, number) => [stroke[Math.max(0, number - 1)], point]));
  for (let y = 0; y < POINTS; y++) {
    for (let x = 0; x < POINTS; x++) {
      if (lines.some(([from, to]) => distance(x + 0.5, y + 0.5, from, to) <= PEN)) {
        pixels[Math.floor(y / CELL) * SIZE + Math.floor(x / CELL)] += 1;
      }
    }
  }
  return pixels;
}

function distance(x, y, [ax, ay], [bx, by]) {
  const [dx, dy] = [bx - ax, by - ay];
  const along = dx || dy ? Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy))) : 0;
  return Math.hypot(x - ax - along * dx, y - ay - along * dy);
}

const MOVES = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };

/** Calls `onPixels` with 64 numbers, or null while the pad is empty. */
export function DigitPad({ onPixels }) {
  const [strokes, setStrokes] = useState([]);
  const [pen, setPen] = useState(null); // the keyboard's: {at, down}
  const drawing = useRef(false);
  const pixels = rasterized(strokes);
  useEffect(() => onPixels(pixels), [strokes]);

  const point = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  const longer = (to) => setStrokes((before) => [...before.slice(0, -1), [...before.at(-1), to]]);
  const begin = (to) => setStrokes((before) => [...before, [to]]);
  const down = (event) => {
    event.currentTarget.setPointerCapture(event.pointerId);
    drawing.current = true;
    begin(point(event));
  };
  const move = (event) => drawing.current && longer(point(event));
  const up = () => (drawing.current = false);
  const press = (event) => {
    const step = MOVES[event.key];
    const { at, down } = pen ?? { at: [0.5, 0.25], down: false };
    if (step) {
      const to = at.map((value, axis) => Math.max(0, Math.min(1, value + step[axis])));
      setPen({ at: to, down });
      if (down) longer(to);
    } else if (event.key === " ") {
      setPen({ at, down: !down });
      if (!down) begin(at);
    } else {
      return;
    }
    event.preventDefault();
  };
  const clear = () => {
    setStrokes([]);
    setPen(null);
  };
  const path = (stroke) => `M${(stroke.length > 1 ? stroke : [...stroke, stroke[0]]).map(([x, y]) => `${x * PAD},${y * PAD}`).join("L")}`;
  return html`<div class="pad">
    <svg viewBox=${`0 0 ${PAD} ${PAD}`} class="drawing" tabindex="0" role="application" aria-label="Drawing pad" aria-describedby="pad-keys"
      onPointerDown=${down} onPointerMove=${move} onPointerUp=${up} onPointerCancel=${up} onKeyDown=${press}>
      ${strokes.map((stroke, number) => html`<path key=${number} d=${path(stroke)} />`)}
      ${pen && html`<circle class=${pen.down ? "pen down" : "pen"} cx=${pen.at[0] * PAD} cy=${pen.at[1] * PAD} r="7" />`}
    </svg>
    <div class="pad-side">
      <svg viewBox="0 0 8 8" class="pixels" role="img" aria-label="What the model sees: 8 by 8 pixels" shape-rendering="crispEdges">
        ${pixels?.map((value, number) => value > 0 && html`<rect key=${number} x=${number % SIZE} y=${Math.floor(number / SIZE)} width="1" height="1" opacity=${value / 16} />`)}
      </svg>
      <button type="button" onClick=${clear} disabled=${!strokes.length}>Clear</button>
    </div>
    <p class="quiet" id="pad-keys">With keys: arrows move the pen, the space bar puts it down and lifts it.</p>
  </div>`;
}
