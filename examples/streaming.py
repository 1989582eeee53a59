"""A generator is a model that streams: its chunks arrive one by one, and leaving the loop ends it."""

import asyncio
from collections.abc import Iterator

import numpy as np

from kapsl_scheduler import Scheduler
from kapsl_scheduler.engines import CallableEngine


def count_up(start: np.ndarray) -> Iterator[np.ndarray]:
    """int64 [rows] to the next numbers, without an end."""
    while True:
        start = start + 1
        yield start


async def main() -> None:
    engine = CallableEngine(count_up, inputs={"start": ("int64", (None,))})
    async with Scheduler([engine]) as scheduler:
        stream = scheduler.infer_stream(np.array([41]))
        async for chunk in stream:
            print(chunk.output)
            if chunk.output[0] == 45:
                break
        await stream.aclose()


if __name__ == "__main__":
    asyncio.run(main())
