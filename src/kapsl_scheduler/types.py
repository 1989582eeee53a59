"""The nouns of a request and of a model: what callers hand in, what they get back, what engines declare.

Data only. Validation against a model lives in `core.admission`, the wire form of tensors in `core.wire`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import msgspec
import numpy as np

from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.priority import Priority

__all__ = [
    "EngineMetrics",
    "InferenceRequest",
    "InferenceResponse",
    "ModelInfo",
    "Priority",
    "RequestMetadata",
    "TensorSpec",
    "Tensors",
    "canonical_dtype",
    "dtype_name",
    "numpy_dtype",
]

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = Mapping[str, Array]


# ------------------------------------------------------------------------------------------------ dtypes

_NUMPY: Final[Mapping[str, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),  # which numpy knows by way of ml_dtypes
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "string": np.dtype(object),  # elements are str or bytes
}
_ALIASES: Final[Mapping[str, str]] = {
    **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"fp{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "half": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "double": "float64",
    "str": "string",
    "utf8": "string",
    "bytes": "string",
    "boolean": "bool",
}


def canonical_dtype(name: str) -> str | None:
    """The canonical name of a dtype or of one of its aliases, in any case; None if there is none."""
    lowered = name.strip().lower()
    lowered = _ALIASES.get(lowered, lowered)
    return lowered if lowered in _NUMPY else None


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a canonical name (`string` is `object`). Raises `KeyError` for any other name."""
    return _NUMPY[name]


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The canonical name of a numpy dtype; numpy's own name where there is no canonical one."""
    return "string" if dtype.kind in "OUS" else dtype.name


# ------------------------------------------------------------------------------------------------- model


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a model.

    `shape` holds an int for a fixed dimension, a name for a symbolic one and None for an unnamed one, the batch
    axis included. `batch_axis` is the axis on which requests are concatenated, None where the tensor has none.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    batch_axis: int | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    """What an engine says of its model. All engines of one `Scheduler` report equal infos.

    `batchable` is whether rows of several requests may share one call. `inputs` may be empty for an engine that
    does not know its inputs (a bare function): then nothing is validated beyond rows that agree. `streams` is whether
    one request may have several answers, by `infer_stream`.
    """

    name: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    version: str = "1"
    framework: str = ""
    batchable: bool = False
    metadata: Mapping[str, str] = {}
    streams: bool = False


class EngineMetrics(msgspec.Struct, frozen=True):
    """What an engine has done: calls, rows and errors are counts since `load`, `busy_time` is in seconds."""

    calls: int = 0
    rows: int = 0
    errors: int = 0
    busy_time: float = 0.0


# ---------------------------------------------------------------------------------------------- requests


class RequestMetadata(msgspec.Struct, frozen=True):
    """What travels with a request. A keyword of the call beats the field of the same meaning here.

    `timeout_ms` is in milliseconds (the original's unit). `tenant` groups requests for fair service where
    `QueuePolicy.tenant_fairness` is on. `auth_token` and `model_version` are for the server and are not read by
    the scheduler.
    """

    request_id: str | None = None
    timeout_ms: float | None = None
    priority: Priority | None = None
    force_cpu: bool = False
    tenant: str | None = None
    model_version: str | None = None
    auth_token: str | None = None


class InferenceRequest:
    """Inputs for one call of a model: 1…n rows.

    `inputs` maps input names to arrays (or to what converts to one: lists, scalars); a single array, list or
    scalar is taken for a model with one input. Arrays must not be changed before the answer is there.
    """

    __slots__ = ("inputs", "metadata", "session_id")

    def __init__(self, inputs: Any, *, session_id: str | None = None, metadata: RequestMetadata | None = None) -> None:
        self.inputs = inputs
        self.session_id = session_id
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"InferenceRequest(session_id={self.session_id!r}, metadata={self.metadata!r})"


class InferenceResponse(msgspec.Struct, gc=False):
    """The answer to one request (or one chunk of a stream); `of` makes one of a mapping.

    Rows are views of the batch's output array, so `copy()` what must outlive the others' memory. `queue_time` and
    `compute_time` are seconds; `batch_rows` is the number of rows of the engine call that answered.
    """

    _names: tuple[str, ...]
    _arrays: tuple[Array, ...]
    queue_time: float
    compute_time: float
    batch_rows: int
    _request_id: str | None = None

    @classmethod
    def of(
        cls, outputs: Tensors, queue_time: float, compute_time: float, batch_rows: int, request_id: str | None = None
    ) -> InferenceResponse:
        """A response with these outputs."""
        return cls(tuple(outputs), tuple(outputs.values()), queue_time, compute_time, batch_rows, request_id)

    @property
    def outputs(self) -> dict[str, Array]:
        """Every output by its name."""
        if len(self._names) == 1:  # as mostly, and at a sixth of the cost
            return {self._names[0]: self._arrays[0]}
        return dict(zip(self._names, self._arrays, strict=True))

    @property
    def output(self) -> Array:
        """The first output."""
        if not self._arrays:
            raise InferenceError("the model has no outputs")
        return self._arrays[0]

    @property
    def request_id(self) -> str:
        """The caller's id; a fresh one, made when first asked for, if the caller gave none."""
        if self._request_id is None:
            self._request_id = uuid.uuid4().hex
        return self._request_id

    def copy(self) -> InferenceResponse:
        """The same answer with arrays of its own."""
        return msgspec.structs.replace(self, _arrays=tuple(np.copy(array) for array in self._arrays))
