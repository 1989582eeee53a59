"""Warm-up runs: an engine whose calls are bounded by their shapes is measured before there is traffic.

What is not here: what the figures decide (runtime.worker), the model that they feed (core.latency).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from kapsl_scheduler.core.admission import Admission
from kapsl_scheduler.core.latency import LatencyTable
from kapsl_scheduler.ports import Clock, Engine
from kapsl_scheduler.types import Array, ModelInfo, numpy_dtype

__all__ = ["slowest_size"]

_RUNS: Final = 24
_LONG: Final = 0.01  # seconds


def slowest_size(
    engine: Engine, admission: Admission, latency: LatencyTable, clock: Clock, max_rows: int
) -> float | None:
    """Run zeros of 1, 2, 4, … `max_rows` rows and return the seconds of the slowest size: the fastest of its runs,
    since what else the machine does only adds time. A size whose first run is long is not run again, and is the last.
    Every run is entered in `latency`. None if zeros cannot be made, or are not to the engine's taste."""
    info = admission.info
    if any(spec.dtype == "string" for spec in info.inputs):
        return None
    slowest = 0.0
    for rows in _sizes(max_rows if info.batchable else 1):
        inputs = _zeros(info, rows)
        if inputs is None:
            return None
        model = latency[admission.normalise(inputs)[2]]
        times = []
        for _ in range(_RUNS):
            started = clock()
            try:
                engine.infer(inputs)
            except Exception:
                return None
            ended = clock()
            times.append(ended - started)
            model.observe(rows, times[-1], ended)
            if times[0] > _LONG:
                return times[0]
        slowest = max(slowest, min(times))
    return slowest


def _sizes(max_rows: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 < max_rows:
        sizes.append(sizes[-1] * 2)
    return sizes if max_rows == 1 else [*sizes, max_rows]


def _zeros(info: ModelInfo, rows: int) -> dict[str, Array] | None:
    arrays: dict[str, Array] = {}
    for spec in info.inputs:
        sizes = [rows if axis == spec.batch_axis else size for axis, size in enumerate(spec.shape)]
        if not all(isinstance(size, int) for size in sizes):
            return None
        arrays[spec.name] = np.zeros([int(size or 0) for size in sizes], numpy_dtype(spec.dtype))
    return arrays
