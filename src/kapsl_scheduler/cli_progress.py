"""How far long work is: a bar on stderr, only where a person looks at it.

What is not here: the work.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

__all__ = ["passing", "progress"]

_TICK: Final = 0.2  # seconds between two steps of a bar that goes by itself


@contextlib.contextmanager
def progress(text: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Yields what is to be told how far the work is by now, out of `total` (None: nobody knows)."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextlib.asynccontextmanager
async def passing(text: str, seconds: float) -> AsyncIterator[None]:
    """A bar for work that takes so many seconds, which goes by itself."""
    import asyncio

    async def go(tell: Callable[[float], None]) -> None:
        started = time.monotonic()
        while True:
            tell(min(seconds, time.monotonic() - started))
            await asyncio.sleep(_TICK)

    with progress(text, round(seconds)) as tell:
        going = asyncio.create_task(go(tell))
        try:
            yield
        finally:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
