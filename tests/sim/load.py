"""Callers in virtual time: one after another, all at once, or as they come; and how long they waited."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kapsl_scheduler import Priority, Scheduler
from kapsl_scheduler.errors import EngineError

__all__ = ["Heard", "closed_loop", "one_row", "open_loop", "p99", "probe"]


def one_row() -> Any:
    return np.zeros((1, 2), np.float32)


def p99(seconds: Iterable[float]) -> float:
    ordered = sorted(seconds)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]


@asynccontextmanager
async def closed_loop(scheduler: Scheduler, callers: int, priority: Priority) -> AsyncIterator[None]:
    """While the block runs, so many callers ask again as soon as they are answered."""

    async def ask() -> None:
        while True:
            await scheduler.infer(one_row(), priority=priority)

    tasks = [asyncio.create_task(ask()) for _ in range(callers)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def probe(scheduler: Scheduler, count: int, gap: float, seed: int = 0) -> list[float]:
    """Live requests, one at a time with random gaps around `gap` seconds between them; the seconds that each took."""
    rng, loop = random.Random(seed), asyncio.get_running_loop()
    taken = []
    for _ in range(count):
        await asyncio.sleep(rng.uniform(0.5, 1.5) * gap)
        started = loop.time()
        await scheduler.infer(one_row(), priority=Priority.LATENCY_CRITICAL)
        taken.append(loop.time() - started)
    return taken


@dataclass
class Heard:
    """What the callers of an open loop heard: how many of each kind, and after how many seconds."""

    answered: list[float] = field(default_factory=list)
    errors: Counter[type[EngineError]] = field(default_factory=Counter)
    slowest: Counter[type[EngineError]] = field(default_factory=Counter)


async def open_loop(scheduler: Scheduler, rate: float, seconds: float, seed: int = 0, **options: Any) -> Heard:
    """Callers arrive at random, `rate` a second, whatever becomes of those before them."""
    rng, loop, heard = random.Random(seed), asyncio.get_running_loop(), Heard()

    async def ask() -> None:
        started = loop.time()
        try:
            await scheduler.infer(one_row(), **options)
            heard.answered.append(loop.time() - started)
        except EngineError as error:
            heard.errors[type(error)] += 1
            heard.slowest[type(error)] = max(heard.slowest[type(error)], loop.time() - started)  # type: ignore[assignment]

    async with asyncio.TaskGroup() as callers:
        while loop.time() < seconds:
            await asyncio.sleep(rng.expovariate(rate))
            callers.create_task(ask())
    return heard
