"""Admission: what a request must be to enter the queue, and in which class.

Inputs are checked against the model's declared tensors: names, rank, every dimension, dtype. A request that ends
here names the input, what came and what was expected. Byte lengths of encoded tensors are checked where they are
decoded (core.wire); what a full queue does is core.queue's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from kapsl_scheduler.core.batch import Shape
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.types import Array, ModelInfo, Priority, Tensors, TensorSpec, dtype_name, numpy_dtype

__all__ = ["Admission", "Admitted", "PlainInput", "RequestProfile", "check_timeout", "determine_priority"]

UNDECLARED_INPUT: Final = "input"
"""The name of the one input of a model that declares none."""


class RequestProfile(msgspec.Struct, frozen=True):
    """What `determine_priority` looks at. None: unknown. `priority` 0 asks for the first class; `sla_deadline` is
    in milliseconds, `input_size_bytes` is for one row."""

    priority: int = 1
    sla_deadline: float | None = None
    batch_size: int = 1
    input_size_bytes: int | None = None
    estimated_flops: float | None = None


def determine_priority(profile: RequestProfile) -> Priority:
    """The original's policy: latency-critical if any one of its six conditions holds, else throughput.

    Priority 0; a deadline strictly under 250 ms; an input of at most 500,000 bytes; at most 10^9 FLOPs;
    input x batch of at most 2,000,000 bytes; a batch of at most 4. What is unknown does not count.
    """
    size, flops = profile.input_size_bytes, profile.estimated_flops
    critical = (
        profile.priority == 0
        or (profile.sla_deadline is not None and profile.sla_deadline < 250)
        or (size is not None and (size <= 500_000 or size * profile.batch_size <= 2_000_000))
        or (flops is not None and flops <= 1e9)
        or profile.batch_size <= 4
    )
    return Priority.LATENCY_CRITICAL if critical else Priority.THROUGHPUT


def check_timeout(name: str, seconds: Any) -> float:
    """Seconds that are a sensible limit, as a float whatever number came. Raises `InvalidInput`."""
    try:
        if not isinstance(seconds, str | bytes) and (limit := float(seconds)) > 0:
            return limit
    except (TypeError, ValueError, OverflowError):
        pass  # no number, or none that a clock can count to
    raise InvalidInput(f"{name}: expected more than 0 seconds, got {seconds!r}")


_MOST_SHAPES: Final = 1024  # of which the answer is kept at hand; larger requests are looked at one by one

Admitted = tuple[tuple[Array, ...], int, Shape, bool, int]
"""A valid request: its inputs under the names of its shape, its rows, what it shares batches with, whether its caller
left the batch axis out, its bytes. A plain tuple: a named one would cost every request as much as looking at it."""


class Admission:
    """Validates requests against one model. `max_rows` is the most rows that one call may have."""

    def __init__(self, info: ModelInfo, max_rows: int) -> None:
        self.info = info
        self.max_rows = max_rows
        self._specs = {spec.name: spec for spec in info.inputs}
        self._shapes: WeakValueDictionary[tuple[object, ...], Shape] = WeakValueDictionary()
        self.plain: PlainInput | None = None
        if len(info.inputs) == 1 and info.batchable:
            spec = info.inputs[0]
            inner = spec.shape[1:]
            if spec.batch_axis == 0 and spec.dtype != "string" and all(isinstance(size, int) for size in inner):
                self.plain = PlainInput(spec, Shape(inner, (spec.name,), batchable=True), max_rows)

    def admit(self, inputs: Any) -> Admitted:
        """The request's arrays, checked. Raises `InvalidInput`; more rows than `max_rows` are invalid too."""
        plain = self.plain
        if plain is not None:
            array = inputs.get(plain.name) if type(inputs) is dict and len(inputs) == 1 else inputs
            if type(array) is np.ndarray and array.dtype == plain.dtype and array.shape in plain.shapes:
                rows, bare, nbytes = plain.shapes[array.shape]
                return (array,), rows, plain.shape, bare, nbytes
        admitted = self.normalise(inputs)
        if admitted[1] > self.max_rows:
            raise InvalidInput(f"the request has {admitted[1]} rows, expected at most {self.max_rows} (max_batch_size)")
        return admitted

    def normalise(self, inputs: Any) -> Admitted:
        """Like `admit`, for any number of rows."""
        named = self._named(inputs)
        if not self.info.inputs:
            return self._undeclared(named)
        self._check_names(named)
        arrays = {spec.name: _as_array(spec, named[spec.name]) for spec in self.info.inputs}
        bare = self._is_bare(arrays)
        if bare:
            arrays = {
                name: array if (axis := self._specs[name].batch_axis) is None else np.expand_dims(array, axis)
                for name, array in arrays.items()
            }
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.info.inputs:
            _check_dimensions(spec, arrays[spec.name], sizes)
        rows = self._rows(arrays)
        return tuple(arrays.values()), rows, self._shape_of(arrays), bare, _nbytes(arrays)

    def _named(self, inputs: Any) -> dict[str, Any]:
        if isinstance(inputs, Mapping):
            return dict(inputs)
        if len(self.info.inputs) > 1:
            names = ", ".join(repr(spec.name) for spec in self.info.inputs)
            raise InvalidInput(f"one unnamed array came, expected a mapping with the inputs {names}")
        return {self.info.inputs[0].name if self.info.inputs else UNDECLARED_INPUT: inputs}

    def _check_names(self, named: Mapping[str, Any]) -> None:
        missing = [name for name in self._specs if name not in named]
        unexpected = [name for name in named if name not in self._specs]
        if missing or unexpected:
            faults = [f"input {name!r} is missing" for name in missing]
            faults += [f"input {name!r} is not one of the model's" for name in unexpected]
            raise InvalidInput(f"{'; '.join(faults)}; expected {', '.join(repr(name) for name in self._specs)}")

    def _is_bare(self, arrays: Mapping[str, Array]) -> bool:
        """Whether every batched input lacks just its batch axis: one row, which comes back without it."""
        batched = [spec for spec in self.info.inputs if spec.batch_axis is not None]
        if not self.info.batchable or not batched:
            return False
        return all(arrays[spec.name].ndim == len(spec.shape) - 1 for spec in batched)

    def _rows(self, arrays: Mapping[str, Array]) -> int:
        if not self.info.batchable:
            return 1
        rows: int | None = None
        first = ""
        for spec in self.info.inputs:
            if spec.batch_axis is None:
                continue
            came = arrays[spec.name].shape[spec.batch_axis]
            if came == 0:
                raise InvalidInput(f"input {spec.name!r}: no rows on axis {spec.batch_axis}, expected at least 1")
            if rows is None:
                rows, first = came, spec.name
            elif came != rows:
                raise InvalidInput(
                    f"input {spec.name!r}: {came} rows on axis {spec.batch_axis}, expected {rows} as in {first!r}"
                )
        return 1 if rows is None else rows

    def _shape_of(self, arrays: Mapping[str, Array]) -> Shape:
        if self.plain is not None:
            return self.plain.shape
        key: list[object] = []
        for spec in self.info.inputs:
            array = arrays[spec.name]
            axis = spec.batch_axis
            if not self.info.batchable or axis is not None:
                key.append(array.shape if axis is None else array.shape[:axis] + array.shape[axis + 1 :])
            else:
                # The same for all members of a batch, so its value is part of what they have in common.
                value = tuple(array.ravel().tolist()) if array.dtype == object else array.tobytes()
                key.append((array.shape, value))
        return self._intern(tuple(key), tuple(arrays))

    def _undeclared(self, named: Mapping[str, Any]) -> Admitted:
        """A model that declares no inputs: what came must agree in rows on axis 0, where it is batched at all."""
        arrays = {name: _any_array(name, named[name]) for name in sorted(named)}
        if not arrays:
            raise InvalidInput("no inputs came, expected at least one array")
        inner = 1 if self.info.batchable else 0
        key = tuple((name, array.dtype, array.shape[inner:]) for name, array in arrays.items())
        shape = self._intern(key, tuple(arrays))
        if not self.info.batchable:
            return tuple(arrays.values()), 1, shape, False, _nbytes(arrays)
        rows: int | None = None
        for name, array in arrays.items():
            if array.ndim == 0 or array.shape[0] == 0:
                raise InvalidInput(f"input {name!r}: shape {list(array.shape)}, expected at least 1 row on axis 0")
            if rows is not None and array.shape[0] != rows:
                raise InvalidInput(f"input {name!r}: {array.shape[0]} rows, expected {rows} as in the other inputs")
            rows = array.shape[0]
        return tuple(arrays.values()), rows or 1, shape, False, _nbytes(arrays)

    def _intern(self, key: tuple[object, ...], names: tuple[str, ...]) -> Shape:
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = Shape(key, names, batchable=self.info.batchable)
        return shape


