"""Any Python function over batches as an engine: plain or coroutine function, generator or async generator.

What is not here: batching itself. The function is given batches that are formed already.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from kapsl_scheduler.engines.tally import CallTally, RowCounter
from kapsl_scheduler.errors import InferenceError, ModelNotLoaded
from kapsl_scheduler.types import Array, EngineMetrics, ModelInfo, Tensors, TensorSpec, canonical_dtype

__all__ = ["CallableEngine"]

# A tensor's spec, or its dtype and shape: ("float32", (None, 64)), the batch axis included.
Declared = TensorSpec | tuple[str, Sequence[int | str | None]]


class CallableEngine:
    """A function as an engine.

    `function` is called with the one input as its positional argument, or with several inputs by name. It
    returns an array, a tuple of arrays or a mapping of names to arrays (anything that `numpy.asarray` takes
    will do for an array). Outputs without a name get those of `outputs`, else `output_0`, `output_1`, ...

    - A plain function makes an `Engine`, a coroutine function an `AsyncEngine`: `CallableEngine(function)` is
      an instance of this class in either case.
    - A generator function streams what it yields, and so does an async generator function. `infer` runs it to
      the end and answers with its last chunk.

    `batched` says that it takes batches, with rows on axis 0 of every array that is not declared otherwise,
    and returns as many rows. False: it is called with one request at a time, as the request came. `inputs`
    and `outputs` declare tensors by name, as a `TensorSpec` or as dtype and shape; without inputs nothing is
    validated. `retry`, `bounded_call` and `max_streams` are as in the `Engine` port; several slots call the
    function at the same time.

    Raises `TypeError` if `function` cannot be called, `ValueError` for a dtype that does not exist. What the
    function raises goes to the caller as it is.
    """

    retry: bool
    bounded_call: bool
    max_streams: int

    def __new__(cls, function: Callable[..., Any], **_: Any) -> CallableEngine:
        """The variant of the port that suits the function."""
        if cls is not CallableEngine:
            raise TypeError("CallableEngine takes a function; an engine of another class needs only the methods")
        return super().__new__(_AsyncCallable if _is_async(function) else _SyncCallable)

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        batched: bool = True,
        name: str | None = None,
        version: str = "1",
        inputs: Mapping[str, Declared] | None = None,
        outputs: Mapping[str, Declared] | None = None,
        max_streams: int = 0,
        retry: bool = True,
        bounded_call: bool = False,
    ) -> None:
        if not callable(function):
            raise TypeError(f"function: expected a callable, got {type(function).__name__}")
        self.retry = retry
        self.bounded_call = bounded_call
        self.max_streams = max_streams
        self._function = function
        self._streams = _yields(function)
        self._info = ModelInfo(
            name=name or _name_of(function),
            inputs=tuple(_spec(key, given, batched) for key, given in (inputs or {}).items()),
            outputs=tuple(_spec(key, given, batched) for key, given in (outputs or {}).items()),
            version=version,
            framework="python",
            batchable=batched,
            streams=self._streams,
        )
        self._output_names = tuple(spec.name for spec in self._info.outputs)
        self._rows = RowCounter(self._info)
        self._tally = CallTally()
        self._loaded = False

    def __repr__(self) -> str:
        return f"CallableEngine({self._info.name!r}, batched={self._info.batchable})"

    # ------------------------------------------------------------------------------------- port

    def load(self) -> None:
        """Ready for calls, with counts at zero; a no-op on a loaded engine."""
        if not self._loaded:
            self._tally.reset()
            self._loaded = True

    def warmup(self) -> None:
        """Nothing to do: what a function's first call needs is the function's own."""

    def infer(self, inputs: Tensors) -> Any:
        """Call the function once; a coroutine function in the async variant.

        Raises `InferenceError` for a result that is no outputs, `ModelNotLoaded` before `load`, and what the
        function raises.
        """
        raise NotImplementedError

    def infer_stream(self, inputs: Tensors) -> Any:
        """What the function yields, chunk by chunk (a function that returns: its one result). Closing the
        iterator closes the function's generator. Raises as `infer` does."""
        raise NotImplementedError

    def unload(self) -> None:
        """Calls raise `ModelNotLoaded` from here on."""
        self._loaded = False

    def health_check(self) -> bool:
        """Whether it is loaded: a function has no health of its own."""
        return self._loaded

    def metrics(self) -> EngineMetrics:
        """Counts since `load`; a stream counts as one call."""
        return self._tally.total()

    def model_info(self) -> ModelInfo:
        """The declared inputs and outputs; also before `load`."""
        return self._info

    def for_cpu(self) -> CallableEngine:
        """Itself: where a function runs is its own affair."""
        return self

    # ------------------------------------------------------------------------------------ inside

    def _call(self, inputs: Tensors) -> Any:
        if not self._loaded:
            raise ModelNotLoaded(f"{self._info.name}: the engine is not loaded")
        if len(inputs) == 1:
            return self._function(*inputs.values())
        return self._function(**inputs)

    def _named(self, result: Any) -> dict[str, Array]:
        """What the function returned, as arrays by name."""
        declared = self._output_names
        if isinstance(result, Mapping):
            outputs = {name: self._array(value) for name, value in result.items()}
            if declared and outputs.keys() != set(declared):
                raise InferenceError(f"{self._info.name}: {_expected(declared)}, got {', '.join(outputs)}")
            return outputs
        if result is None:
            raise InferenceError(f"{self._info.name}: expected an array, a tuple or a mapping, got nothing")
        values = result if isinstance(result, tuple) else (result,)
        names = declared or tuple(f"output_{index}" for index in range(len(values)))
        if len(names) != len(values):
            raise InferenceError(f"{self._info.name}: {_expected(declared)}, got {len(values)} without names")
        return {name: self._array(value) for name, value in zip(names, values, strict=True)}

    def _array(self, value: Any) -> Array:
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype == object and array is not value:
            # numpy makes an array of anything: a coroutine that nobody awaits would be an answer.
            raise InferenceError(
                f"{self._info.name}: expected an array, got a {type(value).__name__}; a function that returns "
                "generators or coroutines must be a generator or coroutine function itself"
            )
        return array

    def _count(self, inputs: Tensors, started: float, *, failed: bool) -> None:
        self._tally.add(self._rows(inputs), time.perf_counter() - started, failed=failed)


