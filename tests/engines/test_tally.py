"""Counting calls: right from any number of threads, and rows as the model has them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from kapsl_scheduler.engines.tally import CallTally, RowCounter
from kapsl_scheduler.types import EngineMetrics, ModelInfo, TensorSpec


def test_it_counts_calls_rows_errors_and_time() -> None:
    tally = CallTally()
    tally.add(4, 0.5)
    tally.add(9, 0.25, failed=True)
    assert tally.total() == EngineMetrics(calls=2, rows=4, errors=1, busy_time=0.75)
    tally.reset()
    assert tally.total() == EngineMetrics()


def test_no_count_is_lost_between_threads() -> None:
    tally = CallTally()
    gate = threading.Barrier(4)

    def add() -> None:
        gate.wait()
        for _ in range(2000):
            tally.add(3, 0.5)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.total() == EngineMetrics(calls=8000, rows=24_000, errors=0, busy_time=4000.0)


def info(*inputs: TensorSpec, batchable: bool = True) -> ModelInfo:
    return ModelInfo("m", inputs, batchable=batchable)


def zeros(*shape: int) -> Any:
    return np.zeros(shape, dtype=np.float32)


def test_rows_are_those_of_the_first_batched_input() -> None:
    counter = RowCounter(
        info(TensorSpec("sr", "int64", ()), TensorSpec("state", "float32", (2, "N", 5), 1), TensorSpec("x", "f", (), 0))
    )
    assert counter({"sr": zeros(), "state": zeros(2, 7, 5), "x": zeros(9)}) == 7


def test_rows_without_declared_inputs_are_those_of_axis_0() -> None:
    assert RowCounter(info())({"anything": zeros(6, 2)}) == 6
    assert RowCounter(info())({"anything": zeros()}) == 1
    assert RowCounter(info())({}) == 1


def test_a_model_that_never_batches_has_one_row_a_call() -> None:
    assert RowCounter(info(batchable=False))({"x": zeros(6, 2)}) == 1
