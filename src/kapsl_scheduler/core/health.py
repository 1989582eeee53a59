"""Budgets that keep failure from multiplying work.

What is not here: what is retried and where (runtime, and the pool's routing).
"""

from __future__ import annotations

from typing import Final

__all__ = ["RetryBudget"]


class RetryBudget:
    """A retry costs one token; every call earns a fifth of one and every second ten (tower's retry budget).

    So retries stay within 20 % of recent calls + 10 a second. At most `_LIMIT` tokens are saved up: what ten
    seconds earn by themselves.
    """

    __slots__ = ("_at", "_tokens")

    _PER_CALL: Final = 0.2
    _PER_SECOND: Final = 10.0
    _LIMIT: Final = 100.0

    def __init__(self, now: float) -> None:
        self._tokens = self._LIMIT
        self._at = now

    def earn(self, calls: int) -> None:
        """Requests that were answered without a retry earn tokens."""
        self._tokens = min(self._LIMIT, self._tokens + self._PER_CALL * calls)

    def take(self, now: float) -> bool:
        """Spend one token if there is one."""
        self._tokens = min(self._LIMIT, self._tokens + self._PER_SECOND * max(now - self._at, 0.0))
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
