"""What `core.firing.plan` must decide, found out one occurrence at a time: slow, and as CRON.md says it.

Nothing here is shared with the planner but the schedule's `next_us`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kapsl_scheduler import Coalesce, CronJob, Overlap, RunState
from kapsl_scheduler.core.jobs import micros

__all__ = ["Decided", "NaiveJob"]

SECOND = 1_000_000


@dataclass(frozen=True)
class Decided:
    """What becomes of `count` occurrences from `first` to `last`."""

    first: int
    last: int
    count: int
    state: RunState
    reason: str


@dataclass
class NaiveJob:
    """A job that is looked at now and then."""

    job: CronJob
    schedule: Any
    delay: int
    cursor: int
    running: int = 0
    waiting: int = 0
    scheduled: int = 0
    paused: bool = False
    cancelled: bool = field(default=False, init=False)

    def occurrences(self, after: int) -> Iterator[int]:
        """Within start and end, outside the exclusions."""
        policy = self.job.firing
        low = None if policy.start is None else micros(policy.start)
        high = None if policy.end is None else micros(policy.end)
        gaps = [(micros(gap.start), micros(gap.end)) for gap in policy.exclude]
        moment = after if low is None else max(after, low - 1)
        while (moment := self.schedule.next_us(moment)) is not None:
            if high is not None and moment >= high:
                return
            if not any(start <= moment < end for start, end in gaps):
                yield moment

    def due(self, nominal: int) -> int:
        """Later by the job's part of the spread, but before the next occurrence."""
        following = next(self.occurrences(nominal), None)
        return nominal + (self.delay if following is None else min(self.delay, following - nominal - 1))

    def next(self) -> int | None:
        """What is to be decided next, if anything."""
        if self.paused or self.room() == 0:
            return None
        return next(self.occurrences(self.cursor), None)

    def room(self) -> int | None:
        most = self.job.firing.max_runs
        return None if most is None else most - self.scheduled

    def decide(self, now: int) -> list[Decided]:
        """Everything that is due by now and undecided."""
        self.cancelled = False
        if self.paused or self.room() == 0:
            return []
        due: list[tuple[int, int]] = []
        for nominal in self.occurrences(self.cursor):
            if (start := self.due(nominal)) > now:
                break
            due.append((nominal, start))
        if not due:
            return []
        policy = self.job.firing
        grace = 1.0 if policy.coalesce is Coalesce.SKIP else policy.misfire_grace
        in_time = [n for n, start in due if grace is None or start >= now - round(grace * SECOND)]
        chosen = {
            Coalesce.LATEST: in_time[-1:],
            Coalesce.SKIP: in_time[-1:],
            Coalesce.EARLIEST: in_time[:1],
            Coalesce.ALL: in_time[-100:],
        }[policy.coalesce]
        found: list[Decided] = []
        for nominal, _ in due:
            self.cursor = nominal
            if nominal in chosen:
                state = self._meet()
                found.append(Decided(nominal, nominal, 1, state, "overlap" if state is RunState.SKIPPED else ""))
                if self.room() == 0:
                    break
                continue
            late = nominal not in in_time or policy.coalesce is Coalesce.SKIP
            self._miss(found, nominal, "late" if late else "coalesced")
        return found

    def _miss(self, found: list[Decided], nominal: int, reason: str) -> None:
        before = found[-1] if found else None
        if before is not None and before.state is RunState.MISSED and before.reason == reason:
            found[-1] = Decided(before.first, nominal, before.count + 1, RunState.MISSED, reason)
        else:
            found.append(Decided(nominal, nominal, 1, RunState.MISSED, reason))

    def _meet(self) -> RunState:
        policy = self.job.firing
        state = RunState.SKIPPED
        if policy.overlap is Overlap.CANCEL_OTHER:
            self.cancelled = self.running + self.waiting > 0
            state = RunState.RUNNING
        elif not self.waiting and self.running < (policy.max_running or 1):
            state = RunState.RUNNING
        else:
            kept = {Overlap.BUFFER_ONE: 1, Overlap.BUFFER_ALL: policy.max_buffered or 100}.get(policy.overlap, 0)
            if self.waiting < kept:
                state = RunState.PENDING
        self.running += state is RunState.RUNNING
        self.waiting += state is RunState.PENDING
        self.scheduled += state.open
        return state