class PlainInput:
    """Of a model with one input of fixed inner dimensions: what one array may be. `shapes` has the shapes that it may
    have, and what admission says of each: its rows, whether it lacks the batch axis, its bytes."""

    __slots__ = ("dtype", "name", "shape", "shapes")

    def __init__(self, spec: TensorSpec, shape: Shape, max_rows: int) -> None:
        inner = tuple(size for size in spec.shape[1:] if isinstance(size, int))
        self.name = spec.name
        self.dtype = numpy_dtype(spec.dtype)
        nbytes = math.prod(inner) * self.dtype.itemsize
        most = min(max_rows, _MOST_SHAPES)
        self.shapes = {(rows, *inner): (rows, False, nbytes * rows) for rows in range(1, most + 1)}
        self.shapes[inner] = (1, True, nbytes)
        self.shape = shape


def _as_array(spec: TensorSpec, value: Any) -> Array:
    """An array of the model's dtype: plain values are converted, arrays must have it already."""
    dtype = numpy_dtype(spec.dtype)
    if not isinstance(value, (np.ndarray, np.generic)) and not hasattr(value, "__array__"):
        return _converted(spec, value, dtype)
    array = np.asarray(value)
    if spec.dtype == "string" and array.dtype.kind in "OUS":
        return _strings(spec, array.astype(object, copy=False))
    if array.dtype != dtype:
        came = dtype_name(array.dtype) if array.dtype.isnative else f"{array.dtype.str} (of another byte order)"
        raise InvalidInput(f"input {spec.name!r}: dtype {came}, expected {spec.dtype}")
    return array


