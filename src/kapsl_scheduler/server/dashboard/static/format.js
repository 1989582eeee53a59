// Numbers, times and durations as people read them. What is not here: elements.

const NONE = "–";
const PLAIN = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { weekday: "short", day: "numeric", month: "short", year: "numeric" });

const missing = (value) => value === null || value === undefined || Number.isNaN(value);

export const count = (value) => (missing(value) ? NONE : PLAIN.format(value));

export const short = (value) => {
  if (missing(value)) return NONE;
  return value < 10 && value % 1 ? value.toFixed(1) : SHORT.format(value).replace("K", "k");
};

export const percent = (share) => (missing(share) ? NONE : `${(share * 100).toFixed(share < 0.1 && share > 0 ? 1 : 0)} %`);

export const bytes = (value) => {
  if (missing(value)) return NONE;
  const power = value < 1 ? 0 : Math.min(4, Math.floor(Math.log10(value) / 3));
  return `${power ? (value / 1000 ** power).toPrecision(3) : value} ${["B", "kB", "MB", "GB", "TB"][power]}`;
};

/** Seconds as "0.24 ms", "1.3 s", "2 min 5 s", "3 h 20 min", "2 d 4 h". */
export function duration(seconds) {
  if (missing(seconds)) return NONE;
  if (seconds === 0) return "0 s";
  if (seconds < 0.9995e-3) return `${digits(seconds * 1e6)} µs`;
  if (seconds < 0.9995) return `${digits(seconds * 1e3)} ms`;
  if (seconds < 59.5) return `${digits(seconds)} s`;
  const units = [["d", 86_400], ["h", 3_600], ["min", 60], ["s", 1]];
  const whole = Math.round(seconds);
  const first = units.findIndex(([, size]) => whole >= size);
  const [name, size] = units[first];
  const [next, part] = units[first + 1] ?? ["", 1];
  const rest = Math.floor((whole % size) / part);
  return `${Math.floor(whole / size)} ${name}${rest && next ? ` ${rest} ${next}` : ""}`;
}

const digits = (value) => (value < 9.995 ? Number(value.toPrecision(2)).toString() : PLAIN.format(value));

/** "in 12 s", "3 min ago", of a moment and now in seconds since 1970. */
export function relative(moment, now) {
  const away = moment - now;
  if (Math.abs(away) < 0.5) return "now";
  const rounded = Math.abs(away) < 60 ? Math.round(Math.abs(away)) : Math.abs(away);
  return away > 0 ? `in ${duration(rounded)}` : `${duration(rounded)} ago`;
}

/** Seconds since 1970, to the microsecond: `Date` knows but milliseconds. */
export function seconds(iso) {
  if (!iso) return null;
  const fraction = /\.(\d+)/.exec(iso);
  return Math.floor(Date.parse(iso) / 1e3) + (fraction ? Number(`0.${fraction[1]}`) : 0);
}

/** A moment on this browser's clock; without its day where that is today's. */
export function clock(iso) {
  if (!iso) return NONE;
  const date = new Date(iso);
  const day = DAY.format(date);
  return day === DAY.format(new Date()) ? CLOCK.format(date) : `${day}, ${CLOCK.format(date)}`;
}

/** The name of a class of requests. */
export const CLASSES = { latency_critical: "live", throughput: "throughput", background: "background" };
