"""One contract for every engine: each adapter in each of its forms, and the fakes of `kapsl_scheduler.testing`."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler.engines import CallableEngine, OnnxEngine
from kapsl_scheduler.errors import InferenceError, InvalidInput, ModelNotLoaded
from kapsl_scheduler.ports import Engine
from kapsl_scheduler.testing import FakeAsyncEngine, FakeEngine, Fault, FaultPlan
from kapsl_scheduler.types import ModelInfo, Tensors, numpy_dtype
from tests.engines import onnx_models

MARKER = 7777.0
"""A value that makes the callables and the fakes fail."""


class MarkerError(Exception):
    """What the callables raise."""


# ------------------------------------------------------------------------------------------- the cases


def floats(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


def dense_inputs(rng: np.random.Generator, rows: int) -> Tensors:
    return {"x": floats(rng, rows, 4)}


def recurrent_inputs(rng: np.random.Generator, rows: int) -> Tensors:
    return {"input": floats(rng, rows, 6), "state": floats(rng, 2, rows, 5), "sr": np.array(16_000, dtype=np.int64)}


def text_inputs(rng: np.random.Generator, rows: int) -> Tensors:
    words = np.array(["zwölf", "Boxkämpfer", "jagen", ""], dtype=object)
    return {"text": rng.choice(words, size=(rows, 2))}


def wrong_dtype(inputs: Tensors) -> Tensors:
    name, array = next(iter(inputs.items()))
    return {**inputs, name: np.zeros(array.shape, dtype=np.int32)}


def marked(inputs: Tensors) -> Tensors:
    name, array = next(iter(inputs.items()))
    return {**inputs, name: np.full_like(array, MARKER)}


def halve(x: Any) -> Any:
    if np.any(x == MARKER):
        raise MarkerError("the marker came")
    return x / 2


async def halve_async(x: Any) -> Any:
    return halve(x)


def halve_in_chunks(x: Any) -> Iterator[Any]:
    for _ in range(3):
        yield halve(x)


async def halve_in_chunks_async(x: Any) -> AsyncIterator[Any]:
    for chunk in halve_in_chunks(x):
        yield chunk


def sum_and_difference(a: Any, b: Any) -> dict[str, Any]:
    return {"sum": halve(a) + b, "difference": halve(a) - b}


def faulty() -> FaultPlan:
    return FaultPlan(Fault(value=MARKER, error=InferenceError))


XY: dict[str, Any] = {
    "inputs": {"x": ("float32", (None, 4))},
    "outputs": {"y": ("float32", (None, 4))},
}


@dataclass(frozen=True)
class Case:
    """An engine: how to make it, valid inputs of some rows, inputs that it refuses and how, its stream's chunks."""

    make: Callable[[Path], Any]
    inputs: Callable[[np.random.Generator, int], Tensors] = dense_inputs
    spoil: Callable[[Tensors], Tensors] = wrong_dtype
    error: type[Exception] = InvalidInput
    chunks: int = 1


def onnx_case(build: Callable[[], Any], **fields: Any) -> Case:
    return Case(lambda folder: OnnxEngine(onnx_models.saved(folder / "model.onnx", build())), **fields)


def callable_case(function: Callable[..., Any], *, chunks: int = 1, **options: Any) -> Case:
    return Case(lambda _: CallableEngine(function, **{**XY, **options}), dense_inputs, marked, MarkerError, chunks)


def fake_case(make: Callable[..., Any], *, chunks: int = 1, **options: Any) -> Case:
    return Case(lambda _: make(faults=faulty(), chunks=chunks, **options), dense_inputs, marked, InferenceError, chunks)


CASES = {
    "onnx": onnx_case(onnx_models.dense),
    "onnx with a state on axis 1 and a scalar": onnx_case(onnx_models.recurrent, inputs=recurrent_inputs),
    "onnx with a fixed batch": onnx_case(lambda: onnx_models.dense(rows=1)),
    "onnx with strings": onnx_case(onnx_models.doubled_text, inputs=text_inputs),
    "onnx with open inner dimensions": onnx_case(onnx_models.lengths),
    "onnx with external data": Case(lambda f: OnnxEngine(onnx_models.save_with_external_data(f / "model.onnx"))),
    "onnx on another provider": Case(
        lambda f: OnnxEngine(onnx_models.saved(f / "model.onnx", onnx_models.dense()), providers=["azure"])
    ),
    "callable": callable_case(halve),
    "callable of one request": callable_case(halve, batched=False),
    "callable, nothing declared": callable_case(halve, inputs=None, outputs=None),
    "callable with several inputs": Case(
        lambda _: CallableEngine(sum_and_difference),
        lambda rng, rows: {"a": floats(rng, rows, 4), "b": floats(rng, rows, 4)},
        marked,
        MarkerError,
    ),
    "callable, coroutine function": callable_case(halve_async),
    "callable, generator function": callable_case(halve_in_chunks, chunks=3),
    "callable, async generator function": callable_case(halve_in_chunks_async, chunks=3),
    "fake": fake_case(FakeEngine),
    "fake that streams": fake_case(FakeEngine, chunks=3),
    "fake, nothing declared": fake_case(FakeEngine, info=ModelInfo("fake", batchable=True)),
    "async fake": fake_case(FakeAsyncEngine),
    "async fake that streams": fake_case(FakeAsyncEngine, chunks=3),
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2024)


