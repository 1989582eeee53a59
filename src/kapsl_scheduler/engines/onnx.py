"""ONNX Runtime as an engine: sessions, providers, the model's own names, dtypes and batch axes.

What is not here: which axis of a tensor is its batch axis (engines.batch_axes), what a valid request is.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kapsl_scheduler.engines.batch_axes import find_batch_axes
from kapsl_scheduler.engines.tally import CallTally, RowCounter
from kapsl_scheduler.errors import (
    Backend,
    EngineError,
    InferenceError,
    InvalidInput,
    ModelLoadError,
    ModelNotLoaded,
    Unavailable,
)
from kapsl_scheduler.types import Array, EngineMetrics, ModelInfo, Tensors, TensorSpec, numpy_dtype

__all__ = ["OnnxEngine", "usable_providers"]

# A provider's name, or its name and its options, as onnxruntime takes them.
Provider = str | tuple[str, Mapping[str, Any]]

_CONTROL_FLOW: Final = (b"If", b"Loop", b"Scan", b"SequenceMap")
_READ_FOR_OPERATORS: Final = 16 * 2**20  # bytes

_CPU: Final = "CPUExecutionProvider"
_SUFFIX: Final = "ExecutionProvider"

_GRAPH_LEVELS: Final[Mapping[str, str]] = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}

# Types as onnxruntime spells them. What is missing here (sequences, maps, ...) has no numpy array.
_DTYPES: Final[Mapping[str, str]] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(bool)": "bool",
    "tensor(string)": "string",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}

_BFLOAT16: Final = numpy_dtype("bfloat16")
_ONNX_BFLOAT16: Final = 16  # the number of the type in ONNX's own list

# onnxruntime has a class for each of its status codes, and no base class for them but Exception.
_ERRORS: Final[Mapping[str, type[EngineError]]] = {
    "InvalidArgument": InvalidInput,
    "EPFail": Unavailable,
    "DeviceReset": Unavailable,
    "EngineError": Backend,
    "NotImplemented": Backend,
    "NoModel": ModelNotLoaded,
    "ValueError": InvalidInput,  # an input is missing
    "UnicodeEncodeError": InvalidInput,
}

# Warnings are about how a model was exported, which nobody who serves it can change. What goes wrong in a call
# is raised, so logging it too would only fill the log.
_LOG_ERRORS: Final = 3
_LOG_FATAL: Final = 4


class OnnxEngine:
    """A model file run by ONNX Runtime. Calls from several slots may overlap: a session is thread-safe.

    `providers` are tried in order (default: the CPU alone) and may be given in short (`"cuda"` for
    `"CUDAExecutionProvider"`), with options as `(name, options)`. `threads` is the number of threads that one
    call may use. `graph_optimization_level`: disable, basic, extended or all. `name` defaults to the file's
    stem. Weights in files of their own are found beside the model.

    Batch axes come from the model. With several inputs the batch dimension is the symbolic name that occurs
    in the most of them, if in at least two (a tie goes to the lowest axis of the first of them); a tensor
    that has it is batched on it. Any other tensor is batched on axis 0 if that is symbolic or unnamed.
    `batch_axes` overrides the axis of a tensor by its name; None says that it has none. The model is
    batchable if an input has a batch axis and every output has one. Inputs without one are allowed if their
    shape is fixed or `batch_axes` says None. Where it is not clear which axis is meant, the model is never
    batched, and the metadata of `model_info` says why under `not_batched`.

    onnxruntime reports a tensor of unknown rank as a scalar: such an input can be used as a scalar only.

    Construction opens nothing. Raises `ValueError` for an unknown `graph_optimization_level` and for
    `threads` below 1; everything that depends on the installation or the file is a `ModelLoadError` of
    `load`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: Sequence[Provider] | None = None,
        threads: int = 1,
        graph_optimization_level: str = "all",
        name: str | None = None,
        version: str = "1",
        batch_axes: Mapping[str, int | None] | None = None,
    ) -> None:
        if graph_optimization_level not in _GRAPH_LEVELS:
            raise ValueError(
                f"graph_optimization_level: expected one of {', '.join(_GRAPH_LEVELS)}, "
                f"got {graph_optimization_level!r}"
            )
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        self.retry = True
        self.max_streams = 0
        self._path = Path(path)
        self._providers = tuple(providers) if providers else (_CPU,)
        self._threads = threads
        self._graph_level = graph_optimization_level
        self._name = name or self._path.stem
        self._version = version
        self._batch_axes = dict(batch_axes or {})
        self._tally = CallTally()
        self._opened: _Opened | None = None
        self._lost = False
        self.bounded_call = False

    def __repr__(self) -> str:
        return (
            f"OnnxEngine({str(self._path)!r}, providers={self._providers!r}, threads={self._threads}, "
            f"name={self._name!r})"
        )

    # ------------------------------------------------------------------------------------- life

    def load(self) -> None:
        """Open the session; a no-op on a loaded engine. `bounded_call` is decided here.

        Raises `ModelLoadError`: onnxruntime is missing, a provider is not there or does not start, the file
        is missing or no model, a tensor's type has no numpy array, or `batch_axes` does not fit the model.
        """
        if self._opened is not None:
            return
        opened = self._open()
        shapes_bound_it = opened.on_cpu and all(_is_bounded(spec) for spec in opened.info.inputs)
        self.bounded_call = shapes_bound_it and not _has_control_flow(self._path)
        self._lost = False
        self._tally.reset()
        self._opened = opened

    def warmup(self) -> None:
        """One call of one row of zeros, uncounted: the first call allocates what later ones use again.

        Zeros are not always valid input: that a model refuses them is no error. Raises `Unavailable` if the
        device fails and `ModelNotLoaded` before `load`.
        """
        if not self._probe(self._loaded()):
            raise Unavailable(f"{self._name}: the device failed in the warm-up call")

    def unload(self) -> None:
        """Close the session. Calls in flight end first, each holds the session that it runs in."""
        self._opened = None

    def health_check(self) -> bool:
        """Whether the engine is loaded and its device answers. Costs a call only after the device failed."""
        opened = self._opened
        if opened is not None and self._lost:
            self._lost = not self._probe(opened)
        return opened is not None and not self._lost

    def for_cpu(self) -> OnnxEngine:
        """Itself if all it uses is the CPU, else a new engine over the same file there, not loaded yet."""
        on_cpu = self._opened.on_cpu if self._opened else {_short_name(p) for p in self._providers} == {"cpu"}
        if on_cpu:
            return self
        return OnnxEngine(
            self._path,
            threads=self._threads,
            graph_optimization_level=self._graph_level,
            name=self._name,
            version=self._version,
            batch_axes=self._batch_axes,
        )

    # ------------------------------------------------------------------------------------ calls

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """Run the model once. `inputs` has every input under its name, in its dtype and with its batch axis.

        Strings may be `str` or UTF-8 `bytes`; string outputs are `str`. Raises `InvalidInput` for what
        onnxruntime calls an invalid argument, `Unavailable` where the device failed, `InferenceError` or
        `Backend` for the rest, `ModelNotLoaded` before `load`.
        """
        opened = self._loaded()
        started = time.perf_counter()
        try:
            feed = _with_text(inputs, opened.text_inputs) if opened.text_inputs else inputs
            outputs = opened.run(feed)
        except Exception as error:
            self._tally.add(0, time.perf_counter() - started, failed=True)
            raise self._translated(error) from error
        self._tally.add(opened.rows(inputs), time.perf_counter() - started)
        return dict(zip(opened.output_names, outputs, strict=True))

    def infer_stream(self, inputs: Tensors) -> Iterator[dict[str, Array]]:
        """The one result of `infer`: a session has no partial ones."""
        yield self.infer(inputs)

    def metrics(self) -> EngineMetrics:
        """Counts since `load`. A model without a batch axis counts one row a call."""
        return self._tally.total()

    def model_info(self) -> ModelInfo:
        """What the model says of itself; `metadata` has its producer and its own entries. `ModelNotLoaded`
        before `load`."""
        return self._loaded().info

    # ----------------------------------------------------------------------------------- inside

    def _loaded(self) -> _Opened:
        if self._opened is None:
            raise ModelNotLoaded(f"{self._name}: the engine is not loaded")
        return self._opened

    def _open(self) -> _Opened:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise ModelLoadError(
                f"{self._name}: ONNX models need onnxruntime: pip install 'kapsl-scheduler[onnx]'"
            ) from error
        if not self._path.is_file():
            raise ModelLoadError(f"{self._name}: no such file: {self._path}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_ERRORS
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _GRAPH_LEVELS[self._graph_level])
        providers = _resolve(self._providers, ort.get_available_providers())
        try:
            session = ort.InferenceSession(str(self._path), options, providers=providers)
        except Exception as error:
            raise ModelLoadError(f"{self._name}: {error}") from error
        # Where a device fails, onnxruntime would switch to the CPU, for good: that is for the scheduler to decide.
        session.disable_fallback()
        _check_started(providers, session.get_providers())
        run_options = ort.RunOptions()
        run_options.log_severity_level = _LOG_FATAL
        return _Opened(session, run_options, _describe(session, self._name, self._version, self._batch_axes))

    def _translated(self, error: Exception) -> EngineError:
        if isinstance(error, EngineError):
            return error
        kind = _ERRORS.get(type(error).__name__, InferenceError)
        if kind is Unavailable:
            self._lost = True
        return kind(f"{self._name}: {error}")

    def _probe(self, opened: _Opened) -> bool:
        """Run zeros, uncounted. False only if the device fails: a model may well refuse zeros."""
        zeros = {spec.name: _zeros(spec) for spec in opened.info.inputs}
        try:
            opened.run(zeros)
        except Exception as error:
            return not isinstance(self._translated(error), Unavailable)
        return True


