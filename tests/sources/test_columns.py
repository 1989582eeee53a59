"""Which columns become which inputs, as which dtype, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.sources.columns import Columns

ROW = {"a": 1, "b": 2.5, "pixels": [1, 2, 3], "name": "Ada"}


def test_one_column_is_taken_as_it_is() -> None:
    pixels: Any = Columns("pixels", None).row(ROW)
    assert pixels.dtype == np.float32
    assert pixels.tolist() == [1, 2, 3]
    assert Columns("a", "int64").row(ROW).shape == ()  # type: ignore[union-attr]


def test_several_columns_are_stacked_in_their_order() -> None:
    stacked: Any = Columns(("b", "a"), None).row(ROW)
    assert stacked.tolist() == [2.5, 1]
    assert stacked.dtype == np.float32


def test_inputs_by_name_each_with_its_dtype() -> None:
    columns = Columns({"x": "pixels", "y": ("a", "b"), "who": "name"}, {"x": "int32", "who": "string"})
    assert columns.names == ("pixels", "a", "b", "name")
    values: Any = columns.row(ROW)
    assert {name: array.dtype for name, array in values.items()} == {
        "x": np.int32,
        "y": np.float32,
        "who": np.dtype(object),
    }
    assert values["who"].item() == "Ada"


def test_without_a_choice_a_table_is_one_input_and_named_values_are_one_each() -> None:
    columns = Columns(None, None)
    assert columns.row({"a": 1, "b": 2}).tolist() == [1, 2]  # type: ignore[union-attr]
    assert columns.row({"a": [1, 2]}).tolist() == [1, 2]  # type: ignore[union-attr]
    named: Any = columns.named({"a": 1, "b": [2]})
    assert {name: array.tolist() for name, array in named.items()} == {"a": 1, "b": [2]}
    with pytest.raises(InvalidInput, match="at least one value"):
        columns.named({})


def test_arrays_keep_their_dtype_and_others_have_the_usual_one() -> None:
    columns = Columns(None, None)
    for dtype in (np.uint8, np.int64, np.float64, np.bool_):
        assert columns.bare(np.ones(2, dtype)).dtype == dtype  # type: ignore[union-attr]
    swapped: Any = columns.bare(np.ones(2, ">f4"))
    assert swapped.dtype.isnative
    assert columns.row({"a": np.int64(1), "b": np.int64(2)}).dtype == np.int64  # type: ignore[union-attr]
    assert columns.bare([1, 2]).dtype == np.float32  # type: ignore[union-attr]
    assert columns.bare([True, False]).dtype == np.bool_  # type: ignore[union-attr]
    assert columns.bare([]).shape == (0,)  # type: ignore[union-attr]
    assert Columns(None, "int8").bare([]).dtype == np.int8  # type: ignore[union-attr]
    assert columns.bare(["a", "b"]).tolist() == ["a", "b"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "dtype", "expected"),
    [
        ("1.5", None, 1.5),
        (" 2 ", None, 2),
        ("nan", None, np.nan),
        ("9007199254740993", "int64", 9007199254740993),
        ("3.0", "int64", 3),
        ("[1, 2]", None, [1, 2]),
        ("[1", "string", "[1"),
        ("1", "bool", True),
    ],
)
def test_text_becomes_what_it_says(text: str, dtype: str | None, expected: Any) -> None:
    value: Any = Columns("a", dtype).row({"a": text}, text=True)
    np.testing.assert_array_equal(value, np.array(expected, value.dtype))


@pytest.mark.parametrize("text", ["", "x", "1_0", "[1, x]", "[" * 100_000, '["a"]', "[[1], 2]", "[null]"])
def test_text_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="column 'a'"):
        Columns("a", "float32").row({"a": text}, text=True)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (None, "float32"),
        ([1, None], "float32"),
        ([[1], [2, 3]], "float32"),
        (1.5, "int32"),
        (300, "uint8"),
        (-1, "uint64"),
        (2**63, "int64"),
        (2.0**63, "int64"),
        (float("nan"), "int8"),
        (2, "bool"),
        (1e300, "float32"),
        (70_000, "float16"),
        (10**30, "float64"),
        ("a", "float32"),
        (np.array(1 + 2j), None),
        ([1, "a"], "float32"),
        ({"a": 1}, None),
        (5, "string"),
        ([["a"], ["b", "c"]], "string"),
    ],
)
def test_values_that_the_dtype_cannot_hold_are_refused(value: Any, dtype: str | None) -> None:
    with pytest.raises(InvalidInput, match=r"column 'a': expected (numbers|text)"):
        Columns("a", dtype).row({"a": value})


def test_a_stack_names_the_column_that_is_at_fault() -> None:
    with pytest.raises(InvalidInput, match="column 'pixels': expected a number, got"):
        Columns(("a", "pixels"), None).row(ROW)
    with pytest.raises(InvalidInput, match="column 'name'"):
        Columns(("a", "name"), "float32").row(ROW)
    with pytest.raises(InvalidInput, match="row: expected numbers or text"):
        Columns(("a", "name"), None).row(ROW)  # either would do alone
    with pytest.raises(InvalidInput, match="row: expected numbers, got"):
        Columns(("a", "b"), None).row({"a": "[1]", "b": "[2]"}, text=True)


def test_columns_that_are_not_there_are_named() -> None:
    with pytest.raises(InvalidInput, match="no column 'z', there is"):
        Columns(("a", "z"), None).row(ROW)
    with pytest.raises(InvalidInput, match="no column 'z', there is"):
        Columns("z", None).check(["a", "b"])
    Columns(None, None).check([])
    with pytest.raises(InvalidInput, match="expected columns 'a', got 5, which has none"):
        Columns("a", None).bare(5)


@pytest.mark.parametrize(
    ("inputs", "dtype", "fault"),
    [
        ("", None, "at least one column"),
        ((), None, "at least one column"),
        ({}, None, "at least one column"),
        ({"x": ()}, None, "at least one column"),
        (None, "float31", "there is no dtype 'float31'"),
        (None, {"x": "complex"}, "there is no dtype 'complex'"),
        ("a", {"a": "int8"}, "'a': not among the names of inputs"),
        ({"x": "a"}, {"a": "int8"}, "'a': not among the names of inputs"),
    ],
)
def test_a_choice_that_contradicts_itself_is_refused(inputs: Any, dtype: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Columns(inputs, dtype)


@settings(max_examples=50)
@given(
    st.lists(st.floats(width=64) | st.integers(-(2**70), 2**70), min_size=1, max_size=4),
    st.sampled_from(["int8", "uint8", "int32", "uint32", "int64", "uint64", "bool", "float32", "float64"]),
)
def test_numbers_are_what_they_were_or_refused(numbers: list[float], dtype: str) -> None:
    try:
        array: Any = Columns("a", dtype).row({"a": numbers})
    except InvalidInput:
        return
    assert array.dtype == dtype
    for came, number in zip(array.tolist(), numbers, strict=True):
        if dtype.startswith("float"):
            np.testing.assert_allclose(came, np.float64(number), rtol=1e-6, atol=1e-44)
        elif all(isinstance(each, int) for each in numbers):
            assert came == number  # lists with a float in them are doubles before they come here
        else:
            assert came == float(number)