@pytest.fixture
async def engine(case: Case, tmp_path: Path) -> AsyncIterator[Any]:
    """The case's engine, loaded and warm."""
    made = case.make(tmp_path)
    await settled(made.load())
    await settled(made.warmup())
    yield made
    await settled(made.unload())


# ----------------------------------------------------------------------- sync and async engines alike


async def settled(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


async def chunks_of(engine: Any, inputs: Tensors) -> list[Tensors]:
    stream = engine.infer_stream(inputs)
    return [chunk async for chunk in stream] if hasattr(stream, "__aiter__") else list(stream)


def rows_of(engine: Any, wanted: int) -> int:
    """As many rows as one call may have."""
    info = engine.model_info()
    return wanted if info.batchable else 1


def row(info: ModelInfo, tensors: Tensors, number: int, *, outputs: bool = False) -> Tensors:
    """One row of a batch, with its batch axis."""
    axes = {spec.name: spec.batch_axis for spec in (info.outputs if outputs else info.inputs)}
    taken = {name: axes.get(name, 0) for name in tensors}
    return {
        name: array if (axis := taken[name]) is None else np.take(array, [number], axis)
        for name, array in tensors.items()
    }


def assert_same(came: Tensors, expected: Tensors) -> None:
    assert came.keys() == expected.keys()
    for name, array in came.items():
        if array.dtype == object:
            np.testing.assert_array_equal(array, expected[name])
        else:
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- the contract


async def test_it_has_the_form_of_an_engine(engine: Any) -> None:
    assert isinstance(engine, Engine)
    assert isinstance(engine.retry, bool)
    assert isinstance(engine.bounded_call, bool)
    assert engine.max_streams >= 0
    is_async = inspect.iscoroutinefunction(engine.infer)
    assert is_async == inspect.isasyncgenfunction(engine.infer_stream)


async def test_nothing_runs_before_load_and_after_unload(case: Case, tmp_path: Path, rng: Any) -> None:
    engine = case.make(tmp_path)
    inputs = case.inputs(rng, 1)
    assert not await settled(engine.health_check())
    with pytest.raises(ModelNotLoaded):
        await settled(engine.infer(inputs))
    with pytest.raises(ModelNotLoaded):
        await chunks_of(engine, inputs)
    await settled(engine.load())
    await settled(engine.unload())
    assert not await settled(engine.health_check())
    with pytest.raises(ModelNotLoaded):
        await settled(engine.infer(inputs))


async def test_it_can_be_loaded_again(case: Case, engine: Any, rng: Any) -> None:
    inputs = case.inputs(rng, 1)
    first = await settled(engine.infer(inputs))
    info = engine.model_info()
    await settled(engine.unload())
    await settled(engine.load())
    await settled(engine.warmup())
    assert engine.metrics().calls == 0
    assert engine.model_info() == info
    assert_same(await settled(engine.infer(inputs)), first)


async def test_a_second_load_changes_nothing(case: Case, engine: Any, rng: Any) -> None:
    await settled(engine.infer(case.inputs(rng, 1)))
    before = engine.metrics()
    await settled(engine.load())
    assert engine.metrics() == before


async def test_model_info_is_the_same_for_every_engine_of_a_model(case: Case, engine: Any, tmp_path: Path) -> None:
    other = case.make(tmp_path)
    await settled(other.load())
    assert other.model_info() == engine.model_info()
    await settled(other.unload())


async def test_batch_axes_are_all_there_or_none_is(engine: Any) -> None:
    info = engine.model_info()
    axes = [spec.batch_axis for spec in info.inputs]
    outputs = [spec.batch_axis for spec in info.outputs]
    if info.batchable:
        assert not axes or any(axis is not None for axis in axes)
        assert None not in outputs
    else:
        assert set(axes + outputs) <= {None}


async def test_outputs_are_what_the_model_declares(case: Case, engine: Any, rng: Any) -> None:
    info = engine.model_info()
    rows = rows_of(engine, 3)
    outputs = await settled(engine.infer(case.inputs(rng, rows)))
    assert isinstance(outputs, dict)
    if info.outputs:
        assert list(outputs) == [spec.name for spec in info.outputs]
    for spec in info.outputs:
        array = outputs[spec.name]
        assert array.dtype == numpy_dtype(spec.dtype)
        for axis, (size, declared) in enumerate(zip(array.shape, spec.shape, strict=True)):
            assert declared == size or not isinstance(declared, int)
            assert axis != spec.batch_axis or size == rows


async def test_inputs_are_left_alone(case: Case, engine: Any, rng: Any) -> None:
    inputs = case.inputs(rng, rows_of(engine, 3))
    before = {name: array.copy() for name, array in inputs.items()}
    await settled(engine.infer(inputs))
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, before[name])


