"""The engines that the benchmarks run: the digits model without anything around it, and devices made of time.

A device made of time is a serial accelerator in its cost alone: so many seconds a call, so many a row, the
interpreter released meanwhile. It records its calls, so that a suite sees what was really run and when. What loads
them lives in the suites.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.machine import ROOT
from benchmarks.stats import median
from kapsl_scheduler.engines import CallableEngine, OnnxEngine
from kapsl_scheduler.types import Array, Tensors

__all__ = [
    "DIGITS",
    "Call",
    "Device",
    "WatchedOnnxEngine",
    "calibrate_sleep",
    "direct_rate",
    "open_digits",
    "random_rows",
]

DIGITS: Final = ROOT / "models" / "digits" / "digits.onnx"
_PIXELS: Final = 64


# ---------------------------------------------------------------------------------------------------- digits


def open_digits(model: Path) -> Callable[[Array], Array]:
    """The bare ONNX Runtime session of the digits model, one thread: rows [n, 64] in, rows [n, 10] out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    pixels = session.get_inputs()[0].name
    run = session.run

    def infer(rows: Array) -> Array:
        answer: Array = run(None, {pixels: rows})[0]
        return answer

    return infer


class WatchedOnnxEngine(OnnxEngine):
    """The engine as it ships, which counts on which thread it is called.

    Made on the event loop's thread. With `own_thread` it declares its calls unbounded, so that it always keeps to a
    thread of its own.
    """

    def __init__(self, path: Path, *, own_thread: bool = False) -> None:
        super().__init__(path)
        self._own_thread = own_thread
        self._loop_thread = threading.get_ident()
        self.forget_calls()

    def forget_calls(self) -> None:
        """Count anew."""
        self.on_loop = self.off_loop = 0

    def load(self) -> None:
        super().load()
        if self._own_thread:
            self.bounded_call = False

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        if threading.get_ident() == self._loop_thread:
            self.on_loop += 1
        else:
            self.off_loop += 1
        return super().infer(inputs)

    @property
    def loop_share(self) -> float:
        """The fraction of its calls that ran on the event loop's thread."""
        return self.on_loop / max(self.on_loop + self.off_loop, 1)


def random_rows(count: int) -> Array:
    """Images [count, 64], float32 in [0, 1): the model's time does not depend on what they show."""
    return np.random.default_rng(0).random((count, _PIXELS), np.float32)


def direct_rate(function: Callable[[Array], Any], batch: Array, seconds: float) -> float:
    """Rows per second of the function called on that batch again and again, with nothing in between."""
    calls = 0
    start = time.perf_counter()
    stop = start + seconds
    while (now := time.perf_counter()) < stop:
        function(batch)
        calls += 1
    return calls * len(batch) / (now - start)


# --------------------------------------------------------------------------------------------------- devices


class Call(msgspec.Struct, gc=False):
    """One call of a device: `time.perf_counter()` seconds of its begin and end, and the rows it was given."""

    start: float
    stop: float
    rows: Array


class Device:
    """A device whose call takes `per_call + per_row * rows` seconds, one call after another.

    `overshoot` is how much longer `time.sleep` takes than it is told (`calibrate_sleep`). There is no spinning
    for the rest: a spin would fight the event loop for the interpreter, as no real device does.
    """

    def __init__(self, per_call: float, per_row: float = 0.0, *, overshoot: float = 0.0) -> None:
        self.per_call = per_call
        self.per_row = per_row
        self.overshoot = overshoot
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def seconds(self, rows: int) -> float:
        """What a call of so many rows costs."""
        return self.per_call + self.per_row * rows

    def rows_within(self, seconds: float, at_most: int) -> int:
        """The most rows, from 1 to `at_most`, whose call fits into that time."""
        if not self.per_row:
            return at_most
        return max(1, min(at_most, math.floor((seconds - self.per_call) / self.per_row + 1e-9)))

    def __call__(self, rows: Array) -> Array:
        """One call: the rows come back as they are."""
        start = time.perf_counter()
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(max(self.seconds(len(rows)) - self.overshoot - (time.perf_counter() - start), 0.0))
        with self._lock:
            self._at_once -= 1
        self.calls.append(Call(start, time.perf_counter(), rows))
        return rows

    def engine(self, columns: int) -> CallableEngine:
        """An engine over this device for rows of so many float64 numbers."""
        return CallableEngine(self, name="device", inputs={"row": ("float64", (None, columns))})


def calibrate_sleep(seconds: float, rounds: int = 40) -> float:
    """By how much `time.sleep(seconds)` overshoots on this machine, in the median."""
    excess: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        time.sleep(seconds)
        excess.append(time.perf_counter() - start - seconds)
    return max(median(excess), 0.0)