class _Opened:
    """What a loaded engine has. `infer` reads it once, so that an `unload` meanwhile cannot mix two states."""

    __slots__ = ("_by_value", "info", "on_cpu", "output_names", "rows", "run_options", "session", "text_inputs")

    def __init__(self, session: Any, run_options: Any, info: ModelInfo) -> None:
        self.session = session
        self.run_options = run_options
        self.info = info
        self.on_cpu: bool = session.get_providers() == [_CPU]
        self.output_names = [spec.name for spec in info.outputs]
        self.text_inputs = frozenset(spec.name for spec in info.inputs if spec.dtype == "string")
        self.rows = RowCounter(info)
        self._by_value = any(spec.dtype == "bfloat16" for spec in (*info.inputs, *info.outputs))

    def run(self, inputs: Tensors) -> list[Array]:
        """The outputs, in their order. Raises what onnxruntime raises."""
        if self._by_value:
            plain = {name: _bits(array) for name, array in inputs.items()}  # held while they are in use
            values = {name: _as_value(plain[name], array.dtype) for name, array in inputs.items()}
            return [
                _from_value(value)
                for value in self.session.run_with_ort_values(self.output_names, values, self.run_options)
            ]
        outputs: list[Array] = self.session.run(self.output_names, inputs, self.run_options)
        return outputs


