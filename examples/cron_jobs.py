"""Scheduled inference beside live requests: jobs in the background class, their history in a SQLite file."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kapsl_scheduler import CronExpression, CronJob, CronScheduler, Firing, RunPolicy, Scheduler
from kapsl_scheduler.engines import OnnxEngine
from kapsl_scheduler.stores import SqliteStore

ROOT = Path(__file__).parents[1]


async def main() -> None:
    images = np.load(ROOT / "src/kapsl_scheduler/demo/digits_test.npz")["images"].astype(np.float32)

    def latest(firing: Firing) -> list[Any] | None:
        """What there is to score: several requests, or None for nothing to do."""
        return [images[number] for number in range(5)]

    async def report(job: str, result: Any) -> None:
        print(f"{job}: {[int(answer.output.argmax()) for answer in result]}")

    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "cron.db")
        async with (
            Scheduler([OnnxEngine(ROOT / "models/digits/digits.onnx")]) as scheduler,
            CronScheduler(scheduler, store=store) as cron,
        ):
            events = cron.events()
            await cron.register(CronJob("heartbeat", 0.2, images[0]))
            await cron.register(CronJob("newest", 0.2, latest, on_result=report, run=RunPolicy(timeout=5.0)))
            await cron.register(CronJob("nightly", "0 30 3 * * *", images[:32], tz="Europe/Zurich"))
            waited_for = {"heartbeat", "newest"}  # a run is counted when its end is written, after its `on_result`
            async for event in events:
                if event.kind == "ended":
                    waited_for.discard(event.job)
                if not waited_for:
                    break
            await events.aclose()
            live = await scheduler.infer(images[7])
            print(f"live: a {live.output.argmax()}, {live.queue_time * 1e3:.2f} ms in the queue")

            expression = CronExpression("0 30 3 * * *", "Europe/Zurich")
            times = [str(at.astimezone(expression.tz)) for at in cron.preview("nightly", 2)]
            print(f"nightly: {expression.explain()}; next {', '.join(times)}")
            for job in await cron.list_jobs():
                print(f"{job.id}: {job.fired_count} fired, {job.succeeded} succeeded, {job.missed_count} not run")
            for run in await cron.runs(limit=2):
                print(f"run {run.number} of {run.job}: {run.state.value}, {run.requests} requests")


if __name__ == "__main__":
    asyncio.run(main())
