"""Random histories of a store and of its model: whatever they say must agree. Which stores there are: `test_stores`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kapsl_scheduler.core.runs import SCHEDULE, Change, JobState, Removal, Run, RunState
from kapsl_scheduler.ports import JobStore, RunQuery
from tests.contract.naive_store import NaiveStore

JOBS = ("a", "b", "ä")
OWNERS = ("", "p1", "p2")
ORIGINS = (SCHEDULE, "t1")
few = st.integers(0, 4)
jobs = st.sampled_from(JOBS)
definitions = st.none() | st.binary(max_size=3)
states = st.builds(JobState, anchor=few, cursor=few, due=few, paused=st.sampled_from(["", "by hand"]))
memories = st.dictionaries(st.sampled_from(["x", "y"]), st.none() | st.text(max_size=3), max_size=2)
removals = st.none() | st.none() | st.builds(Removal, ended=few, reason=st.text(max_size=3), cancel=st.booleans())
outcomes = st.sampled_from(RunState)
any_run = st.fixed_dictionaries(
    {
        "nominal": few,
        "origin": st.sampled_from(ORIGINS),
        "state": outcomes,
        "first": few,
        "due": few,
        "ended": st.none() | few,
        "owner": st.sampled_from(OWNERS),
        "limit": st.sampled_from([0, 0, 2]),
        "detached": st.booleans(),
        "error": st.text(max_size=3),
    }
)
new_run = st.builds(lambda fields, **new: {**fields, **new}, any_run, nominal=st.integers(0, 20))
queries = st.builds(
    RunQuery,
    job=st.none() | jobs,
    states=st.lists(outcomes, max_size=3).map(tuple),
    origin=st.none() | st.sampled_from(ORIGINS),
    owner=st.none() | st.sampled_from(OWNERS),
    before=st.none() | st.integers(0, 40),
    after=st.none() | st.integers(0, 40),
    oldest_first=st.booleans(),
    outside_backfills=st.booleans(),
    limit=st.integers(0, 6),
)


class StoreMachine(RuleBasedStateMachine):
    """Each step is taken by the store and by its model; whatever they say must agree."""

    make: Callable[[Path], JobStore]

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="kapsl-")
        self.runner = asyncio.Runner()
        self.store = type(self).make(Path(self.folder.name))
        self.model = NaiveStore()
        self.do(self.store.open())

    def do(self, call: Any) -> Any:
        return self.runner.run(call)

    def commit(self, *changes: Change) -> None:
        results = self.do(self.store.commit(changes))
        assert len(results) == len(changes)
        for change, result in zip(changes, results, strict=True):
            self.model.check(change, result)

    def version(self, job: str) -> int:
        record = self.model.jobs.get(job)
        return record.version if record else 0

    @rule(job=jobs, state=states, definition=definitions, memory=memories)
    def put_job(self, job: str, state: JobState, definition: bytes | None, memory: dict[str, str | None]) -> None:
        expected = self.version(job)
        definition = b"new" if definition is None and not expected else definition
        self.commit(Change(job=job, expected=expected, state=state, definition=definition, memory=memory))

    @rule(job=jobs, ended=few, cancel=st.booleans())
    def remove_job(self, job: str, ended: int, cancel: bool) -> None:
        self.commit(Change(job=job, expected=self.version(job), remove=Removal(ended, "gone", cancel)))

    @rule(job=jobs, runs=st.lists(new_run, min_size=1, max_size=3))
    def create_runs(self, job: str, runs: list[dict[str, Any]]) -> None:
        self.commit(Change(job=job, expected=None, created=tuple(Run(job=job, **fields) for fields in runs)))

    @rule(data=st.data(), count=st.integers(1, 3), fields=any_run)
    def move_runs(self, data: st.DataObject, count: int, fields: dict[str, Any]) -> None:
        """Open runs of a job go on or end, as they should."""
        runs = [run for run in self.model.runs if run.state.open]
        if not runs:
            return
        first = data.draw(st.sampled_from(runs))
        named = [run for run in runs if (run.job, run.owner) == (first.job, first.owner)][:count]
        updated = [Run(job=run.job, **{**fields, "nominal": run.nominal, "origin": run.origin}) for run in named]
        self.commit(Change(job=first.job, expected=None, updated=tuple(updated), taken_from=first.owner))

    @rule(data=st.data(), count=st.sampled_from([1, 2, 3]))
    def commit_anything(self, data: st.DataObject, count: int) -> None:
        self.commit(*[self.anything(data) for _ in range(count)])

    def anything(self, data: st.DataObject) -> Change:
        """Any part of it may stand in its way."""
        job = data.draw(jobs)
        right = self.version(job)
        expected = data.draw(st.sampled_from([right, right, right, None, 0, max(right - 1, 0)]))
        state = data.draw(st.none() | states)
        definition = data.draw(definitions)
        remove = data.draw(removals)
        if expected is None:
            state, definition, remove = None, None, None
        elif expected == 0 and (state is None or definition is None):
            state, definition = JobState(anchor=5, cursor=7), b"{}"
        known = [run for run in self.model.runs if run.job == job]
        updated = data.draw(st.lists(any_run, max_size=2))
        for fields in updated if known else ():
            before = data.draw(st.sampled_from(known))
            fields.update(nominal=before.nominal, origin=before.origin)
        return Change(
            job=job,
            expected=expected,
            state=state,
            definition=definition,
            remove=remove,
            created=tuple(Run(job=job, **fields) for fields in data.draw(st.lists(new_run, max_size=2))),
            updated=tuple(Run(job=job, **fields) for fields in updated),
            taken_from=data.draw(st.sampled_from([None, *OWNERS])),
            memory=data.draw(memories),
        )

    @rule(query=queries)
    def ask(self, query: RunQuery) -> None:
        assert self.do(self.store.runs(query)) == self.model.select(query)

    @rule(ids=st.lists(st.sampled_from([*JOBS, "nobody"]), max_size=3))
    def some_jobs(self, ids: list[str]) -> None:
        expected = [self.model.jobs[job] for job in JOBS if job in self.model.jobs and job in ids]
        assert self.do(self.store.jobs(ids)) == expected

    @rule(keep=few, before=st.sampled_from([0, 0, 1, 3]))
    def prune(self, keep: int, before: int) -> None:
        assert self.do(self.store.prune(keep=keep, before=before)) == self.model.prune(keep, before)

    @rule(owner=st.sampled_from(OWNERS), lives=st.booleans())
    def beat(self, owner: str, lives: bool) -> None:
        if lives:
            self.do(self.store.beat(owner))
            self.model.beats[owner] = self.model.beats.get(owner, 0) + 1
        else:
            self.do(self.store.forget(owner))
            self.model.beats.pop(owner, None)

    @rule(compact=st.booleans())
    def open_again(self, compact: bool) -> None:
        if compact:
            self.do(self.store.compact())
        self.do(self.store.close())
        self.do(self.store.open())

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "store"):
            self.do(self.compare())

    async def compare(self) -> None:
        store, model = self.store, self.model
        assert await store.jobs() == [model.jobs[job] for job in JOBS if job in model.jobs]
        assert await store.versions() == {job: record.version for job, record in model.jobs.items()}
        assert await store.runs(RunQuery(limit=1000)) == model.runs[::-1]
        assert await store.beats() == model.beats
        for job in JOBS:
            assert await store.memory(job) == model.memories.get(job, {})
        for run in model.runs[-1:]:
            assert await store.run(*run.key) == run
            assert await store.numbered(run.number) == run

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.do(self.store.close())
            self.runner.close()
            self.folder.cleanup()
