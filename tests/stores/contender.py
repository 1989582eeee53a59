"""A process that shares a store with others. `count FILE TURNS`: raise a job's cursor, each time for a run of its own.
`write FILE`: commit until killed, and say on stdout what was acknowledged."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Any

import msgspec

from kapsl_scheduler.core.runs import Change, JobState, Run, RunState
from kapsl_scheduler.ports import Committed
from kapsl_scheduler.stores import SqliteStore

ROWS = 5
"""Runs that one change of `write` creates."""


def run(nominal: int, owner: str) -> Run:
    return Run(job="a", nominal=nominal, state=RunState.RUNNING, first=nominal, due=nominal, owner=owner)


async def count(path: str, turns: str) -> None:
    store = SqliteStore(path, busy_timeout=30.0)
    await store.open()
    owner, won = f"p{os.getpid()}", 0
    while won < int(turns):
        (record,) = await store.jobs(["a"])
        cursor = record.state.cursor + 1
        state = msgspec.structs.replace(record.state, cursor=cursor)
        change = Change(job="a", expected=record.version, state=state, created=(run(cursor, owner),))
        (result,) = await store.commit([change])
        won += isinstance(result, Committed)
    sys.stdout.write(owner)
    await store.close()


async def write(path: str) -> None:
    store = SqliteStore(path)
    await store.open()
    state = JobState(anchor=0, cursor=0)
    (result,) = await store.commit([Change(job="a", expected=0, state=state, definition=b"{}")])
    version = result.version
    for turn in range(1, 1_000_000):
        runs = tuple(run(turn * ROWS + n, "me") for n in range(ROWS))
        state = msgspec.structs.replace(state, cursor=turn)
        change = Change(job="a", expected=version, state=state, created=runs, memory={"turn": str(turn)})
        (result,) = await store.commit([change])
        version = result.version
        sys.stdout.write(f"{turn}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    commands: dict[str, Any] = {"count": count, "write": write}
    command: Coroutine[Any, Any, None] = commands[sys.argv[1]](*sys.argv[2:])
    asyncio.run(command)
