"""Rows are stacked into one array per input and split out of each output, on whatever axis the tensor says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kapsl_scheduler.core.batch import Batch, BatchPolicy, Layout, Pending, Shape
from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.types import Array, ModelInfo, TensorSpec, numpy_dtype
from tests.core.build import LIVE, LONE, SHAPE, pending

FLAT = Layout(
    ModelInfo(
        "flat",
        (TensorSpec("x", "float32", ("N", 3), 0),),
        (TensorSpec("y", "float32", ("N", 2), 0),),
        batchable=True,
    )
)
SPEECH = Layout(
    ModelInfo(
        "speech",
        (
            TensorSpec("input", "float32", ("N", 4), 0),
            TensorSpec("state", "float32", (2, "N", 3), 1),
            TensorSpec("sr", "int64", ()),
        ),
        (
            TensorSpec("output", "float32", ("N", 1), 0),
            TensorSpec("stateN", "float32", (2, "N", 3), 1),
            TensorSpec("version", "int64", (1,)),
        ),
        batchable=True,
    )
)
UNDECLARED = Layout(ModelInfo("function", batchable=True))


def numbered(*shape: int, start: float = 0) -> Array:
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def member(rows: int, *, bare: bool = False, shape: Shape = SHAPE, **inputs: Any) -> Pending:
    return pending(rows=rows, bare=bare, shape=shape, inputs=inputs)


def batch_of(*members: Pending, shape: Shape = SHAPE) -> Batch:
    rows = sum(item.rows for item in members)
    return Batch([*members], rows, shape, LIVE, (rows, 0, 0), (False, False, False), 0.0)


def split(layout: Layout, outputs: dict[str, Array], batch: Batch) -> list[dict[str, Array]]:
    """Each member's rows, by the outputs' names."""
    return [dict(zip(outputs, part, strict=True)) for part in layout.split(outputs, batch)]


# ------------------------------------------------------------------------------------------------- stack


@pytest.mark.parametrize("rows", [1, 3])
def test_a_lone_request_is_passed_on_without_a_copy(rows: int) -> None:
    x = numbered(rows, 3)
    assert FLAT.stack([member(rows, x=x)])["x"] is x


def test_so_is_a_lone_bare_one_whose_axis_is_a_view() -> None:
    x = numbered(3)
    stacked = FLAT.stack([member(1, bare=True, x=x)])["x"]
    assert stacked.shape == (1, 3)
    assert np.shares_memory(stacked, x)
    state, sr = numbered(2, 3), np.array(16000)
    lone = SPEECH.stack([member(1, bare=True, input=numbered(4), state=state, sr=sr)])
    assert lone["state"].shape == (2, 1, 3)
    assert np.shares_memory(lone["state"], state)
    assert lone["sr"] is sr


def test_rows_are_concatenated_in_order() -> None:
    parts = [numbered(rows, 3, start=100 * rows) for rows in (2, 1, 4)]
    stacked = FLAT.stack([member(len(part), x=part) for part in parts])
    assert list(stacked) == ["x"]
    np.testing.assert_array_equal(stacked["x"], np.concatenate(parts))
    assert stacked["x"].dtype == np.float32


def test_bare_rows_and_others_share_a_batch() -> None:
    parts = [numbered(3), numbered(2, 3, start=10), numbered(3, start=20)]
    for order in ([0, 1, 2], [1, 0, 2]):
        chosen = [parts[index] for index in order]
        stacked = FLAT.stack([member(1, bare=part.ndim == 1, x=part) for part in chosen])["x"]
        np.testing.assert_array_equal(stacked, np.vstack(chosen))


def test_each_input_has_an_axis_of_its_own_and_constants_are_passed_once() -> None:
    first = member(2, input=numbered(2, 4), state=numbered(2, 2, 3), sr=np.array(8000))
    second = member(1, bare=True, input=numbered(4, start=50), state=numbered(2, 3, start=50), sr=np.array(8000))
    stacked = SPEECH.stack([first, second])
    assert {name: array.shape for name, array in stacked.items()} == {"input": (3, 4), "state": (2, 3, 3), "sr": ()}
    np.testing.assert_array_equal(stacked["state"][:, 2], second.inputs[1])
    assert stacked["sr"] is first.inputs[2]


def test_what_a_model_does_not_declare_is_stacked_on_its_first_axis() -> None:
    stacked = UNDECLARED.stack([member(1, a=numbered(1, 2)), member(2, a=numbered(2, 2))])
    assert stacked["a"].shape == (3, 2)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T.copy().T,  # in Fortran's order
        lambda a: np.repeat(a, 2, 1)[:, ::2],  # with gaps
        lambda a: a[::-1][::-1][:, ::-1],  # backwards
        lambda a: np.broadcast_to(a[:1], a.shape),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_arrays_need_not_be_contiguous(view: Any, first: bool) -> None:
    plain, odd = numbered(2, 3), view(numbered(2, 3, start=50))
    parts = [odd, plain] if first else [plain, odd]
    stacked = FLAT.stack([member(2, x=part) for part in parts])["x"]
    np.testing.assert_array_equal(stacked, np.concatenate(parts))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint64", "bool", "string"])
def test_every_dtype_keeps_its_values(dtype: str) -> None:
    kind = numpy_dtype(dtype)
    parts = [np.array([["a", "b"]] if dtype == "string" else [[0, 1]]).astype(kind) for _ in range(3)]
    stacked = UNDECLARED.stack([member(1, a=part) for part in parts])["a"]
    assert stacked.dtype == kind
    np.testing.assert_array_equal(stacked, np.concatenate(parts))


def test_rows_of_nothing_are_rows_all_the_same() -> None:
    parts = [np.zeros((2, 0), np.float32), np.zeros((1, 0), np.float32)]
    assert UNDECLARED.stack([member(len(part), a=part) for part in parts])["a"].shape == (3, 0)


def test_read_only_inputs_are_fine() -> None:
    part = numbered(1, 3)
    part.flags.writeable = False
    stacked = FLAT.stack([member(1, x=part), member(1, x=part)])["x"]
    stacked += 1  # the batch is the engine's to change
    assert part[0, 0] == 0


# ------------------------------------------------------------------------------------------------- split


def test_each_request_gets_its_rows_as_views() -> None:
    y = numbered(4, 2)
    parts = split(FLAT, {"y": y}, batch_of(member(1), member(3)))
    np.testing.assert_array_equal(parts[0]["y"], y[:1])
    np.testing.assert_array_equal(parts[1]["y"], y[1:])
    assert all(part["y"].base is y or part["y"].base is y.base for part in parts)


def test_rows_of_one_keep_their_axis_unless_it_was_left_out() -> None:
    y = numbered(3, 2)
    parts = split(FLAT, {"y": y}, batch_of(member(1), member(1, bare=True), member(1)))
    assert [part["y"].shape for part in parts] == [(1, 2), (2,), (1, 2)]
    np.testing.assert_array_equal(parts[1]["y"], y[1])
    assert all(np.shares_memory(part["y"], y) for part in parts)


@pytest.mark.parametrize("dtype", [np.float32, object])
@pytest.mark.parametrize("others", [0, 2])
def test_a_bare_answer_of_no_dimensions_is_an_array_too(dtype: Any, others: int) -> None:
    y = np.arange(1 + others).astype(dtype)
    members = [member(1, bare=True)] + [member(others)] * bool(others)
    answer = split(UNDECLARED, {"y": y}, batch_of(*members))[0]["y"]
    assert isinstance(answer, np.ndarray)
    assert (answer.shape, answer.dtype) == ((), y.dtype)


def test_each_output_has_an_axis_of_its_own() -> None:
    outputs = {"output": numbered(3, 1), "stateN": numbered(2, 3, 3), "version": np.array([7])}
    parts = split(SPEECH, outputs, batch_of(member(2), member(1, bare=True)))
    np.testing.assert_array_equal(parts[0]["stateN"], outputs["stateN"][:, :2])
    np.testing.assert_array_equal(parts[1]["stateN"], outputs["stateN"][:, 2])
    assert parts[1]["output"].shape == (1,)
    assert parts[0]["version"] is parts[1]["version"] is outputs["version"]


def test_several_outputs_of_single_rows() -> None:
    outputs = {"a": numbered(2, 2), "b": numbered(2)}
    parts = split(UNDECLARED, outputs, batch_of(member(1), member(1, bare=True)))
    assert [part["b"].shape for part in parts] == [(1,), ()]
    assert parts[1]["b"] == 1


@pytest.mark.parametrize("got", [(3, 2), (1, 2), (), (0, 2)])
def test_an_output_with_other_rows_is_the_engines_fault(got: tuple[int, ...]) -> None:
    with pytest.raises(InferenceError, match=r"output 'y': expected 2 rows on axis 0, got shape \[") as caught:
        split(FLAT, {"y": np.zeros(got)}, batch_of(member(1), member(1)))
    assert str(list(got)) in str(caught.value)


def test_so_is_one_that_lacks_its_axis() -> None:
    with pytest.raises(InferenceError, match=r"output 'stateN': expected 2 rows on axis 1, got shape \[2\]"):
        split(SPEECH, {"stateN": np.zeros(2)}, batch_of(member(2)))


def test_what_never_shares_a_call_gets_all_that_came() -> None:
    outputs = {"y": numbered(5, 2), "z": numbered(1)}
    (answer,) = split(FLAT, outputs, batch_of(member(1, shape=LONE), shape=LONE))
    assert answer == outputs
    assert answer is not outputs
    assert answer["y"] is outputs["y"]


@pytest.mark.slow
@given(
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=3),
    st.data(),
    st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=5),
)
def test_what_is_stacked_comes_apart_again(
    inner: tuple[int, ...], data: st.DataObject, kinds: list[tuple[int, bool]]
) -> None:
    """An engine that returns what it got gives everyone their own back, on any axis, bare or not."""
    axis = data.draw(st.integers(0, len(inner)))
    spec = TensorSpec("x", "float32", (*inner[:axis], "N", *inner[axis:]), axis)
    layout = Layout(ModelInfo("echo", (spec,), (spec,), batchable=True))
    members = []
    for number, (rows, wants_bare) in enumerate(kinds):
        bare = wants_bare and rows == 1
        shape = inner if bare else (*inner[:axis], rows, *inner[axis:])
        members.append(member(rows, bare=bare, x=numbered(*shape, start=1000 * number)))
    batch = batch_of(*members)
    stacked = layout.stack(members)
    assert stacked["x"].shape[axis] == batch.rows
    for item, part in zip(members, split(layout, dict(stacked), batch), strict=True):
        np.testing.assert_array_equal(part["x"], item.inputs[0])
        assert np.shares_memory(part["x"], stacked["x"])


# ------------------------------------------------------------------------- row, join, slice_inputs


def test_a_chunk_of_one_row_loses_its_axis() -> None:
    outputs = {"output": numbered(1, 1), "stateN": numbered(2, 1, 3), "version": np.array([7])}
    plain = SPEECH.row(outputs)
    assert {name: array.shape for name, array in plain.items()} == {"output": (1,), "stateN": (2, 3), "version": (1,)}
    assert np.shares_memory(plain["stateN"], outputs["stateN"])


def test_a_chunk_of_anything_else_stays_as_it_is() -> None:
    outputs = {"output": numbered(2, 1), "stateN": numbered(2)}
    plain = SPEECH.row(outputs)
    assert plain["output"] is outputs["output"]
    assert plain["stateN"] is outputs["stateN"]


def test_a_chunk_of_one_number_is_an_array() -> None:
    plain = UNDECLARED.row({"y": np.array(["word"], object)})
    assert isinstance(plain["y"], np.ndarray)
    assert plain["y"].item() == "word"


def test_a_split_request_is_joined_in_order() -> None:
    whole = {"output": numbered(5, 1), "stateN": numbered(2, 5, 3), "version": np.array([7])}
    parts = split(SPEECH, whole, batch_of(member(2), member(2), member(1)))
    joined = SPEECH.join(parts)
    assert list(joined) == list(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(joined[name], array)
    assert joined["version"] is whole["version"]


def test_inputs_are_cut_on_their_axes_as_views() -> None:
    inputs = {"input": numbered(5, 4), "state": numbered(2, 5, 3), "sr": np.array(8000)}
    shape = Shape("speech", tuple(inputs), batchable=True)
    cut = SPEECH.slice_inputs(shape, tuple(inputs.values()), 1, 3)
    np.testing.assert_array_equal(cut["input"], inputs["input"][1:3])
    np.testing.assert_array_equal(cut["state"], inputs["state"][:, 1:3])
    assert cut["sr"] is inputs["sr"]
    assert np.shares_memory(cut["state"], inputs["state"])
    one = Shape("one", ("a",), batchable=True)
    assert UNDECLARED.slice_inputs(one, [numbered(3, 2)], 2, 3)["a"].tolist() == [[4, 5]]


# ---------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size: expected at least 1, got 0"),
        ({"max_queue_delay": -1.0}, "max_queue_delay: expected a number of at least 0, got -1.0"),
        ({"fill_slack": float("nan")}, "fill_slack: expected a number of at least 0, got nan"),
        ({"background_slice": -0.1}, "background_slice: expected a number of at least 0, got -0.1"),
        ({"max_batch_time": 0.0}, "max_batch_time: expected more than 0 seconds, got 0.0"),
        ({"preferred_batch_sizes": (4, 0)}, r"expected sizes from 1 to max_batch_size \(32\), got \[0\]"),
        ({"preferred_batch_sizes": (4, 64)}, r"expected sizes from 1 to max_batch_size \(32\), got \[64\]"),
    ],
)
def test_a_policy_says_what_is_wrong_with_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPolicy(**fields)


def test_the_defaults_are_those_of_the_rules() -> None:
    policy = BatchPolicy()
    assert (policy.max_queue_delay, policy.preferred_batch_sizes, policy.max_batch_time) == (0.0, (), None)
    assert (policy.fill_slack, policy.background_slice) == (0.25, 0.005)


def test_shapes_are_compared_by_identity_and_show_what_they_are() -> None:
    one, twin = Shape((64,), batchable=True), Shape((64,), batchable=True)
    assert one != twin
    assert repr(one) == "Shape((64,), batchable=True)"
