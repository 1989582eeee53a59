"""Requests and models that the tests of the runtime share, and a scheduler in virtual time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np

from kapsl_scheduler import Scheduler
from kapsl_scheduler.core.routing import rendezvous
from kapsl_scheduler.testing.engines import FAKE_INFO
from kapsl_scheduler.types import TensorSpec

__all__ = ["FIXED_INFO", "numbered", "session_of", "start", "until", "until_async", "virtual_scheduler"]

FIXED_INFO: Final = msgspec.structs.replace(
    FAKE_INFO,
    inputs=(TensorSpec("x", "float32", ("batch", 2), 0),),
    outputs=(TensorSpec("y", "float32", ("batch", 2), 0),),
)
"""A model whose rows have one shape, so that its calls can be measured before there is traffic."""


def numbered(number: float, rows: int = 1) -> Any:
    """A request of so many rows that can be told from others."""
    x = np.zeros((rows, 2), np.float32)
    x[:, 0], x[:, 1] = number, np.arange(rows)
    return x


def session_of(engine: int) -> str:
    """A session that belongs to the one or the other of two engines."""
    return next(name for name in "abcdefgh" if rendezvous(name, range(2)) == engine)


def virtual_scheduler(*engines: Any, **parameters: Any) -> Scheduler:
    """A scheduler on the running loop's clock."""
    return Scheduler(engines, clock=asyncio.get_running_loop().time, **parameters)


async def start(*coroutines: Any) -> list[asyncio.Task[Any]]:
    """Tasks that have all had their first step, and what follows from it, at one moment of the loop's time."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    for _ in range(4):
        await asyncio.sleep(0)
    return tasks


def until(holds: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for other threads until something holds; fail after so many real seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0)


async def until_async(holds: Callable[[], object], seconds: float = 5.0) -> None:
    """The same, while the loop goes on."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came about"
        await asyncio.sleep(0)
