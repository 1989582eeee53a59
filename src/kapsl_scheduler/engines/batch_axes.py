"""Which axis of each tensor of a model is its batch axis, as far as the model's own shapes tell.

Pure: no model runtime here, only the shapes that it reports. The rule is for models that name their dimensions,
as ONNX does: a symbolic dimension shared by the inputs, else axis 0, and nothing where that is a guess too many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from kapsl_scheduler.types import TensorSpec

__all__ = ["BatchAxes", "find_batch_axes"]


class BatchAxes(NamedTuple):
    """The tensors with their batch axes. `obstacle` says why the model is never batched: then no tensor has a
    batch axis. It is empty if the model is batchable."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    obstacle: str


def find_batch_axes(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], overrides: Mapping[str, int | None]
) -> BatchAxes:
    """Decide the batch axis of every tensor. `overrides` gives the axis of a tensor by name, None for none.

    With several inputs the batch dimension is the symbolic name that occurs in the most of them, if in at least
    two (a tie goes to the lowest axis of the first of them); a tensor that has it is batched on it. Any other
    tensor is batched on axis 0 if that is open, that is symbolic or unnamed.

    Raises `ValueError` if an override names no tensor, no axis of it, or an axis that the model fixes.
    """
    _check_overrides(overrides, inputs, outputs)
    batch_name = _shared_name([spec.shape for spec in inputs])
    batched_inputs = [_with_axis(spec, batch_name, overrides) for spec in inputs]
    row_names = _row_names(batched_inputs)
    if batch_name is None and len(row_names) == 1:
        (batch_name,) = row_names
    other_names = {size for spec in inputs for size in spec.shape if isinstance(size, str)} - row_names
    only_axis_0 = all(spec.batch_axis in (0, None) for spec in batched_inputs)
    batched_outputs = []
    for spec in outputs:
        # Axis 0 is a guess for an output, and not made where something speaks against it: its name is that of
        # another dimension, or rows are on different axes and this output has several open ones.
        guess = other_names.isdisjoint(spec.shape[:1]) and (only_axis_0 or _open_axes(spec) == 1)
        batched_outputs.append(_with_axis(spec, batch_name, overrides, guess=guess))
    obstacle = _obstacle(batched_inputs, batched_outputs, overrides)
    if obstacle:
        return BatchAxes(tuple(inputs), tuple(outputs), obstacle)
    return BatchAxes(tuple(batched_inputs), tuple(batched_outputs), "")


def _shared_name(shapes: Sequence[tuple[int | str | None, ...]]) -> str | None:
    """The symbolic name that occurs in the most inputs, if in at least two. Of several, the one at the lowest
    axis of the first input, or of the first input that has any of them."""
    counts = Counter(name for shape in shapes for name in {size for size in shape if isinstance(size, str)})
    shared = max(counts.values(), default=0)
    if shared < 2:
        return None
    candidates = (size for shape in shapes for size in shape if isinstance(size, str))
    return next(name for name in candidates if counts[name] == shared)


def _row_names(inputs: Sequence[TensorSpec]) -> set[str]:
    """The symbolic names on batch axes."""
    sizes = (spec.shape[spec.batch_axis] for spec in inputs if spec.batch_axis is not None)
    return {size for size in sizes if isinstance(size, str)}


def _with_axis(
    spec: TensorSpec, batch_name: str | None, overrides: Mapping[str, int | None], *, guess: bool = True
) -> TensorSpec:
    """The spec with its batch axis. Without `guess`, an open axis 0 alone is not taken for it."""
    shape = spec.shape
    axis: int | None = None
    if spec.name in overrides:
        axis = overrides[spec.name]
        if axis is not None and axis < len(shape) and isinstance(shape[axis], int):
            shape = (*shape[:axis], None, *shape[axis + 1 :])
    elif batch_name is not None and batch_name in shape:
        axis = shape.index(batch_name)
    elif shape and not isinstance(shape[0], int) and guess:
        axis = 0
    return msgspec.structs.replace(spec, shape=shape, batch_axis=axis)


def _check_overrides(
    overrides: Mapping[str, int | None], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """Outputs are less strict: exporters often write down the shapes of one example, or none."""
    known = {spec.name: spec for spec in (*inputs, *outputs)}
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"there are {', '.join(known)}; not {', '.join(unknown)}")
    input_names = {spec.name for spec in inputs}
    for name, axis in overrides.items():
        shape = known[name].shape
        is_input = name in input_names
        if axis is None or (not shape and not is_input and axis >= 0):
            continue
        if not 0 <= axis < len(shape):
            raise ValueError(f"{name} has shape {list(shape)}; there is no axis {axis}")
        if is_input and isinstance(shape[axis], int):
            raise ValueError(f"axis {axis} of {name} is fixed at {shape[axis]} by the model")


def _obstacle(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], overrides: Mapping[str, int | None]) -> str:
    """Why the model is never batched; empty if it is."""
    if all(spec.batch_axis is None for spec in inputs):
        return "no input has a batch axis"
    for spec in inputs:
        # An open dimension may well be the rows: only who says so by name in `batch_axes` is believed.
        if spec.batch_axis is None and _open_axes(spec) and spec.name not in overrides:
            return f"the batch axis of input {spec.name} is unknown"
    for spec in outputs:
        if spec.batch_axis is None:
            return f"output {spec.name} has no batch axis, or an unknown one"
    for spec in (*inputs, *outputs):
        size = spec.shape[spec.batch_axis] if spec.batch_axis is not None and spec.shape else None
        if isinstance(size, str) and spec.shape.count(size) > 1:
            return f"{spec.name} has {size} on two axes, so both would grow with the rows"
    return ""


def _open_axes(spec: TensorSpec) -> int:
    return sum(not isinstance(size, int) for size in spec.shape)
