"""A store in a dictionary and a list, with no care for speed: what every adapter must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from kapsl_scheduler.core.runs import Change, JobRecord, Removal, Run, RunState
from kapsl_scheduler.ports import Committed, Exists, Result, RunQuery, Stale


class NaiveStore:
    """Versions and numbers are the adapter's own: the model checks that they rise, and takes them over."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobRecord] = {}
        self.memories: dict[str, dict[str, str]] = {}
        self.runs: list[Run] = []  # by number
        self.beats: dict[str, int] = {}
        self.version = 0
        self.number = 0

    def check(self, change: Change, result: Result) -> None:
        """Assert that this is the right answer, and do the same."""
        obstacle = self.obstacle(change)
        if obstacle is not None:
            assert result == obstacle
            return
        assert isinstance(result, Committed)
        self.write(change, result)

    def obstacle(self, change: Change) -> Stale | Exists | None:
        record = self.jobs.get(change.job)
        if change.expected is not None and change.expected != (record.version if record else 0):
            return Stale(record)
        new: list[Run] = []
        for run in change.created:
            for other in self.runs:
                if other.key == run.key:
                    return Exists(other)
        for run in change.created:
            if run.key in [other.key for other in new]:
                return Exists(run)
            new.append(run)
        named: list[tuple[str, int, str]] = []
        for run in change.updated:
            before = self.find(run)
            owner = run.owner if change.taken_from is None else change.taken_from
            if before is None or not before.state.open or before.owner != owner or run.key in named:
                return Stale(record)
            named.append(run.key)
        return None

    def write(self, change: Change, result: Committed) -> None:
        record = self.jobs.get(change.job)
        if change.remove is not None:
            self.jobs.pop(change.job, None)
            self.memories.pop(change.job, None)
        elif change.state is not None or change.definition is not None:
            assert result.version > self.version
            self.version = result.version
            definition = change.definition if change.definition is not None else record and record.definition
            state = change.state or (record and record.state)
            assert definition is not None
            assert state is not None
            self.jobs[change.job] = JobRecord(change.job, definition, state, result.version)
        if change.remove is not None or (change.state is None and change.definition is None):
            assert result.version == 0
        if change.job in self.jobs:
            memory = {**self.memories.get(change.job, {}), **change.memory}
            self.memories[change.job] = {key: value for key, value in memory.items() if value is not None}
        for run in change.updated:
            before = self.find(run)
            assert before is not None
            self.runs[self.runs.index(before)] = msgspec.structs.replace(
                run, number=before.number, detached=before.detached or run.detached
            )
        assert len(result.numbers) == len(change.created)
        for run, number in zip(change.created, result.numbers, strict=True):
            assert number > self.number
            self.number = number
            self.runs.append(msgspec.structs.replace(run, number=number))
        assert result.ended == tuple(self.leave(change.job, change.remove) if change.remove is not None else ())

    def leave(self, job: str, removal: Removal) -> Iterator[Run]:
        """See to the open runs of a job that is gone. Yields those that end."""
        for index, run in enumerate(self.runs):
            if run.job != job or not run.state.open or run.detached:
                continue
            if removal.cancel or run.state is RunState.PENDING:
                run = msgspec.structs.replace(run, state=RunState.CANCELLED, reason=removal.reason, ended=removal.ended)
                yield run
            self.runs[index] = run if not run.state.open else msgspec.structs.replace(run, detached=True)

    def find(self, run: Run) -> Run | None:
        return next((other for other in self.runs if other.key == run.key), None)

    def select(self, query: RunQuery) -> list[Run]:
        found = [
            run
            for run in self.runs
            if (query.job is None or run.job == query.job)
            and (not query.states or run.state in query.states)
            and (query.origin is None or run.origin == query.origin)
            and (query.owner is None or run.owner == query.owner)
            and (query.before is None or run.number < query.before)
            and (query.after is None or run.number > query.after)
            and not (query.outside_backfills and run.limit != 0)
        ]
        return (found if query.oldest_first else found[::-1])[: query.limit]

    def prune(self, keep: int, before: int) -> int:
        kept: list[Run] = []
        seen: dict[str, int] = {}
        for run in reversed(self.runs):
            if not run.state.open:
                seen[run.job] = seen.get(run.job, 0) + 1
                end = run.ended if run.ended is not None else run.due
                if seen[run.job] > keep or end < before:
                    continue
            kept.insert(0, run)
        deleted = len(self.runs) - len(kept)
        self.runs = kept
        return deleted
