"""Suite `store`: what keeping jobs and runs costs: commits per second, 10,000 jobs that are due at once, reopening.

A firing is two commits: one creates the run and advances the job, the other ends it. Beside the stores stands what the
same machine's SQLite does with nothing around it: rows in one transaction, and a transaction with its fsync for each.
"""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from benchmarks.report import Label, Report
from benchmarks.stats import paired_ratios
from kapsl_scheduler.core.runs import Change, JobState, Run, RunState, booked
from kapsl_scheduler.ports import Committed, JobStore
from kapsl_scheduler.stores import MemoryStore, SqliteStore

__all__ = ["Options", "run"]

T = TypeVar("T")

DEFINITION: Final = b'{"id":"job","schedule":"0 * * * * *","request":{"named":"source"}}'
BOOKS: Final = JobState(anchor=0, cursor=0)
STORES: Final[dict[str, Callable[[Path], JobStore]]] = {
    "memory": lambda folder: MemoryStore(),
    "sqlite": lambda folder: SqliteStore(folder / "jobs.db"),
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`callers` commit one after another, each for its own job. `jobs` are due at once. `seconds` are per trial."""

    callers: Sequence[int] = (1, 64, 1000)
    jobs: int = 10_000
    rounds: int = 3
    seconds: float = 1.0


def run(options: Options) -> Report:
    """Bare SQLite and every store, round after round."""
    settings: dict[str, Label | list[Label]] = {"rounds": options.rounds, "seconds": options.seconds}
    report = Report.begin("store", settings)
    bare: dict[str, list[float]] = {"rows in one transaction": [], "an fsync for each row": []}
    rates: dict[tuple[str, int], list[float]] = {(name, n): [] for name in STORES for n in options.callers}
    due: dict[str, list[dict[str, float]]] = {name: [] for name in STORES}
    for _ in range(options.rounds):
        bare["rows in one transaction"].append(_in_folder(lambda folder: _insert(folder, options.seconds, each=False)))
        bare["an fsync for each row"].append(_in_folder(lambda folder: _insert(folder, options.seconds, each=True)))
        for (name, callers), samples in rates.items():
            samples.append(_in_folder(_Commits(name, callers, options.seconds)))
        for name, rounds in due.items():
            rounds.append(_in_folder(_AllDue(name, options.jobs)))
    for name, samples in bare.items():
        report.add({"contender": f"bare SQLite, {name}"}, "rate", "/s", samples, "higher")
    for (name, callers), samples in rates.items():
        labels: dict[str, Label] = {"contender": f"{name}, {callers} callers"}
        report.add(labels, "rate", "/s", samples, "higher")
        ratios = paired_ratios(samples, bare["an fsync for each row"])
        report.add(labels, "of an fsync for each row", "", ratios, "higher")
    for name, rounds in due.items():
        for metric in rounds[0]:
            samples = [trial[metric] for trial in rounds]
            report.add({"store": name, "jobs": options.jobs}, metric, "ms", samples, "lower")
    return report


def _in_folder(work: Callable[[Path], T]) -> T:
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="kapsl-bench-") as folder:
        return work(Path(folder))


# ------------------------------------------------------------------------------------------------------ bare


def _insert(folder: Path, seconds: float, *, each: bool) -> float:
    """Rows of a run's size per second, into a table with a key of its own."""
    with closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE bare (job TEXT, nominal INTEGER, rest TEXT, UNIQUE (job, nominal))")
        rest, count, start = "x" * 100, 0, time.perf_counter()
        if not each:
            connection.execute("BEGIN")
        while (elapsed := time.perf_counter() - start) < seconds:
            connection.execute("INSERT INTO bare VALUES ('job', ?, ?)", (count, rest))
            count += 1
        if not each:
            connection.execute("COMMIT")
            elapsed = time.perf_counter() - start
    return count / elapsed


# ---------------------------------------------------------------------------------------------------- stores


class _Job:
    """A job's part in the store: it fires when it is told to."""

    def __init__(self, store: JobStore, id: str) -> None:
        self.store = store
        self.id = id
        self.state = BOOKS
        self.version = 0
        self.turn = 0

    def creation(self) -> Change:
        return Change(job=self.id, expected=0, state=BOOKS, definition=DEFINITION)

    def begin(self) -> Change:
        self.turn += 1
        run = self._run(RunState.RUNNING, ended=None)
        self.state = booked(self.state, None, run, cursor=self.turn)
        return Change(job=self.id, expected=self.version, state=self.state, created=(run,))

    def end(self) -> Change:
        before, after = self._run(RunState.RUNNING, ended=None), self._run(RunState.SUCCEEDED, ended=self.turn)
        self.state = booked(self.state, before, after)
        return Change(job=self.id, expected=self.version, state=self.state, updated=(after,))

    def _run(self, state: RunState, *, ended: int | None) -> Run:
        turn = self.turn
        return Run(
            job=self.id, nominal=turn, state=state, first=turn, due=turn, started=turn, ended=ended, owner="benchmark"
        )

    async def commit(self, change: Change) -> None:
        (result,) = await self.store.commit([change])
        self.committed(result)

    def committed(self, result: object) -> None:
        if not isinstance(result, Committed):
            raise AssertionError(f"nobody else writes, but the store said {result}")
        self.version = result.version


class _Commits:
    """Commits per second, of so many callers that fire a job each."""

    def __init__(self, store: str, callers: int, seconds: float) -> None:
        self.make = STORES[store]
        self.callers = callers
        self.seconds = seconds

    def __call__(self, folder: Path) -> float:
        return asyncio.run(self.measure(self.make(folder)))

    async def measure(self, store: JobStore) -> float:
        await store.open()
        jobs = [_Job(store, f"job {number}") for number in range(self.callers)]
        for job, result in zip(jobs, await store.commit([job.creation() for job in jobs]), strict=True):
            job.committed(result)
        start = time.perf_counter()
        stop = start + self.seconds
        counts = await asyncio.gather(*(self.fire(job, stop) for job in jobs))
        rate = sum(counts) / (time.perf_counter() - start)
        await store.close()
        return rate

    async def fire(self, job: _Job, stop: float) -> int:
        commits = 0
        while time.perf_counter() < stop:
            await job.commit(job.begin())
            await job.commit(job.end())
            commits += 2
            if job.store.instant:
                await asyncio.sleep(0)
        return commits


class _AllDue:
    """Milliseconds for all jobs: to register them, to record that all are due (in one batch, and as many commits at a
    time), and until a new process has read them."""

    def __init__(self, store: str, jobs: int) -> None:
        self.make = STORES[store]
        self.jobs = jobs

    def __call__(self, folder: Path) -> dict[str, float]:
        return asyncio.run(self.measure(self.make(folder)))

    async def measure(self, store: JobStore) -> dict[str, float]:
        await store.open()
        jobs = [_Job(store, f"job {number}") for number in range(self.jobs)]
        stamps = [time.perf_counter()]
        for change in (_Job.creation, _Job.begin):
            for job, result in zip(jobs, await store.commit([change(job) for job in jobs]), strict=True):
                job.committed(result)
            stamps.append(time.perf_counter())
        await asyncio.gather(*(job.commit(job.end()) for job in jobs))
        stamps.append(time.perf_counter())
        await store.close()
        closed = time.perf_counter()
        await store.open()
        if len(await store.jobs()) != self.jobs:
            raise AssertionError("the store does not have all jobs")
        reopened = time.perf_counter() - closed
        await store.close()
        names = ("registered", "due, in one batch", "ended, each by itself")
        spans = {name: (stamps[n + 1] - stamps[n]) * 1e3 for n, name in enumerate(names)}
        return {**spans, "reopened": reopened * 1e3}
