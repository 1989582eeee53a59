"""From a model's measured latency curve to the batch size and the queue delay that keep a latency goal.

The policy: a batch of B rows that comes while the engine has just begun another waits for that one and then takes its
own time, so B fits where twice the p99 of its calls keeps the goal. Nexus bounds its batches by that condition, twice
the latency of a batch within the objective (Shen et al., "Nexus: A GPU Cluster Engine for Accelerating DNN-Based Video
Analysis", SOSP 2019). Of the sizes that fit, the most rows a second win, and among those that are about as good the
smallest. The delay is then what the goal leaves, in the order in which Triton's guide has its dynamic batcher tuned:
the size first, then more delay while the latency allows it. But it is no more than a call takes: where requests come so
fast that it matters, a batch fills while a call runs.

What is not here: the measuring (`cli_tune`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

__all__ = ["Measured", "Recommendation", "recommend"]

_ABOUT: Final = 0.05  # throughputs within this fraction count as equal: so far apart two measurements are anyway


class Measured(msgspec.Struct, frozen=True):
    """Calls of so many rows: how many were made, and their seconds."""

    rows: int
    median: float
    p99: float
    calls: int = 1

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.median


class Recommendation(msgspec.Struct, frozen=True):
    """`max_batch_size` in rows, `max_queue_delay` in seconds. `worst` is the delay and
    twice the p99 in seconds, which a request takes at most while no more than a batch waits; `keeps_goal` is whether
    that is within the goal."""

    max_batch_size: int
    max_queue_delay: float
    worst: float
    rows_per_second: float
    keeps_goal: bool


def recommend(curve: Sequence[Measured], goal: float = math.inf) -> Recommendation:
    """What to set for a goal in seconds; infinite: the most rows a second, and no delay.

    Where not even the fastest size keeps the goal, that one is recommended, and `keeps_goal` is False. Raises
    `ValueError` for a curve without points and for a goal that is not above 0.
    """
    if not curve:
        raise ValueError("curve: expected at least one point, got none")
    if not goal > 0:
        raise ValueError(f"goal: expected more than 0 seconds, got {goal}")
    fitting = [point for point in curve if 2 * point.p99 <= goal]
    if not fitting:
        fastest = min(curve, key=lambda point: (point.p99, point.rows))
        return Recommendation(fastest.rows, 0.0, 2 * fastest.p99, fastest.rows_per_second, False)
    most = max(point.rows_per_second for point in fitting)
    chosen = min(
        (point for point in fitting if point.rows_per_second >= (1 - _ABOUT) * most), key=lambda point: point.rows
    )
    worst = 2 * chosen.p99
    # A batch of one row is full at once: there is nothing to wait for.
    delay = 0.0 if chosen.rows == 1 or math.isinf(goal) else min(goal - worst, chosen.median)
    return Recommendation(chosen.rows, delay, worst + delay, chosen.rows_per_second, True)