def _converted(spec: TensorSpec, value: Any, dtype: np.dtype[Any]) -> Array:
    try:
        natural = np.asarray(value)
        came = natural.dtype
        if dtype.kind in "iub" and came.kind == "f" and natural.size:
            natural = np.asarray(value, object)  # numpy takes integers on both sides of 2**63 for floats
            if not all(isinstance(number, int) for number in natural.flat):
                raise InvalidInput(f"input {spec.name!r}: fractional numbers came, expected {spec.dtype}")
        elif (dtype.kind == "O") != (came.kind in "OUS"):
            name = "object" if came.kind == "O" else dtype_name(came)
            raise InvalidInput(f"input {spec.name!r}: {name} came, expected {spec.dtype}")
        with np.errstate(over="raise"):
            converted = np.asarray(value, dtype)
    except (ValueError, TypeError, OverflowError, FloatingPointError) as error:
        raise InvalidInput(f"input {spec.name!r}: not convertible to {spec.dtype}: {error}") from error
    if dtype.kind == "O":
        return _strings(spec, converted)
    if dtype.kind in "iub" and not np.array_equal(natural, converted):
        raise InvalidInput(f"input {spec.name!r}: numbers outside the range of {spec.dtype} came")
    return converted


def _strings(spec: TensorSpec, array: Array) -> Array:
    for element in array.ravel():
        if not isinstance(element, (str, bytes)):
            raise InvalidInput(f"input {spec.name!r}: {type(element).__name__} came, expected str or bytes")
    return array


def _any_array(name: str, value: Any) -> Array:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InvalidInput(f"input {name!r}: not convertible to an array: {error}") from error


def _check_dimensions(spec: TensorSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    """Rank and every dimension; a symbolic name must mean one size wherever it stands (`sizes` remembers)."""
    if array.ndim != len(spec.shape):
        raise InvalidInput(
            f"input {spec.name!r}: rank {array.ndim} (shape {list(array.shape)}), expected rank {len(spec.shape)} "
            f"(shape {_shown(spec)})"
        )
    for axis, (came, expected) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if axis == spec.batch_axis or expected is None:
            continue
        if isinstance(expected, str):
            size, owner = sizes.setdefault(expected, (came, spec.name))
            if came != size:
                raise InvalidInput(
                    f"input {spec.name!r}: axis {axis} ({expected!r}) is {came}, expected {size} as in {owner!r}"
                )
        elif came != expected:
            raise InvalidInput(
                f"input {spec.name!r}: axis {axis} is {came} (shape {list(array.shape)}), expected {expected} "
                f"(shape {_shown(spec)})"
            )


def _shown(spec: TensorSpec) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in spec.shape) + "]"


def _nbytes(arrays: Tensors) -> int:
    """Bytes of the inputs; strings count their characters, since an array of objects holds only pointers."""
    return sum(_characters(array) if array.dtype.kind == "O" else array.nbytes for array in arrays.values())


def _characters(array: Array) -> int:
    return sum(
        len(element) if isinstance(element, (str, bytes)) else array.itemsize  # undeclared inputs may be anything
        for element in array.ravel()
    )
