"""One request as the queue sees it, and a batch of them: stack rows into one array per input, split rows out.

What is not here: which requests go into a batch (core.forming) and what a valid request is (core.admission).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec
import numpy as np

from kapsl_scheduler.core.policies import BatchPolicy
from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.types import Array, ModelInfo, Priority, Tensors

__all__ = ["Batch", "BatchPolicy", "Layout", "Pending", "Shape", "State"]


class Shape:
    """What requests must have in common to share a batch: compared by identity, interned by admission.

    `names` are those of the inputs, in the order in which requests have them. `batchable` is False where a request
    never shares its call.
    """

    __slots__ = ("__weakref__", "batchable", "description", "names")

    def __init__(self, description: object, names: tuple[str, ...] = (), *, batchable: bool) -> None:
        self.description = description
        self.names = names
        self.batchable = batchable

    def __repr__(self) -> str:
        return f"Shape({self.description!r}, batchable={self.batchable})"


class State(enum.IntEnum):
    """Where a request is. `RETURNED`: it ran in a batch that failed and waits to run alone."""

    NEW = 0
    WAITING = 1
    QUEUED = 2
    RUNNING = 3
    RETURNED = 4
    DONE = 5


class Pending(msgspec.Struct, eq=False):
    """One request on its way: the one slotted object that it costs. `inputs` are under the names of its shape.

    `bare` says that the caller's arrays lack their batch axis (those of `inputs` may): one row, which goes back without
    it. `deadline` is absolute, infinite if there is none; `timeout`, its distance from the arrival, is None then.
    `urgency` is what orders the class: the deadline, or arrival + the default horizon. `apart` is what keeps the
    request from sharing a lane with all of its class and shape, None if nothing does; `set_apart` derives it.
    `future`, `stream`, `home`, `overflow` and `block_timeout` belong to the runtime and are opaque here.
    """

    inputs: tuple[Array, ...]
    rows: int
    shape: Shape
    bare: bool
    priority: Priority
    arrival: float
    deadline: float
    urgency: float
    timeout: float | None
    nbytes: int
    future: Any
    home: Any = None
    request_id: str | None = None
    tenant: str | None = None
    pin: int | None = None
    stream: Any = None
    apart: tuple[str | None, int | None, bool] | None = None
    sequence: int = 0
    state: State = State.NEW
    losses: int = 0
    overflow: Any = None
    block_timeout: float | None = None

    def set_apart(self) -> None:
        """To be called when tenant, pin or stream have been given."""
        plain = self.tenant is None and self.pin is None and self.stream is None
        self.apart = None if plain else (self.tenant, self.pin, self.stream is not None)

    def unpin(self) -> None:
        """Any engine may run it."""
        self.pin = None
        self.set_apart()


class Batch(msgspec.Struct, eq=False):
    """Members of one engine call, leaders first. `rows_by_class` and `backlog` (which classes still had work
    queued when this one started) feed the shares."""

    members: list[Pending]
    rows: int
    shape: Shape
    leader: Priority
    rows_by_class: tuple[int, ...]
    backlog: tuple[bool, ...]
    started: float

    def without(self, late: Sequence[Pending]) -> Batch | None:
        """The batch without the members that are too late for it: those are DONE. None if no others are left."""
        for item in late:
            item.state = State.DONE
        members = [item for item in self.members if item.state is not State.DONE]
        if not members:
            return None
        by_class = tuple(sum(item.rows for item in members if item.priority is each) for each in Priority)
        return msgspec.structs.replace(self, members=members, rows=sum(by_class), rows_by_class=by_class)


class Layout:
    """The batch axes of a model's tensors: how requests are stacked and answers split.

    Every batched tensor carries its batch axis; a tensor that a model does not declare has it at 0. An input
    whose axis is None is the same for all members of a batch, and is passed once.
    """

    __slots__ = ("_input_axes", "_output_axes", "_ranks")

    _UNDECLARED: Final = 0

    def __init__(self, info: ModelInfo) -> None:
        self._input_axes = {spec.name: spec.batch_axis for spec in info.inputs}
        self._output_axes = {spec.name: spec.batch_axis for spec in info.outputs}
        self._ranks = {spec.name: len(spec.shape) for spec in info.inputs}

    def stack(self, members: Sequence[Pending]) -> Tensors:
        """One array per input. A lone member's arrays are passed on without a copy."""
        first = members[0]
        named = zip(first.shape.names, first.inputs, strict=True)
        if len(members) == 1:
            return {name: self._with_axis(name, array) for name, array in named} if first.bare else dict(named)
        stacked: dict[str, Array] = {}
        for index, (name, array) in enumerate(named):
            axis = self._input_axes.get(name, self._UNDECLARED)
            if axis is None:
                stacked[name] = array
            else:
                stacked[name] = self._concatenate(name, axis, [member.inputs[index] for member in members])
        return stacked

    def _concatenate(self, name: str, axis: int, arrays: list[Array]) -> Array:
        first = arrays[0]
        if axis == 0 and first.nbytes and first.dtype.kind != "O":
            inner = first.shape if first.ndim < self._ranks.get(name, 0) else first.shape[1:]
            # Joining the buffers costs a third of what np.concatenate does for small rows.
            try:
                joined = bytearray().join(cast("list[bytes]", arrays))
            except (BufferError, TypeError, ValueError):
                pass  # an array that is not contiguous; which of these it raises depends on the versions
            else:
                rows = len(joined) // (math.prod(inner) * first.itemsize)
                return np.ndarray((rows, *inner), first.dtype, joined)
        return np.concatenate([self._with_axis(name, array) for array in arrays], axis)

    def _with_axis(self, name: str, array: Array) -> Array:
        """The array with its batch axis, which a bare one lacks."""
        axis = self._input_axes.get(name)
        return array if axis is None or array.ndim == self._ranks[name] else np.expand_dims(array, axis)

    def split(self, outputs: Tensors, batch: Batch) -> Iterable[tuple[Array, ...]]:
        """Each member's rows of every output, in the outputs' order, as views.

        Raises `InferenceError` where an output does not have the batch's rows on its batch axis.
        """
        if type(outputs) is not dict and not isinstance(outputs, Mapping):
            raise InferenceError(f"the engine returned {type(outputs).__name__}, expected a mapping of arrays")
        members = batch.members
        if not batch.shape.batchable:
            return (tuple(outputs.values()),)
        rows = batch.rows
        axes: list[int | None] = []
        for name, array in outputs.items():
            if not isinstance(array, np.ndarray):
                raise InferenceError(f"output {name!r}: expected an array, got {type(array).__name__}")
            axis = self._output_axes.get(name, self._UNDECLARED)
            if axis is not None and (array.ndim <= axis or array.shape[axis] != rows):
                raise InferenceError(
                    f"output {name!r}: expected {rows} rows on axis {axis}, got shape {list(array.shape)}"
                )
            axes.append(axis)
        if len(members) == 1 and not members[0].bare:
            return (tuple(outputs.values()),)  # a lone request's answer is the whole
        if rows == len(members) and not any(axes) and None not in axes:
            bare = [member.bare for member in members]
            return zip(*[_single_rows(array, bare) for array in outputs.values()], strict=True)
        return _any_rows(outputs, members, axes)

    def row(self, outputs: Tensors) -> dict[str, Array]:
        """Outputs of one row without their batch axis; what does not have just one row there stays as it is."""
        axes = self._output_axes
        plain: dict[str, Array] = {}
        for name, array in outputs.items():
            axis = axes.get(name, self._UNDECLARED)
            lone = axis is not None and array.ndim > axis and array.shape[axis] == 1
            plain[name] = array[(slice(None),) * axis + (0, ...)] if lone and axis is not None else array
        return plain

    def join(self, parts: Sequence[Tensors]) -> dict[str, Array]:
        """The outputs of one request that was split into several calls, joined again in order."""
        axes = self._output_axes
        joined: dict[str, Array] = {}
        for name, array in parts[0].items():
            axis = axes.get(name, self._UNDECLARED)
            joined[name] = array if axis is None else np.concatenate([part[name] for part in parts], axis)
        return joined

    def slice_inputs(self, shape: Shape, inputs: Sequence[Array], start: int, stop: int) -> dict[str, Array]:
        """Rows [start, stop) of one request's inputs, as views."""
        axes = self._input_axes
        part: dict[str, Array] = {}
        for name, array in zip(shape.names, inputs, strict=True):
            axis = axes.get(name, self._UNDECLARED)
            part[name] = array if axis is None else array[(slice(None),) * axis + (slice(start, stop),)]
        return part


def _single_rows(array: Array, bare: Sequence[bool]) -> Sequence[Array]:
    """The common case, kept tight: one row each, on axis 0. Going through an array costs half of what slices of it do,
    but gives numbers where a row has no dimension of its own."""
    if True not in bare:
        return list(array[:, np.newaxis])
    if False not in bare and array.ndim > 1:
        return list(array)
    return [array[index, ...] if lone else array[index : index + 1] for index, lone in enumerate(bare)]


def _any_rows(outputs: Tensors, members: Sequence[Pending], axes: Sequence[int | None]) -> Iterable[tuple[Array, ...]]:
    start = 0
    for member in members:
        stop = start + member.rows
        part: list[Array] = []
        for axis, array in zip(axes, outputs.values(), strict=True):
            if axis is None:
                part.append(array)
            else:
                index = start if member.bare else slice(start, stop)
                part.append(array[(slice(None),) * axis + (index, ...)])  # "...": a view even of no dimensions
        yield tuple(part)
        start = stop
