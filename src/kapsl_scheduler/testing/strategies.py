"""Hypothesis strategies for what a model takes. They need hypothesis, so the package does not import them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from kapsl_scheduler.types import Array, ModelInfo, TensorSpec, numpy_dtype

__all__ = ["inputs_for"]


@st.composite
def inputs_for(
    draw: st.DrawFn, info: ModelInfo, *, min_rows: int = 1, max_rows: int = 4, max_size: int = 4
) -> dict[str, Array]:
    """Valid inputs of `info`, which must declare them: `min_rows` to `max_rows` rows, open dimensions from 1 to
    `max_size`, one size for each symbolic name. Floats are from -128 to 128, strings are `str`."""
    rows = draw(st.integers(min_rows, max_rows))
    names = {size for spec in info.inputs for size in spec.shape if isinstance(size, str)}
    sizes = {name: draw(st.integers(1, max_size)) for name in sorted(names)}

    def size_of(spec: TensorSpec, axis: int) -> int:
        if axis == spec.batch_axis:
            return rows
        size = spec.shape[axis]
        if isinstance(size, int):
            return size
        return draw(st.integers(1, max_size)) if size is None else sizes[size]

    shapes = {spec.name: tuple(size_of(spec, axis) for axis in range(len(spec.shape))) for spec in info.inputs}
    return {
        spec.name: draw(arrays_of.arrays(numpy_dtype(spec.dtype), shapes[spec.name], elements=_elements(spec.dtype)))
        for spec in info.inputs
    }


def _elements(dtype: str) -> st.SearchStrategy[Any]:
    if dtype == "string":
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    kind = numpy_dtype(dtype)
    if kind.kind != "f":
        return arrays_of.from_dtype(kind)
    return arrays_of.from_dtype(kind, min_value=-128, max_value=128)