# -------------------------------------------------------------------------------------------- providers


def _short_name(provider: Provider) -> str:
    name = provider if isinstance(provider, str) else provider[0]
    return name.removesuffix(_SUFFIX).lower()


def usable_providers(wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of `wanted` that this onnxruntime has, in their order and in short (`cuda`), and the CPU after them."""
    try:
        import onnxruntime as ort
    except ImportError:  # which `load` reports
        return ("cpu",)
    available = {_short_name(name) for name in ort.get_available_providers()}
    usable = [name for name in map(_short_name, wanted) if name in available and name != "cpu"]
    return (*dict.fromkeys(usable), "cpu")


def _resolve(wanted: Sequence[Provider], available: Sequence[str]) -> list[Any]:
    """The providers under onnxruntime's own names. Raises `ModelLoadError` for any that it does not have."""
    by_short_name = {_short_name(name): name for name in available}
    missing = [provider for provider in wanted if _short_name(provider) not in by_short_name]
    if missing:
        raise ModelLoadError(
            f"providers: this onnxruntime has {', '.join(available)}; not {', '.join(map(str, missing))}"
        )
    full_names = [by_short_name[_short_name(provider)] for provider in wanted]
    return [
        name if isinstance(provider, str) else (name, dict(provider[1]))
        for name, provider in zip(full_names, wanted, strict=True)
    ]


def _check_started(wanted: Sequence[Any], started: Sequence[str]) -> None:
    """onnxruntime only logs that a provider did not start, and takes the CPU: fine if the CPU is listed."""
    names = [provider if isinstance(provider, str) else provider[0] for provider in wanted]
    absent = [name for name in names if name not in started]
    if absent and _CPU not in names:
        raise ModelLoadError(
            f"providers: {', '.join(absent)} did not start (onnxruntime has logged why); "
            f"list {_CPU} as well if the CPU will do instead"
        )


# ------------------------------------------------------------------------------------------------- model


def _describe(session: Any, name: str, version: str, overrides: Mapping[str, int | None]) -> ModelInfo:
    """The session's model. Raises `ModelLoadError` for types without an array and overrides that do not fit."""
    inputs = [_spec(node, "input", name) for node in session.get_inputs()]
    outputs = [_spec(node, "output", name) for node in session.get_outputs()]
    try:
        layout = find_batch_axes(inputs, outputs, overrides)
    except ValueError as error:
        raise ModelLoadError(f"{name}: batch_axes: {error}") from error
    meta = session.get_modelmeta()
    facts = {"producer": meta.producer_name, "not_batched": layout.obstacle, **meta.custom_metadata_map}
    return ModelInfo(
        name=name,
        inputs=layout.inputs,
        outputs=layout.outputs,
        version=version,
        framework="onnx",
        batchable=not layout.obstacle,
        metadata={key: value for key, value in facts.items() if value},
    )


def _spec(node: Any, kind: str, model: str) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise ModelLoadError(f"{model}: {kind} {node.name!r} is a {node.type}; expected one of {', '.join(_DTYPES)}")
    return TensorSpec(node.name, dtype, tuple(size or None if isinstance(size, str) else size for size in node.shape))


def _has_control_flow(path: Path) -> bool:
    """Whether the graph may loop or branch on values, so that its shapes do not bound a call's time.

    The session does not tell its operators; in the file each stands as field 4 of its node, a length and the name. A
    match inside the weights is possible and harmless. A file too large to read for this is no model of 0.1 ms.
    """
    if path.stat().st_size > _READ_FOR_OPERATORS:
        return True
    content = path.read_bytes()
    return any(b"\x22" + bytes([len(name)]) + name in content for name in _CONTROL_FLOW)


def _is_bounded(spec: TensorSpec) -> bool:
    """Whether the shape bounds the work of a row."""
    inner = [size for axis, size in enumerate(spec.shape) if axis != spec.batch_axis]
    return spec.dtype != "string" and all(isinstance(size, int) for size in inner)


# ------------------------------------------------------------------------------------------------ values


def _zeros(spec: TensorSpec) -> Array:
    """One row of zeros (or of empty strings), with 1 for every open dimension."""
    shape = tuple(size if isinstance(size, int) else 1 for size in spec.shape)
    return np.full(shape, "" if spec.dtype == "string" else 0, numpy_dtype(spec.dtype))


def _bits(array: Array) -> Array:
    """Of numpy's types, onnxruntime takes all but bfloat16, which it takes as its bits."""
    return np.ascontiguousarray(array).view(np.uint16) if array.dtype == _BFLOAT16 else array


def _as_value(bits: Array, dtype: np.dtype[Any]) -> Any:
    """onnxruntime's own tensor over an array, which is to live as long."""
    import onnxruntime as ort

    if dtype == _BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(bits)


def _from_value(value: Any) -> Array:
    """A tensor of onnxruntime's as an array of its own, also one of bfloat16, which it does not make."""
    if value.element_type() != _ONNX_BFLOAT16:
        array: Array = value.numpy()
        return array
    shape = tuple(value.shape())
    if not math.prod(shape):
        return np.empty(shape, _BFLOAT16)
    there = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(bytearray(there), _BFLOAT16).reshape(shape)


def _with_text(inputs: Tensors, names: Collection[str]) -> dict[str, Array]:
    """The inputs, those of `names` with `str` elements: onnxruntime takes the repr of anything else."""
    return {name: _as_text(name, array) if name in names else array for name, array in inputs.items()}


def _as_text(name: str, array: Array) -> Array:
    """The array with `bytes` decoded. Raises `InvalidInput` for anything that is neither str nor UTF-8
    bytes."""
    if array.dtype.kind == "U":
        return array
    text = np.empty(array.size, dtype=object)
    for index, item in enumerate(array.flat):
        if isinstance(item, str):
            text[index] = item
        elif isinstance(item, bytes):
            try:
                text[index] = item.decode()
            except UnicodeDecodeError as error:
                raise InvalidInput(f"input {name!r}: element {index} is not UTF-8: {error}") from error
        else:
            raise InvalidInput(f"input {name!r}: element {index}: expected str or bytes, got {type(item).__name__}")
    return text.reshape(array.shape)