async def test_rows_are_independent(case: Case, engine: Any, rng: Any) -> None:
    info = engine.model_info()
    rows = rows_of(engine, 5)
    batch = case.inputs(rng, rows)
    outputs = await settled(engine.infer(batch))
    for number in range(rows):
        alone = await settled(engine.infer(row(info, batch, number)))
        assert_same(alone, row(info, outputs, number, outputs=True))


async def test_a_stream_ends_with_what_infer_answers(case: Case, engine: Any, rng: Any) -> None:
    inputs = case.inputs(rng, 1)
    chunks = await chunks_of(engine, inputs)
    assert len(chunks) == case.chunks
    assert_same(chunks[-1], await settled(engine.infer(inputs)))


async def test_a_stream_that_is_closed_early_is_no_error(case: Case, engine: Any, rng: Any) -> None:
    inputs = case.inputs(rng, 1)
    stream = engine.infer_stream(inputs)
    if hasattr(stream, "__aiter__"):
        await anext(stream)
        await stream.aclose()
        assert [chunk async for chunk in stream] == []
    else:
        next(stream)
        stream.close()
        assert list(stream) == []
    assert engine.metrics().errors == 0
    assert len(await chunks_of(engine, inputs)) == case.chunks


async def test_a_failed_call_has_its_error_and_harms_no_other(case: Case, engine: Any, rng: Any) -> None:
    good = case.inputs(rng, 1)
    with pytest.raises(case.error) as caught:
        await settled(engine.infer(case.spoil(good)))
    assert str(caught.value)
    with pytest.raises(case.error):
        await chunks_of(engine, case.spoil(good))
    await settled(engine.infer(good))
    assert await settled(engine.health_check())
    metrics = engine.metrics()
    assert (metrics.calls, metrics.errors, metrics.rows) == (3, 2, 1)


async def test_metrics_grow_with_calls_and_rows(case: Case, engine: Any, rng: Any) -> None:
    rows = rows_of(engine, 4)
    assert engine.metrics().calls == 0
    for _ in range(3):
        await settled(engine.infer(case.inputs(rng, rows)))
    metrics = engine.metrics()
    assert (metrics.calls, metrics.rows, metrics.errors) == (3, 3 * rows, 0)
    assert metrics.busy_time >= 0
    assert await settled(engine.health_check())


async def test_for_cpu_is_the_same_model_on_the_cpu(case: Case, engine: Any, rng: Any) -> None:
    on_cpu = engine.for_cpu()
    await settled(on_cpu.load())
    assert on_cpu.for_cpu() is on_cpu
    assert on_cpu.model_info() == engine.model_info()
    inputs = case.inputs(rng, 1)
    assert_same(await settled(on_cpu.infer(inputs)), await settled(engine.infer(inputs)))


async def test_calls_may_overlap(case: Case, engine: Any, rng: Any) -> None:
    callers, calls = 4, 8
    work = [[case.inputs(rng, rows_of(engine, 2)) for _ in range(calls)] for _ in range(callers)]
    expected = [[await settled(engine.infer(inputs)) for inputs in share] for share in work]
    came: list[list[Tensors]] = [[] for _ in range(callers)]
    if inspect.iscoroutinefunction(engine.infer):

        async def caller(number: int) -> None:
            for inputs in work[number]:
                came[number].append(await engine.infer(inputs))

        await asyncio.gather(*map(caller, range(callers)))
    else:
        gate = threading.Barrier(callers)

        def thread(number: int) -> None:
            gate.wait()
            came[number].extend(engine.infer(inputs) for inputs in work[number])

        threads = [threading.Thread(target=thread, args=(number,)) for number in range(callers)]
        for started in threads:
            started.start()
        for started in threads:
            started.join()
    for share, right in zip(came, expected, strict=True):
        for outputs, answer in zip(share, right, strict=True):
            assert_same(outputs, answer)
    assert engine.metrics().calls == 2 * callers * calls
