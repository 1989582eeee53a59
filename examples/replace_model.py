"""Several models by name, and one replaced while requests come in: nobody notices but for the answer."""

import asyncio

import numpy as np

from kapsl_scheduler import Scheduler
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.runtime.registry import ModelRegistry


async def start(factor: float) -> Scheduler:
    """What the registry calls to load a model: here from a number, in a server from a file."""
    return await Scheduler([CallableEngine(lambda x: x * factor)]).__aenter__()


async def main() -> None:
    async with ModelRegistry(start) as registry:
        await registry.load("scale", 2.0)
        answers: list[float] = []

        async def caller() -> None:
            while not answers or answers[-1] != 3.0:
                answer = await registry.get("scale").scheduler.infer(np.ones((1, 1)))
                answers.append(float(answer.output[0, 0]))

        async with asyncio.TaskGroup() as group:
            group.create_task(caller())
            await registry.replace("scale", 3.0)
        print(f"{len(answers)} answers, none failed; the last is {answers[-1]}")


if __name__ == "__main__":
    asyncio.run(main())
