"""What is to go wrong in a fake engine, and when: seeded, so that a failing run can be run again.

Faults are data; the fake engines act on them.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np

from kapsl_scheduler.types import Tensors

__all__ = ["Fault", "FaultPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong, on every call that meets all of its conditions.

    Conditions: `calls` holds the call's number (the first is 1); an element of an input equals `value`; a
    draw of the plan's generator falls below `probability`. A condition that is not given always holds.

    Effects: the call takes `delay` seconds longer; it hangs until the engine's `release()` (`hang`); it
    raises `error`. An `error` of class `Unavailable` also loses the engine: its calls raise it until
    `failed_checks` health checks have failed.
    """

    calls: Container[int] | None = None
    value: Any = None
    probability: float = 1.0
    delay: float = 0.0
    hang: bool = False
    error: Exception | type[Exception] | None = None
    failed_checks: int = 1

    def strikes(self, call: int, inputs: Tensors, rng: random.Random) -> bool:
        """Whether it happens to this call. Draws from `rng` only if all its other conditions hold."""
        if self.calls is not None and call not in self.calls:
            return False
        if self.value is not None and not any(np.any(array == self.value) for array in inputs.values()):
            return False
        return self.probability >= 1.0 or rng.random() < self.probability

    def exception(self) -> Exception | None:
        """The error to raise: a new instance for each call, lest several tasks raise the same one."""
        if self.error is None or isinstance(self.error, type):
            return self.error("a planned fault") if self.error else None
        return type(self.error)(*self.error.args)


class FaultPlan:
    """Faults in order of precedence: the first that strikes is the one that a call has.

    Engines that are given the same plan share its count of calls and its generator. With one thread (or
    virtual time) the same `seed` gives the same faults.
    """

    def __init__(self, *faults: Fault, seed: int = 0) -> None:
        self._faults = faults
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._calls = 0

    def next_call(self, inputs: Tensors) -> Fault | None:
        """Count a call and say what goes wrong in it."""
        with self._lock:
            self._calls += 1
            for fault in self._faults:
                if fault.strikes(self._calls, inputs, self._rng):
                    return fault
        return None
