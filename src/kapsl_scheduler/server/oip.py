"""What a request of the Open Inference Protocol v2 is, whatever encoding it came in, and the protocol's own words for
datatypes and priorities.

Nothing behind this module sees bytes. What is not here: the encodings (`server.oip_json`, `server.oip_proto`), the
bytes of a tensor (`server.oip_raw`), the fit of the inputs to a model (`core.admission`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
import numpy as np

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.server.oip_raw import CANONICAL
from kapsl_scheduler.types import Array, InferenceRequest, Priority, Tensors, dtype_name, numpy_dtype

__all__ = [
    "NO_CLASSIFICATION",
    "NO_SHARED_MEMORY",
    "InferCall",
    "check_outputs",
    "chosen_outputs",
    "datatype_of",
    "datatype_of_dtype",
    "numpy_dtype_of",
    "priority_from_oip",
    "set_outputs",
    "set_parameters",
]

NO_SHARED_MEMORY: Final = "shared memory is not offered, expected the tensor in the body"
NO_CLASSIFICATION: Final = "classification is not offered, ask for the tensor"

_DATATYPES: Final[Mapping[str, str]] = {canonical: datatype for datatype, canonical in CANONICAL.items()}
# Not by `dtype.name`, which takes 5 µs.
_OF_DTYPE: Final = {numpy_dtype(canonical): datatype for datatype, canonical in CANONICAL.items()}


def datatype_of(dtype: str) -> str:
    """The protocol's name of a canonical dtype: `FP32` of `float32`. Any other name comes back as it is."""
    return _DATATYPES.get(dtype, dtype)


def datatype_of_dtype(dtype: np.dtype[Any]) -> str:
    """The same for an array's dtype."""
    return _OF_DTYPE.get(dtype) or datatype_of(dtype_name(dtype))


def numpy_dtype_of(datatype: str) -> np.dtype[Any]:
    """The numpy dtype of `FP32` and the like (`BYTES` is `object`). Raises `KeyError` for any other name."""
    return numpy_dtype(CANONICAL[datatype])


def priority_from_oip(priority: int) -> Priority | None:
    """OIP counts from 1, the highest; 0 means the model's default class, here None."""
    if priority <= 0:
        return None
    return Priority(min(priority, 3) - 1)


class InferCall(msgspec.Struct):
    """One decoded call, whatever encoding it came in.

    `priority` None is the model's default class; `timeout` is in seconds; `outputs` None asks for all. `binary` says
    which outputs are to come back as bytes: all (True), none, or those of these names.
    """

    request: InferenceRequest
    id: str = ""
    priority: Priority | None = None
    timeout: float | None = None
    outputs: tuple[str, ...] | None = None
    binary: bool | frozenset[str] = False


def set_parameters(call: InferCall, priority: int, timeout: int, sequence_id: int | str) -> None:
    """The protocol's parameters of a request, `timeout` in microseconds; 0 is one that was not given."""
    call.priority = priority_from_oip(priority)
    call.timeout = timeout / 1e6 if timeout else None
    if sequence_id:
        call.request.session_id = str(sequence_id)


def set_outputs(call: InferCall, names: Iterable[str]) -> None:
    """The outputs that a call asks for. Raises `InvalidInput` for one that is asked for twice."""
    call.outputs = tuple(names)
    if len(set(call.outputs)) < len(call.outputs):
        twice = next(name for name, count in Counter(call.outputs).items() if count > 1)
        raise InvalidInput(f"output {twice!r} was asked for twice, expected once")


def check_outputs(wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raises `InvalidInput` for the first wanted output that is not known."""
    names = tuple(known)
    for name in wanted:
        if name not in names:
            expected = ", ".join(map(repr, names))
            raise InvalidInput(f"output {name!r} was asked for, expected one of {expected}")


def chosen_outputs(outputs: Tensors, call: InferCall) -> Iterable[tuple[str, Array]]:
    """The outputs that a call asked for, in its order; all of them if it named none. Raises `InvalidInput` for one that
    the model did not return."""
    if call.outputs is None:
        return outputs.items()
    check_outputs(call.outputs, outputs)
    return [(wanted, outputs[wanted]) for wanted in call.outputs]
