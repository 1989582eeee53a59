"""Who may enter: a fault names the input, what came and what was expected; what is valid comes out as arrays."""

from __future__ import annotations

import gc
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.core.admission import Admission, RequestProfile, check_timeout, determine_priority
from kapsl_scheduler.core.batch import Layout, Shape
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.testing.strategies import inputs_for
from kapsl_scheduler.types import Array, ModelInfo, Priority, TensorSpec
from tests.core.build import pending


def admission(*specs: TensorSpec, batchable: bool = True, max_rows: int = 8) -> Admission:
    return Admission(ModelInfo("model", specs, batchable=batchable), max_rows)


def fault(model: Admission, inputs: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        model.admit(inputs)
    return str(caught.value)


def admitted(model: Admission, value: Any) -> tuple[dict[str, Array], int, Shape, bool, int]:
    """What is admitted, the inputs by their names."""
    inputs, rows, shape, bare, nbytes = model.admit(value)
    return dict(zip(shape.names, inputs, strict=True)), rows, shape, bare, nbytes


def f32(*shape: int) -> Array:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


DIGITS = admission(TensorSpec("x", "float32", ("N", 4), 0))
SPEECH = admission(
    TensorSpec("input", "float32", ("N", "length"), 0),
    TensorSpec("state", "float32", (2, "N", 3), 1),
    TensorSpec("sr", "int64", ()),
)
TEXT = admission(TensorSpec("text", "string", ("N", 1), 0))
OPEN = admission()
FIXED = admission(TensorSpec("image", "uint8", (1, None, 2)), batchable=False)


def speech(rows: int = 2, length: int = 5, **others: Any) -> dict[str, Any]:
    return {"input": f32(rows, length), "state": f32(2, rows, 3), "sr": np.array(8000), **others}


# ---------------------------------------------------------------------------------------- what is valid


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"x": x}])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_an_array_passes_as_it_is(form: Any, rows: int) -> None:
    x = f32(rows, 4)
    inputs, came, shape, bare, nbytes = admitted(DIGITS, form(x))
    assert inputs["x"] is x
    assert (came, bare, nbytes) == (rows, False, rows * 16)
    assert shape is DIGITS.admit(f32(1, 4))[2]
    assert shape.batchable


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"x": x}])
def test_an_array_that_lacks_just_the_batch_axis_is_one_row(form: Any) -> None:
    x = f32(4)
    inputs, rows, shape, bare, nbytes = admitted(DIGITS, form(x))
    assert (rows, bare, nbytes) == (1, True, 16)
    assert shape is DIGITS.admit(f32(2, 4))[2]
    assert np.shares_memory(inputs["x"], x)
    stacked = Layout(DIGITS.info).stack([pending(bare=True, inputs=inputs)])
    assert stacked["x"].shape == (1, 4)


def test_all_batched_inputs_must_lack_it_for_that() -> None:
    one = {"input": f32(5), "state": f32(2, 3), "sr": np.array(8000)}
    inputs, rows, shape, bare, _ = admitted(SPEECH, one)
    assert (rows, bare) == (1, True)
    assert (inputs["input"].shape, inputs["state"].shape, inputs["sr"].shape) == ((1, 5), (2, 1, 3), ())
    assert shape is SPEECH.admit(speech())[2]
    assert "input 'input': rank 1 (shape [5]), expected rank 2 (shape [N, length])" in fault(
        SPEECH, speech(input=f32(5))
    )


@pytest.mark.parametrize("value", [[[1, 2, 3, 4]], [[1.0, 2.0, 3.0, 4.0]], ((1, 2, 3, 4),), [np.float64([1, 2, 3, 4])]])
def test_lists_are_converted_to_the_models_dtype(value: Any) -> None:
    inputs, rows, _, bare, nbytes = admitted(DIGITS, value)
    assert inputs["x"].dtype == np.float32
    assert inputs["x"].tolist() == [[1, 2, 3, 4]]
    assert (rows, bare, nbytes) == (1, False, 16)


