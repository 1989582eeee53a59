// What the server is doing now, kept current: one stream for the whole page, which comes back by itself when the server
// does, and rests while nobody looks. What is not here: how it is shown.

import { follow } from "./api.js";
import { useEffect, useState } from "./vendor/preact-htm.js";

const KEPT = 300; // samples, one a second
const KEPT_EVENTS = 500;
const SILENCE = 6_000; // ms without a word after which the stream counts as lost
const PAUSES = [500, 1_000, 2_000, 4_000]; // ms before the next attempt

class Live {
  state = "connecting"; // or "live", "lost"
  error = "";
  retryAt = 0; // of Date.now()
  version = "";
  outdated = false; // the server has other pages than this one
  epoch = 0; // rises with every connection: what was fetched before it may be old
  history = [];
  events = []; // the newest first
  lostEvents = 0;
  #offset = 0; // seconds by which the server's clock is ahead of ours
  #watchers = new Set();
  #listeners = new Set();
  #wake = () => {};
  #stop = null;

  get latest() {
    return this.history.at(-1);
  }

  /** Seconds since 1970 by the server's clock. */
  now() {
    return Date.now() / 1e3 + this.#offset;
  }

  watch(watcher) {
    this.#watchers.add(watcher);
    return () => this.#watchers.delete(watcher);
  }

  /** Calls with the events of jobs of each second that has any. */
  onEvents(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  retryNow() {
    this.#wake();
  }

  async run() {
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#stop?.abort() : this.#wake()));
    for (let failures = 0; ; failures++) {
      while (document.hidden) await this.#sleep(60_000);
      try {
        await this.#connect(() => (failures = 0));
        this.error = "The server has ended the connection.";
      } catch (error) {
        this.error = error.message;
      }
      if (document.hidden) continue; // we have let go of it
      const pause = PAUSES[Math.min(failures, PAUSES.length - 1)];
      this.state = "lost";
      this.retryAt = Date.now() + pause;
      this.#changed();
      await this.#sleep(pause);
    }
  }

  async #connect(connected) {
    const stop = (this.#stop = new AbortController());
    let timer = 0;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => stop.abort(new Error("The server has fallen silent.")), SILENCE);
    };
    try {
      // Until it answers no clock runs: it may be a user who is being asked for a token.
      await follow("/dashboard/live", stop.signal, (kind, data) => {
        heard();
        if (kind === "hello") {
          connected();
          this.#greeted(data);
        } else if (kind === "second") {
          this.#passed(data);
        }
        this.#changed();
      });
    } catch (error) {
      throw stop.signal.aborted && stop.signal.reason instanceof Error ? stop.signal.reason : error;
    } finally {
      clearTimeout(timer);
    }
  }

  #greeted({ version, pages, history }) {
    this.state = "live";
    this.version = version;
    this.outdated = pages !== document.body.dataset.pages;
    this.epoch += 1;
    this.history = history;
    this.#offset = this.latest.at - Date.now() / 1e3;
  }

  #passed({ sample, events, lost }) {
    this.history = [...this.history.slice(1 - KEPT), sample];
    if (!events.length) return;
    this.lostEvents += lost;
    this.events = [...events.toReversed(), ...this.events].slice(0, KEPT_EVENTS);
    for (const listener of this.#listeners) listener(events);
  }

  #changed() {
    for (const watcher of this.#watchers) watcher();
  }

  #sleep(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

export const live = new Live();

/** The state of the stream; whoever uses it is drawn anew with every second. */
export function useLive() {
  const [, draw] = useState(0);
  useEffect(() => live.watch(() => draw((count) => count + 1)), []);
  return live;
}
