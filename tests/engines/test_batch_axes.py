"""Which axis is the batch axis: the rule, its overrides, and every reason not to batch."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kapsl_scheduler.engines.batch_axes import find_batch_axes
from kapsl_scheduler.types import TensorSpec

Shape = tuple[int | str | None, ...]


def specs(shapes: Mapping[str, Shape]) -> list[TensorSpec]:
    return [TensorSpec(name, "float32", shape) for name, shape in shapes.items()]


def axes(
    inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], overrides: Mapping[str, int | None] | None = None
) -> dict[str, int | None]:
    found = find_batch_axes(specs(inputs), specs(outputs), overrides or {})
    assert found.obstacle == ""
    return {spec.name: spec.batch_axis for spec in (*found.inputs, *found.outputs)}


def obstacle(
    inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], overrides: Mapping[str, int | None] | None = None
) -> str:
    found = find_batch_axes(specs(inputs), specs(outputs), overrides or {})
    assert all(spec.batch_axis is None for spec in (*found.inputs, *found.outputs))
    return found.obstacle


@pytest.mark.parametrize("rows", ["N", None], ids=["symbolic", "unnamed"])
def test_an_only_input_is_batched_on_axis_0(rows: str | None) -> None:
    assert axes({"x": (rows, 64)}, {"y": (rows, 10)}) == {"x": 0, "y": 0}


def test_an_only_input_with_open_inner_dimensions_is_batched_on_axis_0() -> None:
    assert axes({"x": ("N", "length")}, {"y": ("N", 10)}) == {"x": 0, "y": 0}


def test_the_shared_name_decides_whatever_its_axis() -> None:
    inputs: dict[str, Shape] = {"input": ("batch", 576), "state": (2, "batch", 128), "sr": ()}
    outputs: dict[str, Shape] = {"output": ("batch", 1), "next": ("dim_0", "batch", "dim_2")}
    assert axes(inputs, outputs) == {"input": 0, "state": 1, "sr": None, "output": 0, "next": 1}


def test_the_name_in_the_most_inputs_wins() -> None:
    inputs: dict[str, Shape] = {"a": ("T", "N"), "b": ("T", "N"), "c": (3, "N")}
    assert axes(inputs, {"y": ("N", 4)}) == {"a": 1, "b": 1, "c": 1, "y": 0}


def test_a_tie_goes_to_the_lowest_axis_of_the_first_input() -> None:
    inputs: dict[str, Shape] = {"ids": ("batch", "sequence"), "mask": ("batch", "sequence")}
    assert axes(inputs, {"y": ("batch", "sequence", 768)}) == {"ids": 0, "mask": 0, "y": 0}


def test_names_that_no_two_inputs_share_leave_axis_0() -> None:
    inputs: dict[str, Shape] = {"a": ("unk__6", 4), "b": ("unk__7", 8)}
    assert axes(inputs, {"y": ("unk__8", 2)}) == {"a": 0, "b": 0, "y": 0}


def test_an_output_has_the_rows_where_it_has_their_name() -> None:
    assert axes({"x": ("N", 4)}, {"y": (3, "N")}) == {"x": 0, "y": 1}


def test_inputs_of_fixed_shape_need_no_batch_axis() -> None:
    inputs: dict[str, Shape] = {"x": ("N", 4), "table": (8, 8), "scale": ()}
    assert axes(inputs, {"y": ("N", 4)}) == {"x": 0, "table": None, "scale": None, "y": 0}


def test_an_output_may_have_the_name_of_any_batched_input() -> None:
    inputs: dict[str, Shape] = {"a": ("unk__6", 4), "b": ("unk__7", 8)}
    assert axes(inputs, {"y": ("unk__7", 2)}) == {"a": 0, "b": 0, "y": 0}


def test_an_override_beats_the_rule() -> None:
    inputs: dict[str, Shape] = {"x": ("N", "M"), "table": ("K", 8)}
    assert axes(inputs, {"y": ("N", "M")}, {"x": 1, "table": None, "y": 1}) == {"x": 1, "table": None, "y": 1}


def test_an_override_opens_the_dimension_that_an_exporter_fixed() -> None:
    found = find_batch_axes(specs({"x": ("N", 4)}), specs({"y": (1, 4)}), {"y": 0})
    assert found.outputs == (TensorSpec("y", "float32", (None, 4), 0),)


def test_an_override_serves_an_output_of_unknown_rank() -> None:
    assert axes({"x": ("N", 4)}, {"y": ()}, {"y": 0}) == {"x": 0, "y": 0}


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ({"x": (1, 64)}, {"y": (1, 10)}, "no input has a batch axis"),
        ({"x": (3, "T")}, {"y": (3, "T")}, "no input has a batch axis"),
        ({"sr": ()}, {"y": ()}, "no input has a batch axis"),
        ({"x": ("N", 4), "state": (2, None, 8)}, {"y": ("N", 1)}, "the batch axis of input state is unknown"),
        ({"x": ("N", 4)}, {"y": ()}, "output y has no batch axis, or an unknown one"),
        ({"x": ("N", 4)}, {"y": (1, 4)}, "output y has no batch axis, or an unknown one"),
        ({"x": ("N", "T")}, {"y": ("T", 4)}, "output y has no batch axis, or an unknown one"),
        ({"x": ("N", "N")}, {"y": ("N", 4)}, "x has N on two axes, so both would grow with the rows"),
        ({"x": ("N", 4)}, {"y": ("N", "N")}, "y has N on two axes, so both would grow with the rows"),
    ],
)
def test_what_is_never_batched(inputs: dict[str, Shape], outputs: dict[str, Shape], reason: str) -> None:
    assert obstacle(inputs, outputs) == reason


def test_an_output_of_several_open_axes_is_no_guess_where_rows_are_on_different_axes() -> None:
    inputs: dict[str, Shape] = {"x": (None, None), "state": (2, None, 128)}
    outputs: dict[str, Shape] = {"y": (None, 1), "next": (None, None, None)}
    assert "output next" in obstacle(inputs, outputs, {"state": 1})
    assert axes(inputs, outputs, {"state": 1, "next": 1}) == {"x": 0, "state": 1, "y": 0, "next": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"z": 0}, "there are x, y; not z"),
        ({"x": 2}, r"x has shape \['N', 4\]; there is no axis 2"),
        ({"x": -1}, r"x has shape \['N', 4\]; there is no axis -1"),
        ({"x": 1}, "axis 1 of x is fixed at 4 by the model"),
        ({"y": 5}, "there is no axis 5"),
    ],
)
def test_overrides_that_do_not_fit(overrides: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_batch_axes(specs({"x": ("N", 4)}), specs({"y": ("N", 4)}), overrides)
