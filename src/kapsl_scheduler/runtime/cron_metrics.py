"""Figures of a CronScheduler: how late runs start, how long they take, how they end.

Counters and histograms only; one series for each of a bounded number of jobs. Their form on the wire is the server's.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from kapsl_scheduler.core.runs import Run
from kapsl_scheduler.runtime.metrics import Histogram

__all__ = ["OTHER_JOBS", "CronFigures", "CronStatistics"]

MAX_JOBS: Final = 200
"""Jobs that have a series of their own; the rest share one."""
OTHER_JOBS: Final = "(other jobs)"

Outcome = tuple[str, str]
"""How a run ended: the state, and the reason."""


class CronStatistics(msgspec.Struct, frozen=True):
    """A CronScheduler as of now. `outcomes` counts the runs that ended in this process by (state, reason),
    `outcomes_by_job` the same by job (a bounded number of them, the rest under `(other jobs)`). `overdue` counts
    jobs whose time has come and whose firing has not been decided, `waiting` runs that wait for one of the places of
    `max_concurrent_runs`. `store_failing` says why the store cannot be written to, None if it can."""

    jobs: int
    running: int
    waiting: int
    overdue: int
    fired: int
    outcomes: dict[Outcome, int]
    outcomes_by_job: dict[str, dict[Outcome, int]]
    lateness_p50: float | None
    lateness_p99: float | None
    duration_p50: float | None
    duration_p99: float | None
    store_failing: str | None


class CronFigures:
    """Kept by the loop of the scheduler; anybody may read. `lateness` and `duration` are in seconds: from when a run
    was due to its start, and from its start to its end."""

    def __init__(self) -> None:
        self.fired = 0
        self.lateness = Histogram()
        self.duration = Histogram()
        self.by_job: dict[str, Counter[Outcome]] = {}

    def started(self, run: Run, now: int) -> None:
        """A run was dispatched, at a moment in microseconds since 1970."""
        self.fired += 1
        self.lateness.add((now - run.due) / 1e6)

    def ended(self, run: Run) -> None:
        """A run (or a range of them) came to its end."""
        if run.started is not None and run.ended is not None:
            self.duration.add((run.ended - run.started) / 1e6)
        name = run.job
        counter = self.by_job.get(name)
        if counter is None:
            if len(self.by_job) >= MAX_JOBS:
                name = OTHER_JOBS
            counter = self.by_job.setdefault(name, Counter())
        counter[run.state.field, run.reason] += run.count

    def outcomes(self) -> dict[Outcome, int]:
        total: Counter[Outcome] = Counter()
        for counter in self.by_job.values():
            total.update(counter)
        return dict(total)
