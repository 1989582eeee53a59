"""The wall clock that follows the loop."""

from __future__ import annotations

import asyncio
import datetime as dt

from kapsl_scheduler.core.jobs import micros
from kapsl_scheduler.testing import WallClock, run_virtual

NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)


def test_it_follows_the_loop_from_the_first_look() -> None:
    async def main() -> None:
        await asyncio.sleep(5)
        clock = WallClock(NOON)
        assert repr(clock) == "WallClock(not asked yet)"
        assert clock() == micros(NOON)
        await asyncio.sleep(0.000001)
        assert clock() == micros(NOON) + 1
        await asyncio.sleep(86_400)
        assert clock.now == NOON + dt.timedelta(days=1, microseconds=1)

    run_virtual(main())


def test_it_can_be_set() -> None:
    async def main() -> None:
        clock = WallClock()
        clock.step(3600)
        before = clock()
        clock.step(-7200.5)
        assert clock() == before - 7_200_500_000
        assert repr(clock) == "WallClock(2026-03-02T07:59:29.500000+00:00)"

    run_virtual(main())
