"""The engine's own measured latency model: how long a call of n rows takes, learned from the calls themselves.

Two questions are asked of it and they err in opposite directions on purpose:
`upper` bounds what a batch may cost (filling, slices, cuts), so where nothing was measured it assumes the worst
that the measurements allow; `lower` decides who is already too late, so it never condemns a request on a guess.
What is not here: the decisions themselves (core.forming).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from typing import Final

from kapsl_scheduler.core.batch import Shape

__all__ = ["Deviation", "LatencyModel", "LatencyTable"]

_SAMPLES: Final = 5  # a median of five shrugs off two outliers
_TRUSTED: Final = 3  # so few samples may all be a first call's compilation: no request is condemned on them
_STALE: Final = 1.0  # seconds; older estimates condemn nobody, so that one call goes through and measures anew
_SHAPES: Final = 256


class LatencyModel:
    """Seconds by rows for one engine and one shape. For each row count: the median of its last five calls."""

    __slots__ = ("_estimates", "_last", "_observed", "_recent", "_rows")

    def __init__(self) -> None:
        self._rows: list[int] = []  # measured row counts, ascending
        self._estimates: list[float] = []  # seconds, parallel to _rows
        self._recent: dict[int, list[float]] = {}
        self._observed = 0
        self._last = 0.0

    def observe(self, rows: int, seconds: float, now: float) -> None:
        """Learn from one call that ended at `now`."""
        self._last = now
        self._observed += 1
        recent = self._recent.get(rows)
        if recent is None:
            at = bisect_left(self._rows, rows)
            self._recent[rows] = [seconds]
            self._rows.insert(at, rows)
            self._estimates.insert(at, seconds)
            return
        if len(recent) == _SAMPLES:
            del recent[0]
        recent.append(seconds)
        self._estimates[bisect_left(self._rows, rows)] = sorted(recent)[(len(recent) - 1) // 2]

    def upper(self, rows: int) -> float | None:
        """Seconds that a call of `rows` rows should not exceed; None if this shape was never measured.

        Between measurements: linear. Below the smallest: the smallest's. Above the largest: along the line from
        the smallest to the largest, or through the origin if only one row count is known.
        """
        known, estimates = self._rows, self._estimates
        if not known:
            return None
        at = bisect_left(known, rows)
        if at == len(known):
            largest = estimates[-1]
            if len(known) == 1:
                return largest * rows / known[0]
            slope = (largest - estimates[0]) / (known[-1] - known[0])
            return largest + max(slope, 0.0) * (rows - known[-1])
        if known[at] == rows or at == 0:
            return estimates[at]
        return self._between(at, rows)

    def lower(self, rows: int, now: float) -> float:
        """Seconds that a call of `rows` rows surely takes; 0 without enough fresh measurements."""
        if self._observed < _TRUSTED:
            return 0.0
        known, estimates = self._rows, self._estimates
        if now - self._last > max(_STALE, 10 * estimates[-1]):
            return 0.0
        at = bisect_left(known, rows)
        if at == len(known):
            return estimates[-1]
        if known[at] == rows:
            return estimates[at]
        return estimates[0] * rows / known[0] if at == 0 else self._between(at, rows)

    def rows_within(self, bound: float, at_least: int, at_most: int) -> int:
        """The most rows in [at_least, at_most] whose predicted time fits `bound`; `at_least` where none fits."""
        low, high = at_least, at_most
        while low < high:
            middle = (low + high + 1) // 2
            predicted = self.upper(middle)
            if predicted is not None and predicted <= bound:
                low = middle
            else:
                high = middle - 1
        return low

    def _between(self, at: int, rows: int) -> float:
        known, estimates = self._rows, self._estimates
        fraction = (rows - known[at - 1]) / (known[at] - known[at - 1])
        return estimates[at - 1] + fraction * (estimates[at] - estimates[at - 1])


class LatencyTable:
    """The latency models of one engine, one per shape; the least recently used is forgotten beyond 256 shapes."""

    __slots__ = ("_models",)

    def __init__(self) -> None:
        self._models: OrderedDict[Shape, LatencyModel] = OrderedDict()

    def __getitem__(self, shape: Shape) -> LatencyModel:
        model = self._models.get(shape)
        if model is None:
            model = self._models[shape] = LatencyModel()
            if len(self._models) > _SHAPES:
                self._models.popitem(last=False)
        elif len(self._models) > 1:
            self._models.move_to_end(shape)
        return model


class Deviation:
    """A running expectation that is seldom exceeded: the mean and four times the mean deviation, as TCP sets its
    retransmission timer (Jacobson, "Congestion avoidance and control", 1988). Seconds; 0 before the first sample."""

    __slots__ = ("_deviation", "_mean", "expected")

    def __init__(self) -> None:
        self._mean = 0.0
        self._deviation = 0.0
        self.expected = 0.0

    def observe(self, seconds: float) -> None:
        """Learn from one sample."""
        error = seconds - self._mean
        self._mean += error / 8
        self._deviation += (abs(error) - self._deviation) / 4
        self.expected = self._mean + 4 * self._deviation
