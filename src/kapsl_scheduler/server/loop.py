"""The event loop that a program of ours runs on: uvloop where there is one, which does not exist for Windows."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run_coroutine"]

Result = TypeVar("Result")


def run_coroutine(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`, on uvloop if it is installed."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
