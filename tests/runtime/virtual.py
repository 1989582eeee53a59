"""Decorators that run an asynchronous test in virtual time and let it leave no task behind."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

from kapsl_scheduler.testing import run_virtual

__all__ = ["virtual", "with_threads"]

P = ParamSpec("P")


def virtual(test: Callable[P, Coroutine[Any, Any, None]], *, patience: float = 0.0) -> Callable[P, None]:
    """Sleeping costs nothing, what can never go on raises `DeadlockError`, a task that outlives the test fails it."""

    async def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        await test(*args, **kwargs)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_virtual(guarded(*args, **kwargs), patience=patience)

    return run


def with_threads(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """The same where threads are at work: before its time jumps, the loop waits for them a little in real time."""
    return virtual(test, patience=0.1)
