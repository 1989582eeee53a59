"""How the commands print jobs, runs and times: tables for people. Imported when there is something to print.

What is not here: the commands (`cli_jobs`), JSON.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from zoneinfo import ZoneInfo

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "jobs_table",
    "new_console",
    "new_table",
    "outlook",
    "show_job",
    "show_jobs",
    "show_runs",
    "show_times",
    "span",
]

_WIDE: Final = 240  # columns where nobody looks: what reads the output wants each row on a line of its own
_COLOURS: Final = {
    "succeeded": "green",
    "failed": "red",
    "interrupted": "red",
    "running": "cyan",
    "missed": "yellow",
    "skipped": "yellow",
    "cancelled": "yellow",
}
_COUNTS: Final = ("succeeded", "failed", "skipped", "missed", "cancelled", "interrupted", "pending")


def span(seconds: float) -> str:
    """A length of time in one unit: "12 s", "3 min", "5 h", "2 d"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min"), (36 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}" if unit == 1 and seconds < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def outlook(job: Mapping[str, Any]) -> str:
    """When a job fires next, or why it does not."""
    if job["waiting_for"] is not None:
        return f"waits: {job['waiting_for']}"
    if job["paused"]:
        return f"paused: {job['paused']}"
    return "never again" if job["next_firing"] is None else _away(_moment(job["next_firing"]))


def show_jobs(jobs: Sequence[Mapping[str, Any]]) -> None:
    console = new_console()
    if not jobs:
        console.print("There are no jobs.")
        return
    console.print(jobs_table(jobs))


def jobs_table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table("id", "schedule", "next", "last", ">fired", ">failed", ">missed", ">running")
    for job in jobs:
        last = _state(job["last_outcome"], job["last_reason"])
        if job["last_firing"] is not None:
            last.append(f" {_away(_moment(job['last_firing']))}")
        table.add_row(
            Text(job["id"]),
            Text(_schedule(job)),
            Text(outlook(job)),
            last,
            *(str(job[key]) for key in ("fired_count", "failed", "missed_count", "running")),
        )
    return table


def show_job(job: Mapping[str, Any], times: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> None:
    console = new_console()
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "id": job["id"],
        "schedule": job["description"] if job["schedule"] == job["description"] else _described(job),
        "model": job["model"] or "-",
        "package": job["package"] or "-",
        "class": job["priority"].replace("_", "-"),
        "when full": "waits for room" if job["overflow_policy"] == "block" else "is skipped",
        "next": outlook(job),
        "due": ", ".join([f"{job['due']} in all", *(f"{job[key]} {key}" for key in _COUNTS if job[key])]),
        "last took": "-" if job["last_duration"] is None else span(job["last_duration"]),
    }
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(str(value)))
    console.print(table)
    for key, value in job["definition"].items():
        if key in ("firing", "run"):
            console.print(Text(f"{key}: {json.dumps(value)}"))
    if times:
        console.print()
        show_times([_moment(time) for time in times], job["tz"])
    if runs:
        console.print()
        show_runs(runs)


def show_times(times: Iterable[dt.datetime], tz: str, after: dt.datetime | None = None) -> None:
    """Times in a zone, in UTC, and how far away they are: from now, or from another moment."""
    rows = list(times)
    if not rows:
        new_console().print("It never fires.")
        return
    headings = ["UTC", "away"] if tz == "UTC" else [tz, "UTC", "away"]
    table = new_table(*headings)
    for time in rows:
        utc = _written(time.astimezone(dt.UTC))
        local = [] if tz == "UTC" else [_written(_in_zone(time, tz))]
        table.add_row(*local, utc, _away(time, after))
    new_console().print(table)


def show_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    console = new_console()
    if not runs:
        console.print("There are no runs.")
        return
    table = new_table(">run", "job", "for", "origin", "outcome", ">late", ">took", ">requests", ">rows", "error")
    for run in runs:
        started = None if run["started"] is None else _moment(run["started"])
        late = None if started is None else max(0.0, (started - _moment(run["due"])).total_seconds())
        outcome = _state(run["state"], run["reason"])
        if run["count"] > 1:
            outcome.append(f" x{run['count']}")
        if run["attempt"] > 1:
            outcome.append(f" at attempt {run['attempt']}")
        table.add_row(
            str(run["number"]),
            Text(run["job"]),
            f"{_moment(run['nominal']):%Y-%m-%d %H:%M:%S}Z {_away(_moment(run['nominal']))}",
            Text(run["origin"]),
            outcome,
            "-" if late is None else span(late),
            "-" if run["duration"] is None else span(run["duration"]),
            str(run["requests"]),
            str(run["rows"]),
            Text(run["error"] or run["callback_error"]),
        )
    console.print(table)


# ------------------------------------------------------------------------------------------------- pieces


def new_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_WIDE, highlight=False)


def new_table(*headings: str) -> Table:
    """Columns by their headings, right-aligned where one begins with `>`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    return table


def _state(state: str | None, reason: str) -> Text:
    if state is None:
        return Text("-")
    return Text(f"{state} ({reason})" if reason else state, _COLOURS.get(state, ""))


def _described(job: Mapping[str, Any]) -> str:
    return f"{job['schedule']}  {job['description']}"


def _schedule(job: Mapping[str, Any]) -> str:
    return str(job["schedule"]) if job["tz"] == "UTC" else f"{job['schedule']} ({job['tz']})"


def _moment(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


def _in_zone(time: dt.datetime, tz: str) -> dt.datetime:
    """On the zone's clock. A time that shows it already, as those of fixed offsets do, stays as it is."""
    return time.astimezone(ZoneInfo(tz)) if time.tzinfo is dt.UTC and not tz.startswith("UTC") else time


def _written(time: dt.datetime) -> str:
    return f"{time:%a} {time.isoformat(sep=' ', timespec='milliseconds' if time.microsecond else 'seconds')}"


def _away(time: dt.datetime, now: dt.datetime | None = None) -> str:
    seconds = (time - (now or dt.datetime.now(dt.UTC))).total_seconds()
    return f"in {span(seconds)}" if seconds > 0 else f"{span(-seconds)} ago"
