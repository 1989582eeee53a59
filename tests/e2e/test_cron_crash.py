"""Processes with cron jobs that are killed at any moment, and such that share a store: the books, line by line."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kapsl_scheduler.core.runs import JobRecord, Run, RunState
from kapsl_scheduler.ports import RunQuery
from kapsl_scheduler.stores import SqliteStore
from tests.e2e.cron_child import OCCURRENCES

pytestmark = pytest.mark.slow

STRESS = bool(os.environ.get("KAPSL_STRESS"))
KILLS = 200 if STRESS else 5
PATIENCE = 30.0  # seconds; only a failure waits this long
ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def child(folder: Path, what: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process at work, killed at the end if it is still there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.e2e.cron_child", str(folder / "jobs.db"), str(folder / "lines"), what),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def size(folder: Path) -> int:
    lines = folder / "lines"
    return lines.stat().st_size if lines.exists() else 0


async def grown(folder: Path, by: int) -> None:
    """Wait until so many more bytes have been written."""
    until = size(folder) + by
    async with asyncio.timeout(PATIENCE):
        while size(folder) < until:
            await asyncio.to_thread(os.sched_yield)


async def found(folder: Path) -> tuple[list[JobRecord], list[Run], Counter[tuple[str, int, str, int]]]:
    """What the store holds, and what was dispatched."""
    store = SqliteStore(folder / "jobs.db")
    await store.open()
    try:
        jobs, runs = await store.jobs(), await store.runs(RunQuery(limit=10**6))
    finally:
        await store.close()
    dispatched: Counter[tuple[str, int, str, int]] = Counter()
    for line in (folder / "lines").read_text().splitlines():
        job, nominal, origin, attempt, _ = line.split()
        dispatched[job, int(nominal), origin, int(attempt)] += 1
    return jobs, runs, dispatched


async def test_a_process_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    seed = random.randrange(2**32) if STRESS else 7
    rng = random.Random(seed)
    for _ in range(KILLS):
        async with child(tmp_path, "work") as process:
            await grown(tmp_path, rng.randrange(4_000))
            process.send_signal(signal.SIGKILL)
            await process.wait()
    async with child(tmp_path, "finish") as process:
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0
    jobs, runs, dispatched = await found(tmp_path)
    assert dispatched, seed
    assert {key: count for key, count in dispatched.items() if count > 1} == {}, seed
    by_key = {run.key: run for run in runs}
    assert len(by_key) == len(runs)
    for *key, attempt in dispatched:
        assert by_key[tuple(key)].attempt >= attempt, (seed, key)  # type: ignore[index]
    assert [run for run in runs if run.state.open] == [], seed
    for record in jobs:
        state = record.state
        assert state.balanced, (seed, record)
        assert state.pending == 0, (seed, record)
        counted: Counter[RunState] = Counter()
        for run in runs:
            if run.job == record.id:
                counted[run.state] += run.count
        assert {outcome: getattr(state, outcome.value) for outcome in counted} == dict(counted), (seed, record.id)
        assert state.due == counted.total(), (seed, record.id)
    assert any(run.state is RunState.INTERRUPTED for run in runs) or any(run.attempt > 1 for run in runs)


async def test_two_processes_share_a_thousand_occurrences(tmp_path: Path) -> None:
    async with child(tmp_path, "share") as one, child(tmp_path, "share") as other, asyncio.timeout(PATIENCE):
        assert (await one.wait(), await other.wait()) == (0, 0)
    jobs, runs, dispatched = await found(tmp_path)
    assert len(dispatched) == dispatched.total() == len(runs) == OCCURRENCES
    assert {run.state for run in runs} <= {RunState.SUCCEEDED, RunState.FAILED}
    assert all(record.state.balanced for record in jobs)
    assert sum(record.state.due for record in jobs) == OCCURRENCES
    lines = (tmp_path / "lines").read_text().splitlines()
    assert len({line.split()[-1] for line in lines}) == 2, "one of them did all the work"