class _SyncCallable(CallableEngine):
    """A plain function, or a generator function."""

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        started, failed = time.perf_counter(), True
        try:
            outputs = self._named(self._last_chunk(inputs) if self._streams else self._call(inputs))
            failed = False
        finally:
            self._count(inputs, started, failed=failed)
        return outputs

    def _last_chunk(self, inputs: Tensors) -> Any:
        last = None
        for last in self._call(inputs):  # noqa: B007
            pass
        return last

    def infer_stream(self, inputs: Tensors) -> Iterator[dict[str, Array]]:
        if not self._streams:
            yield self.infer(inputs)
            return
        started, failed = time.perf_counter(), True
        try:
            with contextlib.closing(self._call(inputs)) as chunks:
                for chunk in chunks:
                    yield self._named(chunk)
            failed = False
        except GeneratorExit:
            failed = False
            raise
        finally:
            self._count(inputs, started, failed=failed)


class _AsyncCallable(CallableEngine):
    """A coroutine function, or an async generator function."""

    async def infer(self, inputs: Tensors) -> dict[str, Array]:
        started, failed = time.perf_counter(), True
        try:
            outputs = self._named(await (self._last_chunk if self._streams else self._call)(inputs))
            failed = False
        finally:
            self._count(inputs, started, failed=failed)
        return outputs

    async def _last_chunk(self, inputs: Tensors) -> Any:
        last = None
        async for last in self._call(inputs):  # noqa: B007
            pass
        return last

    async def infer_stream(self, inputs: Tensors) -> AsyncIterator[dict[str, Array]]:
        if not self._streams:
            yield await self.infer(inputs)
            return
        started, failed = time.perf_counter(), True
        try:
            async with contextlib.aclosing(self._call(inputs)) as chunks:
                async for chunk in chunks:
                    yield self._named(chunk)
            failed = False
        except GeneratorExit:
            failed = False
            raise
        finally:
            self._count(inputs, started, failed=failed)


# ------------------------------------------------------------------------------------------- functions


def _spec(name: str, given: Declared, batched: bool) -> TensorSpec:
    """The declared tensor, on axis 0 unless a `TensorSpec` says otherwise, on none where nothing is
    batched."""
    if not isinstance(given, TensorSpec):
        dtype, shape = given
        given = TensorSpec(name, dtype, tuple(shape), 0)
    dtype_given = canonical_dtype(given.dtype)
    if dtype_given is None:
        raise ValueError(f"{name}: there is no dtype {given.dtype!r}")
    axis = given.batch_axis if batched else None
    return msgspec.structs.replace(given, name=name, dtype=dtype_given, batch_axis=axis)


def _body(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs when `function` is called: the function inside partials, the `__call__` of an object."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _is_async(function: Callable[..., Any]) -> bool:
    body = _body(function)
    return inspect.iscoroutinefunction(body) or inspect.isasyncgenfunction(body)


def _yields(function: Callable[..., Any]) -> bool:
    body = _body(function)
    return inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body)


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _expected(names: Sequence[str]) -> str:
    return f"expected the outputs {', '.join(names)}"
