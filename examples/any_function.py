"""Any function over batches is a model: plain or async, here with a deadline that one request cannot keep."""

import asyncio

import numpy as np

from kapsl_scheduler import DeadlineExceeded, Scheduler
from kapsl_scheduler.engines import CallableEngine


async def slow_average(readings: np.ndarray) -> np.ndarray:
    """Called with the readings of several callers at once: float64 [rows, 3] to [rows]."""
    await asyncio.sleep(0.05)
    averages: np.ndarray = readings.mean(axis=1)
    return averages


async def main() -> None:
    engine = CallableEngine(slow_average, inputs={"readings": ("float64", (None, 3))})
    async with Scheduler([engine]) as scheduler:
        answers = await asyncio.gather(*(scheduler.infer(np.arange(3.0) + start) for start in range(8)))
        print("averages:", [float(answer.output) for answer in answers])
        print("rows in each caller's batch:", [answer.batch_rows for answer in answers])
        try:
            await scheduler.infer(np.zeros(3), timeout=0.01)
        except DeadlineExceeded as error:
            print("too late:", error)


if __name__ == "__main__":
    asyncio.run(main())
