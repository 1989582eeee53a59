"""Jobs and runs in the memory of this process: nothing survives it, and nothing is ever waited for.

What is not here: what is due and what a run does to the books (`core.firing`, `core.runs`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import msgspec

from kapsl_scheduler.core.runs import Change, JobRecord, Removal, Run, RunState, repeated
from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import Committed, Exists, Result, RunQuery, Stale

__all__ = ["MemoryStore"]

_SLACK = 64
"""Numbers of deleted runs that a list may hold beyond as many as there are runs."""


class MemoryStore:
    """A store for tests and for jobs that the program registers anew each time it starts.

    All calls are made from one event loop and never suspend, so each is one step for everybody else. Records, states
    and runs are kept as they are given, not copied. Closing forgets nothing: opened again, it has what it had.
    """

    instant = True

    def __init__(self) -> None:
        self._opened = False
        self._jobs: dict[str, JobRecord] = {}
        self._memory: dict[str, dict[str, str]] = {}
        self._beats: dict[str, int] = {}
        self._version = 0
        self._number = 0
        self._runs: dict[int, Run] = {}
        self._by_key: dict[tuple[str, int, str], int] = {}
        self._numbers: dict[str, list[int]] = {}  # of the runs of each job that has any, rising
        self._open: dict[int, None] = {}  # numbers, rising
        self._all: list[int] = []  # numbers, rising; deleted ones linger, see `_SLACK`
        self._ends: list[tuple[int, int]] = []  # when an ended run ended and its number, rising; the same

    def __repr__(self) -> str:
        return f"MemoryStore(jobs={len(self._jobs)}, runs={len(self._runs)})"

    async def open(self) -> None:
        """Make the other calls possible."""
        self._opened = True

    async def close(self) -> None:
        """Refuse all other calls from now on."""
        self._opened = False

    # ------------------------------------------------------------------------------------------- changing

    async def commit(self, changes: Sequence[Change]) -> list[Result]:
        """As `JobStore.commit`. A few microseconds a change."""
        self._check_open()
        return list(map(self._commit, changes))

    def _commit(self, change: Change) -> Result:
        job, expected = change.job, change.expected
        record = self._jobs.get(job)
        if expected is not None and expected != (0 if record is None else record.version):
            return Stale(record)
        created, updated = change.created, change.updated
        if created and (obstacle := self._existing(created)) is not None:
            return Exists(obstacle)
        replaced = self._replaceable(updated, change.taken_from) if updated else ()
        if replaced is None:
            return Stale(record)
        # From here on nothing stands in its way: it is written whole.
        version = 0 if expected is None else self._replace_job(change, record)
        if change.memory and job in self._jobs:
            self._remember(change)
        if updated:
            for run, number in zip(updated, replaced, strict=True):
                self._update(run, number)
        numbers = tuple(map(self._create, created))
        if change.remove is not None:
            return Committed(version, numbers, self._leave(job, change.remove))
        return Committed(version, numbers)

    def _replaceable(self, runs: Sequence[Run], taken_from: str | None) -> Sequence[int] | None:
        """The numbers of the open runs that these may replace, all of them; None if one of them may not."""
        numbers: list[int] = []
        for run in runs:
            number = self._by_key.get((run.job, run.nominal, run.origin), 0)
            owner = run.owner if taken_from is None else taken_from
            if number not in self._open or self._runs[number].owner != owner:
                return None
            numbers.append(number)
        return numbers if len(runs) == 1 or repeated(runs) is None else None

    def _existing(self, created: Sequence[Run]) -> Run | None:
        for run in created:
            if (run.job, run.nominal, run.origin) in self._by_key:
                return self._runs[self._by_key[run.key]]
        return repeated(created) if len(created) > 1 else None

    def _replace_job(self, change: Change, record: JobRecord | None) -> int:
        job, state, definition = change.job, change.state, change.definition
        if change.remove is not None:
            self._jobs.pop(job, None)
            self._memory.pop(job, None)
            return 0
        if state is None and definition is None:
            return 0
        if record is not None:  # whose parts are shared where they stay
            job = record.id
            state = state or record.state
            definition = record.definition if definition is None else definition
        assert state is not None
        assert definition is not None
        version = self._version = self._version + 1
        self._jobs[job] = JobRecord(job, definition, state, version)
        return version

    def _leave(self, job: str, removal: Removal) -> tuple[Run, ...]:
        """The job is gone: see to its open runs. Returns those that have ended so."""
        ended: list[Run] = []
        for number in self._numbers.get(job, ()):
            run = self._runs[number]
            if number not in self._open or run.detached:
                continue
            if run.state is RunState.RUNNING and not removal.cancel:
                self._runs[number] = msgspec.structs.replace(run, detached=True)
            else:
                run = msgspec.structs.replace(run, state=RunState.CANCELLED, reason=removal.reason, ended=removal.ended)
                self._update(run, number)
                ended.append(run)
        return tuple(ended)

    def _remember(self, change: Change) -> None:
        memory = self._memory.setdefault(change.job, {})
        for key, value in change.memory.items():
            if value is None:
                memory.pop(key, None)
            else:
                memory[key] = value
        if not memory:
            del self._memory[change.job]

    def _create(self, run: Run) -> int:
        number = self._number = self._number + 1
        job = run.job
        self._runs[number] = run = msgspec.structs.replace(run, number=number)
        self._by_key[job, run.nominal, run.origin] = number
        numbers = self._numbers.get(job)
        if numbers is None:
            self._numbers[job] = [number]
        else:
            numbers.append(number)
        self._all.append(number)
        if run.state.open:
            self._open[number] = None
        else:
            self._note_end(run, number)
        return number

    def _update(self, run: Run, number: int) -> None:
        detached = run.detached or self._runs[number].detached
        if run.number != number or run.detached is not detached:
            run = msgspec.structs.replace(run, number=number, detached=detached)
        self._runs[number] = run
        if not run.state.open:
            del self._open[number]
            self._note_end(run, number)

    def _note_end(self, run: Run, number: int) -> None:
        end = (run.due if run.ended is None else run.ended, number)
        if not self._ends or end >= self._ends[-1]:
            self._ends.append(end)
        else:
            insort(self._ends, end)  # a clock that went back, or an end that was recorded late

    # -------------------------------------------------------------------------------------------- reading

    async def jobs(self, ids: Sequence[str] | None = None) -> list[JobRecord]:
        """As `JobStore.jobs`."""
        self._check_open()
        wanted = self._jobs if ids is None else {id for id in ids if id in self._jobs}
        return [self._jobs[id] for id in sorted(wanted)]

    async def versions(self) -> dict[str, int]:
        """As `JobStore.versions`."""
        self._check_open()
        return {id: record.version for id, record in self._jobs.items()}

    async def runs(self, query: RunQuery) -> list[Run]:
        """As `JobStore.runs`. A page of all runs, of a job's or of the open ones takes as long as the page; the other
        conditions are looked at run by run."""
        self._check_open()
        numbers = self._candidates(query)
        low = 0 if query.after is None else bisect_right(numbers, query.after)
        high = len(numbers) if query.before is None else bisect_left(numbers, query.before)
        found: list[Run] = []
        for index in range(low, high) if query.oldest_first else range(high - 1, low - 1, -1):
            if len(found) >= query.limit:
                break
            run = self._runs.get(numbers[index])
            if run is not None and _matches(run, query):
                found.append(run)
        return found

    def _candidates(self, query: RunQuery) -> Sequence[int]:
        """Numbers, rising, among which are those of all runs that are asked for."""
        if query.states and all(state.open for state in query.states):
            return list(self._open)
        if query.job is None:
            return self._all
        return self._numbers.get(query.job, ())

    async def run(self, job: str, nominal: int, origin: str) -> Run | None:
        """As `JobStore.run`."""
        self._check_open()
        number = self._by_key.get((job, nominal, origin))
        return None if number is None else self._runs[number]

    async def numbered(self, number: int) -> Run | None:
        """As `JobStore.numbered`."""
        self._check_open()
        return self._runs.get(number)

    async def memory(self, job: str) -> dict[str, str]:
        """As `JobStore.memory`: a copy."""
        self._check_open()
        return dict(self._memory.get(job, ()))

    # --------------------------------------------------------------------------------------------- owners

    async def beat(self, owner: str) -> None:
        """As `JobStore.beat`."""
        self._check_open()
        self._beats[owner] = self._beats.get(owner, 0) + 1

    async def beats(self) -> dict[str, int]:
        """As `JobStore.beats`: a copy."""
        self._check_open()
        return dict(self._beats)

    async def forget(self, owner: str) -> None:
        """As `JobStore.forget`."""
        self._check_open()
        self._beats.pop(owner, None)

    # -------------------------------------------------------------------------------------- housekeeping

    async def prune(self, *, keep: int, before: int) -> int:
        """As `JobStore.prune`: a look at each job and each open run, and time for each run that goes."""
        self._check_open()
        doomed: set[int] = set()
        opened = Counter(self._runs[number].job for number in self._open)
        for job, numbers in self._numbers.items():
            excess = len(numbers) - opened.get(job, 0) - keep
            if excess > 0:
                doomed.update(islice((n for n in numbers if n not in self._open), excess))
        old = bisect_left(self._ends, (before, 0))
        doomed.update(number for _, number in self._ends[:old] if number in self._runs)
        del self._ends[:old]
        self._delete(doomed)
        return len(doomed)

    def _delete(self, doomed: set[int]) -> None:
        newest: dict[str, int] = {}  # of the runs that go, by job
        for number in doomed:
            run = self._runs.pop(number)
            del self._by_key[run.key]
            newest[run.job] = max(number, newest.get(run.job, 0))
        for job, number in newest.items():
            numbers = self._numbers[job]
            end = bisect_right(numbers, number)
            numbers[:end] = [n for n in numbers[:end] if n in self._runs]
            if not numbers:
                del self._numbers[job]
        # Taking each out of the long lists at once would take as long as the lists are.
        if len(self._all) > 2 * len(self._runs) + _SLACK:
            self._all = list(self._runs)
        if len(self._ends) > 2 * len(self._runs) + _SLACK:
            self._ends = [end for end in self._ends if end[1] in self._runs]

    async def compact(self) -> None:
        """Nothing to do: memory that is not used any more is free already."""
        self._check_open()

    def _check_open(self) -> None:
        if not self._opened:
            raise StoreError("the memory store is closed")


def _matches(run: Run, query: RunQuery) -> bool:
    return (
        (query.job is None or run.job == query.job)
        and (not query.states or run.state in query.states)
        and (query.origin is None or run.origin == query.origin)
        and (query.owner is None or run.owner == query.owner)
        and not (query.outside_backfills and run.limit)
    )