def test_so_are_scalars() -> None:
    inputs = admitted(SPEECH, speech(sr=16000))[0]
    assert (inputs["sr"].dtype, inputs["sr"].shape, int(inputs["sr"])) == (np.int64, (), 16000)
    single = admission(TensorSpec("x", "float64", ("N",), 0))
    assert admitted(single, 3)[0]["x"].tolist() == [3.0]
    assert single.admit(3)[3] is True


def test_what_offers_an_array_is_taken_for_one() -> None:
    class Tensor:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            return f32(2, 4)

    assert DIGITS.admit(Tensor())[1] == 2


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("int8", [-128, 127]),
        ("uint64", [2**64 - 1]),
        ("uint64", [1, 2**63]),
        ("uint8", [True, False]),
        ("bool", [1, 0]),
        ("float16", [1, True]),
        ("float32", [math.inf, 2.0**100]),
        ("int64", []),
        ("float64", [2**60]),
    ],
)
def test_plain_values_that_the_dtype_holds(dtype: str, value: list[Any]) -> None:
    model = admission(TensorSpec("x", dtype, (None,)))
    array = admitted(model, value)[0]["x"]
    assert array.dtype.name == dtype
    np.testing.assert_array_equal(array, value)


@pytest.mark.parametrize("text", [["a"], np.array([["a"]]), [["a"]], np.array([["a"]], object), np.array([[b"a"]])])
def test_strings_are_objects_of_str_or_bytes(text: Any) -> None:
    inputs, rows, _, _, nbytes = admitted(TEXT, text)
    assert inputs["text"].dtype == object
    assert inputs["text"].item() in ("a", b"a")
    assert (rows, nbytes) == (1, 1)


def test_strings_count_their_characters() -> None:
    assert TEXT.admit([["four"], ["seven.."]])[4] == 11


def test_the_bytes_of_all_inputs_count() -> None:
    assert SPEECH.admit(speech(rows=2, length=5))[4] == 4 * 10 + 4 * 12 + 8


# ---------------------------------------------------------------------------------------- what is a fault


def test_names_that_are_missing_or_unknown_are_all_told() -> None:
    message = fault(SPEECH, {"input": f32(1, 5), "staet": f32(2, 1, 3)})
    assert message == (
        "input 'state' is missing; input 'sr' is missing; input 'staet' is not one of the model's; "
        "expected 'input', 'state', 'sr'"
    )


def test_one_array_is_not_enough_for_several_inputs() -> None:
    assert fault(SPEECH, f32(1, 5)) == (
        "one unnamed array came, expected a mapping with the inputs 'input', 'state', 'sr'"
    )


@pytest.mark.parametrize("shape", [(), (1, 1, 4)])
def test_rank(shape: tuple[int, ...]) -> None:
    message = fault(DIGITS, f32(*shape))
    assert message == f"input 'x': rank {len(shape)} (shape {list(shape)}), expected rank 2 (shape [N, 4])"


def test_a_fixed_dimension() -> None:
    assert fault(DIGITS, f32(2, 5)) == "input 'x': axis 1 is 5 (shape [2, 5]), expected 4 (shape [N, 4])"
    assert fault(DIGITS, f32(5)) == "input 'x': axis 1 is 5 (shape [1, 5]), expected 4 (shape [N, 4])"
    assert "axis 0 is 3 (shape [3, 2, 3]), expected 2 (shape [2, N, 3])" in fault(SPEECH, speech(state=f32(3, 2, 3)))


def test_a_dimension_of_any_size() -> None:
    assert FIXED.admit(np.zeros((1, 7, 2), np.uint8))[1] == 1
    assert fault(FIXED, np.zeros((2, 7, 2), np.uint8)) == (
        "input 'image': axis 0 is 2 (shape [2, 7, 2]), expected 1 (shape [1, ?, 2])"
    )


