"""What a CronScheduler writes of jobs: one is defined, paused, resumed, removed; each as an `Intent` of its ledger.

What is not here: what is written of runs, and what all intents need of their scheduler (`runtime.cron_intents`), the
order of things and the store (`runtime.cron_ledger`), when a job may be defined at all (`runtime.cron_catalogue`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from kapsl_scheduler.core.firing import Timetable, missed_since
from kapsl_scheduler.core.jobs import CronJob
from kapsl_scheduler.core.runs import Change, JobState, Removal, Run
from kapsl_scheduler.errors import InvalidJob, NotFound
from kapsl_scheduler.ports import Committed
from kapsl_scheduler.runtime.cron_intents import IntentHost, behind, found
from kapsl_scheduler.runtime.cron_ledger import Entry, Intent

__all__ = ["Define", "Pause", "Remove", "Resume"]

_NOT_ENABLED: Final = "not enabled"

replace = msgspec.structs.replace


class Define(Intent):
    """A job as its owner wants it: new (unless it must be `known`), or in place of what is known under its id, with its
    counters and its phase. Once it is written, `learn` is called: what it was registered with replaces nothing of a job
    that stays."""

    __slots__ = ("_host", "_job", "_known", "_learn", "_met", "_missed", "_refuse", "_told", "definition")

    def __init__(
        self,
        host: IntentHost,
        job: CronJob,
        definition: bytes,
        learn: Callable[[], None],
        *,
        refuse: bool = False,
        known: bool = False,
    ) -> None:
        super().__init__(job.id)
        self._learn = learn
        self._known = known
        self._host = host
        self._job = job
        self.definition = definition
        self._refuse = refuse
        self._told = ""
        self._met = 0
        self._missed: tuple[Run, ...] = ()

    def meets(self, run: Run) -> bool:
        """What it passes over is in the history, from an earlier life of the job: it goes on behind that."""
        self._met = run.nominal
        return True

    def decide(self, entry: Entry | None) -> Change | None:
        now = self._host.wall()
        self._missed = ()
        if entry is None:
            if self._known:
                raise NotFound(f"no job {self.job!r}")
            self._told = "registered"
            self._check_fires(now, now)
            state = JobState(anchor=now, cursor=now, paused="" if self._job.enabled else _NOT_ENABLED)
            return Change(job=self.job, expected=0, state=state, definition=self.definition)
        self._told = ""
        if entry.definition == self.definition:
            # As it seems: the store knows.
            return Change(job=self.job, expected=entry.version, state=entry.state)
        if self._refuse:
            raise InvalidJob(["id: the store has another job of this id, and on_conflict is 'error'"], self.job)
        self._told = "updated"
        before, timetable, state = entry.job, entry.timetable, behind(entry.state, self._met)
        if before is None or timetable is None:
            self._check_fires(state.anchor, now)
            state = replace(state, cursor=max(state.cursor, now))
        elif before.schedule != self._job.schedule or before.firing != self._job.firing:
            # What the old schedule asked for is accounted for; the new one begins now.
            self._check_fires(state.anchor, now)
            state, self._missed = missed_since(before, timetable, state, now, "updated")
            state = replace(state, cursor=max(state.cursor, now))
        if before is not None and before.enabled != self._job.enabled:
            if not self._job.enabled:
                state = replace(state, paused=state.paused or _NOT_ENABLED)
            elif state.paused == _NOT_ENABLED:
                assert timetable is not None
                state, missed = missed_since(before, timetable, state, now, "paused")
                self._missed += missed
                state = replace(state, paused="")
        return Change(
            job=self.job,
            expected=entry.version,
            state=state,
            definition=self.definition,
            created=self._missed,
        )

    def _check_fires(self, anchor: int, now: int) -> None:
        if Timetable.of(self._job, anchor).next(now) is None:
            raise InvalidJob(["schedule: it never fires from now on"], self.job)

    def done(self, entry: Entry | None, written: Committed) -> None:
        assert entry is not None
        self._learn()
        entry.job, entry.timetable, entry.unbound = self._job, Timetable.of(self._job, entry.state.anchor), None
        self._host.reschedule(entry)
        self._host.room_for_waiting(entry)
        _note(self._host, self._missed, written.numbers)
        if self._told:
            self._host.told(self._told, self.job)


class Pause(Intent):
    """No occurrence is due until it is resumed."""

    __slots__ = ("_host", "_reason")

    def __init__(self, host: IntentHost, job: str, reason: str) -> None:
        super().__init__(job)
        self._host = host
        self._reason = reason

    def decide(self, entry: Entry | None) -> Change | None:
        entry = found(entry, self.job)
        # Written also where it seems to be so already: the store knows.
        state = replace(entry.state, paused=entry.state.paused or self._reason)
        return Change(job=self.job, expected=entry.version, state=state)

    def done(self, entry: Entry | None, written: Committed) -> None:
        assert entry is not None
        self._host.reschedule(entry)
        self._host.told("paused", self.job)


class Resume(Intent):
    """Occurrences are due again: from now on, or also those of the time between."""

    __slots__ = ("_catch_up", "_host", "_met", "_missed")

    def __init__(self, host: IntentHost, job: str, *, catch_up: bool) -> None:
        super().__init__(job)
        self._met = 0
        self._host = host
        self._catch_up = catch_up
        self._missed: tuple[Run, ...] = ()

    def meets(self, run: Run) -> bool:
        """As `Define.meets`."""
        self._met = run.nominal
        return True

    def decide(self, entry: Entry | None) -> Change | None:
        entry = found(entry, self.job)
        self._missed = ()
        if not entry.state.paused:  # as it seems: the store knows
            return Change(job=self.job, expected=entry.version, state=entry.state)
        state = replace(behind(entry.state, self._met), paused="", failures=0)
        if not self._catch_up and entry.job is not None and entry.timetable is not None:
            now = self._host.wall()
            state, self._missed = missed_since(entry.job, entry.timetable, state, now, "paused")
        return Change(job=self.job, expected=entry.version, state=state, created=self._missed)

    def done(self, entry: Entry | None, written: Committed) -> None:
        assert entry is not None
        self._host.reschedule(entry)
        _note(self._host, self._missed, written.numbers)
        self._host.told("resumed", self.job)


class Remove(Intent):
    """The job is no more. What waits is cancelled; what runs is too, or goes on without it."""

    __slots__ = ("_cancel", "_host")

    def __init__(self, host: IntentHost, job: str, *, cancel: bool) -> None:
        super().__init__(job)
        self._host = host
        self._cancel = cancel

    def decide(self, entry: Entry | None) -> Change | None:
        entry = found(entry, self.job)
        removal = Removal(ended=self._host.wall(), cancel=self._cancel)
        return Change(job=self.job, expected=entry.version, remove=removal)

    def done(self, entry: Entry | None, written: Committed) -> None:
        ended = {run.key for run in written.ended}
        for execution in self._host.executions(self.job):
            if execution.run.key in ended:
                execution.discard("unregistered")
            else:
                execution.run = replace(execution.run, detached=True)
        for run in written.ended:
            self._host.noted(run)
        self._host.told("unregistered", self.job)


def _note(host: IntentHost, missed: Sequence[Run], numbers: Sequence[int]) -> None:
    """Runs that came to be as missed."""
    for run, number in zip(missed, numbers, strict=True):
        host.noted(replace(run, number=number))
