"""Figures of a CronScheduler: how late runs start, how long they take, how they end, of each job and of all together.

Counters and histograms only, for a bounded number of jobs; what concerns all of them is their sum. Their form on the
wire is the server's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Final

import msgspec

from kapsl_scheduler.core.runs import Run
from kapsl_scheduler.runtime.metrics import Durations

__all__ = ["OTHER_JOBS", "CronFigures", "CronStatistics", "JobFigures"]

MAX_JOBS: Final = 200
"""Jobs that have figures of their own; the rest share theirs."""
OTHER_JOBS: Final = "(other jobs)"

Outcome = tuple[str, str]
"""How a run ended: the state, and the reason."""


class CronStatistics(msgspec.Struct, frozen=True):
    """A CronScheduler as of now, its counts those of this process, its times in seconds. `outcomes` counts the runs
    that ended by (state, reason). `lateness` is from when a run was due to its start, `duration` from there to its end.
    `overdue` counts jobs whose time has come and whose firing has not been decided, `waiting` runs that wait for one of
    the places of `max_concurrent_runs`. `store_failing` says why the store cannot be written to, None if it can.

    `..._by_job` has the same of each job, as far as there is any: of 200 jobs under their ids, of the rest together
    under `(other jobs)`, and there too what those have done that were unregistered. `overdue_by_job` says by how much
    (the longest of those that share a place).
    """

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
    fired_by_job: dict[str, int]
    overdue_by_job: dict[str, float]
    lateness_p99_by_job: dict[str, float]
    duration_p99_by_job: dict[str, float]


class JobFigures:
    """Of one job, or of several together. Each run that was dispatched is in `lateness`."""

    __slots__ = ("duration", "lateness", "outcomes")

    def __init__(self) -> None:
        self.lateness = Durations()
        self.duration = Durations()
        self.outcomes: Counter[Outcome] = Counter()

    @classmethod
    def sum_of(cls, several: Iterable[JobFigures]) -> JobFigures:
        """All of them in one."""
        total, several = cls(), list(several)
        total.lateness = Durations.sum_of(each.lateness for each in several)
        total.duration = Durations.sum_of(each.duration for each in several)
        for each in several:
            total.outcomes.update(each.outcomes)
        return total

    def copy(self) -> JobFigures:
        copy = JobFigures()
        copy.lateness, copy.duration, copy.outcomes = self.lateness.copy(), self.duration.copy(), self.outcomes.copy()
        return copy

    @property
    def fired(self) -> int:
        return self.lateness.count


class CronFigures:
    """Kept and read by the loop of the scheduler. `known` says whether there is a job of an id: what becomes of the
    runs of one that is gone is no reason to give it a place again.

    A job has a place of its own from its first run on, if there is one left. `others` is what the jobs without have
    done, and `gone` what those had done who gave their place back. The two are kept apart: `others` counts what
    happens, as it happens, and does not jump when a job goes.
    """

    def __init__(self, known: Callable[[str], bool]) -> None:
        self.of_job: dict[str, JobFigures] = {}
        self.others = JobFigures()
        self.gone = JobFigures()
        self._known = known

    def started(self, run: Run, now: int) -> None:
        """A run was dispatched, at a moment in microseconds since 1970."""
        figures = self.of_job.get(run.job) or self._place_of(run.job)
        figures.lateness.add(now - run.due)

    def ended(self, run: Run) -> None:
        """A run (or a range of them) came to its end."""
        figures = self.of_job.get(run.job) or self._place_of(run.job)
        if run.started is not None and run.ended is not None:
            figures.duration.add(run.ended - run.started)
        figures.outcomes[run.state.field, run.reason] += run.count

    def _place_of(self, job: str) -> JobFigures:
        """A new one, if there is room and it is for a job that is there."""
        if len(self.of_job) >= MAX_JOBS or job == OTHER_JOBS or not self._known(job):
            return self.others
        figures = self.of_job[job] = JobFigures()
        return figures

    def give_back(self, job: str) -> None:
        """There is no such job any more: its place is free, and nothing that it has done is lost."""
        if (figures := self.of_job.pop(job, None)) is not None:
            self.gone = JobFigures.sum_of((self.gone, figures))

    def copy(self) -> CronFigures:
        """As of now, for other threads to read."""
        copy = CronFigures(self._known)
        copy.of_job = {job: figures.copy() for job, figures in self.of_job.items()}
        copy.others, copy.gone = self.others.copy(), self.gone.copy()
        return copy

    def total(self) -> JobFigures:
        """What all jobs have done, also those that are gone. None of it ever falls."""
        return JobFigures.sum_of(chain(self.of_job.values(), (self.others, self.gone)))

    def by_job(self) -> dict[str, JobFigures]:
        """The same by job; what `others` and `gone` have done is in one place, if it is anything."""
        rest = JobFigures.sum_of((self.others, self.gone))
        return self.of_job | ({OTHER_JOBS: rest} if rest.fired or rest.outcomes else {})

    def statistics(
        self, *, jobs: int, running: int, waiting: int, overdue: Mapping[str, float], store_failing: str | None
    ) -> CronStatistics:
        """As of now, with what is not counted here; `overdue` says by how many seconds the jobs are that are."""
        total, by_job = self.total(), self.by_job()
        return CronStatistics(
            jobs=jobs,
            running=running,
            waiting=waiting,
            overdue=len(overdue),
            fired=total.fired,
            outcomes=dict(total.outcomes),
            outcomes_by_job={job: dict(each.outcomes) for job, each in by_job.items() if each.outcomes},
            lateness_p50=total.lateness.percentile(50),
            lateness_p99=total.lateness.percentile(99),
            duration_p50=total.duration.percentile(50),
            duration_p99=total.duration.percentile(99),
            store_failing=store_failing,
            fired_by_job={job: fired for job, each in by_job.items() if (fired := each.fired)},
            overdue_by_job=self.by_place(overdue),
            lateness_p99_by_job=_p99({job: each.lateness for job, each in by_job.items()}),
            duration_p99_by_job=_p99({job: each.duration for job, each in by_job.items()}),
        )

    def by_place(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Something of several jobs, by job: the most of it where they share a place. Those that have none yet are
        shown as if they had taken one, as long as there is room."""
        found: dict[str, float] = {}
        room = MAX_JOBS - len(self.of_job)
        for job, each in seconds.items():
            if job not in self.of_job:
                if room and job != OTHER_JOBS:
                    room -= 1
                else:
                    job = OTHER_JOBS
            found[job] = max(each, found.get(job, 0.0))
        return found


def _p99(durations: Mapping[str, Durations]) -> dict[str, float]:
    return {job: seconds for job, each in durations.items() if (seconds := each.percentile(99)) is not None}