def test_a_symbolic_name_means_one_size_wherever_it_stands() -> None:
    model = admission(
        TensorSpec("tokens", "int64", ("N", "length"), 0),
        TensorSpec("mask", "int64", ("N", "length"), 0),
        TensorSpec("square", "int64", ("side", "side")),
    )
    tokens, square = np.zeros((2, 5), np.int64), np.zeros((3, 3), np.int64)
    model.admit({"tokens": tokens, "mask": tokens, "square": square})
    assert fault(model, {"tokens": tokens, "mask": tokens[:, :4], "square": square}) == (
        "input 'mask': axis 1 ('length') is 4, expected 5 as in 'tokens'"
    )
    assert fault(model, {"tokens": tokens, "mask": tokens, "square": square[:2]}) == (
        "input 'square': axis 1 ('side') is 3, expected 2 as in 'square'"
    )


def test_rows_must_agree() -> None:
    assert fault(SPEECH, speech(state=f32(2, 3, 3))) == "input 'state': 3 rows on axis 1, expected 2 as in 'input'"


def test_there_must_be_rows() -> None:
    assert fault(DIGITS, f32(0, 4)) == "input 'x': no rows on axis 0, expected at least 1"
    assert "input 'input': no rows on axis 0" in fault(SPEECH, speech(rows=0))


@pytest.mark.parametrize("inputs", [f32(9, 4), [[0, 0, 0, 0]] * 9])
def test_and_no_more_than_a_batch_holds(inputs: Any) -> None:
    message = fault(DIGITS, inputs)
    assert message == ("the request has 9 rows, expected at most 8 (max_batch_size)")
    assert DIGITS.normalise(inputs)[1] == 9


@pytest.mark.parametrize(
    ("array", "came"),
    [
        (np.zeros((1, 4)), "float64"),
        (np.zeros((1, 4), np.int32), "int32"),
        (np.array([["a"] * 4]), "string"),
        (np.zeros((1, 4), complex), "complex128"),
        (np.float64(1.0), "float64"),
    ],
)
def test_arrays_must_have_the_models_dtype(array: Any, came: str) -> None:
    assert fault(DIGITS, array) == f"input 'x': dtype {came}, expected float32"


def test_strings_where_there_are_numbers() -> None:
    assert fault(DIGITS, [["a", "b", "c", "d"]]) == "input 'x': string came, expected float32"
    assert fault(TEXT, [[1]]) == "input 'text': int64 came, expected string"
    assert fault(TEXT, np.zeros((1, 1))) == "input 'text': dtype float64, expected string"


@pytest.mark.parametrize("form", [lambda x: x, lambda x: np.array(x, object)])
@pytest.mark.parametrize(("element", "kind"), [(None, "NoneType"), (1.5, "float"), (["a"], "list")])
def test_strings_of_something_else(form: Any, element: Any, kind: str) -> None:
    text = np.empty((2, 1), object)
    text[0, 0], text[1, 0] = "a", element
    message = fault(TEXT, text if kind == "list" else form(text.tolist()))
    assert message == f"input 'text': {kind} came, expected str or bytes"


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("int64", [1.5], "fractional numbers came, expected int64"),
        ("bool", [0.5], "fractional numbers came, expected bool"),
        ("int64", [-1, 2**63], "not convertible to int64"),
        ("uint64", [1, 2**63, 0.5], "fractional numbers came, expected uint64"),
        ("int64", [2**70], "object came, expected int64"),
        ("float32", [None], "object came, expected float32"),
        ("uint8", [-1], "not convertible to uint8: "),
        ("int8", [200], "not convertible to int8: "),
        ("uint8", [np.int64(300)], "numbers outside the range of uint8 came"),
        ("int64", [np.uint64(2**63)], "not convertible to int64: "),
        ("bool", [2], "numbers outside the range of bool came"),
        ("float32", [1e300], "not convertible to float32: "),
        ("float16", [70_000], "not convertible to float16: "),
        ("float32", [1j], "not convertible to float32: "),
        ("float32", [[1, 2], [3]], "not convertible to float32: "),
        ("string", [["a"], ["b", "c"]], "not convertible to string: "),
    ],
)
def test_plain_values_that_do_not_fit_the_dtype(dtype: str, value: Any, expected: str) -> None:
    message = fault(admission(TensorSpec("x", dtype, (None,))), value)
    assert message.startswith(f"input 'x': {expected}")


# --------------------------------------------------------------------------------- who may share a batch


