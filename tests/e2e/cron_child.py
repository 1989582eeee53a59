"""A process with cron jobs on an SQLite file, made to be killed. Each dispatched run is one line of a file, written
before anything else is done with it.

Arguments: the file of the store, the file of the lines, and what to do: `work` until killed; `finish` what is open, and
end; `share` 1,000 occurrences with whoever else is there, and end.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path
from typing import Any

from kapsl_scheduler import (
    Backend,
    Coalesce,
    CronJob,
    CronScheduler,
    Firing,
    FiringPolicy,
    Named,
    OnInterrupt,
    Overlap,
    RunPolicy,
)
from kapsl_scheduler.core.jobs import micros, moment
from kapsl_scheduler.stores import SqliteStore

LEASE = 0.5
JOBS = 20
OCCURRENCES = 1000
PATIENCE = 30.0


class Target:
    async def infer(self, request: Any, **options: Any) -> Any:
        luck = random.random()
        await asyncio.sleep(0 if luck < 0.5 else luck * 0.2)
        if luck > 0.9:
            raise Backend("driver")


def working_job(number: int) -> CronJob:
    """One of many kinds."""
    return CronJob(
        f"job{number}",
        0.05 + number / 1000,
        Named("make"),
        firing=FiringPolicy(
            overlap=(Overlap.SKIP, Overlap.BUFFER_ALL, Overlap.CANCEL_OTHER, Overlap.BUFFER_ONE)[number % 4]
        ),
        run=RunPolicy(
            attempts=1 + number % 2,
            backoff=0.01,
            on_interrupt=OnInterrupt.RESUME if number % 3 else OnInterrupt.RECORD,
        ),
    )


def shared_job(number: int) -> CronJob:
    """None of its occurrences is lost to lateness or to another run."""
    firing = FiringPolicy(
        coalesce=Coalesce.ALL, overlap=Overlap.ALLOW, max_running=OCCURRENCES, max_runs=OCCURRENCES // JOBS
    )
    return CronJob(f"job{number}", 0.05, Named("make"), firing=firing)


async def main(store: Path, lines: Path, what: str) -> None:
    file = os.open(lines, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def make(firing: Firing) -> Any:
        line = f"{firing.job} {micros(firing.nominal)} {firing.origin} {firing.attempt} {os.getpid()}\n"
        os.write(file, line.encode())
        return 1.0

    async with CronScheduler(
        Target(), store=SqliteStore(store), lease=LEASE, history_keep=10**6, max_concurrent_runs=50
    ) as cron:
        cron.bind("make", make)
        for number in range(JOBS):
            await cron.register(shared_job(number) if what == "share" else working_job(number))
        if what == "work":
            await cron.backfill("job0", moment(0), moment(2_000_000), concurrency=2, origin="fill")
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        async with asyncio.timeout(PATIENCE):
            if what == "work":
                await asyncio.Event().wait()
            if what == "finish":
                for number in range(JOBS):
                    await cron.pause(f"job{number}")
            while not all(is_done(info, what) for info in await cron.list_jobs()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # other processes tell nobody of what they do
    os.close(file)


def is_done(info: Any, what: str) -> bool:
    return info.pending == 0 and (what != "share" or info.due >= OCCURRENCES // JOBS)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
