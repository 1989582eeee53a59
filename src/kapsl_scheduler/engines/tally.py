"""What every adapter counts: calls, rows, errors and busy time, from any number of slots at once.

Nothing else is shared between adapters.
"""

from __future__ import annotations

import threading

from kapsl_scheduler.types import EngineMetrics, ModelInfo, Tensors

__all__ = ["CallTally", "RowCounter"]


class CallTally:
    """Counts since the last `reset`. Several slots may add at once.

    One uncontended lock per engine call, not per request: measured at 0.15 µs, and counts per thread that
    need no lock cost as much.
    """

    __slots__ = ("_busy_time", "_calls", "_errors", "_lock", "_rows")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Back to zero."""
        with self._lock:
            self._calls = self._rows = self._errors = 0
            self._busy_time = 0.0

    def add(self, rows: int, elapsed: float, *, failed: bool = False) -> None:
        """Count one finished call that took `elapsed` seconds; the rows of a failed one do not count."""
        with self._lock:
            self._calls += 1
            self._busy_time += elapsed
            if failed:
                self._errors += 1
            else:
                self._rows += rows

    def total(self) -> EngineMetrics:
        """The counts, all of the same moment."""
        with self._lock:
            return EngineMetrics(self._calls, self._rows, self._errors, self._busy_time)


class RowCounter:
    """Counts the rows of a batch for a model: the length of its first batched input (of the first input at
    all, on axis 0, where the model declares none). One row for a model that never batches."""

    __slots__ = ("_axis", "_batchable", "_name")

    def __init__(self, info: ModelInfo) -> None:
        batched = [spec for spec in info.inputs if spec.batch_axis is not None]
        self._batchable = info.batchable
        self._name = batched[0].name if batched else None
        self._axis = (batched[0].batch_axis or 0) if batched else 0

    def __call__(self, inputs: Tensors) -> int:
        if not self._batchable:
            return 1
        array = next(iter(inputs.values()), None) if self._name is None else inputs.get(self._name)
        return int(array.shape[self._axis]) if array is not None and array.ndim > self._axis else 1