def test_requests_of_other_inner_dimensions_do_not_share_a_batch() -> None:
    short, long = SPEECH.admit(speech(length=5))[2], SPEECH.admit(speech(length=6))[2]
    assert short is not long
    assert SPEECH.admit(speech(rows=1, length=5))[2] is short


def test_constants_must_be_equal_to_share_a_batch() -> None:
    """They have no batch axis: one value is passed for all."""
    one = SPEECH.admit(speech(sr=8000))[2]
    assert SPEECH.admit(speech(sr=np.array(8000)))[2] is one
    assert SPEECH.admit(speech(sr=16000))[2] is not one


def test_constant_strings_too() -> None:
    model = admission(TensorSpec("x", "float32", ("N", 1), 0), TensorSpec("language", "string", (None,)))
    shapes = [model.admit({"x": f32(1, 1), "language": words})[2] for words in (["en"], ["en"], ["de"], ["en", "de"])]
    assert shapes[0] is shapes[1]
    assert len(set(map(id, shapes))) == 3


def test_a_model_that_is_not_batchable_shares_nothing() -> None:
    inputs, rows, shape, bare, _ = admitted(FIXED, np.zeros((1, 7, 2), np.uint8))
    assert (rows, bare, shape.batchable) == (1, False, False)
    assert FIXED.admit(np.ones((1, 7, 2), np.uint8))[2] is shape  # measured together
    assert FIXED.admit(np.ones((1, 8, 2), np.uint8))[2] is not shape
    assert "rank 2" in fault(FIXED, inputs["image"][0])  # there is no batch axis to leave out


def test_a_batchable_model_of_constants_only_has_one_row() -> None:
    model = admission(TensorSpec("x", "float32", (None,)))
    assert model.admit(f32(3))[1:4:2] == (1, False)


def test_shapes_that_nobody_uses_any_more_are_forgotten() -> None:
    model = admission(TensorSpec("x", "float32", ("N", None), 0))
    kept = model.admit(f32(1, 3))[2]
    for size in range(100):
        model.admit(f32(1, size))
    gc.collect()
    assert len(model._shapes) == 1
    assert model.admit(f32(1, 3))[2] is kept


def test_symbolic_inner_dimensions_take_the_long_way_to_the_same_answer() -> None:
    model = admission(TensorSpec("x", "float32", ("N", "size"), 0))
    inputs, rows, _, bare, nbytes = admitted(model, f32(2, 4))
    assert (inputs["x"].shape, rows, bare, nbytes) == ((2, 4), 2, False, 32)
    assert model.admit(f32(4))[3] is True


# ------------------------------------------------------------------------------------ undeclared inputs


def test_a_model_that_declares_nothing_takes_what_agrees_in_rows() -> None:
    inputs, rows, shape, bare, nbytes = admitted(OPEN, {"a": f32(2, 3), "b": [1, 2]})
    assert (rows, bare, nbytes) == (2, False, 24 + 16)
    assert inputs["b"].tolist() == [1, 2]
    assert OPEN.admit({"b": [1], "a": f32(1, 3)})[2] is shape  # in whatever order they are named
    assert OPEN.admit({"a": f32(2, 4), "b": [1, 2]})[2] is not shape
    assert OPEN.admit({"a": f32(2, 3).astype(np.float64), "b": [1, 2]})[2] is not shape


def test_one_array_is_named_for_it() -> None:
    assert list(admitted(OPEN, f32(2, 3))[0]) == ["input"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "no inputs came, expected at least one array"),
        (3.0, "input 'input': shape [], expected at least 1 row on axis 0"),
        (f32(0, 3), "input 'input': shape [0, 3], expected at least 1 row on axis 0"),
        ({"a": f32(2), "b": f32(3)}, "input 'b': 3 rows, expected 2 as in the other inputs"),
        ([[1, 2], [3]], "input 'input': not convertible to an array: "),
        (f32(9, 2), "the request has 9 rows, expected at most 8"),
    ],
)
def test_what_it_does_not_take(inputs: Any, message: str) -> None:
    assert fault(OPEN, inputs).startswith(message)


