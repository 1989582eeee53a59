"""A decorator that runs an asynchronous test in virtual time and lets it leave no task behind."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

from kapsl_scheduler.testing import run_virtual

__all__ = ["virtual"]

P = ParamSpec("P")


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Sleeping costs nothing, what can never go on raises `DeadlockError`, a task that outlives the test fails it."""

    async def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        await test(*args, **kwargs)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_virtual(guarded(*args, **kwargs))

    return run
