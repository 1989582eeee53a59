"""The few statistics that the benchmarks report. No sampling, no load and no formatting lives here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["median", "paired_ratios", "percentile", "rate_between"]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` percent of the values do not exceed (nearest rank).

    Nearest rank never invents a value between two measured ones, so a bimodal latency shows as what it is. NaN
    for no values.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent: expected 0 to 100, got {percent}")
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)]


def median(values: Sequence[float]) -> float:
    """The median, NaN for no values."""
    return statistics.median(values) if values else math.nan


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round, one over the other: what disturbed a whole round disturbs both and cancels out."""
    return [n / d if d else math.nan for n, d in zip(numerators, denominators, strict=True)]


def rate_between(stamps: Sequence[float], start: float, stop: float) -> float:
    """Completions per second in [start, stop), from the seconds at which each completed."""
    if stop <= start:
        raise ValueError(f"expected stop after start, got {start} and {stop}")
    return sum(start <= stamp < stop for stamp in stamps) / (stop - start)
