"""What is particular to functions as engines: how they are called, what they may return, which kind they are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.types import TensorSpec

X = np.array([[1.0], [2.0]], dtype=np.float32)


def loaded(function: Any, **options: Any) -> Any:
    engine = CallableEngine(function, **options)
    engine.load()
    return engine


# ------------------------------------------------------------------------------------- arguments, results


def test_one_input_is_positional_whatever_its_name() -> None:
    engine = loaded(lambda batch, /: batch + 1)
    np.testing.assert_array_equal(engine.infer({"pixels": X})["output_0"], X + 1)


def test_several_inputs_go_by_name() -> None:
    engine = loaded(lambda *, a, b: a - b)
    np.testing.assert_array_equal(engine.infer({"b": X, "a": 3 * X})["output_0"], 2 * X)


def test_a_tuple_is_named_in_order() -> None:
    assert list(loaded(lambda x: (x, x)).infer({"x": X})) == ["output_0", "output_1"]


def test_declared_outputs_name_what_has_no_name() -> None:
    declared = {"sum": ("float32", (None, 1)), "count": ("int64", (None,))}
    engine = loaded(lambda x: (x, np.zeros(2, dtype=np.int64)), outputs=declared)
    assert list(engine.infer({"x": X})) == ["sum", "count"]


def test_a_mapping_keeps_its_names() -> None:
    assert list(loaded(lambda x: {"b": x, "a": x}).infer({"x": X})) == ["b", "a"]


def test_what_numpy_takes_for_an_array_becomes_one() -> None:
    output = loaded(lambda x: [1.5, 2.5]).infer({"x": X})["output_0"]
    assert isinstance(output, np.ndarray)
    assert output.tolist() == [1.5, 2.5]


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: (value,), lambda value: {"y": value}])
@pytest.mark.parametrize("value", [(number for number in range(3)), object(), {1, 2}])
def test_an_object_that_is_no_array_is_no_answer(wrap: Any, value: Any) -> None:
    engine = loaded(lambda x: wrap(value))
    with pytest.raises(InferenceError, match=f"expected an array, got a {type(value).__name__}"):
        engine.infer({"x": X})


def test_a_single_string_is_an_answer() -> None:
    text = np.array("text", object)
    assert loaded(lambda x: text, batched=False).infer({"x": X})["output_0"] is text


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "expected an array, a tuple or a mapping, got nothing"),
        ((X,), "expected the outputs a, b, got 1 without names"),
        (X, "expected the outputs a, b, got 1 without names"),
        ({"a": X}, "expected the outputs a, b, got a"),
    ],
    ids=["nothing", "short tuple", "lone array", "short mapping"],
)
def test_results_that_are_not_the_declared_outputs(result: Any, message: str) -> None:
    declared = {"a": ("float32", (None, 1)), "b": ("float32", (None, 1))}
    engine = loaded(lambda x: result, outputs=declared)
    with pytest.raises(InferenceError, match=message):
        engine.infer({"x": X})
    assert engine.metrics().errors == 1


# ------------------------------------------------------------------------------------------ declarations


def test_nothing_declared_is_a_batchable_model_without_inputs() -> None:
    info = CallableEngine(lambda x: x).model_info()
    assert (info.inputs, info.outputs, info.batchable) == ((), (), True)


def test_shapes_in_short_are_batched_on_axis_0() -> None:
    engine = CallableEngine(lambda x: x, inputs={"x": ("fp32", (None, 64))})
    assert engine.model_info().inputs == (TensorSpec("x", "float32", (None, 64), 0),)


def test_a_spec_says_its_own_axis() -> None:
    given = {"state": TensorSpec("ignored", "float32", (2, "N"), 1), "sr": TensorSpec("sr", "int64", ())}
    engine = CallableEngine(lambda **_: X, inputs=given)
    assert engine.model_info().inputs == (
        TensorSpec("state", "float32", (2, "N"), 1),
        TensorSpec("sr", "int64", (), None),
    )


def test_a_function_of_one_request_has_no_batch_axis() -> None:
    engine = loaded(lambda x: x, batched=False, inputs={"x": ("float32", (None, 1))})
    assert not engine.model_info().batchable
    assert engine.model_info().inputs[0].batch_axis is None
    engine.infer({"x": X})
    assert engine.metrics().rows == 1


def test_name_and_options_are_kept() -> None:
    def tidy(x: Any) -> Any:
        return x

    engine = CallableEngine(tidy, max_streams=3, retry=False, bounded_call=True, version="4")
    assert (engine.model_info().name, engine.model_info().version) == ("tidy", "4")
    assert (engine.max_streams, engine.retry, engine.bounded_call) == (3, False, True)
    assert CallableEngine(tidy, name="other").model_info().name == "other"
    assert CallableEngine(functools.partial(tidy)).model_info().name == "tidy"


def test_by_default_it_is_retried_and_kept_off_the_loop() -> None:
    engine = CallableEngine(lambda x: x)
    assert (engine.max_streams, engine.retry, engine.bounded_call) == (0, True, False)


def test_declarations_are_checked() -> None:
    with pytest.raises(ValueError, match="x: there is no dtype 'float99'"):
        CallableEngine(lambda x: x, inputs={"x": ("float99", (None,))})
    with pytest.raises(TypeError, match="expected a callable, got int"):
        CallableEngine(3)  # type: ignore[arg-type]


def test_it_is_no_base_class() -> None:
    class Other(CallableEngine):
        pass

    with pytest.raises(TypeError, match="takes a function"):
        Other(lambda x: x)


# -------------------------------------------------------------------------------------- kinds of function


class Callable:
    def __call__(self, x: Any) -> Any:
        return x


class AsyncCallable:
    async def __call__(self, x: Any) -> Any:
        return x


class Model:
    async def predict(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("function", "is_async"),
    [
        (lambda x: x, False),
        (np.negative, False),
        (Callable(), False),
        (AsyncCallable(), True),
        (Model().predict, True),
        (functools.partial(AsyncCallable()), True),
    ],
    ids=["lambda", "ufunc", "object", "async object", "async method", "partial"],
)
def test_infer_is_a_coroutine_function_exactly_for_coroutine_functions(function: Any, is_async: bool) -> None:
    engine = CallableEngine(function)
    assert isinstance(engine, CallableEngine)
    assert inspect.iscoroutinefunction(engine.infer) is is_async


def words(x: Any) -> Iterator[Any]:
    for factor in (1, 2, 3):
        yield factor * x


async def words_async(x: Any) -> AsyncIterator[Any]:
    for chunk in words(x):
        yield chunk


def test_infer_of_a_generator_function_is_its_last_chunk() -> None:
    np.testing.assert_array_equal(loaded(words).infer({"x": X})["output_0"], 3 * X)


async def test_infer_of_an_async_generator_function_is_its_last_chunk() -> None:
    np.testing.assert_array_equal((await loaded(words_async).infer({"x": X}))["output_0"], 3 * X)


def silent(x: Any) -> Iterator[Any]:
    yield from ()


async def silent_async(x: Any) -> AsyncIterator[Any]:
    for chunk in silent(x):
        yield chunk


async def test_a_generator_that_yields_nothing_has_no_answer() -> None:
    with pytest.raises(InferenceError, match="got nothing"):
        loaded(silent).infer({"x": X})
    with pytest.raises(InferenceError, match="got nothing"):
        await loaded(silent_async).infer({"x": X})


def test_closing_a_stream_closes_the_function() -> None:
    closed = []

    def endless(x: Any) -> Iterator[Any]:
        try:
            while True:
                yield x
        finally:
            closed.append(True)

    stream = loaded(endless).infer_stream({"x": X})
    next(stream)
    stream.close()
    assert closed == [True]


async def test_closing_an_async_stream_closes_the_function() -> None:
    closed = []

    async def endless(x: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield x
        finally:
            closed.append(True)

    stream = loaded(endless).infer_stream({"x": X})
    await anext(stream)
    await stream.aclose()
    assert closed == [True]


def test_what_the_function_raises_is_untouched() -> None:
    problem = KeyError("a problem of its own")

    def fail(x: Any) -> Any:
        raise problem

    with pytest.raises(KeyError) as caught:
        loaded(fail).infer({"x": X})
    assert caught.value is problem
