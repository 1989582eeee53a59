"""A wall clock for tests of cron jobs: it follows the loop's time, virtual or not, and can be set.

What is not here: the loop's own clock (`testing.virtual_time`).
"""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Final

from kapsl_scheduler.core.jobs import micros, moment

__all__ = ["WallClock"]

START: Final = dt.datetime(2026, 3, 2, 8, 59, 30, tzinfo=dt.UTC)
"""Half a minute before nine on a Monday."""


class WallClock:
    """Microseconds since 1970 UTC, for `CronScheduler(..., clock=WallClock())`.

    It shows `start` when it is first asked and from then on moves with the loop that is running then: in virtual time
    (`run_virtual`) a year costs what its firings cost. `step` sets it: forward as after a suspension, in which the
    loop's clock stands still, or back as a correction does.
    """

    __slots__ = ("_loop", "_offset")

    def __init__(self, start: dt.datetime = START) -> None:
        self._offset = micros(start)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self) -> int:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._offset -= round(self._loop.time() * 1e6)
        return self._offset + round(self._loop.time() * 1e6)

    def __repr__(self) -> str:
        return "WallClock(not asked yet)" if self._loop is None else f"WallClock({self.now.isoformat()})"

    @property
    def now(self) -> dt.datetime:
        """What it shows, as a datetime in UTC."""
        return moment(self())

    def step(self, seconds: float) -> None:
        """Set it forward by so many seconds, or back if they are negative."""
        self._offset += round(seconds * 1e6)