def test_objects_count_their_characters_or_their_pointers() -> None:
    assert OPEN.admit({"a": np.array(["four", None], object)})[4] == 4 + 8


def test_an_undeclared_model_that_is_not_batchable_takes_one_thing_at_a_time() -> None:
    model = admission(batchable=False)
    inputs, rows, shape, bare, _ = admitted(model, 3.0)
    assert (inputs["input"].shape, rows, bare, shape.batchable) == ((), 1, False, False)
    assert model.admit(f32(3, 2))[1] == 1
    assert model.admit(f32(3, 2))[2] is not model.admit(f32(4, 2))[2]  # their times differ


# ------------------------------------------------------------------------------------------- properties


@pytest.mark.slow
@given(inputs=inputs_for(SPEECH.info, max_rows=8))
def test_whatever_fits_the_model_is_admitted_and_comes_out_unchanged(inputs: dict[str, Array]) -> None:
    came, rows, _, bare, nbytes = admitted(SPEECH, inputs)
    assert rows == inputs["input"].shape[0]
    assert not bare
    assert nbytes == sum(array.nbytes for array in inputs.values())
    assert all(came[name] is array for name, array in inputs.items())


@pytest.mark.slow
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=6))
def test_whatever_comes_is_admitted_or_invalid(value: Any) -> None:
    for model in (DIGITS, TEXT, OPEN, SPEECH, FIXED):
        try:
            assert model.admit(value)[1] >= 1
        except InvalidInput as error:
            assert str(error)  # noqa: PT017


# --------------------------------------------------------------------------------------------- priority

LARGE = {"batch_size": 5, "input_size_bytes": 500_001, "estimated_flops": 1e9 + 1}
"""Just above every bound at which a request counts as latency-critical."""


def test_just_above_every_bound_is_throughput() -> None:
    assert determine_priority(RequestProfile(**LARGE)) is Priority.THROUGHPUT


@pytest.mark.parametrize(
    ("field", "value", "critical"),
    [
        ("priority", 0, True),
        ("priority", 1, False),
        ("priority", 2, False),
        ("sla_deadline", 249.999, True),
        ("sla_deadline", 250, False),
        ("sla_deadline", 0, True),
        ("batch_size", 4, True),
        ("batch_size", 5, False),
        ("input_size_bytes", 500_000, True),
        ("input_size_bytes", 500_001, False),
        ("input_size_bytes", 0, True),
        ("estimated_flops", 1e9, True),
        ("estimated_flops", 1_000_000_001, False),
        ("estimated_flops", 0, True),
    ],
)
def test_any_one_condition_makes_it_latency_critical(field: str, value: float, critical: bool) -> None:
    profile = RequestProfile(**{**LARGE, field: value})
    assert (determine_priority(profile) is Priority.LATENCY_CRITICAL) is critical


@pytest.mark.parametrize(
    ("size", "batch", "critical"),
    [(500_001, 3, True), (400_000, 5, True), (400_001, 5, True), (500_001, 5, False), (2_000_001, 1, True)],
)
def test_input_times_batch(size: int, batch: int, critical: bool) -> None:
    """Small inputs and small batches are critical by themselves, so the product decides only where neither is."""
    profile = RequestProfile(batch_size=batch, input_size_bytes=size)
    assert (determine_priority(profile) is Priority.LATENCY_CRITICAL) is critical


def test_what_is_unknown_does_not_count() -> None:
    assert determine_priority(RequestProfile(batch_size=5)) is Priority.THROUGHPUT
    assert determine_priority(RequestProfile()) is Priority.LATENCY_CRITICAL


# --------------------------------------------------------------------------------------------- timeouts


@pytest.mark.parametrize("seconds", [1e-9, 1, 3.5, math.inf])
def test_a_limit_is_more_than_nothing(seconds: float) -> None:
    assert check_timeout("timeout", seconds) == seconds


@pytest.mark.parametrize("seconds", [0, -1, math.nan, None, "soon"])
def test_anything_else_is_a_fault(seconds: Any) -> None:
    with pytest.raises(InvalidInput, match=f"block_timeout: expected more than 0 seconds, got {seconds!r}"):
        check_timeout("block_timeout", seconds)
