"""The alarms of all requests on one timer: each rings once, at its moment, in order, and none is kept for nothing."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest

from kapsl_scheduler.runtime.deadlines import Alarm, Deadlines
from tests.runtime.virtual import virtual


@dataclass(eq=False)
class Item:
    """What alarms need to know of a request."""

    arrival: float
    deadline: float
    timeout: float | None
    future: asyncio.Future[None]


class Bell:
    """Notes who rang, when and why."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.rung: list[tuple[float, Any, Alarm]] = []
        self.deadlines = Deadlines(self.loop.time, self.ring)

    def watch(self, seconds: float, alarm: Alarm = Alarm.DEADLINE) -> Item:
        """A request that arrives now, and is to be rung after so many seconds."""
        item = self.item(seconds)
        if alarm is Alarm.DEADLINE:
            self.deadlines.add_all([item])
        else:
            self.deadlines.add(item, seconds, alarm)
        return item

    def item(self, seconds: float | None) -> Any:
        """A request that arrives now."""
        now = self.loop.time()
        return Item(now, math.inf if seconds is None else now + seconds, seconds, self.loop.create_future())

    def ring(self, item: Any, alarm: Alarm) -> None:
        self.rung.append((self.loop.time(), item, alarm))
        item.future.cancel()


@virtual
async def test_every_alarm_rings_once_at_its_moment() -> None:
    """Few distances have lines of their own, the others share a heap: both are here."""
    rng, bell = random.Random(1), Bell()
    expected = []
    for number in range(500):
        await asyncio.sleep(rng.uniform(0, 0.001))
        seconds, alarm = rng.choice([0.01, 0.05, 0.2, rng.uniform(0.001, 0.3)]), Alarm(number % 3)
        expected.append((bell.loop.time() + seconds, bell.watch(seconds, alarm), alarm))
    await asyncio.sleep(1)
    expected.sort(key=lambda entry: entry[0])
    assert [entry[1:] for entry in bell.rung] == [entry[1:] for entry in expected]
    assert [entry[0] for entry in bell.rung] == pytest.approx([entry[0] for entry in expected], abs=2e-9)
    assert len(bell.deadlines) == 0


@virtual
async def test_who_was_answered_is_not_rung() -> None:
    bell = Bell()
    items = [bell.watch(0.01) for _ in range(10)]
    for item in items[::2]:
        item.future.set_result(None)
    await asyncio.sleep(1)
    assert [item for _, item, _ in bell.rung] == items[1::2]


@virtual
async def test_who_arrives_together_is_rung_each_in_time() -> None:
    """In one pass of the loop: equal timeouts, several, and none."""
    bell = Bell()
    items = [bell.item(seconds) for seconds in (0.03, None, 0.01, 0.03, 0.02, 0.01)]
    bell.deadlines.add_all(items)
    await asyncio.sleep(1)
    assert [item for _, item, _ in bell.rung] == [items[index] for index in (2, 5, 4, 0, 3)]


@pytest.mark.parametrize(
    ("answered", "kept"), [([0, 1, 2], 1), ([1, 2], 4), ([0, 2], 3), ([2, 1, 0], 1), ([0, 1, 2, 3], 0)]
)
@virtual
async def test_the_front_of_a_line_goes_when_it_was_answered_and_takes_nobody_with_it(
    answered: list[int], kept: int
) -> None:
    bell = Bell()
    items = [bell.item(0.01) for _ in range(4)]
    bell.deadlines.add_all(items)
    members = [items[index] for index in answered]
    for item in members:
        item.future.set_result(None)
    bell.deadlines.answered(members)
    assert len(bell.deadlines) == kept
    await asyncio.sleep(1)
    assert [item for _, item, _ in bell.rung] == [item for item in items if item not in members]


@virtual
async def test_one_item_may_have_several_alarms_and_hears_the_first() -> None:
    bell = Bell()
    item: Any = bell.watch(0.02)
    bell.deadlines.add(item, 0.01, Alarm.FIRST_CHUNK)
    await asyncio.sleep(1)
    assert [alarm for _, _, alarm in bell.rung] == [Alarm.FIRST_CHUNK]


@virtual
async def test_nothing_rings_after_the_close() -> None:
    bell = Bell()
    for alarm in Alarm:
        bell.watch(0.01, alarm)
    bell.deadlines.close()
    await asyncio.sleep(1)
    assert bell.rung == []


@pytest.mark.parametrize("distances", [1, 1000], ids=["one timeout", "many timeouts"])
@virtual
async def test_answered_requests_are_not_kept_while_an_old_one_waits(distances: int) -> None:
    rng, bell = random.Random(1), Bell()
    old = bell.watch(60.0)
    for _ in range(5_000):
        bell.watch(60.0 + rng.randrange(distances)).future.set_result(None)
    assert len(bell.deadlines) < 1_000
    await asyncio.sleep(70)
    assert [item for _, item, _ in bell.rung] == [old]
