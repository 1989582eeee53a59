"""Who was served how much: engine time by class over a sliding window, and the cost served by tenant.

What is not here: what the queue does about it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from kapsl_scheduler.types import Priority

__all__ = ["ShareWindow", "TenantLedger"]

_WINDOW: Final = 1.0  # seconds
_GRAIN: Final = 0.01  # seconds; calls that end closer together share one record
_RECORDS: Final = 64  # kept however old: a share of 0.05 of calls of a second each needs twenty of them to show


class _Record:
    __slots__ = ("at", "opportunity", "served")

    def __init__(self, at: float) -> None:
        self.at = at
        self.opportunity = [0.0] * len(Priority)
        self.served = [0.0] * len(Priority)


class ShareWindow:
    """Of the engine time spent while a class was backlogged: how much was spent on it.

    The window is the last second, or the last 64 records where calls are long.
    """

    __slots__ = ("_opportunity", "_records", "_served", "shares")

    def __init__(self, shares: Mapping[Priority, float]) -> None:
        self.shares = shares
        self._records: deque[_Record] = deque()
        self._opportunity = [0.0] * len(Priority)
        self._served = [0.0] * len(Priority)

    def record(self, now: float, cost_by_class: Sequence[float], backlog: Sequence[bool]) -> None:
        """One call ended at `now`; `cost_by_class` divides its seconds among the classes of its rows."""
        records = self._records
        if not records or now - records[-1].at > _GRAIN:
            records.append(_Record(now))
            self._forget(now)
        newest = records[-1]
        total = sum(cost_by_class)
        for priority in (Priority.THROUGHPUT, Priority.BACKGROUND):
            cost = cost_by_class[priority]
            if cost or backlog[priority]:
                newest.served[priority] += cost
                newest.opportunity[priority] += total
                self._served[priority] += cost
                self._opportunity[priority] += total

    def due(self, priority: Priority) -> bool:
        """Whether the class, backlogged now, has had less than its share."""
        return self._served[priority] < self.shares.get(priority, 0.0) * self._opportunity[priority]

    def _forget(self, now: float) -> None:
        records = self._records
        while len(records) > _RECORDS and records[0].at < now - _WINDOW:
            old = records.popleft()
            for priority in Priority:
                self._served[priority] -= old.served[priority]
                self._opportunity[priority] -= old.opportunity[priority]


class TenantLedger:
    """Engine seconds served by tenant. The tenant with the least goes first.

    A tenant that was idle comes back level with the least served of the active ones: it is not owed its absence.
    """

    __slots__ = ("_active", "cost")

    _IDLE_KEPT: Final = 4096

    def __init__(self) -> None:
        self.cost: dict[str | None, float] = {}
        self._active: dict[str | None, int] = {}

    def arrive(self, tenant: str | None) -> None:
        active = self._active.get(tenant, 0)
        if not active:
            level = min((self.cost[other] for other in self._active), default=0.0)
            self.cost[tenant] = max(self.cost.pop(tenant, 0.0), level)
            self._active[tenant] = 0
            self._forget()
        self._active[tenant] = active + 1

    def leave(self, tenant: str | None) -> None:
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]

    def charge(self, tenant: str | None, seconds: float) -> None:
        if tenant in self.cost:
            self.cost[tenant] += seconds

    def _forget(self) -> None:
        if len(self.cost) > len(self._active) + self._IDLE_KEPT:
            oldest = next(tenant for tenant in self.cost if tenant not in self._active)
            del self.cost[oldest]
