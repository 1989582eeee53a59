"""A job that scores the files of a folder, only new and changed ones, and writes what the model says to JSON lines."""

import asyncio
import tempfile
from pathlib import Path

import numpy as np

from kapsl_scheduler import CronJob, CronScheduler, RunState, Scheduler
from kapsl_scheduler.engines import OnnxEngine
from kapsl_scheduler.sinks import JsonLinesSink
from kapsl_scheduler.sources import FolderSource

ROOT = Path(__file__).parents[1]


async def main() -> None:
    images = np.load(ROOT / "src/kapsl_scheduler/demo/digits_test.npz")["images"].astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        inbox, results = Path(folder) / "inbox", Path(folder) / "results.jsonl"
        inbox.mkdir()
        np.save(inbox / "monday.npy", images[:100])

        job = CronJob(
            "score",
            "0 0 * * * *",
            FolderSource(path=str(inbox), pattern="*.npy", rows=8),
            sink=JsonLinesSink(str(results)),
        )
        async with (
            Scheduler([OnnxEngine(ROOT / "models/digits/digits.onnx")]) as scheduler,
            CronScheduler(scheduler) as cron,
        ):
            await cron.register(job)
            for new in ("monday", "tuesday", "nothing"):
                if new == "tuesday":
                    np.save(inbox / "tuesday.npy", images[100:150])
                events = cron.events()
                await cron.trigger("score")
                async for event in events:
                    if event.run is not None and event.run.state is not RunState.RUNNING:
                        how = event.run.reason or event.run.state.value
                        print(f"{new}: {how}, {event.run.rows} rows in {event.run.requests} requests")
                        break
                await events.aclose()
        lines = results.read_text().splitlines()
        print(f"{len(lines)} lines of results, the first: {lines[0][:60]}...")


if __name__ == "__main__":
    asyncio.run(main())
