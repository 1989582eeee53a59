"""Several stores and several processes on one file, and one that is killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kapsl_scheduler.core.runs import Change
from kapsl_scheduler.ports import Committed, RunQuery
from tests.stores.build import STATE, Opened, new_job, nominals, run
from tests.stores.contender import ROWS

CONTENDER = Path(__file__).with_name("contender.py")


async def test_two_stores_of_one_file_see_and_never_overrule_one_another(path: Path) -> None:
    async with Opened(path) as one, Opened(path) as two:
        version = await new_job(one)
        assert await two.versions() == {"a": version}
        for _ in range(20):
            changes = [Change(job="a", expected=version, state=STATE, created=(run(version),)) for _ in range(2)]
            results = await asyncio.gather(one.commit(changes[:1]), two.commit(changes[1:]))
            assert sorted(type(result).__name__ for (result,) in results) == ["Committed", "Stale"]
            (job,) = await one.jobs()
            assert job.version > version
            version = job.version
        assert len(await nominals(two)) == 20
        assert await new_job(two, "b") > version


def contender(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(CONTENDER), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
async def test_two_processes_decide_each_turn_once(path: Path) -> None:
    turns = 100
    async with Opened(path) as store:
        await new_job(store)
    processes = [contender("count", path, turns) for _ in range(2)]
    owners = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    async with Opened(path) as store:
        (job,) = await store.jobs()
        runs = await store.runs(RunQuery(limit=10_000, oldest_first=True))
    assert job.state.cursor == 2 * turns
    assert [run.nominal for run in runs] == list(range(1, 2 * turns + 1))
    assert [sum(run.owner == owner for run in runs) for owner in owners] == [turns, turns]


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 40, 150])
async def test_what_was_acknowledged_survives_a_kill_and_the_rest_is_whole_or_absent(path: Path, after: int) -> None:
    with contender("write", path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == after:
                break
        process.kill()
        acknowledged = [after, *map(int, process.stdout.read().split())][-1]
    async with Opened(path) as store:
        (job,) = await store.jobs()
        turn = job.state.cursor
        assert acknowledged <= turn <= acknowledged + 1
        assert await nominals(store) == list(range(ROWS, (turn + 1) * ROWS))
        assert await store.memory("a") == {"turn": str(turn)}
        state = msgspec.structs.replace(STATE, cursor=-1)
        (result,) = await store.commit([Change(job="a", expected=job.version, state=state)])
        assert isinstance(result, Committed)
